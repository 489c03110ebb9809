"""How the 8-bit, 32-bit and paged variants of a family are made from its one definition."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from bitsandbytes.errors import ArgumentError
from bitsandbytes.optim.settings import check_bits

Init = Callable[..., None]


class Storage:
    """Mixed into a family: what its variants fix about how states are stored."""

    #: Bits per element of state; ``None`` where the argument ``optim_bits`` says it.
    bits: int | None = None
    #: Whether states are paged; ``None`` where the argument ``is_paged`` says it.
    paged: bool | None = None

    def stored_bits(self, optim_bits: int) -> int:
        """Bits per element of state.

        Variants with a fixed number have had an ``optim_bits`` without effect, 32 by default; it is
        accepted with that value or the true one.
        """
        owner = type(self).__name__
        if self.bits is None:
            return check_bits(owner, optim_bits)
        if optim_bits not in (32, self.bits):
            raise ArgumentError(f"{owner}: optim_bits is {optim_bits!r}, but this class keeps {self.bits}-bit states")
        return self.bits

    def stored_paged(self, is_paged: bool) -> bool:
        """Whether states are paged."""
        return is_paged if self.paged is None else self.paged

    def refuse(self, **arguments: bool) -> None:
        """Raise for an argument whose value asks for something that the optimizer does not do."""
        for name, asked in arguments.items():
            if asked:
                raise UnsupportedArgumentError(f"{type(self).__name__} does not support {name}")


class UnsupportedArgumentError(ArgumentError, NotImplementedError):
    """An argument asks for something that the optimizer does not do."""


def reduced(init: Init, *without: str, **defaults: Any) -> Init:
    """The constructor of a family without some of its arguments, or with other defaults.

    Positional arguments keep the order of the remaining ones, as the variants have always had it.
    """
    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in inspect.signature(init).parameters.items()
        if name not in without
    ]
    signature = inspect.Signature(parameters)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}() {error}") from None
        bound.apply_defaults()
        init(**bound.arguments)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__
