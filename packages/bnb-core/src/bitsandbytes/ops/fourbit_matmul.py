"""Products and look-ups with a 4-bit weight, which is never materialised by a native kernel.

The weight is the packed form (see :mod:`bitsandbytes.ops.fourbit`) of a matrix of shape
``shapeB = (N, K)``. Its statistics are plain (``absmax``, float32, one per block) or nested
(``absmax_8bit``, ``absmax_code`` and ``absmax_offset`` given too, ``absmax`` then being that of the
nested blocks of 256 values).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bitsandbytes.codebooks import code_4bit
from bitsandbytes.contract import TensorSpec, check_dtype, check_same_device, check_that, define_op
from bitsandbytes.ops.common import (
    check_bias,
    check_blocksize,
    check_float,
    check_numel,
    check_result_dtype,
)
from bitsandbytes.ops.fourbit import (
    check_absmax,
    check_packed,
    check_quant_type,
    decode_4bit,
    dequantize_4bit,
    expand_absmax,
)


def check_matrix_shape(op: str, shapeB: Sequence[int]) -> None:
    """Raise unless ``shapeB`` describes a matrix."""
    check_that(op, len(shapeB) == 2, lambda: f"shapeB is {tuple(shapeB)}, expected two sizes (N, K)")


def check_features(op: str, A: torch.Tensor, expected: int, side: str) -> None:
    """Raise unless the last dimension of ``A`` matches the weight."""
    check_that(
        op,
        A.dim() >= 1 and A.shape[-1] == expected,
        lambda: f"A has shape {tuple(A.shape)}, expected {expected} {side} features in its last dimension",
    )


def check_gemv_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> None:
    """Check the arguments of ``gemv_4bit``."""
    op = "gemv_4bit"
    check_blocksize(op, blocksize, even=True)
    check_float(op, "A", A)
    check_matrix_shape(op, shapeB)
    check_features(op, A, shapeB[1], "input")
    check_that(
        op,
        A.numel() == A.shape[-1],
        lambda: f"A has shape {tuple(A.shape)}, expected a single row; use gemm_4bit for several",
    )
    check_packed(op, "B", B, shapeB)
    check_absmax(op, absmax, math.prod(shapeB), blocksize)
    check_dtype(op, "code", code, (torch.float32,))
    check_numel(op, "code", code, 16, "one value per 4-bit code")
    check_same_device(op, A=A, B=B, absmax=absmax, code=code)


def outputs_gemv_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> tuple[TensorSpec, ...]:
    """A row of N features."""
    return (TensorSpec((*A.shape[:-1], shapeB[0]), A.dtype),)


@define_op(
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    check=check_gemv_4bit,
    outputs=outputs_gemv_4bit,
    out_overload=True,
)
def gemv_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> torch.Tensor:
    """Multiply one row by a transposed 4-bit weight under any 16-entry table.

    Args:
        A: a single row, shape ``(..., K)`` with leading sizes of 1; float32, float16 or bfloat16.
        B: packed weight of shape ``shapeB``.
        shapeB: ``(N, K)``.
        absmax: float32, one per block of the flattened weight.
        code: 16 float32 values by code.
        blocksize: values per block, even.

    Returns:
        ``A @ weight.T`` of shape ``(..., N)`` in the dtype of ``A``.
    """
    weight = decode_4bit(B, code, absmax, blocksize, shapeB).to(A.dtype)
    return torch.nn.functional.linear(A, weight)


#: What the arguments of products were like that kept the contract. With a weight that fits the caches the checks take
#: as long as the product, and a compiled model makes hundreds of such calls for each token; looking here takes a third.
_passed: set[tuple[object, ...]] = set()
#: Far more than the layers of a model have kinds.
MOST_PASSED = 1024


def check_gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``gemm_4bit``."""
    try:
        # All that the checks below look at: arguments that are alike in it pass alike.
        facts: tuple[object, ...] | None = (
            A.dtype,
            A.device,
            A.shape[-1:],
            B.dtype,
            B.device,
            B.numel(),
            absmax.dtype,
            absmax.device,
            absmax.numel(),
            type(blocksize),
            blocksize,
            quant_type,
            None if bias is None else (bias.dtype, bias.device, bias.shape),
            None if absmax_8bit is None else (absmax_8bit.dtype, absmax_8bit.device, absmax_8bit.numel()),
            None if absmax_code is None else (absmax_code.dtype, absmax_code.device, absmax_code.numel()),
            None if absmax_offset is None else (absmax_offset.dtype, absmax_offset.device, absmax_offset.numel()),
            *shapeB,
        )
        if facts in _passed:
            return
    except TypeError:
        # Sizes that a compiler leaves open have no hash.
        facts = None
    op = "gemm_4bit"
    check_weight(op, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset)
    check_float(op, "A", A)
    check_features(op, A, shapeB[1], "input")
    check_bias(op, bias, shapeB[0])
    check_same_device(op, A=A, B=B, absmax=absmax, bias=bias, absmax_8bit=absmax_8bit)
    if facts is not None:
        if len(_passed) >= MOST_PASSED:
            _passed.clear()
        _passed.add(facts)


def check_weight(
    op: str,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: torch.Tensor | None,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
) -> None:
    """Check a packed 4-bit matrix and its statistics."""
    check_blocksize(op, blocksize, even=True)
    check_quant_type(op, quant_type)
    check_matrix_shape(op, shapeB)
    check_packed(op, "B", B, shapeB)
    check_absmax(op, absmax, math.prod(shapeB), blocksize, absmax_8bit, absmax_code, absmax_offset)
    check_same_device(op, absmax_8bit=absmax_8bit, absmax_code=absmax_code, absmax_offset=absmax_offset)


