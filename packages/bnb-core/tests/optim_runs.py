"""What tests of optimizers share: parameters, steps, a way through a file, and a problem that trains."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: A large and a small parameter and an empty one.
SHAPES: tuple[tuple[int, ...], ...] = ((65, 130), (10,), (0, 16))


def parameters(
    dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[torch.nn.Parameter]:
    """Random parameters, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def random_gradients(params: Sequence[torch.nn.Parameter], step: int) -> None:
    """Gradients that depend on the number of the step alone."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(
    optimizer: torch.optim.Optimizer,
    params: Sequence[torch.nn.Parameter],
    steps: range,
    set_gradients: Callable[[Sequence[torch.nn.Parameter], int], None] = random_gradients,
) -> None:
    """Steps with these gradients."""
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def saved_and_loaded(state: Any) -> Any:
    """Through a file that may hold nothing but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(optimizer: torch.optim.Optimizer, params: Sequence[torch.nn.Parameter]) -> Any:
    """A run as a file keeps it."""
    return saved_and_loaded({"optimizer": optimizer.state_dict(), "model": [p.detach() for p in params]})


def resumed(
    saved: Any, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Parameters and optimizer of a :func:`snapshot`."""
    params = [torch.nn.Parameter(p) for p in saved["model"]]
    optimizer = make(params)
    optimizer.load_state_dict(saved["optimizer"])
    return params, optimizer


def losses_of_a_student(
    makers: Sequence[Callable[[torch.nn.Module], torch.optim.Optimizer]], steps: int = 300, compiled: bool = False
) -> list[list[float]]:
    """Losses of one small model that learns another one's answers, for each of the optimizers."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
    first = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
    losses = []
    for make in makers:
        model = copy.deepcopy(first)
        optimizer = make(model)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        generator, history = torch.Generator().manual_seed(2), []
        for _ in range(steps):
            x = torch.randn(64, 20, generator=generator)
            loss = torch.nn.functional.mse_loss(forward(x), teacher(x).detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    return losses


def end_of(history: Sequence[float]) -> float:
    """Mean of the last losses."""
    return sum(history[-20:]) / 20
