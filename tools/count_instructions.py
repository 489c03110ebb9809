"""Count the instructions of the CPU kernels under valgrind, and compare them with the table of the last count.

Counts hardly depend on the machine, unlike seconds, so that a kernel that became slower is noticed on any. The
program is the target ``instructions`` of ``packages/bnb-cpu`` built with ``-DBNB_TESTS=ON``::

    python tools/count_instructions.py build/native/tests/native/instructions
    python tools/count_instructions.py build/native/tests/native/instructions --update

Exit code 1 when a kernel needs more instructions per element than the table says and the tolerance allows, or is
not in the table. Other compilers give other counts: then differences are reported, and nothing fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "packages" / "bnb-cpu" / "tests" / "native" / "instructions.json"
#: valgrind knows no AVX-512.
INSTRUCTION_SETS = ("scalar", "avx2")
TOLERANCE = 0.10

Counts = dict[str, float]


def count(program: Path, isa: str) -> tuple[str, Counts]:
    """The compiler of the program, and instructions per element of each of its calls."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        valgrind = ("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}")
        # Collecting begins and ends with the function; each of its calls ends a file of its own.
        options = ("--toggle-collect=measured", "--dump-after=measured")
        result = subprocess.run([*valgrind, *options, str(program), isa], capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"valgrind failed on {isa}:\n{result.stderr}")
        compiler, *calls = result.stdout.splitlines()
        counts = {}
        for number, line in enumerate(calls, start=1):
            elements, _, name = line.partition(" ")
            found = re.search(r"^(?:totals|summary): (\d+)$", Path(f"{out}.{number}").read_text(), re.MULTILINE)
            if found is None or int(found[1]) == 0:
                raise SystemExit(f"callgrind counted nothing for {isa}, {name}")
            counts[name] = round(int(found[1]) / int(elements), 4)
    return compiler, counts


def major(compiler: str) -> str:
    """Name and first number of the version: ``GNU 12``."""
    name, _, version = compiler.partition(" ")
    return f"{name} {version.partition('.')[0]}"


def compare(wanted: dict[str, Counts], counted: dict[str, Counts], tolerance: float) -> tuple[list[str], list[str]]:
    """What became worse or is not in the table, and what became better or is in the table alone."""
    worse, better = [], []
    for isa, counts in counted.items():
        before = wanted.get(isa, {})
        for name, now in counts.items():
            if name not in before:
                worse.append(f"{isa}, {name}: {now} instructions per element, not in the table")
            elif abs(now / before[name] - 1) > tolerance:
                text = (
                    f"{isa}, {name}: {before[name]} -> {now} instructions per element ({now / before[name] - 1:+.0%})"
                )
                (worse if now > before[name] else better).append(text)
        better += [f"{isa}, {name}: in the table, but no longer counted" for name in before if name not in counts]
    return worse, better


def main() -> int:
    """Count and compare, or count and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the program `instructions` of packages/bnb-cpu")
    parser.add_argument("--table", type=Path, default=TABLE, help="table to compare with (beside the program's source)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"growth that passes ({TOLERANCE})")
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    arguments = parser.parse_args()
    counted = {}
    for isa in INSTRUCTION_SETS:
        compiler, counted[isa] = count(arguments.program, isa)
    if arguments.update:
        table = {"compiler": compiler, "instructions_per_element": counted}
        arguments.table.write_text(json.dumps(table, indent=1) + "\n")
        print(f"{arguments.table}: {sum(map(len, counted.values()))} counts")
        return 0
    table = json.loads(arguments.table.read_text())
    worse, better = compare(table["instructions_per_element"], counted, arguments.tolerance)
    for title, texts in (("worse", worse), ("better, or gone (--update writes the new table)", better)):
        if texts:
            print("\n  ".join([f"{title}:", *texts]))
    total = sum(map(len, counted.values()))
    if major(compiler) != major(table["compiler"]):
        print(f"{total} counts, only reported: compiled by {compiler}, the table is of {table['compiler']}")
        return 0
    print(f"{total} counts, {len(worse)} worse, {len(better)} better")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
