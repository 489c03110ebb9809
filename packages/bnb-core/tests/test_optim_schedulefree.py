"""Schedule-free AdamW: its two sets of parameters, its counters, and bits that must not get lost."""

from __future__ import annotations

import copy
from typing import Any

import optim_references as reference
import pytest
import torch
from optim_runs import parameters, resumed, snapshot, train

from bitsandbytes import optim
from bitsandbytes.errors import ArgumentError

KINDS = ("ScheduleFreeAdamW8bit", "ScheduleFreeAdamW32bit")


@pytest.mark.parametrize("beta1", [0.9, 0.98])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_averages_follow_float64(beta1: float, decay: float) -> None:
    params = parameters()
    doubles = [torch.nn.Parameter(p.detach().double()) for p in params]
    ours = optim.ScheduleFreeAdamW(params, 1e-2, (beta1, 0.99), 1e-6, decay, warmup_steps=20, r=0.5)
    theirs = reference.ScheduleFree(doubles, 1e-2, (beta1, 0.99), 1e-6, decay, 20, 0.5, 2.0)
    for step in range(100):
        for p, q in zip(params, doubles, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) + 0.3
            q.grad = p.grad.double()
        ours.step()
        theirs.step()
    start = parameters()
    for p, q, first in zip(params, doubles, start, strict=True):
        assert (p.double() - q).norm() <= 1e-5 * (q - first).norm()
    trained = [p.detach().clone() for p in params]
    ours.eval()
    theirs.average()
    for p, q, first, y in zip(params, doubles, start, trained, strict=True):
        assert (p.double() - q).norm() <= 1e-5 * (q - first).norm()
        assert not p.numel() or (p - y).abs().max() > 1e-3
    ours.train()
    for p, y in zip(params, trained, strict=True):
        torch.testing.assert_close(p, y, rtol=3e-7, atol=3e-7)


def test_first_step_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optim.ScheduleFreeAdamW([p], 0.1, eps=0.0, warmup_steps=2, weight_decay=0.5)
    p.grad = torch.tensor([3.0, 5.0])
    optimizer.step()
    # Half of the learning rate; u is the sign of the gradient plus half the parameter; z, x and y are the same.
    torch.testing.assert_close(p.detach(), torch.tensor([1.0 - 0.05 * 1.5, -2.0]))
    assert optimizer.param_groups[0]["alpha"] == 1.0
    optimizer.eval()
    torch.testing.assert_close(p.detach(), torch.tensor([1.0 - 0.05 * 1.5, -2.0]))


@pytest.mark.parametrize("name", KINDS)
def test_step_needs_training_parameters(name: str) -> None:
    params = parameters()
    optimizer = getattr(optim, name)(params)
    train(optimizer, params, range(3))
    before = [p.detach().clone() for p in params]
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.eval()
    averages = [p.detach().clone() for p in params]
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(params, averages, strict=True))
    with pytest.raises(ArgumentError, match=r"train\(\)"):
        optimizer.step()
    assert optimizer.param_groups[0]["k"] == 3
    optimizer.train()
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 4


def test_modes_may_change_before_the_first_step() -> None:
    params = parameters()
    optimizer = optim.ScheduleFreeAdamW8bit(params)
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_run_saved_in_the_middle_of_an_evaluation_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    optimizer = getattr(optim, name)(whole, warmup_steps=5)
    train(optimizer, whole, range(7))
    optimizer.eval()
    saved = snapshot(optimizer, whole)
    optimizer.train()
    train(optimizer, whole, range(7, 12))

    loaded, optimizer = resumed(saved, getattr(optim, name))
    assert not optimizer.param_groups[0]["train_mode"]
    optimizer.train()
    train(optimizer, loaded, range(7, 12))
    assert all(torch.equal(p, q) for p, q in zip(whole, loaded, strict=True))


