"""``bnb plugins check``: the kit finds what is wrong with a backend, and says so in table, JSON and exit code."""

import json

import pytest

from bitsandbytes.testing.checks import CHECKS, representatives
from bitsandbytes.testing.gaps import Gaps
from bitsandbytes.testing.selection import Selection, checked_ops

#: A backend that does something else wrong with each op.
FAULTY = """
import os, signal
import torch
from bitsandbytes.backends import Availability, Backend, Kernel
from bitsandbytes.contract import OPS

calls = iter(range(10**9))

def reference(op, *args):
    return OPS[op].reference(*args)

def wrong_number(A, stats):
    return reference("int8_vectorwise_dequant", A, stats) + 1e-6

def half_of_out(A, B, out):
    out[:1] = reference("int8_linear_matmul", A, B)[:1]

def writes_argument(A, threshold=0.0):
    results = reference("int8_double_quant", A, threshold)
    A.zero_()
    return results

def moody(A, code, blocksize):
    codes, absmax = reference("quantize_blockwise", A, code, blocksize)
    return codes, absmax + next(calls) % 2

def ignores_strides(A, absmax, code, blocksize, dtype):
    dense = torch.empty_like(A, memory_format=torch.contiguous_format)
    return reference("dequantize_blockwise", A.as_strided(A.shape, dense.stride()), absmax, code, blocksize, dtype)

def wrong_dtype(A, row_stats, col_stats, dtype=None, bias=None):
    return reference("int8_mm_dequant", A, row_stats, col_stats, dtype, bias).double()

def crashes(A, B, row_stats, col_stats, bias=None, dtype=torch.float16):
    if A.shape[0] == 17:
        print("about to crash")
        os.kill(os.getpid(), signal.SIGKILL)
    return reference("int8_scaled_mm", A, B, row_stats, col_stats, bias, dtype)

def rows_are_few(A, B):
    return A.shape[0] < 4

def int8_linear_matmul(A, B):
    return A.int() @ B.int().T

kernels = [
    Kernel("int8_vectorwise_dequant", wrong_number), Kernel("int8_linear_matmul.out", half_of_out),
    Kernel("int8_double_quant", writes_argument), Kernel("quantize_blockwise", moody),
    Kernel("dequantize_blockwise", ignores_strides), Kernel("int8_mm_dequant", wrong_dtype),
    Kernel("int8_scaled_mm", crashes), Kernel("int8_linear_matmul", int8_linear_matmul, rows_are_few),
]
backend = Backend(
    name="faulty", version="1", devices=("cpu",), op_api=(1, 1), probe=lambda: Availability(True), load=lambda: kernels
)
"""

#: A plugin in upstream's style bypasses the checks of the contract.
UNCHECKED = """
import torch

def backend():
    @torch.library.impl("bitsandbytes::int8_linear_matmul", "CPU")
    def int8_linear_matmul(A, B):
        return (A.float() @ B.float().T).int()
"""


def check(site, *arguments):
    result = site.bnb("plugins", "check", *arguments)
    return result.returncode, result


def failed_checks(report, op):
    """Names of the checks of an op that failed."""
    return {failure["id"].split("-")[0] for failure in report["failures"] if failure["id"].split("-")[1] == op}


@pytest.fixture(scope="module")
def faulty_report(tmp_path_factory, fork_server):
    """One run over all the faults: each needs processes that import torch."""
    from conftest import PluginSite

    path = tmp_path_factory.mktemp("faulty")
    site = PluginSite(path, fork_server)
    site.install("faulty", FAULTY)
    ops = (
        "int8_vectorwise_dequant", "int8_linear_matmul", "int8_double_quant", "quantize_blockwise",
        "dequantize_blockwise", "int8_mm_dequant", "int8_scaled_mm",
    )  # fmt: skip
    options = [option for op in ops for option in ("--op", op)]
    code, result = check(site, "faulty", "--json", *options)
    assert code == 1, result.stderr
    (report,) = json.loads(result.stdout)
    return report


@pytest.mark.parametrize(
    ("op", "found"),
    [
        ("int8_vectorwise_dequant", {"values", "strided"}),
        ("int8_linear_matmul", {"out_overload"}),
        ("int8_double_quant", {"arguments_untouched"}),
        ("quantize_blockwise", {"values", "deterministic", "round_trip"}),
        ("dequantize_blockwise", {"strided"}),
        ("int8_mm_dequant", {"values", "opcheck"}),
        ("int8_scaled_mm", {"values"}),
    ],
)
def test_each_fault_is_found(faulty_report, op, found):
    assert found <= failed_checks(faulty_report, op)
    assert faulty_report["ops"][op]["failed"] > 0


def test_what_is_right_passes(faulty_report):
    assert failed_checks(faulty_report, "int8_linear_matmul") == {"out_overload"}
    assert failed_checks(faulty_report, "dequantize_blockwise") == {"strided"}
    assert not faulty_report["conforms"]


def test_a_crash_fails_its_check_and_the_run_goes_on(faulty_report):
    dead = [failure for failure in faulty_report["failures"] if failure["text"] == "the process died: SIGKILL"]
    assert faulty_report["crashes"] == len(dead) > 1
    assert all(failure["id"].split("-")[1] == "int8_scaled_mm" and "17x33x96" in failure["id"] for failure in dead)
    report = faulty_report["ops"]["int8_scaled_mm"]
    assert report["passed"] > report["failed"]
    counted = sum(op["passed"] + op["failed"] + op["gaps"] for op in faulty_report["ops"].values())
    assert counted == faulty_report["total"]


