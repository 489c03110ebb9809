"""One op, one contract.

An op is defined once, with :func:`define_op`: its schema, the check of its arguments, the shapes
and dtypes of its results, its reference implementation in PyTorch and its documentation. From that
single definition follow

* ``torch.ops.bitsandbytes.<op>`` and its fake (meta) implementation for ``torch.compile``,
* the fallback that serves every device without a native kernel,
* the ``.out`` overload, where the op has one,
* the check that runs before *every* implementation, so that backends validate nothing again.

The reference is the oracle that native kernels are compared with; it favours clarity over speed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bitsandbytes.errors import ArgumentError, ArgumentTypeError

NAMESPACE = "bitsandbytes"

#: Version of the set of op contracts. A backend states the range of versions it was built for; an
#: incompatible change of any contract raises this number.
OP_API_VERSION = 1

_library = torch.library.Library(NAMESPACE, "DEF")


class TensorSpec(NamedTuple):
    """Shape and dtype of one result of an op; the device is that of the op's first tensor."""

    shape: Sequence[int]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Op:
    """The contract of one op (or of one overload of it)."""

    #: Name inside the namespace, with the overload: ``"dequantize_4bit"``, ``"dequantize_4bit.out"``.
    name: str
    #: Schema text as given to torch, beginning with :attr:`name`.
    schema: str
    #: Raises :class:`ArgumentError` when the arguments break the contract. Same signature as the op.
    check: Callable[..., None]
    #: PyTorch implementation that runs on every device. Same signature as the op.
    reference: Callable[..., Any]
    #: Shape and dtype inference on fake tensors. Same signature as the op.
    fake: Callable[..., Any]
    #: Specs of the results, where they follow from the arguments alone.
    outputs: Callable[..., tuple[TensorSpec, ...]] | None

    @property
    def qualname(self) -> str:
        """Name with the namespace, as torch's registration functions take it."""
        return f"{NAMESPACE}::{self.name}"

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable torch op."""
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")

    @property
    def doc(self) -> str:
        """Documentation of the op: shapes, dtypes, errors and formula."""
        return inspect.cleandoc(self.reference.__doc__ or "")

    def checked_reference(self, *args: Any, **kwargs: Any) -> Any:
        """Run the check, then the reference."""
        self.check(*args, **kwargs)
        return self.reference(*args, **kwargs)


#: Every op by :attr:`Op.name`, in order of definition.
OPS: dict[str, Op] = {}

#: Called with the device type of the first tensor when a call lands on the reference because no
#: backend has claimed its device; says whether one has claimed it now, so that the call has to be
#: dispatched again. The backend registry puts its one-time notice here.
_reference_notice: Callable[[str], bool] | None = None


def set_reference_notice(notice: Callable[[str], bool] | None) -> None:
    """Install the function that is told about calls which no backend serves."""
    global _reference_notice
    _reference_notice = notice


def define_op(
    schema: str,
    *,
    check: Callable[..., None],
    outputs: Callable[..., tuple[TensorSpec, ...]] | None = None,
    fake: Callable[..., Any] | None = None,
    out_overload: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an op from its schema and the decorated reference implementation.

    Args:
        schema: ``"name(Tensor A, ...) -> ..."`` in torch's schema language.
        check: validates the arguments; it sees exactly what the implementation will see.
        outputs: specs of the results. The fake implementation and the check of ``out`` follow from
            it. An op that only mutates its arguments has none.
        fake: replaces the derived fake implementation where a shape depends on data.
        out_overload: also define ``name.out``, which writes a single result into ``out``.
    """

    def decorate(reference: Callable[..., Any]) -> Callable[..., Any]:
        _register(schema, check, reference, outputs, fake or _fake_from_outputs(outputs))
        if out_overload:
            if outputs is None:
                raise TypeError(f"{schema}: an .out overload needs `outputs`")
            _register_out_overload(schema, check, reference, outputs)
        return reference

    return decorate


def _register(
    schema: str,
    check: Callable[..., None],
    reference: Callable[..., Any],
    outputs: Callable[..., tuple[TensorSpec, ...]] | None,
    fake: Callable[..., Any],
) -> None:
    name = schema.partition("(")[0].strip()
    checked_fake = _with_check(check, fake)
    op = Op(name, schema, check, reference, checked_fake, outputs)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(op.qualname, checked_fake, lib=_library)
    _library.impl(name, _reference_entry(op), "CompositeExplicitAutograd")
    OPS[name] = op


