"""4-bit quantization of any parameter of any module, such as the fused weights of experts.

The parameter is replaced by its packed codes and a parametrization that dequantizes on access. During
a forward pass of the module the dequantized value is computed once. The state dict keeps the plain
name of the parameter, with the statistics beside it as a quantized layer has them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.nn.utils import parametrize

from bitsandbytes.errors import ArgumentError, ArgumentTypeError
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.state import QuantState


class Bnb4bitParametrization(torch.nn.Module):
    """Dequantizes the packed codes of a parameter.

    Args:
        quant_state: statistics of the parameter.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """The parameter in its original shape and dtype."""
        return dequantize_4bit(quantized_param, self.quant_state)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # Statistics are no buffers, so that they get their own keys; they move like ones. A change of
        # dtype must not reach them.
        device = fn(self.quant_state.code).device
        if device.type != "meta":
            self.quant_state.to(device)
        return self


def replace_parameter_4bit(
    module: torch.nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter of a module, in place.

    Args:
        module: owner of the parameter.
        param_name: its name, of a parameter of any shape.
        compress_statistics: whether the statistics are quantized, too.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: values per block; 64 where not given.

    Raises:
        AttributeError: the module has no such parameter.
        TypeError: the attribute is not a parameter, or is quantized already.
    """
    parameter = _parameter(module, param_name)
    packed, state = quantize_4bit(
        parameter.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    _install(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: torch.nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """Give a parameter that holds packed codes its statistics, in place.

    Args:
        module: owner of the parameter.
        param_name: its name.
        qs_dict: statistics as ``QuantState.as_dict(packed=True)`` gives them, prefixed or not. Other
            entries of a state dict may be among them.
        device: where to put the statistics.

    Raises:
        CheckpointError: the statistics are damaged or incomplete.
    """
    parameter = _parameter(module, param_name)
    own = {key: value for key, value in qs_dict.items() if key.rpartition(f"{param_name}.")[1]}
    state = QuantState.from_dict(own or qs_dict, device=device)
    _install(module, param_name, parameter.data.to(device), state)


def _parameter(module: torch.nn.Module, param_name: str) -> torch.nn.Parameter:
    if not hasattr(module, param_name):
        raise ArgumentAttributeError(f"Module does not have parameter '{param_name}'")
    if parametrize.is_parametrized(module, param_name):
        raise ArgumentTypeError(f"Parameter '{param_name}' is parametrized already")
    parameter = getattr(module, param_name)
    if not isinstance(parameter, torch.nn.Parameter):
        raise ArgumentTypeError(f"Parameter '{param_name}' is not an instance of nn.Parameter")
    return parameter


class ArgumentAttributeError(ArgumentError, AttributeError):
    """A module has no parameter of the given name."""


def _install(module: torch.nn.Module, param_name: str, packed: torch.Tensor, state: QuantState) -> None:
    setattr(module, param_name, torch.nn.Parameter(packed, requires_grad=False))
    # `unsafe`: the parametrization changes shape and dtype.
    parametrize.register_parametrization(module, param_name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, param_name)


def _register_parametrization_hooks(module: torch.nn.Module, param_name: str) -> None:
    """Hooks for the state dict and for dequantizing once per forward pass."""
    module.register_state_dict_post_hook(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    module.register_load_state_dict_pre_hook(partial(_parametrized_load_state_dict_pre_hook, param_name=param_name))
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # `always_call`: an exception in forward must not leave the cache on.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    parametrize._cache_enabled += 1


def _disable_parametrization_cache(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    parametrize._cache_enabled -= 1
    if not parametrize._cache_enabled:
        parametrize._cache = {}


def _parametrized_state_dict_post_hook(
    module: torch.nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: dict[str, Any],
) -> None:
    """Save the packed codes under the plain name, with the statistics beside them."""
    original = f"{prefix}parametrizations.{param_name}.original"
    if original not in state_dict:
        return
    state_dict[f"{prefix}{param_name}"] = state_dict.pop(original)
    parametrizations: Any = module.parametrizations
    state = parametrizations[param_name][0].quant_state
    for key, value in state.as_dict(packed=True).items():
        state_dict[f"{prefix}{param_name}.{key}"] = value


def _parametrized_load_state_dict_pre_hook(
    module: torch.nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    param_name: str,
) -> None:
    """Read what the post hook of the state dict wrote."""
    name = f"{prefix}{param_name}"
    packed = state_dict.pop(name, None)
    statistics = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{name}.")}
    if packed is None:
        return
    parametrizations: Any = module.parametrizations
    original = parametrizations[param_name].original
    state_dict[f"{prefix}parametrizations.{param_name}.original"] = packed
    if statistics:
        parametrizations[param_name][0].quant_state = QuantState.from_dict(statistics, original.device)
