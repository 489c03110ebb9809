"""Managed memory as torch tensors: the pager of :mod:`bitsandbytes.paging` for CUDA."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
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


#: A device with less of its memory free than this share may have moved pages to the host.
LEAST_FREE = 0.02
#: Questions between two looks at the free memory, which the driver takes its time for; a step asks once per batch.
STEPS_BETWEEN_LOOKS = 16


class Residence:
    """What is known of a device: whether its managed memory can lie elsewhere."""

    def __init__(self) -> None:
        self._steps_left = 0
        self._has_room = True
        self._may_be_away = False

    def forget(self) -> None:
        """Memory has been sent away."""
        self._may_be_away = True

    def holds(self, device: int) -> bool:
        """Whether nothing can have been moved away since everything was fetched."""
        if self._steps_left == 0:
            self._steps_left = STEPS_BETWEEN_LOOKS
            free, total = torch.cuda.mem_get_info(device)
            self._has_room = free >= total * LEAST_FREE
        self._steps_left -= 1
        if not self._has_room:
            self._may_be_away = True
            return False
        # One more fetch brings back what left while there was no room.
        was_away, self._may_be_away = self._may_be_away, False
        return not was_away


class ManagedPager:
    """Allocates managed memory and moves it ahead of its use."""

    def __init__(self) -> None:
        self._residences: defaultdict[int, Residence] = defaultdict(Residence)

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
            if to_cpu:
                self._residences[device].forget()

    def is_resident(self, device: torch.device) -> bool:
        """See :func:`bitsandbytes.paging.is_resident`.

        Managed memory leaves a device only when that has no room, which other users of it can also cause.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        return self._residences[index].holds(index)
