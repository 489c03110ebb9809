"""Known differences of layers and their checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from tests.compare import truth
from tests.compare.explanation import Difference, Explanation, need, need_bits
from tests.compare.verdict import differences, error_of

BLOCKSIZE = 64
#: Beside the rounding of the result: the codes are exact here, sums are in float32.
INT8_NOISE = 1e-6


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
    expected = truth.decode_4bit(state_dict["weight"], absmax, BLOCKSIZE, state["quant_type"], d.inputs["shape"], dtype)
    need_bits(d.ours["weight"], expected, "the weight")


def int8_output(d: Difference, x: torch.Tensor) -> torch.Tensor:
    """The product of int8 rows, outlier columns in floating point, in float64."""
    state_dict, threshold, x = d.inputs["state_dict"], d.inputs["options"]["threshold"], x.double()
    weight = state_dict["weight"].double() * state_dict["SCB"].double().unsqueeze(1) / 127.0
    outliers = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    columns = outliers.any(dim=0)
    absmax = x.masked_fill(outliers, 0.0).abs().amax(dim=1, keepdim=True)
    codes = torch.round(x / absmax * 127.0).masked_fill(columns, 0.0)
    y = codes * absmax / 127.0 @ weight.t() + x[:, columns] @ weight[:, columns].t()
    return y + state_dict["bias"].double() if "bias" in state_dict else y


def prove_int8_output(d: Difference) -> None:
    """The right product for the input as given."""
    x, y = d.inputs["x"], d.ours["y"]
    expected = int8_output(d, x)
    need(y.shape == expected.shape and y.dtype == x.dtype, f"{y.dtype} {tuple(y.shape)}")
    error = truth.relative_error(y, expected)
    need(error < INT8_NOISE + 2 * truth.UNIT[x.dtype], f"relative error {error:g}")


def rounds_inputs(d: Difference) -> bool:
    """The release's values are those of inputs rounded to float16, with its constant."""
    if d.paths != ["y"] or d.ours["y"].shape != d.theirs["y"].shape:
        return False
    error = truth.relative_error(d.theirs["y"], int8_output(d, d.inputs["x"].half()))
    return error < 4e-5 + 4 * truth.UNIT[torch.float16 if d.inputs["x"].dtype == torch.float16 else d.theirs["y"].dtype]


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
        "the release rounds inputs to float16 and multiplies by 6.200124e-05 where 1 / 127**2 is meant",
        rounds_inputs,
        prove_int8_output,
    ),
)
