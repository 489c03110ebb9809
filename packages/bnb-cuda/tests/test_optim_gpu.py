"""Optimizers on the GPU: graphs, streams, devices, paging, moves, and steps of very many parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import pytest
import torch

from bitsandbytes import optim, paging
from bitsandbytes.backends.bound import EXCHANGE

# Where the module is not built, or torch has no CUDA, these tests are skipped, not broken.
if not torch.backends.cuda.is_built():
    pytest.skip("this build of torch has no CUDA", allow_module_level=True)
_C = pytest.importorskip("bnb_cuda._C", reason="the native module bnb_cuda._C is not built")
pages = pytest.importorskip("bnb_cuda.paging")

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)
SIZES = (8192, 5000, 300, 1, 4096 * 9 + 7)
needs_exchange = pytest.mark.skipif(EXCHANGE is None, reason="torch has no table of DLPack functions before 2.10")


def parameters(
    sizes=SIZES, dtype: torch.dtype = torch.float32, device: str = "cuda", seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    """New gradients, as ``zero_grad`` and a backward pass give."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def overwrite_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    """New values at the same addresses, as a captured backward pass gives."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad.copy_(torch.randn(p.shape, generator=generator))


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_steps(*optimizers: torch.optim.Optimizer, numbers: Iterable[int]) -> None:
    """For each number a step of each optimizer, with new gradients that the number gives."""
    for number in numbers:
        for optimizer in optimizers:
            set_gradients(params_of(optimizer), number)
        for optimizer in optimizers:
            optimizer.step()


