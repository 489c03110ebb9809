"""What a step does with parameters, gradients and settings that are out of the ordinary."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_optim_state import NAMES, make

from bitsandbytes import optim, paging
from bitsandbytes.backends.registry import REGISTRY
from bitsandbytes.contract import OPS
from bitsandbytes.errors import ArgumentError
from bitsandbytes.ops.optim_storage import round_stochastically
from bitsandbytes.optim.engine import Batch
from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State, Optimizer8bit


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """A random parameter with a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    p.grad = torch.randn(shape, generator=generator).to(dtype)
    return p


@pytest.fixture
def manager() -> Any:
    """The override manager, empty before and after."""
    instance = optim.GlobalOptimManager.get_instance()
    instance.initialize()
    yield instance
    instance.initialize()


# --- parameters and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_frozen_parameters(name: str) -> None:
    full, alone = parameter(8192), parameter(8192)
    empty, wide, frozen = parameter(0), parameter(0, 16), torch.nn.Parameter(torch.ones(5000))
    optimizer = make(name, [empty, full, wide, frozen])
    optimizer.step()
    make(name, [alone]).step()
    assert torch.equal(full, alone)
    assert torch.equal(frozen, torch.ones(5000))
    other = make(name, [parameter(0), parameter(8192), parameter(0, 16), torch.nn.Parameter(torch.ones(5000))])
    other.load_state_dict(optimizer.state_dict())
    other.step()


@pytest.mark.parametrize("name", NAMES)
def test_strided_parameters_and_gradients(name: str) -> None:
    dense = parameter(96, 70)
    storage = torch.zeros(70, 200)
    view = storage.t()[4:100]
    view.data.copy_(dense.data)
    p = torch.nn.Parameter(view)
    p.grad = torch.randn(70, 96).t()
    p.grad.copy_(dense.grad)
    assert not p.is_contiguous()
    assert not p.grad.is_contiguous()
    kept = p.grad.clone()
    for q in (dense, p):
        optimizer = make(name, [q])
        optimizer.step()
        optimizer.step()
    assert torch.equal(p, dense)
    assert torch.equal(p.grad, kept)
    assert p.data_ptr() == view.data_ptr()
    assert bool((storage[:, :4] == 0).all())
    assert bool((storage[:, 100:] == 0).all()), "wrote outside of the parameter"


@pytest.mark.parametrize("name", ["Adam8bit", "SGD", "Adagrad8bit", "Lion"])
def test_sparse_gradients_are_like_dense_ones(name: str) -> None:
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(100, 64, sparse=sparse)
        optimizer = make(name, table.parameters())
        for step in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 2, 2, 7 + step])).square().sum().backward()
            assert table.weight.grad.is_sparse == sparse
            optimizer.step()
        results.append(table.weight.detach())
    assert torch.equal(*results)


def test_gradients_appear_and_disappear() -> None:
    early, late = parameter(5000), parameter(5000, seed=1)
    gradient = late.grad
    late.grad = None
    optimizer = optim.AdamW8bit([early, late])
    optimizer.step()
    optimizer.step()
    assert late not in optimizer.state
    late.grad = gradient
    optimizer.step()
    early.grad = None
    before = early.detach().clone()
    optimizer.step()
    assert torch.equal(early, before)
    assert optimizer.state[early]["step"] == 3
    assert optimizer.state[late]["step"] == 2
    alone = parameter(5000, seed=1)
    single = optim.AdamW8bit([alone])
    single.step()
    single.step()
    assert torch.equal(alone, late)


def test_schedules_follow_each_parameters_own_step() -> None:
    first, second, alone = parameter(300), parameter(300, seed=1), parameter(300, seed=1)
    gradient = second.grad
    second.grad = None
    optimizer = optim.AdEMAMix([first, second], t_alpha=10, t_beta3=10)
    optimizer.step()
    second.grad = gradient
    optimizer.step()
    single = optim.AdEMAMix([alone], t_alpha=10, t_beta3=10)
    single.step()
    assert torch.equal(second, alone)


