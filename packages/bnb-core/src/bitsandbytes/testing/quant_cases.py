"""Cases of the quantization ops. Their results are exact: every backend gives the reference's bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from bitsandbytes.codebooks import create_dynamic_map, create_linear_map
from bitsandbytes.contract import OPS
from bitsandbytes.ops.common import FLOAT_DTYPES
from bitsandbytes.testing.case import Arguments, Case, name_of, size_of, values

EDGE_KINDS = ("ties", "heavy", "zero", "constant", "denormal", "nonfinite", "strided", "transposed")
SHAPES = ((64, 64), (3, 5, 7), (1,), (257,), (2, 130), (0, 16), (4096 + 33,))


def quantize_4bit_cases() -> Iterator[Case]:
    """Types, block sizes, dtypes, storages and edge values of 4-bit quantization."""
    for quant_type in ("nf4", "fp4"):
        grid = itertools.product(SHAPES, FLOAT_DTYPES, (64, 4096))
        combos = [("normal", shape, dtype, blocksize) for shape, dtype, blocksize in grid]
        combos += [(kind, (96, 96), dtype, 64) for kind in EDGE_KINDS for dtype in FLOAT_DTYPES]
        combos += [("normal", (96, 96), torch.float32, blocksize) for blocksize in (2, 6, 32, 128, 300, 512, 2048)]
        for kind, shape, dtype, blocksize in combos:

            def make(
                generator: torch.Generator,
                kind: str = kind,
                shape: tuple[int, ...] = shape,
                dtype: torch.dtype = dtype,
                blocksize: int = blocksize,
                quant_type: str = quant_type,
            ) -> Arguments:
                return values(kind, shape, dtype, generator), blocksize, quant_type, torch.uint8

            yield Case("quantize_4bit", f"{quant_type}-{kind}-{size_of(shape)}-{name_of(dtype)}-bs{blocksize}", make)
        for storage in (torch.bfloat16, torch.float32):
            yield Case(
                "quantize_4bit",
                f"{quant_type}-storage-{name_of(storage)}",
                lambda generator, storage=storage, quant_type=quant_type: (  # type: ignore[misc]
                    values("normal", (32, 64), torch.float16, generator),
                    64,
                    quant_type,
                    storage,
                ),
            )


def dequantize_4bit_cases() -> Iterator[Case]:
    """The way back, plain and nested, for shapes whose blocks run across rows."""
    shapes = ((64, 64), (10, 96), (5, 7), (1,), (258,), (0, 16), (3, 5, 128))
    for quant_type, dtype, shape in itertools.product(("nf4", "fp4"), FLOAT_DTYPES, shapes):
        for blocksize in (64, 2048):

            def make(
                generator: torch.Generator,
                shape: tuple[int, ...] = shape,
                blocksize: int = blocksize,
                quant_type: str = quant_type,
                dtype: torch.dtype = dtype,
            ) -> Arguments:
                x = values("normal", shape, torch.float32, generator)
                packed, absmax = OPS["quantize_4bit"].reference(x, blocksize, quant_type, torch.uint8)
                return packed, absmax, blocksize, quant_type, shape, dtype

            yield Case("dequantize_4bit", f"{quant_type}-{size_of(shape)}-{name_of(dtype)}-bs{blocksize}", make)

        for blocksize in (32, 2048):

            def make_nested(
                generator: torch.Generator,
                shape: tuple[int, ...] = shape,
                blocksize: int = blocksize,
                quant_type: str = quant_type,
                dtype: torch.dtype = dtype,
            ) -> Arguments:
                x = values("normal", shape, torch.float32, generator)
                packed, absmax = OPS["quantize_4bit"].reference(x, blocksize, quant_type, torch.uint8)
                # Nothing has no mean.
                code, offset = create_dynamic_map(), absmax.sum() / max(1, absmax.numel())
                codes, absmax2 = OPS["quantize_blockwise"].reference(absmax - offset, code, 256)
                return packed, absmax2, codes, code, offset, blocksize, quant_type, shape, dtype

            label = f"{quant_type}-{size_of(shape)}-{name_of(dtype)}-bs{blocksize}"
            yield Case("dequantize_4bit_nested", label, make_nested)


def blockwise_cases() -> Iterator[Case]:
    """8-bit block-wise quantization and back."""
    combos = [("normal", shape, dtype, 256) for shape in SHAPES for dtype in FLOAT_DTYPES]
    combos += [(kind, (96, 96), dtype, 64) for kind in EDGE_KINDS for dtype in FLOAT_DTYPES]
    combos += [("normal", (96, 96), torch.float32, blocksize) for blocksize in (1, 63, 64, 300, 4096, 2**33)]
    for (kind, shape, dtype, blocksize), signed in itertools.product(combos, (True, False)):

        def make(
            generator: torch.Generator,
            kind: str = kind,
            shape: tuple[int, ...] = shape,
            dtype: torch.dtype = dtype,
            blocksize: int = blocksize,
            signed: bool = signed,
        ) -> Arguments:
            code = create_dynamic_map(signed) if blocksize != 300 else create_linear_map(signed)
            return values(kind, shape, dtype, generator), code, blocksize

        def make_codes(
            generator: torch.Generator, make: Callable[..., Arguments] = make, dtype: torch.dtype = dtype
        ) -> Arguments:
            x, code, blocksize = make(generator)
            codes, absmax = OPS["quantize_blockwise"].reference(x, code, blocksize)
            return codes, absmax, code, blocksize, dtype

        label = f"{'signed' if signed else 'unsigned'}-{kind}-{size_of(shape)}-{name_of(dtype)}-bs{blocksize}"
        yield Case("quantize_blockwise", label, make)
        yield Case("dequantize_blockwise", label, make_codes)


def codes_differ_at_ties(arguments: Arguments, position: int, result: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether int8 codes differ by one at most, and only where a value lies between two codes.

    GPUs divide by absmax with an error of two units in the last place, as bitsandbytes 0.50.2 does there.
    """
    if result.dtype != torch.int8:
        return False
    A = arguments[0].double().reshape(-1, arguments[0].shape[-1])
    threshold = arguments[1]
    inliers = A.masked_fill(A.abs() >= threshold, 0.0) if threshold > 0 else A
    # The second result of double quantization holds the codes by column.
    scaled = inliers / inliers.abs().amax(dim=0 if position == 1 else 1, keepdim=True) * 127
    at_tie = ((scaled - scaled.floor()) - 0.5).abs() < 1e-4
    differs = (result != wanted).reshape(scaled.shape)
    by_one = (result.short() - wanted.short()).abs().reshape(scaled.shape) <= 1
    return bool((~differs | (at_tie & by_one)).all())


