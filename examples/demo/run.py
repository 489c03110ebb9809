"""The main job on a real model: load it in 4 and 8 bit, compare size, quality and speed, quantize it offline.

Everything goes through unmodified transformers. The script exits with 1 when a result is not what it
should be: a format that loses too much quality, saves too little memory, or a checkpoint written by
``bnb quantize`` whose logits differ by one bit from quantizing the same model while loading it.

    python tools/get_model.py && python examples/demo/run.py
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import measure
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import bitsandbytes

HERE = Path(__file__).resolve().parent
MODEL = Path(os.environ.get("BNB_TEST_MODEL") or HERE.parents[1] / "models" / "SmolLM2-135M-Instruct")
QUESTION = "What does a lighthouse do? Answer in one sentence."


@dataclass(frozen=True)
class Variant:
    """One way to hold the weights."""

    name: str
    config: BitsAndBytesConfig | None = None
    #: Options of ``bnb quantize`` that give the same weights as ``config``.
    offline: tuple[str, ...] = ()
    #: Largest allowed perplexity and size, as multiples of the bf16 model's.
    perplexity_limit: float = 1.0
    size_limit: float = 1.0


def four_bit(quant_type: str, nested: bool) -> BitsAndBytesConfig:
    """Configuration of a 4-bit format that computes in bf16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


VARIANTS = (
    Variant("bf16"),
    Variant("nf4 + double quant", four_bit("nf4", True), ("--format", "nf4", "--double-quant"), 1.35, 0.45),
    Variant("fp4", four_bit("fp4", False), ("--format", "fp4"), 1.6, 0.45),
    Variant("int8", BitsAndBytesConfig(load_in_8bit=True), ("--format", "int8"), 1.05, 0.65),
)


@dataclass
class Report:
    """What was measured, and what was wrong with it."""

    table: Table
    failures: list[str] = field(default_factory=list)
    checks: int = 0

    def check(self, holds: bool, statement: str) -> None:
        """Print a statement with its verdict and remember a failure."""
        self.checks += 1
        console.print(f"  [{'green]ok   ' if holds else 'red]FAIL '}[/] {statement}")
        if not holds:
            self.failures.append(statement)


@dataclass(frozen=True)
class Result:
    """Measurements of one variant."""

    size: int
    perplexity: float
    logits: torch.Tensor


console = Console(width=max(120, Console().width))


def load(folder: Path, config: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """Load a checkpoint on the CPU as any user of transformers does."""
    options = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options).eval()


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits for a prompt and for a single token: the large and the small matmul shapes."""
    return torch.cat([model(input_ids=part).logits for part in (ids[:, :64], ids[:, 64:65])], dim=1)


def run_variant(
    variant: Variant, source: Path, ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, report: Report
) -> Result:
    """Load one variant, fill its row of the table and return what later steps compare."""
    console.print(f"[bold]{variant.name}[/]", end="", highlight=False)
    start = time.perf_counter()
    model = load(source, variant.config)
    seconds = time.perf_counter() - start
    console.print(f"  loaded in {seconds:.1f} s", end="")
    result = Result(measure.weight_bytes(model), measure.perplexity(model, ids), logits_of(model, ids))
    console.print(f", perplexity {result.perplexity:.2f}", end="")
    prefill = measure.prefill_rate(model, ids)
    console.print(f", reads {prefill:.0f} tokens/s", end="")
    decode = measure.decode_rate(model, ids)
    console.print(f", writes {decode:.1f} tokens/s")
    report.table.add_row(
        variant.name,
        f"{result.size / 1e6:.1f}",
        f"{seconds:.1f}",
        f"{result.perplexity:.2f}",
        f"{prefill:.0f}",
        f"{decode:.1f}",
        measure.answer(model, tokenizer, QUESTION),
    )
    return result


def bnb(*arguments: str) -> None:
    """Run the command ``bnb`` of this environment."""
    console.print(f"[bold]$ bnb {' '.join(arguments)}[/]", highlight=False, soft_wrap=True)
    subprocess.run([Path(sys.executable).with_name("bnb"), *arguments], check=True)


def compare(variant: Variant, result: Result, reference: Result, report: Report) -> None:
    """Check quality and size of a quantized variant against the bf16 model."""
    quality = result.perplexity / reference.perplexity
    report.check(
        quality <= variant.perplexity_limit,
        f"{variant.name}: perplexity is {quality:.3f} x bf16's (limit {variant.perplexity_limit})",
    )
    size = result.size / reference.size
    report.check(
        size <= variant.size_limit, f"{variant.name}: size is {size:.3f} x bf16's (limit {variant.size_limit})"
    )


def check_offline(
    variant: Variant, source: Path, folder: Path, ids: torch.Tensor, expected: Result, report: Report
) -> None:
    """Quantize offline, reload, and compare the logits bit for bit with quantizing while loading."""
    target = folder / variant.name.split()[0]
    bnb("quantize", str(source), "-o", str(target), *variant.offline)
    logits = logits_of(load(target), ids)
    same = torch.equal(logits, expected.logits)
    distance = (logits.float() - expected.logits.float()).abs().max().item()
    report.check(same, f"{variant.name}: offline and on-the-fly logits are identical (largest difference {distance})")


def results_table() -> Table:
    """Empty table with the columns that :func:`run_variant` fills."""
    table = Table(title="SmolLM2-135M-Instruct on this CPU", show_lines=True)
    table.add_column("weights")
    for heading in ("MB", "load s", "perplexity", "prefill tok/s", "decode tok/s"):
        table.add_column(heading, justify="right")
    table.add_column(f"“{QUESTION}”", ratio=1)
    return table


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run a real language model in bf16, nf4, fp4 and int8.")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder (default: %(default)s)")
    source = parser.parse_args().model
    if not (source / "config.json").is_file():
        parser.error(f"there is no checkpoint in {source}; run: python tools/get_model.py")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer((HERE / "data" / "text.txt").read_text(), return_tensors="pt")["input_ids"]
    console.print(
        f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads, text of {ids.shape[1]} tokens"
    )
    bnb("plugins", "list")
    report = Report(results_table())
    results: dict[str, Result] = {}
    for variant in VARIANTS:
        results[variant.name] = run_variant(variant, source, ids, tokenizer, report)
        gc.collect()
    console.print(report.table)

    with tempfile.TemporaryDirectory(prefix="bnb-demo-") as folder:
        for variant in VARIANTS:
            if variant.config is None:
                continue
            compare(variant, results[variant.name], results["bf16"], report)
            check_offline(variant, source, Path(folder), ids, results[variant.name], report)

    console.print(f"{report.checks - len(report.failures)} of {report.checks} checks hold")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
