"""Cases of the products, judged against float64 on the exactly decoded operands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bitsandbytes.codebooks import code_4bit, create_dynamic_map
from bitsandbytes.contract import OPS
from bitsandbytes.ops.common import FLOAT_DTYPES, as_rows
from bitsandbytes.ops.fourbit import decode_4bit, expand_absmax
from bitsandbytes.testing.case import Arguments, Case, name_of, values
from bitsandbytes.testing.tolerances import MATMUL, SCALED_INTEGER

#: Block sizes of weights; at 32, blocks and rows of most shapes meet, at 4096 one block spans rows.
BLOCKSIZES = (64, 256, 4096)
MATMUL_SHAPES = ((1, 64, 64), (1, 100, 130), (3, 48, 256), (17, 33, 96), (70, 128, 320), (0, 16, 64), (2, 1, 2))
#: Of int8 weights, which need not fill pairs.
ODD_SHAPE = (5, 33, 67)
CPU = torch.device("cpu")


def quantized_weight(
    shape: tuple[int, int], blocksize: int, quant_type: str, nested: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Packed weight, absmax and the three nested statistics (``None`` without nesting)."""
    weight = torch.randn(shape, generator=generator) * 0.1
    packed, absmax = OPS["quantize_4bit"].reference(weight, blocksize, quant_type, torch.uint8)
    if not nested:
        return packed, absmax, (None, None, None)
    code, offset = create_dynamic_map(), absmax.mean()
    codes, absmax2 = OPS["quantize_blockwise"].reference(absmax - offset, code, 256)
    return packed, absmax2, (codes, code, offset)


def fourbit_matmul_cases() -> Iterator[Case]:
    """Products and look-ups with a 4-bit weight, plain and nested, with and without bias."""
    grid = itertools.product(MATMUL_SHAPES, FLOAT_DTYPES, ("nf4", "fp4"), (False, True))
    for (rows, out_features, in_features), dtype, quant_type, nested in grid:
        shape = (out_features, in_features)

        def make(
            generator: torch.Generator,
            transposed: bool,
            rows: int = rows,
            shape: tuple[int, int] = shape,
            dtype: torch.dtype = dtype,
            quant_type: str = quant_type,
            nested: bool = nested,
        ) -> Arguments:
            packed, absmax, statistics = quantized_weight(shape, 32, quant_type, nested, generator)
            A = values("normal", (rows, shape[0] if transposed else shape[1]), dtype, generator)
            if transposed:
                return A, packed, shape, absmax, 32, quant_type, *statistics
            bias = torch.randn(shape[0], generator=generator).to(dtype) if rows % 2 else None
            return A, packed, shape, absmax, 32, quant_type, bias, *statistics

        label = f"{quant_type}-{rows}x{out_features}x{in_features}-{name_of(dtype)}{'-nested' if nested else ''}"
        yield Case("gemm_4bit", label, lambda g, make=make: make(g, False), MATMUL[dtype], truth_gemm_4bit)  # type: ignore[misc]
        yield Case(
            "gemm_4bit_transposed",
            label,
            lambda g, make=make: make(g, True),  # type: ignore[misc]
            MATMUL[dtype],
            truth_gemm_4bit_transposed,
        )
        if rows == 1 and not nested:

            def make_gemv(generator: torch.Generator, make: Callable[..., Arguments] = make) -> Arguments:
                A, packed, shape, absmax, blocksize, quant_type = make(generator, False)[:6]
                code = code_4bit(quant_type, CPU)
                return A, packed, shape, absmax, code, blocksize

            yield Case("gemv_4bit", label, make_gemv, MATMUL[dtype], truth_gemv_4bit)

        def make_embedding(
            generator: torch.Generator, make: Callable[..., Arguments] = make, dtype: torch.dtype = dtype
        ) -> Arguments:
            A, packed, shape, absmax, blocksize, quant_type, _bias, *statistics = make(generator, False)
            indices = torch.randint(0, shape[0], (A.shape[0], 3), generator=generator)
            return indices, packed, shape, absmax, blocksize, quant_type, dtype, *statistics

        yield Case("embedding_4bit", label, make_embedding)


