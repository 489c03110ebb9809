"""Stateless functions under their historical names.

A facade: argument defaults and ``QuantState`` on top of the ops in ``torch.ops.bitsandbytes``,
where checks, numerics and documentation of formulas live.
"""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.blob import pack_dict_to_tensor, unpack_tensor_to_dict
from bitsandbytes.codebooks import (
    code_4bit,
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dynamic_map,
    named_4bit_type,
)
from bitsandbytes.contract import TensorSpec, check_result_buffer
from bitsandbytes.errors import ArgumentError, ArgumentTypeError
from bitsandbytes.legacy.cpu_packing import (
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    has_avx512bf16,
)
from bitsandbytes.legacy.deprecated import (
    dequantize,
    dequantize_no_absmax,
    optimizer_update_8bit,
    quantize,
    quantize_no_absmax,
)
from bitsandbytes.legacy.igemm import batched_igemm, check_matmul, igemm
from bitsandbytes.legacy.paged import (
    GlobalPageManager,
    _mul,
    elementwise_func,
    fill,
    get_paged,
    prefetch_tensor,
)
from bitsandbytes.legacy.pointers import CUBLAS_Context, _cuda_device_of, _get_tensor_stream, get_ptr, is_on_gpu
from bitsandbytes.ops.common import NESTED_BLOCKSIZE, check_blocksize
from bitsandbytes.state import QuantState

ops = torch.ops.bitsandbytes

#: Largest int8 code.
C = 127.0

#: Codebooks by name, filled by whoever wants to share one.
name2qmap: dict[str, torch.Tensor] = {}

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)

