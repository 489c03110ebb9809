"""The reference implementations pass the conformance kit, with truth in float64 where it is not exact."""

from bitsandbytes.testing import BackendSuite


class TestReference(BackendSuite):
    device = "cpu"
