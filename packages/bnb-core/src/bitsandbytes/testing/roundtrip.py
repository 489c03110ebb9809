"""Quantize on the device, save as safetensors, load, dequantize on the device.

A checkpoint is written by one backend and read by another. So the bytes in the file are those that
the reference writes on the device, and they dequantize there to what the reference reads on the CPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bitsandbytes.codebooks import code_4bit, create_dynamic_map
from bitsandbytes.contract import OPS
from bitsandbytes.ops.common import FLOAT_DTYPES, NESTED_BLOCKSIZE
from bitsandbytes.state import QuantState
from bitsandbytes.testing.case import name_of, size_of
from bitsandbytes.testing.device import DeviceUnderTest
from bitsandbytes.testing.quant_cases import codes_differ_at_ties
from bitsandbytes.testing.tolerances import demand, demand_same_bits

SHAPES = ((64, 96), (5, 7), (1, 33))
BLOCKSIZE = 32

Entries = dict[str, torch.Tensor]
#: Calls an op by its name: on a device, or its reference.
Call = Callable[..., Any]


@dataclass(frozen=True)
class RoundTrip:
    """One format, and what is stored in it."""

    #: The op that writes the format.
    op: str
    id: str
    #: Quantizes values and returns the tensors of a checkpoint.
    write: Callable[[Call, torch.Tensor], Entries]
    #: Dequantizes what was read to a dtype.
    read: Callable[[Call, Entries, torch.dtype], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: Entries that depend on a mean, which devices may sum in another order.
    inexact: bool = False

    def values(self) -> torch.Tensor:
        """The same values at each call, on the CPU."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(5)).to(self.dtype)


def all_round_trips() -> Iterator[RoundTrip]:
    """Every format that checkpoints have."""
    grid = itertools.product(("nf4", "fp4"), (False, True), FLOAT_DTYPES, SHAPES)
    for quant_type, nested, dtype, shape in grid:
        write = functools.partial(_write_4bit, quant_type=quant_type, nested=nested)
        label = f"{quant_type}{'-nested' if nested else ''}-{size_of(shape)}-{name_of(dtype)}"
        yield RoundTrip("quantize_4bit", label, write, _read_4bit, shape, dtype, inexact=nested)
    for dtype, shape in itertools.product(FLOAT_DTYPES, SHAPES):
        label = f"{size_of(shape)}-{name_of(dtype)}"
        yield RoundTrip("quantize_blockwise", label, _write_blockwise, _read_blockwise, shape, dtype)
        yield RoundTrip("int8_vectorwise_quant", label, _write_int8, _read_int8, shape, dtype)


def check_round_trip(under_test: DeviceUnderTest, item: RoundTrip) -> None:
    """What the device writes is what the reference writes, and it reads back as the reference reads it."""
    from safetensors.torch import load, save

    values = under_test.to_device(item.values())
    written = item.write(_on_device, values)
    file = save({name: tensor.cpu().contiguous() for name, tensor in written.items()})
    wanted = item.write(_on_reference, values)
    demand(written.keys() == wanted.keys(), f"wrote the entries {sorted(written)}, expected {sorted(wanted)}")
    for name in ("weight",) if item.inexact else wanted:
        if not _is_other_int8_code(under_test, values, written[name], wanted[name]):
            demand_same_bits(written[name], wanted[name], f"entry {name}")
    entries = load(file)
    restored = item.read(_on_device, {name: under_test.to_device(x) for name, x in entries.items()}, item.dtype)
    demand_same_bits(restored, item.read(_on_reference, entries, item.dtype), "what was read back")


def _is_other_int8_code(
    under_test: DeviceUnderTest, values: torch.Tensor, written: torch.Tensor, wanted: torch.Tensor
) -> bool:
    """Whether int8 codes of rows differ where the arithmetic of the device leaves a choice."""
    if torch.device(under_test.device).type == "cpu" or wanted.dtype != torch.int8:
        return False
    return codes_differ_at_ties((values.cpu(), 0.0), 0, written.cpu(), wanted.cpu())


def _on_device(op: str, *arguments: Any) -> Any:
    return OPS[op].overload(*arguments)


def _on_reference(op: str, *arguments: Any) -> Any:
    return OPS[op].reference(*arguments)


def _write_4bit(call: Call, x: torch.Tensor, *, quant_type: str, nested: bool) -> Entries:
    packed, absmax = call("quantize_4bit", x, BLOCKSIZE, quant_type, torch.uint8)
    code, offset, outer = code_4bit(quant_type, x.device), None, None
    if nested:
        offset, map8 = absmax.mean(), create_dynamic_map().to(x.device)
        absmax, absmax2 = call("quantize_blockwise", absmax - offset, map8, NESTED_BLOCKSIZE)
        outer = QuantState(absmax2, blocksize=NESTED_BLOCKSIZE, code=map8, dtype=torch.float32)
    state = QuantState(absmax, x.shape, code, BLOCKSIZE, quant_type, x.dtype, offset, outer)
    return {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}


def _read_4bit(call: Call, entries: Entries, dtype: torch.dtype) -> torch.Tensor:
    packed = entries["weight"]
    description = {name: value for name, value in entries.items() if name != "weight"}
    state = QuantState.from_dict(description, packed.device)
    tail = (BLOCKSIZE, state.quant_type, tuple(state.shape), dtype)
    statistics = state.nested_arguments()
    op = "dequantize_4bit_nested" if state.nested else "dequantize_4bit"
    return call(op, packed, *statistics.values(), *tail)


def _write_blockwise(call: Call, x: torch.Tensor) -> Entries:
    code = create_dynamic_map().to(x.device)
    codes, absmax = call("quantize_blockwise", x, code, BLOCKSIZE)
    return {"weight": codes, "absmax": absmax, "code": code}


def _read_blockwise(call: Call, entries: Entries, dtype: torch.dtype) -> torch.Tensor:
    return call("dequantize_blockwise", entries["weight"], entries["absmax"], entries["code"], BLOCKSIZE, dtype)


def _write_int8(call: Call, x: torch.Tensor) -> Entries:
    codes, stats, _columns = call("int8_vectorwise_quant", x)
    return {"weight": codes, "SCB": stats}


def _read_int8(call: Call, entries: Entries, dtype: torch.dtype) -> torch.Tensor:
    return call("int8_vectorwise_dequant", entries["weight"], entries["SCB"])
