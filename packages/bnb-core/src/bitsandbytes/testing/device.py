"""The device under test, and how the checks look at arguments and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from bitsandbytes.contract import OPS
from bitsandbytes.testing.case import Case


class DeviceUnderTest:
    """Moves arguments to one device and calls ops there."""

    #: Device to run on, as ``torch.device`` takes it.
    device: ClassVar[str] = "cpu"

    def to_device(self, value: Any, device: str | None = None) -> Any:
        """Move a tensor, or each of a list, keeping strides; other values stay.

        The device is the one under test where not given.
        """
        device = self.device if device is None else device
        if isinstance(value, (list, tuple)):
            return [self.to_device(item, device) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_contiguous() or value.numel() == 0:
            return value.to(device)
        # Rebuild the same view over a copied storage, since .to() may make a tensor contiguous.
        base = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return base.to(device).as_strided(value.shape, value.stride(), value.storage_offset())

    def arguments(self, case: Case) -> list[Any]:
        """The arguments of a case on the device."""
        return [self.to_device(argument) for argument in case.arguments()]

    def call(self, case: Case) -> tuple[Any, ...]:
        """Run the op of a case on the device; results, and what it wrote in place, as a tuple."""
        arguments = self.arguments(case)
        results = as_tuple(OPS[case.op].overload(*arguments))
        return (*results, *written_tensors(case.op, arguments))


def as_tuple(results: Any) -> tuple[Any, ...]:
    """Results of an op as a tuple."""
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def written_arguments(op: str) -> list[int]:
    """Positions of the arguments that the schema of an op marks as written."""
    arguments = OPS[op].overload._schema.arguments
    return [place for place, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]


def written_tensors(op: str, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among arguments that the schema of an op marks as written."""
    return flat_tensors([arguments[place] for place in written_arguments(op)])


def read_only_tensors(op: str, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among arguments that the schema of an op does not mark as written."""
    written = written_arguments(op)
    return flat_tensors([value for place, value in enumerate(arguments) if place not in written])


def flat_tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among arguments, those in lists included."""
    flat: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            flat.append(argument)
        elif isinstance(argument, (list, tuple)):
            flat.extend(flat_tensors(argument))
    return flat


def on_cpu(argument: Any) -> Any:
    """An argument with its tensors moved to the CPU."""
    if isinstance(argument, (list, tuple)):
        return [on_cpu(item) for item in argument]
    return argument.detach().cpu() if isinstance(argument, torch.Tensor) else argument
