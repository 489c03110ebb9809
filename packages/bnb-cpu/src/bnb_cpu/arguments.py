"""How arguments cross into the native module."""

from __future__ import annotations

import torch

#: Numbers of ``bnb::Dtype``.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: Numbers of ``bnb::QuantType``.
QUANT_TYPES = {"nf4": 0, "fp4": 1}


def address(tensor: torch.Tensor | None) -> int:
    """Address of the data, null for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_number(tensor: torch.Tensor | None) -> int:
    """Number of the dtype; that of an absent tensor is not read."""
    return 0 if tensor is None else DTYPES[tensor.dtype]


def contiguous_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in contiguous memory, or ``None``."""
    return None if tensor is None else tensor.contiguous()


def all_contiguous(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels can read all tensors as they are."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)
