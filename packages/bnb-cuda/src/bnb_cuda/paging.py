"""Managed memory as torch tensors: the pager of :mod:`bitsandbytes.paging` for CUDA."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import torch

from bitsandbytes.paging import wait_for_nothing
from bnb_cuda import _C
from bnb_cuda.arguments import stream_of

#: A device with less of its memory free than this share may have moved pages to the host.
LEAST_FREE = 0.02
#: Questions between two looks at the free memory, which the driver takes its time for.
QUESTIONS_BETWEEN_LOOKS = 16

#: Addresses of the managed memory that is in use.
_in_use: set[int] = set()


class ManagedMemory:
    """A piece of managed memory, freed when nothing uses it any more.

    torch takes it through the array interface of CUDA, which has no type for bfloat16; bytes do.
    """

    def __init__(self, size: int, device: int) -> None:
        address = _C.allocate_managed(device, size)
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
        _in_use.add(address)
        weakref.finalize(self, _free, address)


def _free(address: int) -> None:
    _in_use.discard(address)
    # Waits for the device, so that neither a kernel nor a page on its way outlives the memory.
    _C.free_managed(address)


class Residence:
    """What is known of the managed memory of a device: how often some of it may have left."""

    def __init__(self) -> None:
        self._questions_left = 0
        self._has_room = True
        self._departures = 0
        self._side: torch.cuda.Stream | None = None

    def forget(self) -> None:
        """Memory has been sent away."""
        self._departures += 1

    def departures(self, device: int, look: bool = True) -> int:
        """See :meth:`bitsandbytes.paging.KnowingPager.departures`; without a look, what was known before."""
        if not look:
            return self._departures
        had_room = self._has_room
        if self._questions_left == 0:
            self._questions_left = QUESTIONS_BETWEEN_LOOKS
            free, total = torch.cuda.mem_get_info(device)
            self._has_room = free >= total * LEAST_FREE
        self._questions_left -= 1
        if not (had_room and self._has_room):
            # When room is there again, once more: for what left since it was fetched last.
            self._departures += 1
        return self._departures

    def side(self, device: int) -> torch.cuda.Stream:
        """The stream that pages travel on beside the work of a device."""
        if self._side is None:
            self._side = torch.cuda.Stream(device)
        return self._side


class ManagedPager:
    """Allocates managed memory and moves it ahead of its use.

    A graph cannot hold such moves: while one is captured nothing is fetched, and in its replays pages that are
    elsewhere come when they are used.
    """

    def __init__(self) -> None:
        self._residences: dict[int, Residence] = {}

    def _residence(self, index: int) -> Residence:
        return self._residences.setdefault(index, Residence())

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor that kernels on ``device`` can read and write."""
        index = _index(device)
        device = torch.device("cuda", index)
        size = math.prod(shape) * dtype.itemsize
        if size == 0 or not _C.has_managed_memory(index):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        data = torch.as_tensor(ManagedMemory(size, index), device=device)
        return data.view(dtype).view(tuple(shape))

    def prefetch(self, tensor: torch.Tensor, to_cpu: bool) -> None:
        """Begin to move a tensor, in the order of the device's current stream."""
        index = tensor.device.index
        stream = stream_of(index)
        if _C.is_capturing(index, stream):
            return
        if to_cpu:
            self._residence(index).forget()
        _move(tensor, stream, to_cpu)

    def departures(self, device: torch.device) -> int:
        """See :meth:`bitsandbytes.paging.KnowingPager.departures`.

        Managed memory leaves a device only when that has no room, which other users of it can also cause.
        """
        index = _index(device)
        return self._residence(index).departures(index, look=not _C.is_capturing(index, stream_of(index)))

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """See :meth:`bitsandbytes.paging.KnowingPager.fetch`."""
        index = tensors[0].device.index
        if _C.is_capturing(index, stream_of(index)):
            return wait_for_nothing
        side = self._residence(index).side(index)
        side.wait_stream(torch.cuda.current_stream(index))
        for tensor in tensors:
            _move(tensor, side.cuda_stream, False)
        arrival = side.record_event()
        return lambda: torch.cuda.current_stream(index).wait_event(arrival)


def _move(tensor: torch.Tensor, stream: int, to_cpu: bool) -> None:
    # Copies of paged tensors, by copy.deepcopy for instance, have their marks but lie in plain memory.
    if tensor.numel() and tensor.untyped_storage().data_ptr() in _in_use:
        _C.prefetch_managed(tensor.device.index, stream, tensor.data_ptr(), tensor.nbytes, to_cpu)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
