"""Which kernel serves which sizes: measured thresholds, and pure functions that read them."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch


class Path(Enum):
    """How a product with a 4-bit weight is computed. The values are those of the native module."""

    #: Plain float32 arithmetic.
    SCALAR = 0
    #: The warps of a thread block share rows of the weight and split its columns.
    FEW = 1
    #: Tiles of the result, activations in shared memory.
    TILES = 2
    #: The weight is dequantized and multiplied by the library.
    DEQUANTIZE = 3
    #: As tiles, with the matrix units of compute capability 9.0.
    GROUPS = 4
    #: As few rows, with the bulk copies and the shared memory of compute capabilities 9.0 to 10.x.
    STREAM = 5
    #: As groups, with tiles of 256 rows of activations, for which the weight is decoded once.
    WIDE = 6


class Plan(NamedTuple):
    """A path and, for tiles, the thread blocks that share the columns of the weight."""

    path: Path
    split: int = 1


#: Rows of activations up to which each path wins (H100; tiles against dequantizing).
MOST_ROWS_FEW = 16
MOST_ROWS_TILES = 192
MOST_ROWS_GROUPS = 256
#: Columns that the copy engine brings at least.
STREAM_MULTIPLE = 256
#: From here on the estimates below choose among groups, wide tiles and dequantizing (compute capability 9.0).
LEAST_ROWS_ESTIMATED = 129
#: With more rows the library's product is so much better that dequantizing always pays.
MOST_ROWS_WIDE = 1024
#: Rows up to which plain arithmetic beats dequantizing, for float32.
MOST_ROWS_SCALAR = 4

#: Weight rows and columns of one tile, rows of activations of the widest, and the widest cluster.
TILE_ROWS = 128
TILE_TOKENS = 64
TILE_TOKENS_GROUPS = 128
TILE_TOKENS_WIDE = 256
TILE_STEP = 128
MOST_SPLIT = 8


def fits_matrix_units(n: int, k: int, blocksize: int, dtype: torch.dtype, capability: int) -> bool:
    """Whether the fused kernels take these sizes; the native module's ``gemm_4bit_fits`` says the same."""
    return (
        capability >= 80
        and dtype in (torch.float16, torch.bfloat16)
        and 0 < n < 2**31
        and 0 < k < 2**31
        and blocksize >= 32
        and blocksize & (blocksize - 1) == 0
        and k % min(blocksize, 64) == 0
    )


def has_large_shared_memory(capability: int) -> bool:
    """Whether a thread block may have 227 KB of shared memory and fill it with bulk copies; 12.0 has 99 KB."""
    return 90 <= capability < 120


def plan_gemm_4bit(
    rows: int, n: int, k: int, blocksize: int, dtype: torch.dtype, capability: int, processors: int
) -> Plan:
    """How to multiply ``rows`` rows by a 4-bit weight of shape ``(n, k)``."""
    if not fits_matrix_units(n, k, blocksize, dtype, capability):
        return Plan(Path.SCALAR if rows <= MOST_ROWS_SCALAR else Path.DEQUANTIZE)
    if rows <= MOST_ROWS_FEW:
        streams = has_large_shared_memory(capability) and k % STREAM_MULTIPLE == 0
        return Plan(Path.STREAM if streams else Path.FEW)
    if capability == 90 and blocksize >= 64:
        split = split_of(rows, n, k, capability, processors)
        if rows < LEAST_ROWS_ESTIMATED:
            return Plan(Path.GROUPS, split)
        times = estimated_times(rows, n, k, split, processors)
        path = min(times, key=times.__getitem__)
        return Plan(path, split if path is Path.GROUPS else 1)
    if rows <= MOST_ROWS_TILES:
        return Plan(Path.TILES, split_of(rows, n, k, capability, processors))
    return Plan(Path.DEQUANTIZE)


