"""The C library handle that a few callers bind upstream's symbols from.

Kernels live in backend wheels and are called through the ops. A backend may offer the historical C
symbols as a ``ctypes`` library (``Backend.ctypes_library``); ``lib`` resolves to that of the first
backend that is available. Without one, ``lib`` is an object whose every attribute says what to
install.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch

from bitsandbytes.backends.registry import REGISTRY, WHEELS, Status
from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR

logger = logging.getLogger(__name__)

#: Whether torch was built for AMD GPUs.
HIP_ENVIRONMENT = torch.version.hip is not None


class BNBNativeLibrary:
    """A loaded C library; symbols are attributes or items."""

    compiled_with_cuda = False

    def __init__(self, lib: ctypes.CDLL):
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._lib, name)

    def __getitem__(self, item: str) -> Any:
        return getattr(self, item)


class CudaBNBNativeLibrary(BNBNativeLibrary):
    """A C library with GPU symbols for NVIDIA or AMD."""

    compiled_with_cuda = True


class XpuBNBNativeLibrary(BNBNativeLibrary):
    """A C library with GPU symbols for Intel."""


class ErrorHandlerMockBNBNativeLibrary(BNBNativeLibrary):
    """Stands for a library that is not there: every symbol raises what to do about it."""

    def __init__(self, error_msg: str):
        self.error_msg = error_msg

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "error_msg":
            raise AttributeError(name)
        raise AttributeError(f"bitsandbytes has no C symbol {name!r}: {self.error_msg}")


def get_native_library() -> BNBNativeLibrary:
    """The C library of the first available backend that offers one, CUDA first."""
    for plugin in sorted(REGISTRY.plugins, key=lambda plugin: plugin.name != "cuda"):
        backend = plugin.backend
        if backend is None or backend.ctypes_library is None or plugin.status is not Status.REGISTERED:
            continue
        if plugin.availability().available:
            kind = CudaBNBNativeLibrary if "cuda" in backend.devices else BNBNativeLibrary
            return kind(backend.ctypes_library())
    return ErrorHandlerMockBNBNativeLibrary(
        f"no installed backend offers the C interface; for a GPU: pip install '{WHEELS['cuda']}'"
    )


def _backend_name() -> str:
    if torch.cuda.is_available():
        return "ROCm" if HIP_ENVIRONMENT else "CUDA"
    return "XPU" if hasattr(torch, "xpu") and torch.xpu.is_available() else "CPU"


def __getattr__(name: str) -> Any:
    # Both ask for devices, which import must not do: it would break processes that fork later.
    if name == "lib":
        value: Any = get_native_library()
    elif name == "BNB_BACKEND":
        value = _backend_name()
    elif name == "ROCM_GPU_ARCH":
        value = "unknown"
        if HIP_ENVIRONMENT and torch.cuda.is_available():
            value = torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


__all__ = [
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "PACKAGE_DIR",
    "BNBNativeLibrary",
    "CudaBNBNativeLibrary",
    "ErrorHandlerMockBNBNativeLibrary",
    "XpuBNBNativeLibrary",
    "get_native_library",
]
