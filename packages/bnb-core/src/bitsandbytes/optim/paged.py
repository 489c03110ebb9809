"""States in memory that can move to the host: how they are made, and fetched ahead of the steps that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from bitsandbytes import paging

if TYPE_CHECKING:
    from bitsandbytes.optim.engine import Batch

    Work = list[tuple[Batch, list[torch.Tensor]]]

#: Smaller states than this many elements are never paged: a page of managed memory would be mostly empty.
MIN_PAGED_SIZE = 100_000

#: Bytes of paged state that one batch takes, while the states of the next one are on their way.
PAGED_PORTION = 256 * 2**20

#: Keys of the states that are paged.
STATE_KEYS = ("state1", "state2")


def new_state(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zero state of a paged optimizer."""
    # Where nothing can be paged, every size is asked for, so that the note about it does not depend on the size.
    if paging.is_pageable(device) and torch.Size(shape).numel() < MIN_PAGED_SIZE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return _made_there(shape, dtype, device).zero_()


def moved_state(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a state of a paged optimizer on a device: paged there, if a new state would be."""
    if value.numel() < MIN_PAGED_SIZE or not paging.is_pageable(device):
        return value.to(device, copy=True)
    return _made_there(tuple(value.shape), value.dtype, device).copy_(value)


def _made_there(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """New paged memory that lies on the device from the start, so that no step has to fetch it for the first time."""
    tensor = paging.get_paged(shape, dtype, device)
    paging.prefetch(tensor)
    return tensor


def paged_of(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """The paged tensors of the state of one parameter."""
    return [state[key] for key in STATE_KEYS if key in state and getattr(state[key], "is_paged", False)]


def fetched_ahead(work: Work) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
    """The same work; where states may be elsewhere, those of a batch move while the batch before is worked on."""
    paged = [batch for batch, _gradients in work if batch.paged]
    departures = {device: paging.departures(device) for device in {batch.device for batch in paged}}
    missing = []
    for batch in paged:
        number = departures[batch.device]
        # Where nobody knows, the states may always be elsewhere.
        if number is None or number != batch.fetched:
            missing.append(batch)
    return _one_ahead(work, missing, departures) if missing else iter(work)


def _one_ahead(
    work: Work, missing: list[Batch], departures: Mapping[torch.device, int | None]
) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
    places = {batch: place for place, batch in enumerate(missing)}
    arrivals: list[Callable[[], None]] = []
    for batch, gradients in work:
        if batch in places:
            # No more than the next one: what the device has no room for would drive out what it works on.
            for ahead in missing[len(arrivals) : places[batch] + 2]:
                arrivals.append(paging.fetch([tensor for state in ahead.states for tensor in paged_of(state)]))
                ahead.fetched = departures[ahead.device]
            arrivals[places[batch]]()
        yield batch, gradients
