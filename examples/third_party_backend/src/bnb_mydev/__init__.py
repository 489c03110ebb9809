"""Backend of bitsandbytes for the device ``mydev``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from bitsandbytes.backends import Availability, Backend, Kernel

__all__ = ["backend"]

__version__ = "0.1.0"


def probe() -> Availability:
    """Whether torch has the device."""
    import torch

    if importlib.util.find_spec("torch_mydev") is None:
        return Availability(False, "torch does not know mydev: install the extension torch_mydev")
    if not hasattr(torch, "mydev"):
        return Availability(False, "torch does not know mydev yet: import torch_mydev first")
    return Availability(True)


def load() -> Iterable[Kernel]:
    """The kernels."""
    from bnb_mydev.ops import KERNELS

    return KERNELS


backend = Backend(
    name="mydev",
    version=__version__,
    devices=("mydev",),
    op_api=(1, 1),
    probe=probe,
    load=load,
    install_hint="pip install --force-reinstall --no-deps bnb-mydev",
)
