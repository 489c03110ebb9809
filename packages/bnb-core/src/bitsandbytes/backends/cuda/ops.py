"""Historical private names that other libraries read to learn how ``gemm_4bit`` runs on CUDA."""

from __future__ import annotations

import torch

from bitsandbytes.backends.plugin import Status
from bitsandbytes.backends.registry import REGISTRY

#: Rows of the input above which the callers need not ask.
_gemm_4bit_custom_max_m = 1536


def _gemm_4bit_use_custom_fn(device_index: int, dtype: torch.dtype, M: int, N: int, K: int) -> bool:
    """Whether ``gemm_4bit`` with ``M`` rows and a weight of shape ``(N, K)`` runs in one fused kernel."""
    for plugin in REGISTRY.for_device("cuda"):
        backend = plugin.backend
        if backend is not None and plugin.status is Status.REGISTERED and plugin.availability().available:
            return backend.fuses_gemm_4bit is not None and backend.fuses_gemm_4bit(device_index, dtype, M, N, K)
    return False
