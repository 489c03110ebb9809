"""Every instruction set of this machine gives the results that the contract asks for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from bitsandbytes.testing import BackendSuite, Case, all_cases
from bnb_cpu.native import _C

CASES = {op: list(cases) for op, cases in itertools.groupby(sorted(all_cases(), key=lambda c: c.op), lambda c: c.op)}
RunPython = Callable[..., CompletedProcess[str]]


@pytest.mark.parametrize("op", CASES)
def test_values(isa: str, op: str) -> None:
    suite = BackendSuite()
    failures = [f"{case.id}: {text}" for case in CASES[op] if (text := failure(suite, case))]
    assert not failures, f"{len(failures)} of {len(CASES[op])} cases fail with {isa}:\n" + "\n".join(failures[:20])


def failure(suite: BackendSuite, case: Case) -> str:
    try:
        suite.test_values(case)
    except AssertionError as error:
        return str(error) or "assertion failed"
    return ""


def test_best_is_chosen(run_python: RunPython) -> None:
    result = run_python("from bnb_cpu.native import _C; print(_C.isa(), *_C.supported_isas())", BNB_CPU_ISA="")
    chosen, *supported = result.stdout.split()
    assert chosen == supported[0]
    assert supported[-1] == "scalar"


@pytest.mark.parametrize("name", _C.isas())
def test_variable_chooses(run_python: RunPython, name: str) -> None:
    result = run_python("from bnb_cpu.native import _C; print(_C.isa())", BNB_CPU_ISA=name)
    if name in _C.supported_isas():
        assert result.stdout.strip() == name
    else:
        assert f"instruction set '{name}' is not supported by this machine" in result.stderr


@pytest.mark.parametrize("name", ["mmx", "AVX2", "avx2 "])
def test_bad_variable_is_explained(run_python: RunPython, name: str) -> None:
    code = """
import torch
from bitsandbytes import functional, errors
try:
    functional.quantize_4bit(torch.ones(64))
except errors.BackendError as error:
    print(error)
"""
    text = run_python(code, BNB_CPU_ISA=name).stdout
    for part in ("BNB_CPU_ISA", f"'{name}'", "scalar", "cpu"):
        assert part in text


def test_set_isa_refuses() -> None:
    before = _C.isa()
    for name in ("", "sse9", "AVX2"):
        with pytest.raises(ValueError, match=r"supported here:.*scalar"):
            _C.set_isa(name)
    assert _C.isa() == before
