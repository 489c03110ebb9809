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


class Pager(Protocol):
    """What a backend with pageable memory provides.

    A pager that knows more may also have ``is_resident(device) -> bool``; see :func:`is_resident`.
    """

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised, contiguous tensor that kernels on ``device`` can read and write."""

    def prefetch(self, tensor: torch.Tensor, to_cpu: bool) -> None:
        """Begin to move the tensor, in the order of the device's current stream; do not wait."""


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


def is_resident(device: torch.device) -> bool:
    """Whether the paged memory of a device lies there now, as far as its pager knows, so that fetching it is idle.

    Memory that is elsewhere all the same comes when it is used, later than if it had been fetched ahead. A pager
    that cannot tell has everything fetched.
    """
    pager = _pager(device)
    knows = getattr(pager, "is_resident", None)
    return pager is None or (knows is not None and bool(knows(device)))


def is_pageable(device: torch.device) -> bool:
    """Whether the device has memory that can move to the host."""
    return _pager(device) is not None


def _pager(device: torch.device) -> Pager | None:
    kind = device.type
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
