"""Saving, loading and moving of layers whose weight is 4-bit."""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.errors import CheckpointError
from bitsandbytes.nn.foreign import moving_weight
from bitsandbytes.nn.params4bit import Params4bit
from bitsandbytes.nn.shard4bit import with_shard_class_of
from bitsandbytes.optim.sharded import is_sharded
from bitsandbytes.state import QuantState

#: Keys of a quant state in a state dict, below the name of the weight.
_STATE_KEYS = frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map"})


def fix_4bit_weight_quant_state_from_module(module: Any) -> None:
    """Restore the state of a weight that a sharding library replaced by one without it.

    FSDP recreates parameters around its own buffers; the layer keeps a second reference to the state
    for that case. A weight that FSDP2 has not gathered stays as it is.
    """
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None or getattr(module, "quant_state", None) is None:
        return
    if is_sharded(weight):
        return
    if not isinstance(weight, Params4bit):
        weight = Params4bit(weight.data, quant_storage=weight.dtype, module=module, bnb_quantized=True)
        module.weight = weight
    weight.quant_state = module.quant_state


class Storage4bit(torch.nn.Module):
    """Mixin for a module with a :class:`Params4bit` called ``weight``."""

    weight: Any
    quant_state: QuantState | None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        weight: Any = self._parameters.get("weight")
        if weight is not None and is_sharded(weight) and self.quant_state is not None:
            # The state stays where gathered weights are used; a shard may be offloaded.
            return super()._apply(_keeping_dtype_of(weight, fn), recurse)
        with moving_weight(self, fn):
            super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        # torch moves the data under a parameter that stays; its state has to follow.
        if state is not None and weight.device.type != "meta" and state.absmax.device != weight.device:
            state.to(weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        fix_4bit_weight_quant_state_from_module(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        sharded = is_sharded(self.weight)
        state = self.quant_state if sharded else getattr(self.weight, "quant_state", None)
        if state is None:
            return
        statistics = state.as_dict(packed=True)
        for key, value in statistics.items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()
        if sharded:
            _let_names_resolve(self.weight, state, statistics)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        statistics = {key: value for key, value in state_dict.items() if _is_statistic(key, name)}
        incoming = state_dict.get(name)
        before = self.weight
        sharded = is_sharded(before)
        if statistics and incoming is not None:
            taken = statistics.keys() if sharded else {name, *statistics}
            try:
                if sharded:
                    self.quant_state = self._state_for_shards(incoming, statistics)
                else:
                    self.weight = self._prequantized(incoming, statistics, local_metadata)
            except CheckpointError as error:
                error_msgs.append(f"While reading the 4-bit weight {name!r}: {error}")
            super()._load_from_state_dict(
                {key: value for key, value in state_dict.items() if key not in taken},
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            missing_keys[:] = [key for key in missing_keys if key != name]
            self._keep_parameter_class(before)
            return
        if incoming is not None and self.quant_state is not None and sharded:
            # torch's broadcast of a state dict from one process reaches only what is a parameter or buffer, and codes
            # mean nothing without their statistics.
            missing_keys.extend(f"{name}.{key}" for key in self.quant_state.as_dict(packed=True))
        elif incoming is not None and self._needs_quantizing(incoming):
            settings = {key: self.weight.__dict__[key] for key in ("blocksize", "compress_statistics", "quant_type")}
            self.weight = Params4bit(
                incoming.detach().clone(), quant_storage=self.weight.quant_storage, module=self, **settings
            ).to(self.weight.device)
            state_dict = {**state_dict, name: self.weight.data}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._keep_parameter_class(before)

    def _prequantized(self, packed: torch.Tensor, statistics: dict[str, Any], local_metadata: Any) -> Params4bit:
        assign = local_metadata.get("assign_to_params_buffers", False)
        device = packed.device if assign or self.weight.device.type == "meta" else self.weight.device
        parameter = Params4bit.from_prequantized(packed, statistics, device=device, module=self)
        self._check_shape(parameter.quant_state)
        if not assign and parameter.data_ptr() == packed.data_ptr():
            parameter.data = packed.detach().clone()
        return parameter

    def _state_for_shards(self, incoming: torch.Tensor, statistics: dict[str, Any]) -> QuantState:
        device = incoming.device if self.quant_state is None else self.quant_state.absmax.device
        state = QuantState.from_dict(statistics, device)
        self._check_shape(state)
        return state

    def _check_shape(self, state: QuantState | None) -> None:
        shape = self._weight_shape()
        given = None if state is None else state.shape
        if given is not None and tuple(given) != shape:
            raise CheckpointError(f"it has shape {tuple(given)}, the weight of this layer has shape {shape}")

    def _weight_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def _needs_quantizing(self, incoming: torch.Tensor) -> bool:
        """Whether an unquantized weight comes in for a quantized one."""
        weight = self.weight
        return (
            isinstance(weight, Params4bit)
            and weight.bnb_quantized
            and incoming.is_floating_point()
            and tuple(incoming.shape) == self._weight_shape()
            and tuple(weight.shape) != self._weight_shape()
        )

    def _keep_parameter_class(self, before: Any) -> None:
        """Undo that ``load_state_dict(assign=True)`` puts a plain parameter in the place of ``before``."""
        weight = self.weight
        if is_sharded(weight):
            if weight is not before:
                self.weight = with_shard_class_of(before, weight)
        elif not isinstance(weight, Params4bit):
            state = self.quant_state
            self.weight = Params4bit(
                weight.data,
                quant_state=state,
                quant_type=self._default_quant_type,
                bnb_quantized=state is not None,
                module=self,
            )

    _default_quant_type = "fp4"


def _keeping_dtype_of(weight: torch.Tensor, fn: Any) -> Any:
    """``fn``, a function that moves or converts tensors, without a conversion of these packed codes."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if tensor is weight and result.dtype != tensor.dtype else result

    return moved


def _let_names_resolve(weight: Any, state: QuantState, statistics: dict[str, torch.Tensor]) -> None:
    """Give a sharded weight the attributes that the keys of its statistics name.

    ``torch.distributed.checkpoint`` walks the keys of a state dict by attribute access, and a sharded weight does not
    have the properties of :class:`Params4bit`.
    """
    weight.quant_state = state
    for key, value in statistics.items():
        if "." not in key:
            setattr(weight, key, value)


def _is_statistic(key: str, name: str) -> bool:
    if not key.startswith(f"{name}."):
        return False
    rest = key[len(name) + 1 :]
    return rest in _STATE_KEYS or rest.startswith("quant_state.")
