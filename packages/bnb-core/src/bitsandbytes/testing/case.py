"""One call that is asked of an op, and the values that calls are made of.

Arguments are made on the CPU from a seeded generator and moved to the device under test, so that a
failure can be repeated anywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    op: str
    #: Readable id, unique within the op.
    id: str
    #: Makes the arguments on the CPU.
    make: Callable[[torch.Generator], Arguments]
    #: Largest relative error; ``None`` asks for the reference's bits.
    tolerance: float | None = None
    #: Float64 truth of the first result; the reference where not given.
    truth: Callable[..., torch.Tensor] | None = None
    #: Judges an op that works in place: called with the arguments as they were before the call and as
    #: they are after it, both on the CPU, and with the device that they were on. Replaces the comparison of results.
    judge: Callable[[Arguments, Arguments, torch.device], None] | None = None
    #: Says whether a result other than the reference's bits is as good, from the arguments, the position
    #: of the result, the result and the reference's; for devices whose arithmetic leaves a choice.
    alternative: Callable[[Arguments, int, torch.Tensor, torch.Tensor], bool] | None = None

    def arguments(self) -> Arguments:
        """The arguments, the same at each call."""
        return self.make(torch.Generator().manual_seed(zlib.crc32(f"{self.op} {self.id}".encode())))


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Values of a kind that has broken some quantizer before."""
    if kind == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)[..., ::2]
    if kind == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).to(dtype).transpose(-1, -2)
    x = torch.randn(shape, generator=generator)
    if kind == "ties":
        # Multiples of 1/1536 in a block whose absmax is 1 meet the midpoints of FP4 exactly.
        x = torch.randint(-1536, 1537, shape, generator=generator) / 1536
        x.reshape(-1)[::32] = 1.0
    elif kind == "heavy":
        x = x / torch.rand(shape, generator=generator).clamp_min(1e-3)
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "constant":
        x = torch.full(shape, -0.75)
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "nonfinite":
        flat = x.reshape(-1)
        flat[flat.numel() // 3], flat[flat.numel() // 2], flat[-1] = torch.nan, torch.inf, -torch.inf
    elif kind != "normal":
        raise ValueError(f"unknown kind of values {kind!r}")
    return x.to(dtype)


def size_of(shape: tuple[int, ...]) -> str:
    """``3x5`` for the shape ``(3, 5)``."""
    return "x".join(map(str, shape))
