"""The conformance kit notices faults: each backend here is right but for one thing, and one check says which."""

import inspect
import itertools
import json

import pytest
import torch

from bitsandbytes.contract import OPS
from bitsandbytes.testing.cases import all_cases
from bitsandbytes.testing.device import flat_tensors

CASES = {op: list(cases) for op, cases in itertools.groupby(sorted(all_cases(), key=lambda c: c.op), lambda c: c.op)}

#: Kernels that are right but for one thing, each for another op.
FAULTS = """
import torch
from bitsandbytes.backends import Availability, Backend, Kernel
from bitsandbytes.contract import OPS

def reference(op, *args):
    return OPS[op].reference(*args)

def statistics_in_half(A, threshold=0.0):
    codes, absmax, columns = reference("int8_vectorwise_quant", A, threshold)
    return codes, absmax.half(), columns

def writes_nothing(A, absmax, blocksize, quant_type, shape, dtype, out):
    pass

def takes_out_for_dense(A, B, out):
    result = reference("int8_linear_matmul", A, B)
    out.as_strided((out.numel(),), (1,)).copy_(result.reshape(-1))

def shares_memory(A, row_stats, col_stats, dtype=None, bias=None):
    return A.view(torch.float32).copy_(reference("int8_mm_dequant", A, row_stats, col_stats, dtype, bias))

def fills_float32(A, row_stats, col_stats, dtype=None, bias=None):
    return dtype == torch.float32

def sums_in_half(A, B, shapeB, absmax, code, blocksize):
    return reference("gemv_4bit", A.to(torch.bfloat16), B, shapeB, absmax, code, blocksize).to(A.dtype)

def writes_gradient(name, g, *rest):
    reference("optimizer_update_32bit", name, g, *rest)
    g.zero_()

def forgets_the_state(name, g, p, state1, *rest):
    kept = state1.clone()
    reference("optimizer_update_8bit_blockwise", name, g, p, state1, *rest)
    state1.copy_(kept)

def fails_when_empty(A, code, blocksize):
    return reference("quantize_blockwise", A, code, blocksize) if A.numel() else 1 / 0

calls = iter(range(10**9))

def moody(A, B, row_stats, col_stats, bias=None, dtype=torch.float16):
    # Each result is within the tolerance of the truth.
    return reference("int8_scaled_mm", A, B, row_stats, col_stats, bias, dtype) * (1 + next(calls) % 2 * 2.0**-10)

def transposed_result(A, B, shapeB, *rest):
    result = reference("gemm_4bit_transposed", A, B, shapeB, *rest)
    return result.mT.contiguous().mT if result.dim() > 1 else result

kernels = [
    Kernel("int8_vectorwise_quant", statistics_in_half),
    Kernel("dequantize_4bit.out", writes_nothing),
    Kernel("int8_linear_matmul.out", takes_out_for_dense),
    Kernel("int8_mm_dequant", shares_memory, fills_float32),
    Kernel("gemv_4bit", sums_in_half),
    Kernel("optimizer_update_32bit", writes_gradient),
    Kernel("optimizer_update_8bit_blockwise", forgets_the_state),
    Kernel("quantize_blockwise", fails_when_empty),
    Kernel("int8_scaled_mm", moody),
    Kernel("gemm_4bit_transposed", transposed_result),
]
backend = Backend(
    name="faulty", version="1", devices=("cpu",), op_api=(1, 1), probe=lambda: Availability(True), load=lambda: kernels
)
"""

#: Op, the checks to run, a check that must fail, and a part of what it says.
FOUND = {
    "a wrong dtype": ("int8_vectorwise_quant", "values", "torch.float16"),
    "an .out that writes nothing": ("dequantize_4bit", "out_overload", "a dense buffer"),
    "an .out that takes strides for dense": ("int8_linear_matmul", "out_overload", "a buffer with gaps"),
    "a result in the memory of an argument": ("int8_mm_dequant", "arguments_untouched", "the op must not write"),
    "sums of too few bits": ("gemv_4bit", "values", "relative error"),
    "a gradient that is written": ("optimizer_update_32bit", "values", "the gradient was written"),
    "a state that is not written": ("optimizer_update_8bit_blockwise", "values", "a code is not the nearest one"),
    "an empty tensor": ("quantize_blockwise", "values", "ZeroDivisionError"),
    "results that change": ("int8_scaled_mm", "deterministic", "of the second call"),
    "strides that are not those of the fake result": ("gemm_4bit_transposed", "opcheck", ""),
}

#: Plugins in upstream's style answer for their errors themselves: no check of the contract stands before them.
ERRORS = """
import torch
from bitsandbytes.errors import ArgumentError

def backend():
    @torch.library.impl("bitsandbytes::int8_linear_matmul", "CPU")
    def int8_linear_matmul(A, B):
        if A.dtype != torch.int8:
            raise {error}
        if A.shape[-1] != B.shape[-1]:
            raise ArgumentError(f"bitsandbytes::int8_linear_matmul: B has shape {{tuple(B.shape)}}")
        return A.int() @ B.int().mT
"""

