"""The checks that every backend passes, for pytest. See :mod:`bitsandbytes.testing` for how to use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bitsandbytes.testing.checks import CHECKS
from bitsandbytes.testing.device import DeviceUnderTest
from bitsandbytes.testing.gaps import Gaps, Outcome, run_check


def check_test(name: str) -> Callable[..., None]:
    """The pytest function of one check, with one parameter set for each of its items."""
    check = CHECKS[name]

    def test(self: BackendSuite, item: Any) -> None:
        result = run_check(check, self, item, Gaps.read(self.gaps))
        if result.outcome is Outcome.GAP:
            pytest.xfail(result.text)
        if result.error is not None:
            raise result.error
        if result.outcome is Outcome.STALE_GAP:
            pytest.fail(f"{self.gaps}: {result.text}", pytrace=False)

    test.__doc__ = check.run.__doc__
    test.__name__ = f"test_{name}"
    ids = [f"{item.op}-{item.id}" for item in check.items]
    marked: Callable[..., None] = pytest.mark.parametrize("item", check.items, ids=ids)(test)
    return marked


class BackendSuite(DeviceUnderTest):
    """Conformance of one device. Subclass it and set :attr:`device`."""

    #: File of declared gaps, see :mod:`bitsandbytes.testing.gaps`.
    gaps: ClassVar[Path | None] = None

    test_values = check_test("values")
    test_strided = check_test("strided")
    test_arguments_untouched = check_test("arguments_untouched")
    test_deterministic = check_test("deterministic")
    test_out_overload = check_test("out_overload")
    test_opcheck = check_test("opcheck")
    test_compiles = check_test("compiles")
    test_refuses = check_test("refuses")
    test_round_trip = check_test("round_trip")
