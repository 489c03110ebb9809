"""Update rules of the optimizers: one function per rule, in plain PyTorch.

A rule turns a gradient and the states into a direction ``u`` and new states. What is common to all
optimizers stands around it, in :func:`update`::

    g  = gnorm_scale * gradient                (+ weight_decay * p, where the decay is coupled)
    u, states = rule(g, states)
    s  = min(1, max_unorm * |p| / |u|)         (1 where max_unorm is 0 or p is zero)
    p  = p * (1 - lr * weight_decay) - lr * s * u      (the first factor where the decay is decoupled)

A complete rule takes the parameter as well, and its ``u`` has the learning rate and the decay in it::

    u, states = rule(g, p, states)
    p  = p - s * u

Arithmetic is in the dtype of the tensors given, float32 in the ops. Hyperparameters are numbers or
tensors of one element; tensors let a captured graph read values that change between replays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

Scalar = float | torch.Tensor


class Hyper(NamedTuple):
    """Hyperparameters of one step of one parameter."""

    lr: Scalar
    step: Scalar
    beta1: float
    beta2: float
    beta3: Scalar
    alpha: Scalar
    eps: float
    weight_decay: float
    gnorm_scale: float
    max_unorm: float
    skip_zeros: bool


States = tuple[torch.Tensor, ...]
Direction = tuple[torch.Tensor, States]


def adam(g: torch.Tensor, states: States, h: Hyper) -> Direction:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1)."""
    m, v = states
    m = m * h.beta1 + (1.0 - h.beta1) * g
    v = v * h.beta2 + (1.0 - h.beta2) * g * g
    return (m / bias_correction(h.beta1, h.step)) / (_root(v, h) + h.eps), (m, v)


def ademamix(g: torch.Tensor, states: States, h: Hyper) -> Direction:
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1).

    The first state stacks the fast and the slow average; the slow one is not corrected for bias.
    """
    averages, v = states
    fast = averages[0] * h.beta1 + (1.0 - h.beta1) * g
    slow = averages[1] * h.beta3 + (1.0 - h.beta3) * g
    v = v * h.beta2 + (1.0 - h.beta2) * g * g
    u = (fast / bias_correction(h.beta1, h.step) + h.alpha * slow) / (_root(v, h) + h.eps)
    return u, (torch.stack((fast, slow)), v)


def lion(g: torch.Tensor, states: States, h: Hyper) -> Direction:
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""
    (m,) = states
    u = torch.sign(m * h.beta1 + (1.0 - h.beta1) * g)
    return u, (m * h.beta2 + (1.0 - h.beta2) * g,)


def momentum(g: torch.Tensor, states: States, h: Hyper) -> Direction:
    """Momentum as in torch's SGD: the buffer is the decayed sum of gradients, from the first one on."""
    (m,) = states
    m = _unless_first(h.step, m * h.beta1 + g, g)
    return m, (m,)


def sgd(g: torch.Tensor, states: States, h: Hyper) -> Direction:
    """Momentum with dampening (``beta2``) and Nesterov's look-ahead (``alpha`` 1, or 0 without).

    The same as torch's SGD (Sutskever et al. 2013): the first gradient enters undampened.
    """
    (m,) = states
    m = _unless_first(h.step, m * h.beta1 + (1.0 - h.beta2) * g, g)
    return m + h.alpha * (g + (h.beta1 - 1.0) * m), (m,)


def rmsprop(g: torch.Tensor, states: States, h: Hyper) -> Direction:
    """RMSprop (Tieleman and Hinton 2012, lecture 6.5), epsilon outside of the root as in torch."""
    (v,) = states
    v = v * h.beta1 + (1.0 - h.beta1) * g * g
    return g / (v.sqrt() + h.eps), (v,)


def adagrad(g: torch.Tensor, states: States, h: Hyper) -> Direction:
    """Adagrad (Duchi et al. 2011), epsilon outside of the root as in torch."""
    (v,) = states
    v = v + g * g
    return g / (v.sqrt() + h.eps), (v,)


