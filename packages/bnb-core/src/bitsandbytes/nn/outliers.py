"""Base class of linear layers that know the outlier columns of their weight."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bitsandbytes.utils import OutlierTracer


class OutlierAwareLinear(torch.nn.Linear):
    """A linear layer that treats outlier columns apart; a subclass says how.

    ``OutlierTracer.get_instance().initialize(model)`` must have watched a forward pass of the model
    to know the columns. On its first call the layer quantizes its weight.
    """

    def __init__(self, input_features: int, output_features: int, bias: bool = True, device: Any = None) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: torch.Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: torch.Tensor, outlier_idx: torch.Tensor | None) -> torch.Tensor:
        """Apply the layer; ``outlier_idx`` holds the outlier columns, int64; ``None`` if nothing watched it."""
        raise NotImplementedError("Please override the `forward_with_outliers(self, x, outlier_idx)` function")

    def quantize_weight(self, w: torch.Tensor, outlier_idx: torch.Tensor | None) -> torch.Tensor:
        """The weight as it is to be used, in the shape of ``w``."""
        raise NotImplementedError("Please override the `quantize_weight(self, w, outlier_idx)` function")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, quantizing the weight on the first call."""
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                warnings.warn(
                    "call OutlierTracer.get_instance().initialize(model) before using an OutlierAwareLinear layer",
                    stacklevel=2,
                )
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
