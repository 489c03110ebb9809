"""Differentiable LLM.int8() products (arXiv:2208.07339).

The weight ``W`` of shape ``(N, K)`` is ``CB * SCB / 127``, row by row. Rounding counts as the
identity in the derivative: the gradient of the activations is ``grad @ W``, that of a weight kept in
floating point is ``grad.T @ A``.
"""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.autograd.fourbit import sum_rows
from bitsandbytes.autograd.lt_state import MatmulLtState
from bitsandbytes.errors import ArgumentError

_ops = torch.ops.bitsandbytes

#: Devices on which training multiplies in floating point.
FLOAT_TRAINING_DEVICES = ("cpu", "xpu")


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and float32 absmax of the rows of a weight.

    The weight passes through float16 on the way, as the format has always been made, except rows
    that float16 cannot hold well: with values beyond its range or near its smallest normal number.
    """
    values = weight.detach()
    if values.dtype != torch.float16:
        half = values.half().float()
        absmax = half.abs().amax(dim=-1, keepdim=True) if half.shape[-1] else half.new_zeros(*half.shape[:-1], 1)
        values = torch.where((absmax >= _SMALLEST_HALF_ROW) & absmax.isfinite(), half, values.float())
    codes, absmax, _no_outliers = _ops.int8_vectorwise_quant.default(values.contiguous())
    return codes, absmax


#: A row with this absmax has a step of 1/127 of it, of which float16 still resolves the half.
_SMALLEST_HALF_ROW = 2.0**-6


def dequantize_weight(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the codes stand for."""
    return _ops.int8_vectorwise_dequant.default(CB, SCB).to(dtype)


def weight_token(weight: torch.Tensor) -> tuple[Any, ...] | None:
    """A value that changes when the weight does; ``None`` where that cannot be told."""
    if torch.compiler.is_compiling() or weight.is_inference():
        return None
    return weight.data_ptr(), weight._version, weight.shape, weight.dtype, weight.device


def prepare_weight(B: torch.Tensor, state: MatmulLtState) -> None:
    """Put the codes of the weight into the state, quantizing a floating point weight."""
    if not B.is_floating_point():
        if state.CB is None:
            state.CB = B.detach()
        if state.SCB is None:
            raise ArgumentError(
                "matmul: B holds int8 codes, but state.SCB, the absmax of their rows, is None; quantize with "
                "functional.int8_vectorwise_quant and set both, or pass a floating point weight"
            )
        return
    if state.CB is not None and state.SCB is not None:
        if not state.has_fp16_weights and state._token is None:
            return
        if not state.is_training and state._token is not None and state._token == weight_token(B):
            return
    state.CB, state.SCB = quantize_weight(B)
    # A weight in training changes behind any token: optimizers write through pointers.
    state._token = None if state.is_training else weight_token(B)  # type: ignore[misc]  # no dataclass field


def multiply(
    A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, bias: torch.Tensor | None, state: MatmulLtState
) -> torch.Tensor:
    """LLM.int8() product without a record for gradients, in the dtype of ``A``."""
    pool = state.outlier_pool
    if pool is None or not state.use_pool or state.threshold == 0.0:
        return _ops.int8_linear.default(A, CB, SCB, state.threshold, bias)
    CA, SCA, columns = _ops.int8_vectorwise_quant.default(A, state.threshold)
    pool.add_outliers(columns, A.shape[-1])
    if pool.model_dim == A.shape[-1]:
        columns = pool.get_current_outlier_idx().to(A.device)
        CA[..., columns] = 0
    state.idx = columns
    return _ops.int8_mixed_scaled_mm.default(A, CA, CB, SCA, SCB, columns, bias)[0]


class _Int8Function(torch.autograd.Function):
    """Backward that both forward variants share."""

    @staticmethod
    def remember(
        ctx: Any, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None, state: MatmulLtState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Save for backward; returns the codes and absmax of the weight."""
        prepare_weight(B, state)
        CB: Any = state.CB
        SCB: Any = state.SCB
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype = B.dtype
        wants_weight = B.requires_grad and B.is_floating_point()
        ctx.save_for_backward(CB, SCB, A if wants_weight else None)
        return CB, SCB

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``A``, a floating point ``B`` and ``bias``."""
        CB, SCB, A = ctx.saved_tensors
        grad_A = grad_B = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_A = torch.matmul(grad_output, dequantize_weight(CB, SCB, grad_output.dtype))
        if ctx.needs_input_grad[1] and A is not None:
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            grad_B = torch.matmul(rows.t(), A.reshape(-1, A.shape[-1])).to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            grad_bias = sum_rows(grad_output, ctx.bias_dtype)
        return grad_A, grad_B, None, grad_bias, None


class MatMul8bitLt(_Int8Function):
    """``A @ W.T + bias`` with int8 activations, outlier columns in floating point."""

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> torch.Tensor:
        """Multiply."""
        state = MatmulLtState() if state is None else state
        CB, SCB = _Int8Function.remember(ctx, A, B, bias, state)
        return _deliver(ctx, multiply(A, CB, SCB, bias, state), out)


class MatMul8bitFp(_Int8Function):
    """``A @ W.T + bias`` with the weight turned back into floating point.

    Quantizing activations costs more than it saves where there is no fast int8 product, and it costs
    accuracy; used for training on CPU and XPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> torch.Tensor:
        """Multiply."""
        state = MatmulLtState() if state is None else state
        CB, SCB = _Int8Function.remember(ctx, A, B, bias, state)
        weight = dequantize_weight(CB, SCB, A.dtype)
        result = torch.nn.functional.linear(A, weight, None if bias is None else bias.to(A.dtype))
        return _deliver(ctx, result, out)


def _deliver(ctx: Any, result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return result
    ctx.mark_dirty(out)
    return out.copy_(result)


def matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """LLM.int8() product with a weight ``B`` of shape ``(N, K)``.

    Args:
        A: shape ``(..., K)``, float32, float16 or bfloat16.
        B: the weight in floating point, or its int8 codes with ``state.SCB`` set.
        out: tensor of the result's shape and dtype to write into.
        state: quantized weight and settings; a fresh one where not given.
        threshold: outlier threshold; where positive it is written into the state.
        bias: shape ``(N,)``.

    Returns:
        Shape ``(..., N)`` in the dtype of ``A``, differentiable with respect to ``A``, ``bias`` and a
        floating point ``B``.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    prepare_weight(B, state)
    # Not a question of gradients: activation checkpointing runs a layer once without and once with them.
    if state.is_training and A.device.type in FLOAT_TRAINING_DEVICES:
        return MatMul8bitFp.apply(A, B, out, bias, state)
    needs_grad = A.requires_grad or B.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return MatMul8bitLt.apply(A, B, out, bias, state)
    CB: Any = state.CB
    SCB: Any = state.SCB
    result = multiply(A, CB, SCB, bias, state)
    return result if out is None else out.copy_(result)
