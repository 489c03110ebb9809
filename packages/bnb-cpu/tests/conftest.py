"""Tests of the CPU backend, through the ops of the core and through the native module."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bitsandbytes.backends.registry import REGISTRY
from bnb_cpu.native import _C


@pytest.fixture(scope="session", autouse=True)
def served_by_this_backend() -> None:
    """Without this, tests that compare with the reference would pass on the reference itself."""
    entry = REGISTRY.entry("quantize_4bit", "cpu")
    if entry is None:
        pytest.exit("bnb-cpu does not serve the CPU here: unset BNB_BACKENDS, and run these tests apart from core's", 1)


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this build in turn."""
    if request.param not in _C.supported_isas():
        pytest.skip(f"this machine does not support {request.param}")
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a fresh interpreter; keyword arguments are environment variables, the only ones of ours."""

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
        return subprocess.run(
            [sys.executable, "-c", code], env=env | variables, capture_output=True, text=True, timeout=300
        )

    return run
