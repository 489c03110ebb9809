"""How far a result may be from the float64 truth, and why.

Quantization is exact: codes and statistics are part of a file format, so every backend produces the
bits of the reference. Products are rounded, so they get a bound on the relative error of the whole
result, ``norm(out - truth) / norm(truth)`` in float64 (Frobenius norm).
"""

from __future__ import annotations

import torch

#: Products with a 4-bit weight. In half precision the contract lets a kernel round the decoded weight
#: to the dtype of A (relative error up to half a unit in the last place, about u / sqrt(3) in the
#: mean), and the result is rounded once more. Four times the unit leaves room for the sum of both
#: and for short rows. In float32 the error is that of summing some thousand products.
MATMUL = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

#: int8 products are exact integers; only scales (float32) and the last rounding err.
SCALED_INTEGER = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error of a tensor in the Frobenius norm, in float64.

    Raises:
        AssertionError: shapes differ, or NaN or infinity stand in other places.
    """
    actual, truth = actual.detach().cpu().double(), truth.detach().cpu().double()
    demand(actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    finite = truth.isfinite()
    demand(torch.equal(actual.isfinite(), finite), "NaN or infinity in other places than in the truth")
    difference = torch.linalg.vector_norm(torch.where(finite, actual - truth, 0.0))
    scale = torch.linalg.vector_norm(torch.where(finite, truth, 0.0))
    return float(difference / scale) if scale > 0 else float(difference)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal shape, dtype and values; NaN equals NaN, and -0.0 differs from +0.0."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    equal = (actual == expected) & (actual.signbit() == expected.signbit())
    return bool((equal | (actual.isnan() & expected.isnan())).all())


def demand(condition: bool, text: str) -> None:
    """Raise an ``AssertionError`` that says what is wrong; unlike ``assert``, under ``python -O`` too."""
    if not condition:
        raise AssertionError(text)


def demand_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise an ``AssertionError`` that says where two tensors differ."""
    if not same_bits(actual, expected):
        raise AssertionError(f"{what}: {describe_difference(actual, expected)}")


def describe_difference(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Where two tensors differ first, and how often."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        given, wanted = (f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in (actual, expected))
        return f"{given}, expected {wanted}"
    actual, expected = actual.detach().cpu().reshape(-1), expected.detach().cpu().reshape(-1)
    different = (actual != expected) & ~(actual.isnan() & expected.isnan()) | (actual.signbit() != expected.signbit())
    places = different.nonzero().reshape(-1)
    first = int(places[0])
    return f"{len(places)} of {len(expected)} differ, first at {first}: {actual[first]} instead of {expected[first]}"
