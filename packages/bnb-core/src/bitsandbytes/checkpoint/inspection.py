"""What a checkpoint holds, told from headers and descriptions; weights are not read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import ceil, prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from bitsandbytes.blob import MAX_BLOB_BYTES
from bitsandbytes.checkpoint.encode import ROW_FORMAT
from bitsandbytes.checkpoint.source import CONFIG_FILE, open_weights, read_json
from bitsandbytes.checkpoint.tensorfile import TORCH_DTYPES, TensorFile, TensorInfo, open_tensor_file
from bitsandbytes.codebooks import code_4bit
from bitsandbytes.errors import CheckpointError
from bitsandbytes.state import QuantState

_DESCRIPTION_MARK = ".quant_state.bitsandbytes__"
_COMPANIONS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

#: Kinds of quantized tensors; every other kind is the name of a dtype.
QUANTIZED_KINDS = ("nf4", "fp4", "int8")

_UNREADABLE_KIND = "invalid"


@dataclass
class TensorSummary:
    """One tensor; a quantized one stands for its companions as well.

    Attributes:
        name: key.
        file: file that holds it.
        kind: ``"nf4"``, ``"fp4"``, ``"int8"``, ``"invalid"`` for a quantized tensor whose description
            is damaged, or the dtype in the format of a tensor that is not quantized.
        shape: shape before quantization.
        dtype: dtype before quantization, where it is known.
        storage: dtype in the file.
        nbytes: bytes with companions.
        blocksize: values per block, 4 bit only.
        nested: whether statistics are quantized too, 4 bit only.
        problem: what is wrong with it.
    """

    name: str
    file: str
    kind: str
    shape: tuple[int, ...]
    dtype: str | None
    storage: str
    nbytes: int
    blocksize: int | None = None
    nested: bool | None = None
    problem: str | None = None

    @property
    def parameters(self) -> int:
        """Number of values before quantization."""
        return prod(self.shape)


@dataclass
class CheckpointSummary:
    """What :func:`inspect_checkpoint` finds.

    Attributes:
        path: folder or file.
        format: ``"nf4"``, ``"fp4"``, ``"int8"``, ``"mixed"`` or ``"none"``.
        files: names of the files of weights.
        nbytes: bytes of these files.
        parameters: values before quantization.
        bits_per_parameter: bits of all tensors per value.
        quantized_bits_per_parameter: bits per value of the quantized tensors, statistics included.
        kinds: tensors, parameters and bytes by kind.
        blocksizes: block sizes of 4-bit tensors.
        nested: whether statistics of 4-bit tensors are quantized: all (true), none (false), or
            ``None`` where it differs or there are none.
        config: entry ``quantization_config`` of ``config.json``.
        problems: everything that is wrong; empty for a sound checkpoint.
        tensors: every tensor.
    """

    path: str
    format: str
    files: list[str]
    nbytes: int
    parameters: int
    bits_per_parameter: float
    quantized_bits_per_parameter: float | None
    kinds: dict[str, dict[str, int]]
    blocksizes: list[int]
    nested: bool | None
    config: dict[str, Any] | None
    problems: list[str]
    tensors: list[TensorSummary] = field(repr=False)

    def to_dict(self, tensors: bool = False) -> dict[str, Any]:
        """The summary as JSON can hold it, with or without the list of tensors."""
        result = asdict(self)
        if not tensors:
            del result["tensors"]
        return result


def inspect_checkpoint(path: str | PathLike[str]) -> CheckpointSummary:
    """Tell what a checkpoint folder or a safetensors file holds.

    Only headers and the descriptions of 4-bit tensors are read, a few kilobytes. Every description is
    checked as loading checks it.

    Args:
        path: folder with safetensors files, or one such file.

    Raises:
        CheckpointError: there is no checkpoint, or a file is damaged. What is wrong with single
            quantized tensors does not raise; it is listed in ``problems``.
    """
    path = Path(path)
    config: dict[str, Any] | None = None
    problems: list[str] = []
    if path.is_dir():
        files, problems = open_weights(path)
        if (path / CONFIG_FILE).is_file():
            config = read_json(path / CONFIG_FILE)
    elif path.is_file():
        files = {path.name: open_tensor_file(path)}
    else:
        raise CheckpointError(f"{path}: no such file or folder")
    tensors = [summary for file in files.values() for summary in _summaries(file)]
    problems += _twice(files)
    problems += [
        f"{summary.file}: tensor {summary.name!r}: {summary.problem}" for summary in tensors if summary.problem
    ]
    if config is not None:
        problems += _config_problems(config.get("quantization_config"), tensors)
    return _summarize(path, files, tensors, problems, (config or {}).get("quantization_config"))


def _twice(files: dict[str, TensorFile]) -> list[str]:
    home: dict[str, str] = {}
    problems = []
    for name, file in files.items():
        for key in file.tensors:
            if key in home:
                problems.append(f"tensor {key!r} is in two files, {home[key]} and {name}")
            home[key] = name
    return problems


def _summaries(file: TensorFile) -> list[TensorSummary]:
    left = dict(file.tensors)
    result = []
    try:
        for key in [key for key in file.tensors if _DESCRIPTION_MARK in key]:
            result.append(_take_4bit(file, key, left))
        for key in [key for key in file.tensors if key == "SCB" or key.endswith(".SCB")]:
            result.append(_take_int8(file, key, left))
        for key in [key for key in left if key.endswith((".weight.absmax", ".weight.nested_absmax"))]:
            summary = _plain(file, left.pop(key))
            summary.kind, summary.problem = _UNREADABLE_KIND, "statistics of a 4-bit tensor without its description"
            result.append(summary)
    finally:
        file.close()
    return result + [_plain(file, info) for info in left.values()]


def _plain(file: TensorFile, info: TensorInfo) -> TensorSummary:
    return TensorSummary(info.name, file.path.name, info.dtype, info.shape, _torch_name(info), info.dtype, info.nbytes)


def _torch_name(info: TensorInfo) -> str | None:
    dtype = TORCH_DTYPES.get(info.dtype)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _take_4bit(file: TensorFile, description: str, left: dict[str, TensorInfo]) -> TensorSummary:
    """Collect a 4-bit tensor with its companions and check that they fit together."""
    name, _, kind = description.partition(_DESCRIPTION_MARK)
    companions = {key: left.pop(f"{name}.{key}") for key in _COMPANIONS_4BIT if f"{name}.{key}" in left}
    blob, weight = left.pop(description), left.pop(name, None)
    nbytes = blob.nbytes + sum(info.nbytes for info in companions.values()) + (weight.nbytes if weight else 0)
    summary = TensorSummary(name, file.path.name, _UNREADABLE_KIND, (), None, weight.dtype if weight else "", nbytes)
    if weight is None:
        summary.problem = "the packed codes are missing, though there is a description"
        return summary
    try:
        state = _read_state(file, description, blob, companions)
        summary.kind, summary.shape = kind, tuple(state.shape or ())
        summary.dtype = str(state.dtype).removeprefix("torch.")
        summary.blocksize, summary.nested = state.blocksize, state.nested
        _check_codes(state, kind, weight)
        _check_codebook(file, companions["quant_map"], kind)
    except CheckpointError as error:
        summary.kind, summary.problem = _UNREADABLE_KIND, str(error)
    return summary


def _read_state(file: TensorFile, description: str, blob: TensorInfo, companions: dict[str, TensorInfo]) -> QuantState:
    """The state, with statistics that have shapes and dtypes but no values."""
    if blob.dtype != "U8" or blob.nbytes > MAX_BLOB_BYTES:
        raise CheckpointError(f"its description is {blob.dtype} of {blob.nbytes} bytes, expected U8 of a few hundred")
    entries: dict[str, Any] = {}
    for key, info in companions.items():
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{key} has dtype {info.dtype}")
        entries[key] = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
    entries[description.rpartition(_DESCRIPTION_MARK)[0] + _DESCRIPTION_MARK + description.rpartition("__")[2]] = (
        file.read(blob, 0, blob.numel)
    )
    return QuantState.from_dict(entries, device="meta")


def _check_codes(state: QuantState, kind: str, weight: TensorInfo) -> None:
    if state.quant_type != kind:
        raise CheckpointError(f"is named {kind}, but its description says {state.quant_type}")
    if state.shape is None:
        raise CheckpointError("its description has no shape")
    expected = ceil(prod(state.shape) / 2)
    if weight.nbytes != expected:
        raise CheckpointError(
            f"has {weight.nbytes} bytes of codes, a tensor of shape {tuple(state.shape)} packs into {expected}"
        )


def _check_codebook(file: TensorFile, info: TensorInfo, kind: str) -> None:
    """Kernels have the codebook built in; another one in a file would be ignored silently."""
    if info.dtype != "F32":
        raise CheckpointError(f"quant_map has dtype {info.dtype}, expected F32")
    if not torch.equal(file.read(info, 0, info.numel), code_4bit(kind, torch.device("cpu")).reshape(-1)):
        raise CheckpointError(f"quant_map is not the table of {kind}")


def _take_int8(file: TensorFile, scales_key: str, left: dict[str, TensorInfo]) -> TensorSummary:
    """Collect an int8 weight with its scales."""
    module = scales_key.removesuffix("SCB")
    name = f"{module}weight"
    scales, weight, layout = left.pop(scales_key), left.pop(name, None), left.pop(f"{module}weight_format", None)
    found = [info for info in (scales, weight, layout) if info is not None]
    shape = weight.shape if weight is not None else ()
    storage = weight.dtype if weight is not None else ""
    summary = TensorSummary(name, file.path.name, "int8", shape, None, storage, sum(info.nbytes for info in found))
    if weight is None:
        summary.problem = "the codes are missing, though there are scales"
    elif weight.dtype != "I8" or len(weight.shape) != 2:
        summary.problem = f"the codes are {weight.dtype} of shape {weight.shape}, expected an I8 matrix"
    elif scales.dtype != "F32" or scales.numel != weight.shape[0]:
        summary.problem = f"SCB is {scales.dtype} of {scales.numel} values, expected F32 of {weight.shape[0]}"
    elif layout is not None and (layout.numel != 1 or int(file.read(layout, 0, 1)) != ROW_FORMAT):
        summary.problem = "weight_format is not 0, the row-major layout"
    if summary.problem:
        summary.kind = _UNREADABLE_KIND
    return summary


def _config_problems(entry: Any, tensors: list[TensorSummary]) -> list[str]:
    """Contradictions between the configuration and the tensors."""
    kinds = {summary.kind for summary in tensors} & set(QUANTIZED_KINDS)
    if not kinds:
        ours = isinstance(entry, dict) and entry.get("quant_method") == "bitsandbytes"
        return [f"{CONFIG_FILE} says bitsandbytes, but no tensor is quantized"] if ours else []
    if not isinstance(entry, dict) or entry.get("quant_method") != "bitsandbytes":
        return [f"tensors are quantized, but {CONFIG_FILE} has no quantization_config of bitsandbytes"]
    expected = "int8" if entry.get("load_in_8bit") else entry.get("bnb_4bit_quant_type", "fp4")
    problems = [f"{CONFIG_FILE} says {expected}, but there are {kind} tensors" for kind in sorted(kinds - {expected})]
    storage = entry.get("bnb_4bit_quant_storage") or "uint8"
    for summary in tensors:
        stored = str(TORCH_DTYPES.get(summary.storage)).removeprefix("torch.")
        if summary.kind in ("nf4", "fp4") and stored != storage:
            problems.append(f"{CONFIG_FILE} says storage {storage}, but {summary.name!r} is stored as {stored}")
            break
    return problems


def _summarize(
    path: Path, files: dict[str, TensorFile], tensors: list[TensorSummary], problems: list[str], entry: Any
) -> CheckpointSummary:
    kinds: dict[str, dict[str, int]] = {}
    for summary in tensors:
        row = kinds.setdefault(summary.kind, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += summary.parameters
        row["bytes"] += summary.nbytes
    quantized = [summary for summary in tensors if summary.kind in QUANTIZED_KINDS]
    formats = sorted({summary.kind for summary in quantized})
    nested = {summary.nested for summary in quantized if summary.nested is not None}
    parameters = sum(summary.parameters for summary in tensors)
    return CheckpointSummary(
        path=str(path),
        format=formats[0] if len(formats) == 1 else ("mixed" if formats else "none"),
        files=list(files),
        nbytes=sum(file.size for file in files.values()),
        parameters=parameters,
        bits_per_parameter=_bits(tensors),
        quantized_bits_per_parameter=_bits(quantized) if quantized else None,
        kinds=dict(sorted(kinds.items())),
        blocksizes=sorted({summary.blocksize for summary in quantized if summary.blocksize is not None}),
        nested=nested.pop() if len(nested) == 1 else None,
        config=entry if isinstance(entry, dict) else None,
        problems=problems,
        tensors=sorted(tensors, key=lambda summary: summary.name),
    )


def _bits(tensors: list[TensorSummary]) -> float:
    return 8 * sum(summary.nbytes for summary in tensors) / max(sum(summary.parameters for summary in tensors), 1)
