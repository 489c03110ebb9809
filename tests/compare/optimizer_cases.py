"""Optimizers: one step from a given state, and whole runs of every class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from tests.compare.case import Case, Maker
from tests.compare.inputs import DTYPES, dtype_of, random_bytes

RULES = ("adam", "lamb", "ademamix", "momentum", "lars", "rmsprop", "adagrad", "lion")
TWO_STATES = ("adam", "lamb", "ademamix")
NUMBERS = {
    "max_unorm": 0.0, "param_norm": 0.0, "beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "alpha": 5.0, "eps": 1e-6,
    "weight_decay": 0.0, "step": 3, "lr": 1e-2, "gnorm_scale": 1.0, "skip_zeros": False,
}  # fmt: skip
#: What each case changes in ``NUMBERS``.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first": {"step": 1},
    "decay": {"weight_decay": 0.05, "gnorm_scale": 0.7},
    "late": {"step": 1000, "eps": 1e-2},
    "limited": {"max_unorm": 1.0, "param_norm": 0.5, "weight_decay": 0.05},
    "limited-first": {"max_unorm": 0.02, "param_norm": 5.0, "step": 1},
    "unlimited": {"max_unorm": 10.0, "param_norm": 1000.0},
    "skip-zeros": {"skip_zeros": True, "weight_decay": 0.05},
}
BLOCKSIZE = 256

#: Classes of ``bitsandbytes.optim`` and what they need beside parameters.
CLASSES: dict[str, dict[str, Any]] = {
    **{
        name: {"weight_decay": 0.01}
        for name in ("Adam", "Adam8bit", "AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit")
    },
    "AdEMAMix": {"t_alpha": 10, "t_beta3": 10},
    "AdEMAMix8bit": {},
    "AdEMAMix32bit": {},
    "LAMB": {},
    "LAMB8bit": {},
    **{name: {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01} for name in ("SGD", "SGD8bit", "LARS", "LARS8bit")},
    **{
        name: {"weight_decay": 0.01}
        for name in ("RMSprop", "RMSprop8bit", "Adagrad", "Adagrad8bit", "Lion", "Lion8bit")
    },
}
STEPS = 3


def optimizer_op_cases(make: Maker) -> Iterator[Case]:
    """Every rule and variant, 32-bit and 8-bit, from a state that is not zero."""
    for rule, (variant, changes), dtype in itertools.product(RULES, VARIANTS.items(), DTYPES):
        for bits in (32, 8):
            if bits == 8 and "limited" in variant:
                continue
            name = f"{rule}{bits}-{variant}-{dtype}"
            tensors = state_tensors(make, name, rule, bits, dtype)
            if variant == "skip-zeros":
                tensors["g"][::2] = 0
            inputs = {"bits": bits, "name": rule, "tensors": tensors, "numbers": NUMBERS | changes}
            yield Case("optimizer_op", name, inputs)


def state_tensors(make: Maker, name: str, rule: str, bits: int, dtype: str) -> dict[str, Any]:
    """Parameter, gradient and state for one step; the last block is partial."""
    generator, count = make.seeded(name), 1000
    lead = (2,) if rule == "ademamix" else ()
    nonnegative = rule in ("rmsprop", "adagrad")
    tensors: dict[str, Any] = {
        "p": torch.randn(count, generator=generator).to(dtype_of(dtype)),
        "g": torch.randn(count, generator=generator).to(dtype_of(dtype)),
        "state2": None,
        "unorm_vec": torch.zeros(1),
    }
    if bits == 32:
        state1 = torch.randn(*lead, count, generator=generator)
        tensors["state1"] = state1.abs() if nonnegative else state1
        if rule in TWO_STATES:
            tensors["state2"] = torch.rand(count, generator=generator)
        return tensors
    blocks = math.ceil(count / BLOCKSIZE)
    codes = random_bytes(math.prod((*lead, count)), generator).reshape(*lead, count)
    # Sums of squares are kept with the signed map too; its upper half holds the positive values.
    tensors["state1"] = codes | 128 if nonnegative else codes
    tensors["absmax1"] = torch.rand(*lead, blocks, generator=generator) + 0.5
    tensors["qmap1"], tensors["qmap2"], tensors["absmax2"] = make.codebooks["dynamic"], None, None
    if rule in TWO_STATES:
        tensors["state2"] = random_bytes(count, generator)
        tensors["absmax2"] = torch.rand(blocks, generator=generator) + 0.5
        tensors["qmap2"] = make.codebooks["dynamic-unsigned"]
    return tensors


def optimizer_state_dict_cases(make: Maker) -> Iterator[Case]:
    """Some steps of every class with one large and one small parameter."""
    for (cls, options), dtype in itertools.product(CLASSES.items(), ("float32", "bfloat16")):
        name = f"{cls}-{dtype}"
        generator = make.seeded(name)
        shapes = ((64, 70), (10,))
        parameters = [torch.randn(shape, generator=generator).to(dtype_of(dtype)) for shape in shapes]
        grads = [[torch.randn(s, generator=generator).to(dtype_of(dtype)) for s in shapes] for _ in range(STEPS)]
        inputs = {"name": cls, "options": options, "parameters": parameters, "grads": grads}
        yield Case("optimizer_state_dict", name, inputs)


def optimizer_load_cases(first: list[Case], saved: dict[str, Any]) -> Iterator[Case]:
    """The state dicts of the first round, nested as saved and in the old flat layout."""
    for case in first:
        result = saved.get(case.key)
        if case.op != "optimizer_state_dict" or not isinstance(result, dict) or "steps" not in result:
            continue
        last = result["steps"][-1]
        for flat in (False, True):
            inputs = {
                "name": case.inputs["name"],
                "options": case.inputs["options"],
                "parameters": last["parameters"],
                "state_dict": last["state_dict"],
                "grads": case.inputs["grads"][0],
                "flat": flat,
            }
            yield Case("optimizer_load", f"{case.id}{'-flat' if flat else ''}", inputs)
