"""Facade for the old import path of the op registry.

Third-party plugins written for upstream register kernels with ``register_kernel`` from here; it is
torch's own function, as it always was.
"""

from torch.library import register_fake, register_kernel

from bitsandbytes import ops

__all__ = ["ops", "register_fake", "register_kernel"]
