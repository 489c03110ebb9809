"""Paged tensors under their historical names; see :mod:`bitsandbytes.paging`."""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes import paging
from bitsandbytes.errors import ArgumentError


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device = torch.device("cuda", index=0)
) -> torch.Tensor:
    """An uninitialised tensor in memory that can move between the device and the host."""
    return paging.get_paged(shape, dtype, torch.device(device))


def prefetch_tensor(A: torch.Tensor, to_cpu: bool = False) -> None:
    """Start moving a paged tensor to its device, or to the host."""
    paging.prefetch(A, to_cpu=to_cpu)


class GlobalPageManager:
    """The list of paged tensors that are to be moved together."""

    _instance: GlobalPageManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalPageManager is shared: call GlobalPageManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget all tensors."""
        self.paged_tensors: list[torch.Tensor] = []

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Prefetch every listed tensor, the latest first: it is likely to be used first."""
        for tensor in reversed(self.paged_tensors):
            prefetch_tensor(tensor, to_cpu)


def elementwise_func(
    func_name: str, A: torch.Tensor, B: torch.Tensor | None, value: float, prefetch: bool = True
) -> None:
    """Fill (``"fill"``), count up (``"arange"``) or multiply by ``B`` (``"_mul"``), in place on ``A``."""
    if prefetch and getattr(A, "is_paged", False):
        prefetch_tensor(A)
    if func_name == "fill":
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), dtype=A.dtype, device=A.device).reshape(A.shape))
    elif func_name == "_mul" and B is not None:
        A.mul_(B)
    else:
        raise ArgumentError(f"unknown element-wise function {func_name!r}; known: fill, arange, _mul (with B)")


def fill(A: torch.Tensor, value: float, device: Any = None, prefetch: bool = True) -> None:
    """Set every element of ``A`` to ``value``."""
    elementwise_func("fill", A, None, value, prefetch)


def _mul(A: torch.Tensor, B: torch.Tensor, device: Any = None) -> None:
    """Multiply ``A`` by ``B`` in place."""
    elementwise_func("_mul", A, B, 0)
