"""Known differences of quantization and products."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.compare import truth
from tests.compare.explanation import Difference, Explanation, need, need_bits
from tests.compare.inputs import dtype_of

DECODERS = ("dequantize_4bit", "round_trip_4bit", "dequantize_4bit_state")
#: What the release's CPU code multiplies by instead of 1 / 127**2, off by 2e-5.
RELEASE_DOT_SCALE = 6.200124e-05
#: Relative error of a 4-bit product, in units of rounding to its dtype: of the weight, and of the result.
MATMUL_UNITS = 2
#: Rows below have scales 127 / absmax that overflow float32.
SMALLEST_ROW = 3.75e-37


def shape_of(d: Difference) -> list[int]:
    """Shape of what a 4-bit decoder gives."""
    if d.case.op == "round_trip_4bit":
        return list(d.inputs["A"].shape)
    if d.case.op == "dequantize_4bit_state":
        return list(d.inputs["quantized_stats"]["shape"])
    return list(d.inputs["shape"])


def blocksize_of(d: Difference) -> int:
    """Block size that a 4-bit decoder is given."""
    return int(d.inputs.get("blocksize") or d.inputs["quantized_stats"]["blocksize"])


def is_flattened(d: Difference) -> bool:
    """Equal values, but the release gives two dimensions for one."""
    theirs = d.theirs
    if d.they_failed or len(shape_of(d)) != 1 or theirs.dim() != 2:
        return False
    return bool(torch.equal(theirs.reshape(-1).nan_to_num(), d.ours.reshape(-1).nan_to_num()))


def has_split_rows(d: Difference) -> bool:
    """Rows that end within a block: the release restarts the count of blocks at each row."""
    shape = shape_of(d)
    return not d.they_failed and len(shape) > 1 and d.ours.shape == d.theirs.shape and shape[-1] % blocksize_of(d) != 0


def differs_in_sign_of_zero(d: Difference) -> bool:
    """Equal as numbers."""
    return not d.they_failed and d.ours.shape == d.theirs.shape and torch.equal(d.ours, d.theirs)


def loses_denormals(d: Difference) -> bool:
    """Where the sides differ, ours is denormal and theirs is zero."""
    if d.they_failed or d.ours.shape != d.theirs.shape or d.ours.dtype != torch.bfloat16:
        return False
    differ = (d.ours != d.theirs) & ~(d.ours.isnan() & d.theirs.isnan())
    smallest = torch.finfo(torch.bfloat16).tiny
    return bool(((d.ours[differ].abs() < smallest) & (d.theirs[differ] == 0)).all())


def decoded(d: Difference) -> torch.Tensor:
    """The right values of a 4-bit decoder."""
    i = d.inputs
    if d.case.op == "dequantize_4bit":
        return truth.decode_4bit(i["A"], i["absmax"], i["blocksize"], i["quant_type"], i["shape"], i["dtype"])
    stats = i["quantized_stats"]
    absmax = truth.nested_absmax(stats, stats["nested_offset"])
    values = truth.decode_4bit(i["A"], absmax, stats["blocksize"], stats["quant_type"], stats["shape"], stats["dtype"])
    return values.t() if i["transposed"] else values


def prove_decoded(d: Difference) -> None:
    """Bit for bit; after quantization, a value midway between two codes may be either."""
    if d.case.op != "round_trip_4bit":
        need_bits(d.ours, decoded(d), "the tensor")
        return
    i = d.inputs
    need(d.ours.shape == i["A"].shape and d.ours.dtype == i["A"].dtype, f"{d.ours.dtype} {tuple(d.ours.shape)}")
    wrong = truth.not_nearest_4bit(d.ours, i["A"], i["blocksize"], i["quant_type"])
    need(wrong == 0, f"{wrong} values are not the nearest of the table")


def prove_int4(d: Difference) -> None:
    """Sevenths from 1 down to -1."""
    sevenths = [*range(7, -1, -1), *range(0, -8, -1)]
    need(bool(torch.equal(d.ours, torch.tensor(sevenths, dtype=torch.float32) / 7)), f"int4 is {d.ours.tolist()}")


def prove_normal_map(d: Difference) -> None:
    """Quantiles of the normal distribution from Python's own inverse, scaled to 1."""
    from statistics import NormalDist

    keywords = d.inputs["keywords"]
    offset = keywords.get("offset", 0.9677083)
    sides = (8, 7) if keywords.get("use_extra_value", True) else (7, 7)
    grids = [torch.linspace(offset, 0.5, side + 1, dtype=torch.float64)[:-1].tolist() for side in sides]
    quantile = NormalDist().inv_cdf
    positive, negative = [quantile(x) for x in grids[0]], [-quantile(x) for x in grids[1]]
    values = sorted([*positive, *negative, *[0.0] * (256 - sum(sides))])
    expected = torch.tensor(values, dtype=torch.float64) / max(values)
    need(d.ours.shape == expected.shape, f"shape is {tuple(d.ours.shape)}")
    worst = float((d.ours.double() - expected).abs().max())
    need(worst < 1e-6, f"off by {worst:g} from the quantiles")


