"""Steps that are more than a rule: the op advances the momentum, PyTorch makes the step from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bitsandbytes.contract import OPS
from bitsandbytes.ops.common import FLOAT_DTYPES
from bitsandbytes.ops.optim_storage import round_stochastically
from bitsandbytes.optim.engine import Batch
from bitsandbytes.optim.sharded import local

#: Where the rule's formula is that of all steps; at the first one it takes the gradient undampened.
LATER_STEP = 2


class ComposedBatch(Batch):
    """Parameters whose first state is a momentum, kept by the rule "sgd", and nothing more than an input."""

    def run(self, gradients: list[torch.Tensor]) -> None:
        """Make one step of all parameters."""
        self.count_step()
        self.make_steps(gradients)

    def make_steps(self, gradients: list[torch.Tensor]) -> None:
        """Update states and parameters; ``gradients`` are as autograd left them."""
        raise NotImplementedError

    def advance(
        self,
        places: Sequence[int],
        values: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        beta: float,
        dampening: float,
        lookahead: float,
        scale: float = 1.0,
    ) -> None:
        """Advance momentums: ``m = beta m + (1 - dampening) scale v``.

        Args:
            places: which of the parameters.
            values: what enters the momentum of each, contiguous, in a dtype that the op takes or float64.
            results: get ``m + lookahead (scale v - (1 - beta) m)``; zeros before, like ``values``.
            beta, dampening, lookahead, scale: see there.
        """
        states = [self.states[place] for place in places]
        eight = states[0]["state1"].dtype == torch.uint8
        op = OPS["optimizer_step_8bit" if eight else "optimizer_step_32bit"]
        call = op.overload if values[0].dtype in FLOAT_DTYPES else op.reference
        stored: tuple[Any, ...] = ([state["state1"] for state in states], [])
        if eight:
            stored += (states[0]["qmap1"], None, [state["absmax1"] for state in states], [])
        steps = [LATER_STEP] * len(states)
        # The results take the place of the parameters, so that a step of -1 leaves the direction there.
        call("sgd", values, results, *stored, steps, -1.0, beta, dampening, 0.0, lookahead, 0.0, 0.0, scale)

    def move(self, place: int, direction: torch.Tensor, rate: Any) -> None:
        """``p = p (1 - lr weight_decay) - rate direction`` in float32 or float64, rounded once.

        Args:
            place: which of the parameters.
            direction: in the shape of this process's part of it.
            rate: a number or a tensor of one element.
        """
        p = local(self.params[place].detach())
        wide = torch.promote_types(p.dtype, torch.float32)
        moved = p.to(wide) * (1.0 - self.setting("lr") * self.setting("weight_decay")) - rate * direction.to(wide)
        seeds = self._seeds(self.positions[place : place + 1])
        p.copy_(round_stochastically(moved, seeds[0], self.states[place]["step"]) if seeds else moved)
