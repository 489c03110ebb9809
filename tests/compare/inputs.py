"""Deterministic input values: every kind that has broken a quantizer before."""

from __future__ import annotations

import math

import torch

DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("normal", "uniform", "constant", "zero", "nonfinite", "denormal", "ties", "huge", "tiny", "heavy")

#: Largest power of ten that is safe in a dtype, and one near its smallest normal number.
HUGE = {"float32": 1e38, "float16": 6e4, "bfloat16": 1e38}
TINY = {"float32": 1e-38, "float16": 1e-5, "bfloat16": 1e-38}
DENORMAL = {"float32": 1e-41, "float16": 1e-7, "bfloat16": 1e-40}

#: Statistics of tie blocks: exact scaling, inexact scaling, and the ends of the range.
TIE_ABSMAX = (1.0, 0.5, 3.7, 1.1754944e-30, 2.0**40, 0.3333333432674408, 7.0, 1e-3)


def dtype_of(name: str) -> torch.dtype:
    """``torch.float32`` for ``"float32"``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def values(
    kind: str,
    shape: tuple[int, ...],
    dtype: str,
    generator: torch.Generator,
    code: torch.Tensor | None = None,
    blocksize: int = 64,
) -> torch.Tensor:
    """Values of a kind; ``ties`` needs the codebook and the block size it shall tie for."""
    x = torch.randn(shape, generator=generator)
    if kind == "uniform":
        x = torch.rand(shape, generator=generator) * 2 - 1
    elif kind == "constant":
        x = torch.full(shape, -0.7321)
    elif kind == "zero":
        x = torch.zeros(shape)
        x.reshape(-1)[::3] = -0.0
    elif kind == "denormal":
        x = x * DENORMAL[dtype]
    elif kind == "huge":
        x = (torch.rand(shape, generator=generator) * 2 - 1) * HUGE[dtype]
    elif kind == "tiny":
        x = x * TINY[dtype]
    elif kind == "heavy":
        x = x / torch.rand(shape, generator=generator).clamp_min(1e-3)
    elif kind == "nonfinite":
        flat = x.reshape(-1)
        count = flat.numel()
        for place, value in ((3, math.nan), (count // 2, math.inf), (count - 1, -math.inf)):
            flat[place % max(count, 1) : place % max(count, 1) + 1] = value
    elif kind == "ties":
        assert code is not None
        x = tie_values(shape, code, blocksize, generator)
    elif kind != "normal":
        raise ValueError(f"unknown kind of values {kind!r}")
    return x.to(dtype_of(dtype))


def tie_values(shape: tuple[int, ...], code: torch.Tensor, blocksize: int, generator: torch.Generator) -> torch.Tensor:
    """Values at the midpoints of neighbouring codes times absmax, and up to two ulps beside them."""
    count = math.prod(shape)
    code = code.double().unique()
    middles = ((code[1:] + code[:-1]) / 2).float()
    x = middles[torch.randint(len(middles), (count,), generator=generator)]
    steps = torch.randint(-2, 3, (count,), generator=generator)
    for step in (1, 2):
        x = torch.where(steps >= step, torch.nextafter(x, torch.full_like(x, math.inf)), x)
        x = torch.where(steps <= -step, torch.nextafter(x, torch.full_like(x, -math.inf)), x)
    for block, start in enumerate(range(0, count, blocksize)):
        absmax = TIE_ABSMAX[block % len(TIE_ABSMAX)]
        x[start : start + blocksize] *= absmax
        x[start] = absmax if block % 3 else -absmax
    return x.reshape(shape)


def random_bytes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform uint8 values."""
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)


def statistics(kind: str, count: int, generator: torch.Generator) -> torch.Tensor:
    """Plausible and implausible float32 absmax values."""
    absmax = torch.rand(count, generator=generator) + 0.01
    if kind == "edge":
        edges = torch.tensor([0.0, 1e-41, 3e38, math.inf, math.nan, -1.0, 65504.0, 1e-38])
        absmax[::2] = edges[torch.arange(len(absmax[::2])) % len(edges)]
    return absmax
