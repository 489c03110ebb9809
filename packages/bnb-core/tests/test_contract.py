"""The machinery behind the op contracts, and what holds for every contract."""

import inspect

import pytest
import torch

from bitsandbytes import contract
from bitsandbytes.backends.description import Kernel
from bitsandbytes.backends.dispatch import chained, has_keyword_only
from bitsandbytes.contract import OPS, TensorSpec, check_dtype, check_result_buffer, check_same_device, check_that
from bitsandbytes.errors import ArgumentError, ArgumentTypeError, BackendError
from bitsandbytes.ops import fourbit_matmul
from bitsandbytes.ops.common import block_count

NAMES = list(OPS)


def arguments_of(op):
    return op.overload._schema.arguments


@pytest.mark.parametrize("name", NAMES)
def test_check_and_reference_take_what_the_schema_says(name):
    # torch leaves out trailing arguments that equal the schema's default: a default that differs
    # from it would silently be another call.
    op = OPS[name]
    if name.endswith(".out"):
        return
    for function in (op.check, op.reference):
        parameters = inspect.signature(function).parameters.values()
        assert [parameter.name for parameter in parameters] == [argument.name for argument in arguments_of(op)]
        for parameter, argument in zip(parameters, arguments_of(op), strict=True):
            if argument.has_default_value():
                assert list_or_value(parameter.default) == list_or_value(argument.default_value), parameter.name
            else:
                assert parameter.default is inspect.Parameter.empty, parameter.name


def list_or_value(value):
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("name", NAMES)
def test_every_op_is_documented_and_reachable(name):
    op = OPS[name]
    assert len(op.doc) > 20
    assert op.qualname == f"bitsandbytes::{name}"
    assert op.overload._schema.name == f"bitsandbytes::{name.partition('.')[0]}"
    assert torch.Tag.pt2_compliant_tag in op.overload.tags


@pytest.mark.parametrize("name", NAMES)
def test_backends_get_positional_arguments(name):
    assert not has_keyword_only(OPS[name])


def test_an_argument_error_is_what_historical_callers_catch():
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentError, RuntimeError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(BackendError, RuntimeError)


def test_the_check_runs_on_fake_tensors_too():
    a = torch.ones(2, 4, dtype=torch.int8, device="meta")
    with pytest.raises(ArgumentTypeError, match="int8_linear_matmul"):
        torch.ops.bitsandbytes.int8_linear_matmul(a, a.float())


def test_an_out_overload_takes_out_by_position_and_by_name():
    a = torch.ones(2, 4, dtype=torch.int8)
    for arguments, named in (((a, a), True), ((a, a), False)):
        out = torch.zeros(2, 2, dtype=torch.int32)
        if named:
            torch.ops.bitsandbytes.int8_linear_matmul.out(*arguments, out=out)
        else:
            torch.ops.bitsandbytes.int8_linear_matmul.out(*arguments, out)
        assert out.tolist() == [[4, 4], [4, 4]]


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.zeros(2, 2), "out has dtype torch.float32, expected torch.int32"),
        (torch.zeros(2, 3, dtype=torch.int32), r"out has shape \(2, 3\), expected \(2, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int32, device="meta"), "out is on meta, expected cpu"),
    ],
)
def test_a_wrong_result_buffer_is_refused(out, text):
    with pytest.raises(ArgumentError, match=text):
        check_result_buffer("some_op", "out", out, TensorSpec((2, 2), torch.int32), torch.device("cpu"))


def test_the_shared_checks_name_op_argument_and_what_is_allowed():
    with pytest.raises(
        ArgumentTypeError, match=r"some_op: A has dtype torch.int8 on device cpu; allowed: torch.float16"
    ):
        check_dtype("some_op", "A", torch.zeros(1, dtype=torch.int8), (torch.float16,))
    with pytest.raises(ArgumentError, match="some_op: B is on meta but A is on cpu"):
        check_same_device("some_op", A=torch.zeros(1), bias=None, B=torch.zeros(1, device="meta"))
    with pytest.raises(ArgumentError, match="some_op: broken"):
        check_that("some_op", False, lambda: "broken")
    check_that("some_op", True, lambda: pytest.fail("the text is built only on failure"))


def test_a_call_is_dispatched_again_when_a_backend_has_claimed_the_device(monkeypatch):
    asked = []

    def notice(device):
        asked.append(device)
        return len(asked) == 1

    monkeypatch.setattr(contract, "_reference_notice", notice)
    a = torch.ones(2, 4, dtype=torch.int8)
    assert torch.ops.bitsandbytes.int8_linear_matmul(a, a)[0, 0].item() == 4
    assert asked == ["cpu", "cpu"]


