"""The files of a checkpoint folder besides its weights: which are copied, and how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitsandbytes.checkpoint.source import CONFIG_FILE, INDEX_FILE, Source
from bitsandbytes.checkpoint.tensorwriter import write_text, writing

#: Endings of files with weights. Copies of unquantized weights have no place beside quantized ones.
WEIGHT_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".ot",
)

#: Folders that tools keep for themselves.
PRIVATE_FOLDERS = frozenset({".git", ".cache", "__pycache__"})


def copy_sidecars(source: Source, folder: Path) -> tuple[list[str], list[str]]:
    """Copy everything but weights and ``config.json``.

    Links are followed only inside the folder and into the ``blobs`` of a hub cache, so that a
    checkpoint from elsewhere cannot pull private files of this machine into its copy.

    Returns:
        Files with weights that were left out, and warnings.
    """
    left_out, warnings = [], []
    for path in _walk(source.folder):
        name = path.relative_to(source.folder)
        if str(name) == CONFIG_FILE or str(name) == INDEX_FILE or str(name) in source.files:
            continue
        if path.name.endswith(WEIGHT_ENDINGS):
            left_out.append(str(name))
        elif not _may_follow(path, source.folder):
            warnings.append(f"{name} is a link out of the folder or no regular file and was not copied")
        else:
            target = folder / name
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                shutil.copymode(path, target)
    return left_out, warnings


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in PRIVATE_FOLDERS:
                yield from _walk(path)
        else:
            yield path


def _may_follow(path: Path, folder: Path) -> bool:
    if not path.is_file():
        return False
    if not path.is_symlink():
        return True
    target, root = path.resolve(), folder.resolve()
    # Hub cache: models--name/snapshots/revision/file is a link to models--name/blobs/hash.
    blobs = root.parent.parent / "blobs"
    return root in target.parents or (root.parent.name == "snapshots" and target.parent == blobs)


def write_config(source: Source, folder: Path, quantization: dict[str, Any], dtype: str | None) -> None:
    """Write ``config.json`` with the entry on quantization, and the dtype if tensors were cast to it."""
    config = {**source.config, "quantization_config": quantization}
    if dtype is not None:
        config = _with_dtype(config, dtype)
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = dtype
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Replace the dtype here and in the configurations of parts, under the name that each uses."""
    changed = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and (value is None or isinstance(value, str)):
            value = dtype
        elif isinstance(value, dict) and key != "quantization_config":
            value = _with_dtype(value, dtype)
        changed[key] = value
    return changed


def write_index(folder: Path, shards: dict[str, list[str]], parameters: int, nbytes: int) -> None:
    """Write the index of a checkpoint of several files.

    Args:
        folder: the new checkpoint.
        shards: keys by file.
        parameters: number of values before quantization.
        nbytes: bytes of all tensors.
    """
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    index = {"metadata": {"total_parameters": parameters, "total_size": nbytes}, "weight_map": weight_map}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
