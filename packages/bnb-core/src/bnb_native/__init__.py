"""Portable C++ headers for bitsandbytes backends, shipped as data.

A backend's build asks this package where the headers and the CMake configuration lie. It imports
nothing beyond the standard library, so that a build never imports torch.
"""

from pathlib import Path

__all__ = ["cmake_dir", "include_dir"]

_ROOT = Path(__file__).resolve().parent


def include_dir() -> str:
    """Folder to put on the C++ include path; headers are included as ``<bnb/quant.h>``."""
    return str(_ROOT / "include")


def cmake_dir() -> str:
    """Folder with ``bnb-config.cmake``; pass it to CMake as ``bnb_DIR``."""
    return str(_ROOT / "cmake")
