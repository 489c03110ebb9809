"""The cases: what both environments are asked to compute, each with the same inputs.

Two rounds. The first needs only the release's codebooks, for values that tie; the second is made from
the layers and optimizers that each side saved in the first and gives them to the other side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from tests.compare.case import Case, Maker, size_of
from tests.compare.inputs import DTYPES, KINDS, dtype_of, random_bytes, statistics
from tests.compare.optimizer_cases import optimizer_load_cases, optimizer_op_cases, optimizer_state_dict_cases
from tests.compare.state_cases import load_cases, state_dict_cases

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGES = ("uint8", "bfloat16", "float16", "float32")
#: Sizes around blocks and vectors, odd and even, one-dimensional and not, and empty.
SHAPES = (
    (1,), (2,), (31,), (127,), (128,), (257,), (4096,), (1, 1), (1, 64), (64, 64), (2, 130), (10, 96), (3, 5, 7),
    (4, 3, 48), (0,), (0, 16),
)  # fmt: skip

#: Codebooks by a name that ids use; 8-bit ones are also what blockwise cases quantize with.
CODEBOOKS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    **{name: ("get_4bit_type", [name], {"device": "cpu"}) for name in ("nf4", "fp4", "int4", "af4")},
    "dynamic": ("create_dynamic_map", [], {}),
    "dynamic-unsigned": ("create_dynamic_map", [], {"signed": False}),
    **{
        f"dynamic-{'signed' if signed else 'unsigned'}-{exponents}-{bits}": (
            "create_dynamic_map",
            [],
            {"signed": signed, "max_exponent_bits": exponents, "total_bits": bits},
        )
        for signed, exponents, bits in ((True, 3, 4), (True, 5, 6), (True, 6, 8), (False, 3, 4), (False, 5, 6))
    },
    "linear": ("create_linear_map", [], {}),
    "linear-unsigned": ("create_linear_map", [], {"signed": False}),
    "linear-4": ("create_linear_map", [], {"total_bits": 4}),
    "linear-no-zero": ("create_linear_map", [], {"add_zero": False}),
    "fp8": ("create_fp8_map", [], {}),
    "fp8-unsigned": ("create_fp8_map", [], {"signed": False, "exponent_bits": 5, "precision_bits": 3}),
    "fp8-4-3": ("create_fp8_map", [], {"signed": True, "exponent_bits": 4, "precision_bits": 3}),
    "fp4-map": ("create_fp8_map", [], {"signed": True, "exponent_bits": 2, "precision_bits": 1, "total_bits": 4}),
    "normal": ("create_normal_map", [], {}),
    "normal-symmetric": ("create_normal_map", [], {"use_extra_value": False}),
    "normal-offset": ("create_normal_map", [], {"offset": 0.95}),
}
BLOCKWISE_CODES = ("dynamic", "dynamic-unsigned", "dynamic-signed-3-4", "linear", "linear-4", "fp8", "fp8-unsigned")


def codebook_cases() -> Iterator[Case]:
    """Every table of numbers."""
    for name, (function, arguments, keywords) in CODEBOOKS.items():
        yield Case("codebook", name, {"name": function, "arguments": arguments, "keywords": keywords})


def quantize_4bit_cases(make: Maker) -> Iterator[Case]:
    """Kinds of values over all block sizes, shapes, storages and nesting."""
    grid = itertools.product(("nf4", "fp4"), DTYPES, BLOCKSIZES, KINDS)
    combos: list[tuple[str, str, int, str, tuple[int, ...], str, bool]]
    combos = [(t, d, b, k, (2 * b // 64 + 3, 67), "uint8", False) for t, d, b, k in grid]
    shapes = itertools.product(("nf4", "fp4"), DTYPES, (64, 4096), SHAPES)
    combos += [(t, d, b, "normal", shape, "uint8", False) for t, d, b, shape in shapes]
    nested = itertools.product(("nf4", "fp4"), DTYPES, STORAGES, (64, 256))
    combos += [(t, d, b, "normal", (264, 136), storage, True) for t, d, storage, b in nested]
    combos += [
        (t, d, 64, "heavy", (64, 96), storage, False)
        for t, d, storage in itertools.product(("nf4", "fp4"), DTYPES, STORAGES)
    ]
    combos += [(t, "float32", 64, kind, (96, 96), "uint8", True) for t in ("nf4", "fp4") for kind in KINDS]
    for quant_type, dtype, blocksize, kind, shape, storage, is_nested in combos:
        name = f"{quant_type}-{kind}-{size_of(shape)}-{dtype}-bs{blocksize}-{storage}{'-nested' if is_nested else ''}"
        A = make.values(kind, shape, dtype, name, quant_type, blocksize)
        options = {"blocksize": blocksize, "quant_type": quant_type, "quant_storage": storage, "nested": is_nested}
        yield Case("quantize_4bit", name, {"A": A, **options})
    for quant_type, view in itertools.product(("nf4", "fp4"), ("strided", "transposed")):
        x = make.values("normal", (64, 130), "float32", f"{quant_type} {view}")
        A = x[:, ::2] if view == "strided" else x.t()
        options = {"blocksize": 64, "quant_type": quant_type, "quant_storage": "uint8", "nested": False}
        yield Case("quantize_4bit", f"{quant_type}-{view}", {"A": A, **options})


def dequantize_4bit_cases(make: Maker) -> Iterator[Case]:
    """Random codes and statistics, plain and through a state with nested statistics."""
    shapes = (*SHAPES, (7, 80), (5, 112), (3, 2048), (33, 129))
    for quant_type, dtype, blocksize, shape in itertools.product(("nf4", "fp4"), DTYPES, BLOCKSIZES, shapes):
        for kind in ("plain", "edge") if shape == (64, 64) else ("plain",):
            name = f"{quant_type}-{kind}-{size_of(shape)}-{dtype}-bs{blocksize}"
            generator, count = make.seeded(name), math.prod(shape)
            A = random_bytes((count + 1) // 2, generator).unsqueeze(1)
            absmax = statistics(kind, -(-count // blocksize), generator)
            options = {"blocksize": blocksize, "quant_type": quant_type, "shape": list(shape), "dtype": dtype}
            yield Case("dequantize_4bit", name, {"A": A, "absmax": absmax, **options})
    for quant_type, dtype, blocksize, storage, transposed in itertools.product(
        ("nf4", "fp4"), DTYPES, (64, 256), ("uint8", "bfloat16"), (False, True)
    ):
        name = f"{quant_type}-{dtype}-bs{blocksize}-{storage}{'-transposed' if transposed else ''}"
        yield Case(
            "dequantize_4bit_state",
            name,
            nested_inputs(make, name, quant_type, dtype, blocksize, storage) | {"transposed": transposed},
        )
    for quant_type, dtype, blocksize, shape in itertools.product(("nf4", "fp4"), DTYPES, (64, 128), SHAPES):
        name = f"{quant_type}-{size_of(shape)}-{dtype}-bs{blocksize}"
        A = make.values("normal", shape, dtype, name)
        yield Case("round_trip_4bit", name, {"A": A, "blocksize": blocksize, "quant_type": quant_type})


def nested_inputs(make: Maker, name: str, quant_type: str, dtype: str, blocksize: int, storage: str) -> dict[str, Any]:
    """Packed codes and the state of a nested 4-bit tensor under the keys of a checkpoint."""
    generator, shape = make.seeded(name), (264, 128)
    count = math.prod(shape)
    blocks = count // blocksize
    stats = {
        "absmax": random_bytes(blocks, generator),
        "quant_map": make.codebooks[quant_type],
        "nested_absmax": statistics("plain", -(-blocks // 256), generator) / 8,
        "nested_quant_map": make.codebooks["dynamic"],
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.061591645330190659,
    }
    packed = random_bytes(count // 2, generator).view(dtype_of(storage)).unsqueeze(1)
    return {"A": packed, "quantized_stats": stats}


def blockwise_cases(make: Maker) -> Iterator[Case]:
    """8-bit codes for every codebook."""
    combos: list[tuple[str, str, int, str, tuple[int, ...]]]
    combos = [(c, d, 256, k, (5, 333)) for c, d, k in itertools.product(BLOCKWISE_CODES, DTYPES, KINDS)]
    combos += [
        (c, d, b, "normal", (3, 2777)) for c, d, b in itertools.product(BLOCKWISE_CODES[:2], DTYPES, BLOCKSIZES[1:])
    ]
    combos += [("dynamic", d, 256, "normal", shape) for d, shape in itertools.product(DTYPES, SHAPES)]
    for code, dtype, blocksize, kind, shape in combos:
        name = f"{code}-{kind}-{size_of(shape)}-{dtype}-bs{blocksize}"
        book = make.codebooks[code]
        A = make.values(kind, shape, dtype, name, code, blocksize)
        yield Case("quantize_blockwise", name, {"A": A, "code": book, "blocksize": blocksize, "nested": False})
        generator = make.seeded("codes", name)
        codes = (random_bytes(A.numel(), generator).int() % len(book)).to(torch.uint8).reshape(shape)
        absmax = statistics("edge" if kind == "ties" else "plain", -(-A.numel() // blocksize), generator)
        inputs = {"A": codes, "absmax": absmax, "code": book, "blocksize": blocksize, "dtype": dtype}
        yield Case("dequantize_blockwise", name, inputs)
    for dtype in DTYPES:
        A = make.values("normal", (70, 1000), dtype, f"nested-{dtype}")
        yield Case("quantize_blockwise", f"nested-{dtype}", {"A": A, "code": None, "blocksize": 256, "nested": True})


def int8_cases(make: Maker) -> Iterator[Case]:
    """Row-wise quantization and integer products."""
    kinds = [kind for kind in KINDS if kind != "ties"]
    combos: list[tuple[str, str, tuple[int, ...], float]]
    combos = [(k, d, (17, 99), t) for k, d, t in itertools.product(kinds, DTYPES, (0.0, 2.0, 6.0))]
    shapes = ((1, 1), (5, 7), (2, 3, 130), (9,), (64, 256), (0, 16), (3, 0))
    combos += [("normal", d, shape, t) for d, shape, t in itertools.product(DTYPES, shapes, (0.0, 2.0))]
    combos += [("halves", d, (16, 64), t) for d, t in itertools.product(DTYPES, (0.0, 100.0))]
    for kind, dtype, shape, threshold in combos:
        name = f"{kind}-{size_of(shape)}-{dtype}-threshold{threshold:g}"
        if kind == "halves":
            # Scale 1: every second value lies midway between two integers.
            A = torch.randint(-253, 254, shape, generator=make.seeded(name)) / 2
            A[:, 0] = 127.0
            A = A.to(dtype_of(dtype))
        else:
            A = make.values(kind, shape, dtype, name)
        yield Case("int8_vectorwise_quant", name, {"A": A, "threshold": threshold})
        yield Case("int8_double_quant", name, {"A": A, "threshold": threshold})
    for shape in ((64, 64), (5, 7), (2, 3, 8), (1, 1), (0, 16)):
        name = size_of(shape)
        A = random_int8(shape, make.seeded(name))
        stats = statistics("plain", math.prod(shape[:-1]), make.seeded(name, "stats"))
        yield Case("int8_vectorwise_dequant", name, {"A": A, "stats": stats})
    for rows, inner, columns in itertools.product((1, 5, 33), (1, 2, 7, 8, 64, 130), (1, 8, 31)):
        name = f"{rows}x{inner}x{columns}"
        A, B = random_int8((rows, inner), make.seeded(name)), random_int8((columns, inner), make.seeded(name, "B"))
        yield Case("int8_linear_matmul", name, {"A": A, "B": B})
        yield from scaled_cases(make, name, A, B)
    for lead in ((64,), (2, 3, 64), (0, 64), (2, 0, 64)):
        name = f"{size_of(lead)}x16"
        inputs = {"A": random_int8(lead, make.seeded(name)), "B": random_int8((16, 64), make.seeded(name, "B"))}
        yield Case("int8_linear_matmul", name, inputs)
    extreme = torch.full((2, 4096), -127, dtype=torch.int8)
    yield Case("int8_linear_matmul", "extreme", {"A": extreme, "B": extreme.clone()})


def scaled_cases(make: Maker, name: str, A: torch.Tensor, B: torch.Tensor) -> Iterator[Case]:
    """The product of ``A`` and ``B`` scaled to floating point, with and without a bias."""
    row_stats = statistics("plain", len(A), make.seeded(name, "rows")) * 4
    col_stats = statistics("plain", len(B), make.seeded(name, "columns")) * 4
    product = A.int() @ B.int().t()
    for dtype, with_bias in itertools.product(("float16", "bfloat16", "float32"), (False, True)):
        bias = torch.randn(len(B), generator=make.seeded(name, "bias")).to(dtype_of(dtype)) if with_bias else None
        case = f"{name}-{dtype}{'-bias' if with_bias else ''}"
        stats = {"row_stats": row_stats, "col_stats": col_stats, "dtype": dtype, "bias": bias}
        yield Case("int8_mm_dequant", case, {"A": product, **stats})
        yield Case("int8_scaled_mm", case, {"A": A, "B": B, **stats})
    stats = {"row_stats": row_stats, "col_stats": col_stats, "dtype": None, "bias": None}
    yield Case("int8_mm_dequant", f"{name}-default", {"A": product, **stats})


def random_int8(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform codes from -127 to 127."""
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def matmul_cases(make: Maker) -> Iterator[Case]:
    """Products with 4-bit weights."""
    for quant_type, dtype, rows, (out, inner) in itertools.product(
        ("nf4", "fp4"), DTYPES, (1, 2, 9), ((32, 64), (48, 256), (7, 130))
    ):
        for with_bias in (False, True):
            name = f"{quant_type}-{dtype}-{rows}x{inner}x{out}{'-bias' if with_bias else ''}"
            generator = make.seeded(name)
            A = torch.randn(rows, inner, generator=generator).to(dtype_of(dtype))
            packed = random_bytes(out * inner // 2, generator).unsqueeze(1)
            absmax = statistics("plain", -(-out * inner // 64), generator)
            bias = torch.randn(out, generator=generator).to(dtype_of(dtype)) if with_bias else None
            weight = {"A": A, "B": packed, "shapeB": [out, inner], "absmax": absmax, "blocksize": 64}
            yield Case("gemm_4bit", name, {**weight, "quant_type": quant_type, "bias": bias})
            # The release dies on most of these, and each death costs a new process.
            if rows == 1 and not with_bias and (out == 32 or name == "nf4-float32-1x256x48"):
                yield Case("gemv_4bit", name, {**weight, "code": make.codebooks[quant_type]})


def first_round(codebooks: dict[str, torch.Tensor]) -> list[Case]:
    """All cases that need nothing from either side but codebooks."""
    make = Maker(codebooks)
    groups = (
        quantize_4bit_cases(make), dequantize_4bit_cases(make), blockwise_cases(make), int8_cases(make),
        matmul_cases(make), state_dict_cases(make), optimizer_op_cases(make), optimizer_state_dict_cases(make),
    )  # fmt: skip
    return [*codebook_cases(), *itertools.chain(*groups)]


def second_round(first: list[Case], saved: dict[str, Any]) -> list[Case]:
    """Cases that load what a side ``saved`` in the first round."""
    return [*load_cases(first, saved), *optimizer_load_cases(first, saved)]
