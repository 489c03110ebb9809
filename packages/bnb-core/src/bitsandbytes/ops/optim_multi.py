"""Optimizer steps of many parameters in one call, in place.

All parameters of a call share dtype, device, rule and hyperparameters; each has its own count of
steps. Nothing here waits for the device, so that a backend's implementation can be captured in a
graph: what changes between replays then comes in ``schedule``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitsandbytes.contract import check_same_device, check_that, define_op
from bitsandbytes.ops.optim_checks import (
    check_absmaxes,
    check_counts,
    check_hyper,
    check_parameters,
    check_qmap,
    check_rule,
    check_states,
)
from bitsandbytes.ops.optim_rules import RULES, Hyper, Rule, update
from bitsandbytes.ops.optim_storage import load_state, round_stochastically, store_state

Tensors = Sequence[torch.Tensor]


def shaped_state(state: torch.Tensor, p: torch.Tensor, rule: Rule, position: int) -> torch.Tensor:
    """A state in the shape of its parameter, with the slots of the first state in front."""
    return state.view((rule.slots, *p.shape) if position == 0 and rule.slots > 1 else p.shape)


def check_optimizer_step_32bit(
    optimizer_name: str,
    g: Tensors,
    p: Tensors,
    state1: Tensors,
    state2: Tensors,
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
    schedule: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``optimizer_step_32bit``."""
    op = "optimizer_step_32bit"
    rule = check_rule(op, optimizer_name)
    check_parameters(op, g, p)
    check_states(op, "state1", state1, p, torch.float32, rule.slots)
    if rule.states == 2:
        check_states(op, "state2", state2, p, torch.float32, 1)
    check_hyper(op, beta1=beta1, beta2=beta2, beta3=beta3, eps=eps, max_unorm=max_unorm)
    check_counts(op, p, step, rounding_seed, schedule)


@define_op(
    "optimizer_step_32bit(str optimizer_name, Tensor[] g, Tensor(a!)[] p, Tensor(b!)[] state1, Tensor(c!)[] state2, "
    "int[] step, float lr, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, "
    "float gnorm_scale=1.0, float max_unorm=0.0, bool skip_zeros=False, int[] rounding_seed=[], "
    "Tensor? schedule=None) -> ()",
    check=check_optimizer_step_32bit,
)
def optimizer_step_32bit(
    optimizer_name: str,
    g: Tensors,
    p: Tensors,
    state1: Tensors,
    state2: Tensors,
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
    schedule: torch.Tensor | None = None,
) -> None:
    """One step of many parameters with float32 states, in place on ``p`` and the states.

    Args:
        optimizer_name: as for ``optimizer_update_32bit``.
        g: gradients, contiguous, each with the size and dtype of its parameter. Not changed.
        p: parameters, contiguous, on one device, all float32, float16 or bfloat16. Any may be empty.
        state1: float32, contiguous, the size of their parameter; twice that for ademamix.
        state2: the same for the second state; an empty list for rules with one state.
        step: number of this step of each parameter, from 1. Not read where ``schedule`` is given.
        lr, beta1, beta2, beta3, alpha, eps, weight_decay: as for ``optimizer_update_32bit``.
        gnorm_scale: factor on the gradients.
        max_unorm: limit of each update's norm relative to the norm of its parameter; 0 for none.
        skip_zeros: leave elements whose gradient is exactly 0, and their states, as they are.
        rounding_seed: one number per bfloat16 parameter to round it stochastically (see
            ``bitsandbytes.ops.optim_storage.round_stochastically``); empty to round to nearest.
        schedule: float32 or float64 of shape ``(len(p), 4)`` on the device of ``p``: lr, step, beta3
            and alpha of each parameter. It replaces the four arguments of those names.
    """
    rule = RULES[optimizer_name]
    h = Hyper(lr, 0, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros)
    for index, parameter in enumerate(p):
        now = _at(h, index, step, schedule)
        stored = (state1[index], state2[index]) if rule.states == 2 else (state1[index],)
        states = tuple(shaped_state(state, parameter, rule, slot) for slot, state in enumerate(stored))
        new_states = _step(rule, g[index], parameter, states, now, rounding_seed[index] if rounding_seed else None)
        for state, values in zip(states, new_states, strict=True):
            state.copy_(values)


