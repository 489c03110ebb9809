"""Block-wise quantization against the reference: sizes, layouts and bit patterns that cases do not list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitsandbytes.codebooks import create_dynamic_map
from bitsandbytes.contract import OPS
from bitsandbytes.testing.tolerances import same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVEN_BLOCKSIZES = st.one_of(st.sampled_from((2, 32, 64, 128, 4096, 2**62)), st.integers(1, 700).map(lambda n: 2 * n))
ANY_BLOCKSIZES = st.one_of(st.sampled_from((1, 64, 256, 4096, 2**62)), st.integers(1, 1400))
SIZES = st.one_of(st.integers(0, 300), st.integers(0, 40000))
# The fixture only names the instruction set, which stays for all examples.
properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def agree(op: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """Results of the native op, after comparing them with the reference's bits."""
    results, expected = OPS[op].overload(*arguments), OPS[op].reference(*arguments)
    pairs = zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    for position, (result, wanted) in enumerate(pairs):
        assert same_bits(result, wanted), f"result {position} of {op} differs"
    return results if isinstance(results, tuple) else (results,)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Flat tensors of any size: normal values, or any bit patterns at all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count, dtype = draw(SIZES), draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        scale = 10.0 ** draw(st.integers(-44, 37))
        return (torch.randn(count, generator=generator) * scale).to(dtype)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