def rows_and_columns(A: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 rows without outliers, which of them are outliers, and the outlier columns."""
    rows = A.double().reshape(math.prod(A.shape[:-1]), A.shape[-1])
    outliers = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    return rows.masked_fill(outliers, 0.0), outliers, outliers.any(dim=0).nonzero().reshape(-1)


def prove_codes(
    codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, zeroed: torch.Tensor, dim: int
) -> None:
    """Codes along one dimension: the nearest integers to ``values * 127 / absmax``."""
    largest = values.abs().amax(dim=dim) if values.shape[dim] else values.new_zeros(values.shape[1 - dim])
    need_bits(absmax, largest.float(), "absmax")
    scaled = values / largest.unsqueeze(dim) * 127.0
    unusable = ~(largest.isfinite() & (largest > 0)).unsqueeze(dim)
    scaled = scaled.masked_fill(unusable | zeroed, 0.0)
    need(codes.dtype == torch.int8, f"codes are {codes.dtype}")
    wrong = truth.outside(codes.reshape(values.shape).double(), scaled, 0.5 + 1e-4)
    need(wrong == 0, f"{wrong} codes are not the nearest integers")


def prove_int8_quant(d: Difference) -> None:
    """Codes, statistics and outlier columns, by row and, where asked, by column."""
    A, threshold, ours = d.inputs["A"], d.inputs["threshold"], d.ours
    values, outliers, columns = rows_and_columns(A, threshold)
    zeroed = torch.zeros_like(outliers)
    zeroed[:, columns] = True
    found = ours["outlier_columns"]
    need(threshold == 0 if found is None else torch.equal(found, columns), f"outlier columns are {found}")
    row_codes = ours["codes"] if "codes" in ours else ours["row_codes"]
    need(row_codes.shape == A.shape, f"codes have shape {tuple(row_codes.shape)}")
    if "codes" in ours:
        need_bits(ours["A"], A, "the input after the call")
        prove_codes(row_codes, ours["absmax"], values, zeroed, dim=1)
        return
    prove_codes(row_codes, ours["row_absmax"], values, zeroed, dim=1)
    prove_codes(ours["column_codes"], ours["column_absmax"], values, outliers, dim=0)


def has_tiny_rows(d: Difference) -> bool:
    """Only codes of rows differ whose scale overflows."""
    if d.they_failed or d.paths != ["codes"]:
        return False
    largest = rows_and_columns(d.inputs["A"], d.inputs["threshold"])[0].abs().amax(dim=1)
    rows = (d.ours["codes"] != d.theirs["codes"]).reshape(len(largest), -1).any(dim=1)
    lost = bool((d.theirs["codes"].reshape(len(largest), -1)[rows] == 0).all())
    return lost and bool((largest[rows] < SMALLEST_ROW).all())


def prove_int8_dequant(d: Difference) -> None:
    """Codes times statistics over 127."""
    A, stats = d.inputs["A"], d.inputs["stats"]
    expected = A.double() * stats.double().reshape(*A.shape[:-1], 1) / 127.0
    need(d.ours.shape == A.shape and d.ours.dtype == torch.float32, f"{d.ours.dtype} {tuple(d.ours.shape)}")
    need(truth.outside(d.ours, expected, expected.abs() * 3e-7) == 0, "values are off")


def prove_product(d: Difference) -> None:
    """Exact integers."""
    need_bits(d.ours, (d.inputs["A"].double() @ d.inputs["B"].double().t()).to(torch.int32), "the product")


def prove_scaled(d: Difference) -> None:
    """Scaled integers, rounded once."""
    i: dict[str, Any] = d.inputs
    product = i["A"].double() @ i["B"].double().t() if "B" in i else i["A"].double()
    terms = product * truth.dot_scale(i["row_stats"], i["col_stats"])
    bias = torch.zeros(terms.shape[1]).double() if i["bias"] is None else i["bias"].double()
    dtype = dtype_of(i["dtype"] or "float16")
    need(d.ours.dtype == dtype and d.ours.shape == terms.shape, f"{d.ours.dtype} {tuple(d.ours.shape)}")
    exact = terms + bias
    wrong = truth.outside(d.ours, exact, truth.rounding_bound(exact, terms.abs() + bias.abs(), dtype))
    need(wrong == 0, f"{wrong} of {exact.numel()} values are not rounded rightly")


def has_release_scale(d: Difference) -> bool:
    """The release's values are those of its own constant."""
    i = d.inputs
    if d.they_failed:
        return False
    product = i["A"].double() @ i["B"].double().t() if "B" in i else i["A"].double()
    terms = product * torch.outer(i["row_stats"].double(), i["col_stats"].double()) * RELEASE_DOT_SCALE
    bias = torch.zeros(terms.shape[1]).double() if i["bias"] is None else i["bias"].double()
    bound = truth.rounding_bound(terms + bias, terms.abs() + bias.abs(), d.theirs.dtype) * 4
    return d.ours.shape == d.theirs.shape and truth.outside(d.theirs, terms + bias, bound) == 0


def product_4bit(d: Difference) -> torch.Tensor:
    """The product with the decoded weight, in float64."""
    i = d.inputs
    quant_type = i.get("quant_type") or ("nf4" if torch.equal(i["code"], truth.TABLES["nf4"]) else "fp4")
    weight = truth.decode_4bit(i["B"], i["absmax"], i["blocksize"], quant_type, i["shapeB"], "float32").double()
    product = i["A"].double() @ weight.t()
    return product if i.get("bias") is None else product + i["bias"].double()


def prove_matmul_4bit(d: Difference) -> None:
    """The decoded weight may be rounded to the dtype of the input, sums are in float32."""
    expected, dtype = product_4bit(d), d.inputs["A"].dtype
    need(d.ours.shape == expected.shape and d.ours.dtype == dtype, f"{d.ours.dtype} {tuple(d.ours.shape)}")
    error = truth.relative_error(d.ours, expected)
    need(error < MATMUL_UNITS * truth.UNIT[dtype] + 1e-6, f"relative error {error:g}")


def is_other_order(d: Difference) -> bool:
    """The release's product is right as well."""
    if d.they_failed or d.ours.shape != d.theirs.shape or d.ours.dtype != d.theirs.dtype:
        return False
    return truth.relative_error(d.theirs, product_4bit(d)) < MATMUL_UNITS * truth.UNIT[d.theirs.dtype] + 1e-6


EXPLANATIONS = (
    Explanation(
        ("codebook",),
        "the release cannot build the int4 table: it writes floats into an integer tensor",
        lambda d: d.they_failed and d.case.id == "int4",
        prove_int4,
    ),
    Explanation(
        ("codebook",),
        "the release needs scipy for quantiles, which its environment lacks",
        lambda d: d.they_failed and d.case.id.startswith("normal"),
        prove_normal_map,
    ),
    Explanation(
        DECODERS, "the release gives a 1-D tensor of even length two dimensions on the CPU", is_flattened, prove_decoded
    ),
    Explanation(
        DECODERS, "the release gives FP4 code 8 a negative zero for some shapes", differs_in_sign_of_zero, prove_decoded
    ),
    Explanation(
        DECODERS, "the release's CPU kernel flushes bfloat16 denormals to zero", loses_denormals, prove_decoded
    ),
    Explanation(
        DECODERS,
        "the release counts 4-bit blocks by row on the CPU, so rows that end within a block get wrong scales",
        has_split_rows,
        prove_decoded,
    ),
    Explanation(
        ("int8_vectorwise_quant",),
        "the release refuses tensors that have not two dimensions, or no columns, on the CPU",
        lambda d: d.they_failed and (d.inputs["A"].dim() != 2 or d.inputs["A"].shape[1] == 0),
        prove_int8_quant,
    ),
    Explanation(
        ("int8_vectorwise_quant",),
        "rows with an absmax below 127 / FLT_MAX: the release's scale overflows and all codes become 0",
        has_tiny_rows,
        prove_int8_quant,
    ),
    Explanation(
        ("int8_double_quant",),
        "the release has no CPU implementation",
        lambda d: d.they_failed and "NotImplementedError" in d.theirs["error"],
        prove_int8_quant,
    ),
    Explanation(
        ("int8_vectorwise_dequant",),
        "the release refuses more than two dimensions on the CPU",
        lambda d: d.they_failed and d.inputs["A"].dim() > 2,
        prove_int8_dequant,
    ),
    Explanation(
        ("int8_linear_matmul",),
        "a product over one column gives other garbage in every run of the release",
        lambda d: d.inputs["A"].shape[-1] == 1,
        prove_product,
    ),
    Explanation(
        ("int8_scaled_mm",),
        "a product over one column gives other garbage in every run of the release",
        lambda d: d.inputs["A"].shape[-1] == 1,
        prove_scaled,
    ),
    Explanation(
        ("int8_mm_dequant", "int8_scaled_mm"),
        f"the release multiplies by {RELEASE_DOT_SCALE} where 1 / 127**2 is meant",
        has_release_scale,
        prove_scaled,
    ),
    Explanation(
        ("gemv_4bit",),
        "on the CPU the release's process dies or its values are wrong",
        lambda d: d.they_failed or d.ours.shape == d.theirs.shape,
        prove_matmul_4bit,
    ),
    Explanation(
        ("gemm_4bit",),
        "the last bits of sums, whose order is not part of the contract",
        is_other_order,
        prove_matmul_4bit,
    ),
)
