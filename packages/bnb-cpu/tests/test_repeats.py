"""Calls of an op that are like one before: they skip the checks, give the same, and nothing else skips them."""

from __future__ import annotations

import threading

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.backends import repeats as core_repeats
from bitsandbytes.backends.description import Kernel
from bitsandbytes.backends.dispatch import Entry
from bitsandbytes.backends.repeats import Repeats, native_repeats
from bitsandbytes.contract import OPS
from bitsandbytes.errors import ArgumentError, ArgumentTypeError
from bitsandbytes.nn import Linear4bit
from bnb_cpu import matmul
from bnb_cpu.memory import LARGE_RESULT
from bnb_cpu.native import _C

gemm_4bit = torch.ops.bitsandbytes.gemm_4bit.default
int8_linear = torch.ops.bitsandbytes.int8_linear.default

pytestmark = pytest.mark.skipif(core_repeats.EXCHANGE is None, reason="needs torch 2.10")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def repeats_of(op):
    """A short way that has met no call yet."""
    found = native_repeats(_C, op, torch.get_num_threads, LARGE_RESULT)
    assert found is not None
    return found


def weight_4bit(n=24, k=64, quant_type="nf4", nested=True, bias=None):
    """All arguments of a product but the first."""
    packed, state = F.quantize_4bit(torch.randn(n, k), quant_type=quant_type, compress_statistics=nested)
    if not nested:
        return [packed, [n, k], state.absmax, state.blocksize, quant_type, bias]
    inner = state.state2
    return [packed, [n, k], inner.absmax, 64, quant_type, bias, state.absmax, inner.code, state.offset]


def weight_int8(n=24, k=64):
    codes, statistics, _ = F.int8_vectorwise_quant(torch.randn(n, k, dtype=torch.float16))
    return [codes, statistics]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(1,), (3, 2), ()])
def test_4bit_products_are_those_of_the_kernel(dtype, quant_type, nested, bias_dtype, lead):
    """Bit for bit, for other activations and another weight than those that were noted."""
    found = repeats_of("gemm_4bit")

    def call():
        bias = None if bias_dtype is None else torch.randn(24).to(bias_dtype)
        return torch.randn(*lead, 64).to(dtype), *weight_4bit(quant_type=quant_type, nested=nested, bias=bias)

    first, second = call(), call()
    assert found.call(*first) is None
    found.note(matmul.gemm_4bit(*first), *first)
    result = found.call(*second)
    expected = matmul.gemm_4bit(*second)
    assert result.dtype == dtype and result.shape == expected.shape
    assert torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rest", [(), (0.0,), (2.5,), (2.5, "bias"), (0.0, "bias")])
def test_int8_products_are_those_of_the_kernel(dtype, rest):
    """What torch leaves out, as it equals its default, counts as the default."""
    found = repeats_of("int8_linear")

    def call():
        given = [torch.randn(24).to(dtype) if item == "bias" else item for item in rest]
        return torch.randn(5, 64).to(dtype), *weight_int8(), *given

    first, second = call(), call()
    found.note(matmul.int8_linear(*first), *first)
    assert torch.equal(bits(found.call(*second)), bits(matmul.int8_linear(*second)))


def test_result_is_a_tensor_like_any_other():
    found = repeats_of("gemm_4bit")
    call = (torch.randn(2, 64), *weight_4bit())
    found.note(matmul.gemm_4bit(*call), *call)
    one, other = found.call(*call), found.call(*call)
    assert type(one) is torch.Tensor and not one.requires_grad and one.is_contiguous()
    before = other.clone()
    one.zero_()
    assert torch.equal(other, before)
    assert one.resize_(4, 24).shape == (4, 24)


def changed(call, index, value):
    return [value if i == index else item for i, item in enumerate(call)]