def fourbit_block_cases() -> Iterator[Case]:
    """The same with other block sizes, with more than one leading dimension, and with a bias of another dtype."""
    for blocksize, dtype, nested in itertools.product(BLOCKSIZES, FLOAT_DTYPES, (False, True)):

        def make(
            generator: torch.Generator,
            features: int,
            leading: tuple[int, ...] = (2, 3),
            blocksize: int = blocksize,
            dtype: torch.dtype = dtype,
            nested: bool = nested,
        ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int], torch.Tensor, tuple[torch.Tensor | None, ...]]:
            shape = (48, 130)
            packed, absmax, statistics = quantized_weight(shape, blocksize, "nf4", nested, generator)
            return values("normal", (*leading, shape[features]), dtype, generator), packed, shape, absmax, statistics

        def make_forward(
            generator: torch.Generator, make: Callable[..., Any] = make, blocksize: int = blocksize
        ) -> Arguments:
            A, packed, shape, absmax, statistics = make(generator, 1)
            bias = torch.randn(shape[0], generator=generator)
            return A, packed, shape, absmax, blocksize, "nf4", bias, *statistics

        def make_backward(
            generator: torch.Generator, make: Callable[..., Any] = make, blocksize: int = blocksize
        ) -> Arguments:
            A, packed, shape, absmax, statistics = make(generator, 0)
            return A, packed, shape, absmax, blocksize, "nf4", *statistics

        def make_row(
            generator: torch.Generator, make: Callable[..., Any] = make, blocksize: int = blocksize
        ) -> Arguments:
            A, packed, shape, absmax, _statistics = make(generator, 1, (1, 1))
            return A, packed, shape, absmax, code_4bit("nf4", CPU), blocksize

        def make_rows(
            generator: torch.Generator,
            make: Callable[..., Any] = make,
            blocksize: int = blocksize,
            dtype: torch.dtype = dtype,
        ) -> Arguments:
            _A, packed, shape, absmax, statistics = make(generator, 1)
            indices = torch.randint(0, shape[0], (2, 3), generator=generator)
            return indices, packed, shape, absmax, blocksize, "nf4", dtype, *statistics

        label = f"nf4-2x3x48x130-{name_of(dtype)}-bs{blocksize}{'-nested' if nested else ''}"
        yield Case("gemm_4bit", label, make_forward, MATMUL[dtype], truth_gemm_4bit)
        yield Case("gemm_4bit_transposed", label, make_backward, MATMUL[dtype], truth_gemm_4bit_transposed)
        yield Case("embedding_4bit", label, make_rows)
        if not nested:
            yield Case("gemv_4bit", label.replace("2x3", "1x1"), make_row, MATMUL[dtype], truth_gemv_4bit)


def _weight(
    packed: torch.Tensor,
    shape: tuple[int, int],
    absmax: torch.Tensor,
    blocksize: int,
    code: torch.Tensor,
    *statistics: torch.Tensor | None,
) -> torch.Tensor:
    expanded = expand_absmax(absmax, statistics[0], statistics[1], statistics[2]) if statistics else absmax
    return decode_4bit(packed, code, expanded, blocksize, shape).double()


def truth_gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shape: tuple[int, int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None,
    *statistics: torch.Tensor | None,
) -> torch.Tensor:
    """The product in float64 with the exactly decoded weight."""
    product = A.double() @ _weight(B, shape, absmax, blocksize, code_4bit(quant_type, CPU), *statistics).t()
    return product if bias is None else product + bias.double()


