"""The conformance kit of the core on a GPU."""

from __future__ import annotations

import pytest

from bitsandbytes.testing import BackendSuite


@pytest.mark.gpu
class TestConformance(BackendSuite):
    device = "cuda"
