"""The conformance kit on the simulated device."""

from pathlib import Path

import torch_mydev  # noqa: F401  (names the device for versions of torch that do not load extensions)

from bitsandbytes.testing import BackendSuite


class TestConformance(BackendSuite):
    device = "mydev"
    gaps = Path(__file__).with_name("gaps.txt")
