"""The device ``mydev`` for torch, simulated on the CPU. It stands for a vendor's extension of torch.

bitsandbytes knows nothing of it, and it knows nothing of bitsandbytes.
"""

import sys

import torch

from torch_mydev import _C, runtime

__all__ = ["autoload", "live_allocations"]

torch.utils.rename_privateuse1_backend("mydev")
torch._register_device_module("mydev", runtime)
torch.utils.generate_methods_for_privateuse1_backend()
sys.modules["torch.mydev"] = runtime


def autoload() -> None:
    """Entry point of torch's group ``torch.backends``; importing this module has done everything."""


def live_allocations() -> int:
    """Allocations in the memory of the device that have not been freed."""
    return _C.live_allocations()