def test_the_chain_of_kernels():
    calls = []

    def kernel(name, accepts):
        def run(x):
            calls.append(name)
            return name

        return Kernel("op", run, accepts)

    def reference(x):
        return "reference"

    only = kernel("only", None)
    assert chained([only], reference) is only.run
    assert chained([], reference) is reference
    serve = chained([kernel("small", lambda x: x < 2), kernel("even", lambda x: x % 2 == 0)], reference)
    assert [serve(x) for x in (1, 4, 5)] == ["small", "even", "reference"]
    assert calls == ["small", "even"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", 3),
        ("version", None),
        ("devices", "cpu"),
        ("devices", ()),
        ("devices", (1,)),
        ("op_api", 1),
        ("op_api", (1,)),
        ("op_api", ("1", "2")),
        ("probe", None),
        ("load", 5),
        ("priority", "high"),
    ],
)
def test_a_description_with_a_wrong_field_is_refused(field, value):
    from bitsandbytes.backends import Availability, Backend

    fields = {
        "name": "some",
        "version": "1",
        "devices": ("cpu",),
        "op_api": (1, 1),
        "probe": lambda: Availability(True),
        "load": list,
    }
    Backend(**fields)
    with pytest.raises(ArgumentTypeError, match=f"Backend.{field} is "):
        Backend(**{**fields, field: value})


USUAL_PRODUCTS = {
    "plain": {
        "A": torch.zeros(3, 96, dtype=torch.bfloat16),
        "B": torch.zeros(10 * 96 // 2, 1, dtype=torch.uint8),
        "shapeB": torch.Size([10, 96]),
        "absmax": torch.zeros(15),
        "blocksize": 64,
        "quant_type": "nf4",
        "bias": None,
        "absmax_8bit": None,
        "absmax_code": None,
        "absmax_offset": None,
    }
}
USUAL_PRODUCTS["nested"] = USUAL_PRODUCTS["plain"] | {
    "absmax": torch.zeros(1),
    "absmax_8bit": torch.zeros(15, dtype=torch.uint8),
    "absmax_code": torch.zeros(256),
    "absmax_offset": torch.zeros(()),
}
#: Changes of one argument with which a product breaks the contract.
BROKEN_PRODUCTS = {
    "A": [
        torch.zeros(3, 95),
        torch.tensor(0.0),
        torch.zeros(3, 96, dtype=torch.float64),
        torch.zeros(96, device="meta"),
    ],
    "B": [torch.zeros(479, dtype=torch.uint8), torch.zeros(480), torch.zeros(480, dtype=torch.uint8, device="meta")],
    "shapeB": [(10,), (10, 96, 1), (-10, -96), (10, 98)],
    "absmax": [torch.zeros(16), torch.zeros(15, dtype=torch.float64), torch.zeros(15, device="meta")],
    "blocksize": [63, 0, -2, True, 2**62 + 2, 64.0],
    "quant_type": ["nf3"],
    "bias": [torch.zeros(9), torch.zeros(10, dtype=torch.int32)],
    "absmax_8bit": [
        torch.zeros(14, dtype=torch.uint8),
        torch.zeros(15),
        torch.zeros(15, dtype=torch.uint8, device="meta"),
    ],
    "absmax_code": [
        torch.zeros(257),
        torch.zeros(0),
        torch.zeros(256, dtype=torch.float16),
        torch.zeros(256, device="meta"),
    ],
    "absmax_offset": [torch.zeros(2), torch.zeros((), dtype=torch.float64), torch.zeros((), device="meta")],
}


@pytest.fixture
def no_product_has_passed(monkeypatch):
    monkeypatch.setattr(fourbit_matmul, "_passed", set())


@pytest.mark.usefixtures("no_product_has_passed")
@pytest.mark.parametrize("kind", USUAL_PRODUCTS)
def test_products_that_have_passed_are_recognized_and_broken_ones_are_refused(kind, monkeypatch):
    check, usual = OPS["gemm_4bit"].check, USUAL_PRODUCTS[kind]

    def refuse_broken():
        for name, values in BROKEN_PRODUCTS.items():
            for value in [*values, *((None,) if kind == "nested" and name.startswith("absmax_") else ())]:
                broken = usual | {name: value}
                with pytest.raises((ArgumentError, ArgumentTypeError)):
                    check(*broken.values())

    refuse_broken()
    check(*usual.values())
    biased = usual | {"bias": torch.zeros(10)}
    check(*biased.values())
    refuse_broken()
    monkeypatch.setattr(fourbit_matmul, "check_weight", lambda *arguments: pytest.fail("checked again"))
    check(*usual.values())
    check(*biased.values())


@pytest.mark.usefixtures("no_product_has_passed")
def test_a_limited_number_of_products_is_remembered(monkeypatch):
    monkeypatch.setattr(fourbit_matmul, "MOST_PASSED", 3)
    usual = USUAL_PRODUCTS["plain"]
    for blocksize in range(64, 96, 2):
        count = block_count(960, blocksize)
        OPS["gemm_4bit"].check(*(usual | {"blocksize": blocksize, "absmax": torch.zeros(count)}).values())
        assert len(fourbit_matmul._passed) <= 3