#: Block size of 4-bit quantization where none is given.
DEFAULT_BLOCKSIZE_4BIT = 64


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize to 8-bit codes, block by block.

    Args:
        A: values, any shape, float32, float16 or bfloat16.
        code: codebook in ascending order, up to 256 values; the signed dynamic map where not given.
        absmax: float32 tensor of shape ``(blocks,)`` to write the statistics into.
        out: uint8 tensor in the shape of ``A`` to write the codes into.
        blocksize: values per block.
        nested: also quantize the statistics, after their mean is subtracted.

    Returns:
        ``(codes, state)``.
    """
    check_blocksize("quantize_blockwise", blocksize)
    code = dynamic_map(True, A.device).clone() if code is None else code.to(A.device, torch.float32)
    codes, stats = ops.quantize_blockwise.default(A, code, blocksize)
    codes = _deliver("quantize_blockwise", "out", codes, out)
    stats = _deliver("quantize_blockwise", "absmax", stats, absmax)
    if nested:
        offset = stats.mean()
        stats, state2 = quantize_blockwise(stats - offset, blocksize=blocksize)
        return codes, QuantState(
            absmax=stats, code=code, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2
        )
    return codes, QuantState(absmax=stats, code=code, blocksize=blocksize, dtype=A.dtype)


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """Turn 8-bit codes back into values.

    Args:
        A: uint8 codes, any shape.
        quant_state: state from :func:`quantize_blockwise`; it wins over ``absmax``, ``code`` and
            ``blocksize``.
        absmax: statistics, one per block, where there is no state.
        code: codebook; the signed dynamic map where not given.
        out: tensor in the shape of ``A`` to write into; its dtype is that of the result.
        blocksize: values per block, where there is no state.
        nested: accepted for compatibility; the state says whether statistics are nested.

    Returns:
        Values in the shape of ``A``: in the dtype of the state, of ``out``, or float32.
    """
    if quant_state is None:
        if absmax is None:
            raise ArgumentError("dequantize_blockwise: pass either quant_state or absmax")
        code = dynamic_map(True, A.device) if code is None else code
        quant_state = QuantState(
            absmax=absmax, code=code, blocksize=blocksize, dtype=torch.float32 if out is None else out.dtype
        )
    check_blocksize("dequantize_blockwise", quant_state.blocksize)
    stats = quant_state.plain_absmax().to(A.device, torch.float32)
    code = quant_state.code.to(A.device, torch.float32)
    if out is not None:
        ops.dequantize_blockwise.out(A, stats, code, quant_state.blocksize, quant_state.dtype, out)
        return out
    return ops.dequantize_blockwise.default(A, stats, code, quant_state.blocksize, quant_state.dtype)


def get_4bit_type(typename: str, device: Any = None, blocksize: int = 64) -> torch.Tensor:
    """The 16 values of a 4-bit data type by code, in [-1, 1].

    Args:
        typename: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"af4"``.
        device: where to put the table; ``"cuda"`` where not given, as ever, or the CPU without one.
        blocksize: block size that an ``af4`` table is made for; only 64 is known.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return named_4bit_type(typename, torch.device(device), blocksize)


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize to packed 4-bit codes, block by block.

    Args:
        A: values, any shape, float32, float16 or bfloat16.
        absmax: float32 tensor of shape ``(blocks,)`` to write the statistics into.
        out: tensor to write the packed codes into.
        blocksize: values per block, even; 64 where not given.
        compress_statistics: also quantize the statistics to 8 bit, after their mean is subtracted
            (QLoRA's double quantization, blocks of 256).
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype to view the packed bytes as.

    Returns:
        ``(packed, state)``: packed codes of shape ``(bytes / itemsize, 1)``.
    """
    blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
    check_blocksize("quantize_4bit", blocksize, even=True)
    packed, stats = ops.quantize_4bit.default(A, blocksize, quant_type, quant_storage)
    packed = _deliver("quantize_4bit", "out", packed, out)
    offset, state2 = None, None
    if compress_statistics and stats.numel():
        offset = stats.mean()
        compressed, state2 = quantize_blockwise(stats - offset, blocksize=NESTED_BLOCKSIZE)
        if absmax is not None:
            _deliver("quantize_4bit", "absmax", stats, absmax)
        stats = compressed
    else:
        stats = _deliver("quantize_4bit", "absmax", stats, absmax)
    state = QuantState(
        absmax=stats,
        shape=A.shape,
        dtype=A.dtype,
        blocksize=blocksize,
        code=code_4bit(quant_type, A.device).clone(),
        quant_type=quant_type,
        offset=offset,
        state2=state2,
    )
    return packed, state


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """Turn packed 4-bit codes back into values.

    Args:
        A: packed codes; a transposed view, shape ``(1, bytes)``, gives the transposed matrix.
        quant_state: state from :func:`quantize_4bit`; it wins over the other arguments.
        absmax: statistics where there is no state; ``out`` then says shape and dtype.
        out: tensor to write into.
        blocksize: values per block where there is no state; 64 where not given.
        quant_type: ``"fp4"`` or ``"nf4"`` where there is no state.

    Returns:
        Values in the shape and dtype of the state.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ArgumentError("dequantize_4bit: pass either quant_state, or absmax together with out")
        quant_state = QuantState(
            absmax=absmax,
            shape=out.shape,
            dtype=out.dtype,
            blocksize=DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize,
            quant_type=quant_type,
        )
    state = quant_state
    check_blocksize("dequantize_4bit", state.blocksize, even=True)
    if out is not None:
        stats = state.plain_absmax().to(torch.float32)
        ops.dequantize_4bit.out(A, stats, state.blocksize, state.quant_type, state.shape, state.dtype, out)
        values = out
    elif state.nested:
        values = ops.dequantize_4bit_nested.default(
            A,
            state.state2.absmax,
            state.absmax,
            state.state2.code,
            state.offset,
            state.blocksize,
            state.quant_type,
            state.shape,
            state.dtype,
            state.state2.blocksize,
        )
    else:
        stats = state.absmax.to(torch.float32)
        values = ops.dequantize_4bit.default(A, stats, state.blocksize, state.quant_type, state.shape, state.dtype)
    # Packed codes come as a column; a row is how callers ask for the transposed matrix.
    return values.t() if A.shape[0] == 1 and A.dim() == 2 and values.dim() == 2 else values


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """:func:`dequantize_4bit` with ``quant_type="fp4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """:func:`dequantize_4bit` with ``quant_type="nf4"``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """Multiply a single row by a transposed 4-bit weight.

    Args:
        A: shape ``(..., K)`` with one row in all.
        B: packed weight, either orientation of the packed vector.
        out: tensor of shape ``(..., N)`` to write into.
        transposed_A, transposed_B: accepted for compatibility; they have never had an effect.
        state: state of the weight, shape ``(N, K)``; required.

    Returns:
        ``A @ weight.T`` of shape ``(..., N)`` in the dtype of ``A``.
    """
    if state is None:
        raise ArgumentError("gemv_4bit: state is required; it is the second result of quantize_4bit")
    arguments = (A, B, state.shape, state.plain_absmax(), state.code, state.blocksize)
    if out is not None:
        ops.gemv_4bit.out(*arguments, out)
        return out
    return ops.gemv_4bit.default(*arguments)


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize each row to int8: ``(codes, absmax, outlier columns or None)``. See the op."""
    return ops.int8_vectorwise_quant.default(A, threshold)


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Multiply int8 codes by the scale of their row: float32 ``A * stats / 127``. See the op."""
    return ops.int8_vectorwise_dequant.default(A, stats)


def int8_double_quant(
    A: torch.Tensor,
    col_stats: torch.Tensor | None = None,
    row_stats: torch.Tensor | None = None,
    out_col: torch.Tensor | None = None,
    out_row: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize to int8 with a scale per row and once more with a scale per column.

    The four tensors, where given, receive the results.

    Returns:
        ``(row codes, column codes, row absmax, column absmax, outlier columns or None)``.
    """
    row, column, rows, columns, outliers = ops.int8_double_quant.default(A, threshold)
    name = "int8_double_quant"
    return (
        _deliver(name, "out_row", row, out_row),
        _deliver(name, "out_col", column, out_col),
        _deliver(name, "row_stats", rows, row_stats),
        _deliver(name, "col_stats", columns, col_stats),
        outliers,
    )


def int8_linear_matmul(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Exact product ``A @ B.T`` of int8 matrices as int32.

    Args:
        A: int8, shape ``(..., K)``.
        B: int8, shape ``(N, K)``.
        out: int32 tensor of shape ``(..., N)`` to write into.
        dtype: int32, the only dtype that holds the result exactly.
    """
    if dtype != torch.int32:
        raise ArgumentTypeError(f"int8_linear_matmul: dtype is {dtype}, allowed: torch.int32")
    if out is not None:
        ops.int8_linear_matmul.out(A, B, out)
        return out
    return ops.int8_linear_matmul.default(A, B)


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale an int32 product back to float16: ``A * row_stats * col_stats / 127**2 + bias``. See the op."""
    dtype = torch.float16 if out is None else out.dtype
    result = ops.int8_mm_dequant.default(A, row_stats, col_stats, dtype=dtype, bias=bias)
    return _deliver("int8_mm_dequant", "out", result, out)


def optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: torch.Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: torch.Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One optimizer step with 32-bit state, in place on ``p`` and the states. See the op."""
    param_norm = torch.linalg.vector_norm(p.float()).item() if max_unorm > 0.0 else 0.0
    ops.optimizer_update_32bit.default(
        optimizer_name,
        g,
        p,
        state1,
        state2,
        unorm_vec,
        max_unorm,
        param_norm,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        step,
        lr,
        gnorm_scale,
        skip_zeros,
    )


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One optimizer step with 8-bit block-wise state, in place on ``p`` and the states. See the op."""
    ops.optimizer_update_8bit_blockwise.default(
        optimizer_name,
        g,
        p,
        state1,
        state2,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        step,
        lr,
        qmap1,
        qmap2,
        absmax1,
        absmax2,
        weight_decay,
        gnorm_scale,
        skip_zeros,
    )


def _deliver(op: str, name: str, result: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Copy a result into the caller's buffer, if there is one, and return what the caller gets."""
    if buffer is None:
        return result
    check_result_buffer(op, name, buffer, TensorSpec(result.shape, result.dtype), result.device)
    return buffer.copy_(result)


def __getattr__(name: str) -> Any:
    if name == "lib":
        from bitsandbytes import cextension

        return cextension.lib
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
