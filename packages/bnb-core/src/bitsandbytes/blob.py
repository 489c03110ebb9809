"""A dictionary as a uint8 tensor, so that a safetensors file, which holds tensors only, can carry it."""

from __future__ import annotations

import json
from typing import Any

import torch

from bitsandbytes.errors import CheckpointError

#: A description of a quantized tensor has a few hundred bytes; a larger one is damaged or hostile.
MAX_BLOB_BYTES = 1 << 20


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> torch.Tensor:
    """Write a dictionary as JSON in UTF-8.

    Args:
        source_dict: keys are strings; values are what JSON can hold.

    Returns:
        The bytes, uint8 of shape ``(length,)``.
    """
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> dict[str, Any]:
    """Read what :func:`pack_dict_to_tensor` wrote.

    Args:
        tensor_data: uint8, any device.

    Raises:
        CheckpointError: the bytes are not a JSON object.
    """
    if tensor_data.dtype != torch.uint8:
        raise CheckpointError(f"packed dictionary has dtype {tensor_data.dtype}, expected torch.uint8")
    if tensor_data.numel() > MAX_BLOB_BYTES:
        raise CheckpointError(f"packed dictionary has {tensor_data.numel()} bytes, at most {MAX_BLOB_BYTES} are read")
    data = bytes(tensor_data.reshape(-1).tolist())
    try:
        unpacked = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"packed dictionary of {len(data)} bytes is not valid JSON: {error}") from error
    if not isinstance(unpacked, dict):
        raise CheckpointError(f"packed dictionary holds a {type(unpacked).__name__}, expected an object")
    return unpacked
