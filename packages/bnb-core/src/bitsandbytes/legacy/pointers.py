"""Raw pointers, streams and devices, for callers that bind a native library through ``ctypes``."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable

import torch

from bitsandbytes.errors import ArgumentError


def get_ptr(A: torch.Tensor | None) -> ctypes.c_void_p | None:
    """Address of the tensor's first element, or ``None`` for no tensor."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Iterable[torch.Tensor | None]) -> bool:
    """True when all given tensors are on one accelerator.

    Paged tensors, which live in managed memory, count as being there.

    Raises:
        RuntimeError: a tensor is on the CPU, or they are on different devices.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None and not getattr(tensor, "is_paged", False)}
    if any(device.type == "cpu" for device in devices) or len(devices) > 1:
        found = ", ".join(sorted(str(device) for device in devices))
        raise ArgumentError(f"all input tensors must be on the same GPU, but they are on: {found}")
    return True


def _get_tensor_stream(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Handle of the current stream of the tensor's device."""
    if tensor.device.type == "xpu":
        return ctypes.c_void_p(torch._C._xpu_getCurrentRawStream(tensor.device.index))
    return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(tensor.device.index))


def _cuda_device_of(a: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's CUDA device current inside a ``with`` block; nothing for other devices."""
    return torch.cuda.device(a.device) if a.device.type == "cuda" else contextlib.nullcontext()


class CUBLAS_Context:  # noqa: N801 (historical name)
    """Handles of cuBLAS by device. Backends own their handles, so this only answers old callers."""

    _instance: CUBLAS_Context | None = None

    def __init__(self) -> None:
        raise RuntimeError("CUBLAS_Context is shared: call CUBLAS_Context.get_instance()")

    @classmethod
    def get_instance(cls) -> CUBLAS_Context:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget all handles."""
        self.context: dict[int, int] = {}

    def get_context(self, device: torch.device) -> int:
        """torch's cuBLAS handle of the device."""
        if device.index not in self.context:
            with torch.cuda.device(device):
                self.context[device.index] = torch.cuda.current_blas_handle()
        return self.context[device.index]
