"""Backend plugins: the public door for every implementation of an op.

``Backend``, ``Kernel`` and ``Availability`` are what a backend package imports.
"""

from bitsandbytes.backends.description import Availability, Backend, Kernel

__all__ = ["Availability", "Backend", "Kernel"]
