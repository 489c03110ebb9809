"""What a backend plugin tells the core about itself.

A backend package declares an entry point in the group ``bitsandbytes.backends`` that resolves to a
:class:`Backend`. Importing the module that holds it must be cheap and must not load native code:
that happens in :attr:`Backend.load`, on the first call of an op on one of the backend's devices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bitsandbytes.backends.repeats import Repeats
from bitsandbytes.errors import ArgumentTypeError, BackendWarning


@dataclass(frozen=True)
class Availability:
    """Answer of a backend's probe: can it serve its devices here, and if not, why not."""

    available: bool
    #: One sentence for the person reading ``bnb plugins list``; for an unavailable backend it says
    #: what is missing and how to mend it.
    reason: str = ""


@dataclass(frozen=True)
class Kernel:
    """A backend's implementation of one op.

    The core has already run the contract's checks when it calls ``run``.
    """

    #: Name of the op in the contract, with overload: ``"quantize_4bit"``, ``"dequantize_4bit.out"``.
    op: str
    #: Same signature as the op.
    run: Callable[..., Any]
    #: Says, from the same arguments, whether this kernel takes the call; ``None`` means always. A
    #: call that no kernel takes goes to the reference implementation.
    accepts: Callable[..., bool] | None = None
    #: Prepares repeated calls that differ in their first argument alone: called with the others, it
    #: returns a function of the first, or ``None`` where it cannot. The core has run the checks with
    #: one first argument and calls the function with others of the same dtype, device and last size,
    #: as long as the frozen tensors live at the same addresses; it must not keep them alive itself. For a
    #: first argument that it leaves to the op it returns ``None``.
    #: For a step of many parameters (``optimizer_step_*``) it is another thing: called with the name of the
    #: rule, the gradients, the parameters and their dicts of states, for which the op has just been called,
    #: it returns a :class:`bitsandbytes.backends.bound.BoundStep`, or ``None``.
    bind: Callable[..., Any] | None = None
    #: Takes calls that are like one that this kernel has served, before the checks; only where :attr:`accepts` is
    #: ``None`` and the op has one tensor as its result. See :func:`bitsandbytes.backends.repeats.native_repeats`.
    repeats: Repeats | None = None

    def __post_init__(self) -> None:
        _expect(self, "op", isinstance(self.op, str), "the name of an op")
        _expect(self, "run", callable(self.run), "a callable")
        _expect(self, "accepts", self.accepts is None or callable(self.accepts), "a callable or None")
        _expect(self, "bind", self.bind is None or callable(self.bind), "a callable or None")
        _expect(self, "repeats", self.repeats is None or isinstance(self.repeats, Repeats), "Repeats or None")


@dataclass(frozen=True)
class Backend:
    """Description of a backend, the value of its entry point.

    Raises:
        ArgumentTypeError: a field has the wrong type; the text names it.
    """

    #: Short name that ``BNB_BACKENDS`` and the CLI use, equal to the name of the entry point.
    name: str
    #: Version of the backend's own distribution.
    version: str
    #: Device types of torch that the kernels serve: ``("cuda",)``.
    devices: tuple[str, ...]
    #: Lowest and highest version of the op contracts (``bitsandbytes.contract.OP_API_VERSION``)
    #: that the kernels were built for, both inclusive.
    op_api: tuple[int, int]
    #: Cheap test without native code: the right hardware, driver and build of torch.
    probe: Callable[[], Availability]
    #: Loads the native code and returns the kernels. Called once, on first use.
    load: Callable[[], Iterable[Kernel]]
    #: Where two backends serve one op on one device, the higher priority is asked first.
    priority: int = 0
    #: What to run when the probe or the load fails.
    install_hint: str = ""
    #: Returns the ``ctypes`` library behind ``bitsandbytes.functional.lib``, for the few callers
    #: that bind upstream's C symbols directly.
    ctypes_library: Callable[[], Any] | None = None
    #: Whether ``gemm_4bit`` runs without materialising the dequantized weight, from device index,
    #: dtype, rows of the input, rows and columns of the weight. A few callers choose their own path
    #: by it, through ``bitsandbytes.backends.cuda.ops``.
    fuses_gemm_4bit: Callable[[int, torch.dtype, int, int, int], bool] | None = None

    def __post_init__(self) -> None:
        _expect(self, "name", isinstance(self.name, str) and self.name, "a short name")
        _expect(self, "version", isinstance(self.version, str), "a version string")
        # A bare string is a sequence of one-letter devices, the mistake that this is for.
        devices = self.devices if isinstance(self.devices, tuple) else ()
        _expect(self, "devices", devices and all(isinstance(d, str) for d in devices), "a tuple like ('cuda',)")
        bounds = self.op_api if isinstance(self.op_api, tuple) else ()
        _expect(self, "op_api", len(bounds) == 2 and all(isinstance(n, int) for n in bounds), "a tuple like (1, 1)")
        _expect(self, "probe", callable(self.probe), "a callable")
        _expect(self, "load", callable(self.load), "a callable")
        _expect(self, "priority", isinstance(self.priority, int), "an integer")

    def __call__(self) -> None:
        """Warn that another distribution has written over this package.

        Only the loader of upstream's package calls the value of an entry point that is a description:
        ``bitsandbytes/__init__.py`` is not that of ``bnb-core`` any more.
        """
        warnings.warn(
            f"backend {self.name!r} is not used: another distribution has written its files over the package "
            "`bitsandbytes` of bnb-core. To mend it: pip uninstall bitsandbytes && "
            "pip install --force-reinstall --no-deps bnb-core. To see the files: bnb doctor",
            BackendWarning,
            stacklevel=2,
        )


def _expect(description: Backend | Kernel, field: str, condition: Any, expected: str) -> None:
    if not condition:
        value = getattr(description, field)
        raise ArgumentTypeError(f"{type(description).__name__}.{field} is {value!r}, expected {expected}")
