"""Optimizer steps of a single parameter, in place.

Formulas of the rules and of what surrounds them: :mod:`bitsandbytes.ops.optim_rules`. Steps of many
parameters in one call: :mod:`bitsandbytes.ops.optim_multi`.
"""

from __future__ import annotations

import torch

from bitsandbytes.contract import check_same_device, check_that, define_op
from bitsandbytes.ops import optim_multi
from bitsandbytes.ops.optim_checks import (
    check_absmax,
    check_gradient,
    check_hyper,
    check_qmap,
    check_rule,
    check_second,
    check_state,
    check_step,
)
from bitsandbytes.ops.optim_rules import RULES, Hyper, update
from bitsandbytes.ops.optim_storage import load_state, store_state


def check_optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    unorm_vec: torch.Tensor | None,
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
    """Check the arguments of ``optimizer_update_32bit``."""
    op = "optimizer_update_32bit"
    rule = check_rule(op, optimizer_name)
    check_gradient(op, g, p)
    check_second(op, rule, optimizer_name, state2=state2)
    check_state(op, "state1", state1, torch.float32, rule.slots * p.numel())
    if rule.states == 2 and state2 is not None:
        check_state(op, "state2", state2, torch.float32, p.numel())
    if unorm_vec is not None:
        check_state(op, "unorm_vec", unorm_vec, torch.float32, 1)
    check_that(op, param_norm >= 0.0, lambda: f"param_norm is {param_norm}, expected 0 or more")
    check_hyper(op, beta1=beta1, beta2=beta2, beta3=beta3, eps=eps, max_unorm=max_unorm)
    check_step(op, step)
    check_same_device(op, p=p, g=g, state1=state1, state2=state2, unorm_vec=unorm_vec)


@define_op(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, "
    "float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
    "bool skip_zeros=False) -> ()",
    check=check_optimizer_update_32bit,
)
def optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    unorm_vec: torch.Tensor | None,
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
    """One step of one parameter with float32 states, in place on ``p`` and the states.

    Args:
        optimizer_name: adam, ademamix, lamb, lamb_l2, lion, momentum, lars, sgd, rmsprop, adagrad or
            schedule_free.
        g: gradient, as many elements and the dtype of ``p``. It is left as it is, although the schema,
            which is upstream's, marks it as written.
        p: parameter, contiguous, float32, float16 or bfloat16.
        state1: float32, the size of ``p``; twice that for ademamix (fast average, then slow).
        state2: float32, the size of ``p``, for adam, ademamix, lamb, lamb_l2 and schedule_free; else ignored.
        unorm_vec: float32, one element, gets the norm of the update where ``max_unorm`` is above 0.
        max_unorm: limit of the update's norm relative to ``param_norm``; 0 for no limit.
        param_norm: Euclidean norm of ``p`` before the step.
        beta1, beta2, beta3, alpha, eps: parameters of the rule; see the rule for what it uses.
        weight_decay: decoupled for adam, ademamix, lamb, lion and schedule_free, else added to the gradient.
        step: number of this step, from 1.
        lr: learning rate.
        gnorm_scale: factor on the gradient.
        skip_zeros: leave elements whose gradient is exactly 0, and their states, as they are.
    """
    rule = RULES[optimizer_name]
    h = Hyper(lr, step, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros)
    states = [state1]
    if rule.states == 2 and state2 is not None:
        states.append(state2)
    shaped = tuple(optim_multi.shaped_state(state, p, rule, slot) for slot, state in enumerate(states))
    new_p, new_states, unorm = update(rule, g.reshape(p.shape).float(), p.float(), shaped, h, param_norm)
    p.copy_(new_p)
    for state, new in zip(shaped, new_states, strict=True):
        state.copy_(new)
    if unorm_vec is not None and unorm is not None:
        unorm_vec.copy_(unorm.reshape(unorm_vec.shape))


def check_optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """Check the arguments of ``optimizer_update_8bit_blockwise``."""
    op = "optimizer_update_8bit_blockwise"
    rule = check_rule(op, optimizer_name)
    check_gradient(op, g, p)
    check_second(op, rule, optimizer_name, state2=state2, qmap2=qmap2, absmax2=absmax2)
    check_state(op, "state1", state1, torch.uint8, rule.slots * p.numel())
    check_qmap(op, "qmap1", qmap1)
    check_absmax(op, "absmax1", absmax1, rule.slots, p.numel())
    if rule.states == 2 and state2 is not None and qmap2 is not None and absmax2 is not None:
        check_state(op, "state2", state2, torch.uint8, p.numel())
        check_qmap(op, "qmap2", qmap2)
        check_absmax(op, "absmax2", absmax2, 1, p.numel())
    check_hyper(op, beta1=beta1, beta2=beta2, beta3=beta3, eps=eps, max_unorm=0.0)
    check_step(op, step)
    check_same_device(
        op,
        p=p,
        g=g,
        state1=state1,
        state2=state2,
        qmap1=qmap1,
        qmap2=qmap2,
        absmax1=absmax1,
        absmax2=absmax2,
    )


@define_op(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
    check=check_optimizer_update_8bit_blockwise,
)
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """One step of one parameter with 8-bit states, in place on ``p``, the states and their absmax.

    States are looked up in their codebook and multiplied by the absmax of their block of 256, the
    step is computed in float32, and the new states are quantized like ``quantize_blockwise`` does. A
    state that is not finite is stored as 0.

    Args:
        optimizer_name: as for ``optimizer_update_32bit``. The norm of the update is not limited:
            lamb is adam, and lars is momentum; ``optimizer_step_8bit`` limits it.
        g: gradient, as many elements and the dtype of ``p``. It is left as it is, as are the codebooks,
            although the schema, which is upstream's, marks them as written.
        p: parameter, contiguous, float32, float16 or bfloat16.
        state1: uint8, the size of ``p``; twice that for ademamix (fast average, then slow).
        state2: uint8, the size of ``p``, for rules with two states; else ignored, as are the
            codebook and the absmax that belong to it.
        beta1, beta2, beta3, alpha, eps, step, lr: as for ``optimizer_update_32bit``.
        qmap1, qmap2: codebooks of 256 ascending float32 values.
        absmax1, absmax2: float32, one per block of 256; shape ``(2, blocks)`` for ademamix's first.
        weight_decay, gnorm_scale, skip_zeros: as for ``optimizer_update_32bit``. With ``skip_zeros`` a
            block of a state all of whose gradients are 0 keeps its codes and its absmax.
    """
    rule = RULES[optimizer_name]
    h = Hyper(lr, step, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, 0.0, skip_zeros)
    stored = [(state1, qmap1, absmax1)]
    if rule.states == 2 and state2 is not None and qmap2 is not None and absmax2 is not None:
        stored.append((state2, qmap2, absmax2))
    states = tuple(
        optim_multi.shaped_state(load_state(codes, qmap, absmax), p, rule, slot)
        for slot, (codes, qmap, absmax) in enumerate(stored)
    )
    new_p, new_states, _unorm = update(rule, g.reshape(p.shape).float(), p.float(), states, h)
    p.copy_(new_p)
    for (codes, qmap, absmax), values in zip(stored, new_states, strict=True):
        store_state(values, codes, qmap, absmax, g != 0 if skip_zeros else None)
