"""Muon against singular values in float64 and torch's own, and its groups, states and dtypes."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import optim_runs
import pytest
import torch

from bitsandbytes import optim
from bitsandbytes.errors import ArgumentError
from bitsandbytes.optim.muon import COEFFICIENTS, _check_placements, orthogonalize

SHAPES = ((24, 24), (16, 40), (40, 16), (24, 24), (1, 30))


def matrices(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Any]:
    """Random parameters."""
    return optim_runs.parameters(dtype, shapes)


def set_gradients(params: list[Any], step: int) -> None:
    """Gradients that depend on the number of the step alone, a slope and noise."""
    slope, noise = torch.Generator().manual_seed(99), torch.Generator().manual_seed(step)
    for p in params:
        slope_of_p = torch.randn(p.shape, generator=slope)
        p.grad = (slope_of_p + torch.randn(p.shape, generator=noise)).to(p.dtype)


train = functools.partial(optim_runs.train, set_gradients=set_gradients)


class ExactMuon:
    """Muon in float64: the polynomial acts on singular values, so no matrix is iterated on."""

    def __init__(self, params: list[Any], lr: float, decay: float, momentum: float, nesterov: bool, scale: Any):
        self.params = [p.detach().double().clone() for p in params]
        self.averages = [torch.zeros_like(p) for p in self.params]
        self.lr, self.decay, self.momentum, self.nesterov, self.scale = lr, decay, momentum, nesterov, scale

    def step(self, gradients: list[torch.Tensor]) -> None:
        a, b, c = 3.4445, -4.7750, 2.0315
        for p, m, g in zip(self.params, self.averages, gradients, strict=True):
            m.mul_(self.momentum).add_((1 - self.momentum) * g)
            u = (1 - self.momentum) * g + self.momentum * m if self.nesterov else m
            left, values, right = torch.linalg.svd(u, full_matrices=False)
            values = values / values.square().sum().sqrt()
            for _ in range(5):
                values = a * values + b * values**3 + c * values**5
            p.mul_(1 - self.lr * self.decay).sub_(self.lr * self.scale(*p.shape) * (left * values) @ right)


SCALES = {
    None: lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", SCALES)
def test_float32_follows_float64(adjust: Any, nesterov: bool) -> None:
    params = matrices()
    settings = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov}
    optimizer = optim.Muon(params, **settings, adjust_lr_fn=adjust, ns_dtype=torch.float32)
    exact = ExactMuon(params, 0.02, 0.3, 0.9, nesterov, SCALES[adjust])
    for step in range(100):
        set_gradients(params, step)
        exact.step([p.grad.double() for p in params])
        optimizer.step()
    for p, q, first in zip(params, exact.params, matrices(), strict=True):
        assert (p - q).norm() < 1e-4 * (q - first).norm()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("adjust", SCALES)
def test_same_as_torch(adjust: Any) -> None:
    params, others = matrices(), matrices()
    ours = optim.Muon(params, 0.02, 0.1, 0.95, adjust_lr_fn=adjust)
    theirs = torch.optim.Muon(others, 0.02, 0.1, 0.95, adjust_lr_fn=adjust)
    assert {key: theirs.defaults[key] for key in theirs.defaults} == {
        key: ours.defaults[key] for key in theirs.defaults
    }
    for step in range(50):
        for optimizer, group in ((ours, params), (theirs, others)):
            set_gradients(group, step)
            optimizer.step()
    for p, q, first in zip(params, others, matrices(), strict=True):
        # The products are in bfloat16, and torch divides by the norm in bfloat16 too.
        assert (p - q).norm() < 1e-2 * (q - first).norm()


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 30, 50, generator=generator, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e5]).view(
        3, 1, 1
    )
    result = orthogonalize(stack, COEFFICIENTS, 5, 1e-7, torch.float64)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4
    assert values.max() < 1.3
    for before, after in zip(stack, result, strict=True):
        left, _values, right = torch.linalg.svd(before, full_matrices=False)
        core = left.T @ after @ right.T
        assert (core - core.diagonal().diag()).abs().max() < 1e-9
    turned = orthogonalize(stack.mT, COEFFICIENTS, 5, 1e-7, torch.float64)
    torch.testing.assert_close(turned.mT, result)
    assert not orthogonalize(torch.zeros(2, 3, 4), COEFFICIENTS, 5, 1e-7, torch.bfloat16).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_first_step_by_hand(dtype: torch.dtype) -> None:
    """All singular values of the gradient are the same, so the step is the gradient up to a factor."""
    p = torch.nn.Parameter(torch.eye(64, 32).to(dtype) * 8)
    p.grad = -torch.eye(64, 32).to(dtype)
    value = 32**-0.5
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    optim.Muon([p], lr=0.5, weight_decay=0.25).step()
    wanted = torch.eye(64, 32) * (8 * (1 - 0.125) + 0.5 * 2**0.5 * value)
    torch.testing.assert_close(p.float(), wanted, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_parameters_and_products(dtype: torch.dtype, ns_dtype: torch.dtype) -> None:
    params, exact = matrices(dtype), matrices(dtype)
    optimizer = optim.Muon(params, 0.02, ns_dtype=ns_dtype)
    truth = ExactMuon(exact, 0.02, 0.1, 0.95, True, SCALES[None])
    for step in range(5):
        set_gradients(params, step)
        truth.step([p.grad.double() for p in params])
        optimizer.step()
    tolerance = max(torch.finfo(dtype).eps, torch.finfo(ns_dtype).eps, 1e-6)
    for p, q, first in zip(params, truth.params, exact, strict=True):
        spacing = torch.finfo(dtype).eps * q.norm()
        assert (p.double() - q).norm() < 3 * tolerance * (q - first).norm() + 3 * spacing


def test_matrices_of_one_shape_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for portion in (2**25, 1, 2 * 24 * 24):
        monkeypatch.setattr("bitsandbytes.optim.muon.PORTION", portion)
        params = matrices(shapes=((24, 24), (16, 24), (24, 24), (24, 24)))
        train(optim.Muon8bit(params, min_8bit_size=0, ns_dtype=torch.float32), params, range(4))
        results.append(params)
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# --- groups -----------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """An embedding, a convolution, a norm, two hidden matrices and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 64)
        self.mix = torch.nn.Conv1d(64, 64, 3, padding=1)
        self.up = torch.nn.Linear(64, 96)
        self.norm = torch.nn.LayerNorm(96)
        self.down = torch.nn.Linear(96, 64)
        self.head = torch.nn.Linear(64, 50)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.table(tokens).mT).mT
        return self.head(self.down(torch.relu(self.norm(self.up(x)))))


