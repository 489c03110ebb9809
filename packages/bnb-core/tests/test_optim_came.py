"""CAME against its algorithm in float64, and its states."""

from __future__ import annotations

import copy
import functools
from typing import Any

import optim_runs
import pytest
import torch

from bitsandbytes import optim
from bitsandbytes.errors import ArgumentError, CheckpointError

KEY = "__bnb_optimizer_quant_state__"
SHAPES = ((20, 33), (33, 20), (4, 7, 9), (29,), (1, 5), (6, 1), ())


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Any]:
    """Random parameters."""
    return optim_runs.parameters(dtype, shapes)


def set_gradients(params: list[Any], step: int) -> None:
    """Gradients that depend on the number of the step alone, of sizes that differ by row and column."""
    slope, noise = torch.Generator().manual_seed(99), torch.Generator().manual_seed(step)
    for p in params:
        mean, size = torch.randn(p.shape, generator=slope), torch.rand(p.shape, generator=slope).square()
        rows = torch.logspace(-2, 1, p.shape[0]).view(-1, *(1,) * (p.dim() - 1)) if p.dim() else 1.0
        p.grad = (rows * size * (mean + torch.randn(p.shape, generator=noise))).to(p.dtype)


train = functools.partial(optim_runs.train, set_gradients=set_gradients)


def factored(matrix: torch.Tensor, average: dict[str, Any], name: str, beta: float) -> torch.Tensor:
    """Sums over rows and columns, averaged over steps, and the matrix of rank 1 that they stand for."""
    ones = torch.ones_like
    row = matrix @ ones(matrix[0]).unsqueeze(1)
    column = ones(matrix[:, 0]).unsqueeze(0) @ matrix
    average[f"{name}-row"] = beta * average.get(f"{name}-row", 0.0) + (1 - beta) * row
    average[f"{name}-column"] = beta * average.get(f"{name}-column", 0.0) + (1 - beta) * column
    return average[f"{name}-row"] @ average[f"{name}-column"] / average[f"{name}-row"].sum()


class ExactCAME:
    """Algorithm 2 of arXiv:2307.02047 in float64, matrix by matrix; vectors as its authors' code has them."""

    def __init__(self, params: list[Any], lr: float, betas: Any, eps: Any, threshold: float, decay: float):
        self.params = [p.detach().double().clone() for p in params]
        self.states: list[dict[str, Any]] = [{} for _ in params]
        self.lr, self.betas, self.eps, self.threshold, self.decay = lr, betas, eps, threshold, decay

    def step(self, gradients: list[torch.Tensor]) -> None:
        b1, b2, b3 = self.betas
        for p, state, g in zip(self.params, self.states, gradients, strict=True):
            square = g * g + self.eps[0]
            if p.dim() < 2:
                state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * square
                v = state["v"]
            else:
                v = self.each_matrix(square, state, "v", b2)
            u = g / v.sqrt()
            u = u / max(1.0, float(u.square().mean().sqrt()) / self.threshold)
            state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * u
            step = state["m"]
            if p.dim() >= 2:
                step = step / self.each_matrix((u - state["m"]) ** 2 + self.eps[1], state, "s", b3).sqrt()
            p.sub_(self.lr * (step + self.decay * p))

    def each_matrix(self, values: torch.Tensor, state: dict[str, Any], name: str, beta: float) -> torch.Tensor:
        stack = values.reshape(-1, *values.shape[-2:])
        parts = [factored(matrix, state, f"{name}{index}", beta) for index, matrix in enumerate(stack)]
        return torch.stack(parts).reshape(values.shape)


