"""State dicts: the nested layout of upstream 0.50, the flat one before it, and what older releases had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitsandbytes.errors import CheckpointError
from bitsandbytes.ops.optim_rules import Rule
from bitsandbytes.ops.optim_storage import STATE_BLOCKSIZE, state_blocks
from bitsandbytes.optim import sharded

#: Key under which the tensors of one parameter's state lie in a state dict. Sharded training gathers
#: tensors that it finds beside ``step`` as if they had the parameter's shape; it leaves a dict alone.
QUANT_STATE_KEY = "__bnb_optimizer_quant_state__"

#: Keys of float32 averages that CAME keeps beside its momentum.
FACTOR_KEYS = ("square", "square_row", "square_col", "instability_row", "instability_col")

#: Keys of tensors in a state, which are never cast to the dtype of the parameter.
TENSOR_KEYS = frozenset(
    {
        "qmap1",
        "qmap2",
        "max1",
        "max2",
        "new_max1",
        "new_max2",
        "state1",
        "state2",
        "gnorm_vec",
        "absmax1",
        "absmax2",
        "unorm_vec",
        *FACTOR_KEYS,
        *sharded.ROW_KEYS,
        sharded.OFFSET_KEY,
    }
)

State = dict[str, Any]


def nest(state: Mapping[str, Any]) -> State:
    """The state of a parameter as it is saved: its tensors in a dict of their own."""
    saved = {key: value for key, value in state.items() if key not in TENSOR_KEYS}
    step = saved.get("step")
    if isinstance(step, torch.Tensor):
        saved["step"] = int(step)
    tensors = {key: value for key, value in state.items() if key in TENSOR_KEYS}
    if tensors:
        saved[QUANT_STATE_KEY] = tensors
    return saved


def flatten(saved: Mapping[str, Any]) -> State:
    """The state of a parameter as optimizers hold it, from either layout."""
    state = {key: value for key, value in saved.items() if key != QUANT_STATE_KEY}
    nested = saved.get(QUANT_STATE_KEY, {})
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{QUANT_STATE_KEY} holds a {type(nested).__name__}, expected a dict of tensors")
    state.update(nested)
    if isinstance(state.get("step"), torch.Tensor):
        state["step"] = int(state["step"])
    return state


def modernize(state: State, rule: Rule, count: int, where: str) -> State:
    """Check a loaded state and bring what older releases saved into today's form, exactly.

    Blocks of 2048 (before 0.44) and a single maximum per tensor (``block_wise=False``, before 0.50)
    become blocks of 256 that share their absmax: every value stays the same.

    Args:
        state: flat state of one parameter.
        rule: update rule of the optimizer.
        count: number of elements of the parameter.
        where: names the parameter in errors.

    Raises:
        CheckpointError: the state does not fit the parameter or the optimizer.
    """
    if not state:
        return state
    if "state1" not in state:
        raise CheckpointError(f"{where} has {', '.join(state)} but no state1: another kind of optimizer saved it")
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{where}: step is {state.get('step')!r}, expected the number of steps made")
    for position in range(1, rule.states + 1):
        slots = rule.slots if position == 1 else 1
        _check_tensor(state, f"state{position}", slots * count, where)
        if state[f"state{position}"].dtype == torch.uint8:
            _modernize_codes(state, position, slots, count, where)
        elif state[f"state{position}"].dtype != torch.float32:
            raise CheckpointError(
                f"{where}: state{position} has dtype {state[f'state{position}'].dtype}, expected float32 or uint8"
            )
    for key in ("max1", "max2", "new_max1", "new_max2", "gnorm_vec"):
        state.pop(key, None)
    return state


def _modernize_codes(state: State, position: int, slots: int, count: int, where: str) -> None:
    _check_tensor(state, f"qmap{position}", 256, where)
    name, blocks = f"absmax{position}", state_blocks(count)
    if name not in state and isinstance(state.get(f"max{position}"), torch.Tensor):
        state[name] = state[f"max{position}"].float().reshape(1).repeat(blocks)
    absmax = state.get(name)
    if not isinstance(absmax, torch.Tensor) or absmax.dtype != torch.float32:
        raise CheckpointError(f"{where}: {name} is missing or not a float32 tensor")
    older = -(-count // 2048)
    if absmax.numel() == slots * older != slots * blocks:
        rows = absmax.reshape(slots, older).repeat_interleave(2048 // STATE_BLOCKSIZE, dim=1)
        absmax = rows[:, :blocks]
    if absmax.numel() != slots * blocks:
        raise CheckpointError(f"{where}: {name} has {absmax.numel()} elements, expected {slots * blocks}")
    state[name] = absmax.reshape((blocks,) if slots == 1 else (slots, blocks)).contiguous()


def _check_tensor(state: State, key: str, count: int, where: str) -> None:
    tensor = state.get(key)
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != count:
        found = f"{tensor.numel()} elements" if isinstance(tensor, torch.Tensor) else repr(tensor)
        raise CheckpointError(f"{where}: {key} has {found}, expected a tensor of {count} elements")
    state[key] = tensor.contiguous()
