"""Saving, loading and moving of layers whose weight is int8."""

from __future__ import annotations

from typing import Any

import torch

from bitsandbytes.errors import CheckpointError
from bitsandbytes.nn.foreign import moving_weight
from bitsandbytes.nn.int8_params import Int8Params
from bitsandbytes.utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING

_ROW = LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"]


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take the format mark of an int8 weight out of a state dict and check it.

    Raises:
        CheckpointError: the weight lies in one of the interleaved layouts of before 0.45, or in an
            unknown one.
    """
    mark = state_dict.pop(f"{prefix}weight_format", "row")
    if isinstance(mark, torch.Tensor):
        mark = mark.item()
    name = mark if isinstance(mark, str) else INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(mark)
    if name not in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING:
        raise CheckpointError(
            f"{prefix}weight_format is {mark!r}, known formats: {', '.join(LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING)}"
        )
    if name != "row":
        raise CheckpointError(
            f"{prefix}weight_format is {name!r}; only 'row' weight format is supported. Save the checkpoint again "
            f"with bitsandbytes 0.45 or later, or quantize the original weights anew"
        )


class Storage8bit(torch.nn.Module):
    """Mixin for a module with an :class:`Int8Params` called ``weight``."""

    weight: Any

    #: State of the product, in modules that have one; its CB and SCB follow the weight.
    state: Any

    def _prepare_storage(self) -> None:
        self._register_load_state_dict_pre_hook(maybe_rearrange_weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with moving_weight(self, fn):
            super()._apply(fn, recurse)
        self._follow_weight()
        return self

    def _follow_weight(self) -> None:
        """Bring CB and SCB to where torch moved the data of the weight."""
        weight = self._parameters.get("weight")
        if isinstance(weight, Int8Params) and weight.dtype == torch.int8 and weight.device.type != "meta":
            weight.CB = weight.data
            if weight.SCB is not None:
                weight.SCB = weight.SCB.to(weight.device)
        state = self.__dict__.get("state")
        if state is not None:
            state.reset_grads()

    def _scales(self) -> torch.Tensor | None:
        SCB = getattr(self.weight, "SCB", None)
        state = self.__dict__.get("state")
        # Offloading hooks put SCB on the one or the other.
        return state.SCB if SCB is None and state is not None and not state.has_fp16_weights else SCB

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        SCB = self._scales()
        if SCB is not None and self.weight.dtype == torch.int8:
            destination[f"{prefix}SCB"] = SCB if keep_vars else SCB.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(_ROW, dtype=torch.uint8)

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
        name, scales_name = f"{prefix}weight", f"{prefix}SCB"
        incoming, SCB = state_dict.get(name), state_dict.get(scales_name)
        own = self.weight
        settings: dict[str, Any] = {"has_fp16_weights": getattr(own, "has_fp16_weights", False)}
        if isinstance(incoming, torch.Tensor) and incoming.dtype == torch.int8:
            problem = _problem(incoming, SCB, own, name, scales_name)
            if problem:
                error_msgs.append(problem)
                state_dict = {key: value for key, value in state_dict.items() if key != name}
            elif own.dtype != torch.int8 or own.device.type == "meta":
                # The layer becomes a quantized one, wherever it stands.
                device = incoming.device if own.device.type == "meta" else own.device
                self.weight = Int8Params(torch.empty_like(incoming, device=device), requires_grad=False, **settings)
        elif isinstance(incoming, torch.Tensor) and own.dtype == torch.int8 and incoming.shape == own.shape:
            # An unquantized weight comes in for a quantized one.
            self.weight = Int8Params(incoming.detach().clone(), requires_grad=False, **settings).to(own.device)
            state_dict = {**state_dict, name: self.weight.data}
            SCB = self.weight.SCB
        rest = {key: value for key, value in state_dict.items() if key != scales_name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[:] = [key for key in missing_keys if key != name or incoming is None]
        if not isinstance(self.weight, Int8Params) and self.weight.dtype == torch.int8:
            self.weight = Int8Params(self.weight.data, requires_grad=False, **settings)
        if SCB is not None and self.weight.dtype == torch.int8:
            self.weight.SCB = SCB.detach().to(self.weight.device, torch.float32, copy=True)
        self._follow_weight()


def _problem(incoming: torch.Tensor, SCB: Any, own: torch.Tensor, name: str, scales_name: str) -> str | None:
    """Why int8 codes cannot be loaded, or ``None``."""
    if not isinstance(SCB, torch.Tensor):
        return f"{name} holds int8 codes, but the state dict has no {scales_name}, the absmax of their rows"
    if SCB.numel() != incoming.shape[0]:
        return f"{scales_name} has {SCB.numel()} values, but {name} has {incoming.shape[0]} rows"
    if incoming.shape != own.shape:
        return f"{name} has shape {tuple(incoming.shape)}, the weight of this layer has shape {tuple(own.shape)}"
    return None
