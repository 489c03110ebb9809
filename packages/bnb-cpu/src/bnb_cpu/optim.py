"""Kernels of the optimizer ops.

A call of the native module makes the step of all tensors: their addresses go over in one table. As in
:mod:`bnb_cpu.ops`, nothing is checked again, and tensors stay referenced by a name until the native call
returns.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, get_num_threads

from bitsandbytes.backends.bound import OTHER, TensorTable
from bitsandbytes.backends.description import Kernel
from bitsandbytes.ops.optim_rules import RULE_NUMBERS, RULES, only_rules_below
from bnb_cpu.arguments import DTYPES, address
from bnb_cpu.native import _C

#: Accepts what the native code has a rule for; ``None`` where that is everything.
KNOWN_RULES = only_rules_below(_C.OPTIMIZER_RULES)

_MASK32 = 0xFFFFFFFF


def table_of(p: Sequence[Tensor], *columns: Sequence[Tensor]) -> array[int]:
    """Counts of elements, then the addresses of each column of tensors."""
    table = array("q", map(Tensor.numel, p))
    for tensors in columns:
        table.extend(map(Tensor.data_ptr, tensors))
    return table


def _start(values: array[int] | array[float] | None) -> int:
    """Address of an array's memory, null for an absent one."""
    return 0 if values is None else values.buffer_info()[0]


def _seeds_of(rounding_seed: Sequence[int]) -> array[int] | None:
    return array("q", [seed & _MASK32 for seed in rounding_seed]) if rounding_seed else None


def _contiguous_schedule(schedule: Tensor | None) -> Tensor | None:
    return None if schedule is None else schedule.to(torch.float64).contiguous()


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """Native ``optimizer_update_32bit``."""
    g = g.contiguous()
    second = (state2,) if RULES[optimizer_name].states == 2 and state2 is not None else ()
    table, steps, norms = table_of((p,), (g,), (p,), (state1,), second), array("q", (step,)), array("d", (param_norm,))
    _C.optimizer_step_32bit(
        RULE_NUMBERS[optimizer_name],
        1,
        _start(table),
        DTYPES[p.dtype],
        _start(steps),
        0,
        0,
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        max_unorm,
        _start(norms),
        address(unorm_vec),
        skip_zeros,
        get_num_threads(),
    )


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """Native ``optimizer_update_8bit_blockwise``."""
    two = RULES[optimizer_name].states == 2 and state2 is not None and absmax2 is not None
    optimizer_step_8bit(
        optimizer_name,
        (g.contiguous(),),
        (p,),
        (state1,),
        (state2,) if two and state2 is not None else (),
        qmap1,
        qmap2,
        (absmax1,),
        (absmax2,) if two and absmax2 is not None else (),
        (step,),
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        0.0,
        skip_zeros,
    )


def optimizer_step_32bit(
    optimizer_name: str,
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    step: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float = 1.0,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    rounding_seed: Sequence[int] = (),
    schedule: Tensor | None = None,
) -> None:
    """Native ``optimizer_step_32bit``."""
    if not p:
        return
    second = state2 if RULES[optimizer_name].states == 2 else ()
    table, steps, seeds = table_of(p, g, p, state1, second), array("q", step), _seeds_of(rounding_seed)
    schedule = _contiguous_schedule(schedule)
    _C.optimizer_step_32bit(
        RULE_NUMBERS[optimizer_name],
        len(p),
        _start(table),
        DTYPES[p[0].dtype],
        _start(steps),
        address(schedule),
        _start(seeds),
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        max_unorm,
        0,
        0,
        skip_zeros,
        get_num_threads(),
    )


def optimizer_step_8bit(
    optimizer_name: str,
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    step: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float = 1.0,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    rounding_seed: Sequence[int] = (),
    schedule: Tensor | None = None,
) -> None:
    """Native ``optimizer_step_8bit``."""
    if not p:
        return
    second = (state2, absmax2) if RULES[optimizer_name].states == 2 else ()
    table, steps, seeds = table_of(p, g, p, state1, absmax1, *second), array("q", step), _seeds_of(rounding_seed)
    schedule = _contiguous_schedule(schedule)
    _C.optimizer_step_8bit(
        RULE_NUMBERS[optimizer_name],
        len(p),
        _start(table),
        DTYPES[p[0].dtype],
        qmap1.data_ptr(),
        address(qmap2),
        _start(steps),
        address(schedule),
        _start(seeds),
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        max_unorm,
        skip_zeros,
        get_num_threads(),
    )


class PreparedStep:
    """Steps of the same parameters; of the table only the addresses that are new are written."""

    def __init__(self, optimizer_name: str, p: list[Tensor], table: TensorTable, eight: bool):
        self._rule, self._params, self._table, self._eight = RULE_NUMBERS[optimizer_name], p, table, eight
        table.numbers[: table.count] = table.elements()
        self._two = RULES[optimizer_name].states == 2

    def prepare(self, gradients: list[Tensor]) -> bool:
        """See :class:`bitsandbytes.backends.bound.BoundStep`."""
        return self._table.refresh(gradients) != OTHER

    def run(
        self,
        step: Sequence[int],
        lr: float,
        beta1: float,
        beta2: float,
        beta3: float,
        alpha: float,
        eps: float,
        weight_decay: float,
        gnorm_scale: float,
        max_unorm: float,
        skip_zeros: bool,
        rounding_seed: Sequence[int],
        schedule: Tensor | None,
    ) -> None:
        """See :class:`bitsandbytes.backends.bound.BoundStep`."""
        steps, seeds, schedule = array("q", step), _seeds_of(rounding_seed), _contiguous_schedule(schedule)
        tensors = (self._rule, self._table.count, self._table.column(0), DTYPES[self._params[0].dtype])
        moving = (_start(steps), address(schedule), _start(seeds))
        fixed = (lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm)
        if self._eight:
            state = self._table.states[0]
            maps = (state["qmap1"].data_ptr(), address(state["qmap2"]) if self._two else 0)
            _C.optimizer_step_8bit(*tensors, *maps, *moving, *fixed, skip_zeros, get_num_threads())
        else:
            _C.optimizer_step_32bit(*tensors, *moving, *fixed, 0, 0, skip_zeros, get_num_threads())


def prepare_step(
    optimizer_name: str, g: list[Tensor], p: list[Tensor], states: list[dict[str, Any]]
) -> PreparedStep | None:
    """The step of these parameters prepared for repetition; ``None`` where their addresses cannot be read at once."""
    eight = states[0]["state1"].dtype == torch.uint8
    numbers = ("1", "2")[: RULES[optimizer_name].states]
    keys = tuple(name + number for number in numbers for name in (("state", "absmax") if eight else ("state",)))
    shared = tuple("qmap" + number for number in numbers) if eight else ()
    table = TensorTable(_C.read_tensors, p, states, keys, shared, leading=1, gradients_first=True)
    return PreparedStep(optimizer_name, p, table, eight) if table.record(g) else None


#: What the backend serves, by op; part of :data:`bnb_cpu.ops.KERNELS`.
OPTIM_KERNELS = (
    Kernel("optimizer_update_32bit", optimizer_update_32bit, KNOWN_RULES),
    Kernel("optimizer_update_8bit_blockwise", optimizer_update_8bit_blockwise, KNOWN_RULES),
    Kernel("optimizer_step_32bit", optimizer_step_32bit, KNOWN_RULES, bind=prepare_step),
    Kernel("optimizer_step_8bit", optimizer_step_8bit, KNOWN_RULES, bind=prepare_step),
)
