"""Time whichever ``bitsandbytes`` is importable on an NVIDIA GPU, through its public interface.

Run once per library, with PYTHONPATH choosing it, on the same machine::

    python benchmarks/gpu.py ours --json ours.json
    PYTHONPATH=/folder/of/other python benchmarks/gpu.py upstream --events --json upstream.json
    PYTHONPATH=/folder/of/torchao python benchmarks/gpu.py torchao torchao --json torchao.json

Some calls of bitsandbytes 0.50.2 cannot be captured in a graph, hence ``--events``: where its host is slower than the
device, the host is what is timed.

Each row has the time on the device in microseconds and its ratio to the floor: bytes that must move over the
rate of a large copy, or operations over the rate of a large matrix product, both measured first. Buffers rotate,
so that the cache does not hold what is read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Row = tuple[str, float, float]
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
CACHE_BYTES = 128e6
LEAST_CAPTURED = 40


def copies_beyond_cache(size: float) -> int:
    """Copies of so many bytes that the cache does not hold when they take turns."""
    return 2 + int(CACHE_BYTES // size)


def by_events(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of a call from events around it; the host runs ahead, so its part does not show."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    events = []
    for index in range(repeats):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        calls[index % len(calls)]()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in events)


def by_graph(calls: list[Callable[[], object]]) -> float:
    """Time per call when a graph replays all of them: nothing of the host is in it."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    # Enough of them that the start of the graph does not count.
    rounds = -(-LEAST_CAPTURED // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    return by_events([graph.replay], 15) / (rounds * len(calls))


def by_clock(call: Callable[[], object], repeats: int = 200) -> float:
    """Time of a call on the clock of the host, many in a row."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats * 1e6


class Ceilings:
    """Rates of the card, measured, and the way to time calls on it.

    Args:
        captures: whether the calls of the library can be captured in a graph.
    """

    def __init__(self, captures: bool) -> None:
        self.per_call = by_graph if captures else by_events
        source = torch.randn(2**28, device="cuda")
        target = torch.empty_like(source)
        self.bytes_per_us = 2 * source.nbytes / by_events([lambda: target.copy_(source)], 10)
        square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.operations_per_us = 2 * 8192**3 / by_events([lambda: square @ square], 10)

    def floor(self, moved: float, operations: float = 0.0) -> float:
        """The least time for so many bytes and operations."""
        return max(moved / self.bytes_per_us, operations / self.operations_per_us)


def quantization(rates: Ceilings) -> Iterator[Row]:
    """Whole tensors to codes and back."""
    import bitsandbytes.functional as F

    count = 8192 * 8192
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2)]
        name, plain = str(dtype).removeprefix("torch."), count * tensors[0].element_size()
        four = plain + count / 2 + count / 16
        for kind in ("nf4", "fp4"):
            calls = [lambda t=t, kind=kind: F.quantize_4bit(t, quant_type=kind) for t in tensors]
            yield f"quantize_4bit {kind} {name}", rates.per_call(calls), rates.floor(four)
        for nested in (False, True):
            states = [F.quantize_4bit(t, quant_type="nf4", compress_statistics=nested) for t in tensors]
            label = f"dequantize_4bit nf4{' nested' if nested else ''} {name}"
            yield label, rates.per_call([lambda s=s: F.dequantize_4bit(*s) for s in states]), rates.floor(four)
        eight = plain + count * (1 + 4 / 256)
        calls = [lambda t=t: F.quantize_blockwise(t, blocksize=256) for t in tensors]
        yield f"quantize_blockwise {name}", rates.per_call(calls), rates.floor(eight)
        states = [F.quantize_blockwise(t, blocksize=256) for t in tensors]
        calls = [lambda s=s: F.dequantize_blockwise(*s) for s in states]
        yield f"dequantize_blockwise {name}", rates.per_call(calls), rates.floor(eight)
    halves = [t.half() for t in tensors]
    calls = [lambda t=t: F.int8_vectorwise_quant(t) for t in halves]
    yield "int8_vectorwise_quant float16", rates.per_call(calls), rates.floor(count * 3)
    calls = [lambda t=t: F.int8_double_quant(t) for t in halves]
    yield "int8_double_quant float16", rates.per_call(calls), rates.floor(count * 4)


def products(rates: Ceilings) -> Iterator[Row]:
    """Products with a 4-bit weight, and torch's with the same weight in bfloat16."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as F

    for n, k in SHAPES:
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        copies = copies_beyond_cache(n * k / 2)
        plain = [weight.clone() for _ in range(copies_beyond_cache(n * k * 2))]
        for nested in (False, True):
            states = [F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested) for _ in range(copies)]
            for m in (1, 8, 64) if nested else (1, 8, 16, 32, 64, 128, 256, 1024, 4096):
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                moved = n * k / 2 + n * k / 64 * (1 if nested else 4) + 2 * m * (n + k)
                label = f"matmul_4bit nf4{' nested' if nested else ''} M={m} {n}x{k}"
                calls = [lambda x=x, s=s: bnb.matmul_4bit(x, s[0].t(), quant_state=s[1]) for s in states]
                yield label, rates.per_call(calls), rates.floor(moved, 2 * m * n * k)
                if not nested:
                    calls = [lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in plain]
                    floor = rates.floor(2 * (n * k + m * (n + k)), 2 * m * n * k)
                    yield f"torch linear bfloat16 M={m} {n}x{k}", rates.per_call(calls), floor


