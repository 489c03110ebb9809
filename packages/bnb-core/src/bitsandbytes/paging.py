"""Memory that can move between a device and the host.

A backend that has such memory (CUDA's managed memory) offers it as an object with the methods of
:class:`Pager`; :func:`set_pager` installs it for a device type. Everywhere else paged tensors are
plain tensors on the device, and one note per device type says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from bitsandbytes.backends.registry import REGISTRY


class Pager(Protocol):
    """What a backend with pageable memory provides; the methods of :class:`KnowingPager` are optional."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised, contiguous tensor that kernels on ``device`` can read and write."""

    def prefetch(self, tensor: torch.Tensor, to_cpu: bool) -> None:
        """Begin to move the tensor, in the order of the device's current stream; do not wait."""


class KnowingPager(Pager, Protocol):
    """What a pager may have beside, each method on its own, so that paged optimizers lose less time.

    Both are about speed alone: memory that is elsewhere than it is thought to be comes when it is used.
    """

    def departures(self, device: torch.device) -> int:
        """How often paged memory may have left the device, as far as is known: 0 at first, it never falls.

        A paged optimizer asks once in a step and fetches its states when the number is another one than when
        it fetched them last. Where the device has no room it rises with each question. Without this method
        states are fetched in each step.
        """

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begin to move paged tensors to the device that they belong to, beside its work; do not wait.

        They set out after what has been queued on the device's current stream until now. Work that is queued
        there later does not wait for them, until the function that is returned has been called. Without this
        method :meth:`prefetch` is called for each.
        """


class PagingWarning(UserWarning):
    """Paged memory was asked for on a device that has none."""


_makers: dict[str, Callable[[], Pager]] = {}
_pagers: dict[str, Pager] = {}
_noted: set[str] = set()


def set_pager(device_type: str, make: Callable[[], Pager] | None) -> None:
    """Install how to get the pager of a device type, or remove it; called on its first use."""
    _pagers.pop(device_type, None)
    if make is None:
        _makers.pop(device_type, None)
    else:
        _makers[device_type] = make


def get_paged(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor of pageable memory where the device has it, else of plain memory.

    A pageable tensor carries ``is_paged = True`` and, as upstream's do, the device that it belongs to
    as ``page_deviceid``.
    """
    pager = _pager(device)
    if pager is None:
        _note(device.type)
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    tensor = pager.allocate(shape, dtype, device)
    tensor.is_paged = True  # type: ignore[attr-defined]
    tensor.page_deviceid = device.index or 0  # type: ignore[attr-defined]
    return tensor


def prefetch(tensor: torch.Tensor, *, to_cpu: bool = False) -> None:
    """Begin to move a paged tensor to its device, or to the host; a plain tensor stays where it is."""
    if getattr(tensor, "is_paged", False):
        pager = _pager(tensor.device)
        if pager is not None:
            pager.prefetch(tensor, to_cpu)


def departures(device: torch.device) -> int | None:
    """See :meth:`KnowingPager.departures`; ``None`` where nobody knows, 0 where there is no paged memory."""
    pager = _pager(device)
    ask: Callable[[torch.device], int] | None = getattr(pager, "departures", None)
    if ask is not None:
        return ask(device)
    return 0 if pager is None else None


def fetch(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Begin to move paged tensors to their device, all to one; see :meth:`KnowingPager.fetch`."""
    pager = _pager(tensors[0].device) if tensors else None
    begin: Callable[[Sequence[torch.Tensor]], Callable[[], None]] | None = getattr(pager, "fetch", None)
    if begin is not None:
        return begin(tensors)
    for tensor in tensors:
        prefetch(tensor)
    return wait_for_nothing


def wait_for_nothing() -> None:
    """What a fetch returns that has nothing on its way beside the stream: the stream's order is enough."""


def is_pageable(device: torch.device) -> bool:
    """Whether the device has memory that can move to the host."""
    return _pager(device) is not None


def _pager(device: torch.device) -> Pager | None:
    kind = device.type
    if kind not in _makers:
        # A backend installs its pager when its kernels are loaded, which this does: states are made before a step.
        REGISTRY.binder("optimizer_step_32bit", kind)
    if kind not in _pagers and kind in _makers:
        _pagers[kind] = _makers[kind]()
    return _pagers.get(kind)


def _note(device_type: str) -> None:
    if device_type not in _noted:
        _noted.add(device_type)
        warnings.warn(
            f"device {device_type!r} has no memory that can be paged: paged tensors and the states of paged optimizers "
            f"stay in its ordinary memory; results are the same",
            PagingWarning,
            stacklevel=3,
        )
