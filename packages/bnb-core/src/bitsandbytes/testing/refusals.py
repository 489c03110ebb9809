"""Calls that break a contract, and the argument that the error must name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bitsandbytes.codebooks import create_dynamic_map
from bitsandbytes.contract import OPS


@dataclass(frozen=True)
class Refusal:
    """One call that must raise :class:`~bitsandbytes.errors.ArgumentError`."""

    op: str
    id: str
    #: Word that the message must contain: the argument at fault.
    names: str
    #: Makes the arguments on the CPU.
    make: Callable[[], tuple[Any, ...]]


def all_refusals() -> list[Refusal]:
    """Wrong dtypes, sizes, names and block sizes for every op."""
    x, code = torch.ones(32, 64), create_dynamic_map()
    packed, absmax = OPS["quantize_4bit"].reference(torch.ones(32, 64), 64, "nf4", torch.uint8)
    shape = (32, 64)
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    int8 = torch.ones(32, 64, dtype=torch.int8)
    rows, columns = torch.ones(32), torch.ones(32)
    f32 = torch.float32
    table = torch.ones(16)
    flat, state8, stats8 = torch.ones(512), torch.zeros(512, dtype=torch.uint8), torch.zeros(2)
    adam32 = (0.9, 0.99, 0.0, 0.0, 1e-8, 0.0, 1, 0.1, 1.0)
    adam8 = (0.9, 0.99, 0.0, 0.0, 1e-8, 1, 0.1, code, code, stats8, stats8, 0.0, 1.0)
    multi = (0.1, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0)
    half_nested = (None, torch.zeros(32, dtype=torch.uint8), None, None)
    calls: dict[str, list[tuple[str, str, tuple[Any, ...]]]] = {
        "quantize_4bit": [
            ("dtype", "A", (x.double(), 64, "nf4", torch.uint8)),
            ("odd-blocksize", "blocksize", (x, 63, "nf4", torch.uint8)),
            ("zero-blocksize", "blocksize", (x, 0, "nf4", torch.uint8)),
            ("negative-blocksize", "blocksize", (x, -64, "nf4", torch.uint8)),
            ("type", "quant_type", (x, 64, "nf5", torch.uint8)),
            ("storage", "quant_storage", (x, 64, "nf4", torch.complex64)),
            ("storage-size", "quant_storage", (x.reshape(-1)[:3], 64, "nf4", f32)),
        ],
        "dequantize_4bit": [
            ("short", "A", (packed[:-1], absmax, 64, "nf4", shape, f32)),
            ("long-shape", "A", (packed, absmax, 64, "nf4", (64, 64), f32)),
            ("negative-shape", "shape", (packed, absmax, 64, "nf4", (-32, -64), f32)),
            ("absmax-count", "absmax", (packed, absmax[:-1], 64, "nf4", shape, f32)),
            ("absmax-dtype", "absmax", (packed, absmax.half(), 64, "nf4", shape, f32)),
            ("blocksize", "blocksize", (packed, absmax, 0, "nf4", shape, f32)),
            ("type", "quant_type", (packed, absmax, 64, "int4", shape, f32)),
            ("result", "dtype", (packed, absmax, 64, "nf4", shape, torch.int32)),
        ],
        "dequantize_4bit_nested": [
            ("codes", "absmax_8bit", (packed, absmax[:1], codes[0, :5], code, rows[:1], 64, "nf4", shape, f32)),
            ("offset", "absmax_offset", (packed, absmax[:1], codes[0, :32], code, rows, 64, "nf4", shape, f32)),
            ("code", "code", (packed, absmax[:1], codes[0, :32], torch.ones(257), rows[:1], 64, "nf4", shape, f32)),
        ],
        "quantize_blockwise": [
            ("dtype", "A", (x.int(), code, 256)),
            ("blocksize", "blocksize", (x, code, 0)),
            ("code-dtype", "code", (x, code.double(), 256)),
            ("code-empty", "code", (x, code[:0], 256)),
            ("code-long", "code", (x, torch.ones(300), 256)),
        ],
        "dequantize_blockwise": [
            ("dtype", "A", (int8, rows[:8], code, 256, f32)),
            ("absmax-count", "absmax", (codes, rows[:7], code, 256, f32)),
            ("result", "dtype", (codes, rows[:8], code, 256, torch.int8)),
        ],
        "gemv_4bit": [
            ("rows", "A", (x, packed, shape, absmax, table, 64)),
            ("features", "A", (x[:1, :63], packed, shape, absmax, table, 64)),
            ("table", "code", (x[:1], packed, shape, absmax, table[:8], 64)),
            ("shape", "shapeB", (x[:1], packed, (2048,), absmax, table, 64)),
        ],
        "gemm_4bit": [
            ("features", "A", (x[:, :63], packed, shape, absmax, 64, "nf4")),
            ("dtype", "A", (x.double(), packed, shape, absmax, 64, "nf4")),
            ("bias", "bias", (x, packed, shape, absmax, 64, "nf4", rows[:3])),
            ("bias-dtype", "bias", (x, packed, shape, absmax, 64, "nf4", rows.int())),
            ("nested", "absmax_code", (x, packed, shape, absmax, 64, "nf4", *half_nested)),
            ("shape", "shapeB", (x, packed, (2, 16, 64), absmax, 64, "nf4")),
        ],
        "gemm_4bit_transposed": [("features", "A", (x, packed, shape, absmax, 64, "nf4"))],
        "embedding_4bit": [
            ("indices", "indices", (x, packed, shape, absmax, 64, "nf4", f32)),
            ("result", "dtype", (codes[0].long(), packed, shape, absmax, 64, "nf4", torch.int8)),
        ],
        "optimizer_update_32bit": [
            ("name", "optimizer_name", ("adamax", flat, flat, flat, flat, None, 0.0, 0.0, *adam32)),
            ("gradient-size", "g has", ("adam", flat[1:], flat, flat, flat, None, 0.0, 0.0, *adam32)),
            ("gradient-dtype", "g has", ("adam", flat.half(), flat, flat, flat, None, 0.0, 0.0, *adam32)),
            ("dtype", "p has", ("adam", flat, flat.int(), flat, flat, None, 0.0, 0.0, *adam32)),
            ("strided", "p has", ("adam", flat, torch.ones(1024)[::2], flat, flat, None, 0.0, 0.0, *adam32)),
            ("second", "state2", ("adam", flat, flat, flat, None, None, 0.0, 0.0, *adam32)),
            ("state-dtype", "state1", ("adam", flat, flat, flat.half(), flat, None, 0.0, 0.0, *adam32)),
            ("state-size", "state1", ("ademamix", flat, flat, flat, flat, None, 0.0, 0.0, *adam32)),
            ("step", "step", ("adam", flat, flat, flat, flat, None, 0.0, 0.0, *adam32[:6], 0, *adam32[7:])),
            ("beta", "beta1", ("adam", flat, flat, flat, flat, None, 0.0, 0.0, 1.5, *adam32[1:])),
        ],
        "optimizer_update_8bit_blockwise": [
            ("name", "optimizer_name", ("", flat, flat, state8, state8, *adam8)),
            ("state", "state1", ("adam", flat, flat, flat, state8, *adam8)),
            ("state-size", "state2", ("adam", flat, flat, state8, state8[1:], *adam8)),
            ("qmap", "qmap1", ("adam", flat, flat, state8, state8, *adam8[:7], code[:16], *adam8[8:])),
            ("absmax", "absmax1", ("adam", flat, flat, state8, state8, *adam8[:9], stats8[:1], *adam8[10:])),
            ("absmax-slots", "absmax1", ("ademamix", flat, flat, torch.stack((state8, state8)), state8, *adam8)),
        ],
        "optimizer_step_32bit": [
            ("name", "optimizer_name", ("x", [flat], [flat], [flat], [flat], [1], *multi)),
            ("gradients", "g has", ("adam", [], [flat], [flat], [flat], [1], *multi)),
            ("gradient-size", "g[1]", ("adam", [flat, flat[1:]], [flat] * 2, [flat] * 2, [flat] * 2, [1, 1], *multi)),
            ("dtypes", "p[1]", ("adam", [flat] * 2, [flat, flat.half()], [flat] * 2, [flat] * 2, [1, 1], *multi)),
            ("states", "state2", ("adam", [flat], [flat], [flat], [], [1], *multi)),
            ("state-size", "state1[0]", ("adam", [flat], [flat], [flat[1:]], [flat], [1], *multi)),
            ("steps", "step", ("adam", [flat], [flat], [flat], [flat], [1, 2], *multi)),
            ("step", "step", ("adam", [flat], [flat], [flat], [flat], [0], *multi)),
            ("seeds", "rounding_seed", ("lion", [flat], [flat], [flat], [], [1], *multi, 1.0, 0.0, False, [1])),
            ("schedule", "schedule", ("lion", [flat], [flat], [flat], [], [], *multi, 1.0, 0.0, False, [], flat)),
        ],
        "optimizer_step_8bit": [
            ("state", "state1[0]", ("lion", [flat], [flat], [flat], [], code, None, [stats8], [], [1], *multi)),
            (
                "qmap",
                "qmap2",
                ("adam", [flat], [flat], [state8], [state8], code, None, [stats8], [stats8], [1], *multi),
            ),
            ("absmax", "absmax1[0]", ("lion", [flat], [flat], [state8], [], code, None, [rows], [], [1], *multi)),
        ],
        "int8_vectorwise_quant": [
            ("dtype", "A", (int8,)),
            ("scalar", "A", (x.sum(),)),
            ("threshold", "threshold", (x, -1.0)),
            ("threshold-nan", "threshold", (x, float("nan"))),
        ],
        "int8_vectorwise_dequant": [("dtype", "A", (x, rows)), ("stats", "stats", (int8, rows[:3]))],
        "int8_double_quant": [("dtype", "A", (x.double(),))],
        "int8_linear_matmul": [("inner", "B", (int8, int8[:, :3])), ("dtype", "A", (x, int8))],
        "int8_mm_dequant": [
            ("dtype", "A", (int8, rows, rows)),
            ("rows", "row_stats", (int8.int(), rows[:3], torch.ones(64))),
            ("columns", "col_stats", (int8.int(), rows, rows)),
        ],
        "int8_scaled_mm": [("rows", "row_stats", (int8, int8, rows[:3], columns))],
        "int8_mixed_scaled_mm": [("shape", "A", (x[:3], int8, int8, rows, columns))],
        "int8_linear": [
            ("weight", "CB", (x, x, columns)),
            ("features", "A", (x[:, :3], int8, columns)),
            ("stats", "SCB", (x, int8, columns[:3])),
            ("threshold", "threshold", (x, int8, columns, -6.0)),
        ],
    }
    return [
        Refusal(op, label, names, lambda arguments=arguments: arguments)  # type: ignore[misc]
        for op, entries in calls.items()
        for label, names, arguments in entries
    ]
