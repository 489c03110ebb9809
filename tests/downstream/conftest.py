"""The real language model, converted once, and what tests measure on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from get_model import get_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

TEXT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "data" / "text.txt"

transformers.logging.disable_progress_bar()

#: Quantization by name. A function each: transformers writes into the configuration it is given.
FORMATS = {
    "nf4-nested": lambda: four_bit("nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda: four_bit("fp4"),
    "nf4-bf16-storage": lambda: four_bit("nf4", bnb_4bit_quant_storage=torch.bfloat16),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int8-no-outliers": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
}


def four_bit(quant_type: str, **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.bfloat16, **options
    )


def load(folder: Path, name: str | None = None, **options: Any) -> Any:
    """A fresh model, quantized while it is loaded when ``name`` is one of :data:`FORMATS`."""
    if name is not None:
        options["quantization_config"] = FORMATS[name]()
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.bfloat16, "device_map": "cpu", **options})


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and of a single token: the large and the small matmul shapes."""
    return torch.cat([model(input_ids=part).logits for part in (ids[:, :-1], ids[:, -1:])], dim=1)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: packed weights in a float storage dtype hold NaN patterns, which equal nothing."""
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary bf16 checkpoint."""
    return get_model()


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def text_ids(tokenizer: Any) -> torch.Tensor:
    """The demo's text, shape (1, tokens)."""
    return tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"]


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Any:
    """The unquantized model; tests only read it."""
    return load(model_folder).eval()


@pytest.fixture(scope="session")
def quantized(model_folder: Path) -> Any:
    """``quantized(name)``: a model of that format, shared by the tests that only read it."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            models[name] = load(model_folder, name).eval()
        return models[name]

    return get


@pytest.fixture(scope="session")
def tiny_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three layers of the real model as a checkpoint, for tests that train or move a lot."""
    folder = tmp_path_factory.mktemp("tiny")
    config = AutoConfig.from_pretrained(model_folder, num_hidden_layers=3)
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(model_folder, config=config, dtype=torch.bfloat16)
    transformers.logging.set_verbosity_warning()
    model.save_pretrained(folder)
    return folder
