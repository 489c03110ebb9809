"""A real language model on the CPU through transformers, next to another release of bitsandbytes.

    python benchmarks/cpu_model.py [--peer PYTHON] [--rounds N] [--kinds KIND ...] [--json FILE]

Each library and kind of weights runs in a process of its own, in turns, so that a change of the machine's mood hits
all of them. A figure is the median of all turns. Decoding is greedy, 32 tokens after a prompt of 8: with ``generate``,
and with a loop around a static cache and the compiled forward of the model (``torch.compile`` with its defaults), since
``generate`` compiles no model on a CPU by itself, and none that bitsandbytes has quantized. Prefill is one eager
forward of 256 tokens with the logits of all of them. ``--peer`` names the interpreter of an environment with the other
release, transformers and accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from cpu import processor

HERE = Path(__file__).resolve().parent
MODEL = Path(os.environ.get("BNB_TEST_MODEL") or HERE.parent / "models" / "SmolLM2-135M-Instruct")
TEXT = HERE.parent / "examples" / "demo" / "data" / "text.txt"
KINDS = ("bf16", "nf4", "fp4", "int8")
#: Measurements with their unit, in order.
CASES = {"decode, eager": "tokens/s", "decode, compiled": "tokens/s", "prefill of 256": "ms"}

PROMPT, NEW_TOKENS, PREFILL = 8, 32, 256

Figures = dict[str, list[float]]


def load(folder: Path, kind: str) -> Any:
    """The model with one kind of weights, as any user of transformers loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    configurations = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
    }
    options: dict[str, Any] = {}
    if kind in configurations:
        options["quantization_config"] = BitsAndBytesConfig(
            bnb_4bit_compute_dtype=torch.bfloat16, **configurations[kind]
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options).eval()


def seconds_of(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds on the clock of each call, after one that does not count."""
    call()
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return spent


def generation(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """A call of ``generate`` for :data:`NEW_TOKENS` tokens."""
    prompt = ids[:, :PROMPT]
    lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **lengths)


def compiled_generation(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """The same with a static cache and a forward that is compiled whole; the first call compiles it."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS)
    forward = torch.compile(model.forward, fullgraph=True)
    positions = torch.arange(PROMPT + NEW_TOKENS)[None]

    @torch.no_grad()
    def call() -> list[int]:
        cache.reset()
        logits = model(input_ids=ids[:, :PROMPT], cache=cache, position_ids=positions[:, :PROMPT]).logits
        tokens = [logits[:, -1:].argmax(-1)]
        for place in range(PROMPT, PROMPT + NEW_TOKENS - 1):
            # A copy: a view at another offset would be compiled anew.
            position = positions[:, place : place + 1].clone()
            logits = forward(input_ids=tokens[-1], cache=cache, position_ids=position).logits
            tokens.append(logits.argmax(-1))
        return torch.cat(tokens).flatten().tolist()

    return call


def measure(folder: Path, kind: str, cases: list[str], repeats: int) -> Figures:
    """Figures by case, of one kind of weights and the ``bitsandbytes`` of this environment."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    model = load(folder, kind)

    def prefill() -> object:
        with torch.inference_mode():
            return model(input_ids=ids[:, :PREFILL])

    found: Figures = {}
    for case in cases:
        if case == "prefill of 256":
            found[case] = [1e3 * spent for spent in seconds_of(prefill, repeats)]
        else:
            build = compiled_generation if case == "decode, compiled" else generation
            found[case] = [NEW_TOKENS / spent for spent in seconds_of(build(model, ids), repeats)]
    return found


def collect(options: argparse.Namespace) -> dict[str, dict[str, Figures]]:
    """Figures by library, kind and case."""
    interpreters = {"ours": sys.executable, "peer": options.peer}
    found: dict[str, dict[str, Figures]] = {}
    for _round in range(options.rounds):
        for kind in options.kinds:
            for library, interpreter in interpreters.items():
                # Unquantized weights do not pass through either library.
                if interpreter is None or (library == "peer" and kind == "bf16"):
                    continue
                command = [interpreter, str(Path(__file__).resolve()), "--work", "--kinds", kind]
                command += ["--model", str(options.model), "--repeats", str(options.repeats), "--cases", *options.cases]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                for case, figures in json.loads(output.splitlines()[-1]).items():
                    found.setdefault(library, {}).setdefault(kind, {}).setdefault(case, []).extend(figures)
    return found


def report(found: dict[str, dict[str, Figures]]) -> str:
    """A Markdown table."""
    lines = [
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
        "| case | weights | ours | peer | ours / peer, in speed | ours / bf16, in speed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, unit in CASES.items():
        for kind, figures in found["ours"].items():
            if case not in figures:
                continue
            ours = statistics.median(figures[case])
            cells = [f"{case}, {unit}", kind, f"{ours:.1f}" if unit != "ms" else f"{ours:.0f}"]
            others = (found.get("peer", {}).get(kind, {}), found["ours"].get("bf16", {}) if kind != "bf16" else {})
            ratios = []
            for other in others:
                theirs = statistics.median(other[case]) if case in other else None
                ratio = "" if theirs is None else f"{(theirs / ours if unit == 'ms' else ours / theirs):.2f}"
                ratios.append((theirs, ratio))
            peer = ratios[0][0]
            cells.append("" if peer is None else f"{peer:.1f}" if unit != "ms" else f"{peer:.0f}")
            lines.append("| " + " | ".join([*cells, ratios[0][1], ratios[1][1]]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with another release of bitsandbytes")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of weights")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to measure")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each library (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each case of a turn (default: 5)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measure(options.model, options.kinds[0], options.cases, options.repeats)))
        return
    if not (options.model / "config.json").is_file():
        parser.error(f"there is no checkpoint in {options.model}; run: python tools/get_model.py")
    found = collect(options)
    if options.json:
        options.json.write_text(json.dumps(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
