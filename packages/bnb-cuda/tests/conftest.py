"""Tests of the CUDA backend: those marked ``gpu`` need a GPU and the built module, and say so where they skip."""

from __future__ import annotations

import pytest


def missing() -> str | None:
    """Why the kernels cannot run here, or ``None``."""
    import bnb_cuda

    availability = bnb_cuda.probe()
    return None if availability.available else availability.reason


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and the built module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
