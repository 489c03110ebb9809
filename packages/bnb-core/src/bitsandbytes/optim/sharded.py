"""States of parameters that are sharded over processes (DTensor, as FSDP2 makes them).

An optimizer works on the shard of its process, with blocks of 256 that begin where the shard begins.
In a state dict the states are DTensors again, so that they can be gathered, and loaded under another
number of processes. For that the absmax of 8-bit states is saved by rows of the parameter: for each
row the absmax of all blocks that it touches, and where in the first of them it begins. A block whose
elements all have one absmax after loading keeps its codes; the others are quantized anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bitsandbytes.ops.optim_rules import RULES, Hyper, update
from bitsandbytes.ops.optim_storage import STATE_BLOCKSIZE, load_state, state_blocks, store_state

State = dict[str, Any]

#: Keys of the row form, beside ``row_offset``; the number is that of the state.
ROW_KEYS = ("row_absmax1", "row_absmax2")
OFFSET_KEY = "row_offset"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is on this process; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def row_form(absmax: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The absmax of a shard by rows.

    Args:
        absmax: shape ``(slots, blocks)``.
        rows, width: the shard as a matrix.

    Returns:
        ``(slots, rows, touched)`` absmax values, and per row the place in its first block, int64.
    """
    touched = (width + STATE_BLOCKSIZE - 2) // STATE_BLOCKSIZE + 1
    starts = torch.arange(rows, device=absmax.device) * width
    blocks = (starts // STATE_BLOCKSIZE).unsqueeze(1) + torch.arange(touched, device=absmax.device)
    return absmax[:, blocks.clamp_(max=max(absmax.shape[1] - 1, 0))], starts % STATE_BLOCKSIZE


def flat_form(
    codes: torch.Tensor, qmap: torch.Tensor, by_rows: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax of a shard in blocks that begin where the shard begins; inverse of :func:`row_form`.

    Args:
        codes: shape ``(slots, rows, width)``.
        qmap: codebook.
        by_rows, offset: results of :func:`row_form`.

    Returns:
        Codes of the same shape, and absmax of shape ``(slots, blocks)``.
    """
    slots, rows, width = codes.shape
    count = rows * width
    blocks = state_blocks(count)
    places = (offset.unsqueeze(1) + torch.arange(width, device=codes.device)) // STATE_BLOCKSIZE
    scale = by_rows.gather(2, places.expand(slots, rows, width)).reshape(slots, count)
    # Filled up with the last value, so that the padding does not make a block uneven.
    missing = blocks * STATE_BLOCKSIZE - count
    filled = torch.cat((scale, scale[:, -1:].expand(slots, missing)), dim=1) if count else scale
    tiled = filled.reshape(slots, blocks, STATE_BLOCKSIZE)
    even = tiled.amax(dim=2) == tiled.amin(dim=2) if count else torch.ones_like(tiled[:, :, 0], dtype=torch.bool)
    flat = codes.reshape(slots, count)
    new_codes, new_absmax = torch.empty_like(flat), scale.new_empty((slots, blocks))
    store_state(qmap[flat.int()] * scale, new_codes, qmap, new_absmax)
    kept = even.repeat_interleave(STATE_BLOCKSIZE, dim=1)[:, :count]
    absmax = torch.where(even, tiled[:, :, 0], new_absmax) if count else new_absmax
    return torch.where(kept, flat, new_codes).reshape(codes.shape), absmax


def spread(state: Mapping[str, Any], p: Any) -> State:
    """The state of a sharded parameter as it is saved, with DTensors for what is sharded.

    A state in 8 bit is saved by rows where the parameter is sharded by rows, else as float32.
    """
    saved = {key: value for key, value in state.items() if not key.startswith("absmax")}
    shard = local(p)
    rows, width = _matrix(shard)
    by_rows = all(placement.is_replicate() or placement.is_shard(0) for placement in p.placements)
    for number in (1, 2):
        key = f"state{number}"
        if key not in state:
            continue
        value = state[key]
        slots = value.numel() // shard.numel() if shard.numel() else (value.shape[0] if value.dim() > p.dim() else 1)
        if value.dtype == torch.uint8:
            absmax = state[f"absmax{number}"].reshape(slots, -1)
            if by_rows:
                stats, offset = row_form(absmax, rows, width)
                stats = stats.reshape((slots, *stats.shape[1:]) if slots > 1 else stats.shape[1:])
                saved[ROW_KEYS[number - 1]] = _as_sharded(
                    stats, p, (p.shape[0] if p.dim() else 1, stats.shape[-1]), slots
                )
                saved[OFFSET_KEY] = _as_sharded(offset, p, (p.shape[0] if p.dim() else 1,), 1)
            else:
                value = load_state(value, state[f"qmap{number}"], state[f"absmax{number}"])
                saved.pop(f"qmap{number}", None)
        saved[key] = _as_sharded(value, p, tuple(p.shape), slots)
    return saved


def collect(saved: Mapping[str, Any], p: torch.Tensor, slots: int) -> State:
    """The state of a parameter, or of the shard of one, from what :func:`spread` or a plain save made.

    Args:
        saved: flat state; its tensors are plain, sharded like ``p``, or whole.
        p: the parameter.
        slots: averages stacked in the first state.
    """
    state = {key: _part(key, value, p, slots) for key, value in saved.items()}
    offset = state.pop(OFFSET_KEY, None)
    for number, key in enumerate(ROW_KEYS, start=1):
        by_rows = state.pop(key, None)
        if not isinstance(by_rows, torch.Tensor) or not isinstance(offset, torch.Tensor):
            continue
        rows, width = _matrix(local(p))
        codes, depth = state.get(f"state{number}"), slots if number == 1 else 1
        touched = (width + STATE_BLOCKSIZE - 2) // STATE_BLOCKSIZE + 1
        if (
            not isinstance(codes, torch.Tensor)
            or codes.numel() != depth * rows * width
            or by_rows.numel() != depth * rows * touched
            or offset.numel() != rows
        ):
            # Without an absmax the state is refused by the check that follows.
            continue
        shape = codes.shape
        by_rows = by_rows.reshape(depth, rows, touched)
        codes, absmax = flat_form(codes.reshape(depth, rows, width), state[f"qmap{number}"], by_rows, offset)
        state[f"state{number}"] = codes.reshape(shape)
        state[f"absmax{number}"] = absmax if depth > 1 else absmax.reshape(-1)
    return state


def clip_scales(
    rule: str,
    params: Sequence[Any],
    shards: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[State],
    hypers: Sequence[Hyper],
) -> torch.Tensor:
    """Factors on the updates that limit their norms, with the norms of whole parameters.

    One reduction over the processes serves all parameters, which share mesh and placements.
    """
    squares = []
    for shard, gradient, state, h in zip(shards, grads, states, hypers, strict=True):
        values = []
        for number in range(1, RULES[rule].states + 1):
            value = state[f"state{number}"]
            if value.dtype == torch.uint8:
                value = load_state(value, state[f"qmap{number}"], state[f"absmax{number}"])
            values.append(value)
        _p, _states, unorm = update(RULES[rule], gradient.float(), shard.float(), tuple(values), h)
        squares.append(torch.stack((unorm.square(), shard.float().square().sum())))  # type: ignore[union-attr]
    update_norms, norms = _summed(torch.stack(squares), params[0]).sqrt().unbind(dim=1)
    limits = hypers[0].max_unorm * norms
    return torch.where((update_norms > limits) & (limits > 0.0), limits / update_norms, 1.0)


def _summed(values: torch.Tensor, p: Any) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in p.placements]
    return DTensor.from_local(values, p.device_mesh, placements, run_check=False).full_tensor()


def _matrix(shard: torch.Tensor) -> tuple[int, int]:
    rows = shard.shape[0] if shard.dim() else 1
    return rows, torch.Size(shard.shape[1:]).numel()


def _as_sharded(value: torch.Tensor, p: Any, shape: tuple[int, ...], slots: int) -> Any:
    """A DTensor of that global shape, sharded like ``p``, with the slots as a leading dimension of its own."""
    from torch.distributed.tensor import DTensor

    whole = (slots, *shape) if slots > 1 else shape
    placements = _placements(p, slots)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(value, p.device_mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride)


def _placements(p: Any, slots: int) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [Shard(place.dim + 1) if place.is_shard() and slots > 1 else place for place in p.placements]


def _part(key: str, value: Any, p: Any, slots: int) -> Any:
    """This process's part of a saved tensor."""
    if not isinstance(value, torch.Tensor) or is_sharded(value):
        return local(value) if isinstance(value, torch.Tensor) else value
    if not is_sharded(p) or not key.startswith(("state", "row_")):
        return value
    shard, depth = local(p), slots if key.endswith("1") else 1
    rows = value.shape[depth > 1] if value.dim() > (depth > 1) else 1
    if rows == (shard.shape[0] if shard.dim() else 1):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(shard.device), p.device_mesh, _placements(p, depth)).to_local()
