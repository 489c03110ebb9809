"""Threads, processes and the way the native module is loaded."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

import bnb_cpu
from bitsandbytes.contract import OPS
from bnb_cpu.native import _C
from bnb_cpu.ops import KERNELS

RunPython = Callable[..., CompletedProcess[str]]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_describing_loads_nothing(run_python: RunPython) -> None:
    """Importing the description, which every `import bitsandbytes` does, loads no native code."""
    code = "import sys, bitsandbytes, bnb_cpu; print('bnb_cpu._C' in sys.modules, 'bnb_cpu.native' in sys.modules)"
    assert run_python(code).stdout.split() == ["False", "False"]


def test_kernels_name_ops_with_their_signature() -> None:
    for kernel in KERNELS:
        op = OPS[kernel.op]
        assert list(inspect.signature(kernel.run).parameters) == list(inspect.signature(op.check).parameters) or (
            kernel.op.endswith(".out")
        ), kernel.op
    assert len({kernel.op for kernel in KERNELS}) == len(KERNELS)


def test_stub_describes_the_module() -> None:
    """Every function of ``_C`` stands in the stub with the same number of arguments."""
    stub = ast.parse(Path(bnb_cpu.__file__).with_name("_C.pyi").read_text())
    documented = {node.name: len(node.args.posonlyargs) for node in stub.body if isinstance(node, ast.FunctionDef)}
    functions = {name: function for name, function in vars(_C).items() if callable(function)}
    assert set(documented) == set(functions)
    for name, function in functions.items():
        signature = function.__doc__.partition("->")[0]
        assert signature.count(": ") == documented[name], f"{name}: {signature}"


THREADS = """
import os, torch
from bitsandbytes.contract import OPS
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
x = torch.ones(1 << 20)
call = lambda: OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)
call()
alone = count()
torch.set_num_threads(4)
call()
print(alone - 1, count() - alone)
"""


@linux
def test_threads_follow_torch(run_python: RunPython) -> None:
    """One thread starts no pool; four threads start three more."""
    before, started = map(int, run_python(THREADS).stdout.split())
    assert started == 3, f"{before} threads beside the main one before, {started} started"


@linux
def test_one_openmp_runtime(run_python: RunPython) -> None:
    """The module works on torch's runtime instead of bringing a second set of threads."""
    code = """
import torch
torch.ones(1 << 20).add_(1)
from bnb_cpu.native import _C
names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(sum(("libgomp" in name.rpartition("/")[2] or "libomp" in name.rpartition("/")[2]) for name in names))
"""
    assert run_python(code).stdout.strip() == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_process_computes(run_python: RunPython) -> None:
    """A process forked after the pool was started neither hangs nor gives other results."""
    code = """
import os, torch
from bitsandbytes.contract import OPS
torch.set_num_threads(4)
x = torch.randn(1 << 20)
# Compared without torch, whose own loops do not survive a fork.
call = lambda: OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)[0].numpy().tobytes()
wanted = call()
child = os.fork()
if child == 0:
    os._exit(0 if call() == wanted else 1)
print(os.waitpid(child, 0)[1], call() == wanted)
"""
    assert run_python(code).stdout.split() == ["0", "True"]


def test_python_threads_at_once() -> None:
    """Calls from several threads overlap, since the lock of the interpreter is released."""
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    wanted = OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)[0]
    results: list[bool] = []

    def work() -> None:
        for _round in range(20):
            results.append(torch.equal(OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)[0], wanted))

    threads = [threading.Thread(target=work) for _thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 160


def test_default_device_does_not_matter() -> None:
    """Results lie beside their arguments, whatever torch makes new tensors on."""
    x = torch.ones(128)
    with torch.device("meta"):
        packed, absmax = OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)
    assert packed.device.type == absmax.device.type == "cpu"
