"""Finding and loading backend plugins.

The only door is the entry-point group ``bitsandbytes.backends``, for this project's backends as for
anybody's. An entry point resolves to a :class:`~bitsandbytes.backends.description.Backend`, or to a
callable without arguments that registers kernels with ``torch.library`` itself when called.

A plugin that fails is isolated: ``import bitsandbytes`` goes on, the failure is reported once, and
an error is raised only when the plugin's device is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import importlib_metadata
import torch

from bitsandbytes.backends.description import Backend
from bitsandbytes.backends.registry import REGISTRY, Plugin, Registry, Status
from bitsandbytes.backends.settings import Settings
from bitsandbytes.contract import OPS

GROUP = "bitsandbytes.backends"


def load_plugins(
    registry: Registry = REGISTRY,
    entry_points: Iterable[Any] | None = None,
    settings: Settings | None = None,
) -> None:
    """Load every installed plugin that the environment allows into the registry."""
    settings = settings or Settings.from_environment()
    registry.strict = settings.strict
    found = _unique(registry, installed_entry_points() if entry_points is None else entry_points)
    for variable, name in settings.unknown({entry.name for entry in found}):
        installed = ", ".join(sorted(entry.name for entry in found)) or "none"
        registry.warn(f"{variable} names {name!r}, but no such backend is installed (installed: {installed})")
    plugins = [(entry, _load(entry, settings)) for entry in found]
    # Callables have registered with torch by now, so that a described backend sees their kernels.
    for _entry, plugin in plugins:
        registry.add(plugin)
        if plugin.status in (Status.BROKEN, Status.INCOMPATIBLE):
            registry.warn(plugin.describe_failure())


def installed_entry_points() -> list[Any]:
    """Entry points of the group; an application frozen without metadata has none."""
    return list(importlib_metadata.entry_points(group=GROUP))


def _unique(registry: Registry, entry_points: Iterable[Any]) -> list[Any]:
    """Drop the second of two entry points with one name, and say so unless they are the same."""
    by_name: dict[str, Any] = {}
    for entry in entry_points:
        first = by_name.setdefault(entry.name, entry)
        if first is not entry and (first.value, _distribution(first)) != (entry.value, _distribution(entry)):
            registry.warn(
                f"two plugins are called {entry.name!r}: {' '.join(_distribution(first))} ({first.value}) and "
                f"{' '.join(_distribution(entry))} ({entry.value}); the first is used. Uninstall one of them"
            )
    return list(by_name.values())


def _distribution(entry: Any) -> tuple[str, str]:
    if entry.dist is None:
        return "unknown", "unknown"
    return entry.dist.name or "unknown", entry.dist.version or "unknown"


def _load(entry: Any, settings: Settings) -> Plugin:
    distribution, version = _distribution(entry)
    plugin = Plugin(entry.name, distribution, version, entry.value)
    skipped = settings.why_skipped(entry.name)
    if skipped:
        plugin.status, plugin.cause = Status.SKIPPED, skipped
        return plugin
    try:
        _resolve(plugin, entry.load())
    # A plugin may call sys.exit when its runtime is missing; that must not end the user's program.
    except (Exception, SystemExit) as error:
        plugin.fail(Status.BROKEN, f"importing it raised {type(error).__name__}: {error}", error)
    return plugin


def _resolve(plugin: Plugin, value: Any) -> None:
    if isinstance(value, Backend):
        plugin.backend = value
        cause = REGISTRY.check_version(value)
        if cause:
            plugin.fail(Status.INCOMPATIBLE, cause)
    elif callable(value):
        before = _registered_kernels()
        value()
        plugin.direct_ops = tuple(sorted(_registered_kernels() - before))
        plugin.status = Status.CALLED
    else:
        raise TypeError(f"{plugin.target} is a {type(value).__name__}, expected a Backend or a callable")


def _registered_kernels() -> set[tuple[str, str]]:
    """Op and dispatch key of every kernel that torch knows for our ops."""
    keys = [str(torch._C._dispatch_key_for_device(device)) for device in _device_types()]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {(op.name, key) for op in OPS.values() for key in keys if has_kernel(op.qualname, key)}


def _device_types() -> list[str]:
    return ["cpu", "cuda", "xpu", "mps", "hpu", torch._C._get_privateuse1_backend_name()]