@pytest.mark.parametrize("portion", [2**25, 700])
@pytest.mark.parametrize("threshold", [1.0, 0.2])
def test_float32_follows_float64(threshold: float, portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.optim.came.PORTION", portion)
    params = parameters()
    settings = {"betas": (0.8, 0.99, 0.995), "eps": (1e-20, 1e-12), "weight_decay": 0.2}
    optimizer = optim.CAME(params, 5e-3, clip_threshold=threshold, **settings)
    exact = ExactCAME(params, 5e-3, (0.8, 0.99, 0.995), (1e-20, 1e-12), threshold, 0.2)
    for step in range(150):
        set_gradients(params, step)
        exact.step([p.grad.double() for p in params])
        optimizer.step()
    for p, q, first in zip(params, exact.params, parameters(), strict=True):
        assert (q - first).abs().max() > 0.01
        assert (p - q).norm() < 1e-4 * (q - first).norm()


def test_defaults_follow_float64() -> None:
    params = parameters()
    optimizer = optim.CAME32bit(params)
    exact = ExactCAME(params, 2e-4, (0.9, 0.999, 0.9999), (1e-30, 1e-16), 1.0, 0.0)
    for step in range(30):
        set_gradients(params, step)
        exact.step([p.grad.double() for p in params])
        optimizer.step()
    for p, q, first in zip(params, exact.params, parameters(), strict=True):
        assert (p - q).norm() < 1e-4 * (q - first).norm() + 1e-7 * q.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_parameters(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = optim.CAME(params, 1e-2)
    exact = ExactCAME(params, 1e-2, (0.9, 0.999, 0.9999), (1e-30, 1e-16), 1.0, 0.0)
    for step in range(5):
        set_gradients(params, step)
        exact.step([p.grad.double() for p in params])
        optimizer.step()
    for p, q, first in zip(params, exact.params, parameters(dtype), strict=True):
        assert (p.double() - q).norm() < 1e-5 * (q - first).norm() + 3 * torch.finfo(dtype).eps * q.norm()


def test_gradients_are_scaled_by_the_group() -> None:
    scaled, plain = parameters(), parameters()
    first = optim.CAME([{"params": scaled, "gnorm_scale": 0.25}], eps=(1e-2, 1e-16))
    second = optim.CAME(plain, eps=(1e-2, 1e-16))
    set_gradients(scaled, 0)
    set_gradients(plain, 0)
    for p in plain:
        p.grad *= 0.25
    first.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(scaled, plain, strict=True))


def test_layout_of_states() -> None:
    params = parameters(shapes=((65, 130), (5, 40, 30), (5000,), (0, 16)))
    optimizer = optim.CAME8bit(params)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()["state"]
    factors = {"square_row", "square_col", "instability_row", "instability_col"}
    assert set(saved[0]) == {"step", KEY}
    assert set(saved[0][KEY]) == {"state1", "qmap1", "absmax1", *factors}
    assert saved[0][KEY]["state1"].dtype == torch.uint8
    assert [tuple(saved[0][KEY][key].shape) for key in ("square_row", "square_col")] == [(65,), (130,)]
    assert [tuple(saved[1][KEY][key].shape) for key in ("instability_row", "instability_col")] == [(5, 40), (5, 30)]
    assert set(saved[2][KEY]) == {"state1", "qmap1", "absmax1", "square"}
    assert set(saved[3][KEY]) == {"state1", *factors}
    bytes_of_matrix = sum(value.nbytes for key, value in saved[0][KEY].items() if key != "qmap1")
    assert bytes_of_matrix < 1.3 * 65 * 130


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["CAME8bit", "CAME32bit"])
def test_resumed_run_equals_uninterrupted_run(name: str, dtype: torch.dtype) -> None:
    shapes = ((70, 90), (3, 50, 40), (0, 16), (33,), (5000,))

    def make(params: list[Any]) -> torch.optim.Optimizer:
        groups = [{"params": params[:3]}, {"params": params[3:], "stochastic_rounding": True, "lr": 0.05}]
        return getattr(optim, name)(groups, lr=0.02)

    whole, begun = parameters(dtype, shapes), parameters(dtype, shapes)
    train(make(whole), whole, range(12))
    optimizer = make(begun)
    train(optimizer, begun, range(7))
    loaded, optimizer = optim_runs.resumed(optim_runs.snapshot(optimizer, begun), make)
    assert optimizer.state[loaded[0]]["square_row"].dtype == torch.float32
    train(optimizer, loaded, range(7, 12))
    assert all(torch.equal(p, q) for p, q in zip(whole, loaded, strict=True))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda tensors: tensors.pop("square_row"), "square_row is None"),
        (lambda tensors: tensors.update(instability_col=torch.zeros(65)), "instability_col"),
        (lambda tensors: tensors.update(square_col=torch.zeros(130, dtype=torch.float16)), "square_col"),
        (lambda tensors: tensors.update(state1=torch.zeros(3)), "state1"),
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(damage: Any, text: str) -> None:
    params = parameters(shapes=((65, 130),))
    optimizer = optim.CAME8bit(params)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["state"][0][KEY])
    before = copy.deepcopy(optimizer.state_dict()["state"][0][KEY])
    with pytest.raises(CheckpointError, match=text):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()["state"][0][KEY]
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_states_of_other_optimizers_are_refused() -> None:
    params = parameters(shapes=((65, 130),))
    other = optim.Lion8bit(params)
    train(other, params, range(1))
    optimizer = optim.CAME8bit(params)
    state = {**other.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(CheckpointError, match="square_row"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("compiled", [False, True])
def test_8bit_trains_like_32bit(compiled: bool) -> None:
    losses = optim_runs.losses_of_a_student(
        [
            lambda model, bits=bits: optim.CAME(model.parameters(), 2e-3, optim_bits=bits, min_8bit_size=0)
            for bits in (8, 32)
        ],
        compiled=compiled,
    )
    eight, full = map(optim_runs.end_of, losses)
    assert full < 0.5 * losses[0][0], "the problem does not train"
    assert abs(eight - full) < 0.03 * losses[0][0]


def test_closure() -> None:
    p = torch.nn.Parameter(torch.full((10, 3), 2.0))
    optimizer = optim.CAME([p], 0.1)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 120.0
    assert optimizer.step(closure).item() < 120.0


def test_stochastic_rounding_lets_small_updates_add_up() -> None:
    moved = []
    for dtype, stochastic in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        p = torch.nn.Parameter(torch.ones(100, 100, dtype=dtype))
        optimizer = optim.CAME([{"params": [p], "stochastic_rounding": stochastic}], lr=1e-5, betas=(0.9, 0.9, 0.9))
        p.grad = torch.ones_like(p)
        for _ in range(100):
            optimizer.step()
        moved.append(1.0 - p.float().mean().item())
    assert moved[0] > 1e-3
    assert moved[2] == pytest.approx(moved[0], rel=0.1)
    assert abs(moved[1] - moved[0]) > 0.3 * moved[0]


def test_groups_added_later_and_zero_gradients() -> None:
    first, second, alone = parameters(), parameters(), parameters()
    optimizer = optim.CAME8bit(first)
    train(optimizer, first, range(2))
    for p in first:
        p.grad = None
    optimizer.add_param_group({"params": second, "lr": 0.1, "clip_threshold": 0.5})
    single = optim.CAME8bit(alone, lr=0.1, clip_threshold=0.5)
    for step in range(3):
        for group, stepped in ((second, optimizer), (alone, single)):
            set_gradients(group, step)
            if step == 1:
                for p in group:
                    p.grad.zero_()
            stepped.step()
    assert all(torch.equal(p, q) for p, q in zip(second, alone, strict=True))
    assert all(bool(p.isfinite().all()) for p in second)
    still = parameters()
    for p in still:
        p.grad = torch.zeros_like(p)
    optim.CAME8bit(still).step()
    assert all(torch.equal(p, q) for p, q in zip(still, parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"betas": (0.9, 0.999)}, "betas"),
        ({"betas": (0.9, 0.999, 1.0)}, "beta parameter at index 2"),
        ({"eps": (0.0, 1e-16)}, "eps"),
        ({"eps": (1e-30,)}, "eps"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
        ({"lr": -1.0}, "learning rate"),
        ({"optim_bits": 16}, "optim_bits"),
    ],
)
def test_refused_arguments(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        optim.CAME(parameters(), **settings)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_sharded_parameters_are_refused(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
        optimizer = optim.CAME8bit(parameters())
        with pytest.raises(ArgumentError, match="parameter 1 of group 1 is a DTensor"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3)), sharded]})
        assert len(optimizer.param_groups) == 1
    finally:
        dist.destroy_process_group()
