"""One call that both environments make, and what draws its inputs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from tests.compare.inputs import values


@dataclass(frozen=True)
class Case:
    """One call."""

    op: str
    id: str
    inputs: dict[str, Any]

    @property
    def key(self) -> str:
        """Unique among all cases."""
        return f"{self.op} {self.id}"


class Maker:
    """Builds cases; each draws from a generator of its own, seeded with its name."""

    def __init__(self, codebooks: dict[str, torch.Tensor]) -> None:
        self.codebooks = codebooks

    def seeded(self, *parts: object) -> torch.Generator:
        """A generator for the case named by ``parts``."""
        return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, parts)).encode()))

    def values(
        self, kind: str, shape: tuple[int, ...], dtype: str, name: str, code: str = "nf4", blocksize: int = 64
    ) -> torch.Tensor:
        """Input values for the case ``name``."""
        return values(kind, shape, dtype, self.seeded(name), self.codebooks[code], blocksize)


def size_of(shape: tuple[int, ...]) -> str:
    """``3x5`` for the shape ``(3, 5)``."""
    return "x".join(map(str, shape))
