"""Linear layer of LLM.int8() (arXiv:2208.07339)."""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.autograd.int8 import FLOAT_TRAINING_DEVICES, matmul
from bitsandbytes.autograd.lt_state import MatmulLtState
from bitsandbytes.backends.bound import is_intercepted
from bitsandbytes.nn.bound import bound_of
from bitsandbytes.nn.int8_params import Int8Params
from bitsandbytes.nn.storage8bit import Storage8bit


class Linear8bitLt(Storage8bit, torch.nn.Linear):
    """A linear layer that multiplies int8 codes, with outlier columns in floating point.

    ``y = x @ W.T + b`` with ``x`` of shape ``(..., input_features)``, returned in the dtype of ``x``.

    Args:
        input_features: size of the last dimension of the input.
        output_features: size of the last dimension of the output.
        bias: whether there is a bias, kept in floating point.
        has_fp16_weights: keep the weight in floating point and quantize it on the fly, so that it can
            be trained. Otherwise the first move to a device quantizes it for good.
        threshold: magnitude from which an activation makes its column an outlier column; 0 turns the
            decomposition off.
        index: accepted and kept for compatibility.
        device: where to create the weight; it is quantized by a move, not by its creation.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state: MatmulLtState = MatmulLtState()
        self.index = index
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        if threshold > 0.0 and not has_fp16_weights:
            self.state.use_pool = True
        self.weight = Int8Params(self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)
        self._prepare_storage()

    def init_8bit_state(self) -> None:
        """Point the state of the product at the codes and scales of the weight."""
        weight = self.weight
        self.state.CB = weight.data
        if weight.SCB is None:
            weight.SCB = self.state.SCB
        self.state.SCB = weight.SCB

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``x`` of shape ``(..., input_features)``."""
        weight: Any = self._parameters["weight"]
        bias, state = self._parameters["bias"], self.state
        state.is_training = self.training
        if weight.dtype == torch.int8:
            if not torch.compiler.is_compiling():
                return self._multiply(x, weight, bias)
            self.init_8bit_state()
        elif not isinstance(weight, Int8Params):
            # A weight tied to an unquantized layer, such as an embedding, works as it is.
            return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        elif not state.has_fp16_weights:
            # Not moved to a device yet: nothing of another weight may be left in the state.
            state.reset_grads()
        return matmul(x, weight, bias=bias, state=state)

    def _multiply(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """The product with an int8 weight, by the short way where there is one."""
        state, bound, SCB = self.state, bound_of(self), weight.SCB
        threshold = state.threshold
        in_float = state.is_training and x.device.type in FLOAT_TRAINING_DEVICES
        special = in_float or state.outlier_pool is not None
        # What a product is bound to lies where the state was last told, and need not be told again.
        told = SCB is not None and SCB is state.SCB and state.CB is not None
        if told and not special and bound.threshold == threshold and bound.takes(x, weight, bias, SCB):
            result = bound.run(x)
            if result is not None:
                return result
        self.init_8bit_state()
        SCB = state.SCB
        result = matmul(x, weight, bias=bias, state=state)
        if not special and SCB is not None and not result.requires_grad and not is_intercepted():
            bound.threshold = threshold
            bound.bind("int8_linear", x, weight, bias, (SCB,), (weight, SCB, threshold, bias))
        return result
