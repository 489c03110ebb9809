"""NVIDIA backend of bitsandbytes.

Importing this module is cheap: it only describes the backend. The native module is loaded by
:func:`load`, on the first call of an op on a CUDA tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch

from bitsandbytes.backends.description import Availability, Backend, Kernel

__all__ = ["backend"]

__version__ = "0.1.0"

#: Lowest compute capability that the wheel holds code for.
LOWEST_CAPABILITY = (7, 5)


def probe() -> Availability:
    """Whether torch, driver, device and wheel fit together; loads nothing native."""
    if importlib.util.find_spec("bnb_cuda._C") is None:
        return Availability(False, "its native module bnb_cuda._C is not built; install a wheel of bnb-cuda")
    if torch.version.hip is not None:
        return Availability(False, "this torch is built for ROCm; install bnb-rocm instead of bnb-cuda")
    if torch.version.cuda is None:
        return Availability(False, "this torch is built without CUDA; install a CUDA build of torch")
    if not torch.cuda.is_available():
        return Availability(
            False, "torch finds no usable GPU; check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        )
    capability = torch.cuda.get_device_capability()
    if capability < LOWEST_CAPABILITY:
        return Availability(
            False,
            f"the GPU has compute capability {capability[0]}.{capability[1]}, "
            f"the kernels need {LOWEST_CAPABILITY[0]}.{LOWEST_CAPABILITY[1]} or later",
        )
    return Availability(True)


def load() -> Iterable[Kernel]:
    """Load the native module and return the kernels.

    Raises:
        ImportError: the native module cannot be loaded.
    """
    from bitsandbytes import paging
    from bnb_cuda.ops import KERNELS
    from bnb_cuda.paging import ManagedPager

    paging.set_pager("cuda", ManagedPager)
    return KERNELS


def fuses_gemm_4bit(device: int, dtype: torch.dtype, rows: int, n: int, k: int) -> bool:
    """Whether ``gemm_4bit`` of these sizes runs without a dequantized copy of the weight."""
    from bnb_cuda import tuning

    major, minor = torch.cuda.get_device_capability(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    plan = tuning.plan_gemm_4bit(rows, n, k, 64, dtype, major * 10 + minor, processors)
    return plan.path is not tuning.Path.DEQUANTIZE


#: Value of the entry point ``cuda`` in the group ``bitsandbytes.backends``.
backend = Backend(
    name="cuda",
    version=__version__,
    devices=("cuda",),
    op_api=(1, 1),
    probe=probe,
    load=load,
    install_hint="pip install --force-reinstall bnb-cuda",
    fuses_gemm_4bit=fuses_gemm_4bit,
)
