"""Repeated steps of a batch without torch's dispatcher.

The parameters of a batch and their states stay where they are from step to step. Dispatch, checks and the
look-up of addresses of thousands of tensors then cost more than the step. A :class:`BoundBatch` has the checks
done once; a backend's reader sees in each step whether what was checked still holds, and where everything is.
"""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.backends.bound import BoundStep, is_intercepted
from bitsandbytes.backends.registry import REGISTRY
from bitsandbytes.contract import check_same_device
from bitsandbytes.ops.optim_checks import check_counts, check_hyper, check_qmap

#: A batch that has been bound this often in a row without use of it changes too much to be worth it.
MOST_ATTEMPTS = 16


class BoundBatch:
    """A prepared step of all parameters of a batch; it keeps no gradient and no state alive."""

    __slots__ = ("attempts", "generation", "step")

    def __init__(self) -> None:
        self.step: BoundStep | None = None
        self.attempts = 0
        self.generation = -1

    def takes(self, gradients: list[torch.Tensor]) -> bool:
        """Whether :meth:`run` may be called now for these gradients."""
        if self.step is None or self.generation != REGISTRY.generation or not is_free():
            return False
        if not self.step.prepare(gradients):
            # What the parameters and states are now is found out by the op, which is bound again then.
            self.step = None
            return False
        self.attempts = 0
        return True

    def run(self, op: str, params: list[torch.Tensor], state: dict[str, Any], numbers: Any) -> None:
        """Make the step.

        Args:
            op: name of the op.
            params: parameters of the batch.
            state: state of the first of them, for the codebooks that all share.
            numbers: arguments of the op from ``step`` on.

        Raises:
            ArgumentError: a number breaks the contract of the op.
        """
        check_hyper(
            op,
            beta1=numbers.beta1,
            beta2=numbers.beta2,
            beta3=numbers.beta3,
            eps=numbers.eps,
            max_unorm=numbers.max_unorm,
        )
        check_counts(op, params, numbers.step, numbers.rounding_seed, numbers.schedule)
        for name in ("qmap1", "qmap2"):
            if name in state:
                check_qmap(op, name, state[name])
                check_same_device(op, **{"p[0]": params[0], name: state[name]})
        assert self.step is not None
        self.step.run(*numbers)

    def bind(
        self,
        op: str,
        rule: str,
        gradients: list[torch.Tensor],
        params: list[torch.Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """Bind anew, after the op has been called with these arguments."""
        if self.attempts >= MOST_ATTEMPTS or not is_free():
            return
        self.attempts += 1
        binder = REGISTRY.binder(op, params[0].device.type)
        self.generation = REGISTRY.generation
        self.step = None if binder is None else binder(rule, gradients, params, states)


def is_free() -> bool:
    """Whether nobody has to see a call of the op."""
    return not (torch.compiler.is_compiling() or is_intercepted())
