"""Quantizing one weight, in pieces where it is large, into a file that is being written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from bitsandbytes.autograd.int8 import quantize_weight
from bitsandbytes.checkpoint.options import STORAGE_DTYPES, QuantizeOptions
from bitsandbytes.checkpoint.report import Tally
from bitsandbytes.checkpoint.tensorfile import DTYPE_NAMES, TORCH_DTYPES, TensorFile, TensorInfo
from bitsandbytes.checkpoint.tensorwriter import ShardWriter
from bitsandbytes.codebooks import code_4bit
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.ops.common import NESTED_BLOCKSIZE, block_count
from bitsandbytes.state import QuantState

#: Values that are quantized at once. Working memory is a few dozen bytes per value.
CHUNK_VALUES = 1 << 23

#: Value of ``weight_format``: codes lie row by row. Others stood for layouts of GPU kernels that no
#: longer exist.
ROW_FORMAT = 0


class Matrix(Protocol):
    """A weight as (out, in), readable by rows or, in row-major order, by values."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows ``first`` to ``first + count``."""

    def values(self, first: int, count: int) -> torch.Tensor:
        """Values ``first`` to ``first + count`` as a vector."""


@dataclass
class StoredMatrix:
    """A weight that lies in a file as (out, in)."""

    file: TensorFile
    info: TensorInfo
    cast: torch.dtype | None

    def __post_init__(self) -> None:
        self.shape = (self.info.shape[0], self.info.shape[1])
        self.dtype = self.cast or TORCH_DTYPES[self.info.dtype]

    def values(self, first: int, count: int) -> torch.Tensor:
        """Values ``first`` to ``first + count`` as a vector."""
        return self.file.read(self.info, first, count).to(self.dtype)

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows ``first`` to ``first + count``."""
        columns = self.shape[1]
        return self.values(first * columns, count * columns).reshape(count, columns)


@dataclass
class TransposedMatrix:
    """A weight that lies in a file as (in, out), as ``Conv1D`` layers have it."""

    file: TensorFile
    info: TensorInfo
    cast: torch.dtype | None

    def __post_init__(self) -> None:
        self.shape = (self.info.shape[1], self.info.shape[0])
        self.dtype = self.cast or TORCH_DTYPES[self.info.dtype]

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows ``first`` to ``first + count``, which are columns in the file."""
        outs, ins = self.shape
        if count == outs:
            stored = self.file.read(self.info, 0, ins * outs).reshape(ins, outs)
        else:
            stored = torch.stack([self.file.read(self.info, row * outs + first, count) for row in range(ins)])
        return stored.to(self.dtype).t().contiguous()

    def values(self, first: int, count: int) -> torch.Tensor:
        """Values ``first`` to ``first + count`` as a vector."""
        columns = self.shape[1]
        start, stop = first // columns, -(-(first + count) // columns)
        values = self.rows(start, stop - start).reshape(-1)
        return values[first - start * columns :][:count]


