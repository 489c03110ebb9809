"""Linear layers with a 4-bit weight (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bitsandbytes.autograd.fourbit import frozen_arguments, linear_4bit
from bitsandbytes.backends.bound import is_intercepted
from bitsandbytes.errors import ArgumentError
from bitsandbytes.nn.bound import bound_of
from bitsandbytes.nn.params4bit import Params4bit
from bitsandbytes.nn.storage4bit import Storage4bit, fix_4bit_weight_quant_state_from_module
from bitsandbytes.ops.common import NESTED_BLOCKSIZE
from bitsandbytes.state import QuantState


class Linear4bit(Storage4bit, torch.nn.Linear):
    """A linear layer whose weight is quantized to 4 bit by the first move to a device.

    ``y = x @ W.T + b`` with ``x`` of shape ``(..., input_features)``, computed in ``compute_dtype``
    and returned in the dtype of ``x``. Gradients flow to ``x`` and the bias; the weight is frozen.

    Args:
        input_features: size of the last dimension of the input.
        output_features: size of the last dimension of the output.
        bias: whether there is a bias, kept in floating point.
        compute_dtype: dtype of the product; that of the first input where not given.
        compress_statistics: whether the statistics are quantized, too (nested statistics).
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are stored as; sharding libraries want that of the
            other parameters.
        device: where to create the weight; it is quantized by a move, not by its creation.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage
        self._default_quant_type = quant_type

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Take the dtype of the first input as that of the product."""
        if x.is_floating_point():
            self.compute_dtype = x.dtype
            self.compute_type_is_set = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``x`` of shape ``(..., input_features)``."""
        weight: Any = self._parameters["weight"]
        bias = self._parameters["bias"]
        state = getattr(weight, "quant_state", None)
        if state is None:
            return self._forward_unusual(x)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
        dtype = x.dtype
        compute_dtype = self.compute_dtype
        # Integers go to the op as they are, which refuses them.
        if compute_dtype is None or compute_dtype == dtype or not x.is_floating_point():
            if torch.compiler.is_compiling():
                return linear_4bit(x, weight, state, bias)
            return self._multiply(x, weight, state, bias)
        if compute_dtype == torch.float32 and x.is_cuda:
            _warn_slow_compute(dtype)
        return linear_4bit(x.to(compute_dtype), weight, state, bias).to(dtype)

    def _multiply(self, x: torch.Tensor, weight: Any, state: QuantState, bias: torch.Tensor | None) -> torch.Tensor:
        """The product, by the short way where there is one."""
        bound, nested = bound_of(self), state.state2
        statistics = (state.absmax,) if nested is None else (state.absmax, nested.absmax)
        if bound.takes(x, weight, bias, *statistics):
            result = bound.run(x)
            if result is not None:
                return result
        result = linear_4bit(x, weight, state, bias)
        # Other nested blocks are expanded for each call.
        usual = nested is None or nested.blocksize == NESTED_BLOCKSIZE
        if usual and not result.requires_grad and not is_intercepted():
            with torch._C.DisableTorchFunctionSubclass():
                packed = weight.detach()
            bound.bind("gemm_4bit", x, weight, bias, statistics, frozen_arguments(packed, state, bias))
        return result

    def _forward_unusual(self, x: torch.Tensor) -> torch.Tensor:
        """Forward with a weight that has no state: lost, tied, replaced or not yet quantized."""
        fix_4bit_weight_quant_state_from_module(self)
        weight = self.weight
        if getattr(weight, "quant_state", None) is not None:
            return self.forward(x)
        if isinstance(weight, Params4bit):
            raise ArgumentError(
                f"Linear4bit: the weight on device {weight.device} is not quantized yet; move the layer to a device "
                f"first (layer.to('cpu'), layer.cuda()), or load a quantized checkpoint into it"
            )
        # A weight tied to an unquantized layer, such as an embedding, works as it is.
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="fp4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="nf4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


def _warn_slow_compute(dtype: torch.dtype) -> None:
    if not torch.compiler.is_compiling() and not _slow_compute_noticed:
        _slow_compute_noticed.append(True)
        warnings.warn(
            f"a Linear4bit has compute_dtype=torch.float32 but gets {dtype} input; products in float32 are much "
            f"slower on a GPU. Pass compute_dtype={dtype} (bnb_4bit_compute_dtype in transformers)",
            stacklevel=4,
        )


_slow_compute_noticed: list[bool] = []