def int8_quant_cases() -> Iterator[Case]:
    """Row-wise and double quantization with and without outliers."""
    combos = [
        ("normal", shape, dtype) for shape in ((64, 64), (5, 7), (2, 3, 130), (9,), (0, 16)) for dtype in FLOAT_DTYPES
    ]
    combos += [(kind, (32, 96), dtype) for kind in EDGE_KINDS for dtype in FLOAT_DTYPES]
    for (kind, shape, dtype), threshold in itertools.product(combos, (0.0, 2.0, 100.0)):
        label = f"{kind}-{size_of(shape)}-{name_of(dtype)}-threshold{threshold:g}"

        def make(
            generator: torch.Generator,
            kind: str = kind,
            shape: tuple[int, ...] = shape,
            dtype: torch.dtype = dtype,
            threshold: float = threshold,
        ) -> Arguments:
            return values(kind, shape, dtype, generator), threshold

        yield Case("int8_vectorwise_quant", label, make, alternative=codes_differ_at_ties)
        yield Case("int8_double_quant", label, make, alternative=codes_differ_at_ties)
    for shape in ((64, 64), (5, 7), (2, 3, 8), (0, 16)):
        yield Case(
            "int8_vectorwise_dequant",
            size_of(shape),
            lambda g, shape=shape: OPS["int8_vectorwise_quant"].reference(values("normal", shape, torch.float32, g))[
                :2
            ],  # type: ignore[misc]
        )
