"""Cases of the optimizer ops, and the judge of what they wrote.

The truth is one step in float64. A float32 implementation may reorder its sums and use fused
multiply-add, so parameters and states get small tolerances, and a code of an 8-bit state may be
the neighbour of the right one where the value lies between two codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bitsandbytes.codebooks import create_dynamic_map
from bitsandbytes.ops import search
from bitsandbytes.ops.common import FLOAT_DTYPES
from bitsandbytes.ops.optim_rules import RULES, Hyper, update
from bitsandbytes.ops.optim_storage import STATE_BLOCKSIZE, load_state, state_blocks
from bitsandbytes.testing.case import Arguments, Case, name_of
from bitsandbytes.testing.tolerances import demand, same_bits

CPU = torch.device("cpu")

#: Relative error of a float32 state, and of the statistics of an 8-bit one: some rounded operations.
STATE_TOLERANCE = 1e-5
#: Absolute error of a float32 state made of terms near one that cancel.
STATE_ROUNDING = 5e-7
#: Relative error of the change of a parameter; roots and quotients amplify the error of the states.
CHANGE_TOLERANCE = 1e-4
#: Share of 8-bit codes that may be the neighbour of the right one.
NEIGHBOURS = 0.02


@dataclass(frozen=True)
class Setting:
    """Hyperparameters of a case; ``id`` says what is special about it."""

    id: str
    step: int = 7
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    beta3: float = 0.999
    alpha: float = 0.0
    eps: float = 1e-6
    weight_decay: float = 0.0
    gnorm_scale: float = 1.0
    max_unorm: float = 0.0
    skip_zeros: bool = False

    def hyper(self) -> Hyper:
        """The same as the rules take it."""
        return Hyper(
            self.lr,
            self.step,
            self.beta1,
            self.beta2,
            self.beta3,
            self.alpha,
            self.eps,
            self.weight_decay,
            self.gnorm_scale,
            self.max_unorm,
            self.skip_zeros,
        )


SETTINGS = (
    Setting("plain"),
    Setting("first-step", step=1),
    Setting("decay", weight_decay=0.1, alpha=1.0),
    Setting("scaled", gnorm_scale=0.125, weight_decay=0.01, step=1000),
    Setting("skip-zeros", skip_zeros=True, weight_decay=0.1),
    Setting("clipped", max_unorm=0.02, weight_decay=0.1, alpha=5.0),
    Setting("not-clipped", max_unorm=1e4),
)
SIZES = (1, 256, 257, 4096 + 33, 0)
LIST_SIZES = (8192, 10, 0, 257, 1, 300)


@dataclass
class Problem:
    """Tensors of one parameter before a step."""

    g: torch.Tensor
    p: torch.Tensor
    #: Float32 states, or codes.
    states: list[torch.Tensor]
    absmax: list[torch.Tensor]


def make_problem(rule: str, size: int, dtype: torch.dtype, eight: bool, generator: torch.Generator) -> Problem:
    """Random values; some gradients are zero, in large tensors also those of a whole block."""
    g = torch.randn(size, generator=generator)
    g[::5] = 0.0
    g[2 * STATE_BLOCKSIZE : 3 * STATE_BLOCKSIZE] = 0.0
    p = torch.randn(size, generator=generator)
    states, stats = [], []
    for position in range(RULES[rule].states):
        slots = RULES[rule].slots if position == 0 else 1
        shape = (slots, size) if slots > 1 else (size,)
        positive = position == 1 or rule in ("rmsprop", "adagrad")
        if eight:
            # The upper half of either codebook holds the positive values.
            states.append(torch.randint(160 if positive else 0, 256, shape, dtype=torch.uint8, generator=generator))
            stats.append(torch.rand(*shape[:-1], state_blocks(size), generator=generator) + 0.5)
        else:
            state = torch.randn(shape, generator=generator) * 0.5
            states.append(state.square() + 1e-3 if positive else state)
    return Problem(g.to(dtype), p.to(dtype), states, stats)


def codebooks() -> tuple[torch.Tensor, torch.Tensor]:
    """The codebooks of the first and the second state."""
    return create_dynamic_map(True), create_dynamic_map(False)


def update_cases() -> Iterator[Case]:
    """Both ops for a single parameter."""
    for rule in RULES:
        combos = [(setting, 4096 + 33, torch.float32) for setting in SETTINGS]
        combos += [(SETTINGS[2], size, dtype) for size in SIZES for dtype in FLOAT_DTYPES]
        for setting, size, dtype in dict.fromkeys(combos):
            for eight in (False, True):
                if not (eight and setting.max_unorm):
                    yield update_case(rule, setting, size, dtype, eight)


def update_case(rule: str, setting: Setting, size: int, dtype: torch.dtype, eight: bool) -> Case:
    """One call of ``optimizer_update_32bit`` or ``optimizer_update_8bit_blockwise``."""
    s, two = setting, RULES[rule].states == 2
    tail = (s.beta1, s.beta2, s.beta3, s.alpha, s.eps)

    def make(generator: torch.Generator) -> Arguments:
        problem = make_problem(rule, size, dtype, eight, generator)
        head = (rule, problem.g, problem.p, problem.states[0], problem.states[1] if two else None)
        if not eight:
            norm = float(torch.linalg.vector_norm(problem.p.double()))
            unorm = torch.zeros(1) if s.max_unorm else None
            clip = (unorm, s.max_unorm, norm)
            return *head, *clip, *tail, s.weight_decay, s.step, s.lr, s.gnorm_scale, s.skip_zeros
        first, second = codebooks()
        maps = (first, second if two else None, problem.absmax[0], problem.absmax[1] if two else None)
        return *head, *tail, s.step, s.lr, *maps, s.weight_decay, s.gnorm_scale, s.skip_zeros

    def judge(before: Arguments, after: Arguments, device: torch.device = CPU) -> None:
        places = (14, 15) if eight else ()
        old = Problem(before[1], before[2], _some(before[3:5]), _some(before[at] for at in places))
        new = Problem(after[1], after[2], _some(after[3:5]), _some(after[at] for at in places))
        judge_parameter(rule, s.hyper(), old, new, device=device)
        if eight:
            for at in (12, 13):
                demand(before[at] is None or same_bits(after[at], before[at]), "a codebook was written")
        elif s.max_unorm:
            truth = step_in_float64(rule, s.hyper(), old)[2]
            if truth is None:
                raise AssertionError("the rule has no norm of the update")
            torch.testing.assert_close(after[5].double().squeeze(), truth, rtol=1e-4, atol=1e-12)

    op = "optimizer_update_8bit_blockwise" if eight else "optimizer_update_32bit"
    return Case(op, f"{rule}-{setting.id}-{size}-{name_of(dtype)}", make, judge=judge)


def step_cases() -> Iterator[Case]:
    """Both ops for many parameters."""
    for rule in RULES:
        for eight in (False, True):
            for setting in SETTINGS:
                yield step_case(rule, setting, torch.float32, eight)
            for dtype in (torch.float16, torch.bfloat16):
                yield step_case(rule, SETTINGS[2], dtype, eight)
            yield step_case(rule, SETTINGS[2], torch.bfloat16, eight, rounding=True)
            yield step_case(rule, SETTINGS[2], torch.float32, eight, schedule=torch.float64)
    yield step_case("ademamix", SETTINGS[2], torch.bfloat16, True, rounding=True, schedule=torch.float32)
    yield step_case("adam", SETTINGS[2], torch.float32, True, sizes=(5000,) * 40)


def step_case(
    rule: str,
    setting: Setting,
    dtype: torch.dtype,
    eight: bool,
    rounding: bool = False,
    schedule: torch.dtype | None = None,
    sizes: tuple[int, ...] = LIST_SIZES,
) -> Case:
    """One call of ``optimizer_step_32bit`` or ``optimizer_step_8bit``; steps differ between parameters."""
    s, two = setting, RULES[rule].states == 2
    steps = [s.step + (index if s.step > 1 else 0) for index in range(len(sizes))]

    def make(generator: torch.Generator) -> Arguments:
        problems = [make_problem(rule, size, dtype, eight, generator) for size in sizes]
        columns = zip(*(problem.states for problem in problems), strict=True)
        states = [list(column) for column in columns]
        arguments: list[Any] = [
            rule,
            [problem.g for problem in problems],
            [problem.p for problem in problems],
            states[0],
            states[1] if two else [],
        ]
        if eight:
            first, second = codebooks()
            stats = [list(column) for column in zip(*(problem.absmax for problem in problems), strict=True)]
            arguments += [first, second if two else None, stats[0], stats[1] if two else []]
        plan = None
        if schedule is not None:
            plan = torch.tensor([[s.lr, step, s.beta3, s.alpha] for step in steps], dtype=schedule)
        # With a schedule the arguments that it replaces must not be read.
        arguments += [steps, s.lr] if plan is None else [[], float("nan")]
        arguments += [s.beta1, s.beta2, s.beta3, s.alpha if plan is None else float("nan"), s.eps, s.weight_decay]
        seeds = list(range(41, 41 + len(sizes))) if rounding else []
        arguments += [s.gnorm_scale, s.max_unorm, s.skip_zeros, seeds, plan]
        return tuple(arguments)

    def judge(before: Arguments, after: Arguments, device: torch.device = CPU) -> None:
        for index in range(len(sizes)):
            old, new = (_problem_of(arguments, index, two, eight) for arguments in (before, after))
            judge_parameter(rule, s.hyper()._replace(step=steps[index]), old, new, stochastic=rounding, device=device)
        if eight:
            for at in (5, 6):
                demand(before[at] is None or same_bits(after[at], before[at]), "a codebook was written")

    marks = [setting.id, name_of(dtype), *(["stochastic"] if rounding else [])]
    marks += [f"schedule-{name_of(schedule)}"] if schedule else []
    marks += [f"{len(sizes)}-tensors"] if sizes is not LIST_SIZES else []
    op = "optimizer_step_8bit" if eight else "optimizer_step_32bit"
    return Case(op, f"{rule}-{'-'.join(marks)}", make, judge=judge)


def _problem_of(arguments: Arguments, index: int, two: bool, eight: bool) -> Problem:
    lists = (3, 4) if two else (3,)
    stats = ((7, 8) if two else (7,)) if eight else ()
    return Problem(
        arguments[1][index],
        arguments[2][index],
        [arguments[at][index] for at in lists],
        [arguments[at][index] for at in stats],
    )


def step_in_float64(
    rule: str, h: Hyper, problem: Problem
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
    """New parameter, new states and the norm of the update, computed in float64."""
    states = [state.double() for state in problem.states]
    if problem.absmax:
        maps = codebooks()
        states = [
            load_state(codes, qmap.double(), stats.double(), torch.float64)
            for codes, qmap, stats in zip(problem.states, maps, problem.absmax, strict=False)
        ]
    return update(RULES[rule], problem.g.double(), problem.p.double(), tuple(states), h)


def judge_parameter(
    rule: str, h: Hyper, old: Problem, new: Problem, stochastic: bool = False, device: torch.device = CPU
) -> None:
    """Compare a step with the truth in float64.

    Raises:
        AssertionError: parameter, states or gradient are not what they ought to be.
    """
    demand(same_bits(new.g, old.g), "the gradient was written")
    truth, states, _unorm = step_in_float64(rule, h, old)
    info = torch.finfo(old.p.dtype)
    # Half a unit in the last place, or a whole one where the direction of rounding is random.
    unit = info.eps * (1.0 if stochastic else 0.5)
    change = (truth - old.p.double()).abs()
    allowed = unit * truth.abs() + 2e-7 * old.p.double().abs() + CHANGE_TOLERANCE * change + info.smallest_normal
    error = (new.p.double() - truth).abs()
    off = error[error > allowed]
    demand(not off.numel(), f"{off.numel()} elements of the parameter are off, first by {off[:1].tolist()}")
    kept = idle_elements(old.g) if h.skip_zeros and new.absmax else torch.zeros_like(old.g, dtype=torch.bool)
    for position, state in enumerate(states):
        if not new.absmax:
            torch.testing.assert_close(new.states[position].double(), state, rtol=STATE_TOLERANCE, atol=STATE_ROUNDING)
            continue
        for slot in range(state.shape[0] if state.dim() == 2 else 1):
            picked = (slot,) if state.dim() == 2 else ()
            codes, stats = new.states[position][picked], new.absmax[position][picked]
            before, stats_before = old.states[position][picked], old.absmax[position][picked]
            demand(torch.equal(codes[kept], before[kept]), "a block without any gradient has other codes")
            idle = kept[::STATE_BLOCKSIZE]
            demand(torch.equal(stats[idle], stats_before[idle]), "a block without any gradient has another absmax")
            judge_codes(state[picked], codes, stats, codebooks()[position], kept, device)


def idle_elements(g: torch.Tensor) -> torch.Tensor:
    """Which elements lie in a block of 256 without any gradient."""
    idle = [block.numel() > 0 and not bool(block.any()) for block in g.split(STATE_BLOCKSIZE)]
    return torch.tensor(idle).repeat_interleave(STATE_BLOCKSIZE)[: g.numel()]


def judge_codes(
    truth: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    qmap: torch.Tensor,
    kept: torch.Tensor,
    device: torch.device = CPU,
) -> None:
    """Compare a stored 8-bit state with the values that it stands for, except in blocks that were kept.

    The search follows the rules of the device that has stored the state.

    Raises:
        AssertionError: statistics or codes are wrong.
    """
    scaled, stats = search.scale_blocks_8bit(truth, STATE_BLOCKSIZE)
    fresh = ~kept[::STATE_BLOCKSIZE]
    torch.testing.assert_close(absmax[fresh], stats[fresh], rtol=STATE_TOLERANCE, atol=1e-12)
    distance = (codes.int() - search.nearest_code_8bit(scaled.to(device), qmap.to(device)).cpu().int()).abs()[~kept]
    demand(int(distance.max() if distance.numel() else 0) <= 1, "a code is not the nearest one nor its neighbour")
    wrong = int((distance > 0).sum())
    demand(
        wrong <= 1 + NEIGHBOURS * len(distance),
        f"{wrong} of {len(distance)} codes are a neighbour of the right one",
    )


def _some(tensors: Any) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
