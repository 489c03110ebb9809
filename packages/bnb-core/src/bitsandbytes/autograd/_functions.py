"""Facade for the historical import path of the autograd functions."""

from bitsandbytes.autograd.fourbit import MatMul4Bit, matmul_4bit
from bitsandbytes.autograd.int8 import MatMul8bitFp, MatMul8bitLt, matmul
from bitsandbytes.autograd.lt_state import GlobalOutlierPooler, MatmulLtState

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]
