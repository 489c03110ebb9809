"""The C library handle that a few callers bind upstream's symbols from.

Kernels live in backend wheels and are called through the ops. A backend may offer the historical C
symbols as a ``ctypes`` library (``Backend.ctypes_library``); ``lib`` resolves to that of the first
backend that is available. A symbol that is not there is a function that raises when it is called:
callers bind symbols at import, for devices that they may never use.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitsandbytes.backends.plugin import WHEELS, Status
from bitsandbytes.backends.registry import REGISTRY
from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from bitsandbytes.cuda_specs import CUDASpecs, get_cuda_specs, get_cuda_version_tuple, get_rocm_gpu_arch
from bitsandbytes.errors import BackendError

logger = logging.getLogger(__name__)

#: Whether torch was built for AMD GPUs.
HIP_ENVIRONMENT = torch.version.hip is not None


class BNBNativeLibrary:
    """A loaded C library; symbols are attributes or items."""

    compiled_with_cuda = False

    def __init__(self, lib: ctypes.CDLL):
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_lib":
            raise AttributeError(name)
        try:
            return getattr(self._lib, name)
        except AttributeError:
            return _missing_symbol(name, f"the library {self._lib._name} does not have it")

    def __getitem__(self, item: str) -> Any:
        return getattr(self, item)


class CudaBNBNativeLibrary(BNBNativeLibrary):
    """A C library with GPU symbols for NVIDIA or AMD."""

    compiled_with_cuda = True


class XpuBNBNativeLibrary(BNBNativeLibrary):
    """A C library with GPU symbols for Intel."""


class ErrorHandlerMockBNBNativeLibrary(BNBNativeLibrary):
    """Stands for a library that is not there: every symbol says, when called, what to do about it."""

    def __init__(self, error_msg: str):
        self.error_msg = error_msg

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "error_msg":
            raise AttributeError(name)
        return _missing_symbol(name, self.error_msg)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def _missing_symbol(name: str, why: str) -> Callable[..., Any]:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise BackendError(f"bitsandbytes has no C symbol {name!r}: {why}")

    missing.__name__ = name
    return missing


def get_native_library() -> BNBNativeLibrary:
    """The C library of the first available backend that offers one, CUDA first."""
    for plugin in sorted(REGISTRY.plugins, key=lambda plugin: "cuda" not in plugin.devices):
        backend = plugin.backend
        if backend is None or backend.ctypes_library is None or plugin.status is not Status.REGISTERED:
            continue
        if plugin.availability().available:
            return _library_class(backend.devices)(backend.ctypes_library())
    return ErrorHandlerMockBNBNativeLibrary(
        f"no installed backend offers the C interface; for a GPU: pip install {WHEELS['cuda']!r}"
    )


def _library_class(devices: tuple[str, ...]) -> type[BNBNativeLibrary]:
    if "cuda" in devices:
        return CudaBNBNativeLibrary
    return XpuBNBNativeLibrary if "xpu" in devices else BNBNativeLibrary


# --- libraries beside the package -----------------------------------------------------------------
# Upstream keeps one library per version of the GPU runtime in the package's folder; the wheels of
# this project keep their native module inside their own package. These answer for that folder.


def _split_cuda_version(compact: str, is_hip: bool) -> tuple[int, int]:
    """Major and minor of a version without a separator: CUDA majors have two digits, HIP's have one."""
    digits = 1 if is_hip else 2
    return int(compact[:digits]), int(compact[digits:])


def _find_cuda_libs(prefix: str, is_hip: bool) -> dict[tuple[int, int], Path]:
    pattern = re.compile(rf"libbitsandbytes_{re.escape(prefix)}(\d{{2,}}){re.escape(DYNAMIC_LIBRARY_SUFFIX)}")
    matches = ((pattern.fullmatch(path.name), path) for path in PACKAGE_DIR.glob("libbitsandbytes_*"))
    return {_split_cuda_version(match[1], is_hip): path for match, path in matches if match}


@functools.cache
def get_available_cuda_binary_versions() -> list[str]:
    """Versions of the GPU runtime for which a library lies in the package's folder, ascending."""
    found = _find_cuda_libs("rocm" if HIP_ENVIRONMENT else "cuda", HIP_ENVIRONMENT)
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def parse_cuda_version(version_str: str) -> str:
    """``"128"`` as ``"12.8"``; a text that is not such a version is returned as it is."""
    if version_str.isdigit() and len(version_str) >= 3:
        return f"{version_str[:2]}.{version_str[2:]}"
    return version_str


def get_cuda_bnb_library_path(cuda_specs: CUDASpecs) -> Path:
    """Where a library for this GPU runtime lies, if it does, in the package's folder."""
    kind, variable = ("rocm", "BNB_ROCM_VERSION") if HIP_ENVIRONMENT else ("cuda", "BNB_CUDA_VERSION")
    version = os.environ.get(variable) or cuda_specs.cuda_version_string
    return PACKAGE_DIR / f"libbitsandbytes_{kind}{version}{DYNAMIC_LIBRARY_SUFFIX}"


def get_xpu_bnb_library_path() -> Path:
    """Where a library for Intel GPUs lies, if it does, in the package's folder."""
    return PACKAGE_DIR / f"libbitsandbytes_xpu{DYNAMIC_LIBRARY_SUFFIX}"


def _backend_name() -> str:
    if torch.cuda.is_available():
        return "ROCm" if HIP_ENVIRONMENT else "CUDA"
    return "XPU" if hasattr(torch, "xpu") and torch.xpu.is_available() else "CPU"


def __getattr__(name: str) -> Any:
    # These ask for devices, which import must not do: it would break processes that fork later.
    makers: dict[str, Callable[[], Any]] = {
        "lib": get_native_library,
        "BNB_BACKEND": _backend_name,
        "ROCM_GPU_ARCH": get_rocm_gpu_arch,
        "ROCM_WARP_SIZE_64": _has_wide_warps,
    }
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, makers[name]())


def _has_wide_warps() -> bool:
    """Whether the first AMD GPU runs 64 threads in lockstep, as its data-centre line does."""
    return get_rocm_gpu_arch().startswith("gfx9")


__all__ = [
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "PACKAGE_DIR",
    "BNBNativeLibrary",
    "CUDASpecs",
    "CudaBNBNativeLibrary",
    "ErrorHandlerMockBNBNativeLibrary",
    "XpuBNBNativeLibrary",
    "get_available_cuda_binary_versions",
    "get_cuda_bnb_library_path",
    "get_cuda_specs",
    "get_cuda_version_tuple",
    "get_native_library",
    "get_rocm_gpu_arch",
    "get_xpu_bnb_library_path",
    "parse_cuda_version",
]
