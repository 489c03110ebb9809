"""How optimizer states are stored in 8 bit, and how parameters are rounded stochastically."""

from __future__ import annotations

import torch

from bitsandbytes.ops import search
from bitsandbytes.ops.common import block_count

#: Values that share one absmax in 8-bit optimizer states (256 since the 0.44 line of upstream).
STATE_BLOCKSIZE = 256

_MASK32 = 0xFFFFFFFF


def load_state(
    codes: torch.Tensor, qmap: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Values of an 8-bit state; every slot of a stacked state has blocks of its own."""
    slots, count = _slots(codes, absmax)
    values = qmap[codes.reshape(-1).int()].reshape(slots, count)
    stats = absmax.reshape(slots, -1)
    rows = [search.unscale_blocks(values[slot], stats[slot], STATE_BLOCKSIZE) for slot in range(slots)]
    return torch.stack(rows).reshape(codes.shape).to(dtype)


def store_state(
    values: torch.Tensor,
    codes: torch.Tensor,
    qmap: torch.Tensor,
    absmax: torch.Tensor,
    active: torch.Tensor | None = None,
) -> None:
    """Quantize values into ``codes`` and ``absmax``, in place.

    A value that is not finite is stored as zero: it would spoil the statistics of its whole block
    for all later steps.

    Args:
        values: the new state.
        codes, qmap, absmax: where and how it is stored.
        active: elements that the step concerns; all where not given. A block without any stays as it
            is, since quantizing again, although nothing has changed, would wear it down.
    """
    slots, count = _slots(codes, absmax)
    rows = values.reshape(slots, count)
    rows = torch.where(rows.isfinite(), rows, 0.0)
    blocks = None if active is None else _active_blocks(active.reshape(count))
    for row, row_codes, row_absmax in zip(rows, codes.view(slots, count), absmax.view(slots, -1), strict=True):
        scaled, stats = search.scale_blocks_8bit(row, STATE_BLOCKSIZE)
        new = search.nearest_code_8bit(scaled, qmap)
        if blocks is not None:
            stats = torch.where(blocks, stats, row_absmax)
            new = torch.where(blocks.repeat_interleave(STATE_BLOCKSIZE)[:count], new, row_codes)
        row_codes.copy_(new)
        row_absmax.copy_(stats)


def _active_blocks(active: torch.Tensor) -> torch.Tensor:
    blocks = state_blocks(active.numel())
    padded = torch.nn.functional.pad(active, (0, blocks * STATE_BLOCKSIZE - active.numel()))
    return padded.reshape(blocks, STATE_BLOCKSIZE).any(dim=1)


def state_blocks(count: int) -> int:
    """Number of absmax values of a state with ``count`` elements."""
    return block_count(count, STATE_BLOCKSIZE)


def _slots(codes: torch.Tensor, absmax: torch.Tensor) -> tuple[int, int]:
    slots = absmax.shape[0] if absmax.dim() == 2 else 1
    return slots, codes.numel() // slots


def round_stochastically(values: torch.Tensor, seed: int, step: float | torch.Tensor) -> torch.Tensor:
    """Round float32 to bfloat16, up with the probability that keeps the expectation.

    Sixteen random bits are added below the last bit that bfloat16 keeps, and the rest is cut off.
    The bits are a hash of seed, step and index, so that every backend and every resumed run gets the
    same ones: with ``mix`` the finalizer of MurmurHash3 and all arithmetic modulo 2**32,
    ``mix(low(i) ^ mix(mix(seed ^ mix(step)) + high(i)))``, of which the low 16 bits count.
    NaN and infinity stay.
    """
    flat = values.reshape(-1)
    index = torch.arange(flat.numel(), device=flat.device)
    step = torch.as_tensor(step, device=flat.device).to(torch.int64)
    key = _mix((seed & _MASK32) ^ _mix(step & _MASK32))
    noise = _mix((index & _MASK32) ^ _mix((key + (index >> 32)) & _MASK32)) & 0xFFFF
    bits = flat.view(torch.int32).to(torch.int64) & _MASK32
    rounded = (bits + noise) & 0xFFFF0000
    # From unsigned to the signed integer with the same bits, which is what a view needs.
    signed = torch.where(rounded > 0x7FFFFFFF, rounded - (1 << 32), rounded).to(torch.int32)
    result = torch.where(flat.isfinite(), signed.view(torch.float32), flat)
    return result.to(torch.bfloat16).reshape(values.shape)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)