def test_parameter_changes_its_dtype_between_steps() -> None:
    layer = torch.nn.Linear(100, 100)
    optimizer = optim.AdamW8bit(layer.parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        layer.to(dtype)
        layer.zero_grad()
        layer(torch.ones(2, 100, dtype=dtype)).sum().backward()
        before = layer.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(layer.weight, before)
    assert optimizer.state[layer.weight]["step"] == 3


def test_gradient_of_another_dtype() -> None:
    p, q = parameter(5000, dtype=torch.bfloat16), parameter(5000, dtype=torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch keeps gradients in the dtype of their parameter")
    p.grad = None
    p.grad_dtype = torch.float32
    p.grad = q.grad.float()
    for x in (p, q):
        optim.AdamW8bit([x]).step()
    assert torch.equal(p, q)


def test_one_call_serves_all_parameters_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [parameter(size) for size in (5000, 6000, 10, 20, 7000)]
    params += [parameter(size, dtype=torch.bfloat16) for size in (5000, 10)]
    optimizer = optim.Adam8bit(params)
    optimizer.step()
    calls = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (OPS["optimizer_step_8bit"].overload, OPS["optimizer_step_32bit"].overload):
                calls.append(len(args[2]))
            return function(*args, **(kwargs or {}))

    with Counted():
        optimizer.step()
    assert sorted(calls) == [1, 1, 2, 3]


# --- settings ---------------------------------------------------------------------------------------


def test_closure() -> None:
    p = torch.nn.Parameter(torch.full((10,), 2.0))
    optimizer = optim.SGD([p], 0.1, 0.9)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 40.0
    torch.testing.assert_close(p.detach(), torch.full((10,), 1.6))


def test_step_does_not_record_gradients() -> None:
    p = parameter(300)
    optim.Adam([p]).step()
    assert p.requires_grad
    assert p.grad_fn is None


def test_groups_have_settings_of_their_own() -> None:
    fast, slow, added = (parameter(5000) for _ in range(3))
    optimizer = optim.AdamW8bit([{"params": [fast], "lr": 0.1}, {"params": [slow], "weight_decay": 0.5}], lr=0.01)
    optimizer.step()
    optimizer.add_param_group({"params": [added], "lr": 0.0})
    before = added.detach().clone()
    optimizer.step()
    assert torch.equal(added, before)
    assert optimizer.state[added]["step"] == 1
    alone = parameter(5000)
    single = optim.AdamW8bit([alone], lr=0.1)
    single.step()
    single.step()
    assert torch.equal(fast, alone)
    assert not torch.equal(fast, slow)


@pytest.mark.parametrize("bits", [8, 32])
def test_skip_zeros_leaves_elements_and_states(bits: int) -> None:
    p = parameter(5000)
    optimizer = Optimizer2State("adam", [p], lr=0.1, weight_decay=0.1, optim_bits=bits, skip_zeros=True)
    optimizer.step()
    first = {key: value.clone() for key, value in optimizer.state[p].items() if key != "step"}
    before = p.detach().clone()
    p.grad.zero_()
    p.grad[7] = 1e-3
    optimizer.step()
    moved = (p != before).nonzero().flatten()
    assert moved.tolist() == [7]
    state = optimizer.state[p]
    if bits == 32:
        assert (state["state1"] != first["state1"]).nonzero().flatten().tolist() == [7]
        return
    # Only the block of element 7 is quantized anew.
    assert torch.equal(state["state1"][256:], first["state1"][256:])
    assert torch.equal(state["absmax2"][1:], first["absmax2"][1:])


def test_gnorm_scale_of_a_group() -> None:
    scaled, plain = parameter(300), parameter(300)
    plain.grad *= 0.25
    optim.Adam([{"params": [scaled], "gnorm_scale": 0.25}], eps=1e-3).step()
    optim.Adam([plain], eps=1e-3).step()
    torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("name", ["LAMB", "LAMB8bit"])
def test_lamb_limits_the_norm(name: str) -> None:
    p = torch.nn.Parameter(torch.full((4096,), 0.01))
    p.grad = torch.ones(4096)
    make(name, [p], lr=1e-3, weight_decay=0.0, max_unorm=1.0).step()
    # Adam's update has norm 64 and the limit is 0.64.
    torch.testing.assert_close(p.detach(), torch.full((4096,), 0.00999), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["LAMB", "LARS"])
def test_zero_parameters_can_leave_zero(name: str) -> None:
    p = torch.nn.Parameter(torch.zeros(10))
    p.grad = torch.ones(10)
    make(name, [p]).step()
    assert bool((p < 0).all())


def test_lamb_with_coupled_decay() -> None:
    p = torch.nn.Parameter(torch.ones(10))
    p.grad = torch.full((10,), -0.5)
    optim.LAMB([p], lr=0.1, weight_decay=0.5, adam_w_mode=False, max_unorm=0.0).step()
    # Decay and gradient cancel.
    torch.testing.assert_close(p.detach(), torch.ones(10))


def test_lamb_for_a_linear_layer() -> None:
    layer = torch.nn.Linear(10, 2)
    layer(torch.ones(3, 10)).sum().backward()
    optim.LAMB(layer.parameters()).step()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


@pytest.mark.parametrize(("size", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_min_8bit_size(size: int, dtype: torch.dtype) -> None:
    p = parameter(size)
    optimizer = optim.Adam8bit([p])
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == dtype
    small = parameter(3)
    optimizer = optim.Adam8bit([small], min_8bit_size=0)
    optimizer.step()
    assert optimizer.state[small]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["Lion32bit", "Lion8bit", "PagedLion8bit", "PagedLion"])
def test_lion_decays_outside_of_the_sign(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(4096))
    p.grad = torch.full((4096,), -0.1)
    optimizer = make(name, [p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4096,), 1.05))
    if "8bit" not in name:
        torch.testing.assert_close(optimizer.state[p]["state1"], torch.full((4096,), -0.001))


@pytest.mark.parametrize("name", ["AdEMAMix32bit", "PagedAdEMAMix32bit"])
def test_ademamix_32bit(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(4096))
    p.grad = torch.ones(4096)
    optimizer = make(name, [p], lr=1e-3, weight_decay=0.0)
    optimizer.step()
    assert optimizer.state[p]["state1"].shape == (2, 4096)
    torch.testing.assert_close(p.detach(), torch.full((4096,), 0.9989995), rtol=0, atol=1e-7)
    results = []
    for kind, extra in ((name, {}), ("AdEMAMix", {"optim_bits": 32})):
        q = parameter(4096)
        optimizer = make(kind, [q], t_alpha=100, t_beta3=100, **extra)
        for _ in range(5):
            optimizer.step()
        results.append(q.detach())
    assert torch.equal(*results)


def test_learning_rate_as_a_tensor() -> None:
    rate, number = parameter(300), parameter(300)
    optim.AdamW([rate], lr=torch.tensor(0.125)).step()
    optim.AdamW([number], lr=0.125).step()
    assert torch.equal(rate, number)


def test_betas_as_text() -> None:
    assert optim.Adam([parameter(3)], betas="(0.8, 0.95)").defaults["betas"] == (0.8, 0.95)
    assert optim.AdEMAMix([parameter(3)], betas="0.8, 0.95, 0.99").defaults["betas"] == (0.8, 0.95, 0.99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_capturable_step_counts_on_the_device(name: str, dtype: torch.dtype) -> None:
    captured, plain = parameter(5000, dtype=dtype), parameter(5000, dtype=dtype)
    schedules = {"t_alpha": 4, "t_beta3": 4} if "AdEMAMix" in name else {}
    optimizers = [make(name, [{"params": [captured], "capturable": True}], **schedules)]
    optimizers.append(make(name, [plain], **schedules))
    for _ in range(6):
        for optimizer in optimizers:
            optimizer.step()
    step = optimizers[0].state[captured]["step"]
    assert isinstance(step, torch.Tensor)
    assert optimizers[0].state_dict()["state"][0]["step"] == 6
    # Schedules and corrections are computed in another order, so the last bits may differ.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(captured, plain, rtol=4 * unit, atol=4 * unit * 0.01)


def test_capturable_state_loads() -> None:
    p = parameter(5000)
    optimizer = optim.AdamW8bit([{"params": [p], "capturable": True}])
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: optim.Adam8bit(p, amsgrad=True), "amsgrad"),
        (lambda p: optim.AdamW8bit(p, amsgrad=True), "amsgrad"),
        (lambda p: optim.PagedAdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: optim.LAMB(p, amsgrad=True), "amsgrad"),
        (lambda p: optim.LAMB(p, bias_correction=False), "bias_correction"),
        (lambda p: optim.Adam8bit(p, optim_bits=16), "optim_bits"),
        (lambda p: optim.Adam(p, optim_bits=16), "optim_bits"),
        (lambda p: optim.Adam32bit(p, optim_bits=8), "optim_bits"),
        (lambda p: optim.Adam(p, lr=-1.0), "learning rate"),
        (lambda p: optim.Adam(p, lr=float("nan")), "learning rate"),
        (lambda p: optim.Adam(p, eps=-1.0), "epsilon"),
        (lambda p: optim.Adam(p, betas=(0.9, 1.0)), "beta parameter at index 1"),
        (lambda p: optim.Adam(p, betas=(0.9,)), "betas"),
        (lambda p: optim.Adam(p, betas="x"), "betas"),
        (lambda p: optim.AdEMAMix(p, betas=(0.9, 0.99)), "betas"),
        (lambda p: optim.AdEMAMix(p, t_alpha=0), "t_alpha"),
        (lambda p: optim.Adam(p, weight_decay=-0.1), "weight_decay"),
        (lambda p: optim.SGD(p, 0.1), "momentum"),
        (lambda p: optim.LARS(p, 0.1), "momentum"),
        (lambda p: optim.RMSprop(p, momentum=0.9), "momentum"),
        (lambda p: optim.RMSprop(p, centered=True), "centered"),
        (lambda p: optim.RMSprop(p, alpha=0), "alpha"),
        (lambda p: optim.Adagrad(p, lr_decay=0.1), "lr_decay"),
        (lambda p: optim.Adagrad8bit(p, initial_accumulator_value=0.1), "initial_accumulator_value"),
        (lambda p: Optimizer2State("adamax", p), "optimizer_name"),
        (lambda p: Optimizer1State("adam", p), "optimizer_name"),
        (lambda p: optim.Adam([]), "empty"),
    ],
)
def test_refused_arguments(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call([parameter(3)])


@pytest.mark.parametrize("name", ["SGD", "LARS"])
def test_missing_momentum_is_not_implemented(name: str) -> None:
    with pytest.raises(NotImplementedError):
        getattr(optim, name)([parameter(3)], lr=0.1)


@pytest.mark.parametrize("name", ["Adam8bit", "PagedAdamW", "Lion8bit", "LAMB32bit"])
@pytest.mark.parametrize("unknown", ["block_wise", "percentile_clipping"])
def test_unknown_arguments(name: str, unknown: str) -> None:
    with pytest.raises(TypeError, match=unknown):
        make(name, [parameter(3)], **{unknown: True})


def test_historical_bits_are_accepted() -> None:
    p = parameter(8192)
    optimizer = optim.Adam8bit([p], optim_bits=32)
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    assert optimizer.args.optim_bits == 8
    assert optim.Adam8bit([p], optim_bits=8).args.optim_bits == 8
    assert optim.AdamW([p]).args.optim_bits == 32


def test_settings_as_an_object() -> None:
    class Settings:
        optim_bits, min_8bit_size, max_unorm, skip_zeros = 8, 10, 0.0, False

        def __init__(self) -> None:
            self.optim_bits, self.min_8bit_size = 8, 10
            self.max_unorm, self.skip_zeros = 0.0, False

    p = parameter(20)
    optimizer = optim.Adam([p], args=Settings())
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == torch.uint8


def test_subclass_with_a_step_of_its_own() -> None:
    seen = []

    class Logged(Optimizer2State):
        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            seen.append((gindex, pindex))
            super().update_step(group, p, gindex, pindex)

    mine, plain = [parameter(5000), parameter(20)], [parameter(5000), parameter(20)]
    logged = Logged("adam", mine, optim_bits=8)
    usual = optim.Adam8bit(plain)
    for _ in range(3):
        logged.step()
        usual.step()
    assert seen == [(0, 0), (0, 1)] * 3
    assert all(torch.equal(p, q) for p, q in zip(mine, plain, strict=True))


# --- non-finite gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam8bit", "Lion8bit", "AdEMAMix8bit"])
def test_non_finite_gradient_spoils_nothing_but_its_element(name: str) -> None:
    p = parameter(5000)
    optimizer = make(name, [p])
    p.grad[3], p.grad[300] = float("nan"), float("inf")
    optimizer.step()
    for key, value in optimizer.state[p].items():
        if key.startswith("absmax"):
            assert torch.isfinite(value).all()
    p.grad = torch.ones(5000)
    p.data[3], p.data[300] = 0.0, 0.0
    optimizer.step()
    assert torch.isfinite(p).all()


# --- stochastic rounding ----------------------------------------------------------------------------


def test_stochastic_rounding_keeps_the_expectation() -> None:
    exact = torch.tensor([1.0 + 2.0**-10, -3.1415926, 1e-20, 0.0, 7.5e30]).repeat_interleave(20000)
    rounded = torch.stack([round_stochastically(exact, seed, 1).float() for seed in range(5)])
    neighbours = (rounded - exact).abs() <= exact.abs() * 2.0**-7
    assert bool(neighbours.all())
    for value, mean in zip(exact[::20000], rounded.reshape(5, 5, 20000).mean(dim=(0, 2)), strict=True):
        assert abs(float(mean - value)) <= abs(float(value)) * 2.0**-7 * 4 / 100000**0.5
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.5])
    assert torch.equal(round_stochastically(special, 0, 1)[1:].float(), special[1:])
    assert bool(round_stochastically(special, 0, 1)[0].isnan())


