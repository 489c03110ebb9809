"""Memory in which the kernels of LLM.int8() keep outlier columns, without the host knowing how many there are."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, empty

from bnb_cuda import _C
from bnb_cuda.arguments import address
from bnb_cuda.tuning import pieces

#: Words of 32 bits that begin with the number of outlier columns.
COUNT_WORDS: int = _C.OUTLIER_COUNT_WORDS


class Outliers(NamedTuple):
    """Outlier columns on the device: their list, which has room for all columns, their number, and a bit per column.

    Words that are 0 follow the number, by which the product's kernel hands out work. Lists that callers made have no
    flags.
    """

    columns: Tensor
    number: Tensor
    flags: Tensor | None = None


@cache
def flag_words(rows: int, width: int) -> int:
    """Words of 32 bits for the flags of so many columns, and for finding them in so many rows."""
    return _C.outlier_flag_words(rows, width)


def outlier_buffers(rows: int, width: int, threshold: float, device: torch.device) -> Outliers | None:
    """What quantization of so many rows of this width writes about outlier columns; nothing without a threshold."""
    if threshold <= 0.0:
        return None
    flags = empty(flag_words(rows, width), dtype=torch.int32, device=device)
    columns = empty(width, dtype=torch.int32, device=device)
    # Without a column there is no kernel that would count.
    number = flags.new_zeros(COUNT_WORDS) if width == 0 else flags.new_empty(COUNT_WORDS)
    return Outliers(columns, number, flags)


def listed_outliers(columns: Tensor) -> Outliers:
    """Columns that a caller has listed, in ascending order, all of them."""
    number = columns.new_zeros(COUNT_WORDS)
    number[0] = columns.numel()
    return Outliers(columns, number)


def outlier_addresses(outliers: Outliers | None) -> tuple[int, int, int]:
    """Addresses of flags, list and number."""
    if outliers is None:
        return 0, 0, 0
    return address(outliers.flags), outliers.columns.data_ptr(), outliers.number.data_ptr()


def gathered_buffer(outliers: Outliers | None, rows: int, k: int, out: Tensor) -> tuple[Tensor | None, int]:
    """Memory for outlier columns of so many rows side by side, in the dtype of ``out``, and how many have room there.

    A list without flags has room for all.
    """
    if outliers is None:
        return None, 0
    if outliers.flags is not None:
        room = _C.gathered_room(k)
    else:
        room = max(1, pieces(len(outliers.columns), _C.GATHERED_MULTIPLE)) * _C.GATHERED_MULTIPLE
    return out.new_empty(rows, room), room
