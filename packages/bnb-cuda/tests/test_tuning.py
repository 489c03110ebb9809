"""The choice of kernels by size, which needs no GPU."""

from __future__ import annotations

import pytest
import torch

from bnb_cuda.tuning import (
    MOST_SPLIT,
    Int8Path,
    Path,
    fits_matrix_units,
    plan_gemm_4bit,
    plan_int8,
    split_of,
)

HOPPER, AMPERE, TURING = 90, 80, 75
#: The number of float16 in the native module.
HALF = 1
PROCESSORS = 132


def plan(rows: int, n: int = 4096, k: int = 4096, blocksize: int = 64, dtype=torch.bfloat16, capability=HOPPER):
    return plan_gemm_4bit(rows, n, k, blocksize, dtype, capability, PROCESSORS)


@pytest.mark.parametrize(
    ("capability", "path"), [(HOPPER, Path.STREAM), (AMPERE, Path.FEW), (100, Path.STREAM), (120, Path.FEW)]
)
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_few_rows(rows, capability, path):
    assert plan(rows, capability=capability).path is path


def test_the_copy_engine_brings_whole_rows_of_boxes():
    assert plan(1, k=4352).path is Path.STREAM
    assert plan(1, k=4352 + 64).path is Path.FEW
    assert plan(1, k=128, capability=100).path is Path.FEW


def test_more_rows_never_dequantize_early():
    assert plan(32).path in (Path.GROUPS, Path.TILES)
    assert plan(64).path in (Path.GROUPS, Path.TILES)
    assert plan(64, capability=AMPERE).path is Path.TILES
    assert plan(8192).path is Path.DEQUANTIZE


@pytest.mark.parametrize(
    ("rows", "n", "k", "path"),
    [
        (192, 14336, 4096, Path.WIDE),
        (256, 14336, 4096, Path.WIDE),
        (256, 4096, 4096, Path.GROUPS),
        (256, 6144, 4096, Path.GROUPS),
        (512, 14336, 4096, Path.WIDE),
        (1024, 14336, 4096, Path.WIDE),
        (1024, 28672, 8192, Path.WIDE),
        (1024, 4096, 14336, Path.WIDE),
        (2048, 28672, 8192, Path.DEQUANTIZE),
    ],
)
def test_many_rows_as_measured(rows, n, k, path):
    assert plan(rows, n, k).path is path
    assert plan(rows, n, k, capability=AMPERE).path is not Path.WIDE
    assert plan(rows, n, k, blocksize=32).path is not Path.WIDE


def test_groups_need_their_architecture_and_blocks():
    for rows in range(1, 600):
        assert plan(rows, capability=AMPERE).path is not Path.GROUPS
        assert plan(rows, blocksize=32).path is not Path.GROUPS
        assert plan(rows, capability=120).path is not Path.GROUPS


@pytest.mark.parametrize(
    ("n", "k", "blocksize", "dtype", "capability"),
    [
        (64, 64, 64, torch.float32, HOPPER),
        (64, 64, 64, torch.bfloat16, TURING),
        (64, 63, 64, torch.bfloat16, HOPPER),
        (64, 96, 64, torch.bfloat16, HOPPER),
        (64, 48, 32, torch.bfloat16, HOPPER),
        (0, 64, 64, torch.bfloat16, HOPPER),
        (64, 0, 64, torch.bfloat16, HOPPER),
        (64, 192, 96, torch.bfloat16, HOPPER),
    ],
)
def test_what_matrix_units_cannot_take(n, k, blocksize, dtype, capability):
    assert not fits_matrix_units(n, k, blocksize, dtype, capability)
    assert plan(1, n, k, blocksize, dtype, capability).path is Path.SCALAR
    assert plan(64, n, k, blocksize, dtype, capability).path is Path.DEQUANTIZE


def test_split_fills_the_device_and_keeps_work_for_each():
    assert split_of(64, 14336, 4096, HOPPER, PROCESSORS) == 1
    assert split_of(64, 4096, 4096, HOPPER, PROCESSORS) > 1
    assert split_of(64, 4096, 4096, AMPERE, PROCESSORS) == 1
    for n in (64, 128, 1024, 4096, 28672):
        for k in (64, 512, 4096, 14336):
            split = split_of(32, n, k, HOPPER, PROCESSORS)
            assert 1 <= split <= MOST_SPLIT
            assert split == 1 or -(-n // 128) * split <= PROCESSORS
            assert split == 1 or k // 128 // split >= 1


def test_int8_paths():
    half, full = torch.float16, torch.float32
    assert plan_int8(1, 4096, half, True, 90, False) is Int8Path.FEW
    assert plan_int8(8, 4096, half, True, 90, False) is Int8Path.FEW
    assert plan_int8(9, 4096, half, True, 90, False) is Int8Path.GROUPS
    assert plan_int8(1, 4096, half, True, 90, True) is Int8Path.GROUPS
    assert plan_int8(4096, 4099, torch.bfloat16, True, 90, False) is Int8Path.GROUPS
    for outliers in (False, True):
        assert plan_int8(16, 4096, full, True, 90, outliers) is Int8Path.FEW
        assert plan_int8(17, 4096, full, True, 90, outliers) is Int8Path.LIBRARY
        assert plan_int8(16, 4096, half, True, 80, outliers) is Int8Path.FEW
        assert plan_int8(17, 4096, half, True, 80, outliers) is Int8Path.LIBRARY
        assert plan_int8(17, 4099, half, True, 80, outliers) is Int8Path.TILES
        assert plan_int8(4096, 4099, half, True, 80, outliers) is Int8Path.LIBRARY
        assert plan_int8(1, 4096, half, False, 90, outliers) is Int8Path.LIBRARY


def test_the_module_counts_alike():
    native = pytest.importorskip("bnb_cuda._C", reason="the native module bnb_cuda._C is not built")
    assert native.MOST_SPLIT == MOST_SPLIT
    assert all(native.gathered_room(k) % native.GATHERED_MULTIPLE == 0 for k in range(16, 20000, 16))


@pytest.mark.parametrize(
    ("sizes", "capability", "fits"),
    [
        ((1, 1, 16), 80, True),
        ((2, 14336, 4096), 80, True),
        ((1, 14336, 4096), 75, False),
        ((3, 14336, 4096), 90, False),
        ((0, 14336, 4096), 90, False),
        ((1, 0, 4096), 90, False),
        ((1, 64, 4104), 90, False),
        ((1, 64, 16400), 90, False),
        ((1, 2**30, 16), 90, True),
        ((1, 2**30 + 1, 16), 90, False),
        ((2, 64, 16384), 90, True),
        # Devices with less shared memory.
        ((1, 64, 14336), 89, False),
        ((1, 64, 8192), 89, True),
    ],
)
def test_rows_that_one_kernel_quantizes_and_multiplies(sizes, capability, fits):
    native = pytest.importorskip("bnb_cuda._C", reason="the native module bnb_cuda._C is not built")
    assert native.int8_gemv_fits(*sizes, HALF, capability) is fits
