"""Optimizer kernels against the reference, bit for bit where the order of operations is the same.

States are computed in the reference's order, so they, their statistics and their codes have its bits. So
has the parameter, except where a rule has a root (torch's need not be the nearest number) or corrects a bias
(the kernels multiply by a reciprocal that was rounded once, the reference divides), and where the update's
norm is limited (the kernels sum in double). A state that a root enters is compared like a parameter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitsandbytes.codebooks import create_dynamic_map, create_linear_map
from bitsandbytes.contract import OPS
from bitsandbytes.ops import search
from bitsandbytes.ops.optim_rules import RULES
from bitsandbytes.ops.optim_storage import load_state, state_blocks
from bitsandbytes.testing.tolerances import same_bits
from bnb_cpu.native import _C

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (700, 0, 1, 256, 15, 257, 4096 + 33)
EXACT = ("lion", "momentum", "lars", "sgd")
#: Rules with a root in what their first state is made of.
ROOT_IN_STATE = ("schedule_free",)
QMAPS = (create_dynamic_map(True), create_dynamic_map(False))
every_rule = pytest.mark.parametrize("rule", RULES)
every_width = pytest.mark.parametrize("eight", [False, True], ids=["32bit", "8bit"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Problem(NamedTuple):
    """Tensors of one call, a list per argument; the lists of absmax are empty for float32 states."""

    g: list[torch.Tensor]
    p: list[torch.Tensor]
    state1: list[torch.Tensor]
    state2: list[torch.Tensor]
    absmax1: list[torch.Tensor]
    absmax2: list[torch.Tensor]

    def copy(self) -> Problem:
        return Problem(*([tensor.clone() for tensor in tensors] for tensors in self))

    def states(self) -> list[torch.Tensor]:
        return [*self.state1, *self.state2, *self.absmax1, *self.absmax2]


def make_problem(
    rule: str, eight: bool, dtype: torch.dtype, sizes: Sequence[int], generator: torch.Generator
) -> Problem:
    """Random tensors; a fifth of the gradients is zero, and all those of the second block."""
    slots, two = RULES[rule].slots, RULES[rule].states == 2
    problem = Problem([], [], [], [], [], [])
    for size in sizes:
        g = torch.randn(size, generator=generator)
        g[::5] = 0.0
        g[256:512] = 0.0
        problem.g.append(g.to(dtype))
        problem.p.append(torch.randn(size, generator=generator).to(dtype))
        shape = (slots, size) if slots > 1 else (size,)
        blocks = (slots, state_blocks(size)) if slots > 1 else (state_blocks(size),)
        first_positive = rule in ("rmsprop", "adagrad")
        lists = [(problem.state1, problem.absmax1, shape, blocks, first_positive)]
        lists += [(problem.state2, problem.absmax2, (size,), (state_blocks(size),), True)] if two else []
        for states, stats, shape, blocks, positive in lists:
            if eight:
                states.append(torch.randint(140 if positive else 0, 256, shape, dtype=torch.uint8, generator=generator))
                stats.append(torch.rand(blocks, generator=generator) + 0.25)
            else:
                state = torch.randn(shape, generator=generator)
                states.append(state.abs() if positive else state)
    return problem


class Numbers(NamedTuple):
    """Arguments after the tensors."""

    step: int = 7
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    beta3: float = 0.999
    alpha: float = 1.5
    eps: float = 1e-6
    weight_decay: float = 0.1
    gnorm_scale: float = 1.0
    max_unorm: float = 0.0
    skip_zeros: bool = False
    rounding_seed: int | None = None
    schedule: torch.Tensor | None = None


def step(rule: str, problem: Problem, n: Numbers, how: str = "overload", qmaps: Sequence[torch.Tensor] = QMAPS) -> None:
    """Make a step of all tensors with the op, or with its reference."""
    two = RULES[rule].states == 2
    arguments: list[Any] = [rule, problem.g, problem.p, problem.state1, problem.state2]
    if problem.absmax1:
        arguments += [qmaps[0], qmaps[1] if two else None, problem.absmax1, problem.absmax2]
    count = len(problem.p)
    # Steps differ between tensors, except the first one, which is special.
    arguments += [[n.step + (i if n.step > 1 else 0) for i in range(count)], *n[1:11]]
    seeds = [] if n.rounding_seed is None else [n.rounding_seed + i for i in range(count)]
    op = OPS["optimizer_step_8bit" if problem.absmax1 else "optimizer_step_32bit"]
    getattr(op, how)(*arguments, seeds, n.schedule)


def agree(rule: str, problem: Problem, n: Numbers, qmaps: Sequence[torch.Tensor] = QMAPS) -> Problem:
    """Make a step and compare it with the reference; returns what the kernels wrote."""
    ours, theirs = problem.copy(), problem.copy()
    step(rule, ours, n, qmaps=qmaps)
    step(rule, theirs, n, "reference", qmaps=qmaps)
    assert all(map(same_bits, ours.g, problem.g)), "a gradient was written"
    rooted = rule in ROOT_IN_STATE
    if rooted:
        for index in range(len(problem.p)):
            check_first_state(*(_at(results, index) for results in (ours, theirs, problem)), qmaps[0])
    exact = [(p.state2, p.absmax2) if rooted else (p.states(),) for p in (ours, theirs)]
    for state, wanted in zip(chain(*exact[0]), chain(*exact[1]), strict=True):
        assert same_bits(state, wanted), "a state or its statistics differ"
    for index, (new, wanted, old) in enumerate(zip(ours.p, theirs.p, problem.p, strict=True)):
        if rule in EXACT and not n.max_unorm:
            assert same_bits(new, wanted), "parameter differs"
        else:
            # The first state is a term of the parameter, which another one may cancel.
            term = n.alpha * first_state(_at(problem, index), qmaps[0]) if rooted else torch.zeros_like(old)
            check_parameter(new, wanted, old, term)
    return ours


def _at(problem: Problem, index: int) -> Problem:
    """One tensor of a problem."""
    return Problem(*(tensors[index : index + 1] for tensors in problem))


def first_state(problem: Problem, qmap: torch.Tensor) -> torch.Tensor:
    """Values of the first state of the one tensor of a problem."""
    (state,) = problem.state1
    return load_state(state, qmap, problem.absmax1[0]) if problem.absmax1 else state


def check_first_state(ours: Problem, theirs: Problem, before: Problem, qmap: torch.Tensor) -> None:
    """Compare first states that a root entered: values within rounding, codes with their neighbours."""
    new, wanted, old = (first_state(problem, qmap) for problem in (ours, theirs, before))
    if not before.absmax1:
        check_parameter(new, wanted, old, 2 * old)
        return
    stats, wanted_stats, old_stats = (problem.absmax1[0] for problem in (ours, theirs, before))
    check_parameter(stats, wanted_stats, old_stats, 2 * old_stats * qmap.abs().max())
    # Below, values are subnormal numbers, whose last bit is no longer small beside them.
    normal = (wanted_stats > 1e-30).repeat_interleave(256)[: new.numel()]
    distance = (ours.state1[0].int() - theirs.state1[0].int()).abs().flatten()[normal]
    repeated = bool((qmap.diff() <= 0).any())
    assert repeated or not distance.numel() or int(distance.max()) <= 1
    assert int((distance > 0).sum()) <= 2 + 0.01 * distance.numel()


def check_parameter(new: torch.Tensor, wanted: torch.Tensor, old: torch.Tensor, term: torch.Tensor) -> None:
    """Compare parameters whose last operations were rounded otherwise.

    Each side rounds the update at most eight times, with factors that were rounded once more, hence 20 units
    in the last place of the change; then the difference once, hence a unit of the parameter. A result of 16
    bits can land on the other side of the middle between two numbers, hence a unit of that. ``term`` is a part of
    the change that others may cancel.
    """
    assert torch.equal(new.isnan(), wanted.isnan())
    assert torch.equal(new.isinf(), wanted.isinf())
    finite = wanted.isfinite() & old.isfinite() & term.isfinite()
    new, wanted, old, term = (tensor[finite] for tensor in (new, wanted, old, term))
    info, single = torch.finfo(new.dtype), torch.finfo(torch.float32)
    new64, wanted64, old64 = new.double(), wanted.double(), old.double()
    change = (wanted64 - old64).abs() + term.double().abs()
    allowed = 20 * single.eps * change + 2 * single.eps * old64.abs() + info.eps * wanted64.abs()
    assert bool(((new64 - wanted64).abs() <= allowed + info.smallest_normal * info.eps).all())
    if new.dtype != torch.float32 and new.numel():
        assert int((new != wanted).sum()) <= 2 + 0.01 * new.numel()


NUMBERS = {
    "plain": Numbers(weight_decay=0.0),
    "first": Numbers(step=1),
    "decay": Numbers(),
    "scaled": Numbers(step=1000, gnorm_scale=0.3),
    "skip-zeros": Numbers(skip_zeros=True),
    "clipped": Numbers(max_unorm=0.02),
    "clipped-skip-zeros": Numbers(max_unorm=0.02, skip_zeros=True),
    "free": Numbers(max_unorm=1e6),
}


@every_rule
@every_width
@pytest.mark.parametrize("numbers", NUMBERS)
def test_reference(isa: str, rule: str, eight: bool, numbers: str, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        sizes = SIZES if dtype == torch.float32 else SIZES[:4]
        agree(rule, make_problem(rule, eight, dtype, sizes, generator), NUMBERS[numbers])


@every_rule
@every_width
def test_every_instruction_set_gives_the_same_bits(rule: str, eight: bool, generator: torch.Generator) -> None:
    """Parameters and norms too: a run can be continued on another machine."""
    chosen = _C.isa()
    for dtype in DTYPES:
        for n in (Numbers(), Numbers(max_unorm=0.03, skip_zeros=True)):
            problem = make_problem(rule, eight, dtype, SIZES, generator)
            results = {}
            try:
                for name in _C.supported_isas():
                    _C.set_isa(name)
                    results[name] = problem.copy()
                    step(rule, results[name], n)
            finally:
                _C.set_isa(chosen)
            for name, result in results.items():
                for mine, scalar in zip(result, results["scalar"], strict=True):
                    assert all(map(same_bits, mine, scalar)), name


@pytest.fixture
def with_threads() -> Any:
    """Sets the number of threads until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_rule
