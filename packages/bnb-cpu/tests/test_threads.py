"""Kernels keep to torch's number of threads, and work in the workers of a DataLoader and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

RunPython = Callable[..., CompletedProcess[str]]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

#: One call of each kind, large enough for several threads. Results are compared as bytes, without torch, whose own
#: loops do not survive a fork.
CALLS = """
import os, torch
from bitsandbytes.codebooks import create_dynamic_map
from bitsandbytes.contract import OPS
from bitsandbytes.backends.registry import REGISTRY

generator = torch.Generator().manual_seed(0)
x = torch.randn(1024, 1024, generator=generator)
code = create_dynamic_map()
packed, absmax = OPS["quantize_4bit"].reference(x, 64, "nf4", torch.uint8)
CB, SCB, _columns = OPS["int8_vectorwise_quant"].reference(x)
codes, stats = torch.zeros(x.numel(), dtype=torch.uint8), torch.zeros(x.numel() // 256)
g, zeros = torch.randn(x.numel(), generator=generator), torch.zeros(x.numel())

def step():
    p, state, scale = (torch.from_numpy(start.numpy().copy()) for start in (zeros, codes, stats))
    OPS["optimizer_step_8bit"].overload(
        "lion", [g], [p], [state], [], code, None, [scale], [], [1], 0.1, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0
    )
    return p

def call(op, *arguments):
    result = OPS[op].overload(*arguments)
    return result[0] if isinstance(result, tuple) else result

calls = {
    "quantize_4bit": lambda: call("quantize_4bit", x, 64, "nf4", torch.uint8),
    "dequantize_4bit": lambda: call("dequantize_4bit", packed, absmax, 64, "nf4", (1024, 1024), torch.float32),
    "quantize_blockwise": lambda: call("quantize_blockwise", x, code, 256),
    "gemm_4bit": lambda: call("gemm_4bit", x[:64], packed, (1024, 1024), absmax, 64, "nf4"),
    "gemm_4bit, one row": lambda: call("gemm_4bit", x[:1], packed, (1024, 1024), absmax, 64, "nf4"),
    "int8_vectorwise_quant": lambda: call("int8_vectorwise_quant", x),
    "int8_linear": lambda: call("int8_linear", x[:64], CB, SCB),
    "optimizer_step_8bit": step,
}
assert REGISTRY.entry("gemm_4bit", "cpu") is not None, "the backend does not serve"

def results():
    return {name: function().numpy().tobytes() for name, function in calls.items()}
"""

NAMES = (
    "quantize_4bit",
    "dequantize_4bit",
    "quantize_blockwise",
    "gemm_4bit",
    "gemm_4bit, one row",
    "int8_vectorwise_quant",
    "int8_linear",
    "optimizer_step_8bit",
)

DATASET = (
    CALLS
    + """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        packed, absmax = OPS["quantize_4bit"].overload(x[index : index + 256], 64, "nf4", torch.uint8)
        product = OPS["gemm_4bit"].overload(x[:8], packed, (256, 1024), absmax, 64, "nf4")
        return packed, product, OPS["int8_linear"].overload(x[:8], CB, SCB), torch.get_num_threads()

if __name__ == "__main__":
    import sys
    torch.set_num_threads(3)
    results()
    wanted = [Rows()[index] for index in range(6)]
    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=None, num_workers=2, timeout=100, multiprocessing_context=sys.argv[1]
    )
    for got, expected in zip(loader, wanted, strict=True):
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5)
        assert (got[3], expected[3]) == (1, 3)
    print("fine")
"""
)


@linux
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_starts_as_many_threads_as_torch_allows(run_python: RunPython, name: str) -> None:
    code = f"""
torch.set_num_threads(1)
count = lambda: len(os.listdir("/proc/self/task"))
calls[{name!r}]()
alone = count()
torch.set_num_threads(3)
calls[{name!r}]()
more = count()
torch.set_num_threads(1)
calls[{name!r}]()
print(alone, more - alone, count() - more)
"""
    result = run_python(CALLS.replace("import os, torch\n", "import os, torch\ntorch.set_num_threads(1)\n", 1) + code)
    assert result.returncode == 0, result.stderr
    _alone, started, after = map(int, result.stdout.split())
    # One row of this size may be too little work for as many.
    assert 1 <= started <= 2
    assert after <= 0


def test_results_do_not_depend_on_the_threads(run_python: RunPython) -> None:
    """Each row and block is computed by one thread, in the same order."""
    code = """
torch.set_num_threads(1)
alone = results()
torch.set_num_threads(4)
print([name for name, value in results().items() if value != alone[name]])
"""
    result = run_python(CALLS + code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_every_kernel_computes_after_a_fork(run_python: RunPython) -> None:
    """The pool of the parent's threads is not there in the child, and must not be waited for."""
    code = """
torch.set_num_threads(4)
wanted = results()
child = os.fork()
if child == 0:
    os._exit(0 if results() == wanted else 1)
print(os.waitpid(child, 0)[1], results() == wanted)
"""
    result = run_python(CALLS + code)
    assert result.stdout.split() == ["0", "True"], result.stderr


@pytest.mark.parametrize(
    "method",
    [pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")), "spawn"],
)
def test_workers_of_a_data_loader(tmp_path: Path, method: str) -> None:
    """The pool is running before the workers begin; torch gives each of them one thread."""
    program = tmp_path / "program.py"
    program.write_text(DATASET)
    env = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
    result = subprocess.run(
        [sys.executable, str(program), method], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "fine"
