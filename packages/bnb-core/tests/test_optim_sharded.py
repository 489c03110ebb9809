"""Sharded training over two and three processes: FSDP2 (DTensor parameters) and FSDP1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optim_sharded_worker import make_optimizer, plain_model, train

from bitsandbytes.ops.optim_storage import STATE_BLOCKSIZE, state_blocks
from bitsandbytes.optim.sharded import flat_form, row_form

NAMES = (
    "AdamW32bit",
    "AdamW8bit",
    "AdEMAMix8bit",
    "LAMB8bit",
    "Lion8bit",
    "Muon32bit",
    "Muon8bit",
    "ScheduleFreeAdamW8bit",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]


def launch(world: int, folder: Path, task: str, *names: str) -> None:
    """Run the workers and wait for all of them."""
    worker = Path(__file__).with_name("optim_sharded_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(world), str(folder), task, *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two processes, and where two and three processes get from them."""
    path = tmp_path_factory.mktemp("sharded")
    launch(2, path, "save", *NAMES)
    launch(2, path, "load", *NAMES)
    launch(3, path, "load", *NAMES)
    return path


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all parameters: single elements may differ by a flipped sign of Lion's."""
    assert first.keys() == second.keys()
    return float(torch.cat([(first[key] - second[key]).flatten() for key in first]).norm())


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_like_one(folder: Path, name: str) -> None:
    saved = torch.load(folder / f"{name}-full.pt", weights_only=True)
    model = plain_model()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer := make_optimizer(name, model), range(6))
    alone = model.state_dict()
    moved = distance(alone, start)
    # Gradients are summed in another order, and 8-bit blocks begin elsewhere.
    assert distance(saved["end"], alone) < (0.2 if "8bit" in name else 1e-4) * moved
    state = saved["optimizer"]["state"]["2.weight"]["__bnb_optimizer_quant_state__"]
    own = optimizer.state[model[2].weight]
    assert state["state1"].shape == own["state1"].shape
    assert state["state1"].dtype == own["state1"].dtype


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_resumes_from_either_checkpoint(folder: Path, name: str, world: int, kind: str) -> None:
    saved = torch.load(folder / f"{name}-full.pt", weights_only=True)
    ends = torch.load(folder / f"{name}-ends-{world}.pt", weights_only=True)
    if world == 2:
        assert distance(ends[kind], saved["end"]) == 0.0
    else:
        moved = distance(saved["model"], saved["end"])
        assert distance(ends[kind], saved["end"]) < (0.2 if "8bit" in name else 1e-4) * moved


def test_fsdp1_state_gathers_and_resumes(tmp_path: Path) -> None:
    launch(2, tmp_path, "wrapped")
    assert {path.name for path in tmp_path.glob("wrapped-*")} == {"wrapped-0", "wrapped-1"}


@pytest.mark.parametrize("width", [1, 64, 255, 256, 257, 600])
def test_row_form_is_undone_exactly(width: int) -> None:
    rows, slots = 11, 2
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (slots, rows, width), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(slots, state_blocks(rows * width), generator=generator)
    qmap = torch.linspace(-1, 1, 256)
    same_codes, same_absmax = flat_form(codes, qmap, *row_form(absmax, rows, width))
    assert torch.equal(same_codes, codes)
    assert torch.equal(same_absmax, absmax)


@pytest.mark.parametrize("width", [64, 256, 600])
def test_rows_cut_elsewhere_keep_their_values(width: int) -> None:
    rows, cut = 13, 5
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1, rows, width), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(1, state_blocks(rows * width), generator=generator) + 0.5
    qmap = torch.linspace(-1, 1, 256)
    by_rows, offset = row_form(absmax, rows, width)
    scale = absmax.repeat_interleave(STATE_BLOCKSIZE)[: rows * width].reshape(rows, width)
    new_codes, new_absmax = flat_form(codes[:, cut:], qmap, by_rows[:, cut:], offset[cut:])
    count = (rows - cut) * width
    values = qmap[new_codes.int()].reshape(-1) * new_absmax.repeat_interleave(STATE_BLOCKSIZE)[:count]
    truth = (qmap[codes.int()] * scale)[:, cut:].reshape(-1)
    assert (values - truth).abs().max() <= 1.5 / 128
    if cut * width % STATE_BLOCKSIZE == 0:
        assert torch.equal(values, truth)