@every_width
def test_threads_change_nothing(
    with_threads: Callable[[int], None], rule: str, eight: bool, generator: torch.Generator
) -> None:
    sizes = (100_003, 5, 0, 70_000, *(300,) * 40, 50_000)
    for n in (Numbers(), Numbers(max_unorm=0.03), Numbers(rounding_seed=5)):
        problem = make_problem(rule, eight, torch.bfloat16, sizes, generator)
        results = []
        for threads in (1, 2, 7):
            with_threads(threads)
            results.append(problem.copy())
            step(rule, results[-1], n)
        for result in results[1:]:
            for mine, single in zip(result, results[0], strict=True):
                assert all(map(same_bits, mine, single))


@every_rule
@every_width
def test_many_tensors_are_moved_as_each_alone(rule: str, eight: bool, generator: torch.Generator) -> None:
    problem = make_problem(rule, eight, torch.float32, (0, 3000, 1, 0, 512, 77, 0), generator)
    together = problem.copy()
    step(rule, together, Numbers(max_unorm=0.05))
    for index in range(len(problem.p)):
        alone = Problem(*(tensors[index : index + 1] for tensors in problem)).copy()
        step(rule, alone, Numbers(step=7 + index, max_unorm=0.05))
        for mine, all_of_them in zip(alone, together, strict=True):
            assert all(map(same_bits, mine, all_of_them[index : index + 1]))