def check_optimizer_step_8bit(
    optimizer_name: str,
    g: Tensors,
    p: Tensors,
    state1: Tensors,
    state2: Tensors,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    absmax1: Tensors,
    absmax2: Tensors,
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
    schedule: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``optimizer_step_8bit``."""
    op = "optimizer_step_8bit"
    rule = check_rule(op, optimizer_name)
    check_parameters(op, g, p)
    check_states(op, "state1", state1, p, torch.uint8, rule.slots)
    check_qmap(op, "qmap1", qmap1)
    check_absmaxes(op, "absmax1", absmax1, p, rule.slots)
    if rule.states == 2:
        check_states(op, "state2", state2, p, torch.uint8, 1)
        check_that(op, qmap2 is not None, lambda: f"qmap2 is None, but {optimizer_name} has two states")
        if qmap2 is not None:
            check_qmap(op, "qmap2", qmap2)
        check_absmaxes(op, "absmax2", absmax2, p, 1)
    if p:
        check_same_device(op, **{"p[0]": p[0], "qmap1": qmap1, "qmap2": qmap2})
    check_hyper(op, beta1=beta1, beta2=beta2, beta3=beta3, eps=eps, max_unorm=max_unorm)
    check_counts(op, p, step, rounding_seed, schedule)


@define_op(
    "optimizer_step_8bit(str optimizer_name, Tensor[] g, Tensor(a!)[] p, Tensor(b!)[] state1, Tensor(c!)[] state2, "
    "Tensor qmap1, Tensor? qmap2, Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, int[] step, float lr, float beta1, "
    "float beta2, float beta3, float alpha, float eps, float weight_decay, float gnorm_scale=1.0, "
    "float max_unorm=0.0, bool skip_zeros=False, int[] rounding_seed=[], Tensor? schedule=None) -> ()",
    check=check_optimizer_step_8bit,
)
def optimizer_step_8bit(
    optimizer_name: str,
    g: Tensors,
    p: Tensors,
    state1: Tensors,
    state2: Tensors,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    absmax1: Tensors,
    absmax2: Tensors,
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
    schedule: torch.Tensor | None = None,
) -> None:
    """One step of many parameters with 8-bit states, in place on ``p``, the states and their absmax.

    Args:
        optimizer_name: as for ``optimizer_update_32bit``.
        g, p: as for ``optimizer_step_32bit``.
        state1, state2: uint8, otherwise as for ``optimizer_step_32bit``.
        qmap1, qmap2: codebooks of all first and all second states, 256 ascending float32 values.
        absmax1, absmax2: float32, one per block of 256 elements of the parameter; shape
            ``(2, blocks)`` for ademamix's first state. The second list is empty for one state.
        step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros,
            rounding_seed, schedule: as for ``optimizer_step_32bit``. With ``skip_zeros`` a block of a
            state all of whose gradients are 0 keeps its codes and its absmax.
    """
    rule = RULES[optimizer_name]
    h = Hyper(lr, 0, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros)
    for index, parameter in enumerate(p):
        now = _at(h, index, step, schedule)
        stored = [(state1[index], qmap1, absmax1[index])]
        if rule.states == 2 and qmap2 is not None:
            stored.append((state2[index], qmap2, absmax2[index]))
        states = tuple(
            shaped_state(load_state(codes, qmap, absmax), parameter, rule, slot)
            for slot, (codes, qmap, absmax) in enumerate(stored)
        )
        new_states = _step(rule, g[index], parameter, states, now, rounding_seed[index] if rounding_seed else None)
        for (codes, qmap, absmax), values in zip(stored, new_states, strict=True):
            store_state(values, codes, qmap, absmax, g[index] != 0 if skip_zeros else None)


def _step(
    rule: Rule, g: torch.Tensor, p: torch.Tensor, states: tuple[torch.Tensor, ...], h: Hyper, seed: int | None
) -> tuple[torch.Tensor, ...]:
    """Update one parameter in place and return its new states."""
    # Float64 does not pass the check of the op, but optimizers call the reference with it.
    wide = torch.promote_types(p.dtype, torch.float32)
    new_p, new_states, _unorm = update(rule, g.view(p.shape).to(wide), p.to(wide), states, h)
    p.copy_(new_p if seed is None else round_stochastically(new_p, seed, h.step))
    return new_states


def _at(h: Hyper, index: int, step: Sequence[int], schedule: torch.Tensor | None) -> Hyper:
    """Hyperparameters of one parameter."""
    if schedule is None:
        return h._replace(step=step[index])
    lr, number, beta3, alpha = schedule[index].unbind()
    return h._replace(lr=lr, step=number, beta3=beta3, alpha=alpha)
