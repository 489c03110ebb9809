"""Who serves which op on which device.

The registry owns one dispatcher entry per op and device type that some backend claims. Backends are
probed and loaded on the first call that needs them, never at import.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bitsandbytes.backends.description import Kernel
from bitsandbytes.backends.dispatch import Entry
from bitsandbytes.backends.plugin import FAILED, WHEELS, Plugin, Status, devices_by_name, dispatch_key
from bitsandbytes.backends.settings import DENY, Settings
from bitsandbytes.backends.warning import warn_user
from bitsandbytes.contract import NAMESPACE, OPS, Op
from bitsandbytes.errors import BackendError

__all__ = ["REGISTRY", "WHEELS", "Plugin", "Registry", "Status"]


class Registry:
    """All plugins of this process and the dispatcher entries that lead to them."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self.settings = Settings(allow=None, deny=frozenset(), strict=False)
        #: Kernels that were registered with torch directly before a described backend claimed their
        #: device; torch keeps the first: ``(op, device type)``.
        self.foreign_ops: set[tuple[str, str]] = set()
        #: Every problem that was reported, in order.
        self.reports: list[str] = []
        #: Changes whenever other kernels may serve.
        self.generation = 0
        self._libraries: dict[str, torch.library.Library] = {}
        self._entries: dict[tuple[str, str], Entry] = {}
        self._serving: dict[str, list[Plugin]] = {}
        self._noticed: set[str] = set()
        self._on_reference: set[str] = set()
        self._lock = threading.RLock()

    # --- plugins ----------------------------------------------------------------------------------

    def add(self, plugin: Plugin) -> None:
        """Take a plugin into the registry and route its devices' ops through it."""
        with self._lock:
            self.plugins.append(plugin)
            self._admit(plugin)

    def settle(self) -> bool:
        """Load the plugins whose modules were still being imported when the core loaded.

        Returns whether there was one.
        """
        pending = [plugin for plugin in self.plugins if plugin.status is Status.PENDING]
        for plugin in pending:
            plugin.settle()
        settled = [plugin for plugin in pending if plugin.status is not Status.PENDING]
        with self._lock:
            for plugin in settled:
                self._admit(plugin)
        return bool(settled)

    def for_device(self, device: str) -> list[Plugin]:
        """Plugins that claim the device type, those that failed included; best first.

        Upstream-style plugins are not among them: torch calls their kernels directly.
        """
        claims = [p for p in self.plugins if p.status in (*FAILED, Status.REGISTERED) and device in p.devices]
        return sorted(claims, key=lambda p: (-p.backend.priority if p.backend else 0, p.name))

    def coverage(self, plugin: Plugin) -> dict[str, str]:
        """For each op: ``native`` or ``reference`` under this plugin; loads its kernels.

        Raises:
            BackendError: the plugin is broken or incompatible.
        """
        native = {name for name, _device in plugin.direct_ops}
        if plugin.backend is not None:
            native |= plugin.kernels().keys()
        return {name: "native" if name in native else "reference" for name in OPS}

    def entry(self, op: str, device: str) -> Callable[..., Any] | None:
        """What torch would call for an op on a device type, ``None`` where the reference serves it.

        For callers who know that nothing traces or intercepts the call, this saves torch's
        dispatch. Arguments are positional, as in the schema.
        """
        found = self._entries.get((op, device))
        return None if found is None else found.call

    def bind(self, op: str, first: torch.Tensor, *frozen: Any) -> Callable[[torch.Tensor], Any] | None:
        """A function of an op's first argument that calls the kernel with the others as they are now.

        For callers who know that nothing traces or intercepts the call, and who keep the frozen tensors
        where they are. ``None`` where the op is not served by a kernel that offers this.

        Raises:
            ArgumentError: the arguments break the contract.
        """
        binder = self.binder(op, first.device.type)
        if binder is None:
            return None
        OPS[op].check(first, *frozen)
        return binder(*frozen)

    def binder(self, op: str, device: str) -> Callable[..., Any] | None:
        """:attr:`Kernel.bind` of the kernel that serves every call of an op on a device type, if it has one."""
        if (op, device) not in self._entries:
            return None
        kernel = next(iter(self._kernels(OPS[op], device)), None)
        return None if kernel is None or kernel.accepts is not None else kernel.bind

    def verify(self) -> None:
        """Probe and load every backend now, so that every problem is reported now.

        Raises:
            BackendError: in strict mode, on the first problem.
        """
        self.settle()
        for device in list(self._libraries):
            with self._lock:
                self._plugins_serving(device, may_raise=False)
        for plugin in self.plugins:
            if plugin.status in FAILED:
                self.report_failure(plugin)

    # --- reports ----------------------------------------------------------------------------------

    def warn(self, message: str) -> None:
        """Report a problem with a backend: a warning, or an error in strict mode."""
        self.reports.append(message)
        if self.settings.strict:
            raise BackendError(message)
        warn_user(message)

    def report_failure(self, plugin: Plugin) -> None:
        """Report once that a plugin failed."""
        self._warn_once(f"failure {plugin.name}", plugin.describe_failure())

    def before_reference(self, device: str) -> bool:
        """Told by the contract of every call for which no backend has claimed the device.

        Returns whether a backend has claimed it now, so that the call has to be dispatched again: a
        plugin was pending, or an extension has added the device to torch since the core loaded.
        """
        if device in self._on_reference:
            return False
        if self.settle():
            return True
        with self._lock:
            if device not in self._libraries and self.for_device(device):
                return self._claim(device)
            if all(plugin.status is not Status.PENDING for plugin in self.plugins):
                self._on_reference.add(device)
                self._note_reference(device)
        return False

    # --- routing ----------------------------------------------------------------------------------

    def _admit(self, plugin: Plugin) -> None:
        self.generation += 1
        self._on_reference.clear()
        self._serving.clear()
        for entry in self._entries.values():
            entry.reset()
        if plugin.status is Status.REGISTERED or plugin.status in FAILED:
            for device in plugin.devices:
                self._claim(device)
        if plugin.status in FAILED:
            self.report_failure(plugin)

    def _claim(self, device: str) -> bool:
        """Install the dispatcher entries of a device type; ``False`` when torch does not know it yet."""
        key = dispatch_key(device)
        if device in self._libraries or key is None:
            return device in self._libraries
        library = torch.library.Library(NAMESPACE, "IMPL", key)
        self._libraries[device] = library
        foreign = []
        for op in OPS.values():
            if torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, key):
                foreign.append(op.name)
                continue
            entry = Entry(op, lambda op=op: self._kernels(op, device), self._lock)  # type: ignore[misc]
            self._entries[op.name, device] = entry
            library.impl(op.name, entry.call, key)
        self.foreign_ops |= {(name, device) for name in foreign}
        self._report_foreign(foreign, device)
        return True

    def _kernels(self, op: Op, device: str) -> Iterable[Kernel]:
        self.settle()
        kernels = [plugin.kernels().get(op.name) for plugin in self._plugins_serving(device)]
        return [kernel for kernel in kernels if kernel is not None]

    def _plugins_serving(self, device: str, may_raise: bool = True) -> list[Plugin]:
        """The backends that serve a device type here, loaded, best first.

        Raises:
            BackendError: none does, and one that ought to is broken or incompatible.
        """
        if device in self._serving:
            return self._serving[device]
        serving, declined, blocked = [], [], []
        for plugin in self.for_device(device):
            if plugin.availability().available and _loads(plugin):
                serving.append(plugin)
            elif plugin.blocks():
                blocked.append(plugin)
            elif plugin.status is Status.REGISTERED:
                declined.append(plugin)
        if not serving:
            if blocked and may_raise:
                raise blocked[0].failure()
            for plugin in declined if not blocked else ():
                self._note_unavailable(plugin, device)
        for plugin in blocked:
            self.report_failure(plugin)
        self._report_conflicts(serving, device)
        if serving or not blocked:
            self._serving[device] = serving
        return serving

    def _report_conflicts(self, serving: list[Plugin], device: str) -> None:
        """Report backends with the same priority that both have kernels for an op on a device."""
        for first, second in itertools.pairwise(serving):
            shared = sorted(first.kernels().keys() & second.kernels().keys())
            if shared and first.backend and second.backend and first.backend.priority == second.backend.priority:
                self._warn_once(
                    f"conflict {device} {first.name} {second.name}",
                    f"backends {first.name!r} and {second.name!r} both serve {_listed(shared)} on device {device!r} "
                    f"with the same priority; {first.name!r} is used. Set {DENY}={second.name} or "
                    f"{DENY}={first.name} to say which one you want",
                )

    def _report_foreign(self, ops: list[str], device: str) -> None:
        claimed = [plugin.name for plugin in self.for_device(device) if plugin.status is Status.REGISTERED]
        if not ops or not claimed:
            return
        owners = [p.name for p in self.plugins if any((op, device) in p.direct_ops for op in ops)]
        owner = f"backend {owners[0]!r}" if owners else "code outside any backend plugin"
        mend = f"set {DENY}={owners[0]} or {DENY}={claimed[0]}" if owners else f"set {DENY}={claimed[0]}"
        self._warn_once(
            f"foreign {device}",
            f"{owner} has registered kernels for {_listed(ops)} on device {device!r} with torch directly; those of "
            f"backend {claimed[0]!r} are not used for them. To say which one you want, {mend}",
        )

    def _note_unavailable(self, plugin: Plugin, device: str) -> None:
        self._warn_once(
            f"unavailable {plugin.name} {device}",
            f"backend {plugin.name!r} ({plugin.distribution} {plugin.version}) does not serve device {device!r} "
            f"here: {plugin.availability().reason.rstrip('. ')}. The slower PyTorch reference is used",
        )

    def _note_reference(self, device: str) -> None:
        """Say once that a device has no backend and how to get one.

        Whoever named the backends to load, or switched off the one for this device, asked for the
        reference and is not told.
        """
        switched_off = any(device in devices_by_name(name) for name in self.settings.deny)
        if device == "meta" or self.settings.allow is not None or switched_off:
            return
        direct = [p for p in self.plugins if p.status is Status.CALLED and device in p.devices]
        if direct:
            message = (
                f"backend {direct[0].name!r} has kernels for {len(direct[0].direct_ops)} of {len(OPS)} ops on device "
                f"{device!r}; the slower PyTorch reference serves the others"
            )
        else:
            wheel = WHEELS.get(device)
            hint = f"pip install {wheel!r}" if wheel else "install a backend plugin for this device"
            message = (
                f"no bitsandbytes backend for device {device!r} is installed; the slower PyTorch reference is used. "
                f"For native kernels: {hint}"
            )
        if f"reference {device}" not in self._noticed:
            self._noticed.add(f"reference {device}")
            warn_user(message)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._noticed:
            # In strict mode it is raised each time that it is met.
            if not self.settings.strict:
                self._noticed.add(key)
            self.warn(message)


def _loads(plugin: Plugin) -> bool:
    try:
        plugin.kernels()
    except BackendError:
        return False
    return True


def _listed(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more ops"


#: The registry of this process.
REGISTRY = Registry()
