"""The judge of the conformance kit accepts the reference's step and rejects small mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitsandbytes.contract import OPS
from bitsandbytes.testing.optim_cases import SETTINGS, step_case

SKIP_ZEROS = next(setting for setting in SETTINGS if setting.skip_zeros)
PLAIN = SETTINGS[0]


def wrong_parameter(arguments: Any) -> None:
    arguments[2][0][17] += 2e-5


def wrong_gradient(arguments: Any) -> None:
    arguments[1][0][17] += 1.0


def wrong_state(arguments: Any) -> None:
    arguments[3][0][17] += 2 if arguments[3][0].dtype == torch.uint8 else 1e-4


def shifted_codes(arguments: Any) -> None:
    arguments[3][0][::10] += 1


def wrong_absmax(arguments: Any) -> None:
    arguments[7][0][3] *= 1.001


def written_codebook(arguments: Any) -> None:
    arguments[5][3] += 1e-6


def idle_block_touched(arguments: Any) -> None:
    # All gradients of the third block are zero.
    arguments[3][0][600] += 1


FAULTS = [
    (PLAIN, False, wrong_parameter),
    (PLAIN, False, wrong_gradient),
    (PLAIN, False, wrong_state),
    (PLAIN, True, wrong_parameter),
    (PLAIN, True, wrong_state),
    (PLAIN, True, shifted_codes),
    (PLAIN, True, wrong_absmax),
    (PLAIN, True, written_codebook),
    (SKIP_ZEROS, True, idle_block_touched),
]


@pytest.mark.parametrize(("setting", "eight", "fault"), FAULTS, ids=lambda item: getattr(item, "__name__", None))
def test_fault_is_found(setting: Any, eight: bool, fault: Callable[[Any], None]) -> None:
    case = step_case("adam", setting, torch.float32, eight)
    before = case.arguments()
    after = copy.deepcopy(before)
    OPS[case.op].overload(*after)
    assert case.judge is not None
    case.judge(before, after)
    fault(after)
    with pytest.raises(AssertionError):
        case.judge(before, after)
