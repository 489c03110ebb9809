"""Kernels of the block-wise ops: allocate the results, hand pointers to the native module.

The contract's checks have run; nothing is checked again. Tensors stay referenced by a name until the
native call returns: their addresses alone would not keep them alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from bitsandbytes.backends.description import Kernel
from bitsandbytes.ops.common import NESTED_BLOCKSIZE
from bitsandbytes.ops.fourbit_matmul import outside_of_table
from bnb_cpu.arguments import DTYPES, QUANT_TYPES, address, contiguous_or_none
from bnb_cpu.matmul import MATMUL_KERNELS
from bnb_cpu.memory import empty_result
from bnb_cpu.native import _C
from bnb_cpu.optim import OPTIM_KERNELS


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Native ``quantize_4bit``."""
    A = A.contiguous()
    count, device = A.numel(), A.device
    packed = empty_result(((count + 1) // 2 // quant_storage.itemsize, 1), quant_storage, device)
    absmax = empty_result((-(-count // blocksize),), torch.float32, device)
    _C.quantize_4bit(
        A.data_ptr(),
        DTYPES[A.dtype],
        count,
        blocksize,
        QUANT_TYPES[quant_type],
        packed.data_ptr(),
        absmax.data_ptr(),
        get_num_threads(),
    )
    return packed, absmax


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Native ``dequantize_4bit``."""
    out = empty_result(shape, dtype, A.device)
    _dequantize_4bit_into(A, absmax, blocksize, quant_type, out)
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
    if out.is_contiguous():
        _dequantize_4bit_into(A, absmax, blocksize, quant_type, out)
    else:
        out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


def _dequantize_4bit_into(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, out: Tensor) -> None:
    A, absmax = A.contiguous(), absmax.contiguous()
    _C.dequantize_4bit(
        A.data_ptr(),
        absmax.data_ptr(),
        out.numel(),
        blocksize,
        QUANT_TYPES[quant_type],
        out.data_ptr(),
        DTYPES[out.dtype],
        get_num_threads(),
    )


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
    A, absmax, absmax_8bit = A.contiguous(), absmax.contiguous(), absmax_8bit.contiguous()
    absmax_code = absmax_code.contiguous()
    out = empty_result(shape, dtype, A.device)
    _C.dequantize_4bit_nested(
        A.data_ptr(),
        absmax.data_ptr(),
        absmax_8bit.data_ptr(),
        absmax_code.data_ptr(),
        absmax_code.numel(),
        absmax_offset.data_ptr(),
        out.numel(),
        blocksize,
        nested_blocksize,
        QUANT_TYPES[quant_type],
        out.data_ptr(),
        DTYPES[dtype],
        get_num_threads(),
    )
    return out


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Native ``quantize_blockwise``."""
    A, code = A.contiguous(), code.contiguous()
    count, device = A.numel(), A.device
    codes = empty_result(A.shape, torch.uint8, device)
    absmax = empty_result((-(-count // blocksize),), torch.float32, device)
    _C.quantize_blockwise(
        A.data_ptr(),
        DTYPES[A.dtype],
        count,
        blocksize,
        code.data_ptr(),
        code.numel(),
        codes.data_ptr(),
        absmax.data_ptr(),
        get_num_threads(),
    )
    return codes, absmax


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Native ``dequantize_blockwise``."""
    out = empty_result(A.shape, dtype, A.device)
    _dequantize_blockwise_into(A, absmax, code, blocksize, out)
    return out


def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    """Native ``dequantize_blockwise.out``."""
    if out.is_contiguous():
        _dequantize_blockwise_into(A, absmax, code, blocksize, out)
    else:
        out.copy_(dequantize_blockwise(A, absmax, code, blocksize, dtype))


def _dequantize_blockwise_into(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    A, absmax, code = A.contiguous(), absmax.contiguous(), code.contiguous()
    _C.dequantize_blockwise(
        A.data_ptr(),
        absmax.data_ptr(),
        code.data_ptr(),
        code.numel(),
        out.numel(),
        blocksize,
        out.data_ptr(),
        DTYPES[out.dtype],
        get_num_threads(),
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
    """Native ``embedding_4bit``."""
    table_rows, width = shapeB
    rows, packed, outer = indices.contiguous(), B.contiguous(), absmax.contiguous()
    codes, code = contiguous_or_none(absmax_8bit), contiguous_or_none(absmax_code)
    out = empty_result((*indices.shape, width), dtype, indices.device)
    outside = _C.embedding_4bit(
        rows.data_ptr(),
        rows.itemsize,
        rows.numel(),
        packed.data_ptr(),
        table_rows,
        width,
        outer.data_ptr(),
        address(codes),
        address(code),
        0 if code is None else code.numel(),
        address(absmax_offset),
        blocksize,
        NESTED_BLOCKSIZE,
        QUANT_TYPES[quant_type],
        out.data_ptr(),
        DTYPES[dtype],
        get_num_threads(),
    )
    if outside >= 0:
        raise outside_of_table(indices, table_rows)
    return out


#: What the backend serves, by op.
KERNELS = (
    Kernel("quantize_4bit", quantize_4bit),
    Kernel("dequantize_4bit", dequantize_4bit),
    Kernel("dequantize_4bit.out", dequantize_4bit_out),
    Kernel("dequantize_4bit_nested", dequantize_4bit_nested),
    Kernel("quantize_blockwise", quantize_blockwise),
    Kernel("dequantize_blockwise", dequantize_blockwise),
    Kernel("dequantize_blockwise.out", dequantize_blockwise_out),
    Kernel("embedding_4bit", embedding_4bit),
    *MATMUL_KERNELS,
    *OPTIM_KERNELS,
)
