"""Optimizer steps that are prepared once: they give the same, and every change of a tensor is seen.

These are tests of the core. They stand here because they need a backend, and a process that has one keeps it.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch

from bitsandbytes import optim, paging
from bitsandbytes.backends.bound import EXCHANGE
from bitsandbytes.backends.registry import REGISTRY
from bitsandbytes.contract import OPS
from bitsandbytes.errors import ArgumentError
from bitsandbytes.ops.optim_rules import RULES
from bitsandbytes.optim import bound

pytestmark = pytest.mark.skipif(EXCHANGE is None, reason="torch has no table of DLPack functions before 2.10")

SHAPES = ((64, 128), (5000,), (300,), (1,), (), (0,), (7, 1, 900))


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


class Pair:
    """An optimizer that prepares its steps, and a twin that never does."""

    def __init__(self, name: str = "AdamW8bit", dtype: torch.dtype = torch.float32, shapes=SHAPES, **settings):
        self.params, self.others = parameters(dtype, shapes), parameters(dtype, shapes)
        make = getattr(optim, name)
        arguments = {"lr": 1e-2, "momentum": 0.9} if name.startswith("SGD") else {"lr": 1e-2}
        self.ours = make([{"params": self.params, **settings}], **arguments)
        self.plain = make([{"params": self.others, **settings}], **arguments)
        self.number = 0

    def both(self, change: Callable[[torch.optim.Optimizer, list[torch.nn.Parameter]], object]) -> None:
        change(self.ours, self.params)
        change(self.plain, self.others)

    def step(self, gradients: bool = True) -> bool:
        """One step of both; says whether all of ours was prepared."""
        self.number += 1
        for optimizer, params in ((self.ours, self.params), (self.plain, self.others)):
            if gradients:
                set_gradients(params, self.number)
            if optimizer is self.plain:
                for batch in optimizer._plan:
                    batch.bound.step = None
            else:
                runs = Runs(optimizer)
            optimizer.step()
        self.compare()
        return runs.all_prepared()

    def steps(self, count: int) -> bool:
        """Several steps of both; says whether any of ours was prepared."""
        return any([self.step() for _step in range(count)])  # noqa: C419

    def warm(self) -> None:
        for _step in range(3):
            self.step()
        assert self.step()

    def compare(self) -> None:
        for p, q in zip(self.params, self.others, strict=True):
            assert torch.equal(p, q)
            ours, others = self.ours.state[p], self.plain.state[q]
            assert ours.keys() == others.keys()
            for key, value in ours.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(others[key])), key


class Runs:
    """Counts calls of prepared steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.calls = optimizer, []
        for batch in optimizer._plan:
            step = batch.bound.step
            if step is not None and "counted" not in step.__dict__:
                run, calls = step.run, self.calls

                def counted(*arguments: object, run=run, calls=calls) -> None:
                    calls.append(1)
                    run(*arguments)

                step.run = counted

    def all_prepared(self) -> bool:
        return len(self.calls) == len(self.optimizer._plan) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit", "AdEMAMix8bit", "LAMB8bit", "SGD8bit"])
def test_prepared_steps_equal_those_of_the_op(name: str, dtype: torch.dtype) -> None:
    Pair(name, dtype).warm()


@pytest.mark.parametrize("settings", [{"stochastic_rounding": True}, {"capturable": True}, {"skip_zeros": True}])
def test_settings(settings: dict[str, object]) -> None:
    pair = Pair(dtype=torch.bfloat16, **settings)
    pair.warm()

    def other_numbers(optimizer, params) -> None:
        optimizer.param_groups[0].update(lr=3e-3, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.3, gnorm_scale=0.5)

    pair.both(other_numbers)
    assert pair.step()


def test_numbers_are_checked_each_time() -> None:
    pair = Pair()
    pair.warm()
    pair.ours.param_groups[0]["betas"] = (1.5, 0.9)
    with pytest.raises(ArgumentError, match=r"beta1 is 1\.5"):
        pair.ours.step()


