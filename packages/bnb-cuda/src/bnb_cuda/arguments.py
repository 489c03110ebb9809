"""How arguments cross into the native module."""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers of ``bnb::Dtype``.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: Numbers of ``bnb::QuantType``.
QUANT_TYPES = {"nf4": 0, "fp4": 1}

#: Kernels read and write vectors of this many bytes.
ALIGNMENT = 16

stream_of = torch._C._cuda_getCurrentRawStream


def address(tensor: Tensor | None) -> int:
    """Address of the data, null for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_number(tensor: Tensor | None) -> int:
    """Number of the dtype; that of an absent tensor is not read."""
    return 0 if tensor is None else DTYPES[tensor.dtype]


def plain(tensor: Tensor) -> Tensor:
    """The tensor in contiguous memory that begins at a whole vector."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def plain_or_none(tensor: Tensor | None) -> Tensor | None:
    """:func:`plain` for a tensor that may be absent."""
    return None if tensor is None else plain(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel can write into the tensor as it is."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def rows_of(A: Tensor) -> int:
    """Number of rows of a tensor seen as a matrix over its last dimension."""
    width = A.shape[-1]
    return A.numel() // width if width else A.shape[:-1].numel()


def all_plain(*tensors: Tensor | None) -> bool:
    """Whether kernels can read all tensors as they are."""
    return all(tensor is None or is_plain(tensor) for tensor in tensors)