def outputs_gemm_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], *statistics: object, **optional: object
) -> tuple[TensorSpec, ...]:
    """Rows of N features."""
    return (TensorSpec((*A.shape[:-1], shapeB[0]), A.dtype),)


@define_op(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    check=check_gemm_4bit,
    outputs=outputs_gemm_4bit,
)
def gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a transposed 4-bit weight and add a bias: the forward of a linear layer.

    Args:
        A: shape ``(..., K)``, float32, float16 or bfloat16.
        B: packed weight of shape ``shapeB``.
        shapeB: ``(N, K)``.
        absmax: float32 statistics; with nested statistics those of the nested blocks.
        blocksize: values per block, even.
        quant_type: ``"nf4"`` or ``"fp4"``.
        bias: shape ``(N,)``, any of the three dtypes, or ``None``.
        absmax_8bit, absmax_code, absmax_offset: nested statistics, all or none.

    Returns:
        ``A @ weight.T + bias`` of shape ``(..., N)`` in the dtype of ``A``. The weight may be rounded
        to that dtype before the product.
    """
    weight = _weight(B, shapeB, absmax, blocksize, quant_type, A.dtype, absmax_8bit, absmax_code, absmax_offset)
    return torch.nn.functional.linear(A, weight, None if bias is None else bias.to(A.dtype))


def _weight(
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    absmax_8bit: torch.Tensor | None,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
) -> torch.Tensor:
    expanded = expand_absmax(absmax, absmax_8bit, absmax_code, absmax_offset)
    return dequantize_4bit(B, expanded, blocksize, quant_type, shapeB, dtype)


def check_gemm_4bit_transposed(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``gemm_4bit_transposed``."""
    op = "gemm_4bit_transposed"
    check_weight(op, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset)
    check_float(op, "A", A)
    check_features(op, A, shapeB[0], "output")
    check_same_device(op, A=A, B=B, absmax=absmax, absmax_8bit=absmax_8bit)


def outputs_gemm_4bit_transposed(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], *statistics: object, **optional: object
) -> tuple[TensorSpec, ...]:
    """Rows of K features."""
    return (TensorSpec((*A.shape[:-1], shapeB[1]), A.dtype),)


@define_op(
    "gemm_4bit_transposed(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    check=check_gemm_4bit_transposed,
    outputs=outputs_gemm_4bit_transposed,
)
def gemm_4bit_transposed(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a 4-bit weight as it stands: the gradient of a linear layer's input.

    Args:
        A: shape ``(..., N)``, float32, float16 or bfloat16.
        B, shapeB, absmax, blocksize, quant_type: the weight, as in ``gemm_4bit``.
        absmax_8bit, absmax_code, absmax_offset: nested statistics, all or none.

    Returns:
        ``A @ weight`` of shape ``(..., K)`` in the dtype of ``A``.
    """
    weight = _weight(B, shapeB, absmax, blocksize, quant_type, A.dtype, absmax_8bit, absmax_code, absmax_offset)
    return torch.matmul(A, weight)


def check_embedding_4bit(
    indices: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``embedding_4bit``."""
    op = "embedding_4bit"
    check_weight(op, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset)
    check_dtype(op, "indices", indices, (torch.int64, torch.int32))
    check_result_dtype(op, "dtype", dtype)
    check_same_device(op, indices=indices, B=B, absmax=absmax, absmax_8bit=absmax_8bit)


def outside_of_table(indices: torch.Tensor, table_rows: int) -> IndexError:
    """The error for indices that are not all rows of the table."""
    return IndexError(
        f"bitsandbytes::embedding_4bit: indices range from {int(indices.min())} to {int(indices.max())}, "
        f"the table has {table_rows} rows"
    )


def outputs_embedding_4bit(
    indices: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    *statistics: object,
    **optional: object,
) -> tuple[TensorSpec, ...]:
    """One row of the table per index."""
    return (TensorSpec((*indices.shape, shapeB[1]), dtype),)


@define_op(
    "embedding_4bit(Tensor indices, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "ScalarType dtype, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    check=check_embedding_4bit,
    outputs=outputs_embedding_4bit,
)
def embedding_4bit(
    indices: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gather rows of a 4-bit table and dequantize only these.

    Args:
        indices: int64 or int32, any shape, each in ``[0, N)``.
        B, shapeB, absmax, blocksize, quant_type: the table of shape ``(N, K)``, as the weight of
            ``gemm_4bit``. Rows need not begin at a block or at a byte.
        dtype: dtype of the result.
        absmax_8bit, absmax_code, absmax_offset: nested statistics, all or none.

    Returns:
        Shape ``(*indices.shape, K)``: bit for bit the rows of the dequantized table.

    Raises:
        IndexError: an index is outside of the table (on the CPU; elsewhere as the device does it).
    """
    table_rows, width = shapeB
    rows = indices.reshape(-1).long()
    if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < table_rows:
        raise outside_of_table(rows, table_rows)
    expanded = expand_absmax(absmax, absmax_8bit, absmax_code, absmax_offset)
    data = B.contiguous().view(torch.uint8).reshape(-1)
    element = rows.unsqueeze(1) * width + torch.arange(width, device=rows.device)
    byte = data[element // 2]
    codes = torch.where(element % 2 == 0, byte >> 4, byte & 0xF)
    values = code_4bit(quant_type, B.device)[codes.int()] * expanded[element // blocksize]
    return values.to(dtype).reshape(*indices.shape, width)