def test_groups_average_for_themselves() -> None:
    first, second, alone = parameters()[0], parameters()[0], parameters()[0]
    optimizer = optim.ScheduleFreeAdamW8bit([{"params": [first], "warmup_steps": 4}], lr=1e-2)
    train(optimizer, [first], range(3))
    optimizer.add_param_group({"params": [second], "lr": 2e-2, "r": 1.0})
    train(optimizer, [first, second], range(3, 6))
    single = optim.ScheduleFreeAdamW8bit([alone], lr=2e-2, r=1.0)
    for step in range(3, 6):
        generator = torch.Generator().manual_seed(step)
        torch.randn(first.shape, generator=generator)
        alone.grad = torch.randn(alone.shape, generator=generator)
        single.step()
    assert torch.equal(second, alone)
    assert [group["k"] for group in optimizer.param_groups] == [6, 3]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_counters_on_the_device(decay: float) -> None:
    captured, plain = parameters(), parameters()
    settings = {"lr": 1e-2, "warmup_steps": 5, "r": 1.0, "weight_decay": decay}
    first = optim.ScheduleFreeAdamW([{"params": captured, "capturable": True}], **settings)
    second = optim.ScheduleFreeAdamW(plain, **settings)
    for optimizer, params in ((first, captured), (second, plain)):
        train(optimizer, params, range(9))
    group = first.param_groups[0]
    assert isinstance(group["weight_sum"], torch.Tensor)
    sum_of_weights = group["weight_sum"]
    train(first, captured, range(9, 12))
    train(second, plain, range(9, 12))
    assert group["weight_sum"] is sum_of_weights, "a captured graph would not see it"
    saved, wanted = (optimizer.state_dict()["param_groups"][0] for optimizer in (first, second))
    for key in ("k", "weight_sum", "lr_max", "alpha", "lr_warmup"):
        assert type(saved[key]) is type(wanted[key])
        assert saved[key] == pytest.approx(wanted[key], rel=1e-12)
    for optimizer in (first, second):
        optimizer.eval()
    for p, q in zip(captured, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_learning_rate_of_zero_changes_nothing() -> None:
    params = parameters()
    optimizer = optim.ScheduleFreeAdamW8bit(params, lr=0.0)
    train(optimizer, params, range(3))
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))


def test_stochastic_rounding_keeps_small_updates() -> None:
    distances = []
    for stochastic in (False, True):
        p, exact = (torch.nn.Parameter(torch.ones(20000, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
        optimizer = optim.ScheduleFreeAdamW8bit([{"params": [p], "stochastic_rounding": stochastic}], lr=1e-4)
        other = optim.ScheduleFreeAdamW32bit([exact], lr=1e-4)
        for _ in range(100):
            p.grad, exact.grad = torch.ones_like(p), torch.ones_like(exact)
            optimizer.step()
            other.step()
        distances.append((p.float() - exact).mean().abs().item() / (1.0 - exact).mean().item())
    assert distances[0] > 0.5
    assert distances[1] < 0.1


def test_closure_sees_training_parameters() -> None:
    p = torch.nn.Parameter(torch.full((10,), 2.0))
    optimizer = optim.ScheduleFreeAdamW([p], 0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 40.0
    assert optimizer.step(closure).item() < 40.0


def test_compiled_model_trains_alike() -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 5))
        optimizer = optim.ScheduleFreeAdamW8bit(model.parameters(), lr=1e-2)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for _ in range(4):
            optimizer.zero_grad()
            forward(torch.ones(3, 64)).square().sum().backward()
            optimizer.step()
            optimizer.eval()
            loss = forward(torch.ones(3, 64)).square().sum()
            optimizer.train()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_averages_of_8_bit_states_are_as_good_after_many_steps() -> None:
    """The difference grows while the steps do not: what its codes cut off must not hold the parameters back."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
    first = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
    probe = torch.randn(2000, 20)
    errors = []
    for bits in (8, 32):
        model = copy.deepcopy(first)
        optimizer = optim.ScheduleFreeAdamW(model.parameters(), 1e-2, optim_bits=bits, min_8bit_size=0)
        generator = torch.Generator().manual_seed(2)
        for _ in range(2000):
            x = torch.randn(16, 20, generator=generator)
            noise = 0.3 * torch.randn(16, 5, generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), teacher(x).detach() + noise).backward()
            optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            errors.append(torch.nn.functional.mse_loss(model(probe), teacher(probe)).item())
    with torch.no_grad():
        begin = torch.nn.functional.mse_loss(first(probe), teacher(probe)).item()
    assert errors[1] < 0.05 * begin
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"betas": (0.0, 0.9)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"r": -1.0}, "r is"),
        ({"weight_lr_power": float("nan")}, "weight_lr_power"),
        ({"lr": -1.0}, "learning rate"),
        ({"optim_bits": 16}, "optim_bits"),
    ],
)
def test_refused_arguments(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        optim.ScheduleFreeAdamW(parameters(), **settings)


@pytest.mark.parametrize("name", ["AdamW8bit", "ScheduleFreeAdamW8bit"])
def test_keys_that_schedulers_put_into_groups_have_no_effect(name: str) -> None:
    """A layer-wise decay of the learning rate is kept there by others, who have applied it to ``lr``."""
    params, others = parameters(), parameters()
    optimizer = getattr(optim, name)([{"params": params, "lr_scale": 0.5}])
    other = getattr(optim, name)(others)
    train(optimizer, params, range(2))
    train(other, others, range(2))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
