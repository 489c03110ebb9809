"""CAME: a factored second moment, and a momentum that counts less where updates disagree with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bitsandbytes.errors import ArgumentError, CheckpointError
from bitsandbytes.optim.base import Optimizer8bit
from bitsandbytes.optim.composed import ComposedBatch
from bitsandbytes.optim.engine import Batch
from bitsandbytes.optim.settings import MockArgs, check_settings
from bitsandbytes.optim.sharded import is_sharded
from bitsandbytes.optim.statedict import FACTOR_KEYS
from bitsandbytes.optim.variants import Storage, reduced

#: Elements whose normalized gradients exist at the same time, for one call of the op.
PORTION = 2**25

SQUARE, SQUARE_ROW, SQUARE_COL, INSTABILITY_ROW, INSTABILITY_COL = FACTOR_KEYS


def factor_shapes(shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """Float32 state of a parameter of that shape, beside its momentum: by key, the shape.

    Matrices have averages over their columns and over their rows; leading dimensions count matrices.
    """
    if len(shape) < 2:
        return {SQUARE: tuple(shape)}
    rows, columns = tuple(shape[:-1]), (*shape[:-2], shape[-1])
    return {SQUARE_ROW: rows, SQUARE_COL: columns, INSTABILITY_ROW: rows, INSTABILITY_COL: columns}


class CAMEBatch(ComposedBatch):
    """Parameters of one group."""

    def make_steps(self, gradients: list[torch.Tensor]) -> None:
        """Normalize the gradients, advance the momentums, weigh them, and move the parameters."""
        beta1, beta2, beta3 = self.setting("betas")
        square_eps, instability_eps = self.setting("eps")
        wide = torch.promote_types(self.dtype, torch.float32)
        for places in self._portions_of_places():
            values = []
            for place in places:
                g = self._plain(gradients[place]).to(wide) * self.setting("gnorm_scale", 1.0)
                values.append(self._normalized(self.states[place], g, beta2, square_eps))
            momentums = [torch.zeros_like(value) for value in values]
            self.advance(places, values, momentums, beta1, beta1, 0.0)
            for place, value, m in zip(places, values, momentums, strict=True):
                state = self.states[place]
                if SQUARE not in state:
                    instability = (value - m).square_().add_(instability_eps)
                    m = m * _advance_factors(state, INSTABILITY_ROW, INSTABILITY_COL, instability, beta3)
                self.move(place, m, self.setting("lr"))

    def _portions_of_places(self) -> Iterator[list[int]]:
        places: list[int] = []
        count = 0
        for place, p in enumerate(self.params):
            if not p.numel():
                continue
            if places and count + p.numel() > PORTION:
                yield places
                places, count = [], 0
            places.append(place)
            count += p.numel()
        if places:
            yield places

    def _normalized(self, state: dict[str, Any], g: torch.Tensor, beta2: float, eps: float) -> torch.Tensor:
        """The gradient over the root of its second moment, its root mean square limited."""
        square = g.square().add_(eps)
        if SQUARE in state:
            state[SQUARE].mul_(beta2).add_(square, alpha=1.0 - beta2)
            value = g * state[SQUARE].rsqrt()
        else:
            value = g * _advance_factors(state, SQUARE_ROW, SQUARE_COL, square, beta2)
        rms = torch.linalg.vector_norm(value) / value.numel() ** 0.5
        return (value / (rms / self.setting("clip_threshold")).clamp(min=1.0)).contiguous()


def _advance_factors(state: dict[str, Any], row: str, column: str, values: torch.Tensor, beta: float) -> torch.Tensor:
    """Advance the averages of rows and columns; returns one over the root of what they stand for.

    That is, up to the factors' rounding, the matrix ``row column^T / mean(row)``.
    """
    rows, columns = state[row], state[column]
    rows.mul_(beta).add_(values.mean(dim=-1), alpha=1.0 - beta)
    columns.mul_(beta).add_(values.mean(dim=-2), alpha=1.0 - beta)
    return (rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)


class CAMEFamily(Storage, Optimizer8bit):
    """CAME (Luo et al. 2023, arXiv:2307.02047, algorithm 2).

    With ``F(x)`` the matrix that the averages over rows and over columns of ``x`` stand for, as in Adafactor::

        v = F(g^2 + eps[0]), decaying with b2            u = g / sqrt(v)
        u = u / max(1, rms(u) / clip_threshold)          m = b1 m + (1-b1) u
        s = F((u - m)^2 + eps[1]), decaying with b3      p = p (1 - lr wd) - lr m / sqrt(s)

    Leading dimensions count matrices; the limit of ``rms(u)`` is one for all of them. Vectors have a ``v`` that
    is not factored, and no ``s``: ``p = p (1 - lr wd) - lr m``. The momentum is stored in 32 or 8 bit, the averages
    in float32.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        eps: added to the squares of the gradient and to the instability, each above 0.
        clip_threshold: limit of the root mean square of ``u``.
        betas: decay rates of the momentum, of the second moment and of the instability.
        weight_decay: decoupled weight decay.
        optim_bits: bits per element of the momentum, 32 or 8.
        min_8bit_size: parameters with fewer elements have 32-bit state always.

    Raises:
        ArgumentError: an argument has a value without meaning, or a parameter is sharded; the text names it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 2e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: Any = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
    ):
        bits, owner = self.stored_bits(optim_bits), type(self).__name__
        lr, betas = check_settings(owner, lr, betas, 0.0, weight_decay)
        if len(betas) != 3:
            raise ArgumentError(f"{owner}: betas is {betas}, expected 3 numbers")
        if len(eps) != 2 or not all(value > 0.0 for value in eps):
            raise ArgumentError(f"{owner}: eps is {eps}, expected 2 numbers above 0")
        if not clip_threshold > 0.0:
            raise ArgumentError(f"{owner}: clip_threshold is {clip_threshold}, expected more than 0")
        # The rule of the momentum: a sum with dampening.
        self.optimizer_name = "sgd"
        settings = {"optim_bits": bits, "min_8bit_size": min_8bit_size, "max_unorm": 0.0, "skip_zeros": False}
        self.args = MockArgs(settings)
        defaults = {
            "lr": lr,
            "eps": tuple(eps),
            "clip_threshold": clip_threshold,
            "betas": betas,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, bits)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ArgumentError: a parameter is a DTensor.
        """
        super().add_param_group(param_group)
        for index, p in enumerate(self.param_groups[-1]["params"]):
            if is_sharded(p):
                number = len(self.param_groups) - 1
                self.param_groups.pop()
                raise ArgumentError(
                    f"{type(self).__name__}: parameter {index} of group {number} is a DTensor, but the averages of "
                    f"rows and columns need whole matrices; allowed: parameters that are not sharded"
                )

    def batch_type(self, group: dict[str, Any]) -> type[Batch]:
        """What makes the steps of a group."""
        return CAMEBatch

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Make the state of one parameter."""
        super().init_state(group, p, gindex, pindex)
        for key, shape in factor_shapes(p.shape).items():
            self.state[p][key] = torch.zeros(shape, dtype=torch.float32, device=p.device)

    def check_loaded(self, state: Mapping[str, Any], p: torch.Tensor, where: str) -> None:
        """Raise unless the averages of rows and columns are there and fit the parameter."""
        for key, shape in factor_shapes(p.shape).items():
            value = state.get(key)
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape:
                found = f"a {value.dtype} of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise CheckpointError(f"{where}: {key} is {found}, expected float32 of shape {shape}")


class CAME(CAMEFamily):
    """CAME; ``optim_bits`` says how the momentum is stored."""


class CAME8bit(CAMEFamily):
    """CAME with an 8-bit momentum."""

    bits = 8
    __init__ = reduced(CAMEFamily.__init__, "optim_bits")


class CAME32bit(CAMEFamily):
    """CAME with a 32-bit momentum."""

    bits = 32
    __init__ = reduced(CAMEFamily.__init__, "optim_bits")
