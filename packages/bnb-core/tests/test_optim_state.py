"""State dicts of optimizers: layout, older layouts, bit-exact resuming, pickles, devices and dtypes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from optim_runs import parameters, resumed, snapshot, train

from bitsandbytes import optim
from bitsandbytes.errors import CheckpointError

KEY = "__bnb_optimizer_quant_state__"
NAMES = [name for name in optim.__all__ if name not in ("GlobalOptimManager", "PytorchLARS")]


def make(name: str, params: Any, **settings: Any) -> torch.optim.Optimizer:
    """The optimizer of that name, with what its constructor requires."""
    if name.startswith(("SGD", "LARS")):
        settings = {"lr": 0.01, "momentum": 0.9, **settings}
    if name.startswith("Muon"):
        params = groups_for_muon(list(params))
    return getattr(optim, name)(params, **settings)


def groups_for_muon(params: list[Any]) -> list[dict[str, Any]]:
    """Groups of matrices and of the rest, from parameters or groups."""
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    parts = [
        {**group, "params": [p for p in group["params"] if (p.dim() == 2) == matrices], "use_muon": matrices}
        for group in groups
        for matrices in (True, False)
    ]
    return [part for part in parts if part["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_equals_uninterrupted_run(name: str, dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    train(make(name, whole), whole, range(12))

    begun = parameters(dtype)
    optimizer = make(name, begun)
    train(optimizer, begun, range(7))

    loaded, optimizer = resumed(snapshot(optimizer, begun), lambda params: make(name, params))
    for p in loaded:
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype in (torch.uint8, torch.float32), f"{key} was cast to {value.dtype}"
    train(optimizer, loaded, range(7, 12))
    for p, q in zip(whole, loaded, strict=True):
        assert torch.equal(p, q)


def test_layout_is_that_of_upstream() -> None:
    params = parameters()
    optimizer = optim.LAMB8bit(params)
    train(optimizer, params, range(2))
    state = optimizer.state_dict()["state"]
    assert set(state[0]) == {"step", KEY}
    assert state[0]["step"] == 2
    assert type(state[0]["step"]) is int
    quant = state[0][KEY]
    assert set(quant) == {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"}
    assert quant["state1"].dtype == quant["state2"].dtype == torch.uint8
    assert quant["state1"].shape == quant["state2"].shape == (65, 130)
    assert quant["absmax1"].shape == quant["absmax2"].shape == (34,)
    assert quant["qmap1"].shape == quant["qmap2"].shape == (256,)
    assert quant["qmap1"].min() < 0.0 == quant["qmap2"].min()
    assert quant["unorm_vec"].shape == (1,)
    small = state[1][KEY]
    assert set(small) == {"state1", "state2", "unorm_vec"}
    assert small["state1"].dtype == torch.float32
    # Saving leaves the optimizer as it was.
    assert "state1" in optimizer.state[params[0]]


def test_ademamix_layout_stacks_two_averages() -> None:
    params = parameters()
    for name, dtype in (("AdEMAMix8bit", torch.uint8), ("AdEMAMix32bit", torch.float32)):
        optimizer = make(name, params)
        train(optimizer, params, range(1))
        state = optimizer.state[params[0]]
        assert state["state1"].shape == (2, 65, 130)
        assert state["state1"].dtype == state["state2"].dtype == dtype
        assert state["state2"].shape == (65, 130)
    assert optimizer.state[params[2]]["state1"].shape == (2, 0, 16)


def flat(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The layout before the nested one: tensors beside ``step``."""
    state = {key: {"step": s["step"], **s[KEY]} for key, s in state_dict["state"].items()}
    return {"state": state, "param_groups": state_dict["param_groups"]}


def test_flat_layout_loads() -> None:
    params, others = parameters(), parameters()
    optimizer, other = optim.AdamW8bit(params), optim.AdamW8bit(others)
    train(optimizer, params, range(3))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(flat(optimizer.state_dict()))
    train(optimizer, params, range(3, 5))
    train(other, others, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_blocks_of_2048_load_exactly() -> None:
    params = parameters()
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, range(3))
    old = flat(copy.deepcopy(optimizer.state_dict()))
    wide = {key: torch.rand(5) for key in ("absmax1", "absmax2")}
    old["state"][0].update(wide)
    optimizer.load_state_dict(old)
    for key, absmax in wide.items():
        loaded = optimizer.state[params[0]][key]
        assert loaded.shape == (34,)
        assert torch.equal(loaded, absmax.repeat_interleave(8)[:34])


