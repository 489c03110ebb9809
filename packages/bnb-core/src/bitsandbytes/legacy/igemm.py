"""Integer matrix products under their old names, on top of ``int8_linear_matmul``."""

from __future__ import annotations

import torch

from bitsandbytes.contract import TensorSpec, check_result_buffer
from bitsandbytes.errors import ArgumentError, ArgumentTypeError


def check_matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """Shape of the product of two matrices or batches of matrices.

    Args:
        A: shape ``(m, k)``, or ``(b, m, k)``.
        B: shape ``(k, n)`` or, with a three-dimensional ``A``, also ``(b, k, n)``.
        out: result tensor whose shape must fit, or ``None``.
        transposed_A, transposed_B: read the last two dimensions of the operand swapped.
        expected_type: dtype of both operands.

    Two three-dimensional operands ``(b, s, i)`` and ``(b, s, o)`` that are not transposed give the
    sum over ``b`` and ``s``, shape ``(i, o)``: the gradient of a linear layer's weight.

    Raises:
        ArgumentError: dtypes or shapes do not fit.
    """
    if A.dtype != expected_type or B.dtype != expected_type:
        raise ArgumentTypeError(f"expected {expected_type} matrices, got A {A.dtype} and B {B.dtype}")
    left = _swapped(A.shape) if transposed_A else tuple(A.shape)
    right = _swapped(B.shape) if transposed_B else tuple(B.shape)
    shape: tuple[int, ...] | None = None
    if len(left) in (2, 3) and len(right) == 2 and left[-1] == right[0]:
        shape = (*left[:-1], right[1])
    elif len(left) == len(right) == 3 and left[0] == right[0]:
        if left[2] == right[1]:
            shape = (left[0], left[1], right[2])
        elif left[1] == right[1] and not transposed_A and not transposed_B:
            shape = (left[2], right[2])
    if shape is None:
        raise ArgumentError(
            f"cannot multiply A {tuple(A.shape)} (transposed: {bool(transposed_A)}) by "
            f"B {tuple(B.shape)} (transposed: {bool(transposed_B)})"
        )
    if out is not None:
        check_result_buffer("igemm", "out", out, TensorSpec(shape, out.dtype), A.device)
    return shape


def _swapped(shape: torch.Size) -> tuple[int, ...]:
    if len(shape) < 2:
        raise ArgumentError(f"expected a matrix, got shape {tuple(shape)}")
    return (*shape[:-2], shape[-1], shape[-2])


def igemm(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> torch.Tensor:
    """Exact product of int8 matrices as int32; operands and shapes as in :func:`check_matmul`."""
    shape = check_matmul(A, B, out, transposed_A, transposed_B)
    left = A.transpose(-1, -2) if transposed_A else A
    right = B.transpose(-1, -2) if transposed_B else B
    if left.dim() == 3 and right.dim() == 3:
        if len(shape) == 3:
            return _deliver(_batched(left, right), out)
        # Sum over batch and sequence: one product over both.
        left, right = left.reshape(-1, left.shape[2]).t(), right.reshape(-1, right.shape[2])
    product = torch.ops.bitsandbytes.int8_linear_matmul.default(left.contiguous(), right.t().contiguous())
    return _deliver(product, out)


def batched_igemm(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> torch.Tensor:
    """Exact products of a batch of int8 matrices as int32.

    Args:
        A: int8, shape ``(b, m, k)``.
        B: int8, shape ``(b, k, n)``.
        out: int32 tensor of shape ``(b, m, n)`` to write into.
        transposed_A, transposed_B: read the last two dimensions of the operand swapped.
    """
    if A.dim() != 3 or B.dim() != 3:
        raise ArgumentError(
            f"batched_igemm: expected three-dimensional operands, got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    left = A.transpose(1, 2) if transposed_A else A
    right = B.transpose(1, 2) if transposed_B else B
    if left.dtype != torch.int8 or right.dtype != torch.int8:
        raise ArgumentTypeError(f"batched_igemm: expected int8 operands, got {A.dtype} and {B.dtype}")
    if left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
        raise ArgumentError(f"batched_igemm: cannot multiply {tuple(left.shape)} by {tuple(right.shape)}")
    if out is not None:
        spec = TensorSpec((left.shape[0], left.shape[1], right.shape[2]), torch.int32)
        check_result_buffer("batched_igemm", "out", out, spec, A.device)
    return _deliver(_batched(left, right), out)


def _batched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    multiply = torch.ops.bitsandbytes.int8_linear_matmul.default
    product = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=torch.int32, device=left.device)
    for index in range(left.shape[0]):
        product[index] = multiply(left[index].contiguous(), right[index].t().contiguous())
    return product


def _deliver(product: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return product if out is None else out.copy_(product)
