"""DeepSpeed's ZeRO partitions the states of our optimizers as it does those of torch's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

WORKER = Path(__file__).with_name("deepspeed_worker.py")


def run(stage: int, name: str, folder: Path) -> dict[str, Any]:
    """What two processes over gloo report."""
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(WORKER), str(stage), name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    result = folder / "result.json"
    assert result.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("stage", [1, 2])
def test_trains_as_torch_does(stage: int, tmp_path: Path) -> None:
    theirs = run(stage, "torch.AdamW", tmp_path / "torch")
    exact = run(stage, "AdamW", tmp_path / "exact")
    eight = run(stage, "AdamW8bit", tmp_path / "eight")
    assert theirs["losses"][-1] < 0.6 * theirs["losses"][0]
    torch.testing.assert_close(exact["losses"], theirs["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(eight["losses"], theirs["losses"], rtol=2e-2, atol=0)
    assert exact["states"]["state1"] == "torch.float32"
    assert eight["states"]["state1"] == eight["states"]["state2"] == "torch.uint8"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(stage: int, tmp_path: Path) -> None:
    result = run(stage, "AdamW8bit", tmp_path / "eight")
    assert result["again"] == result["losses"][-len(result["again"]) :]