@properties
@given(
    x=tensors(),
    blocksize=EVEN_BLOCKSIZES,
    quant_type=st.sampled_from(("nf4", "fp4")),
    dtype=st.sampled_from(DTYPES),
)
def test_4bit_round_trip(isa: str, x: torch.Tensor, blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    packed, absmax = agree("quantize_4bit", x, blocksize, quant_type, torch.uint8)
    agree("dequantize_4bit", packed, absmax, blocksize, quant_type, x.shape, dtype)


@properties
@given(x=tensors(), blocksize=ANY_BLOCKSIZES, size=st.integers(1, 256), dtype=st.sampled_from(DTYPES))
def test_8bit_round_trip(isa: str, x: torch.Tensor, blocksize: int, size: int, dtype: torch.dtype) -> None:
    code = create_dynamic_map()[torch.linspace(0, 255, size).long()]
    codes, absmax = agree("quantize_blockwise", x, code, blocksize)
    agree("dequantize_blockwise", codes, absmax, code, blocksize, dtype)
    every_byte = torch.arange(256, dtype=torch.uint8)
    agree("dequantize_blockwise", every_byte, torch.ones(1), code, 256, dtype)


@properties
@given(x=tensors(), blocksize=EVEN_BLOCKSIZES, nested=st.integers(1, 300), dtype=st.sampled_from(DTYPES))
def test_nested_round_trip(isa: str, x: torch.Tensor, blocksize: int, nested: int, dtype: torch.dtype) -> None:
    packed, absmax = OPS["quantize_4bit"].overload(x, blocksize, "nf4", torch.uint8)
    offset = absmax.mean()
    codes, outer = agree("quantize_blockwise", absmax - offset, create_dynamic_map(), nested)
    statistics = (outer, codes, create_dynamic_map(), offset)
    agree("dequantize_4bit_nested", packed, *statistics, blocksize, "nf4", x.shape, dtype, nested)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_beyond_the_caches(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Large results are written in another way than small ones."""
    x = torch.randn(1100, 2048, generator=generator).to(dtype)
    for blocksize in (64, 4096, 250):
        packed, absmax = agree("quantize_4bit", x, blocksize, "nf4", torch.uint8)
        agree("dequantize_4bit", packed, absmax, blocksize, "nf4", x.shape, dtype)
        codes, absmax = agree("quantize_blockwise", x, create_dynamic_map(), blocksize)
        agree("dequantize_blockwise", codes, absmax, create_dynamic_map(), blocksize, dtype)


STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_storage_dtypes_hold_the_same_bytes(storage: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(32, 64, generator=generator)
    plain, absmax = OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)
    packed, again = OPS["quantize_4bit"].overload(x, 64, "nf4", storage)
    assert packed.dtype == storage
    assert packed.shape == (x.numel() // 2 // storage.itemsize, 1)
    assert torch.equal(packed.view(torch.uint8).reshape(-1), plain.reshape(-1))
    assert torch.equal(absmax, again)
    agree("dequantize_4bit", packed, absmax, 64, "nf4", x.shape, torch.float32)
    agree("dequantize_4bit", packed.t(), absmax, 64, "nf4", x.shape, torch.float32)


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "strided": lambda x: x[:, ::3],
    "reversed": lambda x: x.flip(0)[1:],
    "expanded": lambda x: x[:1].expand(7, -1),
    "offset": lambda x: x.reshape(-1)[1:1025],
    "zero-dim": lambda x: x[0, 0],
    "channels-last": lambda x: x.reshape(2, 4, 4, -1).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(isa: str, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = LAYOUTS[layout](torch.randn(32, 96, generator=generator).to(dtype))
    packed, absmax = agree("quantize_4bit", x, 64, "nf4", torch.uint8)
    agree("dequantize_4bit", packed, absmax, 64, "nf4", x.shape, dtype)
    agree("quantize_blockwise", x, create_dynamic_map(), 100)


def test_strided_codes_and_statistics(generator: torch.Generator) -> None:
    x = torch.randn(64, 64, generator=generator)
    packed, absmax = OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)
    codes, outer = OPS["quantize_blockwise"].overload(x, create_dynamic_map(), 64)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """The same values with a gap after each."""
        return torch.stack((tensor, torch.full_like(tensor, 99)), dim=-1)[..., 0]

    agree("dequantize_4bit", spread(packed), spread(absmax), 64, "nf4", x.shape, torch.float32)
    agree("dequantize_blockwise", spread(codes), spread(outer), spread(create_dynamic_map()), 64, torch.float32)
    statistics = (spread(outer[:1]), spread(codes[0]), spread(create_dynamic_map()), absmax.mean())
    agree("dequantize_4bit_nested", packed, *statistics, 64, "nf4", x.shape, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_keeps_its_storage(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """``out`` may be dense, at an odd offset, or transposed; nothing beside it changes."""
    x = torch.randn(48, 64, generator=generator)
    packed, absmax = OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)
    codes, outer = OPS["quantize_blockwise"].overload(x, create_dynamic_map(), 64)
    calls = {
        "dequantize_4bit": (packed, absmax, 64, "nf4", x.shape, dtype),
        "dequantize_blockwise": (codes, outer, create_dynamic_map(), 64, dtype),
    }
    for op, arguments in calls.items():
        wanted = OPS[op].reference(*arguments)
        memory = torch.full((2 * x.numel() + 9,), 7.0, dtype=dtype)
        views = (
            memory[3:][: x.numel()].view(48, 64),
            memory[1:][: x.numel()].view(64, 48).t(),
            memory[: 2 * x.numel()].view(48, 128)[:, 1::2],
        )
        for out in views:
            memory.fill_(7.0)
            untouched = torch.ones_like(memory, dtype=torch.bool)
            untouched.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
            assert OPS[f"{op}.out"].overload(*arguments, out) is None
            assert same_bits(out, wanted)
            assert bool((memory[untouched] == 7.0).all())


def available_bytes() -> int:
    """Memory that can be taken without swapping; 0 where it cannot be known."""
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(available_bytes() < 14 * 2**30, reason="needs 14 GiB of free memory")
def test_more_elements_than_32_bits_count() -> None:
    """Beyond 2**31 elements the tail has the codes of the same values at the front."""
    boundary, tail = 2**31, 64 * 33 + 7
    piece = torch.randn(tail, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = torch.zeros(boundary + tail, dtype=torch.bfloat16)
    x[boundary:] = piece
    packed, absmax = OPS["quantize_4bit"].overload(x, 64, "nf4", torch.uint8)
    small, small_absmax = OPS["quantize_4bit"].overload(piece, 64, "nf4", torch.uint8)
    assert torch.equal(packed[boundary // 2 :], small)
    assert torch.equal(absmax[boundary // 64 :], small_absmax)
    assert not absmax[: boundary // 64].any()
    expected = OPS["dequantize_4bit"].overload(small, small_absmax, 64, "nf4", (tail,), torch.bfloat16)
    del x
    back = OPS["dequantize_4bit"].overload(packed, absmax, 64, "nf4", (boundary + tail,), torch.bfloat16)
    assert torch.equal(back[boundary:], expected)
    assert not back[: 2**20].any()
    assert not back[boundary - 2**20 : boundary].any()

    # A table of rows of 2048 whose last one begins at element 2**31.
    rows = torch.tensor([2**20, 0, 2**20 - 1])
    table = (packed[: (boundary + 2048) // 2], (2**20 + 1, 2048), absmax[: boundary // 64 + 32])
    found = OPS["embedding_4bit"].overload(rows, *table, 64, "nf4", torch.bfloat16)
    assert torch.equal(found[0], expected[:2048])
    assert not found[1:].any()
    del packed, absmax

    codes, absmax = OPS["quantize_blockwise"].overload(back, create_dynamic_map(), 64)
    del back
    small_codes, small_absmax = OPS["quantize_blockwise"].overload(expected, create_dynamic_map(), 64)
    assert torch.equal(codes[boundary:], small_codes)
    assert torch.equal(absmax[boundary // 64 :], small_absmax)
    back = OPS["dequantize_blockwise"].overload(codes, absmax, create_dynamic_map(), 64, torch.bfloat16)
    again = OPS["dequantize_blockwise"].overload(small_codes, small_absmax, create_dynamic_map(), 64, torch.bfloat16)
    assert torch.equal(back[boundary:], again)