def test_stochastic_rounding_lets_small_updates_add_up() -> None:
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = optim.AdamW([{"params": [p], "stochastic_rounding": stochastic}], lr=1e-4, weight_decay=0.0)
        p.grad = torch.ones_like(p)
        for _ in range(100):
            optimizer.step()
        moved = 1.0 - p.float().mean().item()
        # Each update is a fortieth of the spacing of bfloat16 below one, so the nearest value never changes.
        assert moved == pytest.approx(0.01 if stochastic else 0.0, abs=1e-3)


def test_stochastic_rounding_differs_between_parameters_and_repeats() -> None:
    def once() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
        for p in params:
            p.grad = torch.ones_like(p)
        optim.AdamW([{"params": params, "stochastic_rounding": True}], lr=1e-3).step()
        return params

    first, second = once()
    assert not torch.equal(first, second)
    assert all(torch.equal(p, q) for p, q in zip((first, second), once(), strict=True))


# --- overrides --------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(1000, 64)
        self.fc = torch.nn.Linear(64, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.emb(x))


def stepped(net: Net, **settings: Any) -> Optimizer8bit:
    """An 8-bit Adam after one step."""
    optimizer = optim.Adam(net.parameters(), optim_bits=8, **settings)
    net(torch.arange(10)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("order", ["before", "after", "unregistered", "late"])
def test_override_by_parameter(manager: Any, order: str) -> None:
    net = Net()
    if order == "before":
        manager.override_config(net.emb.weight, "optim_bits", 32)
    if order != "unregistered":
        manager.register_parameters(net.parameters())
    net = net.to("cpu")
    if order in ("after", "unregistered"):
        manager.override_config(net.emb.weight, "optim_bits", 32)
    optimizer = optim.Adam(net.parameters(), optim_bits=8)
    if order == "late":
        manager.override_config(net.emb.weight, "optim_bits", 32)
    net(torch.arange(10)).sum().backward()
    optimizer.step()
    assert optimizer.state[net.emb.weight]["state1"].dtype == torch.float32
    assert optimizer.state[net.fc.weight]["state1"].dtype == torch.uint8
    assert "absmax1" in optimizer.state[net.fc.weight]


def test_override_by_module(manager: Any) -> None:
    net = Net()
    manager.register_module_override(net.emb, "weight", {"optim_bits": 32})
    optimizer = stepped(net)
    assert optimizer.state[net.emb.weight]["state1"].dtype == torch.float32
    assert optimizer.state[net.fc.weight]["state1"].dtype == torch.uint8


def test_override_of_several_keys_and_parameters(manager: Any) -> None:
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    manager.override_config(list(net.fc.parameters()), key_value_dict={"lr": 0.25, "betas": (0.5, 0.5)})
    optimizer, other = stepped(net, lr=0.01), stepped(plain, lr=0.25, betas=(0.5, 0.5))
    assert torch.equal(net.fc.weight, plain.fc.weight)
    assert torch.equal(net.fc.bias, plain.fc.bias)
    assert not torch.equal(net.emb.weight, plain.emb.weight)
    config = optimizer.get_config(0, 1, optimizer.param_groups[0])
    assert (config["lr"], config["betas"], config["optim_bits"]) == (0.25, (0.5, 0.5), 8)
    # A change counts from the next step on.
    manager.override_config(net.fc.weight, "lr", 0.0)
    before = net.fc.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.fc.weight, before)
    other.step()


