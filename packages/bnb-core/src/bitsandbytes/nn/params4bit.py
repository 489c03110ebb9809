"""The parameter that holds a 4-bit weight."""

from __future__ import annotations

import copy
from typing import Any

import torch

from bitsandbytes.functional import DEFAULT_BLOCKSIZE_4BIT, quantize_4bit
from bitsandbytes.nn.foreign import can_exchange_data
from bitsandbytes.nn.shard4bit import Shard4bit
from bitsandbytes.state import QuantState

#: Names of the attributes, in the order in which they lie in ``__dict__``. Downstream libraries
#: replay that dictionary into the constructor.
ATTRIBUTES = (
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
)

_SPLITTERS: frozenset[Any] = frozenset(
    (torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split, torch.unsafe_chunk, torch.unsafe_split)
)
#: What FSDP2 shards a weight with.
_SHARDING = _SPLITTERS | {torch.Tensor.new_zeros}


class Params4bit(torch.nn.Parameter):
    """A weight that is quantized to 4 bit by its first move to a device.

    Before the move it holds the weight itself; after it the packed codes, with the statistics in
    ``quant_state``. Moves, copies, pickles, chunks and splits keep all of it, and never change
    bytes: a conversion to another dtype leaves packed codes alone, in whatever dtype they are stored.

    Args:
        data: the weight (float32, float16 or bfloat16), or packed codes with ``quant_state``.
        requires_grad: only meaningful before quantization; packed codes have no gradient.
        quant_state: statistics, if the data is packed.
        blocksize: values per block; 64 where not given.
        compress_statistics: whether to quantize the statistics, too (nested statistics).
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are stored as.
        module: the layer that owns the weight; it gets a reference to the state.
        bnb_quantized: whether the data is packed.
        kwargs: further attributes that others left on a parameter whose ``__dict__`` is replayed;
            they are ignored.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any

    def __new__(  # noqa: D102  # the class says it
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: Any = "cuda",
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Build a parameter from packed codes and the entries of a state dict.

        Args:
            data: packed codes.
            quantized_stats: what ``QuantState.as_dict(packed=True)`` gives, prefixed or not.
            requires_grad: must be false unless the storage dtype is a floating point one.
            device: where to put everything; without a GPU the default means the device of ``data``.
            module: the layer that owns the weight.

        Raises:
            CheckpointError: the statistics are damaged or incomplete.
        """
        if device == "cuda" and not torch.cuda.is_available():
            device = data.device
        state = QuantState.from_dict(quantized_stats, device)
        data = data.to(device)
        self = cls(
            data,
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=str(state.quant_type),
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        self._tell_module()
        return self

    def _quantize(self, device: Any) -> Params4bit:
        values = self.data.contiguous().to(device)
        packed, state = quantize_4bit(
            values,
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if not packed.is_floating_point():
            self.requires_grad_(False)
        quantized = self
        if can_exchange_data(self, packed):
            self.data = packed
        else:
            quantized = self._with_data(packed)
        quantized.quant_state = state
        quantized.bnb_quantized = True
        quantized._tell_module()
        return quantized

    def _tell_module(self) -> None:
        # A sharding library may replace the parameter by a plain one; the layer then restores the
        # state from its own reference.
        if self.module is not None:
            self.module.quant_state = self.quant_state

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Move to a device, quantizing on the first move to a real one.

        Arguments as those of ``torch.Tensor.to``. A dtype applies to an unquantized weight only.
        ``quant_state`` moves in place, since layers and copies share it; a move to the meta device,
        which serves to free memory, leaves it where it is.
        """
        device, dtype, non_blocking, _memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta":
                if dtype is not None and self.is_floating_point():
                    self.data = self.data.to(dtype)
                return self._quantize(device)
            return self._with_data(super().to(device=device, dtype=dtype, non_blocking=non_blocking))
        if device is None or device == self.device:
            return self
        if device.type != "meta" and self.quant_state is not None:
            self.quant_state.to(device)
        return self._with_data(super().to(device=device, non_blocking=non_blocking))

    def cpu(self) -> Params4bit:  # type: ignore[override]  # codes have no memory format
        """Move to the CPU."""
        return self.to(device="cpu")

    def cuda(  # type: ignore[override]  # codes have no memory format
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> Params4bit:
        """Move to a CUDA device, the current one where not given."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(  # type: ignore[override]  # codes have no memory format
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> Params4bit:
        """Move to an XPU device, the current one where not given."""
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)

    def type(self, *args: Any, **kwargs: Any) -> Any:
        """As ``torch.Tensor.type``; packed codes keep their dtype."""
        return self if self.bnb_quantized and (args or kwargs) else super().type(*args, **kwargs)

    def float(self) -> torch.Tensor:
        """As ``torch.Tensor.float``; packed codes keep their dtype."""
        return self if self.bnb_quantized else super().float()

    def half(self) -> torch.Tensor:
        """As ``torch.Tensor.half``; packed codes keep their dtype."""
        return self if self.bnb_quantized else super().half()

    def bfloat16(self) -> torch.Tensor:
        """As ``torch.Tensor.bfloat16``; packed codes keep their dtype."""
        return self if self.bnb_quantized else super().bfloat16()

    def double(self) -> torch.Tensor:
        """As ``torch.Tensor.double``; packed codes keep their dtype."""
        return self if self.bnb_quantized else super().double()

    def _with_data(self, data: torch.Tensor) -> Params4bit:
        """A parameter like this one around other data, sharing the state."""
        attributes: dict[str, Any] = {name: self.__dict__.get(name) for name in ATTRIBUTES}
        new = type(self)(data.detach(), requires_grad=self.requires_grad, **attributes)
        new.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ATTRIBUTES})
        return new

    def __copy__(self) -> Params4bit:
        return self._with_data(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) in memo:
            return memo[id(self)]
        new = self._with_data(self.data.clone())
        memo[id(self)] = new
        # The layer is copied by whoever copies the layer; a parameter alone keeps pointing to it.
        new.module = memo.get(id(self.module), self.module)
        new.quant_state = copy.deepcopy(self.quant_state, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # torch's own would come back as a plain Parameter.
        return _rebuild, (type(self), self.data, self.requires_grad), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in _SHARDING and args and isinstance(args[0], Params4bit):
            return args[0]._sharded(func, result)
        return result

    def _sharded(self, func: Any, result: Any) -> Any:
        """What FSDP2 is to get from one of :data:`_SHARDING`, which gave ``result``."""
        if func in _SPLITTERS:
            return tuple(self._with_data(piece) for piece in result)
        # The memory for the piece of this process.
        if self.bnb_quantized and self.dtype.is_floating_point and result.dtype == self.dtype:
            return Shard4bit.of(result)
        return result


def _rebuild(cls: type[Params4bit], data: torch.Tensor, requires_grad: bool) -> Params4bit:
    return cls(data, requires_grad=requires_grad)


def _state_attribute(name: str, read: Any) -> property:
    """A property that reads from the quant state and does not exist without one.

    Sharded saving resolves the dotted keys of a state dict (``weight.absmax``) by attribute access.
    """

    def get(self: Params4bit) -> Any:
        state = self.__dict__.get("quant_state")
        if state is None or ((name.startswith("nested_") or name in ("offset", "state2")) and state.state2 is None):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return read(state)

    return property(get, doc=f"``{name}`` of the quant state.")


for _name, _read in {
    "absmax": lambda state: state.absmax,
    "code": lambda state: state.code,
    "quant_map": lambda state: state.code,
    "offset": lambda state: state.offset,
    "state2": lambda state: state.state2,
    "nested_absmax": lambda state: state.state2.absmax,
    "nested_blocksize": lambda state: state.state2.blocksize,
    "nested_quant_map": lambda state: state.state2.code,
    "nested_dtype": lambda state: state.state2.dtype,
    "nested_offset": lambda state: state.offset,
}.items():
    setattr(Params4bit, _name, _state_attribute(_name, _read))