def take_steps_on_changing_streams(
    ours: torch.optim.Optimizer, plain: torch.optim.Optimizer, *, steps_per_gradient: int
) -> None:
    """Steps of ``ours`` on several streams in turn, and the same ones of ``plain`` on the current stream."""
    streams = [torch.cuda.Stream(), torch.cuda.current_stream(), torch.cuda.Stream()]
    for number in range(9):
        stream = streams[number % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if number % steps_per_gradient == 0:
                set_gradients(params_of(ours), number)
            # Work ahead of the step, so that what comes too early on another stream would show.
            torch.cuda._sleep(2_000_000)
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        if number % steps_per_gradient == 0:
            set_gradients(params_of(plain), number)
        plain.step()


def capture_step(ours: torch.optim.Optimizer, eager: torch.optim.Optimizer, *, warm_ups: int) -> torch.cuda.CUDAGraph:
    """A graph of a step of ``ours``, after steps on another stream that ``eager`` makes too."""
    for optimizer in (ours, eager):
        set_gradients(params_of(optimizer), 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _warm_up in range(warm_ups):
            ours.step()
    torch.cuda.current_stream().wait_stream(side)
    for _warm_up in range(warm_ups):
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    return graph


def replay_steps(
    graph: torch.cuda.CUDAGraph, ours: torch.optim.Optimizer, eager: torch.optim.Optimizer, *, replays: int
) -> None:
    """Replay a step of ``ours`` with other gradients each time, as steps of ``eager`` have them."""
    for number in range(replays):
        overwrite_gradients(params_of(ours), number)
        overwrite_gradients(params_of(eager), number)
        graph.replay()
        eager.step()


def assert_same(ours: torch.optim.Optimizer, others: torch.optim.Optimizer, but: tuple[str, ...] = ("step",)) -> None:
    """Parameters and states are equal bit for bit."""
    torch.cuda.synchronize()
    for group, other in zip(ours.param_groups, others.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p.cpu(), q.cpu())
            assert ours.state[p].keys() == others.state[q].keys()
            for key, value in ours.state[p].items():
                if isinstance(value, torch.Tensor) and key not in but:
                    assert torch.equal(value.cpu(), others.state[q][key].cpu()), key


def is_prepared(optimizer: torch.optim.Optimizer) -> bool:
    return all(batch.bound.step is not None for batch in optimizer._plan)


# --- graphs and streams ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit"])
def test_replay_equals_eager_steps(name: str, dtype: torch.dtype) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    make = getattr(optim, name)
    ours = make([{"params": params, "capturable": True}], lr=1e-2)
    eager = make([{"params": others, "capturable": True}], lr=1e-2)
    graph = capture_step(ours, eager, warm_ups=4)
    assert_same(ours, eager)
    replay_steps(graph, ours, eager, replays=5)
    assert_same(ours, eager)
    # An eager step goes on where the replays ended.
    ours.step()
    eager.step()
    assert_same(ours, eager)


def test_replay_follows_a_learning_rate_on_the_device() -> None:
    params, others = parameters(), parameters()
    lr, other_lr = torch.tensor(1e-2, device="cuda"), torch.tensor(1e-2, device="cuda")
    ours = optim.AdamW8bit([{"params": params, "capturable": True, "lr": lr}])
    eager = optim.AdamW8bit([{"params": others, "capturable": True, "lr": other_lr}])
    set_gradients(params, 0)
    set_gradients(others, 0)
    for _warm_up in range(3):
        ours.step()
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for number in range(3):
        lr.fill_(0.01 / (number + 1))
        other_lr.fill_(0.01 / (number + 1))
        graph.replay()
        eager.step()
    assert_same(ours, eager)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_steps_on_changing_streams(name: str) -> None:
    params, others = parameters(), parameters()
    ours, plain = getattr(optim, name)(params), getattr(optim, name)(others)
    take_steps_on_changing_streams(ours, plain, steps_per_gradient=2)
    assert_same(ours, plain)


def test_steps_that_queue_up_keep_their_addresses() -> None:
    """The table of a step is not overwritten while the device is still busy with the steps before it."""
    params, others = parameters(), parameters()
    ours, plain = optim.AdamW8bit(params), optim.AdamW8bit(others)
    kept = []
    torch.cuda._sleep(200_000_000)
    for number in range(12):
        set_gradients(params, number)
        kept.append([p.grad for p in params])
        ours.step()
    torch.cuda.synchronize()
    for number in range(12):
        set_gradients(others, number)
        plain.step()
        torch.cuda.synchronize()
    assert_same(ours, plain)


def test_grad_scaler() -> None:
    params, others = parameters(), parameters()
    ours, plain = optim.AdamW8bit(params, lr=1e-2), optim.AdamW8bit(others, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=100)
    for number in range(6):
        set_gradients(params, number)
        set_gradients(others, number)
        # So that the scaler has a scale.
        scaler.scale(torch.ones(1, device="cuda"))
        for p in params:
            p.grad.mul_(1024.0 if number < 4 else 512.0)
        if number == 3:
            params[0].grad[5] = torch.inf
        scaler.step(ours)
        scaler.update()
        if number != 3:
            plain.step()
    assert scaler.get_scale() == 512.0
    assert_same(ours, plain)


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.multigpu
@pytest.mark.parametrize("name", [n for n in optim.__all__ if n not in ("GlobalOptimManager", "PytorchLARS")])
def test_a_device_that_is_not_current(name: str) -> None:
    sizes = ((96, 64), (33, 70)) if name.startswith("Muon") else SIZES
    settings = {"lr": 1e-2, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    ours, plain = (getattr(optim, name)(parameters(sizes, device=f"cuda:{i}"), **settings) for i in (1, 0))
    take_steps(ours, plain, numbers=range(5))
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert_same(ours, plain)


@pytest.mark.multigpu
def test_parameters_on_two_devices() -> None:
    params, others = parameters(device="cuda:1") + parameters(), parameters() + parameters()
    ours, plain = optim.AdamW8bit(params), optim.AdamW8bit(others)
    take_steps(ours, plain, numbers=range(5))
    torch.cuda.synchronize(1)
    assert_same(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit", "AdEMAMix8bit"])
def test_states_move_through_the_cpu(name: str, dtype: torch.dtype) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    ours, plain = getattr(optim, name)(params), getattr(optim, name)(others)
    take_steps(ours, plain, numbers=range(4))
    on_cpu = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    holder = getattr(optim, name)(on_cpu)
    holder.load_state_dict(ours.state_dict())
    assert all(holder.state[p]["state1"].device.type == "cpu" for p in on_cpu)
    assert_same(ours, holder)
    back = [torch.nn.Parameter(p.detach().cuda()) for p in on_cpu]
    again = getattr(optim, name)(back)
    again.load_state_dict(holder.state_dict())
    take_steps(again, plain, numbers=range(4, 8))
    assert_same(again, plain)


def test_a_model_moves_between_steps() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 96)).cuda()
    twin = copy.deepcopy(model)
    ours, plain = optim.AdamW8bit(model.parameters()), optim.AdamW8bit(twin.parameters())
    for number in range(9):
        if number in (3, 6):
            model.cpu()
            ours.zero_grad()
            model.cuda()
        take_steps(ours, plain, numbers=[number])
    assert_same(ours, plain)


def test_states_that_are_taken_away_are_seen() -> None:
    """Offloading swaps the memory of states behind the optimizer's back, in either of two ways."""
    params, others = parameters(), parameters()
    ours, plain = optim.AdamW8bit(params), optim.AdamW8bit(others)
    for number in range(12):
        if number in (4, 8):
            for p in params:
                for key in ("state1", "state2", "absmax1", "absmax2"):
                    if key not in ours.state[p]:
                        continue
                    fresh = ours.state[p][key].cpu().cuda()
                    if number == 4:
                        ours.state[p][key] = fresh
                    else:
                        ours.state[p][key].data = fresh
        take_steps(ours, plain, numbers=[number])
    assert_same(ours, plain)


# --- paging ---------------------------------------------------------------------------------------


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every large parameter is a portion."""
    monkeypatch.setattr("bitsandbytes.optim.base.PAGED_PORTION", 200_000)


def with_free_memory(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new pager, which is told that so many hundredths of the memory are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 100))
    monkeypatch.setattr(paging, "_pagers", {})


def skip_without_pages() -> None:
    if not _C.has_managed_memory(0):
        pytest.skip("this GPU has no managed memory")


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit"])
def test_paged_equals_plain(name: str, dtype: torch.dtype, resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(50 if resident else 0, monkeypatch)
    sizes = (300_000, 8192, 1_500_001, 250_000)
    params, others = parameters(sizes, dtype), parameters(sizes, dtype)
    ours, plain = getattr(optim, f"Paged{name}")(params), getattr(optim, name)(others)
    for number in range(6):
        set_gradients(params, number)
        set_gradients(others, number)
        # Work ahead of the step, so that pages that come too early or too late would show.
        torch.cuda._sleep(2_000_000)
        ours.step()
        plain.step()
    assert_same(ours, plain)
    assert len(ours._plan) == 3
    assert EXCHANGE is None or is_prepared(ours)


@pytest.mark.usefixtures("small_portions")
def test_nothing_is_fetched_while_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_pages()
    moves = []
    move = _C.prefetch_managed
    monkeypatch.setattr("bnb_cuda.paging._C.prefetch_managed", lambda *a: (moves.append(a[2:]), move(*a)))
    with_free_memory(50, monkeypatch)
    params = parameters((300_000, 400_000))
    ours = optim.PagedAdamW8bit(params)
    set_gradients(params, 0)
    ours.step()
    # Made on the device, once.
    assert len(moves) == 4
    for number in range(5):
        set_gradients(params, number)
        ours.step()
    assert len(moves) == 4
    state = ours.state[params[0]]["state1"]
    before = state.cpu()
    paging.prefetch(state, to_cpu=True)
    torch.cuda.synchronize()
    assert torch.equal(state.cpu(), before)
    ours.step()
    ours.step()
    assert len(moves) == 4 + 1 + 4


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("resident", [True, False])
def test_paged_steps_on_changing_streams(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(50 if resident else 0, monkeypatch)
    sizes = (300_000, 200_001, 5000)
    params, others = parameters(sizes), parameters(sizes)
    ours, plain = optim.PagedAdamW8bit(params), optim.AdamW8bit(others)
    take_steps_on_changing_streams(ours, plain, steps_per_gradient=1)
    assert_same(ours, plain)


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("resident", [True, False])
def test_a_paged_step_is_captured(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(50 if resident else 0, monkeypatch)
    sizes = (300_000, 200_001, 5000)
    params, others = parameters(sizes), parameters(sizes)
    ours = optim.PagedAdamW8bit([{"params": params, "capturable": True}])
    eager = optim.PagedAdamW8bit([{"params": others, "capturable": True}])
    graph = capture_step(ours, eager, warm_ups=3)
    replay_steps(graph, ours, eager, replays=4)
    ours.step()
    eager.step()
    assert_same(ours, eager)


def test_paged_memory_is_freed_while_a_graph_is_captured() -> None:
    skip_without_pages()
    x = torch.zeros(1000, device="cuda")
    paged = paging.get_paged((200_000,), torch.float32, x.device).zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        del paged
        x += 1
    graph.replay()
    torch.cuda.synchronize()
    assert bool((x == 2).all())


def test_paged_memory_is_freed_while_it_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_pages()
    with_free_memory(0, monkeypatch)
    others = parameters((3_000_000,))
    plain = optim.AdamW8bit(others)
    for number in range(6):
        params = parameters((3_000_000,))
        ours = optim.PagedAdamW8bit(params)
        set_gradients(params, 0)
        for _step in range(3):
            ours.step()
        if number < 5:
            del ours
    set_gradients(others, 0)
    for _step in range(3):
        plain.step()
    assert_same(ours, plain)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_paged_states_move_through_the_cpu_and_copies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_pages()
    with_free_memory(0, monkeypatch)
    sizes = (300_000, 5000)
    params, others = parameters(sizes), parameters(sizes)
    ours, plain = getattr(optim, f"Paged{name}")(params), getattr(optim, name)(others)
    for number in range(12):
        if number == 4:
            # Through the CPU: what comes back is paged again.
            on_cpu = [torch.nn.Parameter(p.detach().cpu()) for p in params]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                holder = getattr(optim, f"Paged{name}")(on_cpu)
            holder.load_state_dict(ours.state_dict())
            params = [torch.nn.Parameter(p.detach().cuda()) for p in on_cpu]
            ours = getattr(optim, f"Paged{name}")(params)
            ours.load_state_dict(holder.state_dict())
            assert ours.state[params[0]]["state1"].untyped_storage().data_ptr() in pages._in_use
        if number == 8:
            # A copy has the marks of paged memory but lies in plain memory.
            ours, params = copy.deepcopy((ours, params))
        take_steps(ours, plain, numbers=[number])
    assert_same(ours, plain)


@pytest.mark.usefixtures("small_portions")
@pytest.mark.multigpu
@pytest.mark.parametrize("resident", [True, False])
def test_paged_parameters_on_two_devices(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(50 if resident else 0, monkeypatch)
    sizes = (300_000, 200_001, 5000)
    params = parameters(sizes, device="cuda:1") + parameters(sizes)
    others = parameters(sizes) + parameters(sizes)
    ours, plain = optim.PagedAdamW8bit(params), optim.AdamW8bit(others)
    take_steps(ours, plain, numbers=range(5))
    torch.cuda.synchronize(1)
    assert torch.cuda.current_device() == 0
    assert_same(ours, plain)


@pytest.mark.multigpu
def test_a_step_is_captured_on_a_device_that_is_not_current() -> None:
    params, others = parameters(device="cuda:1"), parameters(device="cuda:0")
    ours = optim.AdamW8bit([{"params": params, "capturable": True}])
    eager = optim.AdamW8bit([{"params": others, "capturable": True}])
    set_gradients(params, 0)
    set_gradients(others, 0)
    for _warm_up in range(4):
        ours.step()
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph, stream=torch.cuda.Stream(1)), torch.cuda.device(0):
        ours.step()
    for _replay in range(3):
        graph.replay()
        eager.step()
    torch.cuda.synchronize(1)
    assert_same(ours, eager)


def test_departures_are_counted_while_there_is_no_room_and_once_after(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr("bnb_cuda.paging.QUESTIONS_BETWEEN_LOOKS", 2)
    residence = pages.Residence()
    assert [residence.departures(0) for _ in range(4)] == [0] * 4
    free = 1
    assert [residence.departures(0) for _ in range(2)] == [1, 2]
    assert residence.departures(0, look=False) == 2
    free = 50
    assert [residence.departures(0) for _ in range(3)] == [3, 3, 3]
    residence.forget()
    assert [residence.departures(0) for _ in range(2)] == [4, 4]


def test_paged_states_exceed_a_limit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = optim.PagedAdamW32bit(parameters((200_000,)))
        set_gradients(probe.param_groups[0]["params"], 0)
        probe.step()
    if not getattr(next(iter(probe.state.values()))["state1"], "is_paged", False):
        pytest.skip("this GPU has no managed memory")
    sizes = (10_000_000, 10_000_000)
    params, others = parameters(sizes), parameters(sizes)
    ours, plain = optim.PagedAdamW32bit(params), optim.AdamW32bit(others)
    set_gradients(params, 0)
    set_gradients(others, 0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Room for half of the 160 MB that the states take.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 80 * 2**20) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            plain.step()
        plain.state.clear()
        torch.cuda.empty_cache()
        for _step in range(3):
            ours.step()
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    reference = optim.AdamW32bit(parameters(sizes))
    set_gradients(reference.param_groups[0]["params"], 0)
    for _step in range(3):
        reference.step()
    assert_same(ours, reference)


@pytest.mark.usefixtures("small_portions")
def test_paged_states_exceed_the_memory_of_the_device() -> None:
    """Nothing is imitated here: other tensors fill the device, and states go to the host and come back."""
    skip_without_pages()
    sizes = (2**25,) * 6
    params, others = parameters(sizes), parameters(sizes)
    ours, plain = optim.PagedAdamW32bit(params), optim.AdamW32bit(others)
    for number in range(3):
        set_gradients(others, number)
        plain.step()
    plain.state.clear()
    set_gradients(params, 0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Room for a third of the 1.5 GiB that the states take.
    free, _total = torch.cuda.mem_get_info()
    filling = torch.empty(free - 2**29, dtype=torch.uint8, device="cuda")
    for number in range(3):
        overwrite_gradients(params, number)
        ours.step()
    torch.cuda.synchronize()
    del filling
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


# --- many parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW32bit"])
def test_two_thousand_small_tensors_move_as_each_alone(name: str) -> None:
    sizes = [256 + 17 * (number % 90) for number in range(2000)]
    settings = {} if "32" in name else {"min_8bit_size": 1}
    params, others = parameters(sizes, torch.bfloat16), parameters(sizes, torch.bfloat16)
    ours = getattr(optim, name)(params, lr=1e-2, **settings)
    alone = [getattr(optim, name)([p], lr=1e-2, **settings) for p in others]
    for number in range(4):
        set_gradients(params, number)
        set_gradients(others, number)
        ours.step()
        for single in alone:
            single.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    for p, q, single in zip(params, others, alone, strict=True):
        state = single.state[q]
        assert all(torch.equal(value, state[key]) for key, value in ours.state[p].items() if key.startswith("state"))


@needs_exchange
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit", "AdEMAMix8bit", "LAMB8bit", "SGD8bit"])
@pytest.mark.parametrize("rounded", [False, True])
def test_prepared_steps_equal_those_of_the_op(name: str, rounded: bool) -> None:
    params, others = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    settings = {"momentum": 0.9} if name.startswith("SGD") else {}
    ours = getattr(optim, name)([{"params": params, "stochastic_rounding": rounded}], lr=1e-2, **settings)
    plain = getattr(optim, name)([{"params": others, "stochastic_rounding": rounded}], lr=1e-2, **settings)
    for number in range(8):
        set_gradients(params, number)
        set_gradients(others, number)
        ours.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.01 / (number + 1)
        ours.step()
        for batch in plain._plan:
            batch.bound.step = None
        plain.step()
    assert is_prepared(ours)
    assert_same(ours, plain)
