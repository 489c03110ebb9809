"""What is asked of a quantization run, and the entry in ``config.json`` that says what was done."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitsandbytes.errors import ArgumentError, CheckpointError
from bitsandbytes.functional import DEFAULT_BLOCKSIZE_4BIT
from bitsandbytes.ops.common import check_blocksize

FORMATS = ("nf4", "fp4", "int8")

#: Dtypes by the names that ``config.json`` and the command line use.
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: Dtypes that packed 4-bit codes may be stored as; sharded training needs a float one.
STORAGE_DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

DEFAULT_SHARD_BYTES = 5 * 10**9

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``"5GB"`` (decimal) or ``"512MiB"`` (binary).

    Raises:
        ArgumentError: the text is not a size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ArgumentError(f"{text!r} is not a size; write for instance 5GB (decimal) or 512MiB (binary)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of :func:`~bitsandbytes.checkpoint.quantize_checkpoint`.

    Attributes:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        blocksize: values per block, 4 bit only.
        double_quant: also quantize the statistics to 8 bit, 4 bit only.
        compute_dtype: dtype of the matrix products, 4 bit only: ``"bfloat16"``, ``"float16"`` or
            ``"float32"``; where not given, that of the weights.
        storage: dtype that packed codes are stored as, 4 bit only.
        threshold: magnitude from which an activation is an outlier, int8 only.
        skip: names of modules to keep, or patterns for them as transformers reads
            ``llm_int8_skip_modules``; they add to the modules that transformers keeps by itself.
        dtype: cast floating point tensors to this dtype first, those to quantize and those to keep.
        max_shard_bytes: largest size of a file of weights; a single tensor may exceed it.
        device: where to quantize.
    """

    format: str = "nf4"
    blocksize: int = DEFAULT_BLOCKSIZE_4BIT
    double_quant: bool = False
    compute_dtype: str | None = None
    storage: str = "uint8"
    threshold: float = 6.0
    skip: tuple[str, ...] = ()
    dtype: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        _check_choice("format", self.format, FORMATS)
        check_blocksize("quantize_checkpoint", self.blocksize, even=True)
        for name in ("compute_dtype", "dtype"):
            value = getattr(self, name)
            if value is not None:
                _check_choice(name, value, tuple(COMPUTE_DTYPES))
        _check_choice("storage", self.storage, tuple(STORAGE_DTYPES))
        if not self.threshold >= 0.0:
            raise ArgumentError(f"threshold is {self.threshold}, expected a number from 0")
        if self.max_shard_bytes < 1:
            raise ArgumentError(f"max_shard_bytes is {self.max_shard_bytes}, expected a positive number")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ArgumentError(f"skip pattern {pattern!r} is no regular expression: {error}") from error
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ArgumentError(f"device is {self.device!r}: {error}") from error

    @property
    def four_bit(self) -> bool:
        """Whether the format is one of the 4-bit formats."""
        return self.format != "int8"

    @property
    def cast_dtype(self) -> torch.dtype | None:
        """The dtype to cast to first, if any."""
        return None if self.dtype is None else COMPUTE_DTYPES[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON can hold them."""
        return asdict(self)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name} is {value!r}, allowed: {', '.join(choices)}")


def quantization_config(options: QuantizeOptions, compute_dtype: str, skip_modules: list[str] | None) -> dict[str, Any]:
    """The entry ``quantization_config`` of ``config.json``, key by key what transformers writes.

    Args:
        options: the options.
        compute_dtype: dtype of the matrix products, resolved.
        skip_modules: modules that were kept; ``None`` where transformers' own rule finds them.
    """
    four_bit = options.four_bit
    return {
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": compute_dtype if four_bit else "float32",
        "bnb_4bit_quant_storage": options.storage if four_bit else "uint8",
        "bnb_4bit_quant_type": options.format if four_bit else "fp4",
        "bnb_4bit_use_double_quant": options.double_quant if four_bit else False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_threshold": 6.0 if four_bit else options.threshold,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "quant_method": "bitsandbytes",
    }


def refuse_quantized(config: dict[str, Any], keys: set[str], where: str) -> None:
    """Raise if a configuration or the names of tensors tell that a checkpoint is quantized already."""
    entry = config.get("quantization_config")
    if entry is not None:
        method = entry.get("quant_method") if isinstance(entry, dict) else entry
        raise CheckpointError(
            f"{where}: is already quantized (config.json: quant_method {method!r}); start from the original checkpoint"
        )
    marks = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".SCB", ".weight.absmax")
    marked = sorted(key for key in keys if key.endswith(marks))
    if marked:
        raise CheckpointError(
            f"{where}: is already quantized (it has {marked[0]!r}); start from the original checkpoint"
        )
