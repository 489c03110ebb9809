"""QuantState: what is needed besides the codes to dequantize a tensor, and its serialised form."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from bitsandbytes.blob import pack_dict_to_tensor, unpack_tensor_to_dict
from bitsandbytes.codebooks import QUANT_TYPES_4BIT
from bitsandbytes.errors import CheckpointError
from bitsandbytes.ops.common import NESTED_BLOCKSIZE, block_count

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class QuantState:
    """Statistics and description of a quantized tensor.

    Attributes:
        absmax: float32 absmax per block, or its uint8 codes with nested statistics.
        shape: shape of the tensor before quantization; ``None`` for 8-bit codes, which keep it.
        code: the codebook, float32: 16 values by code for 4 bit, 256 ascending ones for 8 bit.
        dtype: dtype of the tensor before quantization.
        blocksize: values per block.
        quant_type: ``"nf4"`` or ``"fp4"``; ``None`` for 8-bit codes.
        offset: float32 scalar that was subtracted from absmax before it was quantized.
        state2: state of the quantized absmax.
        nested: whether ``state2`` is present.
    """

    absmax: torch.Tensor
    shape: Any
    dtype: Any
    quant_type: str | None
    nested: bool
    # Which of these are None follows from the kind of state, which a type checker cannot see.
    code: Any
    blocksize: Any
    offset: Any
    state2: Any

    valid_quant_types = QUANT_TYPES_4BIT
    valid_qs_type_keys: ClassVar[list[str]] = [f"bitsandbytes__{name}" for name in ("fp4", "nf4")]
    valid_qs_keys: ClassVar[list[str]] = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: Any = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: QuantState | None = None,
    ):
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __getitem__(self, idx: int) -> Any:
        """Item of the list that stood for a state before this class existed.

        ``[absmax, shape, dtype, blocksize, nested, quant_type]``, where ``nested`` is ``None`` or
        ``[offset, state2]``.
        """
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][idx]

    def __getattr__(self, name: str) -> Any:
        # Sharded saving walks the dotted keys of a state dict, of which the last part may be the
        # description ("weight.quant_state.bitsandbytes__nf4").
        if name.startswith("bitsandbytes__") and name == f"bitsandbytes__{self.__dict__.get('quant_type')}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def nested_arguments(self) -> dict[str, torch.Tensor]:
        """The statistics as the 4-bit ops take them.

        Returns:
            ``absmax``, and for nested statistics also ``absmax_8bit``, ``absmax_code`` and
            ``absmax_offset``.
        """
        if self.state2 is None:
            return {"absmax": self.absmax}
        if self.state2.blocksize != NESTED_BLOCKSIZE:
            return {"absmax": self.plain_absmax()}
        return {
            "absmax": self.state2.absmax,
            "absmax_8bit": self.absmax,
            "absmax_code": self.state2.code,
            "absmax_offset": self.offset,
        }

    def plain_absmax(self) -> torch.Tensor:
        """The float32 absmax per block, with nested statistics decoded."""
        if self.state2 is None:
            return self.absmax
        decoded = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.absmax, self.state2.absmax, self.state2.code, self.state2.blocksize, torch.float32
        )
        return decoded + self.offset

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a dictionary.

        Args:
            packed: keep tensors as they are and put everything else, as JSON, into one uint8 tensor
                under ``quant_state.bitsandbytes__<quant_type>``, as a state dict needs it.
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            state |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code,
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self.offset.item(),
            }
        if not packed:
            return state
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        rest = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        tensors[f"quant_state.bitsandbytes__{self.quant_type}"] = pack_dict_to_tensor(rest)
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """Build a state from :meth:`as_dict`'s result, packed or not, or from part of a state dict.

        Args:
            qs_dict: keys may carry the name of the parameter as a prefix (``weight.absmax``).
            device: where the tensors go.

        Raises:
            CheckpointError: an entry is missing, contradictory or of the wrong kind; nothing in the
                dictionary is executed or trusted as a size of memory.
        """
        entries = _merge_packed(qs_dict)
        quant_type = _entry(entries, "quant_type", str)
        if quant_type not in cls.valid_quant_types:
            raise CheckpointError(f"quant_type is {quant_type!r}, known types: {', '.join(cls.valid_quant_types)}")
        shape = _shape(entries)
        blocksize = _positive(entries, "blocksize")
        absmax = _tensor(entries, "absmax", device)
        blocks = None if shape is None else block_count(math.prod(shape), blocksize)
        if blocks is not None and absmax.numel() != blocks:
            raise CheckpointError(
                f"absmax has {absmax.numel()} values, but a tensor of shape {tuple(shape or ())} has {blocks} blocks "
                f"of {blocksize}"
            )
        offset, state2 = None, None
        if "nested_absmax" in entries:
            offset, state2 = _nested(entries, device, absmax)
        elif absmax.dtype != torch.float32:
            raise CheckpointError(f"absmax has dtype {absmax.dtype} without nested statistics, expected torch.float32")
        code = _tensor(entries, "quant_map", device)
        if code.numel() != 16:
            raise CheckpointError(f"quant_map has {code.numel()} values, a 4-bit table has 16")
        return cls(
            quant_type=quant_type,
            absmax=absmax,
            blocksize=blocksize,
            code=code,
            dtype=_dtype(entries, "dtype"),
            shape=shape,
            offset=offset,
            state2=state2,
        )

    def to(self, device: torch.device | str | int) -> None:
        """Move all tensors to ``device``, in place."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.state2 is not None:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            _equal(self.absmax, other.absmax)
            and _equal(self.code, other.code)
            and _equal(self.offset, other.offset)
            and (None if self.shape is None else tuple(self.shape))
            == (None if other.shape is None else tuple(other.shape))
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and self.state2 == other.state2
        )

    # States are mutable, but they serve as dictionary keys in nobody's code; identity is what a hash
    # can honestly offer, and torch.compile needs one.
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        kind = self.quant_type or "8-bit"
        nested = ", nested" if self.nested else ""
        return f"QuantState({kind}, shape={self.shape}, dtype={self.dtype}, blocksize={self.blocksize}{nested})"


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.device == right.device and left.dtype == right.dtype and torch.equal(left, right)


