"""Time a language model with the layer sizes of Llama-3-8B on an NVIDIA GPU, in bfloat16, NF4 and int8.

The weights are random and there are 16 layers; the model runs through transformers. Run once per library, with
PYTHONPATH choosing it, on the same machine::

    python benchmarks/gpu_model.py ours --compiled --json ours.json
    PYTHONPATH=/folder/of/other python benchmarks/gpu_model.py upstream --json upstream.json

Decoding is in tokens per second over the batch: eager with ``generate``, replayed as one CUDA graph of a step with a
static cache, and with ``--compiled`` also with the compiled forward. Prefill of 2048 tokens and a step of QLoRA (rank
16, 4 x 1024 tokens, checkpointing) are in milliseconds on the clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

LAYERS = 16
PROMPT = 16
NEW_TOKENS = 48


def new_model() -> LlamaForCausalLM:
    """A model in bfloat16 on the GPU, the same one each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def quantize(model: LlamaForCausalLM, kind: str) -> None:
    """Replace the linear layers but the last by quantized ones."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        sizes = (layer.in_features, layer.out_features)
        if kind.startswith("nf4"):
            new: torch.nn.Module = bnb.nn.Linear4bit(
                *sizes,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=kind == "nf4 nested",
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data.cpu(),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=kind == "nf4 nested",
                blocksize=64,
            )
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=float(kind.split()[1]))
            new.weight = bnb.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.cuda().eval())


def on_clock(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call, the device's part included."""
    call()
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        spent.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(spent)


class StaticDecoding:
    """Greedy decoding with a static cache, a step of which a graph can replay."""

    def __init__(self, model: LlamaForCausalLM, batch: int, forward: Callable[..., Any] | None = None) -> None:
        self.forward = model if forward is None else forward
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS + 64)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        self.position = torch.zeros(1, dtype=torch.long, device="cuda")
        self.prompt = torch.randint(0, 32000, (batch, PROMPT), device="cuda")
        self.model = model
        self.rewind()

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self.cache.reset()
        places = torch.arange(PROMPT, device="cuda")
        self.model(self.prompt, past_key_values=self.cache, cache_position=places, position_ids=places[None])
        self.position.fill_(PROMPT)
        self.token.fill_(1)

    def step(self) -> None:
        """One token of each sequence."""
        logits = self.forward(
            self.token,
            past_key_values=self.cache,
            cache_position=self.position,
            position_ids=self.position[None],
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def captured(self) -> Callable[[], None]:
        """The step as a graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def rate(self, step: Callable[[], None]) -> float:
        """Tokens per second over the batch."""
        spent = []
        for _ in range(5):
            self.rewind()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(NEW_TOKENS):
                step()
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - begin)
        return len(self.token) * NEW_TOKENS / statistics.median(spent)


def static_decoding(model: LlamaForCausalLM) -> Iterator[tuple[str, float]]:
    """Decoding without the host's part."""
    with torch.inference_mode():
        for batch in (1, 8, 32):
            decoding = StaticDecoding(model, batch)
            yield f"decode batch {batch} in a graph, tokens/s", decoding.rate(decoding.captured())


def compiled_decoding(model: LlamaForCausalLM) -> Iterator[tuple[str, float]]:
    """Decoding with the compiled forward, whole, with its graphs."""
    with torch.no_grad():
        decoding = StaticDecoding(model, 1, torch.compile(model, mode="reduce-overhead", fullgraph=True))
        for _ in range(3):
            decoding.step()
        yield "decode batch 1 compiled, tokens/s", decoding.rate(decoding.step)


def inference(model: LlamaForCausalLM) -> Iterator[tuple[str, float]]:
    """Decoding and prefill."""
    with torch.inference_mode():
        for batch in (1, 8, 32):
            ids = torch.randint(0, 32000, (batch, PROMPT), device="cuda")
            lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
            spent = on_clock(lambda ids=ids, lengths=lengths: model.generate(ids, pad_token_id=0, **lengths), 3)
            yield f"decode batch {batch}, tokens/s", batch * NEW_TOKENS / spent * 1e3
        ids = torch.randint(0, 32000, (1, 2048), device="cuda")
        yield "prefill 2048, ms", on_clock(lambda: model(ids, logits_to_keep=1), 7)


def qlora(model: LlamaForCausalLM) -> Iterator[tuple[str, float]]:
    """A step of training with adapters and an 8-bit optimizer."""
    from peft import LoraConfig, get_peft_model

    import bitsandbytes as bnb

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets)).train()
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(weights, lr=1e-4)
    ids = torch.randint(0, 32000, (4, 1024), device="cuda")

    def step() -> None:
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    yield "QLoRA step 4 x 1024, ms", on_clock(step, 3)
    yield "its peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30
    adapted(ids, labels=ids).loss.backward()
    yield "its optimizer, ms", on_clock(optimizer.step, 5)


def main() -> None:
    """Run all kinds, or those that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("label", help="name of the library in the output")
    parser.add_argument("kinds", nargs="*", help="bf16, 'nf4', 'nf4 nested', 'int8 0', 'int8 6'; all without")
    parser.add_argument("--compiled", action="store_true", help="also the compiled forward, which takes its time")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--eager", action="store_true", help="without graphs, for a library that they cannot capture")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for kind in chosen.kinds or ("bf16", "nf4", "nf4 nested", "int8 0", "int8 6"):
        model = new_model()
        if kind != "bf16":
            quantize(model, kind)
        gc.collect()
        torch.cuda.empty_cache()
        groups = [inference] if chosen.eager else [inference, static_decoding]
        if chosen.compiled:
            groups.append(compiled_decoding)
        if kind == "nf4 nested":
            groups.append(qlora)
        for group in groups:
            for name, value in group(model):
                rows.append({"library": chosen.label, "kind": kind, "case": name, "value": value})
                print(f"{chosen.label:10s} {kind:12s} {name:32s} {value:10.1f}", flush=True)
        del model
    if chosen.json:
        chosen.json.write_text(json.dumps({"card": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
