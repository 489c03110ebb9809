"""State of an LLM.int8() product."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch


class GlobalOutlierPooler:
    """Outlier columns found so far in any layer of a model.

    In small models outlier features appear in some layers and batches only; pooled, they are treated
    as outliers everywhere. A state takes part when its ``outlier_pool`` is set and ``use_pool`` is
    true. The pool covers layers with the input size of the first one that contributed.
    """

    _instance: ClassVar[GlobalOutlierPooler | None] = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget everything."""
        self.outliers: set[int] = set()
        self.model_dim: int | None = None

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """The pool of this process."""
        if cls._instance is None:
            instance = cls.__new__(cls)
            instance.initialize()
            cls._instance = instance
        return cls._instance

    def add_outliers(self, outlier_idx: torch.Tensor, feature_dim: int) -> None:
        """Add columns of a layer with ``feature_dim`` input features.

        Layers of another size, such as the second one of a feed-forward block, are left out: their
        columns mean other features.
        """
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> torch.Tensor:
        """The pooled columns, ascending, int64 on the CPU."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


@dataclass(eq=False)
class MatmulLtState:
    """Quantized weight and settings of an LLM.int8() product.

    ``CB`` holds the int8 codes ``(N, K)`` of the weight and ``SCB`` the float32 absmax of its rows.
    ``threshold`` is the magnitude from which an activation is an outlier; 0 turns decomposition off.
    With ``has_fp16_weights`` the weight stays in floating point and is quantized on the fly.
    ``idx`` holds the outlier columns of the last call that used a pool. The remaining fields belong
    to layouts of the past and stay ``None``.
    """

    _deprecated_fields: ClassVar[frozenset[str]] = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})

    force_no_igemmlt: bool = False
    CB: torch.Tensor | None = None
    SB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None
    SBt: torch.Tensor | None = None
    CBt: torch.Tensor | None = None
    subB: torch.Tensor | None = None
    outlier_pool: GlobalOutlierPooler | None = None
    idx: torch.Tensor | None = None

    has_accumulated_gradients = False
    threshold = 0.0
    has_fp16_weights = True
    is_training = True
    use_pool = False

    # Of which weight CB and SCB were made on the fly; see `int8.weight_token`.
    _token: ClassVar[Any] = None

    def reset_grads(self) -> None:
        """Forget the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        return all(_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name in MatmulLtState._deprecated_fields:
            warnings.warn(
                f"MatmulLtState.{name} is deprecated: weights have one layout, that of CB", FutureWarning, stacklevel=2
            )
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.device == right.device and left.dtype == right.dtype and torch.equal(left, right)
    return left is right or (not isinstance(left, torch.Tensor) and left == right)