def test_no_tensors() -> None:
    for eight in (False, True):
        arguments: list[Any] = ["adam", [], [], [], []] + ([*QMAPS, [], []] if eight else [])
        op = OPS["optimizer_step_8bit" if eight else "optimizer_step_32bit"]
        assert op.overload(*arguments, [], *Numbers()[1:8]) is None


SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e-39, 3e38, -3.4e38, 1.0)


@every_rule
@every_width
def test_special_values(isa: str, rule: str, eight: bool, generator: torch.Generator) -> None:
    """In gradients, in parameters and in states; what is not finite is stored as zero in 8 bit."""
    special = torch.tensor(SPECIAL)
    for place in ("g", "p", "state"):
        # Without alpha, since the bounds know nothing of terms of AdEMAMix that cancel each other.
        for n in (
            Numbers(alpha=0.0),
            Numbers(step=1, alpha=0.0),
            Numbers(skip_zeros=True, weight_decay=0.0, alpha=0.0),
        ):
            problem = make_problem(rule, eight, torch.float32, (1000, 300), generator)
            for index in range(2):
                where = torch.randint(0, 100, (44,), generator=generator)
                values = special[torch.randint(0, len(SPECIAL), (44,), generator=generator)]
                targets = [problem.g[index]] if place == "g" else [problem.p[index]]
                if place == "state":
                    states = problem.states()
                    targets = [t.view(-1) for t in states if t.dtype == torch.float32][index::2]
                for target in targets:
                    spots = where % max(1, target.numel())
                    target[spots] = values
            result = agree(rule, problem, n)
            for absmax in (*result.absmax1, *result.absmax2):
                if place != "state":
                    assert bool(absmax.isfinite().all())


