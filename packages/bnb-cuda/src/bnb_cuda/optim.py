"""Kernels of the optimizer ops: a few launches for all parameters of a call.

The addresses of all tensors go to the device in one table. A table is kept as long as the addresses
stay the same, which they usually do from step to step; nothing is copied then.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, empty

from bitsandbytes.ops.optim_rules import RULE_NUMBERS, RULES, only_rules_below
from bnb_cuda import _C
from bnb_cuda.arguments import DTYPES, address, stream_of

#: Accepts what the native code has a rule for; ``None`` where that is everything.
KNOWN_RULES = only_rules_below(_C.OPTIMIZER_RULES)

#: Seeds of stochastic rounding are of 32 bits.
MASK32 = 0xFFFFFFFF

#: Tables that are kept; a model has a few batches of parameters, each with one.
MOST_TABLES = 64


class Table(NamedTuple):
    """Addresses on the device, and the units of work that the tensors make."""

    on_device: Tensor
    #: The source of the copy. A captured graph copies again on each replay.
    on_host: Tensor
    units: int


_tables: OrderedDict[tuple[int, bytes], Table] = OrderedDict()
#: Tables that a captured graph uses: they live as long as the process.
_captured: dict[tuple[int, bytes], Table] = {}


def table_of(
    device: int,
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    rounding_seed: Sequence[int],
) -> Table:
    """The table of these tensors, a new one if need be."""
    count = len(p)
    absent = (0,) * count
    numbers = array("q", map(Tensor.data_ptr, p))
    for tensors in (g, state1, state2, absmax1, absmax2):
        numbers.extend(map(Tensor.data_ptr, tensors) if tensors else absent)
    numbers.extend(map(Tensor.numel, p))
    numbers.extend(absent)
    numbers.extend((seed & MASK32 for seed in rounding_seed) if rounding_seed else (-1,) * count)
    key = (device, numbers.tobytes())
    capturing = _C.is_capturing(device, stream_of(device))
    found = _captured.get(key) or _tables.get(key)
    if found is None:
        found = _new_table(device, numbers, count)
        _tables[key] = found
        if len(_tables) > MOST_TABLES:
            _tables.popitem(last=False)
    elif key in _tables:
        _tables.move_to_end(key)
    if capturing:
        _captured[key] = found
    return found


def _new_table(device: int, numbers: array[int], count: int) -> Table:
    on_host = torch.empty(len(numbers), dtype=torch.int64, pin_memory=True)
    on_host.copy_(torch.frombuffer(numbers, dtype=torch.int64))
    column = count * on_host.element_size()
    units = _C.optimizer_units(on_host.data_ptr() + 6 * column, on_host.data_ptr() + 7 * column, count)
    on_device = torch.empty(len(numbers), dtype=torch.int64, device=torch.device("cuda", device))
    on_device.copy_(on_host, non_blocking=True)
    return Table(on_device, on_host, units)


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """Native ``optimizer_update_32bit``, for calls without a limit of the update's norm."""
    two = RULES[optimizer_name].states == 2 and state2 is not None
    optimizer_step_32bit(
        optimizer_name,
        (g.contiguous(),),
        (p,),
        (state1,),
        (state2,) if two and state2 is not None else (),
        (step,),
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        0.0,
        skip_zeros,
    )


def has_no_limit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    *others: object,
) -> bool:
    """Whether the rule is known and the norm of the update matters to nobody; the reference serves other calls."""
    return max_unorm == 0.0 and (KNOWN_RULES is None or KNOWN_RULES(optimizer_name))


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """Native ``optimizer_update_8bit_blockwise``."""
    two = RULES[optimizer_name].states == 2 and state2 is not None and absmax2 is not None
    optimizer_step_8bit(
        optimizer_name,
        (g.contiguous(),),
        (p,),
        (state1,),
        (state2,) if two and state2 is not None else (),
        qmap1,
        qmap2,
        (absmax1,),
        (absmax2,) if two and absmax2 is not None else (),
        (step,),
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        0.0,
        skip_zeros,
    )


def optimizer_step_32bit(
    optimizer_name: str,
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    step: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float = 1.0,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    rounding_seed: Sequence[int] = (),
    schedule: Tensor | None = None,
) -> None:
    """Native ``optimizer_step_32bit``."""
    optimizer_step_8bit(
        optimizer_name,
        g,
        p,
        state1,
        state2,
        None,
        None,
        (),
        (),
        step,
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        max_unorm,
        skip_zeros,
        rounding_seed,
        schedule,
    )


def optimizer_step_8bit(
    optimizer_name: str,
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    qmap1: Tensor | None,
    qmap2: Tensor | None,
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    step: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float = 1.0,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    rounding_seed: Sequence[int] = (),
    schedule: Tensor | None = None,
) -> None:
    """Native ``optimizer_step_8bit``; without codebooks, the same with float32 states."""
    if not p:
        return
    if schedule is None and len(set(step)) > 1:
        _by_step_number(locals())
        return
    two = RULES[optimizer_name].states == 2
    device = p[0].device.index
    table = table_of(device, g, p, state1, state2 if two else (), absmax1, absmax2 if two else (), rounding_seed)
    launch(
        p[0],
        table.on_device,
        len(p),
        table.units,
        optimizer_name,
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
        qmap1,
        qmap2 if two else None,
        schedule,
    )


def launch(
    example: Tensor,
    table: Tensor,
    count: int,
    units: int,
    optimizer_name: str,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float,
    step: int,
    max_unorm: float,
    skip_zeros: bool,
    qmap1: Tensor | None,
    qmap2: Tensor | None,
    schedule: Tensor | None,
) -> None:
    """Launch the step of the tensors in a table on the device; all are like ``example`` in dtype and device."""
    device = example.device.index
    if schedule is not None:
        schedule = schedule.contiguous()
    needed = _C.optimizer_workspace(count, units, max_unorm, schedule is not None)
    workspace = empty(needed, dtype=torch.uint8, device=example.device) if needed else None
    _C.optimizer_step(
        device,
        stream_of(device),
        table.data_ptr(),
        count,
        units,
        RULE_NUMBERS[optimizer_name],
        DTYPES[example.dtype],
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        gnorm_scale,
        step,
        max_unorm,
        skip_zeros,
        address(qmap1),
        address(qmap2),
        address(schedule),
        schedule is not None and schedule.dtype == torch.float64,
        address(workspace),
    )


#: Arguments of a step with one entry per parameter.
_PER_PARAMETER = ("g", "p", "state1", "state2", "absmax1", "absmax2", "step", "rounding_seed")


def _by_step_number(arguments: dict[str, object]) -> None:
    """One call per number of the step: parameters that joined later are behind."""
    steps: Sequence[int] = arguments["step"]  # type: ignore[assignment]
    for number in sorted(set(steps)):
        chosen = [index for index, other in enumerate(steps) if other == number]
        part = dict(arguments)
        for name in _PER_PARAMETER:
            values: Sequence[object] = arguments[name]  # type: ignore[assignment]
            part[name] = [values[index] for index in chosen] if values else ()
        optimizer_step_8bit(**part)  # type: ignore[arg-type]
