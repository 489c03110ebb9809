"""Kernels of the block-wise ops, and the list of all kernels.

The contract's checks have run; nothing is checked again. Launches go to torch's current stream of the
tensors' device. Tensors stay referenced by a name until the launch: torch's allocator keeps memory in
the order of the stream after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, empty

from bitsandbytes.backends.description import Kernel
from bnb_cuda import _C
from bnb_cuda.arguments import DTYPES, QUANT_TYPES, address, is_plain, plain, plain_or_none, stream_of
from bnb_cuda.int8 import INT8_KERNELS
from bnb_cuda.int8_linear import INT8_LINEAR_KERNELS
from bnb_cuda.matmul import MATMUL_KERNELS
from bnb_cuda.optim_prepared import OPTIM_KERNELS


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Native ``quantize_4bit``."""
    A = plain(A)
    count, device = A.numel(), A.device
    packed = empty(((count + 1) // 2 // quant_storage.itemsize, 1), dtype=quant_storage, device=device)
    absmax = empty(-(-count // blocksize), dtype=torch.float32, device=device)
    _C.quantize_4bit(
        device.index,
        stream_of(device.index),
        A.data_ptr(),
        DTYPES[A.dtype],
        count,
        blocksize,
        QUANT_TYPES[quant_type],
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    return packed, absmax


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Native ``dequantize_4bit``."""
    out = empty(shape, dtype=dtype, device=A.device)
    dequantize_into(out, A, absmax, blocksize, quant_type)
    return out


def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Native ``dequantize_4bit.out``."""
    if is_plain(out):
        dequantize_into(out, A, absmax, blocksize, quant_type)
    else:
        out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


def dequantize_4bit_nested(
    A: Tensor,
    absmax: Tensor,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax_offset: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_blocksize: int = 256,
) -> Tensor:
    """Native ``dequantize_4bit_nested``."""
    out = empty(shape, dtype=dtype, device=A.device)
    dequantize_into(out, A, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset, nested_blocksize)
    return out


def dequantize_into(
    out: Tensor,
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> None:
    """Dequantize into a plain tensor, whose size and dtype say how much and to what."""
    A, absmax = plain(A), plain(absmax)
    absmax_8bit, absmax_code = plain_or_none(absmax_8bit), plain_or_none(absmax_code)
    device = A.device.index
    _C.dequantize_4bit(
        device,
        stream_of(device),
        A.data_ptr(),
        absmax.data_ptr(),
        address(absmax_8bit),
        address(absmax_code),
        0 if absmax_code is None else absmax_code.numel(),
        address(absmax_offset),
        nested_blocksize,
        out.numel(),
        blocksize,
        QUANT_TYPES[quant_type],
        out.data_ptr(),
        DTYPES[out.dtype],
    )


def embedding_4bit(
    indices: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Native ``embedding_4bit``. A look-up outside of the table gives a row of NaN."""
    indices, B, absmax = indices.contiguous(), plain(B), plain(absmax)
    absmax_8bit, absmax_code = plain_or_none(absmax_8bit), plain_or_none(absmax_code)
    device = B.device.index
    out = empty((*indices.shape, shapeB[1]), dtype=dtype, device=B.device)
    _C.embedding_4bit(
        device,
        stream_of(device),
        indices.data_ptr(),
        indices.dtype == torch.int64,
        indices.numel(),
        B.data_ptr(),
        absmax.data_ptr(),
        address(absmax_8bit),
        address(absmax_code),
        0 if absmax_code is None else absmax_code.numel(),
        address(absmax_offset),
        shapeB[0],
        shapeB[1],
        blocksize,
        QUANT_TYPES[quant_type],
        out.data_ptr(),
        DTYPES[dtype],
    )
    return out


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Native ``quantize_blockwise``."""
    A, code = plain(A), plain(code)
    count, device = A.numel(), A.device
    codes = empty(A.shape, dtype=torch.uint8, device=device)
    absmax = empty(-(-count // blocksize), dtype=torch.float32, device=device)
    _C.quantize_blockwise(
        device.index,
        stream_of(device.index),
        A.data_ptr(),
        DTYPES[A.dtype],
        count,
        blocksize,
        code.data_ptr(),
        code.numel(),
        codes.data_ptr(),
        absmax.data_ptr(),
    )
    return codes, absmax


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Native ``dequantize_blockwise``."""
    out = empty(A.shape, dtype=dtype, device=A.device)
    _dequantize_blockwise_into(A, absmax, code, blocksize, out)
    return out


def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    """Native ``dequantize_blockwise.out``."""
    if is_plain(out):
        _dequantize_blockwise_into(A, absmax, code, blocksize, out)
    else:
        out.copy_(dequantize_blockwise(A, absmax, code, blocksize, dtype))


def _dequantize_blockwise_into(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    A, absmax, code = plain(A), plain(absmax), plain(code)
    device = A.device.index
    _C.dequantize_blockwise(
        device,
        stream_of(device),
        A.data_ptr(),
        absmax.data_ptr(),
        code.data_ptr(),
        code.numel(),
        out.numel(),
        blocksize,
        out.data_ptr(),
        DTYPES[out.dtype],
    )


#: What the backend serves, by op.
KERNELS = (
    Kernel("quantize_4bit", quantize_4bit),
    Kernel("dequantize_4bit", dequantize_4bit),
    Kernel("dequantize_4bit.out", dequantize_4bit_out),
    Kernel("dequantize_4bit_nested", dequantize_4bit_nested),
    Kernel("embedding_4bit", embedding_4bit),
    Kernel("quantize_blockwise", quantize_blockwise),
    Kernel("dequantize_blockwise", dequantize_blockwise),
    Kernel("dequantize_blockwise.out", dequantize_blockwise_out),
    *MATMUL_KERNELS,
    *INT8_KERNELS,
    *INT8_LINEAR_KERNELS,
    *OPTIM_KERNELS,
)
