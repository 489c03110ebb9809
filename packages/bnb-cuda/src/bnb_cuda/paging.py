"""Managed memory as torch tensors: the pager of :mod:`bitsandbytes.paging` for CUDA."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch

from bnb_cuda import _C
from bnb_cuda.arguments import stream_of


class ManagedMemory:
    """A piece of managed memory, freed when nothing uses it any more.

    torch takes it through the array interface of CUDA, which has no type for bfloat16; bytes do.
    """

    def __init__(self, size: int, device: int) -> None:
        address = _C.allocate_managed(device, size)
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
        weakref.finalize(self, _C.free_managed, address)


class ManagedPager:
    """Allocates managed memory and moves it ahead of its use."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor that kernels on ``device`` can read and write."""
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        size = math.prod(shape) * dtype.itemsize
        if size == 0 or not _C.has_managed_memory(index):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        data = torch.as_tensor(ManagedMemory(size, index), device=device)
        return data.view(dtype).view(tuple(shape))

    def prefetch(self, tensor: torch.Tensor, to_cpu: bool) -> None:
        """Begin to move a tensor, in the order of the device's current stream."""
        if tensor.numel():
            device = tensor.device.index
            _C.prefetch_managed(device, stream_of(device), tensor.data_ptr(), tensor.nbytes, to_cpu)
