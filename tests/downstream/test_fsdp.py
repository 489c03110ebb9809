"""QLoRA with weights sharded over processes that talk through gloo or NCCL."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.model, pytest.mark.slow]

WORKER = Path(__file__).with_name("fsdp_qlora.py")


def run(folder, tmp_path, processes, device):
    """Results of one step over ``processes`` processes."""
    out = tmp_path / f"{processes}.pt"
    arguments = [str(processes), str(tmp_path / f"store-{processes}"), str(out), device]
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(folder), str(rank), *arguments]) for rank in range(processes)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0] * processes
    finally:
        for worker in workers:
            worker.kill()
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multigpu)])
def test_sharded_step_equals_the_step_of_one_process(tiny_folder, tmp_path, device):
    alone, sharded = run(tiny_folder, tmp_path, 1, device), run(tiny_folder, tmp_path, 2, device)
    assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert sharded["losses"][0] == sharded["losses"][1]
    expected = alone["gradients"]
    assert sharded["gradients"].keys() == expected.keys()
    assert len(expected) == 12
    for name, value in expected.items():
        gradient = sharded["gradients"][name].float()
        assert value.float().norm() > 0
        assert (gradient - value.float()).norm() < 0.02 * value.float().norm(), name
