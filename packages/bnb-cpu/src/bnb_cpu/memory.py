"""Allocation of results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bnb_cpu.native import _C

#: From this many bytes on, huge pages under a new result pay (see ``kernels/memory.h``): below, the
#: allocator mostly hands out memory that is in use already.
LARGE_RESULT = 4 << 20


def empty_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A new tensor that a kernel is about to fill.

    Args:
        shape: its shape.
        dtype: its dtype.
        device: a CPU device; given because torch's default device may be another one.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.nbytes >= LARGE_RESULT:
        _C.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
