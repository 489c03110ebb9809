"""Differentiable products with a frozen 4-bit weight (QLoRA, arXiv:2305.14314, section 3).

The weight ``W`` of shape ``(N, K)`` has no gradient. The product with its transpose and the product
with it as it stands are each other's derivative, so two functions are enough for any order.
"""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.errors import ArgumentError
from bitsandbytes.ops.common import NESTED_BLOCKSIZE
from bitsandbytes.state import QuantState

_ops = torch.ops.bitsandbytes


def multiply(
    A: torch.Tensor, packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``A @ W.T + bias`` without a record for gradients, in the dtype of ``A``."""
    return _ops.gemm_4bit.default(A, *frozen_arguments(packed, state, bias))


def frozen_arguments(packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> tuple[Any, ...]:
    """The arguments of ``gemm_4bit`` after the first."""
    nested = state.state2
    if nested is None or nested.blocksize != NESTED_BLOCKSIZE:
        return packed, state.shape, state.plain_absmax(), state.blocksize, state.quant_type, bias
    return (
        packed,
        state.shape,
        nested.absmax,
        state.blocksize,
        state.quant_type,
        bias,
        state.absmax,
        nested.code,
        state.offset,
    )


def multiply_transposed(A: torch.Tensor, packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """``A @ W`` without a record for gradients, in the dtype of ``A``."""
    return _ops.gemm_4bit_transposed.default(
        A, packed, state.shape, blocksize=state.blocksize, quant_type=state.quant_type, **state.nested_arguments()
    )


class MatMul4Bit(torch.autograd.Function):
    """``A @ W.T + bias`` for packed 4-bit codes ``B`` of ``W``.

    ``A`` has shape ``(..., K)``, the result ``(..., N)`` in the dtype of ``A``. Gradients: of ``A``
    it is ``grad @ W``, of ``bias`` the sum over rows; ``B`` has none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> torch.Tensor:
        """Multiply."""
        if quant_state is None:
            raise ArgumentError("MatMul4Bit: quant_state is None, so B is not a quantized weight")
        ctx.state, ctx.bias_dtype = quant_state, None if bias is None else bias.dtype
        ctx.save_for_backward(B)
        result = multiply(A, B, quant_state, bias)
        if out is None:
            return result
        ctx.mark_dirty(out)
        return out.copy_(result)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``A`` and ``bias``."""
        (B,) = ctx.saved_tensors
        grad_A = TransposedMatMul4Bit.apply(grad_output, B, ctx.state) if ctx.needs_input_grad[0] else None
        grad_bias = sum_rows(grad_output, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return grad_A, None, None, grad_bias, None


class TransposedMatMul4Bit(torch.autograd.Function):
    """``A @ W`` for packed 4-bit codes ``B`` of ``W``; the gradient of ``A`` is ``grad @ W.T``."""

    @staticmethod
    def forward(ctx: Any, A: torch.Tensor, B: torch.Tensor, quant_state: QuantState) -> torch.Tensor:
        """Multiply."""
        ctx.state = quant_state
        ctx.save_for_backward(B)
        return multiply_transposed(A, B, quant_state)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of ``A``."""
        (B,) = ctx.saved_tensors
        return MatMul4Bit.apply(grad_output, B, None, None, ctx.state), None, None


def sum_rows(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of a bias: the sum over all but the last dimension, accumulated in float32 or better."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.promote_types(grad.dtype, dtype)).to(dtype)


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a 4-bit weight.

    Args:
        A: shape ``(..., K)``, float32, float16 or bfloat16.
        B: packed codes from ``quantize_4bit``. As a row (``packed.t()``) they stand for the transpose
            of the weight of shape ``quant_state.shape = (N, K)``, as a linear layer has it; as a
            column for the weight itself, of shape ``(K, N)``.
        quant_state: state of the weight.
        out: tensor of the result's shape and dtype to write into.
        bias: shape ``(N,)``, any of the three dtypes.

    Returns:
        Shape ``(..., N)`` in the dtype of ``A``, differentiable with respect to ``A`` and ``bias``.

    Raises:
        ArgumentError: there is no state, or shapes do not fit.
    """
    if quant_state is None:
        raise ArgumentError(
            "matmul_4bit: quant_state is None, so B is not a quantized weight; quantize it with "
            "functional.quantize_4bit, or move its layer to a device first (layer.to('cpu'), layer.cuda())"
        )
    if _is_transposed(A, B, quant_state):
        return linear_4bit(A, B, quant_state, bias, out)
    result = TransposedMatMul4Bit.apply(A, B, quant_state)
    if bias is not None:
        result = result + bias.to(result.dtype)
    return result if out is None else out.copy_(result)


def linear_4bit(
    A: torch.Tensor,
    packed: torch.Tensor,
    quant_state: QuantState,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ W.T + bias``, with a record for gradients only where one is needed."""
    needs_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if needs_grad or out is not None:
        return MatMul4Bit.apply(A, packed, out, bias, quant_state)
    return multiply(A, packed, quant_state, bias)


def _is_transposed(A: torch.Tensor, B: torch.Tensor, quant_state: QuantState) -> bool:
    """Whether ``B`` stands for the transposed weight.

    Packed codes of one byte are a row and a column at once; then the features of ``A`` decide.
    """
    if B.dim() == 2 and B.shape[0] == B.shape[1] == 1 and len(quant_state.shape) == 2:
        return A.shape[-1] == quant_state.shape[1]
    return B.dim() != 2 or B.shape[0] == 1
