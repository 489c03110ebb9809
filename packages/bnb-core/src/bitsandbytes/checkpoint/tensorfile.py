"""Reading safetensors files by position, with a header that is checked before it is believed.

The ``safetensors`` package maps a whole file into memory, which a limit on address space forbids for
large files; reading ranges needs memory for the range only. The format: eight bytes with the length
of the header (little endian), the header as a JSON object, then the bytes of the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from bitsandbytes.errors import CheckpointError

#: The largest header that the format allows.
MAX_HEADER_BYTES = 100_000_000

LENGTH_BYTES = 8

#: Bits per value of every dtype in the format, in the order in which a writer puts them into a file:
#: tensors lie from the widest to the narrowest, so that each starts at a multiple of its item size.
DTYPE_BITS = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}

#: The dtypes whose values are read here; tensors of other dtypes are only copied.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: Dtypes that hold real numbers and may be cast to another one.
FLOAT_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, for reading and writing files."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file.

    Attributes:
        name: key of the tensor.
        dtype: name in the format, such as ``"BF16"``.
        shape: sizes.
        start: offset of the first byte in the file.
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per value, for dtypes of whole bytes."""
        return DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorFile:
    """An open-on-demand safetensors file whose header has been checked.

    Attributes:
        path: the file.
        tensors: tensors by key, in the order of the header.
        metadata: the free text entries of the header.
        header_digest: SHA-256 of the header.
        size: bytes of the file.
        mtime_ns: time of the last change.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_digest: str
    size: int
    mtime_ns: int
    _handles: list[Any] = field(default_factory=list, repr=False, compare=False)

    def read(self, info: TensorInfo, first: int, count: int) -> torch.Tensor:
        """Read ``count`` values of a tensor from value number ``first``, as a vector.

        Raises:
            CheckpointError: the file cannot be read or has become shorter.
        """
        raw = self.read_bytes(info, first * info.itemsize, count * info.itemsize)
        return raw.view(TORCH_DTYPES[info.dtype])

    def read_bytes(self, info: TensorInfo, first: int, count: int) -> torch.Tensor:
        """Read ``count`` bytes of a tensor from byte number ``first``: uint8, shape ``(count,)``."""
        raw = torch.empty(count, dtype=torch.uint8)
        if not count:
            return raw
        target = bytes_of(raw)
        try:
            handle = self._handle()
            handle.seek(info.start + first)
            while target:
                done = handle.readinto(target)
                if not done:
                    raise CheckpointError(
                        f"{self.path}: ended inside tensor {info.name!r}; it was cut off while it was read"
                    )
                target = target[done:]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read tensor {info.name!r}: {error}") from error
        return raw

    def close(self) -> None:
        """Close the file; it opens again when it is read."""
        while self._handles:
            self._handles.pop().close()

    def _handle(self) -> Any:
        if not self._handles:
            self._handles.append(self.path.open("rb", buffering=0))
        return self._handles[0]


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, or its header is not true of it: lengths, dtypes,
            duplicate names, or tensors that overlap, leave gaps or end elsewhere than the file.
    """
    try:
        stat = path.stat()
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            _check_header_length(path, length, len(prefix), stat.st_size)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if len(header) != length:
        raise CheckpointError(f"{path}: ends inside its header")
    entries = parse_object(f"{path}, header", header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a table of texts")
    base = LENGTH_BYTES + length
    tensors = {name: _tensor_info(path, name, entry, base) for name, entry in entries.items()}
    _check_layout(path, tensors, base, stat.st_size)
    return TensorFile(path, tensors, metadata, hashlib.sha256(header).hexdigest(), stat.st_size, stat.st_mtime_ns)


def _check_header_length(path: Path, length: int, prefix: int, size: int) -> None:
    if prefix < LENGTH_BYTES:
        raise CheckpointError(f"{path}: has {size} bytes and is no safetensors file")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: announces a header of {length} bytes, the format allows {MAX_HEADER_BYTES}; "
            "it is damaged or no safetensors file"
        )
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: announces a header of {length} bytes but has {size} bytes in all; it is cut off or damaged"
        )


class _DuplicateKeyError(ValueError):
    """A JSON object names the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def parse_object(where: str, text: bytes) -> dict[str, Any]:
    """Read a JSON object in which no key stands twice.

    Args:
        where: file and part, for messages.
        text: the JSON text in UTF-8.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{where}: names {error.args[0]!r} twice") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds a {type(content).__name__}, expected an object")
    return content


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is described by {entry!r:.200}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has dtype {dtype!r:.100}, the format knows {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise CheckpointError(f"{where} has shape {shape!r:.200}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(f"{where} has data_offsets {offsets!r:.200}, expected two positions")
    start, stop = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if stop < start or (stop - start) * 8 != bits:
        raise CheckpointError(
            f"{where} of {dtype} {tuple(shape)} needs {bits // 8} bytes, but its data_offsets {start} to {stop} "
            f"hold {stop - start}"
        )
    return TensorInfo(name, dtype, tuple(shape), base + start, stop - start)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    end, previous = base, None
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.nbytes)):
        if info.start < end:
            raise CheckpointError(f"{path}: tensor {info.name!r} overlaps tensor {previous!r}")
        if info.start > end:
            raise CheckpointError(f"{path}: {info.start - end} unused bytes before tensor {info.name!r}")
        end, previous = info.start + info.nbytes, info.name
    if end > size:
        raise CheckpointError(f"{path}: cut off: its header describes {end} bytes, the file has {size}")
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor that its header does not describe")
