"""The comparison itself: it must see a wrong bit, and no explanation may cover a wrong value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.compare import truth, truth_optim
from tests.compare.case import Case, Maker
from tests.compare.explanation import Difference, WrongValueError
from tests.compare.inputs import statistics, tie_values
from tests.compare.known import EXPLANATIONS, explain
from tests.compare.known_quant import RELEASE_DOT_SCALE
from tests.compare.optimizer_cases import NUMBERS, state_tensors
from tests.compare.verdict import differences, same_bits

RELEASE_FAILED = {"error": "NotImplementedError: none"}


def difference(op: str, inputs: dict[str, Any], ours: Any, theirs: Any, name: str = "case") -> Difference:
    return Difference(Case(op, name, inputs), ours, theirs, differences(ours, theirs))


def nudged(x: torch.Tensor, place: int = 0) -> torch.Tensor:
    """``x`` with one value moved to its neighbour."""
    x = x.clone()
    flat = x.reshape(-1)
    flat[place] = torch.nextafter(flat[place], torch.tensor(float("inf"), dtype=x.dtype))
    return x


def check(d: Difference, corrupt: Any) -> None:
    """The explanation holds for right values and refuses a corrupted result."""
    assert explain(d) is not None
    wrong = Difference(d.case, corrupt, d.theirs, differences(corrupt, d.theirs))
    try:
        assert explain(wrong) is None
    except WrongValueError:
        return


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5e-45])
def test_a_single_bit_is_seen(value: float) -> None:
    x = torch.full((5,), value)
    assert same_bits(x, x.clone())
    assert not same_bits(x, nudged(x, 3))


def test_nan_equals_nan_but_zero_differs_from_minus_zero() -> None:
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]).neg())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_shape_dtype_keys_and_errors_differ() -> None:
    x = torch.zeros(4)
    assert differences({"a": x}, {"a": x.reshape(2, 2)}) == ["a"]
    assert differences({"a": x}, {"a": x.half()}) == ["a"]
    assert differences({"a": x}, {"a": x, "b": 1}) == ["b"]
    assert differences({"keys": ["a", "b"]}, {"keys": ["b", "a"]}) == ["keys.0", "keys.1"]
    assert differences(x, RELEASE_FAILED) == ["error"]
    assert differences({"error": "one"}, {"error": "other"}) == []


def test_ties_are_ties() -> None:
    code = truth.TABLES["nf4"]
    x = tie_values((4, 64), code, 64, torch.Generator().manual_seed(0))
    scaled = (x[0].double() / x[0].abs().max()).abs()
    middles = ((code[1:] + code[:-1]).double() / 2).abs()
    assert (scaled[1:, None] - middles).abs().amin(dim=1).max() < 1e-6


def test_split_rows_are_proved() -> None:
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (480, 1), generator=generator, dtype=torch.uint8)
    absmax = statistics("plain", 15, generator)
    inputs = {
        "A": packed,
        "absmax": absmax,
        "blocksize": 64,
        "quant_type": "nf4",
        "shape": [10, 96],
        "dtype": "float32",
    }
    right = truth.decode_4bit(packed, absmax, 64, "nf4", [10, 96], "float32")
    check(difference("dequantize_4bit", inputs, right, right * 1.5), nudged(right))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_scale_of_the_release_is_proved(dtype: str) -> None:
    generator = torch.Generator().manual_seed(2)
    A = torch.randint(-(10**6), 10**6, (64, 96), generator=generator, dtype=torch.int32)
    rows, columns = statistics("plain", 64, generator), statistics("plain", 96, generator)
    outer = A.double() * torch.outer(rows.double(), columns.double())
    right, theirs = ((outer * scale).to(getattr(torch, dtype)) for scale in (1 / 127**2, RELEASE_DOT_SCALE))
    inputs = {"A": A, "row_stats": rows, "col_stats": columns, "dtype": dtype, "bias": None}
    check(difference("int8_mm_dequant", inputs, right, theirs), right * 1.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_proved(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (24 * 128 // 2, 1), generator=generator, dtype=torch.uint8)
    absmax, A = statistics("plain", 48, generator), torch.randn(5, 128, generator=generator).to(dtype)
    inputs = {
        "A": A,
        "B": packed,
        "shapeB": [24, 128],
        "absmax": absmax,
        "blocksize": 64,
        "quant_type": "nf4",
        "bias": None,
    }
    weight = truth.decode_4bit(packed, absmax, 64, "nf4", [24, 128], "float32")
    right = (A.double() @ weight.double().t()).to(dtype)
    check(difference("gemm_4bit", inputs, right, nudged(right)), right * 1.02)


def test_double_quantization_is_proved() -> None:
    A = torch.tensor([[1.0, -2.0, 9.0], [0.0, 0.5, 1.0]])
    ours = {
        "row_codes": torch.tensor([[64, -127, 0], [0, 64, 0]], dtype=torch.int8),
        "column_codes": torch.tensor([[127, -127, 0], [0, 32, 127]], dtype=torch.int8),
        "row_absmax": torch.tensor([2.0, 1.0]),
        "column_absmax": torch.tensor([1.0, 2.0, 1.0]),
        "outlier_columns": torch.tensor([2]),
    }
    d = difference("int8_double_quant", {"A": A, "threshold": 6.0}, ours, RELEASE_FAILED)
    check(d, ours | {"row_codes": ours["row_codes"] + 1})
    check(d, ours | {"outlier_columns": torch.tensor([1])})


@pytest.mark.parametrize("rule", list(truth_optim.RULES))
@pytest.mark.parametrize("bits", [32, 8])
def test_optimizer_rounding_is_proved(rule: str, bits: int) -> None:
    maps = {"dynamic": torch.linspace(-1, 1, 256), "dynamic-unsigned": torch.linspace(0, 1, 256)}
    tensors = state_tensors(Maker(maps), f"{rule} {bits}", rule, bits, "float32")
    ours = right_step(rule, tensors)
    inputs = {"bits": bits, "name": rule, "tensors": tensors, "numbers": NUMBERS}
    d = difference("optimizer_op", inputs, ours, ours | {"p": nudged(ours["p"])})
    check(d, ours | {"p": ours["p"] + 1e-4 * (ours["p"] - tensors["p"])})
    state = "absmax1" if bits == 8 else "state1"
    check(d, ours | {state: ours[state] * (1 + 3e-5)})


def right_step(rule: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """What an op should make of ``tensors``."""
    ours = {key: value for key, value in tensors.items() if value is not None}
    states: dict[str, torch.Tensor] = {}
    for key in ("state1", "state2"):
        if key in ours:
            coded = ours[key].dtype == torch.uint8
            names = (key, f"absmax{key[-1]}", f"qmap{key[-1]}")
            states[key] = truth_optim.decode(*(ours[name] for name in names)) if coded else ours[key].double()
    step = truth_optim.step(rule, ours["p"].double(), ours["g"], states, NUMBERS)
    result = ours | {"p": step.p.float()}
    for key, value in (("state1", step.state1), ("state2", step.state2)):
        if value is None:
            continue
        if ours[key].dtype == torch.uint8:
            codes, absmax = truth_optim.encode(value, ours[f"qmap{key[-1]}"], rule == "ademamix" and key == "state1")
            result |= {key: codes, f"absmax{key[-1]}": absmax.float()}
        else:
            result[key] = value.float()
    return result


def test_float64_adam_agrees_with_torch() -> None:
    start, grads = torch.randn(20, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    held = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([held], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05)
    p, states = start, {"state1": torch.zeros(20).double(), "state2": torch.zeros(20).double()}
    for number, grad in enumerate(grads, start=1):
        held.grad = grad
        optimizer.step()
        step = truth_optim.step("adam", p, grad, states, NUMBERS | {"step": number, "weight_decay": 0.05})
        assert step.state2 is not None
        p, states = step.p, {"state1": step.state1, "state2": step.state2}
    torch.testing.assert_close(held.data, p)


def test_every_explanation_names_a_case_that_exists() -> None:
    from tests.compare.worker import HANDLERS

    assert {op for explanation in EXPLANATIONS for op in explanation.ops} <= set(HANDLERS)