@dataclass
class LoadedMatrix:
    """A weight in memory, as the conversions of an architecture make it."""

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        self.shape = (self.tensor.shape[0], self.tensor.shape[1])
        self.dtype = self.tensor.dtype

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows ``first`` to ``first + count``."""
        return self.tensor[first : first + count].contiguous()

    def values(self, first: int, count: int) -> torch.Tensor:
        """Values ``first`` to ``first + count`` as a vector."""
        return self.tensor.reshape(-1)[first : first + count]


def write_quantized(
    writer: ShardWriter, name: str, matrix: Matrix, options: QuantizeOptions, tally: Tally, chunk_values: int
) -> None:
    """Quantize a weight and write it with its companions.

    The bytes equal those of one call on the whole weight: blocks and rows do not depend on each other.

    Args:
        writer: the file.
        name: key of the weight, ``….weight``.
        matrix: the weight.
        options: format and its options.
        tally: receives counts and the error.
        chunk_values: values that are quantized at once, about.
    """
    if options.four_bit:
        _write_4bit(writer, name, matrix, options, tally, chunk_values)
    else:
        _write_int8(writer, name, matrix, options, tally, chunk_values)


def _chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """``(first, count)`` of consecutive pieces; one empty piece where there is nothing."""
    for first in range(0, max(total, 1), size):
        yield first, min(size, total - first)


def _write_4bit(
    writer: ShardWriter, name: str, matrix: Matrix, options: QuantizeOptions, tally: Tally, chunk_values: int
) -> None:
    total = matrix.shape[0] * matrix.shape[1]
    step = max(chunk_values // options.blocksize, 1) * options.blocksize
    storage = STORAGE_DTYPES[options.storage]
    packed_shape = ((total + 1) // 2 // storage.itemsize, 1)
    writer.begin(name, DTYPE_NAMES[storage], packed_shape)
    # Allocated before the pieces: many small results between large ones would fragment the heap.
    absmax = torch.empty(block_count(total, options.blocksize), dtype=torch.float32, device=options.device)
    values = torch.empty(0)
    for first, count in _chunks(total, step):
        values = matrix.values(first, count).to(options.device)
        packed, state = quantize_4bit(values, blocksize=options.blocksize, quant_type=options.format)
        writer.write(packed.cpu())
        absmax[first // options.blocksize :][: state.absmax.numel()] = state.absmax
        _count_nonfinite(tally, name, values)
    writer.end()
    state = _whole_state(matrix, absmax, options)
    for first, count in _chunks(total, step):
        packed = writer.reread(first // 2, (count + 1) // 2)
        if total > step:
            values = matrix.values(first, count).to(options.device)
        part = _part_of_state(state, first, count)
        decoded = dequantize_4bit(packed.to(options.device).reshape(-1, 1), part)
        _count_error(tally, values, decoded)
    for key, tensor in state.as_dict(packed=True).items():
        writer.add(f"{name}.{key}", tensor.cpu())


def _whole_state(matrix: Matrix, absmax: torch.Tensor, options: QuantizeOptions) -> QuantState:
    """The state of the whole weight from the absmax of all blocks; as ``quantize_4bit`` makes it."""
    offset, state2 = None, None
    if options.double_quant and absmax.numel():
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return QuantState(
        absmax=absmax,
        shape=torch.Size(matrix.shape),
        dtype=matrix.dtype,
        blocksize=options.blocksize,
        code=code_4bit(options.format, torch.device(options.device)),
        quant_type=options.format,
        offset=offset,
        state2=state2,
    )


def _part_of_state(state: QuantState, first: int, count: int) -> QuantState:
    """The state of some consecutive blocks, for dequantization in float32."""
    assert state.blocksize is not None
    blocks = slice(first // state.blocksize, -(-(first + count) // state.blocksize))
    absmax = state.plain_absmax() if state.nested else state.absmax
    return QuantState(
        absmax=absmax[blocks],
        shape=torch.Size((count,)),
        dtype=torch.float32,
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
    )


def _write_int8(
    writer: ShardWriter, name: str, matrix: Matrix, options: QuantizeOptions, tally: Tally, chunk_values: int
) -> None:
    rows, columns = matrix.shape
    writer.begin(name, "I8", matrix.shape)
    scales = torch.empty(rows, dtype=torch.float32, device=options.device)
    for first, count in _chunks(rows, max(chunk_values // max(columns, 1), 1)):
        values = matrix.rows(first, count).to(options.device)
        codes, absmax = quantize_weight(values)
        writer.write(codes.cpu())
        scales[first : first + count] = absmax
        _count_nonfinite(tally, name, values)
        _count_error(tally, values, int8_vectorwise_dequant(codes, absmax))
    writer.end()
    module = name.removesuffix("weight")
    writer.add(f"{module}SCB", scales.cpu())
    writer.add(f"{module}weight_format", torch.tensor(ROW_FORMAT, dtype=torch.uint8))


def _count_nonfinite(tally: Tally, name: str, values: torch.Tensor) -> None:
    count = values.numel() - int(torch.isfinite(values).sum())
    if count:
        tally.nonfinite[name] = tally.nonfinite.get(name, 0) + count


def _count_error(tally: Tally, values: torch.Tensor, decoded: torch.Tensor) -> None:
    """Add to the sums of error and norm; a value that is not finite has no error to speak of."""
    values, decoded = values.float().reshape(-1), decoded.reshape(-1)
    usable = torch.isfinite(values) & torch.isfinite(decoded)
    if not usable.all():
        values, decoded = values[usable], decoded[usable]
    tally.squared_norm += float(values.square().sum(dtype=torch.float64))
    tally.squared_error += float((values - decoded).square().sum(dtype=torch.float64))
