"""Known differences of layers and their checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from tests.compare import truth
from tests.compare.explanation import Difference, Explanation, need, need_bits
from tests.compare.verdict import differences, error_of

BLOCKSIZE = 64
#: Int8 activations and weights are exact here; what is left is float16 and the result's rounding.
INT8_TOLERANCE = 1e-3


def prove_unchanged(d: Difference) -> None:
    """A forward pass leaves our ``state_dict`` as it was."""
    need(error_of(d.ours["after"]) is None, f"our forward pass failed: {d.ours['after']}")
    changed = differences(d.ours["after"], d.ours["before"])
    need(not changed, f"a forward pass changed {changed}")


def prove_loaded_weight(d: Difference) -> None:
    """The weight is what the stored codes and statistics say."""
    state_dict = d.inputs["state_dict"]
    stats = {key.removeprefix("weight."): value for key, value in state_dict.items() if key.startswith("weight.")}
    state: dict[str, Any] = d.ours["state"]
    absmax = stats["absmax"]
    if "nested_absmax" in stats:
        absmax = truth.nested_absmax(stats, float(state["offset"]))
    dtype = state["dtype"].removeprefix("torch.")
    expected = truth.decode_4bit(
        state_dict["weight"], absmax, BLOCKSIZE, state["quant_type"], d.inputs["shape"], dtype
    )
    need_bits(d.ours["weight"], expected, "the weight")


def prove_int8_output(d: Difference) -> None:
    """The product of int8 rows, outlier columns in floating point, in float64."""
    state_dict, x = d.inputs["state_dict"], d.inputs["x"].half().double()
    threshold = d.inputs["options"]["threshold"]
    weight = state_dict["weight"].double() * state_dict["SCB"].double().unsqueeze(1) / 127.0
    outliers = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    columns = outliers.any(dim=0)
    absmax = x.masked_fill(outliers, 0.0).abs().amax(dim=1, keepdim=True)
    codes = torch.round(x / absmax * 127.0).masked_fill(columns, 0.0)
    expected = codes * absmax / 127.0 @ weight.t() + x[:, columns] @ weight[:, columns].t()
    if "bias" in state_dict:
        expected = expected + state_dict["bias"].double()
    need(d.ours["y"].shape == expected.shape, f"shape {tuple(d.ours['y'].shape)}")
    error = truth.relative_error(d.ours["y"], expected)
    need(error < INT8_TOLERANCE, f"relative error {error:g}")


EXPLANATIONS = (
    Explanation(
        ("linear4bit_state_dict", "linear8bit_state_dict"),
        "a forward pass of the release on the CPU fails for this layer, repacks its weight, or casts its bias",
        lambda d: not d.they_failed and error_of(d.ours) is None and d.only_under("after"),
        prove_unchanged,
    ),
    Explanation(
        ("linear4bit_load",),
        "the release counts 4-bit blocks by row on the CPU, so rows that end within a block get wrong scales",
        lambda d: d.paths == ["weight"] and d.inputs["shape"][1] % BLOCKSIZE != 0,
        prove_loaded_weight,
    ),
    Explanation(
        ("linear8bit_load",),
        "the release multiplies by 6.200124e-05 where 1 / 127**2 is meant",
        lambda d: d.paths == ["y"] and d.ours["y"].shape == d.theirs["y"].shape
        and truth.relative_error(d.theirs["y"], d.ours["y"].double()) < 0.01,
        prove_int8_output,
    ),
)
