"""Layers whose ``state_dict`` one side saves and both sides load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from tests.compare.case import Case, Maker
from tests.compare.inputs import DTYPES, dtype_of

#: ``(out, in)``: blocks within rows, and blocks that run across rows.
WEIGHT_SHAPES = ((32, 128), (24, 96))


def state_dict_cases(make: Maker) -> Iterator[Case]:
    """Layers in all their variants."""
    for quant_type, nested, storage, dtype, shape in itertools.product(
        ("nf4", "fp4"), (False, True), ("uint8", "bfloat16", "float32"), DTYPES, WEIGHT_SHAPES
    ):
        name = f"{quant_type}{'-nested' if nested else ''}-{storage}-{dtype}-{shape[0]}x{shape[1]}"
        options = {"quant_type": quant_type, "nested": nested, "quant_storage": storage, "compute_dtype": "bfloat16"}
        yield Case("linear4bit_state_dict", name, {"options": options, **make_weight(make, name, shape, dtype)})
    for dtype, threshold, fp16_weights in itertools.product(DTYPES, (0.0, 6.0), (False, True)):
        name = f"{dtype}-threshold{threshold:g}{'-fp16weights' if fp16_weights else ''}"
        options = {"has_fp16_weights": fp16_weights, "threshold": threshold}
        yield Case("linear8bit_state_dict", name, {"options": options, **make_weight(make, name, (24, 96), dtype)})


def make_weight(make: Maker, name: str, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """A weight, and a bias for every second case."""
    generator = make.seeded(name)
    weight = torch.randn(shape, generator=generator).to(dtype_of(dtype)) / 8
    bias = torch.randn(shape[0], generator=generator) if torch.randint(2, (1,), generator=generator) else None
    return {"weight": weight, "bias": bias}


def load_cases(first: list[Case], saved: dict[str, Any]) -> Iterator[Case]:
    """What a side saved in the first round, to be loaded."""
    for case in first:
        result = saved.get(case.key)
        is_layer = case.op in ("linear4bit_state_dict", "linear8bit_state_dict")
        if not is_layer or not isinstance(result, dict) or "before" not in result:
            continue
        options, shape = case.inputs["options"], list(case.inputs["weight"].shape)
        state_dict = {key: result["before"]["tensors"][key] for key in result["before"]["keys"]}
        inputs = {"options": options, "shape": shape, "state_dict": state_dict}
        if case.op == "linear4bit_state_dict":
            yield Case("linear4bit_load", case.id, inputs)
        elif not options["has_fp16_weights"]:
            for dtype in DTYPES:
                x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(len(case.id)))
                x[:, 5] *= 10
                yield Case("linear8bit_load", f"{case.id}-{dtype}", {**inputs, "x": x.to(dtype_of(dtype))})
