"""What is known about an installed plugin, as data."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from bitsandbytes.backends.description import Availability
from bitsandbytes.backends.plugin import FAILED, Plugin, Status
from bitsandbytes.backends.registry import REGISTRY, Registry
from bitsandbytes.contract import OP_API_VERSION
from bitsandbytes.diagnostics.machine import usable_devices
from bitsandbytes.errors import BackendError


def describe_plugins(registry: Registry = REGISTRY) -> list[dict[str, Any]]:
    """Every installed plugin, in order of its name; available backends are loaded for it."""
    registry.settle()
    plugins = sorted(registry.plugins, key=lambda plugin: plugin.name)
    # A backend may print while it is probed and loaded; standard output is for the description.
    with contextlib.redirect_stdout(sys.stderr):
        return [describe_plugin(plugin, registry) for plugin in plugins]


def describe_plugin(plugin: Plugin, registry: Registry = REGISTRY) -> dict[str, Any]:
    """One plugin; ``ops`` is ``None`` where its kernels cannot be loaded here."""
    ops = _coverage(plugin, registry)
    availability = _availability(plugin)
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "target": plugin.target,
        "style": "callable" if plugin.status is Status.CALLED else "description" if plugin.backend else "unknown",
        "devices": list(plugin.devices),
        "status": plugin.status.value,
        "available": availability.available,
        "reason": plugin.cause or availability.reason,
        "mend": plugin.mend,
        "op_api": list(plugin.backend.op_api) if plugin.backend else None,
        "core_op_api": OP_API_VERSION,
        "priority": plugin.backend.priority if plugin.backend else None,
        "import_seconds": round(plugin.import_seconds, 3),
        "ops": ops,
        "unknown_ops": list(plugin.unknown_ops),
    }


def _availability(plugin: Plugin) -> Availability:
    """Whether a plugin serves its devices here; a callable does not say, so its devices are looked for."""
    answer = plugin.availability()
    if plugin.status is not Status.CALLED or not plugin.devices:
        return answer
    if {device.type for device in usable_devices()}.isdisjoint(plugin.devices):
        listed = " or ".join(plugin.devices)
        return Availability(False, f"its kernels are registered, but torch can use no device of type {listed} here")
    return answer


def is_failed(description: dict[str, Any]) -> bool:
    """Whether a described plugin is broken or incompatible."""
    return description["status"] in {status.value for status in FAILED}


def _coverage(plugin: Plugin, registry: Registry) -> dict[str, str] | None:
    if not plugin.availability().available:
        return None
    try:
        return registry.coverage(plugin)
    except BackendError:
        return None
