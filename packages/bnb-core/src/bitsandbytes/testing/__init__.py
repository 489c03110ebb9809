"""Conformance kit for backends.

A backend's test module subclasses :class:`BackendSuite`, names its device, and every op is checked::

    from pathlib import Path
    from bitsandbytes.testing import BackendSuite

    class TestConformance(BackendSuite):
        device = "mydevice"
        gaps = Path(__file__).with_name("gaps.txt")

It needs pytest, which core itself does not depend on.
"""

from bitsandbytes.testing.case import Case
from bitsandbytes.testing.cases import all_cases
from bitsandbytes.testing.gaps import Gaps
from bitsandbytes.testing.suite import BackendSuite

__all__ = ["BackendSuite", "Case", "Gaps", "all_cases"]