def linear8(rates: Ceilings) -> Iterator[Row]:
    """``Linear8bitLt`` in float16, without outlier columns, with a few and with many."""
    import bitsandbytes as bnb

    n, k = 14336, 4096
    plain = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.float16)
    for threshold, columns in ((0.0, 0), (6.0, 3), (6.0, 100), (6.0, k // 2)):
        layers = [
            bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold).half().cuda()
            for _ in range(copies_beyond_cache(n * k))
        ]
        label = f"Linear8bitLt threshold {threshold:g}" + (f", {columns} outlier columns" if columns else "")
        for m in (1, 8, 16, 32, 128, 512, 2048, 4096):
            x = torch.randn(m, k, device="cuda", dtype=torch.float16).clamp(-5, 5)
            x[0, torch.randperm(k, device="cuda")[:columns]] = 20
            floor = rates.floor(n * k + 2 * m * (n + k), 2 * m * n * k / 1.9)
            if columns <= 3:
                yield f"{label} M={m}, wall", by_clock(lambda x=x, f=layers[0]: f(x), 50), floor
            yield f"{label} M={m}", rates.per_call([lambda x=x, f=f: f(x) for f in layers]), floor
            if threshold == 0:
                floor = rates.floor(2 * n * k + 2 * m * (n + k), 2 * m * n * k)
                yield f"torch linear float16 M={m}, wall", by_clock(lambda x=x: plain(x), 50), floor


def calls(rates: Ceilings) -> Iterator[Row]:
    """Calls of decode size, on the clock: the host's part."""
    import bitsandbytes as bnb

    k = n = 4096
    four = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").bfloat16().cuda()
    plain = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    layers = {"torch linear": plain, "Linear4bit": four}
    for threshold in (0.0, 6.0):
        eight = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
        layers[f"Linear8bitLt threshold {threshold:g}"] = eight.bfloat16().cuda()
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    for name, layer in layers.items():
        yield f"{name} M=1 {n}x{k}, wall", by_clock(lambda f=layer: f(x), 500), rates.floor(n * k / 2)
    table = bnb.nn.Embedding4bit(128256, 4096, quant_type="nf4", dtype=torch.bfloat16).cuda()
    ids = [torch.randint(0, 128256, (2048,), device="cuda") for _ in range(8)]
    lookups = [lambda i=i: table(i) for i in ids]
    yield "Embedding4bit 128256x4096, 2048 ids", rates.per_call(lookups), rates.floor(2048 * 4096 * 2.5625)


def llama_shapes() -> list[tuple[int, ...]]:
    """Parameters of a model with 1.1 billion of them."""
    layer: list[tuple[int, ...]] = [(2048, 2048), (2048, 2048), (512, 2048), (512, 2048)]
    layer += [(8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return [(32000, 2048), *layer * 16, (2048,), (32000, 2048)]


def optimizers(rates: Ceilings) -> Iterator[Row]:
    """Steps for one parameter of 64 M elements, for those of a model, and for many small ones."""
    import bitsandbytes as bnb

    kinds = {"AdamW8bit": 2, "AdamW32bit": 8, "Lion8bit": 1, "AdEMAMix8bit": 3, "PagedAdamW8bit": 2, "LAMB8bit": 2}
    sets: dict[str, tuple[list[tuple[int, ...]], tuple[str, ...], tuple[torch.dtype, ...]]] = {
        "64 M": ([(8192, 8192)], tuple(kinds), (torch.bfloat16, torch.float32)),
        "1.1 G in 147": (llama_shapes(), ("AdamW8bit", "AdamW32bit"), (torch.bfloat16,)),
        "2000 x 8192": ([(8192,)] * 2000, ("AdamW8bit", "AdamW32bit"), (torch.bfloat16,)),
    }
    for label, (shapes, names, dtypes) in sets.items():
        for dtype in dtypes:
            weights = [torch.nn.Parameter(torch.randn(s, device="cuda").to(dtype) * 0.02) for s in shapes]
            for p in weights:
                p.grad = torch.randn_like(p) * 0.01
            count, width = sum(p.numel() for p in weights), weights[0].element_size()
            end = f"{str(dtype).removeprefix('torch.')} {label}"
            for name in names:
                optimizer = getattr(bnb.optim, name)(weights, lr=1e-4)
                floor = rates.floor(count * (3 * width + 2 * kinds[name]))
                yield f"{name} {end}", by_events([optimizer.step]), floor
                if len(shapes) > 1:
                    yield f"{name} {end}, wall", by_clock(optimizer.step, 20), floor
                del optimizer
            fused = torch.optim.AdamW(weights, lr=1e-4, fused=True)
            yield f"torch fused AdamW {end}", by_events([fused.step]), rates.floor(count * 7 * width)
            if len(shapes) > 1:
                yield f"torch fused AdamW {end}, wall", by_clock(fused.step, 20), rates.floor(count * 7 * width)
            del fused


def torchao(rates: Ceilings) -> Iterator[Row]:
    """The nearest relatives in torchao, compiled as it wants them: layers with NF4 and int8 weights, and AdamW8bit."""
    from torchao.optim import AdamW8bit
    from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    n, k = 14336, 4096
    layers = {
        "NF4 nested": (NF4WeightOnlyConfig, n * k / 2 + n * k / 64, 1.0),
        "int8 weight": (Int8WeightOnlyConfig, n * k, 1.0),
        "int8 weight and activations": (Int8DynamicActivationInt8WeightConfig, n * k, 1.9),
    }
    for name, (configuration, weight_bytes, faster) in layers.items():
        holders = [torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, device="cuda")).bfloat16() for _ in range(5)]
        for holder in holders:
            quantize_(holder, configuration())
        forward = torch.compile(lambda holder, x: holder(x))
        # Torch's integer product wants more than 16 rows.
        for m in (32, 128, 1024) if faster > 1 else (1, 16, 128, 1024):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            floor = rates.floor(weight_bytes + 2 * m * (n + k), 2 * m * n * k / faster)
            calls = [lambda x=x, f=forward, h=holder: f(h, x) for holder in holders]
            yield f"{name} M={m} {n}x{k}", rates.per_call(calls), floor
        torch._dynamo.reset()
    weight = torch.nn.Parameter(torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) * 0.02)
    weight.grad = torch.randn_like(weight) * 0.01
    yield "AdamW8bit bfloat16 64 M", by_events([AdamW8bit([weight], lr=1e-4).step]), rates.floor(weight.numel() * 10)


GROUPS = {
    "quantization": quantization,
    "products": products,
    "linear8": linear8,
    "calls": calls,
    "optimizers": optimizers,
}
#: Of libraries that have names of their own; the command line must ask for them.
OTHERS = {"torchao": torchao}


def main() -> None:
    """Run the groups that the command line names, all without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("label", help="name of the library in the output")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="what to time; all that bitsandbytes has without")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--events", action="store_true", help="for a library whose calls no graph can capture")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rates = Ceilings(captures=not chosen.events)
    card = torch.cuda.get_device_name()
    print(f"{card}: copy {rates.bytes_per_us / 1e6:.2f} TB/s, bf16 {rates.operations_per_us / 1e6:.0f} TFLOP/s")
    rows = []
    with torch.no_grad():
        for name in chosen.groups or GROUPS:
            for label, spent, floor in (GROUPS | OTHERS)[name](rates):
                rows.append({"library": chosen.label, "case": label, "us": spent, "floor_us": floor})
                print(f"{label:48s} {spent:9.1f} us  floor {floor:7.1f}  x {spent / floor:5.2f}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"card": card, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
