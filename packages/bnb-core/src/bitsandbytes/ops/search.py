"""Reference arithmetic of block-wise quantization: scaling, code search, and the way back.

The exact order of operations is part of the format: packed codes and statistics are equal bit for
bit to those of bitsandbytes 0.50.2 on the same class of device. All steps are in float32, each rounded
on its own (no fused multiply-add). The CPU and the GPUs of that release disagree in a few places, which
:func:`follows_cpu` decides.
"""

from __future__ import annotations

import functools

import torch

from bitsandbytes.codebooks import follows_cpu, midpoints_4bit, ranks_4bit

#: Lower bound of absmax before its reciprocal is taken, near the smallest normal float32.
TINY_ABSMAX = 1e-38

#: The 8-bit search rounds a scaled value in [-1, 1] to one of this many evenly spaced points.
GRID_POINTS = 65536
_GRID_SCALE = (GRID_POINTS - 1) / 2


def scale_blocks_4bit(A: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each block of the flattened tensor to [-1, 1].

    On the CPU full blocks are multiplied by the reciprocal of ``max(absmax, 1e-38)``; a partial last block
    is divided by that maximum, which is then also what is stored for it. GPUs ignore NaN in absmax and
    multiply each block by the reciprocal of its absmax; a block of zeros scales to NaN.

    Returns:
        ``(scaled, absmax)``: float32 of shape ``(A.numel(),)`` and ``(blocks,)``.
    """
    if not follows_cpu(A.device):
        return _scale_by_reciprocal(A, blocksize)
    values = A.reshape(-1).float()
    full = values.numel() // blocksize * blocksize
    blocks = values[:full].reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * absmax.clamp_min(TINY_ABSMAX).reciprocal().unsqueeze(1)).reshape(-1)
    if full < values.numel():
        tail = values[full:]
        tail_absmax = tail.abs().max().clamp_min(TINY_ABSMAX)
        absmax = torch.cat((absmax, tail_absmax.reshape(1)))
        scaled = torch.cat((scaled, tail / tail_absmax))
    return scaled, absmax


def nearest_code_4bit(scaled: torch.Tensor, quant_type: str) -> torch.Tensor:
    """Codes (uint8) of scaled values: the rank among the boundaries of the sorted table.

    A value on a boundary takes the lower rank; NaN takes the highest, on GPUs code 0.
    """
    rank = torch.bucketize(scaled, midpoints_4bit(quant_type, scaled.device), right=False)
    codes = ranks_4bit(quant_type, scaled.device)[rank]
    return codes if follows_cpu(scaled.device) else codes.masked_fill_(scaled.isnan(), 0)


def scale_blocks_8bit(A: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each block by the reciprocal of its absmax and clamp to [-1, 1].

    NaN is ignored in absmax. A block without a non-zero value scales to NaN, which the search codes
    as 0.

    Returns:
        ``(scaled, absmax)``: float32 of shape ``(A.numel(),)`` and ``(blocks,)``.
    """
    scaled, absmax = _scale_by_reciprocal(A, blocksize)
    return scaled.clamp(-1.0, 1.0), absmax


def _scale_by_reciprocal(A: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values times the reciprocal of the absmax of their block, in which NaN does not count."""
    values = A.reshape(-1).float()
    count = values.numel()
    blocks = -(-count // blocksize)
    # A block longer than the tensor is the tensor; this keeps the padding small.
    blocksize = max(1, min(blocksize, count))
    padded = torch.nn.functional.pad(values, (0, blocks * blocksize - count)).reshape(blocks, blocksize)
    absmax = padded.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)
    scaled = torch.where(absmax.unsqueeze(1) == 0, torch.nan, padded * absmax.reciprocal().unsqueeze(1))
    return scaled.reshape(-1)[:count], absmax


def nearest_code_8bit(scaled: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of scaled values in [-1, 1] under an ascending codebook; NaN gets code 0.

    On the CPU the value is first rounded to the grid of 65536 points, and the code nearest to the grid
    point is taken, the lower one on a tie. GPUs take the code nearest to the value, the even one on a
    tie.
    """
    if not follows_cpu(scaled.device):
        return torch.bucketize(scaled, _even_midpoints(code)).masked_fill_(scaled.isnan(), 0).to(torch.uint8)
    position = ((scaled + 1.0) * _GRID_SCALE + 0.5).floor().nan_to_num(nan=0.0).int()
    grid = _grid(code.device)
    # For few values it is cheaper to search for each than for every point of the grid.
    codes = _codes_of(grid[position], code) if scaled.numel() < GRID_POINTS else _codes_of(grid, code)[position]
    return torch.where(scaled.isnan(), 0, codes)


def _even_midpoints(code: torch.Tensor) -> torch.Tensor:
    """Midpoints such that a value above one of them has the higher code, also where ties go to even codes."""
    table = code.reshape(-1)
    midpoints = (table[:-1] + table[1:]) * 0.5
    below = torch.nextafter(midpoints, torch.full_like(midpoints, -torch.inf))
    odd = torch.arange(midpoints.numel(), device=code.device) % 2 == 1
    # Of two equal values the lower code serves.
    return torch.where(odd & (table[:-1] != table[1:]), below, midpoints)


def _codes_of(points: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    table = code.reshape(-1)
    midpoints = (table[:-1] + table[1:]) * 0.5
    return torch.bucketize(points, midpoints, right=False).to(torch.uint8)


@functools.cache
def _grid(device: torch.device) -> torch.Tensor:
    return torch.arange(GRID_POINTS, dtype=torch.float32, device=device) / _GRID_SCALE - 1.0


def unscale_blocks(values: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Multiply a flat float32 tensor by the absmax of each value's block."""
    count = values.numel()
    absmax = absmax.reshape(-1)
    full = count // blocksize
    head = values[: full * blocksize].reshape(full, -1 if full else 0) * absmax[:full].unsqueeze(1)
    if full * blocksize == count:
        return head.reshape(-1)
    return torch.cat((head.reshape(-1), values[full * blocksize :] * absmax[full]))