def test_groups_of_a_model() -> None:
    net = Net()
    net.norm.bias.requires_grad_(False)
    groups = optim.Muon.groups_of(net)
    assert [group["use_muon"] for group in groups] == [True, False]
    assert {id(p) for p in groups[0]["params"]} == {id(net.up.weight), id(net.down.weight)}
    assert len(groups[1]["params"]) == len(list(net.parameters())) - 3
    (only,) = optim.Muon8bit.groups_of(net, ["up", "down.w"])
    assert not only["use_muon"]
    assert optim.Muon.groups_of(torch.nn.Linear(3, 4))[0]["use_muon"]


@pytest.mark.parametrize("compiled", [False, True])
def test_one_optimizer_for_a_whole_model(compiled: bool) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = optim.Muon8bit(optim.Muon8bit.groups_of(net), lr=2e-3, adjust_lr_fn="match_rms_adamw")
    forward = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    tokens = torch.randint(0, 50, (4, 16))

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert set(optimizer.state[net.up.weight]) == {"step", "state1", "qmap1", "absmax1"}
    assert optimizer.state[net.up.weight]["state1"].dtype == torch.uint8
    assert "state2" in optimizer.state[net.mix.weight]


def test_other_parameters_get_adamw() -> None:
    params, alone = matrices(shapes=((70, 80), (30,))), matrices(shapes=((70, 80), (30,)))
    groups = [{"params": params[1:], "use_muon": False, "lr": 0.01}, {"params": matrices()}]
    optimizer = optim.Muon8bit(groups, weight_decay=0.2, betas=(0.8, 0.9))
    optimizer.add_param_group({"params": params[:1], "use_muon": False, "lr": 0.01, "eps": 1e-3})
    usual = optim.AdamW8bit([{"params": alone[1:]}, {"params": alone[:1], "eps": 1e-3}], 0.01, (0.8, 0.9), 1e-8, 0.2)
    for step in range(5):
        for group in (params, alone):
            set_gradients(group, step)
        optimizer.step()
        usual.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"ns_steps": 100}, "ns_steps"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn"),
        ({"ns_dtype": torch.float16}, "ns_dtype"),
        ({"betas": (0.9,)}, "betas"),
        ({"lr": -1.0}, "learning rate"),
        ({"optim_bits": 16}, "optim_bits"),
    ],
)
def test_refused_arguments(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        optim.Muon(matrices(), **settings)


@pytest.mark.parametrize("shape", [(10,), (4, 3, 3), (8, 4, 3, 3), ()])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    params = matrices()
    other = torch.nn.Parameter(torch.ones(shape))
    with pytest.raises(ArgumentError, match=r"group 0: parameter 5 has shape .*use_muon=False"):
        optim.Muon8bit([*params, other])
    optimizer = optim.Muon8bit(params)
    with pytest.raises(ArgumentError, match="group 1: parameter 0"):
        optimizer.add_param_group({"params": [other]})
    with pytest.raises(ArgumentError, match="use_muon is 'no'"):
        optimizer.add_param_group({"params": [other], "use_muon": "no"})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other], "use_muon": False})


