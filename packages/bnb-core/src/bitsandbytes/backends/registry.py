"""Who serves which op on which device.

The registry owns one dispatcher entry per op and device type that some backend claims. The entry
runs the contract's check, then the first kernel that accepts the call, then the reference.
Backends are probed and loaded on the first call that needs them, never at import.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from bitsandbytes.backends.description import Availability, Backend, Kernel
from bitsandbytes.backends.settings import DENY
from bitsandbytes.contract import NAMESPACE, OP_API_VERSION, OPS, Op
from bitsandbytes.errors import BackendError, BackendWarning

#: Wheels of this project by the torch device type that they serve, for hints.
WHEELS = {
    "cpu": "bnb-core[cpu]",
    "cuda": "bnb-core[cuda] (NVIDIA) or bnb-core[rocm] (AMD)",
    "xpu": "bnb-core[xpu]",
    "mps": "bnb-core[mps]",
    "hpu": "bnb-core[hpu]",
}


class Status(Enum):
    """State of an installed plugin."""

    #: A description is registered; probing and loading wait for the first use.
    REGISTERED = "registered"
    #: Upstream-style plugin: its callable ran and registered kernels with torch directly.
    CALLED = "called"
    #: Not loaded because of an environment variable.
    SKIPPED = "skipped"
    #: Built for another version of the op contracts.
    INCOMPATIBLE = "incompatible"
    #: Its import, entry or load raised.
    BROKEN = "broken"


@dataclass(eq=False)
class Plugin:
    """An installed plugin and what became of it."""

    name: str
    distribution: str = "unknown"
    version: str = "unknown"
    #: The object reference of the entry point, ``module:attribute``.
    target: str = ""
    status: Status = Status.REGISTERED
    #: Why the plugin is not in use, and what to do about it.
    cause: str = ""
    mend: str = ""
    backend: Backend | None = None
    error: BaseException | None = None
    #: Ops registered directly with torch, for upstream-style plugins: ``(op, dispatch key)``.
    direct_ops: tuple[tuple[str, str], ...] = ()
    _kernels: dict[str, Kernel] | None = field(default=None, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def availability(self) -> Availability:
        """Ask the backend's probe; a probe that raises means unavailable, with its message."""
        if self.backend is None or self.status not in (Status.REGISTERED, Status.CALLED):
            return Availability(self.status is Status.CALLED, self.cause)
        try:
            return self.backend.probe()
        except Exception as error:
            return Availability(False, f"its probe raised {type(error).__name__}: {error}")

    def kernels(self) -> dict[str, Kernel]:
        """Load the backend if need be and return its kernels by op.

        Raises:
            BackendError: the plugin is broken or incompatible; the text says how to mend it.
        """
        if self._kernels is not None:
            return self._kernels
        with self._lock:
            if self._kernels is None:
                self._kernels = self._load()
            return self._kernels

    def _load(self) -> dict[str, Kernel]:
        if self.status is Status.REGISTERED and self.backend is not None:
            try:
                kernels = {kernel.op: kernel for kernel in self.backend.load()}
            except Exception as error:
                self.fail(Status.BROKEN, f"loading its kernels raised {type(error).__name__}: {error}", error)
            else:
                for name in kernels.keys() - OPS.keys():
                    del kernels[name]
                return kernels
        raise BackendError(self.describe_failure()) from self.error

    def fail(self, status: Status, cause: str, error: BaseException | None = None) -> None:
        """Record why the plugin cannot be used."""
        self.status, self.cause, self.error = status, cause, error
        hint = self.backend.install_hint if self.backend else ""
        self.mend = hint or f"pip install --upgrade {self.distribution}"

    def describe_failure(self) -> str:
        """One sentence with name, version, cause and mend."""
        return (
            f"backend {self.name!r} ({self.distribution} {self.version}) is {self.status.value}: {self.cause}. "
            f"To mend it: {self.mend}. To run without it: set {DENY}={self.name}"
        )


