"""Calls that are prepared once and then made without torch's dispatcher: what both sides need for it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

#: torch's table of C functions that describe a tensor; torch before 2.10 has none.
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)

#: Types whose tensors lie where they say.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

#: Answers of a native ``read_tensors``, as ``bnb/tensors.h`` numbers them.
OTHER, SAME_ADDRESSES, NEW_ADDRESSES = range(3)


def is_intercepted() -> bool:
    """Whether something looks on at calls of ops: a mode, a transform, a trace or the profiler."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


class BoundStep(Protocol):
    """Optimizer steps of the same parameters, again and again; see :attr:`Kernel.bind`."""

    def prepare(self, gradients: list[torch.Tensor]) -> bool:
        """Look up where all tensors lie now, for a :meth:`run` that follows at once.

        Returns:
            ``False`` where this step has to be left to the op: a parameter, gradient or state is not of
            the type, dtype, device, number of elements or contiguity that it had, or the device is busy
            with something that a prepared step would disturb. It has changed nothing then.
        """

    def run(
        self,
        step: Sequence[int],
        lr: float,
        beta1: float,
        beta2: float,
        beta3: float,
        alpha: float,
        eps: float,
        weight_decay: float,
        gnorm_scale: float,
        max_unorm: float,
        skip_zeros: bool,
        rounding_seed: Sequence[int],
        schedule: torch.Tensor | None,
    ) -> None:
        """Make the step; arguments as those of the op, which the core has checked."""


class TensorTable:
    """Addresses of all tensors of a step of many parameters, kept up to date by a native reader.

    A backend builds its :class:`BoundStep` on it. The reader is ``bnb::read_tensors`` of ``bnb/tensors.h``, which
    ``bnb/bind_tensors.h`` puts into the backend's module. No gradient and no state is kept alive.

    Args:
        read: the reader, with the arguments of ``bnb::read_tensors``.
        params: the parameters.
        states: for each parameter a dict with its states.
        keys: keys of ``states`` whose tensors have columns; ``None`` for a column of zeros.
        shared: keys of ``states`` that must hold one object for all parameters.
        leading, trailing: numbers of further columns before and after those of tensors.
        gradients_first: the column of gradients comes before that of parameters, else after it.
    """

    def __init__(
        self,
        read: Callable[..., int],
        params: list[torch.Tensor],
        states: list[dict[str, Any]],
        keys: tuple[str | None, ...],
        shared: tuple[str, ...],
        leading: int = 0,
        trailing: int = 0,
        gradients_first: bool = False,
    ):
        self.count = len(params)
        self.states = states
        self._read, self._params, self._keys, self._shared = read, params, keys, shared
        self._gradients_first = gradients_first
        columns = 2 + len(keys)
        #: All columns one after the other.
        self.numbers = array("q", bytes(8 * self.count * (leading + columns + trailing)))
        self._kinds = array("q", bytes(16 * self.count * columns))
        self._kinds_start = self._kinds.buffer_info()[0]
        self._tensors_start = self.column(leading)

    def column(self, index: int) -> int:
        """Address of a column."""
        return self.numbers.buffer_info()[0] + 8 * self.count * index

    def elements(self) -> array[int]:
        """Number of elements of each parameter, as they were recorded."""
        return self._kinds[: 2 * self.count : 2]

    def record(self, gradients: list[torch.Tensor]) -> bool:
        """Read all tensors and remember what they are; ``False`` where one cannot be read."""
        return EXCHANGE is not None and self._call(gradients, True) != OTHER

    def refresh(self, gradients: list[torch.Tensor]) -> int:
        """Read all tensors; :data:`OTHER` where one is not as it was recorded, or whether an address is new."""
        return self._call(gradients, False)

    def _call(self, gradients: list[torch.Tensor], record: bool) -> int:
        lists = (gradients, self._params) if self._gradients_first else (self._params, gradients)
        return self._read(
            EXCHANGE,
            PLAIN_TYPES,
            lists,
            self.states,
            self._keys,
            self._shared,
            self.count,
            record,
            self._kinds_start,
            self._tensors_start,
        )
