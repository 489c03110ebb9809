"""Optimizer steps on the CPU, next to torch and to another release of bitsandbytes.

    python benchmarks/cpu_optim.py [--peer PYTHON] [--torchao PYTHON] [--rounds N] [--busy] [--json FILE]

Each library runs in a process of its own, in turns, so that a change of the machine's mood hits all of
them; the figure is the median of all steps of all turns. ``--peer`` names the interpreter of an environment
with the other release, ``--torchao`` that of one with torchao. "Floor" is the time that the measured copy
bandwidth needs for the bytes that a step has to read and to write. ``--busy``, for a machine that has other
work, takes the processor time of all threads by their number instead of the time on the clock; threads then
sleep instead of spinning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpu import Times, collect

MILLION = 2**20


class Case(NamedTuple):
    """An optimizer and the tensors that it moves."""

    name: str
    dtype: torch.dtype
    count: int
    size: int
    #: Bytes of the states per element, read and written once each.
    state_bytes: float
    settings: dict[str, Any]

    @property
    def id(self) -> str:
        """Name in the table."""
        return f"{self.name} {self.count} x {self.size} {str(self.dtype).removeprefix('torch.')}"

    @property
    def traffic(self) -> float:
        """Bytes that a step moves: gradient read, parameter and states read and written."""
        return self.count * self.size * (3 * self.dtype.itemsize + 2 * self.state_bytes)


def _case(name: str, state_bytes: float, dtype: torch.dtype = torch.float32, **settings: Any) -> Case:
    return Case(name, dtype, 16, MILLION, state_bytes, settings)


BYTE = 1 + 4 / 256
CASES = (
    _case("AdamW8bit", 2 * BYTE),
    _case("AdamW8bit", 2 * BYTE, torch.bfloat16),
    _case("AdamW32bit", 8),
    _case("AdamW32bit", 8, torch.bfloat16),
    _case("Lion8bit", BYTE),
    _case("AdEMAMix8bit", 3 * BYTE),
    _case("LAMB8bit", 2 * BYTE),
    _case("RMSprop8bit", BYTE),
    Case("AdamW8bit", torch.float32, 2000, 8192, 2 * BYTE, {"min_8bit_size": 1}),
    Case("AdamW8bit", torch.float32, 2000, 256, 2 * BYTE, {"min_8bit_size": 1}),
)
#: torch's own AdamW with float32 states, two ways.
TORCH_CASES = tuple(
    Case(f"torch.AdamW {way}", dtype, count, size, 8 if dtype == torch.float32 else 4, {way: True})
    for way in ("fused", "foreach")
    for dtype, count, size in (
        (torch.float32, 16, MILLION),
        (torch.bfloat16, 16, MILLION),
        (torch.float32, 2000, 8192),
        (torch.float32, 2000, 256),
    )
)


def tensors_of(case: Case) -> list[torch.Tensor]:
    """Parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for _index in range(case.count):
        parameter = torch.nn.Parameter(torch.randn(case.size, generator=generator).to(case.dtype))
        parameter.grad = (torch.randn(case.size, generator=generator) * 0.01).to(case.dtype)
        params.append(parameter)
    return params


def timed(step: Callable[[], Any], seconds: float) -> list[tuple[float, float]]:
    """Milliseconds of each call, on the clock and of the processor, after two that do not count."""
    step()
    step()
    times: list[tuple[float, float]] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 200):
        start, start_cpu = time.perf_counter(), time.process_time()
        step()
        clock, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        times.append((1e3 * clock, 1e3 * cpu / torch.get_num_threads()))
    return times


def measurements(library: str, seconds: float) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Times by name of the case."""
    if library == "torch":
        source, target = torch.zeros(16 * MILLION), torch.zeros(16 * MILLION)
        yield "copy", timed(lambda: target.copy_(source), seconds)
        for case in TORCH_CASES:
            yield case.id, timed(torch.optim.AdamW(tensors_of(case), lr=1e-4, **case.settings).step, seconds)
        return
    if library == "torchao":
        from torchao.optim import AdamW8bit

        for case in CASES:
            # It compiles a step with all tensors in it; thousands of them would take too long.
            if case.name == "AdamW8bit" and case.count <= 16:
                yield case.id, timed(AdamW8bit(tensors_of(case), lr=1e-4).step, seconds)
        return
    import bitsandbytes

    for case in CASES:
        try:
            optimizer = getattr(bitsandbytes.optim, case.name)(tensors_of(case), lr=1e-4, **case.settings)
            yield case.id, timed(optimizer.step, seconds)
        except (NotImplementedError, ValueError) as error:
            print(f"{case.id}: {error}", file=sys.stderr)


def work(library: str, seconds: float) -> None:
    """Write the times of a library to standard output."""
    print(json.dumps(dict(measurements(library, seconds))))


def report(found: Times, busy: bool) -> str:
    """A Markdown table."""
    median = {
        library: {case: statistics.median(pair[busy] for pair in pairs) for case, pairs in cases.items()}
        for library, cases in found.items()
    }
    copy = median["torch"].pop("copy")
    bandwidth = 2 * 4 * 16 * MILLION / copy
    lines = [
        f"Copy of 64 MiB: {copy:.2f} ms, {bandwidth / 1e6:.1f} GB/s. torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads{', processor time' if busy else ''}.",
        "",
        "| case | floor ms | ms | x floor | peer ms | peer / ours | torchao ms | torchao / ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in (*CASES, *TORCH_CASES):
        ours = median["torch" if case in TORCH_CASES else "bitsandbytes"].get(case.id)
        floor = case.traffic / bandwidth
        if ours is not None:
            cells = [case.id, f"{floor:.2f}", f"{ours:.2f}", f"{ours / floor:.2f}"]
            for library in ("peer", "torchao"):
                other = median.get(library, {}).get(case.id)
                cells += ["", ""] if other is None else [f"{other:.1f}", f"{other / ours:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with another release of bitsandbytes")
    parser.add_argument("--torchao", help="interpreter of an environment with torchao")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each library (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case of a turn (default: 1)")
    parser.add_argument("--busy", action="store_true", help="take processor time, for a machine with other work")
    parser.add_argument("--json", type=Path, help="file for all times")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.seconds)
        return
    others = {"peer": options.peer, "torchao": options.torchao}
    found = collect(__file__, others, options.rounds, options.seconds, options.busy)
    if options.json:
        options.json.write_text(json.dumps(found))
    print(report(found, options.busy))


if __name__ == "__main__":
    main()