def pieces(total: int, size: int) -> int:
    """How many pieces of this size ``total`` makes, the last one smaller perhaps."""
    return -(-total // size)


#: Microseconds that a tile takes for its 64 (wide) or 128 (groups) columns of a stage, that pass before and after,
#: and that a cluster takes to sum; bytes and operations per microsecond of the library's way.
WIDE_STAGE, GROUPS_STAGE, START, CLUSTER_SUM = 0.86, 1.15, 5.0, 3.0
#: What half a wide tile takes of the time of a whole one.
WIDE_HALF = 0.7
LIBRARY_BYTES, LIBRARY_OPERATIONS = 2.9e6, 0.72e9


def estimated_times(rows: int, n: int, k: int, split: int, processors: int) -> dict[Path, float]:
    """Microseconds of the ways to multiply many rows, fitted to measurements on an H100.

    Tiles come in rounds over the multiprocessors, each as long as a full one; wide tiles that fill no more than half
    of the last round are halved. The library's way writes the dequantized weight and reads it again.
    """
    wide_tiles = pieces(n, 2 * TILE_ROWS) * pieces(rows, TILE_TOKENS_WIDE)
    rounds, rest = divmod(wide_tiles, processors // 2)
    last_round = 0.0 if rest == 0 else WIDE_HALF if 2 * rest <= processors // 2 else 1.0
    wide_stages = (rounds + last_round) * pieces(k, TILE_STEP // 2)
    tiles = pieces(n, TILE_ROWS) * pieces(rows, TILE_TOKENS_GROUPS)
    stages = pieces(tiles * split, processors) * pieces(k, TILE_STEP * split)
    moving, multiplying = 2 * n * k / LIBRARY_BYTES, 2 * rows * n * k / LIBRARY_OPERATIONS
    times = {Path.DEQUANTIZE: START + n * k * 2.56 / LIBRARY_BYTES + max(moving, multiplying)}
    if rows <= MOST_ROWS_WIDE:
        times[Path.WIDE] = START + wide_stages * WIDE_STAGE
    if rows <= MOST_ROWS_GROUPS:
        times[Path.GROUPS] = START + stages * GROUPS_STAGE + (CLUSTER_SUM if split > 1 else 0.0)
    return times


def split_of(rows: int, n: int, k: int, capability: int, processors: int) -> int:
    """Thread blocks that share the columns of a tile, so that all multiprocessors have work."""
    if capability < 90:
        return 1
    widest = TILE_TOKENS_GROUPS if capability == 90 else TILE_TOKENS
    tiles = pieces(n, TILE_ROWS) * pieces(rows, widest)
    split = 1
    for more in range(2, MOST_SPLIT + 1):
        # The multiprocessors of a cluster are neighbours: wide clusters do not find room on all of them.
        room = processors if more == 2 else processors * 0.75
        # Each share keeps some steps, or the sum over the cluster would cost more than it saves.
        if tiles * more <= room and k // (TILE_STEP * more) >= 4:
            split = more
    return split


#: Rows up to which the int8 kernel for few rows wins over those with tiles; and, without outliers, over the one of
#: compute capability 9.0 (H200), which wins with outliers throughout.
MOST_ROWS_INT8_FEW, MOST_ROWS_INT8_FEW_GROUPS = 16, 8
#: Rows up to which quantizing them in each thread block of the product wins (H200).
MOST_ROWS_INT8_GEMV = 2
#: The library wants sizes in multiples of this; up to so many rows the tiles serve other sizes, for which a
#: padded copy of the weight would have to be made at each call.
LIBRARY_MULTIPLE = 8
MOST_ROWS_INT8_TILES = 512


class Int8Path(Enum):
    """How a product of int8 matrices is computed. The values are those of the native module."""

    #: The library's integer product, then scales, outliers and bias.
    LIBRARY = 0
    #: All in one kernel, for few rows.
    FEW = 1
    #: All in one kernel, tiles of the result.
    TILES = 2
    #: As tiles, with the matrix units of compute capability 9.0; 16-bit results.
    GROUPS = 3
    #: All in one kernel from activations that are not quantized, for very few rows.
    GEMV = 4


def plan_int8(rows: int, n: int, dtype: torch.dtype, fits: bool, capability: int, outliers: bool) -> Int8Path:
    """How to multiply ``rows`` rows by an int8 weight of ``n`` rows.

    ``fits``: whether the kernels take the sizes; ``outliers``: whether some columns may be outliers.
    """
    if fits and capability == 90 and dtype in (torch.float16, torch.bfloat16):
        return Int8Path.GROUPS if outliers or rows > MOST_ROWS_INT8_FEW_GROUPS else Int8Path.FEW
    if fits and rows <= MOST_ROWS_INT8_FEW:
        return Int8Path.FEW
    if fits and rows <= MOST_ROWS_INT8_TILES and n % LIBRARY_MULTIPLE:
        return Int8Path.TILES
    return Int8Path.LIBRARY
