"""All cases of all ops."""

from __future__ import annotations

import itertools

from bitsandbytes.testing import matmul_cases, optim_cases, quant_cases
from bitsandbytes.testing.case import Case


def all_cases() -> list[Case]:
    """Every case of every op."""
    return list(
        itertools.chain(
            quant_cases.quantize_4bit_cases(),
            quant_cases.dequantize_4bit_cases(),
            quant_cases.blockwise_cases(),
            quant_cases.int8_quant_cases(),
            matmul_cases.fourbit_matmul_cases(),
            matmul_cases.fourbit_block_cases(),
            matmul_cases.int8_matmul_cases(),
            optim_cases.update_cases(),
            optim_cases.step_cases(),
        )
    )