def _merge_packed(qs_dict: dict[str, Any]) -> dict[str, Any]:
    """Strip prefixes and unpack the description, if there is one."""
    packed = [key for key, value in qs_dict.items() if "quant_state" in key and isinstance(value, torch.Tensor)]
    if not packed and "quant_type" not in qs_dict:
        raise CheckpointError(f"no quant_state entry among {sorted(qs_dict)}; expected one of the form {_FORM}")
    if len(packed) > 1 or (packed and packed[0].rpartition(".")[2] not in QuantState.valid_qs_type_keys):
        raise CheckpointError(f"quant_state entries {sorted(packed)}; expected exactly one of the form {_FORM}")
    entries: dict[str, Any] = {}
    for key, value in qs_dict.items():
        if key not in packed:
            entries[key.rpartition(".")[2]] = value
    unknown = entries.keys() - set(QuantState.valid_qs_keys)
    if unknown:
        raise CheckpointError(f"unknown entries {sorted(unknown)}; known ones: {', '.join(QuantState.valid_qs_keys)}")
    if packed:
        description = unpack_tensor_to_dict(qs_dict[packed[0]])
        overlap = {key for key in description.keys() & entries.keys() if isinstance(entries[key], torch.Tensor)}
        if overlap:
            raise CheckpointError(f"the packed quant_state redefines tensors: {sorted(overlap)}")
        entries |= description
    return entries


_FORM = "'quant_state.bitsandbytes__nf4' or 'quant_state.bitsandbytes__fp4'"


def _entry(entries: dict[str, Any], key: str, kind: type) -> Any:
    if key not in entries:
        raise CheckpointError(f"the quant state has no {key!r}")
    value = entries[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{key} is {value!r} of type {type(value).__name__}, expected {kind.__name__}")
    return value


def _tensor(entries: dict[str, Any], key: str, device: torch.device | str) -> torch.Tensor:
    return _entry(entries, key, torch.Tensor).to(device)


def _positive(entries: dict[str, Any], key: str) -> int:
    value = _entry(entries, key, int)
    if value < 1:
        raise CheckpointError(f"{key} is {value}, expected a positive number")
    return value


def _dtype(entries: dict[str, Any], key: str) -> torch.dtype:
    name = _entry(entries, key, str)
    if name not in _DTYPES:
        raise CheckpointError(f"{key} is {name!r}, known dtypes: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _shape(entries: dict[str, Any]) -> torch.Size | None:
    shape = entries.get("shape")
    if shape is None:
        return None
    if not isinstance(shape, (list, tuple)) or any(type(size) is not int or size < 0 for size in shape):
        raise CheckpointError(f"shape is {shape!r}, expected a list of sizes")
    return torch.Size(shape)


def _nested(
    entries: dict[str, Any], device: torch.device | str, absmax: torch.Tensor
) -> tuple[torch.Tensor, QuantState]:
    if absmax.dtype != torch.uint8:
        raise CheckpointError(f"absmax has dtype {absmax.dtype} with nested statistics, expected torch.uint8")
    offset = entries.get("nested_offset")
    if not isinstance(offset, (int, float)):
        raise CheckpointError(f"nested_offset is {offset!r}, expected a number")
    blocksize = _positive(entries, "nested_blocksize")
    state2 = QuantState(
        absmax=_tensor(entries, "nested_absmax", device),
        blocksize=blocksize,
        code=_tensor(entries, "nested_quant_map", device),
        dtype=_dtype(entries, "nested_dtype"),
    )
    blocks = block_count(absmax.numel(), blocksize)
    if state2.absmax.numel() != blocks:
        raise CheckpointError(
            f"nested_absmax has {state2.absmax.numel()} values, but absmax has {blocks} blocks of {blocksize}"
        )
    return torch.tensor(float(offset), dtype=torch.float32, device=device), state2