class Registry:
    """All plugins of this process and the dispatcher entries that lead to them."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self.strict = False
        self._libraries: dict[str, torch.library.Library] = {}
        self._foreign: set[tuple[str, str]] = set()
        self._noticed: set[str] = set()
        self._lock = threading.RLock()
        self._generation = 0

    def add(self, plugin: Plugin) -> None:
        """Take a plugin into the registry and route its devices' ops through it."""
        with self._lock:
            self.plugins.append(plugin)
            self._generation += 1
            if plugin.backend is not None:
                for device in plugin.backend.devices:
                    self._claim(device)

    def for_device(self, device: str) -> list[Plugin]:
        """Described plugins that claim the device type, best first."""
        claims = [p for p in self.plugins if p.backend is not None and device in p.backend.devices]
        return sorted(claims, key=lambda p: (-p.backend.priority if p.backend else 0, p.name))

    def warn(self, message: str) -> None:
        """Report a problem with a backend: a warning, or an error in strict mode."""
        if self.strict:
            raise BackendError(message)
        warnings.warn(message, BackendWarning, stacklevel=3)

    def check_version(self, backend: Backend) -> str | None:
        """Why the backend does not fit these op contracts, or ``None`` when it does."""
        lowest, highest = backend.op_api
        if lowest <= OP_API_VERSION <= highest:
            return None
        return (
            f"it was built for op API {lowest}"
            + (f" to {highest}" if highest != lowest else "")
            + f", this core has op API {OP_API_VERSION}"
        )

    def _claim(self, device: str) -> None:
        """Install the dispatcher entries of a device type, once."""
        if device in self._libraries:
            return
        key = dispatch_key(device)
        library = torch.library.Library(NAMESPACE, "IMPL", key)
        self._libraries[device] = library
        for op in OPS.values():
            if torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, key):
                # An upstream-style plugin registered it with torch already; torch keeps one kernel.
                self._foreign.add((op.name, device))
                continue
            library.impl(op.name, self._entry(op, device), key)

    def _entry(self, op: Op, device: str) -> Callable[..., Any]:
        chain: tuple[Kernel, ...] = ()
        seen = -1

        def entry(*args: Any, **kwargs: Any) -> Any:
            nonlocal chain, seen
            op.check(*args, **kwargs)
            if seen != self._generation:
                chain, seen = self._resolve(op, device), self._generation
            for kernel in chain:
                if kernel.accepts is None or kernel.accepts(*args, **kwargs):
                    return kernel.run(*args, **kwargs)
            return op.reference(*args, **kwargs)

        return entry

    def _resolve(self, op: Op, device: str) -> tuple[Kernel, ...]:
        chain: list[Kernel] = []
        owners: list[Plugin] = []
        for plugin in self.for_device(device):
            if plugin.status is Status.REGISTERED:
                availability = plugin.availability()
                if not availability.available:
                    self._note_unavailable(plugin, device, availability.reason)
                    continue
            kernel = plugin.kernels().get(op.name)
            if kernel is not None:
                chain.append(kernel)
                owners.append(plugin)
        self._report_conflict(op, device, owners)
        return tuple(chain)

    def _report_conflict(self, op: Op, device: str, owners: list[Plugin]) -> None:
        priorities = [plugin.backend.priority for plugin in owners if plugin.backend]
        if len(owners) < 2 or priorities[0] > priorities[1]:
            return
        names = " and ".join(repr(plugin.name) for plugin in owners[:2])
        self._notice_once(
            f"conflict {device} {owners[0].name} {owners[1].name}",
            f"backends {names} claim {op.name} on device {device!r} with the same priority; "
            f"{owners[0].name!r} is used. Set {DENY}={owners[1].name} to say which one you want",
        )

    def _note_unavailable(self, plugin: Plugin, device: str, reason: str) -> None:
        self._notice_once(
            f"unavailable {plugin.name}",
            f"backend {plugin.name!r} ({plugin.distribution} {plugin.version}) does not serve device {device!r} "
            f"here: {reason}. The slower PyTorch reference is used",
        )

    def note_reference(self, device: str) -> None:
        """Say once that a device has no backend and how to get one."""
        if device in self._noticed or device == "meta":
            return
        wheel = WHEELS.get(device)
        hint = f"pip install '{wheel}'" if wheel else "install a backend plugin for this device"
        self._noticed.add(device)
        warnings.warn(
            f"no bitsandbytes backend for device {device!r} is installed; the slower PyTorch reference is used. "
            f"For native kernels: {hint}",
            BackendWarning,
            stacklevel=4,
        )

    def _notice_once(self, key: str, message: str) -> None:
        if key not in self._noticed:
            self._noticed.add(key)
            self.warn(message)

    def coverage(self, plugin: Plugin) -> dict[str, str]:
        """For each op: ``native`` or ``reference`` under this plugin."""
        direct = {name for name, _key in plugin.direct_ops}
        native = direct if plugin.backend is None else set(plugin.kernels())
        return {name: "native" if name in native else "reference" for name in OPS}


def dispatch_key(device: str) -> str:
    """Name of torch's dispatch key for a device type."""
    return str(torch._C._dispatch_key_for_device(device))


#: The registry of this process.
REGISTRY = Registry()