UNLIKE_4BIT = {
    "dtype": lambda c: changed(c, 0, c[0].half()),
    "rows": lambda c: changed(c, 0, torch.randn(3, 64)),
    "dimensions": lambda c: changed(c, 0, torch.randn(1, 2, 64)),
    "features": lambda c: changed(c, 0, torch.randn(2, 63)),
    "stride": lambda c: changed(c, 0, torch.randn(2, 128)[:, ::2]),
    "device": lambda c: changed(c, 0, c[0].to("meta")),
    "packed size": lambda c: changed(c, 1, c[1][1:]),
    "packed dtype": lambda c: changed(c, 1, c[1].view(torch.int8)),
    "shape": lambda c: changed(c, 2, [64, 24]),
    "shape of three": lambda c: changed(c, 2, [24, 64, 1]),
    "absmax": lambda c: changed(c, 3, c[3].half()),
    "blocksize": lambda c: changed(c, 4, 32),
    "blocksize as a truth": lambda c: changed(c, 4, True),
    "blocksize as a number": lambda c: changed(c, 4, 64.0),
    "blocksize beyond 64 bits": lambda c: changed(c, 4, 2**70),
    "type": lambda c: changed(c, 5, "fp4"),
    "longer type": lambda c: changed(c, 5, "nf4" + "\0" * 5),
    "unknown type": lambda c: changed(c, 5, "nf5"),
    "bias": lambda c: changed(c, 6, torch.randn(24)),
    "codes of statistics": lambda c: changed(c, 8, c[8][:128]),
    "no offset": lambda c: c[:-1],
    "an object": lambda c: changed(c, 6, object()),
}


@pytest.mark.parametrize("how", UNLIKE_4BIT)
def test_other_kinds_of_calls_go_the_long_way(how):
    found = repeats_of("gemm_4bit")
    call = [torch.randn(2, 64), *weight_4bit()]
    found.note(matmul.gemm_4bit(*call), *call)
    assert found.call(*call) is not None
    assert found.call(*UNLIKE_4BIT[how](call)) is None


@pytest.mark.parametrize("threshold", [2.0, float("inf"), -0.0, 1])
def test_other_thresholds_go_the_long_way(threshold):
    found = repeats_of("int8_linear")
    call = [torch.randn(2, 64), *weight_int8(), 0.0]
    found.note(matmul.int8_linear(*call), *call)
    assert found.call(*call) is not None
    assert found.call(*changed(call, 3, threshold)) is None


def test_ops_refuse_after_a_good_call_what_they_refused_before():
    call = [torch.randn(2, 64), *weight_4bit()]
    for _ in range(3):
        gemm_4bit(*call)
    with pytest.raises(ArgumentError, match="expected 64 input features"):
        gemm_4bit(torch.randn(2, 63), *call[1:])
    with pytest.raises(ArgumentTypeError, match="A has dtype"):
        gemm_4bit(call[0].double(), *call[1:])
    with pytest.raises(ArgumentError, match="quant_type"):
        gemm_4bit(*changed(call, 5, "nf5"))
    call = [torch.randn(2, 64), *weight_int8()]
    for _ in range(3):
        int8_linear(*call, 6.0)
    with pytest.raises(ArgumentError, match="threshold"):
        int8_linear(*call, -1.0)
    with pytest.raises(ArgumentError, match="expected 64 input features"):
        int8_linear(torch.randn(2, 32), *call[1:], 6.0)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_calls_without_rows(shape):
    for _ in range(3):
        assert gemm_4bit(torch.randn(shape), *weight_4bit()).shape == (*shape[:-1], 24)
        assert int8_linear(torch.randn(shape), *weight_int8(), 6.0).shape == (*shape[:-1], 24)


def test_calls_without_features():
    """A product with no columns is the bias."""
    packed, absmax = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)
    bias = torch.randn(24)
    for _ in range(3):
        result = gemm_4bit(torch.empty(2, 0), packed, [24, 0], absmax, 64, "nf4", bias)
        assert torch.equal(result, bias.expand(2, 24))


def test_large_results_are_not_noted():
    """They come from memory that is prepared for them."""
    found = repeats_of("gemm_4bit")
    weight = weight_4bit(n=32)
    rows = LARGE_RESULT // (32 * 4)
    for count, is_taken in ((rows, True), (rows + 1, False)):
        call = (torch.randn(count, 64), *weight)
        found.note(matmul.gemm_4bit(*call), *call)
        assert (found.call(*call) is not None) == is_taken