def _register_out_overload(
    schema: str,
    check: Callable[..., None],
    reference: Callable[..., Any],
    outputs: Callable[..., tuple[TensorSpec, ...]],
) -> None:
    head, _, tail = schema.partition("(")
    arguments = tail.rpartition(") ->")[0]
    name = head.strip()

    def check_out(*args: Any, out: torch.Tensor) -> None:
        check(*args)
        (spec,) = outputs(*args)
        check_result_buffer(name, "out", out, spec, args[0].device)

    def reference_out(*args: Any, out: torch.Tensor) -> None:
        out.copy_(reference(*args))

    def fake_out(*args: Any, out: torch.Tensor) -> None:
        return None

    # Positional as upstream has it: callers pass `out` last without naming it.
    def positional(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "out" in kwargs:
                return function(*args, **kwargs)
            return function(*args[:-1], out=args[-1], **kwargs)

        return call

    reference_out.__doc__ = f"Like ``{name}``, writing the result into ``out``."
    _register(
        f"{name}.out({arguments}, Tensor(a!) out) -> ()",
        positional(check_out),
        positional(reference_out),
        None,
        positional(fake_out),
    )


def _with_check(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return checked


def _reference_entry(op: Op) -> Callable[..., Any]:
    """What torch calls for a device on which no backend has claimed the op."""

    @functools.wraps(op.reference)
    def entry(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(op, args)
        if device is not None and _reference_notice is not None and _reference_notice(device):
            return op.overload(*args, **kwargs)
        return op.checked_reference(*args, **kwargs)

    return entry


def _device_of(op: Op, args: tuple[Any, ...]) -> str | None:
    """Device type of the first tensor of a call; an empty list of tensors has none."""
    argument = args[_first_tensor_index(op)]
    if isinstance(argument, torch.Tensor):
        return argument.device.type
    return argument[0].device.type if argument else None


@functools.cache
def _first_tensor_index(op: Op) -> int:
    arguments = op.overload._schema.arguments
    return next(i for i, argument in enumerate(arguments) if str(argument.type) in ("Tensor", "List[Tensor]"))


def _fake_from_outputs(outputs: Callable[..., tuple[TensorSpec, ...]] | None) -> Callable[..., Any]:
    def fake(*args: Any, **kwargs: Any) -> Any:
        if outputs is None:
            return None
        device = next(argument for argument in args if isinstance(argument, torch.Tensor)).device
        results = tuple(torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in outputs(*args, **kwargs))
        return results if len(results) > 1 else results[0]

    return fake


# --- checks shared by the contracts -------------------------------------------------------------


def check_dtype(op: str, name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise unless ``tensor`` has one of the ``allowed`` dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise ArgumentTypeError(
            f"bitsandbytes::{op}: {name} has dtype {tensor.dtype} on device {tensor.device}; allowed: {names}"
        )


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise unless all given tensors live on one device."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ArgumentError(
                f"bitsandbytes::{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
                f"move all arguments to one device"
            )


def check_that(op: str, condition: Any, message: Callable[[], str]) -> None:
    """Raise with ``message()`` unless ``condition`` holds; the text is built only on failure."""
    if not condition:
        raise ArgumentError(f"bitsandbytes::{op}: {message()}")


def check_result_buffer(op: str, name: str, out: torch.Tensor, spec: TensorSpec, device: torch.device) -> None:
    """Raise unless ``out`` can take a result described by ``spec`` on ``device``."""
    if out.dtype != spec.dtype:
        raise ArgumentTypeError(f"bitsandbytes::{op}: {name} has dtype {out.dtype}, expected {spec.dtype}")
    if tuple(out.shape) != tuple(spec.shape):
        raise ArgumentError(f"bitsandbytes::{op}: {name} has shape {tuple(out.shape)}, expected {tuple(spec.shape)}")
    if out.device != device:
        raise ArgumentError(f"bitsandbytes::{op}: {name} is on {out.device}, expected {device}")
