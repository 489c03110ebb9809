"""The interleaved weight layout that bitsandbytes 0.50 used for inference on some CPUs.

Nothing here uses it: our kernels read the portable layout. The conversion stays for checkpoints and
callers that hold a weight in that form, and because its inverse is the way out of it.

Layout of a weight ``(N, K)`` with ``N`` a multiple of ``block_n``: tiles of ``block_n`` rows; in a
tile, for each pair of columns, ``block_n`` bytes; byte ``2 * r + c`` of these holds column ``c`` of
the pair for row ``r`` in its low nibble and for row ``r + block_n / 2`` in its high nibble. absmax is
transposed to ``(K / blocksize, N)`` and rounded to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.errors import ArgumentError
from bitsandbytes.state import QuantState


def _convert_weight_packed_for_cpu(
    qweight: torch.Tensor, quant_state: Any, block_n: int = 32
) -> tuple[torch.Tensor, QuantState]:
    """Interleave a packed weight.

    Args:
        qweight: portable packed codes of the weight ``quant_state.shape``.
        quant_state: its state; changed in place: statistics are transposed and no longer nested, the
            dtype becomes bfloat16, and the ``original_*`` attributes remember what was.
        block_n: rows of a tile.

    Returns:
        ``(interleaved, quant_state)``: uint8 of shape ``(N, K / 2)``.
    """
    rows, columns = quant_state.shape
    if rows % block_n or columns % 2 or columns % quant_state.blocksize or block_n % 2:
        raise ArgumentError(
            f"a weight of shape {(rows, columns)} with blocksize {quant_state.blocksize} does not fit tiles of "
            f"{block_n} rows; rows must be a multiple of it and columns of the blocksize"
        )
    data = qweight.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack((data >> 4, data & 0xF), dim=1).reshape(rows // block_n, 2, block_n // 2, columns // 2, 2)
    low, high = codes.permute(1, 0, 3, 2, 4)
    interleaved = (high << 4 | low).reshape(rows, columns // 2)
    quant_state.original_dtype = quant_state.dtype
    quant_state.original_nested = quant_state.nested
    quant_state.original_qshape = qweight.shape
    quant_state.original_storage = qweight.dtype
    stats = quant_state.plain_absmax()
    # bfloat16 statistics are not enough to go back; the exact ones stay beside them.
    quant_state.original_absmax = quant_state.absmax, quant_state.offset, quant_state.state2
    quant_state.absmax = stats.reshape(rows, columns // quant_state.blocksize).t().to(torch.bfloat16).contiguous()
    quant_state.nested, quant_state.state2, quant_state.offset = False, None, None
    quant_state.dtype = torch.bfloat16
    quant_state.packing_format_for_cpu = True
    return interleaved, quant_state


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: torch.Tensor, quant_state: Any, block_n: int = 32
) -> tuple[torch.Tensor, QuantState]:
    """Undo :func:`_convert_weight_packed_for_cpu`, exactly.

    Returns:
        ``(qweight, quant_state)`` as they were before the conversion.
    """
    if not getattr(quant_state, "packing_format_for_cpu", False):
        raise ArgumentError("the quant state does not describe a weight in the interleaved CPU layout")
    rows, columns = quant_state.shape
    data = packed_weight.reshape(rows // block_n, columns // 2, block_n // 2, 2)
    codes = torch.stack((data & 0xF, data >> 4), dim=1).permute(0, 1, 3, 2, 4).reshape(-1, 2)
    qweight = (codes[:, 0] << 4 | codes[:, 1]).view(quant_state.original_storage)
    qweight = qweight.reshape(quant_state.original_qshape)
    quant_state.absmax, quant_state.offset, quant_state.state2 = quant_state.original_absmax
    quant_state.nested = quant_state.original_nested
    quant_state.dtype = quant_state.original_dtype
    quant_state.packing_format_for_cpu = False
    for name in ("original_absmax", "original_storage", "original_nested", "original_dtype", "original_qshape"):
        delattr(quant_state, name)
    return qweight, quant_state


def has_avx512bf16() -> bool:
    """Whether this processor has the AVX-512 BF16 instructions."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return bool(capabilities().get("avx512_bf16", False))
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return "avx512_bf16" in cpuinfo.read()
    except OSError:
        return False