@every_rule
def test_blocks_of_tiny_and_huge_values(isa: str, rule: str, generator: torch.Generator) -> None:
    """A subnormal absmax has no reciprocal, that of a huge one is subnormal, and zero is a case of its own."""
    scales = (0.0, 1e-45, 1e-41, 1e-39, 2.9e-39, 3e-39, 1e-38, 1e-20, 1e-19, 1e19, 1.5e19, 1e37, 1.7e38, 3e38)
    problem = make_problem(rule, True, torch.float32, (256 * len(scales) + 100,), generator)
    noise = torch.rand(problem.g[0].shape, generator=generator) * 2 - 1
    for block, scale in enumerate(scales):
        part = slice(256 * block, 256 * (block + 1))
        problem.g[0][part] = noise[part] * scale
    for absmax in problem.states()[-RULES[rule].states :]:
        absmax.zero_()
    for n in (Numbers(step=1), Numbers(weight_decay=0.0)):
        agree(rule, problem, n)


def test_every_scaled_value_gets_its_code() -> None:
    """All values that differ after the first operation of the search, x + 1: multiples of 2**-24 in [-1, 1]."""
    chosen, blocks = _C.isa(), 2**14
    for start in range(-(2**24), 2**24 + 1, 255 * blocks):
        multiples = torch.arange(start, start + 255 * blocks, dtype=torch.float64).clamp(max=2**24)
        # An element of magnitude 1 in each block makes its scale 1.
        scaled = torch.nn.functional.pad((multiples / 2**24).float().reshape(blocks, 255), (1, 0), value=1.0).reshape(
            -1
        )
        wanted = search.nearest_code_8bit(scaled, QMAPS[0])
        try:
            for isa in _C.supported_isas():
                _C.set_isa(isa)
                codes, absmax = torch.zeros(scaled.numel(), dtype=torch.uint8), torch.zeros(blocks)
                problem = Problem([scaled], [torch.zeros_like(scaled)], [codes], [], [absmax], [])
                step("momentum", problem, Numbers(step=1, weight_decay=0.0))
                assert torch.equal(absmax, torch.ones_like(absmax))
                assert torch.equal(codes, wanted), isa
        finally:
            _C.set_isa(chosen)


@st.composite
def codebooks(draw: st.DrawFn) -> torch.Tensor:
    """Ascending codebooks: usual ones, with repetitions, and with values outside of [-1, 1]."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(("normal", "grid", "repeated", "wide", "linear", "constant")))
    if kind == "linear":
        return create_linear_map(signed=draw(st.booleans()))
    if kind == "constant":
        return torch.full((256,), draw(st.sampled_from((-2.0, -1.0, 0.0, 0.5, 1.0, 7.0))))
    values = torch.randn(256, generator=generator)
    values = {
        "normal": values.clamp(-1, 1),
        "grid": torch.randint(0, 65536, (256,), generator=generator) / 32767.5 - 1.0,
        "repeated": values[torch.randint(0, 9, (256,), generator=generator)],
        "wide": values * 3,
    }[kind]
    return values.sort().values.float()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    qmap1=codebooks(),
    qmap2=codebooks(),
    sizes=st.lists(st.integers(0, 1200), max_size=6),
    rule=st.sampled_from(sorted(RULES)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_codebook(
    isa: str, qmap1: torch.Tensor, qmap2: torch.Tensor, sizes: list[int], rule: str, dtype: torch.dtype, seed: int
) -> None:
    problem = make_problem(rule, True, dtype, sizes, torch.Generator().manual_seed(seed))
    if not sizes:
        return
    # With a negative second state the root is NaN on both sides, and so is the parameter.
    # Without alpha, as in test_special_values.
    agree(rule, problem, Numbers(alpha=0.0), (qmap1, qmap2))


@every_rule
@every_width
def test_stochastic_rounding(isa: str, rule: str, eight: bool, generator: torch.Generator) -> None:
    problem = make_problem(rule, eight, torch.bfloat16, (5000, 0, 33), generator)
    for seed in (0, 2**40 + 12345, -1):
        ours = agree(rule, problem, Numbers(rounding_seed=seed))
        nearest = problem.copy()
        step(rule, nearest, Numbers())
        assert not torch.equal(ours.p[0], nearest.p[0])


@every_rule
@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_schedule_replaces_numbers(rule: str, eight: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Numbers that either dtype holds exactly; and the arguments that are replaced are not read."""
    problem = make_problem(rule, eight, torch.float32, (300, 20), generator)
    plain, scheduled = problem.copy(), problem.copy()
    n = Numbers(lr=0.125, beta3=0.75, alpha=1.5)
    step(rule, plain, n)
    rows = torch.tensor([[0.125, 7 + i, 0.75, 1.5] for i in range(2)], dtype=dtype)
    strided = torch.stack((rows, rows), dim=-1)[..., 0]
    nan = float("nan")
    step(rule, scheduled, n._replace(lr=nan, alpha=nan, beta3=0.0, schedule=strided))
    for mine, wanted in zip(scheduled, plain, strict=True):
        assert all(map(same_bits, mine, wanted))


