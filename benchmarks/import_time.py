"""How long ``import bitsandbytes`` takes beside ``import torch``, which it cannot do without.

Fresh interpreters import the one and the other in turn; the least of several runs counts, since every
disturbance only adds. The aim: at most 1.1 times torch's time and 150 ms. With ``--modules`` it also lists
what the time is spent on::

    python benchmarks/import_time.py
    python benchmarks/import_time.py --runs 20 --modules 15
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys

FACTOR, ALLOWANCE = 1.1, 0.150

MEASURE = """
import gc, json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, len(sys.modules)]))
"""


def measure(statement: str, environment: dict[str, str]) -> tuple[float, float, int]:
    """Seconds by the clock, seconds of the processor, and modules, of an import in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.format(statement=statement)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    wall, cpu, modules = json.loads(result.stdout.splitlines()[-1])
    return wall, cpu, modules


def costly_modules(count: int, environment: dict[str, str]) -> list[tuple[float, str]]:
    """The modules with the longest import of their own, those of torch left out: milliseconds and name."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch\nimport bitsandbytes"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \| ( *)(\S+)$", result.stderr, re.MULTILINE)
    last_of_torch = max(place for place, (_time, indent, name) in enumerate(lines) if name == "torch" and not indent)
    after = [(int(microseconds) / 1000, name) for microseconds, _indent, name in lines[last_of_torch + 1 :]]
    return sorted(after, reverse=True)[:count]


def main() -> int:
    """Measure and print; exit code 1 when the aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8, help="interpreters per import (8)")
    parser.add_argument("--modules", type=int, default=0, help="also list this many modules by their own time")
    parser.add_argument("--backends", help="BNB_BACKENDS for the runs; by default every installed backend")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
    if arguments.backends is not None:
        environment["BNB_BACKENDS"] = arguments.backends
    runs: dict[str, list[tuple[float, float, int]]] = {"torch": [], "bitsandbytes": []}
    for _run in range(arguments.runs):
        for name, times in runs.items():
            times.append(measure(f"import {name}", environment))
    best = {name: tuple(min(column) for column in zip(*times, strict=True)) for name, times in runs.items()}
    limit = FACTOR * best["torch"][0] + ALLOWANCE
    report = {
        "seconds": {name: row[0] for name, row in best.items()},
        "processor_seconds": {name: row[1] for name, row in best.items()},
        "modules": {name: row[2] for name, row in best.items()},
        "limit": limit,
        "within": best["bitsandbytes"][0] <= limit,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for name, (wall, cpu, modules) in best.items():
            print(f"import {name:<13}{wall * 1000:8.0f} ms {cpu * 1000:8.0f} ms of the processor {modules:6} modules")
        print(f"limit               {limit * 1000:8.0f} ms: {'kept' if report['within'] else 'missed'}")
    for milliseconds, name in costly_modules(arguments.modules, environment) if arguments.modules else ():
        print(f"  {milliseconds:7.1f} ms  {name}")
    return 0 if report["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
