"""Checks that the contracts of the optimizer ops share."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch

from bitsandbytes.contract import check_dtype, check_same_device, check_that
from bitsandbytes.errors import ArgumentError, ArgumentTypeError
from bitsandbytes.ops.common import FLOAT_DTYPES, check_float
from bitsandbytes.ops.optim_rules import RULES, Rule
from bitsandbytes.ops.optim_storage import STATE_BLOCKSIZE, state_blocks

_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


def check_rule(op: str, optimizer_name: str) -> Rule:
    """The rule of that name; raises where there is none."""
    rule = RULES.get(optimizer_name)
    if rule is None:
        raise ArgumentError(f"bitsandbytes::{op}: optimizer_name is {optimizer_name!r}, allowed: {', '.join(RULES)}")
    return rule


def check_hyper(op: str, *, beta1: float, beta2: float, beta3: float, eps: float, max_unorm: float) -> None:
    """Raise for numbers that no rule has a meaning for."""
    for name, beta in (("beta1", beta1), ("beta2", beta2), ("beta3", beta3)):
        if not 0.0 <= beta <= 1.0:
            raise ArgumentError(f"bitsandbytes::{op}: {name} is {beta}, expected 0 to 1")
    check_that(op, eps >= 0.0, lambda: f"eps is {eps}, expected 0 or more")
    check_that(op, max_unorm >= 0.0, lambda: f"max_unorm is {max_unorm}, expected 0 (no limit) or more")


def check_step(op: str, step: int) -> None:
    """Raise unless the count of steps, this one included, is at least 1."""
    check_that(op, step >= 1, lambda: f"step is {step}, expected 1 for the first step, then 2, 3, ...")


def check_gradient(op: str, g: torch.Tensor, p: torch.Tensor) -> None:
    """Raise unless gradient and parameter fit each other."""
    check_float(op, "p", p)
    check_contiguous(op, "p", p)
    check_dtype(op, "g", g, (p.dtype,))
    check_count(op, "g", g, p.numel())


def check_contiguous(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise unless a tensor that is written in place is contiguous."""
    check_that(
        op,
        tensor.is_contiguous(),
        lambda: (
            f"{name} has strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}, expected a contiguous "
            f"tensor: it is updated in place; work on a contiguous copy and copy the result back"
        ),
    )


def check_count(op: str, name: str, tensor: torch.Tensor, count: int) -> None:
    """Raise unless the tensor has ``count`` elements."""
    check_that(
        op,
        tensor.numel() == count,
        lambda: f"{name} has {tensor.numel()} elements (shape {tuple(tensor.shape)}), expected {count} to match p",
    )


def check_state(op: str, name: str, state: torch.Tensor, dtype: torch.dtype, count: int) -> None:
    """Raise unless the state has that dtype and count and can be written in place."""
    check_dtype(op, name, state, (dtype,))
    check_count(op, name, state, count)
    check_contiguous(op, name, state)


def check_second(op: str, rule: Rule, optimizer_name: str, **tensors: torch.Tensor | None) -> None:
    """Raise unless the arguments for a second state are there when the rule has one."""
    for name, tensor in tensors.items():
        if tensor is None and rule.states == 2:
            raise ArgumentError(f"bitsandbytes::{op}: {name} is None, but {optimizer_name} has two states")


def check_qmap(op: str, name: str, qmap: torch.Tensor) -> None:
    """Raise unless the codebook has 256 float32 values, so that no code can point past its end."""
    check_dtype(op, name, qmap, (torch.float32,))
    check_that(op, qmap.numel() == 256, lambda: f"{name} has {qmap.numel()} elements, expected 256")
    check_contiguous(op, name, qmap)


def check_absmax(op: str, name: str, absmax: torch.Tensor, slots: int, count: int) -> None:
    """Raise unless there is one float32 per block of each slot."""
    check_dtype(op, name, absmax, (torch.float32,))
    shape = (state_blocks(count),) if slots == 1 else (slots, state_blocks(count))
    check_that(
        op,
        tuple(absmax.shape) == shape,
        lambda: f"{name} has shape {tuple(absmax.shape)}, expected {shape}: one per block of 256 elements of p",
    )
    check_contiguous(op, name, absmax)