@every_rule
@every_width
@every_dtype
def test_nothing_beside_the_tensors_changes(
    isa: str, rule: str, eight: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Tensors at odd offsets inside of larger memory."""
    problem = make_problem(rule, eight, dtype, (300, 256, 1), generator)
    wanted = problem.copy()
    step(rule, wanted, Numbers())
    memories = []

    def inside(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.full((tensor.numel() + 66,), 3, dtype=tensor.dtype)
        view = memory[33 : 33 + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        memories.append(memory)
        return view

    shifted = Problem(*([inside(tensor) for tensor in tensors] for tensors in problem))
    step(rule, shifted, Numbers())
    for mine, theirs in zip(shifted, wanted, strict=True):
        assert all(map(same_bits, mine, theirs))
    for memory in memories:
        assert bool((memory[:33] == 3).all())
        assert bool((memory[-33:] == 3).all())


@every_rule
@every_width
def test_single_parameter_ops(rule: str, eight: bool, generator: torch.Generator) -> None:
    """They give what the ops for many give, also for a gradient that is not contiguous."""
    two = RULES[rule].states == 2
    n = Numbers(max_unorm=0.0 if eight else 0.05)
    for dtype in DTYPES:
        problem = make_problem(rule, eight, dtype, (600,), generator)
        wanted = problem.copy()
        step(rule, wanted, n)
        strided = torch.stack((problem.g[0], problem.g[0]), dim=1)[:, 0]
        head = [rule, strided, problem.p[0], problem.state1[0], problem.state2[0] if two else None]
        tail = [n.beta1, n.beta2, n.beta3, n.alpha, n.eps]
        if eight:
            maps = [QMAPS[0], QMAPS[1] if two else None, problem.absmax1[0], problem.absmax2[0] if two else None]
            rest = [n.step, n.lr, *maps, n.weight_decay, n.gnorm_scale]
            OPS["optimizer_update_8bit_blockwise"].overload(*head, *tail, *rest)
        else:
            unorm = torch.zeros(1)
            norm = float(problem.p[0].double().norm())
            rest = [n.weight_decay, n.step, n.lr, n.gnorm_scale]
            OPS["optimizer_update_32bit"].overload(*head, unorm, n.max_unorm, norm, *tail, *rest)
            assert float(unorm) > 0.0
        for mine, theirs in zip(problem, wanted, strict=True):
            assert all(map(same_bits, mine, theirs))


def test_hundred_steps_of_adamw_follow_float64(generator: torch.Generator) -> None:
    """Against torch's AdamW in float64, on gradients of a quadratic."""
    start, target = torch.randn(3000, generator=generator), torch.randn(3000, generator=generator)
    truth = torch.nn.Parameter(start.double())
    oracle = torch.optim.AdamW([truth], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    problem = Problem([torch.empty(3000)], [start.clone()], [torch.zeros(3000)], [torch.zeros(3000)], [], [])
    for number in range(1, 101):
        truth.grad = truth.detach() - target.double()
        oracle.step()
        problem.g[0].copy_(problem.p[0] - target)
        step("adam", problem, Numbers(step=number, eps=1e-8))
    torch.testing.assert_close(problem.p[0].double(), truth.detach(), rtol=1e-4, atol=2e-5)


def test_a_module_older_than_a_rule_leaves_it_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules travel as numbers: an unknown one must not become another rule."""
    assert len(RULES) == _C.OPTIMIZER_RULES
    source = importlib.util.find_spec("bnb_cpu.optim")
    assert source is not None and source.origin is not None
    monkeypatch.setattr(_C, "OPTIMIZER_RULES", list(RULES).index("schedule_free"))
    spec = importlib.util.spec_from_file_location("older_optim", source.origin)
    assert spec is not None and spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    for kernel in older.OPTIM_KERNELS:
        assert kernel.accepts is not None
        assert kernel.accepts("adam", None)
        assert not kernel.accepts("schedule_free", None)
