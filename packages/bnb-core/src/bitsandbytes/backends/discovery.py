"""Finding and loading backend plugins.

The only door is the entry-point group ``bitsandbytes.backends``, for this project's backends as for
anybody's. An entry point resolves to a :class:`~bitsandbytes.backends.description.Backend`, or to a
callable without arguments that registers kernels with ``torch.library`` itself when called.

A plugin that fails is isolated: ``import bitsandbytes`` goes on, the failure is reported once, and
an error is raised only when the plugin's device is used.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch

from bitsandbytes import contract
from bitsandbytes.backends.description import Backend
from bitsandbytes.backends.plugin import WHEELS, Plugin, Status, describe_exception, dispatch_key, refuse_other_api
from bitsandbytes.backends.registry import REGISTRY, Registry
from bitsandbytes.backends.settings import Settings
from bitsandbytes.diagnostics.installation import second_owner

GROUP = "bitsandbytes.backends"


def load_plugins(
    registry: Registry = REGISTRY,
    entry_points: Iterable[Any] | None = None,
    settings: Settings | None = None,
) -> None:
    """Load every installed plugin that the environment allows into the registry.

    Raises:
        BackendError: in strict mode, when a plugin has a problem.
    """
    registry.settings = settings or Settings.from_environment()
    if trouble := second_owner():
        registry.warn(trouble)
    found = _unique(registry, installed_entry_points() if entry_points is None else entry_points)
    for variable, name in registry.settings.unknown({entry.name for entry in found}):
        installed = ", ".join(sorted(entry.name for entry in found)) or "none"
        registry.warn(f"{variable} names {name!r}, but no such backend is installed (installed: {installed})")
    # Callables register with torch while they are loaded, so that a described backend, which joins
    # the registry after them, leaves them their kernels and can say whose they are.
    loaded = [_plugin(entry, registry.settings) for entry in found]
    for plugin in sorted(loaded, key=lambda plugin: plugin.backend is not None):
        registry.add(plugin)
    contract.set_reference_notice(registry.before_reference)
    if registry.settings.strict:
        registry.verify()


def installed_entry_points() -> list[Any]:
    """Entry points of the group; an application frozen without metadata has none."""
    return sorted(metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, _distribution(entry)))


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


def _plugin(entry: Any, settings: Settings) -> Plugin:
    distribution, version = _distribution(entry)
    plugin = Plugin(entry.name, distribution, version, entry.value)
    skipped = settings.why_skipped(entry.name)
    if skipped:
        plugin.status, plugin.cause = Status.SKIPPED, skipped
    else:
        plugin.retry = lambda: _load(plugin, entry)
        _load(plugin, entry)
    return plugin


def _load(plugin: Plugin, entry: Any) -> None:
    if _is_being_imported(entry.value):
        plugin.status, plugin.cause = Status.PENDING, "its module is still being imported"
        return
    plugin.status, plugin.cause = Status.REGISTERED, ""
    before = _registered_kernels()
    start = time.perf_counter()
    try:
        # What a plugin prints must not get into the output of the user's program.
        with contextlib.redirect_stdout(sys.stderr):
            _resolve(plugin, entry.load())
    except KeyboardInterrupt:
        raise
    # A plugin may call sys.exit when its runtime is missing; that must not end the user's program.
    except BaseException as error:
        plugin.fail(Status.BROKEN, f"loading {plugin.target} raised {describe_exception(error)}", error)
    finally:
        plugin.import_seconds = time.perf_counter() - start
        # torch cannot take a registration back: what a callable registered before it failed stays.
        if plugin.backend is None:
            plugin.direct_ops = tuple(sorted(_registered_kernels() - before))


def _resolve(plugin: Plugin, value: Any) -> None:
    if isinstance(value, Backend):
        if value.name != plugin.name:
            raise ValueError(f"the description is called {value.name!r}, the entry point {plugin.name!r}")
        plugin.backend = value
        refuse_other_api(plugin, value)
    elif callable(value):
        value()
        plugin.status = Status.CALLED
    else:
        raise TypeError(f"it is a {type(value).__name__}, expected a Backend or a callable")


def _is_being_imported(target: str) -> bool:
    """Whether the module of an entry point, or a package around it, is half-way through its import.

    That is so when the user imports the plugin first and the plugin imports this package.
    """
    module = target.partition(":")[0].strip()
    parts = module.split(".")
    modules = (sys.modules.get(".".join(parts[:length])) for length in range(1, len(parts) + 1))
    return any(getattr(getattr(found, "__spec__", None), "_initializing", False) for found in modules)


def _registered_kernels() -> set[tuple[str, str]]:
    """Op and device type of every kernel that torch knows for our ops."""
    devices = {*WHEELS, torch._C._get_privateuse1_backend_name()}
    keys = {device: key for device in devices if (key := dispatch_key(device)) is not None}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        (op.name, device)
        for op in contract.OPS.values()
        for device, key in keys.items()
        if has_kernel(op.qualname, key)
    }
