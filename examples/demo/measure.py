"""Measurements of a language model: size, quality and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of everything that the model's checkpoint holds, quantization statistics included.

    A tensor that is tied to another one counts once.
    """
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(storages.values())


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, window: int = 512) -> float:
    """Perplexity over ``ids`` of shape (1, tokens), cut into windows that do not see each other.

    Perplexity is ``exp`` of the mean negative log-likelihood in nats per predicted token; the loss is
    computed in float32 from the model's logits.
    """
    total, count = 0.0, 0
    for piece in ids.split(window, dim=1):
        if piece.shape[1] < 2:
            continue
        logits = model(input_ids=piece).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
        count += piece.shape[1] - 1
    return math.exp(total / count)


@torch.inference_mode()
def prefill_rate(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 256, repeats: int = 3) -> float:
    """Tokens per second while a prompt of ``tokens`` tokens is read."""
    prompt = ids[:, :tokens]
    model(input_ids=prompt[:, :8])
    return prompt.shape[1] / median(_seconds(lambda: model(input_ids=prompt)) for _ in range(repeats))


def decode_rate(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 64, repeats: int = 3) -> float:
    """Tokens per second while ``tokens`` tokens are generated greedily, one at a time, after a first short run."""
    prompt = ids[:, :8]

    def decode(count: int) -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )

    decode(4)
    return tokens / median(_seconds(lambda: decode(tokens)) for _ in range(repeats))


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int = 40) -> str:
    """The model's greedy answer to a chat message, cut after ``tokens`` tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