def test_override_does_not_outlive_its_parameter(manager: Any) -> None:
    for _ in range(20):
        p = parameter(5000)
        manager.override_config(p, "optim_bits", 32)
        assert manager.pid2config == {id(p): {"optim_bits": 32}}
        del p
    assert manager.pid2config == {}
    q = parameter(5000)
    optimizer = optim.Adam8bit([q])
    optimizer.step()
    assert optimizer.state[q]["state1"].dtype == torch.uint8
    net = Net()
    manager.register_module_override(net.emb, "weight", {"optim_bits": 32})
    del net
    assert manager.module_weight_config_triple == []
    assert not manager.uses_config_override


def test_override_refuses_what_it_does_not_know(manager: Any) -> None:
    p = parameter(3)
    with pytest.raises(ArgumentError, match="optim_bit"):
        manager.override_config(p, "optim_bit", 32)
    with pytest.raises(ArgumentError, match="no setting"):
        manager.override_config(p)
    with pytest.raises(ArgumentError, match="tensors"):
        manager.override_config(["weight"], "lr", 1.0)
    with pytest.raises(RuntimeError, match="get_instance"):
        optim.GlobalOptimManager()


# --- paging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("Paged")])
def test_paged_is_plain_where_nothing_can_be_paged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "_noted", set())
    paged, plain = parameter(400, 300), parameter(400, 300)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind, p in ((name, paged), (name.removeprefix("Paged"), plain)):
            optimizer = make(kind, [p, parameter(10)])
            for _ in range(3):
                optimizer.step()
    assert torch.equal(paged, plain)
    notes = [str(warning.message) for warning in caught if issubclass(warning.category, paging.PagingWarning)]
    assert len(notes) == 1
    assert "'cpu'" in notes[0]
    assert "install" not in notes[0]


