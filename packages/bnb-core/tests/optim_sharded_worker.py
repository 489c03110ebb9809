"""One process of a sharded training run; started by ``test_optim_sharded.py``.

``python optim_sharded_worker.py RANK WORLD FOLDER save|load NAME...``
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bitsandbytes import optim

FULL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def plain_model() -> torch.nn.Module:
    """Rows of 256 and of 64 elements, and 37 rows, which no small number of processes divides."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.Tanh(), torch.nn.Linear(64, 37))


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """States in 8 bit for all parameters, where the class has them at all."""
    settings = {"lr": 1e-2, "weight_decay": 0.1, "min_8bit_size": 0}
    if name.startswith("Muon"):
        # Products in bfloat16 would make much of gradients that were added up in another order.
        return getattr(optim, name)(optim.Muon.groups_of(model), ns_dtype=torch.float32, **settings)
    return getattr(optim, name)(model.parameters(), **settings)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on data that depend on the number of the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 256, generator=generator)).square().mean().backward()
        optimizer.step()


def sharded(name: str, world: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A sharded model and its optimizer."""
    model = plain_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, make_optimizer(name, model)


def whole(model: torch.nn.Module) -> dict[str, Any]:
    """Gathered parameters."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def save(name: str, world: int, folder: Path) -> None:
    """Train, save in both ways after four steps, and go on to the sixth."""
    model, optimizer = sharded(name, world)
    train(model, optimizer, range(4))
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folder / f"{name}-sharded",
    )
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    middle = whole(model)
    train(model, optimizer, range(4, 6))
    end = whole(model)
    if dist.get_rank() == 0:
        torch.save({"optimizer": full, "model": middle, "end": end}, folder / f"{name}-full.pt")


def load(name: str, world: int, folder: Path) -> None:
    """Continue from both checkpoints and save where each run ends."""
    model, optimizer = sharded(name, world)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / f"{name}-sharded")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, range(4, 6))
    ends = {"sharded": whole(model)}

    saved: dict[str, Any] = {"optimizer": {}, "model": {}}
    if dist.get_rank() == 0:
        saved = torch.load(folder / f"{name}-full.pt", weights_only=True)
    model, optimizer = sharded(name, world)
    set_model_state_dict(model, saved["model"], options=FULL)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=FULL)
    train(model, optimizer, range(4, 6))
    ends["full"] = whole(model)
    if dist.get_rank() == 0:
        torch.save(ends, folder / f"{name}-ends-{world}.pt")


def wrapped(folder: Path) -> None:
    """FSDP1: gathering the optimizer's state raises nothing, and the local state resumes bit for bit."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(plain_model(), use_orig_params=False, device_id=torch.device("cpu"))
    optimizer = make_optimizer("Adam8bit", model)
    train(model, optimizer, range(3))
    FullyShardedDataParallel.full_optim_state_dict(model, optimizer)
    begun = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    end = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), begun, strict=True):
            p.copy_(value)
    again = make_optimizer("Adam8bit", model)
    again.load_state_dict(state)
    train(model, again, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), end, strict=True))
    (folder / f"wrapped-{dist.get_rank()}").touch()


def main() -> None:
    """Run the task that the command line names."""
    rank, world, folder, task, *names = sys.argv[1:]
    torch.set_num_threads(1)
    store = Path(folder) / f"store-{task}-{world}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    for name in names:
        {"save": save, "load": load}[task](name, int(world), Path(folder))
    if task == "wrapped":
        wrapped(Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
