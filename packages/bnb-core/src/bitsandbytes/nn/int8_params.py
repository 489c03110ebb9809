"""The parameter that holds an int8 weight."""

from __future__ import annotations

import copy
from typing import Any

import torch

from bitsandbytes.autograd.int8 import quantize_weight
from bitsandbytes.nn.foreign import can_exchange_data

ATTRIBUTES = ("CB", "SCB", "has_fp16_weights")


class Int8Params(torch.nn.Parameter):
    """A weight that is quantized to int8, row by row, by its first move to a device.

    After the move the data is the int8 codes, which ``CB`` names as well, and ``SCB`` holds the
    float32 absmax of each row. Moves, copies and pickles keep all of it, and never change codes.

    Args:
        data: the weight (float32, float16 or bfloat16), or int8 codes.
        requires_grad: only meaningful for a weight in floating point.
        has_fp16_weights: keep the weight in floating point; nothing is quantized here then.
        CB: int8 codes, if the data is quantized.
        SCB: absmax of the rows, if the data is quantized.
        kwargs: further attributes that others left on a parameter whose ``__dict__`` is replayed;
            they are ignored.
    """

    CB: torch.Tensor | None
    SCB: torch.Tensor | None
    has_fp16_weights: bool

    def __new__(  # noqa: D102  # the class says it
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: torch.Tensor | None = None,
        SCB: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        # A replayed dictionary may carry the codes of another tensor.
        stale = CB is not None and (data.dtype != torch.int8 or CB.device != data.device or CB.shape != data.shape)
        self.CB = None if stale else CB
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        return self

    def _quantize(self, device: Any) -> Int8Params:
        if self.has_fp16_weights:
            return self.to(device)
        codes, absmax = quantize_weight(self.data.to(device))
        self.requires_grad_(False)
        quantized = self
        if can_exchange_data(self, codes):
            self.data = codes
        else:
            quantized = self._with_data(codes)
        quantized.CB, quantized.SCB = quantized.data, absmax
        return quantized

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """Move to a device, quantizing on the first move of a weight in floating point.

        Arguments as those of ``torch.Tensor.to``. A dtype applies to an unquantized weight only.
        """
        device, dtype, non_blocking, _memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if self.dtype == torch.int8:
            if device is None or device == self.device:
                return self
            new = self._with_data(super().to(device=device, non_blocking=non_blocking))
            # The meta device serves to free memory, and a hook that puts the codes back brings SCB along.
            on_meta = device.type == "meta"
            new.CB = None if on_meta else new.data
            new.SCB = None if on_meta or self.SCB is None else self.SCB.to(device, non_blocking=non_blocking)
            return new
        if self.has_fp16_weights or device is None or device.type == "meta" or self.device.type == "meta":
            moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self if moved is self else self._with_data(moved)
        return self._quantize(device)

    def cpu(self) -> Int8Params:  # type: ignore[override]  # codes have no memory format
        """Move to the CPU."""
        return self.to(device="cpu")

    def cuda(  # type: ignore[override]  # codes have no memory format
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> Int8Params:
        """Move to a CUDA device, the current one where not given."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(  # type: ignore[override]  # codes have no memory format
        self, device: int | torch.device | str | None = None, non_blocking: bool = False
    ) -> Int8Params:
        """Move to an XPU device, the current one where not given."""
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)

    def _with_data(self, data: torch.Tensor) -> Int8Params:
        """A parameter like this one around other data."""
        attributes: dict[str, Any] = {name: self.__dict__.get(name) for name in ATTRIBUTES}
        new = type(self)(data.detach(), requires_grad=self.requires_grad, **attributes)
        new.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ATTRIBUTES})
        return new

    def __copy__(self) -> Int8Params:
        return self._with_data(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        if id(self) in memo:
            return memo[id(self)]
        new = self._with_data(self.data.clone())
        memo[id(self)] = new
        new.CB = None if self.CB is None else new.data
        new.SCB = copy.deepcopy(self.SCB, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # torch's own would come back as a plain Parameter.
        return _rebuild, (type(self), self.data, self.requires_grad), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _rebuild(cls: type[Int8Params], data: torch.Tensor, requires_grad: bool) -> Int8Params:
    return cls(data, requires_grad=requires_grad)
