"""Portable C++ headers for bitsandbytes backends, shipped as data.

A backend's build asks this package where the headers and the CMake configuration lie. It imports
nothing beyond the standard library, so that a build never imports torch.
"""

import shutil
from pathlib import Path

__all__ = ["cmake_dir", "copy_to", "include_dir"]

_ROOT = Path(__file__).resolve().parent


def include_dir() -> str:
    """Folder to put on the C++ include path; headers are included as ``<bnb/quant.h>``."""
    return str(_ROOT / "include")


def cmake_dir() -> str:
    """Folder with ``bnb-config.cmake``; pass it to CMake as ``bnb_DIR``."""
    return str(_ROOT / "cmake")


def copy_to(folder: str | Path) -> str:
    """Copy headers and CMake configuration to ``folder/bnb_native``, and return that path.

    A backend that carries a copy can be built in isolation, without ``bnb-core`` and therefore without
    torch. An earlier copy is replaced.

    Raises:
        FileExistsError: ``folder/bnb_native`` exists and is not such a copy.
    """
    target = Path(folder) / "bnb_native"
    if target.exists() and not (target / "cmake" / "bnb-config.cmake").exists():
        raise FileExistsError(f"{target} exists and holds something else")
    shutil.rmtree(target, ignore_errors=True)
    for part in ("cmake", "include"):
        shutil.copytree(_ROOT / part, target / part)
    return str(target)