def truth_gemm_4bit_transposed(
    A: torch.Tensor,
    B: torch.Tensor,
    shape: tuple[int, int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    *statistics: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient product in float64."""
    return A.double() @ _weight(B, shape, absmax, blocksize, code_4bit(quant_type, CPU), *statistics)


def truth_gemv_4bit(
    A: torch.Tensor, B: torch.Tensor, shape: tuple[int, int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> torch.Tensor:
    """The product of one row in float64."""
    return A.double() @ _weight(B, shape, absmax, blocksize, code).t()


def int8_matmul_cases() -> Iterator[Case]:
    """Integer products, their scaling, outliers and the fused layer."""
    for (rows, out_features, in_features), dtype in itertools.product((*MATMUL_SHAPES, ODD_SHAPE), FLOAT_DTYPES):

        def make(
            generator: torch.Generator,
            threshold: float,
            rows: int = rows,
            out_features: int = out_features,
            in_features: int = in_features,
            dtype: torch.dtype = dtype,
        ) -> Arguments:
            A = values("normal", (rows, in_features), dtype, generator)
            if rows and threshold:
                A[rows // 2, in_features // 2] = 20.0
            weight = values("normal", (out_features, in_features), torch.float32, generator)
            CB, SCB, _columns = OPS["int8_vectorwise_quant"].reference(weight)
            bias = torch.randn(out_features, generator=generator).to(dtype) if rows % 2 else None
            return A, CB, SCB, threshold, bias

        def make_integer(generator: torch.Generator, make: Callable[..., Arguments] = make) -> Arguments:
            A, CB = make(generator, 0.0)[:2]
            return OPS["int8_vectorwise_quant"].reference(A)[0], CB

        def make_product(
            generator: torch.Generator, make: Callable[..., Arguments] = make, dtype: torch.dtype = dtype
        ) -> Arguments:
            A, CB, SCB, _threshold, bias = make(generator, 0.0)
            CA, SCA, _columns = OPS["int8_vectorwise_quant"].reference(A)
            return OPS["int8_linear_matmul"].reference(CA, CB), SCA, SCB, dtype, bias

        def make_scaled(
            generator: torch.Generator, make: Callable[..., Arguments] = make, dtype: torch.dtype = dtype
        ) -> Arguments:
            A, CB, SCB, _threshold, bias = make(generator, 0.0)
            CA, SCA, _columns = OPS["int8_vectorwise_quant"].reference(A)
            return CA, CB, SCA, SCB, bias, dtype

        def make_mixed(generator: torch.Generator, make: Callable[..., Arguments] = make) -> Arguments:
            A, CB, SCB, threshold, bias = make(generator, 6.0)
            CA, SCA, columns = OPS["int8_vectorwise_quant"].reference(A, threshold)
            return A, CA, CB, SCA, SCB, columns, bias

        label = f"{rows}x{out_features}x{in_features}-{name_of(dtype)}"
        if dtype is torch.float32:
            yield Case("int8_linear_matmul", label, make_integer)
        yield Case("int8_mm_dequant", label, make_product, SCALED_INTEGER[dtype], truth_int8_mm_dequant)
        yield Case("int8_scaled_mm", label, make_scaled, SCALED_INTEGER[dtype], truth_int8_scaled_mm)
        yield Case("int8_mixed_scaled_mm", label, make_mixed, SCALED_INTEGER[dtype], truth_int8_mixed_scaled_mm)
        for threshold in (0.0, 6.0):
            yield Case(
                "int8_linear",
                f"{label}-threshold{threshold:g}",
                lambda g, make=make, threshold=threshold: make(g, threshold),  # type: ignore[misc]
                SCALED_INTEGER[dtype],
                truth_int8_linear,
            )


def truth_int8_mm_dequant(
    A: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """Scaled integers in float64."""
    out = A.double() * rows.double().unsqueeze(1) * columns.double() / 127.0**2
    return out if bias is None else out + bias.double()


def truth_int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The scaled product in float64."""
    return truth_int8_mm_dequant(A.double() @ B.double().t(), rows, columns, dtype, bias)


def truth_int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Scaled product plus outlier columns in float64."""
    weight = CB[:, columns].double() * SCB.double().unsqueeze(1) / 127.0
    return truth_int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype) + A[:, columns].double() @ weight.t()


def truth_int8_linear(
    A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, threshold: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """The layer in float64 from the exactly quantized activations."""
    CA, SCA, columns = OPS["int8_vectorwise_quant"].reference(as_rows(A), threshold)
    columns = torch.zeros(0, dtype=torch.int64) if columns is None else columns
    return truth_int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, bias)
