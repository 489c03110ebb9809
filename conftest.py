"""What the tests of all packages share."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs two GPUs where there are fewer."""
    if torch.cuda.device_count() < 2:
        for item in items:
            if item.get_closest_marker("multigpu"):
                item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
