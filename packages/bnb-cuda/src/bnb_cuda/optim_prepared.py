"""Optimizer steps that are prepared once for the same parameters, and the list of the optimizer kernels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitsandbytes.backends.bound import OTHER, SAME_ADDRESSES, TensorTable
from bitsandbytes.backends.description import Kernel
from bitsandbytes.ops.optim_rules import RULES
from bnb_cuda import _C
from bnb_cuda.arguments import stream_of
from bnb_cuda.optim import (
    KNOWN_RULES,
    MASK32,
    has_no_limit,
    launch,
    optimizer_step_8bit,
    optimizer_step_32bit,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
)


class PreparedStep:
    """Steps of the same parameters: their table goes up again only when an address, a seed or the stream is new."""

    def __init__(self, optimizer_name: str, p: list[Tensor], table: TensorTable):
        self._name, self._params, self._table = optimizer_name, p, table
        count = table.count
        table.numbers[6 * count : 7 * count] = table.elements()
        table.numbers[8 * count :] = array("q", (-1,)) * count
        self._units = _C.optimizer_units(table.column(6), table.column(7), count)
        self._host = torch.frombuffer(table.numbers, dtype=torch.int64)
        self._on_device: Tensor | None = None
        self._stream = 0
        self._seeds: list[int] = []

    def prepare(self, gradients: list[Tensor]) -> bool:
        """See :class:`bitsandbytes.backends.bound.BoundStep`; a step that is captured is left to the op."""
        device = self._params[0].device.index
        if device is None or _C.is_capturing(device, stream_of(device)):
            return False
        reading = self._table.refresh(gradients)
        if reading != SAME_ADDRESSES:
            self._on_device = None
        return reading != OTHER

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
        schedule: Tensor | None,
    ) -> None:
        """See :class:`bitsandbytes.backends.bound.BoundStep`."""
        example, state, count = self._params[0], self._table.states[0], self._table.count
        seeds = list(rounding_seed)
        if seeds != self._seeds:
            column = array("q", [seed & MASK32 for seed in seeds]) if seeds else array("q", (-1,)) * count
            self._table.numbers[8 * count :] = column
            self._seeds, self._on_device = seeds, None
        # The table lives in the order of the stream that it was copied on.
        stream = stream_of(example.device.index)
        if self._on_device is None or self._stream != stream:
            self._on_device, self._stream = self._uploaded(example.device), stream
        launch(
            example,
            self._on_device,
            count,
            self._units,
            self._name,
            lr,
            beta1,
            beta2,
            beta3,
            alpha,
            eps,
            weight_decay,
            gnorm_scale,
            step[0] if step else 0,
            max_unorm,
            skip_zeros,
            state.get("qmap1"),
            state.get("qmap2"),
            schedule,
        )

    def _uploaded(self, device: torch.device) -> Tensor:
        # New memory each time: torch's allocators reuse it when the copies and launches before are done.
        pinned = torch.empty(len(self._host), dtype=torch.int64, pin_memory=True)
        pinned.copy_(self._host)
        on_device = torch.empty(len(self._host), dtype=torch.int64, device=device)
        return on_device.copy_(pinned, non_blocking=True)


def prepare_step(
    optimizer_name: str, g: list[Tensor], p: list[Tensor], states: list[dict[str, Any]]
) -> PreparedStep | None:
    """The step of these parameters prepared for repetition; ``None`` where their addresses cannot be read at once."""
    two, eight = RULES[optimizer_name].states == 2, states[0]["state1"].dtype == torch.uint8
    keys = ("state1", "state2" if two else None, "absmax1" if eight else None, "absmax2" if eight and two else None)
    shared = (("qmap1", "qmap2") if two else ("qmap1",)) if eight else ()
    table = TensorTable(_C.read_tensors, p, states, keys, shared, trailing=3)
    return PreparedStep(optimizer_name, p, table) if table.record(g) else None


#: What the backend serves of the optimizer ops.
OPTIM_KERNELS = (
    Kernel("optimizer_update_32bit", optimizer_update_32bit, has_no_limit),
    Kernel("optimizer_update_8bit_blockwise", optimizer_update_8bit_blockwise, KNOWN_RULES),
    Kernel("optimizer_step_32bit", optimizer_step_32bit, KNOWN_RULES, bind=prepare_step),
    Kernel("optimizer_step_8bit", optimizer_step_8bit, KNOWN_RULES, bind=prepare_step),
)
