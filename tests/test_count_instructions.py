"""The guard on instruction counts fails on growth, and only where counts can be compared."""

import json

import count_instructions
import pytest

COUNTS = {"avx2": {"gemm": 2.0, "quantize": 8.0}}


@pytest.mark.parametrize(
    ("counted", "worse", "better"),
    [
        ({"gemm": 2.0, "quantize": 8.0}, [], []),
        ({"gemm": 2.19, "quantize": 7.3}, [], []),
        ({"gemm": 2.3, "quantize": 8.0}, ["avx2, gemm: 2.0 -> 2.3 instructions per element (+15%)"], []),
        ({"gemm": 2.0, "quantize": 4.0}, [], ["avx2, quantize: 8.0 -> 4.0 instructions per element (-50%)"]),
        (
            {"gemm": 2.0, "other": 1.0},
            ["avx2, other: 1.0 instructions per element, not in the table"],
            ["avx2, quantize: in the table, but no longer counted"],
        ),
    ],
)
def test_comparison(counted, worse, better):
    assert count_instructions.compare(COUNTS, {"avx2": counted}, 0.1) == (worse, better)


@pytest.mark.parametrize(
    ("compiler", "code", "said"),
    [("GNU 12.3.0", 1, "2 counts, 2 worse"), ("GNU 13.1", 0, "only reported: compiled by GNU 13.1")],
)
def test_other_compilers_are_only_reported(monkeypatch, capsys, tmp_path, compiler, code, said):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"compiler": "GNU 12.2.0", "instructions_per_element": {"scalar": {"gemm": 1.0}}}))
    monkeypatch.setattr(count_instructions, "count", lambda program, isa: (compiler, {"gemm": 2.0}))
    monkeypatch.setattr("sys.argv", ["count_instructions.py", "program", "--table", str(table)])
    assert count_instructions.main() == code
    assert said in capsys.readouterr().out


def test_the_table_is_written(monkeypatch, tmp_path):
    table = tmp_path / "table.json"
    monkeypatch.setattr(count_instructions, "count", lambda program, isa: ("GNU 12.2.0", {"gemm": 2.0}))
    monkeypatch.setattr("sys.argv", ["count_instructions.py", "program", "--table", str(table), "--update"])
    assert count_instructions.main() == 0
    written = json.loads(table.read_text())
    assert written["compiler"] == "GNU 12.2.0"
    assert set(written["instructions_per_element"]) == set(count_instructions.INSTRUCTION_SETS)