def test_single_maximum_loads_exactly() -> None:
    params = parameters()
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, range(3))
    old = flat(copy.deepcopy(optimizer.state_dict()))
    for number in (1, 2):
        del old["state"][0][f"absmax{number}"]
        old["state"][0][f"max{number}"] = torch.tensor([0.5 * number])
        old["state"][0][f"new_max{number}"] = torch.tensor([7.0])
    optimizer.load_state_dict(old)
    state = optimizer.state[params[0]]
    assert torch.equal(state["absmax1"], torch.full((34,), 0.5))
    assert torch.equal(state["absmax2"], torch.full((34,), 1.0))
    assert "max1" not in state
    train(optimizer, params, range(3, 4))


def test_loaded_state_shares_no_memory() -> None:
    params = parameters()
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, range(3))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other_params = parameters()
    other = optim.Adam8bit(other_params)
    other.load_state_dict(state)
    train(other, other_params, range(3, 6))
    for index, saved in before["state"].items():
        for key, value in saved[KEY].items():
            assert torch.equal(state["state"][index][KEY][key], value)
    assert state["param_groups"] == before["param_groups"]


def test_loaded_states_share_one_codebook() -> None:
    params = [torch.nn.Parameter(torch.randn(5000)) for _ in range(3)]
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, range(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len({id(optimizer.state[p]["qmap1"]) for p in params}) == 1


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda s: s["state"][0][KEY].update(state1=torch.zeros(3, dtype=torch.uint8)), "state1"),
        (lambda s: s["state"][0][KEY].update(state1=torch.zeros(65, 130, dtype=torch.float16)), "state1"),
        (lambda s: s["state"][0][KEY].pop("state2"), "state2"),
        (lambda s: s["state"][0][KEY].update(absmax1=torch.zeros(3)), "absmax1"),
        (lambda s: s["state"][0][KEY].update(qmap2=torch.zeros(3)), "qmap2"),
        (lambda s: s["state"][0][KEY].pop("absmax2"), "absmax2"),
        (lambda s: s["state"][0].update({KEY: [1]}), KEY),
        (lambda s: s["state"][0].pop("step"), "step"),
        (lambda s: s["state"][0].update(step="7"), "step"),
        (lambda s: s["param_groups"].append({"params": [9]}), "groups"),
        (lambda s: s["param_groups"][0]["params"].pop(), "parameters"),
        (lambda s: s["state"].update({0: {"step": 3, "exp_avg": torch.zeros(65, 130)}}), "exp_avg"),
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(damage: Any, text: str) -> None:
    params = parameters()
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=text):
        optimizer.load_state_dict(state)
    for index, saved in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][index][KEY][key]) for key, value in saved[KEY].items())


def test_state_of_another_number_of_bits_stays_as_it_was_saved() -> None:
    params, others = parameters(), parameters()
    eight, full = optim.Adam8bit(params), optim.Adam32bit(others)
    train(eight, params, range(2))
    full.load_state_dict(eight.state_dict())
    train(full, others, range(2, 4))
    assert full.state[others[0]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    "name", ["Adam8bit", "PagedLion32bit", "AdEMAMix8bit", "LARS", "ScheduleFreeAdamW8bit", "Muon8bit", "CAME8bit"]
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_like_the_original(name: str, copied: Any) -> None:
    optimizer = make(name, parameters())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    train(optimizer, params, range(3))
    twin = copied(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    assert twin.optimizer_name == optimizer.optimizer_name
    assert vars(twin.args) == vars(optimizer.args)
    train(optimizer, params, range(3, 5))
    train(twin, twins, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_state_hooks_run() -> None:
    params = parameters()
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, range(1))
    calls = []
    optimizer.register_state_dict_post_hook(lambda opt, state: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "loading", "loaded"]


def test_move_to_device_false_leaves_state_where_it_is() -> None:
    params = [torch.nn.Parameter(torch.randn(5000))]
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, range(1))
    meta = copy.deepcopy(optimizer.state_dict())
    target = optim.Adam8bit([torch.nn.Parameter(torch.empty(5000, device="meta"))])
    target.load_state_dict(meta, move_to_device=False)
    state = next(iter(target.state.values()))
    assert state["state1"].device.type == "cpu"
    assert state["state1"].dtype == torch.uint8
    assert state["step"] == 1
    target.load_state_dict(meta)
    assert next(iter(target.state.values()))["state1"].device.type == "meta"
