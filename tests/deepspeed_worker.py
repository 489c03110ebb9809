"""One process of a training under DeepSpeed's ZeRO; started by ``test_deepspeed.py`` through torch's launcher.

``python deepspeed_worker.py STAGE NAME FOLDER`` trains 12 steps, saves after 8, and repeats the last 4 from the saved
checkpoint; the first process writes the losses of all, and what its states are, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist

from bitsandbytes import optim

STEPS, SAVED = 12, 8


def make_engine(stage: int, name: str) -> Any:
    """A small model under ZeRO, with an optimizer of torch's (``torch.AdamW``) or ours."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.Tanh(), torch.nn.Linear(64, 37))
    family, _, last = name.rpartition(".")
    kind = getattr(torch.optim if family == "torch" else optim, last)
    settings = {"min_8bit_size": 0} if last.endswith("8bit") else {}
    optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.01, **settings)
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: range) -> list[float]:
    """Losses over all processes, on data that depend on the number of the step alone."""
    losses = []
    for step in steps:
        inputs = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        loss = engine(inputs[dist.get_rank() :: dist.get_world_size()]).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def main() -> None:
    """Train, save, load, train again."""
    stage, name, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    deepspeed.init_distributed("gloo")
    engine = make_engine(stage, name)
    losses = train(engine, range(SAVED))
    engine.save_checkpoint(str(folder / "checkpoint"))
    losses += train(engine, range(SAVED, STEPS))
    resumed = make_engine(stage, name)
    resumed.load_checkpoint(str(folder / "checkpoint"))
    again = train(resumed, range(SAVED, STEPS))
    if dist.get_rank() == 0:
        states = next(iter(engine.optimizer.optimizer.state.values()))
        kinds = {key: str(value.dtype) for key, value in states.items() if torch.is_tensor(value)}
        (folder / "result.json").write_text(json.dumps({"losses": losses, "again": again, "states": kinds}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