def uniform(tensors: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all tensors have that dtype and device and are contiguous.

    Lists may hold thousands of tensors, so this loops in C; who finds out that the answer is no looks
    for the culprit in Python.
    """
    return (
        set(map(_DTYPE, tensors)) <= {dtype}
        and set(map(_DEVICE, tensors)) <= {device}
        and all(map(torch.Tensor.is_contiguous, tensors))
    )


def counts_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Number of elements of each tensor."""
    return list(map(torch.Tensor.numel, tensors))


def check_list(op: str, name: str, tensors: Sequence[torch.Tensor], p: Sequence[torch.Tensor]) -> None:
    """Raise unless there is one tensor per parameter."""
    check_that(
        op,
        len(tensors) == len(p),
        lambda: f"{name} has {len(tensors)} tensors, expected {len(p)}: one for each tensor of p",
    )


def check_parameters(op: str, g: Sequence[torch.Tensor], p: Sequence[torch.Tensor]) -> None:
    """Raise unless parameters and gradients are contiguous and of one float dtype and device."""
    check_list(op, "g", g, p)
    if not p:
        return
    dtype, device = p[0].dtype, p[0].device
    if dtype not in FLOAT_DTYPES:
        check_float(op, "p[0]", p[0])
    if uniform(p, dtype, device) and uniform(g, dtype, device) and counts_of(p) == counts_of(g):
        return
    for index, (gradient, parameter) in enumerate(zip(g, p, strict=True)):
        check_same_device(op, **{"p[0]": p[0], f"p[{index}]": parameter, f"g[{index}]": gradient})
        check_dtype(op, f"p[{index}]", parameter, (dtype,))
        check_dtype(op, f"g[{index}]", gradient, (dtype,))
        check_count(op, f"g[{index}]", gradient, parameter.numel())
        check_contiguous(op, f"p[{index}]", parameter)
        check_contiguous(op, f"g[{index}]", gradient)


def check_states(
    op: str, name: str, states: Sequence[torch.Tensor], p: Sequence[torch.Tensor], dtype: torch.dtype, slots: int
) -> None:
    """Raise unless every parameter has a state of its size."""
    check_list(op, name, states, p)
    if not p:
        return
    counts = counts_of(p) if slots == 1 else [slots * count for count in counts_of(p)]
    if uniform(states, dtype, p[0].device) and counts_of(states) == counts:
        return
    for index, (state, count) in enumerate(zip(states, counts, strict=True)):
        check_same_device(op, **{"p[0]": p[0], f"{name}[{index}]": state})
        check_state(op, f"{name}[{index}]", state, dtype, count)


def check_absmaxes(op: str, name: str, absmax: Sequence[torch.Tensor], p: Sequence[torch.Tensor], slots: int) -> None:
    """Raise unless every parameter has one float32 per block of each slot."""
    check_list(op, name, absmax, p)
    if not p:
        return
    counts = [(count + STATE_BLOCKSIZE - 1) // STATE_BLOCKSIZE * slots for count in counts_of(p)]
    if (
        uniform(absmax, torch.float32, p[0].device)
        and counts_of(absmax) == counts
        and set(map(torch.Tensor.dim, absmax)) == {1 if slots == 1 else 2}
        and (slots == 1 or set(map(len, absmax)) == {slots})
    ):
        return
    for index, (stats, parameter) in enumerate(zip(absmax, p, strict=True)):
        check_same_device(op, **{"p[0]": p[0], f"{name}[{index}]": stats})
        check_absmax(op, f"{name}[{index}]", stats, slots, parameter.numel())


def check_counts(
    op: str,
    p: Sequence[torch.Tensor],
    step: Sequence[int],
    rounding_seed: Sequence[int],
    schedule: torch.Tensor | None,
) -> None:
    """Raise unless there is a step, and perhaps a seed and a row of the schedule, for each parameter."""
    count = len(p)
    if schedule is None:
        check_that(op, len(step) == count, lambda: f"step has {len(step)} numbers, expected {count}: one for each of p")
        for number in set(step):
            check_step(op, number)
    else:
        check_dtype(op, "schedule", schedule, (torch.float32, torch.float64))
        check_that(
            op,
            tuple(schedule.shape) == (count, 4),
            lambda: f"schedule has shape {tuple(schedule.shape)}, expected ({count}, 4): lr, step, beta3, alpha",
        )
        if p:
            check_same_device(op, **{"p[0]": p[0], "schedule": schedule})
    if rounding_seed:
        check_that(
            op,
            len(rounding_seed) == count,
            lambda: f"rounding_seed has {len(rounding_seed)} numbers, expected none or {count}",
        )
        if p and p[0].dtype != torch.bfloat16:
            raise ArgumentTypeError(
                f"bitsandbytes::{op}: rounding_seed is given for {p[0].dtype} parameters; only bfloat16 is "
                f"rounded stochastically, pass an empty list"
            )
