"""The ops. Importing this package defines every op with torch, with its reference implementation."""

from bitsandbytes.ops import blockwise, fourbit, fourbit_matmul, int8, int8_matmul, optim, optim_multi

__all__ = ["blockwise", "fourbit", "fourbit_matmul", "int8", "int8_matmul", "optim", "optim_multi"]
