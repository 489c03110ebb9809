"""Conformance kit for backends.

A backend's test module subclasses :class:`BackendSuite`, names its device, and every op is checked::

    from pathlib import Path
    from bitsandbytes.testing import BackendSuite

    class TestConformance(BackendSuite):
        device = "mydevice"
        gaps = Path(__file__).with_name("gaps.txt")

That needs pytest, which the core does not depend on; ``bnb plugins check NAME`` runs the same checks
without it.
"""

from typing import TYPE_CHECKING, Any

from bitsandbytes.testing.case import Case
from bitsandbytes.testing.cases import all_cases
from bitsandbytes.testing.gaps import Gaps

if TYPE_CHECKING:
    from bitsandbytes.testing.suite import BackendSuite

__all__ = ["BackendSuite", "Case", "Gaps", "all_cases"]


def __getattr__(name: str) -> Any:
    # ``bnb plugins check`` runs the checks without pytest.
    if name == "BackendSuite":
        from bitsandbytes.testing.suite import BackendSuite

        return BackendSuite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
