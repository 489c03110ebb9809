"""The CPU backend passes the conformance kit with the instruction set that it chose."""

from pathlib import Path

from bitsandbytes.testing import BackendSuite


class TestConformance(BackendSuite):
    device = "cpu"
    gaps = Path(__file__).with_name("gaps.txt")