def test_native_calls_are_counted(faulty_report):
    partly = faulty_report["ops"]["int8_linear_matmul"]
    assert 0 < partly["native"] < partly["calling"]
    whole = faulty_report["ops"]["dequantize_blockwise"]
    assert whole["native"] == whole["calling"]


def test_declared_gaps(plugin_site):
    plugin_site.install("faulty", FAULTY)
    gaps = plugin_site.path / "gaps.txt"
    gaps.write_text("# comment\nvalues-int8_vectorwise_dequant-[1-9]*: it adds a little\n")
    arguments = ("faulty", "--op", "int8_vectorwise_dequant", "-k", "values", "--gaps", str(gaps))
    code, result = check(plugin_site, *arguments)
    assert code == 0, result.stdout + result.stderr
    assert "faulty conforms: 4 checks" in result.stdout
    assert "it adds a little (AssertionError)" in result.stdout
    gaps.write_text("*: nothing works\n")
    code, result = check(plugin_site, *arguments[:3], "-k", "refuses-*-dtype", *arguments[5:])
    assert code == 1
    assert "passes, but is listed as a gap: nothing works" in result.stdout


def test_the_table_and_failures_for_people(plugin_site):
    plugin_site.install("faulty", FAULTY)
    code, result = check(plugin_site, "faulty", "--op", "int8_vectorwise_dequant", "-k", "values*")
    assert code == 1
    assert "Backend 'faulty' on 'cpu'" in result.stdout
    (row,) = [line.split("│") for line in result.stdout.splitlines() if line.startswith("int8_vectorwise_dequant ")]
    assert [cell.strip() for cell in row[1:]] == ["4 of 4", "1", "3", "0"]
    assert "values-int8_vectorwise_dequant-64x64" in result.stdout
    assert "result 0: 4" in result.stdout
    assert "differ, first at" in result.stdout
    assert "faulty does not conform" in result.stdout


def test_a_plugin_in_the_style_of_upstream(plugin_site):
    plugin_site.install("styled", UNCHECKED)
    code, result = check(plugin_site, "styled", "--json", "--op", "int8_linear_matmul")
    assert code == 1
    (report,) = json.loads(result.stdout)
    assert report["ops"]["int8_linear_matmul"]["native"] is None
    assert failed_checks(report, "int8_linear_matmul") == {"refuses"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nobody",), "no backend is called 'nobody' (installed: "),
        (("faulty", "--op", "gemm_5bit"), "no op is called 'gemm_5bit'"),
        (("faulty", "-k", "no-such-check"), "no check fits"),
        (("faulty", "--gaps", "gaps.txt"), "expected '<pattern>: <reason>', got 'values-*'"),
        (("faulty", "--gaps", "nowhere.txt"), "does not exist"),
    ],
)
def test_wrong_usage(plugin_site, arguments, text):
    plugin_site.install("faulty", FAULTY)
    (plugin_site.path / "gaps.txt").write_text("values-*\n")
    code, result = check(plugin_site, *arguments)
    assert code == 2
    assert text in result.stderr


def test_a_backend_that_cannot_be_checked_here(plugin_site):
    plugin_site.install(
        "faulty", FAULTY.replace("Availability(True)", "Availability(False, 'no card in this machine')")
    )
    code, result = check(plugin_site, "faulty")
    assert code == 1
    assert "backend 'faulty' cannot be checked here: no card in this machine" in result.stderr
    plugin_site.install("mystery", "raise OSError('libgone.so: cannot open shared object file')")
    code, result = check(plugin_site, "mystery")
    assert code == 1
    assert "libgone.so" in result.stderr


# --- the kit itself -------------------------------------------------------------------------------


def test_ids_are_unique():
    names = [check.id_of(item) for check in CHECKS.values() for item in check.items]
    assert len(names) == len(set(names))


def test_every_op_has_values_refusals_and_slow_checks():
    for kind in ("values", "refuses", "opcheck", "compiles", "strided", "deterministic", "arguments_untouched"):
        assert {item.op for item in CHECKS[kind].items} == set(checked_ops()), kind


def test_representatives_are_spread_over_the_cases_of_each_op():
    cases = list(CHECKS["values"].items)
    few = representatives(cases)
    assert {case.op for case in few} == {case.op for case in cases}
    assert len(few) < len(cases) / 10


def test_selection_by_part_and_by_pattern():
    def names(*patterns, ops=()):
        return {check.id_of(item) for check, item in Selection(ops, patterns).checks()}

    assert names("opcheck-gemm_4bit-*") == {name for name in names() if name.startswith("opcheck-gemm_4bit-")}
    assert names("bfloat16") == {name for name in names() if "bfloat16" in name}
    assert names("opcheck-gemm_4bit-*", "compiles") > names("compiles")
    assert all("-gemv_4bit-" in name for name in names(ops=("gemv_4bit",)))


def test_a_gap_without_a_reason_is_refused(tmp_path):
    path = tmp_path / "gaps.txt"
    path.write_text("\n# comment\nvalues-*:\n")
    with pytest.raises(ValueError, match=r"gaps.txt:3: expected '<pattern>: <reason>'"):
        Gaps.read(path)