# --- states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Muon8bit", "Muon32bit"])
def test_resumed_run_equals_uninterrupted_run(name: str, dtype: torch.dtype) -> None:
    shapes = ((70, 90), (90, 70), (5, 6), (0, 16), (70, 90), (33,))

    def make(params: list[Any]) -> torch.optim.Optimizer:
        groups = [{"params": params[:2]}, {"params": params[2:5], "stochastic_rounding": True, "lr": 0.05}]
        return getattr(optim, name)([*groups, {"params": params[5:], "use_muon": False}], lr=0.02)

    whole, begun = matrices(dtype, shapes), matrices(dtype, shapes)
    train(make(whole), whole, range(12))
    optimizer = make(begun)
    train(optimizer, begun, range(7))
    loaded, optimizer = optim_runs.resumed(optim_runs.snapshot(optimizer, begun), make)
    assert optimizer.state[loaded[5]]["state2"].dtype == torch.float32
    train(optimizer, loaded, range(7, 12))
    assert all(torch.equal(p, q) for p, q in zip(whole, loaded, strict=True))


def test_8bit_trains_like_32bit() -> None:
    losses = optim_runs.losses_of_a_student(
        [
            lambda model, bits=bits: optim.Muon(optim.Muon.groups_of(model), 0.01, optim_bits=bits, min_8bit_size=0)
            for bits in (8, 32)
        ]
    )
    eight, full = map(optim_runs.end_of, losses)
    assert full < 0.2 * losses[0][0], "the problem does not train"
    assert abs(eight - full) < 0.02 * losses[0][0]


def test_stochastic_rounding_lets_small_updates_add_up() -> None:
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = optim.Muon([{"params": [p], "stochastic_rounding": stochastic}], lr=1e-3, weight_decay=0.0)
        p.grad = torch.ones_like(p)
        for _ in range(100):
            optimizer.step()
        exact = torch.nn.Parameter(torch.ones(64, 64))
        exact.grad = torch.ones_like(exact)
        other = optim.Muon([exact], lr=1e-3, weight_decay=0.0)
        for _ in range(100):
            other.step()
        moved, wanted = 1.0 - p.float().mean().item(), 1.0 - exact.mean().item()
        assert moved == pytest.approx(wanted if stochastic else 0.0, rel=0.2)


def test_zero_gradients_and_missing_gradients() -> None:
    params = matrices()
    params[0].grad, params[1].grad = torch.zeros_like(params[0]), None
    optimizer = optim.Muon8bit(params, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(params[0], matrices()[0])
    assert params[1] not in optimizer.state
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params[:2]] == [2, 1]


def test_steps_counted_on_the_device() -> None:
    plain, captured = matrices(), matrices()
    first = optim.Muon8bit(plain, min_8bit_size=0)
    second = optim.Muon8bit([{"params": captured, "capturable": True}], min_8bit_size=0, lr=torch.tensor(1e-3))
    for optimizer, params in ((first, plain), (second, captured)):
        train(optimizer, params, range(4))
    for p, q in zip(plain, captured, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert second.state_dict()["state"][0]["step"] == 4


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_placements_that_cannot_be_gathered_are_refused() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    _check_placements("Muon", 0, SimpleNamespace(placements=(Replicate(), Shard(1))))
    with pytest.raises(ArgumentError, match=r"parameter 3 has placements .*Partial.*Shard and Replicate"):
        _check_placements("Muon", 3, SimpleNamespace(placements=(Shard(0), Partial())))
