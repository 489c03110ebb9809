"""CPU backend of bitsandbytes.

Importing this module is cheap: it only describes the backend. The native module is loaded by
:func:`load`, on the first call of an op on a CPU tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from bitsandbytes.backends.description import Availability, Backend, Kernel

__all__ = ["backend"]

__version__ = "0.1.0"


def probe() -> Availability:
    """The kernels run on any processor that the wheel was built for; only the native module can be missing."""
    if importlib.util.find_spec("bnb_cpu._C") is None:
        return Availability(False, "its native module bnb_cpu._C is not built; install a wheel of bnb-cpu")
    return Availability(True)


def load() -> Iterable[Kernel]:
    """Load the native module and return the kernels.

    Raises:
        ImportError: the native module or an OpenMP runtime for it cannot be loaded, or
            ``BNB_CPU_ISA`` names an instruction set that this machine does not have.
    """
    from bnb_cpu.ops import KERNELS

    return KERNELS


#: Value of the entry point ``cpu`` in the group ``bitsandbytes.backends``.
backend = Backend(
    name="cpu",
    version=__version__,
    devices=("cpu",),
    op_api=(1, 1),
    probe=probe,
    load=load,
    install_hint="pip install --force-reinstall bnb-cpu",
)
