"""Layers that call a bound kernel: the short way is taken, gives the same, and is left in time.

These are tests of the core. They stand here because a backend, once it has claimed a device in a process,
stays, and the tests of the core run without one.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import weakref

import pytest
import torch

from bitsandbytes.backends.description import Availability, Backend, Kernel
from bitsandbytes.backends.registry import REGISTRY, Plugin
from bitsandbytes.contract import OPS
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn.bound import bound_of


def address_of(value):
    """A function that finds a tensor again by its address, as native kernels do; it keeps nothing alive."""
    if not isinstance(value, torch.Tensor):
        return lambda: value
    assert value.is_contiguous()
    where, size, dtype, shape = value.data_ptr(), value.nbytes, value.dtype, value.shape
    return lambda: torch.frombuffer((ctypes.c_char * size).from_address(where), dtype=dtype).reshape(shape)


class Counter:
    """A backend on the reference that counts calls of bound functions."""

    def __init__(self) -> None:
        self.bound_calls = 0

    def kernel(self, op: str) -> Kernel:
        reference = OPS[op].reference

        def bind(*frozen):
            kept = [address_of(value) for value in frozen]

            def run(first):
                self.bound_calls += 1
                return reference(first, *[get() for get in kept])

            return run

        return Kernel(op, reference, bind=bind)


@pytest.fixture
def counter():
    counter = Counter()
    kernels = [counter.kernel("gemm_4bit"), counter.kernel("int8_linear")]
    backend = Backend(
        name="counting",
        version="1",
        devices=("cpu",),
        op_api=(1, 1),
        probe=lambda: Availability(True),
        load=lambda: kernels,
        priority=1,
    )
    plugin = Plugin("counting", backend=backend)
    REGISTRY.add(plugin)
    yield counter
    REGISTRY.plugins.remove(plugin)
    for entry in REGISTRY._entries.values():
        entry.reset()
    REGISTRY._serving.clear()
    REGISTRY.generation += 1


def layers():
    torch.manual_seed(0)
    yield Linear4bit(64, 32, quant_type="nf4").to("cpu").eval()
    yield Linear4bit(64, 32, quant_type="fp4", compress_statistics=False, bias=False).to("cpu").eval()
    yield Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu").eval()


@pytest.mark.parametrize("index", range(3))
def test_the_second_call_is_bound(counter, index):
    layer = list(layers())[index]
    x = torch.randn(3, 64)
    with torch.no_grad():
        first = layer(x)
        assert counter.bound_calls == 0
        assert torch.equal(layer(x), first)
        assert counter.bound_calls == 1
        other = torch.randn(2, 5, 64)
        assert layer(other).shape == (2, 5, 32) and counter.bound_calls == 2


@pytest.mark.parametrize("index", range(3))
def test_what_leaves_the_short_way(counter, index):
    layer = list(layers())[index]
    x = torch.randn(3, 64)

    def calls(run) -> int:
        with torch.no_grad():
            layer(x)
            layer(x)
        before = counter.bound_calls
        run()
        return counter.bound_calls - before

    assert calls(lambda: layer(x.clone().requires_grad_()).sum().backward()) == 0
    with torch.no_grad():
        assert calls(lambda: layer(x.double().float())) == 1
        assert calls(lambda: layer(torch.nn.Parameter(x, requires_grad=False))) == 0
        assert calls(lambda: layer(x.half())) == 0
        if layer.bias is not None:

            def other_bias():
                layer.bias = torch.nn.Parameter(torch.randn(32))
                layer(x)

            assert calls(other_bias) == 0
            assert calls(lambda: layer.bias.data.__setitem__(0, 7.0) or layer(x)) == 1

        def profiled():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
                layer(x)

        assert calls(profiled) == 0

        def under_a_mode():
            with torch.device("cpu"):
                layer(x)

        assert calls(under_a_mode) == 0


@pytest.mark.parametrize("index", range(3))
def test_changes_of_the_weight_are_seen(counter, index):
    layer, other = list(layers())[index], list(layers())[index]
    torch.manual_seed(5)
    fresh = torch.randn(32, 64)
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        layer(x)
        layer.load_state_dict({"weight": fresh}, strict=False)
        other.load_state_dict({"weight": fresh}, strict=False)
        assert torch.equal(layer(x), other(x))
        assert torch.equal(layer(x), other(x))
        # New memory under the same parameter, as moves and sharding put it there.
        layer.weight.data = layer.weight.data.clone()
        before = counter.bound_calls
        assert torch.equal(layer(x), other(x))
        assert counter.bound_calls <= before + 1


@pytest.mark.parametrize("index", range(3))
def test_nothing_is_kept_alive_or_copied(counter, index):
    layer = list(layers())[index]
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        layer(x)
        assert counter.bound_calls == 1
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert bound_of(other).run is None
            assert torch.equal(other(x), layer(x))
    alive = weakref.ref(layer.weight)
    layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    layer.quant_state = None
    gc.collect()
    assert alive() is None


def test_the_state_of_int8_follows_the_weight(counter):
    layer = list(layers())[2]
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        layer.state.CB = None
        layer(x)
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr()
        layer(x)
        assert counter.bound_calls == 1
        layer.weight.data = layer.weight.data.clone()
        layer(x)
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr()
        layer.weight.SCB = layer.weight.SCB.clone()
        layer(x)
        assert layer.state.SCB is layer.weight.SCB


def test_compiled_layers_do_not_see_it(counter):
    for layer in layers():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 64)
        with torch.no_grad():
            layer(x)
            layer(x)
            before = counter.bound_calls
            torch.testing.assert_close(compiled(x), layer(x))
            assert counter.bound_calls == before + 1


def test_without_a_kernel_that_offers_it(counter):
    REGISTRY.plugins[-1].kernels()["gemm_4bit"] = Kernel("gemm_4bit", OPS["gemm_4bit"].reference)
    REGISTRY.generation += 1
    layer = next(layers())
    x = torch.randn(3, 64)
    with torch.no_grad():
        for _repeat in range(3):
            layer(x)
    assert counter.bound_calls == 0 and bound_of(layer).attempts == 1