def test_gradients_that_stay_where_they_are() -> None:
    pair = Pair()
    pair.warm()
    pair.both(lambda optimizer, params: [p.grad.mul_(0.5) for p in params])
    assert pair.step(gradients=False)


def of_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., object]:
    def apply(optimizer, params) -> None:
        params[0].grad = change(params[0].grad)

    return apply


CHANGES: dict[str, Callable[..., object]] = {
    "gradient absent": lambda o, ps: setattr(ps[0], "grad", None),
    "all absent": lambda o, ps: [setattr(p, "grad", None) for p in ps],
    "gradient strided": of_first(lambda g: g.t().contiguous().t()),
    "gradient expanded": of_first(lambda g: g[:1].expand(64, 128)),
    "gradient sparse": of_first(lambda g: g.to_sparse()),
    "gradient negated": lambda o, ps: setattr(ps[3], "grad", torch.tensor([1.0 + 2.0j]).conj().imag),
    "gradient of a subclass": of_first(lambda g: torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), g)),
    "parameter's memory": lambda o, ps: setattr(ps[0], "data", ps[0].data.clone()),
    "parameter strided": lambda o, ps: setattr(ps[0], "data", ps[0].data.t().contiguous().t()),
    "state replaced": lambda o, ps: o.state[ps[0]].update(state1=o.state[ps[0]]["state1"].clone()),
    "state's memory": lambda o, ps: setattr(o.state[ps[0]]["state2"], "data", o.state[ps[0]]["state2"].data.clone()),
    "absmax replaced": lambda o, ps: o.state[ps[0]].update(absmax1=o.state[ps[0]]["absmax1"] * 2),
    "all states replaced": lambda o, ps: o.state.update({ps[0]: copy.deepcopy(o.state[ps[0]])}),
    "codebook of one": lambda o, ps: o.state[ps[0]].update(qmap1=o.state[ps[0]]["qmap1"] * 0.5),
    "step number of one": lambda o, ps: o.state[ps[0]].update(step=100),
    "state loaded": lambda o, ps: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "override": lambda o, ps: optim.GlobalOptimManager.get_instance().override_config(ps[0], "lr", 0.5),
    "frozen": lambda o, ps: (ps[0].requires_grad_(False), setattr(ps[0], "grad", None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    pair = Pair()
    pair.warm()
    for seed, params in ((77, pair.params), (77, pair.others)):
        set_gradients(params, seed)
    pair.both(CHANGES[change])
    pair.step(gradients=False)
    # And it goes on, prepared again before long where that is possible.
    assert pair.steps(4) or change == "parameter strided"
    optim.GlobalOptimManager.get_instance().initialize()


def test_every_state_is_looked_at() -> None:
    for key in ("state1", "state2", "absmax1", "absmax2"):
        for index in (0, 1, 6):
            pair = Pair()
            pair.warm()

            def swap(optimizer, params, key=key, index=index) -> None:
                tensor = optimizer.state[params[index]][key]
                tensor.data = tensor.data.clone()

            pair.both(swap)
            # Compares with the twin, which finds everything anew.
            assert pair.step()


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_shrunken_tensors_are_errors_as_before(name: str) -> None:
    pair = Pair(name)
    pair.warm()
    set_gradients(pair.params, 5)
    state = pair.ours.state[pair.params[0]]["state1"]
    # At the same address.
    state.data = state.data[:8]
    with pytest.raises(ArgumentError, match="state1"):
        pair.ours.step()


def test_dtype_of_parameters_changes() -> None:
    pair = Pair()
    pair.warm()
    pair.both(
        lambda optimizer, params: [(setattr(p, "grad", None), setattr(p, "data", p.data.bfloat16())) for p in params]
    )
    pair.step()
    assert pair.steps(4)


def test_groups_come_and_parameters_thaw() -> None:
    pair = Pair()
    pair.both(lambda optimizer, params: params[1].requires_grad_(False))
    for number in range(5):
        for params in (pair.params, pair.others):
            set_gradients(params, number)
            params[1].grad = None
        pair.step(gradients=False)
    pair.both(lambda optimizer, params: params[1].requires_grad_(True))
    assert pair.steps(5)

    def add(optimizer, params) -> None:
        extra = parameters(shapes=((4096, 2),))
        optimizer.add_param_group({"params": extra, "lr": 0.1})
        params.extend(extra)

    pair.both(add)
    assert pair.steps(5)


def test_a_registry_that_changes() -> None:
    pair = Pair()
    pair.warm()
    REGISTRY.generation += 1
    assert not pair.step()
    assert pair.step()


def test_without_a_kernel_that_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "binder", lambda op, device: None)
    pair = Pair()
    assert not pair.steps(6)


def test_without_a_table_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.backends.bound.EXCHANGE", None)
    pair = Pair()
    assert not pair.steps(6)


def test_whoever_looks_on_sees_the_op() -> None:
    pair = Pair()
    pair.warm()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pair.step()
    assert any(event.name == "bitsandbytes::optimizer_step_8bit" for event in profile.events())
    with torch.device("cpu"):
        assert not pair.step()
    assert pair.step()


def test_a_batch_that_always_changes_is_left_alone() -> None:
    pair = Pair()
    for _step in range(bound.MOST_ATTEMPTS + 5):
        for params in (pair.params, pair.others):
            set_gradients(params, pair.number)
            params[0].grad = params[0].grad.t().contiguous().t()
        pair.step(gradients=False)
    assert all(batch.bound.step is None for batch in pair.ours._plan if batch.params[0].dim() == 2)


class Pages:
    """A pager of plain memory that counts what it fetches."""

    def __init__(self) -> None:
        self.gone, self.fetched = 0, 0

    def allocate(self, shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def prefetch(self, tensor: torch.Tensor, to_cpu: bool) -> None:
        self.fetched += 1

    def departures(self, device: torch.device) -> int:
        return self.gone


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit"])
def test_steps_of_paged_portions_are_prepared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages()
    monkeypatch.setattr("bitsandbytes.optim.base.PAGED_PORTION", 150_000)
    paging.set_pager("cpu", lambda: pages)
    try:
        pair = Pair(name, shapes=((100_000,), (300,), (400, 300), (100_001,)))
        pair.ours = getattr(optim, f"Paged{name}")(pair.params, lr=1e-2)
        pair.warm()
        assert len(pair.ours._plan) > len(pair.plain._plan)
        # Whether states are fetched is no matter of how the step is made.
        pages.gone, pages.fetched = 1, 0
        assert pair.step()
        assert pages.fetched == (3 if name.startswith("Lion") else 6)
        assert pair.step()
        assert pages.fetched == (3 if name.startswith("Lion") else 6)
    finally:
        paging.set_pager("cpu", None)


def test_nothing_is_kept_alive() -> None:
    pair = Pair()
    pair.warm()
    gradient = weakref.ref(pair.params[0].grad)
    state = weakref.ref(pair.ours.state[pair.params[0]]["state1"])
    pair.params[0].grad = None
    pair.ours.state[pair.params[0]].clear()
    gc.collect()
    assert gradient() is None
    assert state() is None


def test_copies_and_pickles() -> None:
    pair = Pair()
    pair.warm()
    params, ours = copy.deepcopy((pair.params, pair.ours))
    set_gradients(params, 9)
    set_gradients(pair.params, 9)
    ours.step()
    pair.ours.step()
    assert all(torch.equal(p, q) for p, q in zip(params, pair.params, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_empty_lists_are_silent(rule: str) -> None:
    numbers = ([], 1e-3, 0.9, 0.99, 0.999, 1.0, 1e-8, 0.0)
    codebook = torch.linspace(-1.0, 1.0, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.bitsandbytes.optimizer_step_32bit(rule, [], [], [], [], *numbers)
        torch.ops.bitsandbytes.optimizer_step_8bit(rule, [], [], [], [], codebook, codebook, [], [], *numbers)
        for op in ("optimizer_step_32bit", "optimizer_step_8bit"):
            codebooks = (codebook, codebook, [], []) if "8" in op else ()
            OPS[op].checked_reference(rule, [], [], [], [], *codebooks, *numbers)