class RecordingPager:
    """Pages made of plain memory, and a diary."""

    def __init__(self) -> None:
        self.diary: list[str] = []

    def allocate(self, shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.diary.append(f"allocate {tuple(shape)}")
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def prefetch(self, tensor: torch.Tensor, to_cpu: bool) -> None:
        self.diary.append(f"prefetch {tuple(tensor.shape)}")


class KnowingPager(RecordingPager):
    """A pager that can tell whether its memory may be elsewhere, and fetch it beside the work."""

    gone = 0

    def departures(self, device: torch.device) -> int:
        self.diary.append(f"departures {device.type}")
        return self.gone

    def fetch(self, tensors: Any) -> Any:
        names = " ".join(str(tensor.numel()) for tensor in tensors)
        self.diary.append(f"fetch {names}")
        return lambda: self.diary.append(f"arrive {names}")


@pytest.fixture(params=[RecordingPager, KnowingPager])
def pager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pager for the CPU; portions take two states of 100 000 bytes and more."""
    instance = request.param()
    monkeypatch.setattr("bitsandbytes.optim.base.PAGED_PORTION", 150_000)
    paging.set_pager("cpu", lambda: instance)
    yield instance
    paging.set_pager("cpu", None)


knowing = pytest.mark.parametrize("pager", [KnowingPager], indirect=True)


def large(count: int) -> list[torch.nn.Parameter]:
    return [parameter(100_000 + number) for number in range(count)]


def note_steps(pager: RecordingPager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the diary tell when a batch is worked on."""
    run = Batch.run

    def noted(batch: Batch, gradients: list[torch.Tensor]) -> None:
        pager.diary.append(f"step {batch.params[0].numel()}")
        run(batch, gradients)

    monkeypatch.setattr(Batch, "run", noted)


@pytest.mark.parametrize("pager", [RecordingPager], indirect=True)
def test_paged_states_are_fetched_ahead(pager: RecordingPager, monkeypatch: pytest.MonkeyPatch) -> None:
    params, others = [*large(3), parameter(5000)], [*large(3), parameter(5000)]
    optimizer, plain = optim.PagedAdamW8bit(params), optim.AdamW8bit(others)
    assert isinstance(optimizer, Optimizer8bit)
    optimizer.step()
    assert pager.diary.count("allocate (100000,)") == 2
    assert not any("5000" in entry for entry in pager.diary if entry.startswith("allocate"))
    pager.diary.clear()
    note_steps(pager, monkeypatch)
    optimizer.step()
    first, second, third = (f"prefetch ({100_000 + number},)" for number in range(3))
    steps = [f"step {size}" for size in (100_000, 100_001, 100_002, 5000)]
    assert pager.diary == [first, first, second, second, steps[0], third, third, *steps[1:]]
    optimizer.prefetch_state(params[0])
    assert pager.diary[-2:] == [first, first]
    plain.step()
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@knowing
def test_one_batch_ahead_moves_beside_the_work(pager: KnowingPager, monkeypatch: pytest.MonkeyPatch) -> None:
    params, others = large(3), large(3)
    optimizer, plain = optim.PagedAdamW8bit(params), optim.AdamW8bit(others)
    optimizer.step()
    plain.step()
    note_steps(pager, monkeypatch)
    for gone in (1, 2):
        pager.diary.clear()
        pager.gone = gone
        optimizer.step()
        first, second, third = (f"{100_000 + number} {100_000 + number}" for number in range(3))
        assert pager.diary == [
            "departures cpu",
            f"fetch {first}",
            f"fetch {second}",
            f"arrive {first}",
            "step 100000",
            f"fetch {third}",
            f"arrive {second}",
            "step 100001",
            f"arrive {third}",
            "step 100002",
        ]
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@knowing
def test_paged_states_that_are_there_are_not_fetched(pager: KnowingPager) -> None:
    """Each optimizer fetches once after a departure; new states are made on the device."""
    optimizers = [optim.PagedAdamW8bit(large(2)), optim.PagedLion8bit(large(1))]
    for gone, fetches in ((0, [0, 0]), (0, [0, 0]), (1, [2, 1]), (1, [0, 0]), (3, [2, 1]), (3, [0, 0])):
        pager.gone = gone
        for optimizer, expected in zip(optimizers, fetches, strict=True):
            pager.diary.clear()
            optimizer.step()
            assert sum(entry.startswith("fetch") for entry in pager.diary) == expected
            assert pager.diary.count("departures cpu") == 1
    assert paging.departures(torch.device("meta")) == 0


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdEMAMix8bit", "PagedLion32bit"])
def test_loaded_states_are_paged(pager: RecordingPager, name: str) -> None:
    params, others = [*large(1), parameter(5000)], [*large(1), parameter(5000)]
    first, second = getattr(optim, name)(params), getattr(optim, name)(others)
    first.step()
    others[0].data.copy_(params[0])
    others[1].data.copy_(params[1])
    pager.diary.clear()
    second.load_state_dict(first.state_dict())
    states = [second.state[p][key] for p in others for key in ("state1", "state2") if key in second.state[p]]
    assert [hasattr(state, "is_paged") for state in states] == [state.numel() >= 100_000 for state in states]
    kinds = [entry.split()[0] for entry in pager.diary]
    assert kinds == ["allocate", "prefetch"] * sum(state.numel() >= 100_000 for state in states)
    pager.diary.clear()
    first.step()
    second.step()
    assert not any(entry.startswith("fetch") for entry in pager.diary)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_the_first_paged_state_loads_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = RecordingPager()
    monkeypatch.setattr(REGISTRY, "binder", lambda op, device: paging.set_pager(device, lambda: instance))
    try:
        params = large(1)
        optim.PagedAdamW8bit(params).step()
        assert instance.diary.count("allocate (100000,)") == 2
    finally:
        paging.set_pager("cpu", None)


@knowing
def test_a_step_without_memory_for_a_state_can_be_repeated(
    pager: KnowingPager, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, others = large(3), large(3)
    optimizer, plain = optim.PagedAdamW8bit(params), optim.AdamW8bit(others)
    for late in (params[1], others[1]):
        late.grad = None
    optimizer.step()
    plain.step()
    for late in (params[1], others[1]):
        late.grad = torch.ones_like(late)
    with monkeypatch.context() as patch:
        patch.setattr(pager, "allocate", _no_memory)
        with pytest.raises(MemoryError):
            optimizer.step()
    optimizer.step()
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def _no_memory(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    raise MemoryError


# --- with the rest of torch -------------------------------------------------------------------------


def test_grad_scaler() -> None:
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = optim.AdamW8bit([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[p]["step"] == 2
    assert torch.isfinite(p).all()
    assert scaler.get_scale() == 512.0


def test_compiled_model() -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = Net()
        optimizer = optim.AdamW8bit(net.parameters(), lr=1e-2)
        forward = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        for _ in range(4):
            optimizer.zero_grad()
            loss = forward(torch.arange(10)).square().sum()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_step_hooks_and_zero_grad() -> None:
    p = parameter(300)
    optimizer = optim.Adam8bit([p])
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    optimizer.step()
    optimizer.zero_grad()
    assert calls == ["pre", "post"]
    assert p.grad is None
