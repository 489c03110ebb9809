"""One installed plugin and what became of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from bitsandbytes.backends.description import Availability, Backend, Kernel
from bitsandbytes.backends.settings import DENY
from bitsandbytes.contract import OP_API_VERSION, OPS
from bitsandbytes.errors import BackendError

#: Wheels of this project by the torch device type that they serve, for hints.
WHEELS = {
    "cpu": "bnb-core[cpu]",
    # Both vendors' GPUs are "cuda" to torch; a build of torch knows only one of them.
    "cuda": "bnb-core[cuda]" if torch.version.hip is None else "bnb-core[rocm]",
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
    #: Its module was itself being imported when the core loaded; it is loaded on the first use.
    PENDING = "pending"
    #: Not loaded because of an environment variable.
    SKIPPED = "skipped"
    #: Built for another version of the op contracts.
    INCOMPATIBLE = "incompatible"
    #: Its import, entry, probe or load raised.
    BROKEN = "broken"


FAILED = (Status.BROKEN, Status.INCOMPATIBLE)


@dataclass(eq=False)
class Plugin:
    """An installed plugin, its description and its state."""

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
    #: How long its import took, which every ``import bitsandbytes`` waits for.
    import_seconds: float = 0.0
    #: Ops that an upstream-style plugin registered directly with torch: ``(op, device type)``.
    direct_ops: tuple[tuple[str, str], ...] = ()
    #: Names of kernels that fit no op of this core, and are therefore never called.
    unknown_ops: tuple[str, ...] = ()
    #: Tries again to load a pending plugin.
    retry: Callable[[], None] | None = field(default=None, repr=False)
    _kernels: dict[str, Kernel] | None = field(default=None, repr=False)
    _probed: bool = field(default=False, repr=False)
    _availability: Availability | None = field(default=None, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def devices(self) -> tuple[str, ...]:
        """Device types that the plugin serves, as far as they can be known.

        A plugin that was not imported describes nothing; its name is then the only evidence.
        """
        if self.backend is not None:
            return self.backend.devices
        if self.direct_ops:
            return tuple(sorted({device for _op, device in self.direct_ops}))
        return () if self.status is Status.CALLED else devices_by_name(self.name)

    def availability(self) -> Availability:
        """Whether the plugin can serve its devices here; the probe is asked once.

        A probe that raises makes the plugin broken.
        """
        if self.status is Status.CALLED:
            return Availability(True)
        if self.status is not Status.REGISTERED or self.backend is None:
            return Availability(False, self.cause)
        return self._probe(self.backend) or Availability(False, self.cause)

    def blocks(self) -> bool:
        """Whether the plugin ought to serve its devices here but failed.

        A plugin that failed, but whose probe says that it is not meant for this machine, is nobody's
        concern: an outdated ``rocm`` must not stop the work on an NVIDIA GPU.
        """
        if self.status not in FAILED:
            return False
        answer = self._probe(self.backend) if self.backend is not None else None
        return answer is None or answer.available

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

    def watch(self, called: Callable[[str], None]) -> None:
        """Have a function told the name of an op whenever this plugin's kernel for it runs.

        It works for calls whose kernels have not been looked up yet: the conformance run asks for it
        before anything else.

        Raises:
            BackendError: the plugin is broken or incompatible.
        """
        self._kernels = {name: _watched(kernel, called) for name, kernel in self.kernels().items()}

    def settle(self) -> None:
        """Load a plugin that was pending, if its module has been imported in the meantime."""
        with self._lock:
            if self.status is Status.PENDING and self.retry is not None:
                self.retry()

    def fail(self, status: Status, cause: str, error: BaseException | None = None, mend: str = "") -> None:
        """Record why the plugin cannot be used and what mends it."""
        self.status, self.cause, self.error = status, cause, error
        hint = self.backend.install_hint if self.backend else ""
        self.mend = mend or hint or f"pip install --upgrade --force-reinstall --no-deps {self.distribution}"

    def failure(self) -> BackendError:
        """The error to raise where the plugin would have to serve a call."""
        error = BackendError(self.describe_failure())
        error.__cause__ = self.error
        return error

    def describe_failure(self) -> str:
        """One sentence with name, version, cause and mend."""
        return (
            f"backend {self.name!r} ({self.distribution} {self.version}) is {self.status.value}: "
            f"{self.cause.rstrip('. ')}. To mend it: {self.mend}. To run without it: set {DENY}={self.name}"
        )

    def _probe(self, backend: Backend) -> Availability | None:
        """The probe's answer; ``None`` when it has none and the plugin is broken for it."""
        with self._lock:
            if not self._probed:
                self._probed = True
                try:
                    answer = backend.probe()
                    if not isinstance(answer, Availability):
                        raise TypeError(f"it returned {answer!r}, expected an Availability")
                    self._availability = answer
                except KeyboardInterrupt:
                    self._probed = False
                    raise
                # A probe may call sys.exit when its runtime is missing; that must not end the user's program.
                except BaseException as error:
                    if self.status not in FAILED:
                        self.fail(Status.BROKEN, f"its probe raised {describe_exception(error)}", error)
            return self._availability

    def _load(self) -> dict[str, Kernel]:
        if self.status is Status.REGISTERED and self.backend is not None:
            try:
                return self._by_op(tuple(self.backend.load()))
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self.fail(Status.BROKEN, f"loading its kernels raised {describe_exception(error)}", error)
        raise self.failure()

    def _by_op(self, kernels: tuple[Kernel, ...]) -> dict[str, Kernel]:
        by_op: dict[str, Kernel] = {}
        for kernel in kernels:
            if not isinstance(kernel, Kernel):
                raise TypeError(f"it returned {kernel!r}, expected a Kernel")
            if by_op.setdefault(kernel.op, kernel) is not kernel:
                raise ValueError(f"it returned two kernels for {kernel.op!r}")
        self.unknown_ops = tuple(sorted(by_op.keys() - OPS.keys()))
        return {name: kernel for name, kernel in by_op.items() if name in OPS}


def _watched(kernel: Kernel, called: Callable[[str], None]) -> Kernel:
    def run(*args: Any, **kwargs: Any) -> Any:
        called(kernel.op)
        return kernel.run(*args, **kwargs)

    return replace(kernel, run=run, repeats=None)


def refuse_other_api(plugin: Plugin, backend: Backend) -> None:
    """Mark a plugin as incompatible whose kernels were not built for these op contracts."""
    lowest, highest = backend.op_api
    if lowest <= OP_API_VERSION <= highest:
        return
    built_for = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
    older = plugin.distribution if highest < OP_API_VERSION else "bnb-core"
    plugin.fail(
        Status.INCOMPATIBLE,
        f"it was built for op API {built_for}, this core has op API {OP_API_VERSION}",
        mend=f"pip install --upgrade {older}",
    )


def dispatch_key(device: str) -> str | None:
    """Name of torch's dispatch key for a device type, ``None`` when torch does not know the type.

    A type that an extension adds to torch is known once the extension has given it its name.
    """
    if device == torch._C._get_privateuse1_backend_name():
        return "PrivateUse1"
    try:
        return str(torch._C._dispatch_key_for_device(device))
    except RuntimeError:
        return None


def describe_exception(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def devices_by_name(name: str) -> tuple[str, ...]:
    """Device types that a backend with this name can be expected to serve in this build of torch."""
    if name in ("cuda", "rocm"):
        return ("cuda",) if (name == "rocm") == (torch.version.hip is not None) else ()
    return (name,) if name in WHEELS else ()
