"""Quantization and layers on the CPU, next to torch and to another release of bitsandbytes.

    python benchmarks/cpu.py [--peer PYTHON] [--torchao PYTHON] [--rounds N] [--busy] [--json FILE]

Each library runs in a process of its own, in turns, so that a change of the machine's mood hits all of
them; the figure is the median of all calls of all turns, or with ``--busy`` the least processor time per
thread. ``--peer`` names the interpreter of an environment with the other release. Only names that both
releases have are used. ``--torchao`` names that of an environment with torchao, whose nearest relatives of
two of the layers are timed in compiled form.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Pairs = list[tuple[float, float]]
Times = dict[str, dict[str, Pairs]]

#: Input and output features of the layers.
SIZE = 4096
ROWS = (1, 8, 64, 512)
DTYPES = (torch.bfloat16, torch.float32)
LAYERS = ("Linear4bit nf4", "Linear4bit nf4 nested", "Linear8bitLt t=0", "Linear8bitLt t=6")


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def timed(call: Callable[[], Any], seconds: float) -> Pairs:
    """Milliseconds of each call, on the clock and of the processor, after two that do not count."""
    call()
    call()
    times: Pairs = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 500):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        clock, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        times.append((1e3 * clock, 1e3 * cpu / torch.get_num_threads()))
    return times


def forward(layer: torch.nn.Module, rows: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A call without gradients on random activations."""
    activations = torch.randn(rows, SIZE, dtype=dtype)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return layer(activations)

    return call


def torch_measurements(seconds: float) -> Iterator[tuple[str, Pairs]]:
    """A copy, and dense layers."""
    source, target = torch.zeros(2**24), torch.zeros(2**24)
    yield "copy", timed(lambda: target.copy_(source), seconds)
    for dtype in DTYPES:
        layer = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
        for rows in ROWS:
            yield f"nn.Linear {name_of(dtype)} M={rows}", timed(forward(layer, rows, dtype), seconds)


def quantization(seconds: float) -> Iterator[tuple[str, Pairs]]:
    """Quantization and dequantization of one matrix."""
    from bitsandbytes import functional

    for dtype in DTYPES:
        weight, name = torch.randn(SIZE, SIZE).to(dtype), name_of(dtype)
        packed = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        codes = functional.quantize_blockwise(weight, blocksize=256)
        calls: dict[str, Callable[[], Any]] = {
            "quantize_4bit nf4": lambda x=weight: functional.quantize_4bit(x, quant_type="nf4", blocksize=64),
            "dequantize_4bit nf4": lambda x=packed: functional.dequantize_4bit(*x),
            "quantize_blockwise": lambda x=weight: functional.quantize_blockwise(x, blocksize=256),
            "dequantize_blockwise": lambda x=codes: functional.dequantize_blockwise(*x),
            "int8_vectorwise_quant": lambda x=weight: functional.int8_vectorwise_quant(x),
        }
        for case, call in calls.items():
            yield f"{case} {name}", timed(call, seconds)


def build_layer(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """One of :data:`LAYERS`, quantized."""
    from bitsandbytes import nn

    if name.startswith("Linear4bit"):
        nested = name.endswith("nested")
        layer = nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested)
        layer.weight = layer.weight.to("cpu")
    else:
        threshold = float(name.rpartition("=")[2])
        layer = nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False, threshold=threshold).to("cpu")
    return layer.eval()


def layers(seconds: float) -> Iterator[tuple[str, Pairs]]:
    """Forward of the quantized layers."""
    for dtype in DTYPES:
        for name in LAYERS:
            layer = build_layer(name, dtype)
            for rows in ROWS:
                yield f"{name} {name_of(dtype)} M={rows}", timed(forward(layer, rows, dtype), seconds)


def torchao_measurements(seconds: float) -> Iterator[tuple[str, Pairs]]:
    """Compiled layers of torchao, by the layer that each is next to: NF4 weights, and int8 weights and activations."""
    from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    relatives = {
        "Linear4bit nf4 nested": NF4WeightOnlyConfig,
        "Linear8bitLt t=0": Int8DynamicActivationInt8WeightConfig,
    }
    for dtype in DTYPES:
        for name, configuration in relatives.items():
            holder = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)).eval()
            quantize_(holder, configuration())
            layer = torch.compile(holder)
            for rows in ROWS:
                yield f"{name} {name_of(dtype)} M={rows}", timed(forward(layer, rows, dtype), seconds)
            torch._dynamo.reset()


def work(library: str, seconds: float) -> None:
    """Write the times of a library to standard output."""
    torch.manual_seed(0)
    if library == "torch":
        found = dict(torch_measurements(seconds))
    elif library == "torchao":
        found = dict(torchao_measurements(seconds))
    else:
        found = dict(quantization(seconds)) | dict(layers(seconds))
    print(json.dumps(found))


def collect(script: str, others: dict[str, str | None], rounds: int, seconds: float, busy: bool) -> Times:
    """Times by library and case, as ``script --work LIBRARY --seconds N`` prints them.

    ``others``: interpreters of libraries that this environment does not have.
    """
    interpreters = {"torch": sys.executable, "bitsandbytes": sys.executable, **others}
    found: Times = {}
    # Threads that spin while they wait would count as work.
    environment = os.environ | ({"OMP_WAIT_POLICY": "PASSIVE"} if busy else {})
    for _round in range(rounds):
        for library, interpreter in interpreters.items():
            if interpreter is None:
                continue
            command = [interpreter, str(Path(script).resolve()), "--work", library, "--seconds", str(seconds)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            for case, times in json.loads(output.splitlines()[-1]).items():
                found.setdefault(library, {}).setdefault(case, []).extend(times)
    return found


def processor() -> str:
    """Name of the processor where Linux tells it, else of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(found: Times, busy: bool) -> str:
    """A Markdown table."""

    def figure(library: str, case: str) -> float | None:
        pairs = found.get(library, {}).get(case)
        if pairs is None:
            return None
        return min(cpu for clock, cpu in pairs) if busy else statistics.median(clock for clock, cpu in pairs)

    copy = figure("torch", "copy") or float("nan")
    lines = [
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, copy "
        f"{2 * 4 * 2**24 / copy / 1e6:.1f} GB/s{', least processor time' if busy else ', median on the clock'}.",
        "",
        "| case | ms | peer ms | peer / ours | nn.Linear ms | nn.Linear / ours | torchao ms | torchao / ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in found["bitsandbytes"]:
        ours, theirs = figure("bitsandbytes", case), figure("peer", case)
        _layer, marker, rest = (
            case.partition(" bfloat16 M=") if " bfloat16 M=" in case else case.partition(" float32 M=")
        )
        dense = figure("torch", f"nn.Linear{marker}{rest}") if marker else None
        assert ours is not None
        cells = [case, f"{ours:.2f}"]
        for other in (theirs, dense, figure("torchao", case)):
            cells += ["", ""] if other is None else [f"{other:.2f}", f"{other / ours:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with another release of bitsandbytes")
    parser.add_argument("--torchao", help="interpreter of an environment with torchao")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each library (default: 3)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case of a turn (default: 0.5)")
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
        options.json.write_text(json.dumps(found), encoding="utf-8")
    print(report(found, options.busy))


if __name__ == "__main__":
    main()