def schedule_free(g: torch.Tensor, p: torch.Tensor, states: States, h: Hyper) -> Direction:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), a complete rule.

    The paper has three sequences: ``z`` takes the steps, ``x`` averages it with the weight ``c``, and gradients
    are those at ``y = (1-beta1) z + beta1 x``. Here the parameter is ``y`` and the first state ``d = z - y``,
    so that ``z = y + d`` and ``x = y + (1 - 1/beta1) d``. ``alpha`` is ``c``. The decay is that of ``y``.
    """
    d, v = states
    v = v * h.beta2 + (1.0 - h.beta2) * g * g
    u = g / (_root(v, h) + h.eps) + h.weight_decay * p
    later = h.lr * h.beta1 * (1.0 - h.alpha)
    return (h.lr - later) * u - h.alpha * d, ((1.0 - h.alpha) * d - later * u, v)


@dataclass(frozen=True)
class Rule:
    """An update rule and how its states and its weight decay are laid out."""

    #: Takes gradient, states and hyperparameters; where it is complete, the parameter after the gradient.
    direction: Callable[..., Direction]
    #: Number of states, 1 or 2.
    states: int
    #: The decay is added to the gradient (L2 penalty) instead of being taken from the parameter.
    coupled_decay: bool = False
    #: Averages stacked in the first state, as a leading dimension where there are several.
    slots: int = 1
    #: The direction has the learning rate and the decay in it.
    complete: bool = False


RULES = {
    "adam": Rule(adam, states=2),
    "ademamix": Rule(ademamix, states=2, slots=2),
    "lamb": Rule(adam, states=2),
    "lamb_l2": Rule(adam, states=2, coupled_decay=True),
    "lion": Rule(lion, states=1),
    "momentum": Rule(momentum, states=1, coupled_decay=True),
    "lars": Rule(momentum, states=1, coupled_decay=True),
    "sgd": Rule(sgd, states=1, coupled_decay=True),
    "rmsprop": Rule(rmsprop, states=1, coupled_decay=True),
    "adagrad": Rule(adagrad, states=1, coupled_decay=True),
    "schedule_free": Rule(schedule_free, states=2, complete=True),
}


def update(
    rule: Rule,
    g: torch.Tensor,
    p: torch.Tensor,
    states: States,
    h: Hyper,
    param_norm: Scalar | None = None,
) -> tuple[torch.Tensor, States, torch.Tensor | None]:
    """One step.

    Args:
        rule: the update rule.
        g, p, states: gradient, parameter and states in the dtype to compute in. Not changed.
        h: hyperparameters.
        param_norm: Euclidean norm of the parameter for ``max_unorm``; computed where not given.

    Returns:
        New parameter, new states, and the norm of ``u`` where ``max_unorm`` asks for it.
    """
    given, old = g, (p, states)
    g = g * h.gnorm_scale
    if rule.coupled_decay and h.weight_decay > 0.0:
        g = g + h.weight_decay * p
    u, states = rule.direction(g, p, states, h) if rule.complete else rule.direction(g, states, h)
    active = given != 0 if h.skip_zeros else None
    if active is not None:
        u = torch.where(active, u, 0.0)
    unorm = None
    scale: Scalar = 1.0
    if h.max_unorm > 0.0:
        unorm = torch.linalg.vector_norm(u)
        scale = clip_scale(unorm, torch.linalg.vector_norm(p) if param_norm is None else param_norm, h.max_unorm)
    if not (rule.coupled_decay or rule.complete) and h.weight_decay > 0.0:
        p = p * (1.0 - h.lr * h.weight_decay)
    p = p - (scale if rule.complete else h.lr * scale) * u
    if active is not None:
        p = torch.where(active, p, old[0])
        states = tuple(torch.where(active, new, before) for new, before in zip(states, old[1], strict=True))
    return p, states, unorm


#: Numbers by which native code knows the rules (``bnb::Rule``). New rules go to the end.
RULE_NUMBERS = {name: number for number, name in enumerate(RULES)}


def only_rules_below(count: int) -> Callable[..., bool] | None:
    """What a backend whose native code knows ``count`` rules accepts: for ``Kernel.accepts`` of optimizer ops.

    A backend may be older than the core, whose later rules the reference then serves. ``None`` for a backend
    that knows them all.
    """

    def accepts(optimizer_name: str, *others: object, **named: object) -> bool:
        return RULE_NUMBERS[optimizer_name] < count

    return None if count >= len(RULES) else accepts


def bias_correction(beta: float, step: Scalar) -> Scalar:
    """``1 - beta ** step``."""
    return 1.0 - beta**step


def clip_scale(unorm: torch.Tensor, param_norm: Scalar, max_unorm: float) -> torch.Tensor:
    """Factor that limits the norm of the update to ``max_unorm`` times the norm of the parameter.

    A parameter that is all zero is not limited, or it could never leave zero (LAMB, You et al. 2020,
    arXiv:1904.00962, defines the ratio as 1 there).
    """
    limit = torch.as_tensor(max_unorm * param_norm, dtype=unorm.dtype, device=unorm.device)
    return torch.where((unorm > limit) & (limit > 0.0), limit / unorm, 1.0)


def _root(v: torch.Tensor, h: Hyper) -> torch.Tensor:
    return v.sqrt() / bias_correction(h.beta2, h.step) ** 0.5


def _unless_first(step: Scalar, later: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    if isinstance(step, torch.Tensor):
        return torch.where(step == 1, first, later)
    return first if step == 1 else later