def test_parameters_and_subclasses_are_read():
    """A compiled model passes its weights as they are."""
    layer = Linear4bit(64, 24, bias=False, compress_statistics=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    found = repeats_of("gemm_4bit")
    call = (torch.randn(2, 64), layer.weight, [24, 64], state.absmax, 64, "nf4")
    expected = gemm_4bit(call[0], layer.weight.data, *call[2:])
    found.note(expected, *call)
    assert torch.equal(found.call(*call), expected)


def test_threads_use_and_forget_calls_at_once():
    """More kinds than are kept, from several threads: each result is that of its arguments."""
    found = repeats_of("gemm_4bit")
    weight = weight_4bit(n=8)
    wrong = []

    def work(number):
        torch.manual_seed(number)
        for rows in range(1, 700):
            call = (torch.randn(1 + (7 * rows + 375 * number) % 1500, 1, 64), *weight)
            expected = matmul.gemm_4bit(*call)
            found.note(expected, *call)
            result = found.call(*call)
            if result is not None and not torch.equal(result, expected):
                wrong.append((number, rows))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_error_while_making_the_result_is_the_callers():
    class FullError(Exception):
        pass

    def fail():
        raise FullError

    found = native_repeats(_C, "gemm_4bit", fail, LARGE_RESULT)
    call = (torch.randn(2, 64), *weight_4bit())
    found.note(matmul.gemm_4bit(*call), *call)
    with pytest.raises(FullError):
        found.call(*call)


def test_unknown_op_is_refused():
    with pytest.raises(KeyError, match="no_such_op"):
        native_repeats(_C, "no_such_op", torch.get_num_threads, LARGE_RESULT)


def test_torch_without_the_table_has_no_short_way(monkeypatch):
    monkeypatch.setattr(core_repeats, "EXCHANGE", None)
    assert native_repeats(_C, "gemm_4bit", torch.get_num_threads, LARGE_RESULT) is None


class Spy:
    """A kernel on the reference with a short way that takes calls of one shape."""

    def __init__(self):
        self.log = []
        self.shapes = set()

    def kernel(self, **options):
        reference = OPS["gemm_4bit"].reference

        def call(*args):
            if args[0].shape not in self.shapes:
                return None
            self.log.append("again")
            return reference(*args)

        def note(result, *args):
            self.log.append("note")
            self.shapes.add(args[0].shape)

        def run(*args):
            self.log.append("run")
            return reference(*args)

        return Kernel("gemm_4bit", run, repeats=Repeats(call, note), **options)


def entry_of(*kernels):
    return Entry(OPS["gemm_4bit"], lambda: kernels, threading.RLock())


def test_entry_notes_what_has_been_served():
    """Nothing is noted by the call that looks the kernel up, nor by one that breaks the contract."""
    spy = Spy()
    entry = entry_of(spy.kernel())
    call = (torch.randn(2, 64), *weight_4bit())
    results = [entry.call(*call) for _ in range(3)]
    assert spy.log == ["run", "run", "note", "again"]
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(ArgumentError):
        entry.call(torch.randn(2, 63), *call[1:])
    assert spy.log == ["run", "run", "note", "again"]


def test_entry_forgets_the_short_way_of_a_kernel_that_lost_its_place():
    spy = Spy()
    serving = [spy.kernel()]
    entry = Entry(OPS["gemm_4bit"], lambda: serving, threading.RLock())
    call = (torch.randn(2, 64), *weight_4bit())
    for _ in range(3):
        entry.call(*call)
    serving[:] = [Kernel("gemm_4bit", OPS["gemm_4bit"].reference)]
    entry.reset()
    spy.log.clear()
    for _ in range(3):
        entry.call(*call)
    assert spy.log == []


def test_kernel_that_may_decline_has_no_short_way():
    spy = Spy()
    entry = entry_of(spy.kernel(accepts=lambda *args: True))
    call = (torch.randn(2, 64), *weight_4bit())
    for _ in range(3):
        entry.call(*call)
    assert spy.log == ["run"] * 3


def test_compiled_layer_takes_the_short_way():
    """Its op gets the same arguments, again and again."""
    layer = Linear4bit(64, 24, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    taken = next(kernel.repeats for kernel in matmul.MATMUL_KERNELS if kernel.op == "gemm_4bit")
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
        state = layer.weight.quant_state
        call = [x, layer.weight, [24, 64], state.state2.absmax, 64, "nf4", None]
        call += [state.absmax, state.state2.code, state.offset]
        assert torch.equal(taken.call(*call), expected)
