"""Exceptions and warnings raised by bitsandbytes.

Historical callers catch ``ValueError`` in some places and ``RuntimeError`` (torch's own check
failures) in others for the same mistake, so an argument error is both.
"""


class ArgumentError(ValueError, RuntimeError):
    """An argument has a value, shape, layout or device that the contract of the op forbids."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a dtype or a Python type that the contract of the op forbids."""


class BackendError(RuntimeError):
    """The backend that should serve a device is broken, incompatible or in conflict with another."""


class BackendWarning(UserWarning):
    """A backend plugin was skipped, is unavailable, or lost its op to another one."""


class CheckpointError(ValueError):
    """A checkpoint, or the description of a quantized tensor inside it, is damaged or hostile."""
