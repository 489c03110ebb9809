"""Fine-tune a causal language model with torch's AdamW and with ours, on the same batches, and draw the losses.

    python benchmarks/optimizer_loss.py MODEL TEXT -o docs/images/optimizer-loss.svg

MODEL is a checkpoint folder that transformers loads, TEXT a file of plain text. Needs transformers and matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsandbytes.optim import AdamW8bit, AdamW32bit

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "torch AdamW, 32 bit": torch.optim.AdamW,
    "AdamW32bit": AdamW32bit,
    "AdamW8bit": AdamW8bit,
}


def batches(tokens: torch.Tensor, steps: int, rows: int, length: int) -> list[torch.Tensor]:
    """Random windows of the text, the same for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(tokens) - length, (steps, rows), generator=generator)
    return [torch.stack([tokens[start : start + length] for start in row]) for row in starts.tolist()]


def fine_tune(folder: str, make: Callable[..., Any], data: list[torch.Tensor], lr: float, device: str) -> list[float]:
    """Losses of all steps, float32 weights, linear warm-up over a tenth of the steps."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.train()
    optimizer = make(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    warm_up = max(1, len(data) // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    losses = []
    for batch in data:
        batch = batch.to(device)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Curves over steps."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "losses"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=name, linewidth=1.6)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run all optimizers, print how far their losses are apart, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    data = batches(tokens, args.steps, args.rows, args.length)
    losses: dict[str, list[float]] = {}
    for name, make in OPTIMIZERS.items():
        losses[name] = fine_tune(args.model, make, data, args.lr, args.device)
        last = losses[name][-max(1, args.steps // 5) :]
        print(f"{name:24} first {losses[name][0]:.4f}  mean of the last fifth {sum(last) / len(last):.4f}", flush=True)
    first = next(iter(losses.values()))
    for name, values in losses.items():
        apart = max(abs(a - b) for a, b in zip(values, first, strict=True))
        print(f"{name:24} largest distance from the first row {apart:.4f}")
    args.output.with_suffix(".json").write_text(json.dumps(losses), encoding="utf-8")
    draw(losses, args.output)


if __name__ == "__main__":
    main()