SUITE = """
from pathlib import Path
from bitsandbytes.testing import BackendSuite

class TestConformance(BackendSuite):
    device = "cpu"
    gaps = Path(__file__).with_name("gaps.txt")
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory, fork_server):
    """One run over all the faults."""
    from conftest import PluginSite

    site = PluginSite(tmp_path_factory.mktemp("faults"), fork_server)
    site.install("faulty", FAULTS)
    patterns = [option for op, check, _text in FOUND.values() for option in ("-k", f"{check}-{op}-*")]
    result = site.bnb("plugins", "check", "faulty", "--json", *patterns)
    assert result.returncode == 1, result.stderr
    (report,) = json.loads(result.stdout)
    return report


@pytest.mark.parametrize(("op", "check", "text"), FOUND.values(), ids=FOUND)
def test_each_fault_is_found(report, op, check, text):
    texts = [failure["text"] for failure in report["failures"] if failure["id"].startswith(f"{check}-{op}-")]
    assert any(text in found for found in texts), texts


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ('RuntimeError("bitsandbytes::int8_linear_matmul: A has a wrong dtype")', "RuntimeError"),
        ('ArgumentError("bitsandbytes::int8_linear_matmul: wrong dtype")', "the error does not name 'A'"),
        ('ArgumentError("A has a wrong dtype")', "the error does not name 'int8_linear_matmul'"),
    ],
)
def test_an_error_that_does_not_say_what_is_wrong(plugin_site, error, said):
    plugin_site.install("styled", ERRORS.format(error=error))
    result = plugin_site.bnb("plugins", "check", "styled", "--json", "-k", "refuses-int8_linear_matmul-*")
    assert result.returncode == 1, result.stderr
    (report,) = json.loads(result.stdout)
    (failure,) = report["failures"]
    assert failure["id"] == "refuses-int8_linear_matmul-dtype"
    assert said in failure["text"]


@pytest.mark.parametrize(
    ("gaps", "outcome", "said"),
    [
        ("", "1 failed, 4 passed", "relative error"),
        ("values-gemv_4bit-*: half sums\n", "4 passed, 1 xfailed", ""),
        ("*-gemv_4bit-*: half sums\n", "4 failed, 1 xfailed", "passes, but is listed as a gap: half sums"),
    ],
    ids=["not listed", "listed", "listed, but passes"],
)
def test_the_suite_weighs_gaps(plugin_site, tmp_path, gaps, outcome, said):
    """An unlisted failure fails, a listed one is expected, and a listed check that passes fails."""
    plugin_site.install("faulty", FAULTS)
    (tmp_path / "test_conform.py").write_text(SUITE)
    (tmp_path / "gaps.txt").write_text(gaps)
    result = plugin_site.run(
        "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", "-rx", "-k",
        "gemv_4bit and ((values and nf4-1x64x64-float32) or refuses)", str(tmp_path / "test_conform.py"),
        BNB_BACKENDS="faulty", BNB_DISABLE_BACKENDS=None, BNB_BACKENDS_STRICT="1",
    )  # fmt: skip
    counts = result.stdout.splitlines()[-1].strip("= ").partition(" in ")[0].split(", ")
    assert [count for count in counts if "deselected" not in count] == outcome.split(", "), (
        result.stdout[-3000:] + result.stderr
    )
    assert said in result.stdout


# --- what calls the kit makes -----------------------------------------------------------------------

#: Ops whose operands or results have one dtype only.
ONE_DTYPE = {"int8_linear_matmul", "int8_vectorwise_dequant"}
#: Takes one row, which is never empty.
ONE_ROW = {"gemv_4bit"}


def dtypes_of(arguments):
    tensors = {tensor.dtype for tensor in flat_tensors(arguments)}
    return tensors | {value for value in arguments if isinstance(value, torch.dtype)}


@pytest.mark.parametrize("op", CASES)
def test_dtypes_and_sizes_of_the_cases_of_an_op(op):
    calls = [case.arguments() for case in CASES[op]]
    if op not in ONE_DTYPE:
        assert {torch.float32, torch.float16, torch.bfloat16} <= set().union(*map(dtypes_of, calls))
    sizes = {tensor.numel() for call in calls for tensor in flat_tensors(call) if tensor.dim()}
    assert any(size % 2 for size in sizes if size > 1), "no odd size"
    assert 0 in sizes or op in ONE_ROW, "no empty tensor"


@pytest.mark.parametrize("op", [op for op in CASES if "blocksize" in OPS[op].schema])
def test_block_sizes_of_the_cases_of_an_op(op):
    names = list(inspect.signature(OPS[op].check).parameters)
    blocksizes = {case.arguments()[names.index("blocksize")] for case in CASES[op]}
    assert len(blocksizes) >= 2
    assert max(blocksizes) >= 2048
