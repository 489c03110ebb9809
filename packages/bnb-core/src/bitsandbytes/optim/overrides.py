"""Optimizer settings for single parameters, set apart from the optimizer that they are for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bitsandbytes.errors import ArgumentError

Config = dict[str, Any]

#: Settings that can be overridden for a single parameter.
KEYS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "alpha",
    "t_alpha",
    "t_beta3",
    "optim_bits",
    "min_8bit_size",
    "max_unorm",
    "skip_zeros",
    "gnorm_scale",
    "stochastic_rounding",
)


class GlobalOptimManager:
    """Settings of single parameters that every optimizer of this package looks up.

    A setting belongs to the parameter object itself, or to a parameter of a module by name; it may be
    made before or after an optimizer exists and before or after ``register_parameters``. It holds no
    parameter or module alive and vanishes with it.

    The state of a parameter keeps the number of bits that it was made with: ``optim_bits`` and
    ``min_8bit_size`` count until the first step, all other settings at each step.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager is shared: call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget all settings."""
        self._by_parameter = WeakTensorKeyDictionary()
        self._by_module: list[tuple[weakref.ref[torch.nn.Module], str, Config]] = []
        #: Grows with every change, so that optimizers know when to look again.
        self.version = getattr(self, "version", 0) + 1

    @property
    def uses_config_override(self) -> bool:
        """Whether any setting exists."""
        return bool(self.module_weight_config_triple) or len(self._by_parameter) > 0

    @property
    def pid2config(self) -> dict[int, Config]:
        """Settings by the ``id`` of their parameter, as a copy."""
        return {id(parameter): dict(config) for parameter, config in self._by_parameter.items()}

    @property
    def module_weight_config_triple(self) -> list[tuple[torch.nn.Module, str, Config]]:
        """Settings by module and parameter name, as a copy."""
        triples = ((module(), name, dict(config)) for module, name, config in self._by_module)
        return [(module, name, config) for module, name, config in triples if module is not None]

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Accept parameters or parameter groups. Settings are found without it; it checks its argument.

        Args:
            params: tensors, or dicts with a key ``params``, as optimizers take them.
        """
        for item in params:
            members = item["params"] if isinstance(item, Mapping) else item
            for parameter in [members] if isinstance(members, torch.Tensor) else members:
                _check_parameter(parameter)
        self.version += 1

    def override_config(
        self,
        parameters: torch.Tensor | Iterable[torch.Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Set one value, or several at once, for one or several parameters.

        Args:
            parameters: a parameter or an iterable of parameters.
            key: name of the setting, see :data:`KEYS`.
            value: its value.
            key_value_dict: further settings.

        Raises:
            ArgumentError: a setting is unknown or none is given.
        """
        config = dict(key_value_dict or {})
        if key is not None:
            config[key] = value
        _check_config("override_config", config)
        for parameter in [parameters] if isinstance(parameters, torch.Tensor) else list(parameters):
            _check_parameter(parameter)
            self._by_parameter[parameter] = {**self._by_parameter.get(parameter, {}), **config}
        self.version += 1

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Set values for the parameter that ``module`` has under this name whenever a step is made."""
        _check_config("register_module_override", config)
        self._by_module = [entry for entry in self._by_module if entry[0]() is not None]
        self._by_module.append((weakref.ref(module), param_name, dict(config)))
        self.version += 1

    def of(self, parameters: Iterable[torch.Tensor]) -> dict[int, Config]:
        """Settings of these parameters by ``id``; those of a parameter win over those of its module."""
        found: dict[int, Config] = {}
        for module, name, config in self.module_weight_config_triple:
            parameter = getattr(module, name, None)
            if isinstance(parameter, torch.Tensor):
                found[id(parameter)] = {**found.get(id(parameter), {}), **config}
        settings = {}
        for parameter in parameters:
            config = {**found.get(id(parameter), {}), **self._by_parameter.get(parameter, {})}
            if config:
                settings[id(parameter)] = config
        return settings


def _check_parameter(parameter: Any) -> None:
    if not isinstance(parameter, torch.Tensor):
        raise ArgumentError(f"GlobalOptimManager: parameters holds a {type(parameter).__name__}, expected tensors")


def _check_config(function: str, config: Mapping[str, Any]) -> None:
    if not config:
        raise ArgumentError(f"GlobalOptimManager.{function}: no setting given; known: {', '.join(KEYS)}")
    unknown = sorted(set(config) - set(KEYS))
    if unknown:
        raise ArgumentError(f"GlobalOptimManager.{function}: unknown setting {unknown[0]!r}; known: {', '.join(KEYS)}")
