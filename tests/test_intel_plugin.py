"""The published plugin for upstream's package, as it is: a callable entry point that registers kernels itself.

It is fetched from the package index, without its own requirements, into a folder of the test.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

PLUGIN = "bitsandbytes-intel"
NAME = "bitsandbytes_intel"


def python(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=variables or None, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a process in which the plugin is the only backend."""
    site = tmp_path_factory.mktemp("intel")
    got = python("-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--target", site, PLUGIN)
    if got.returncode != 0:
        pytest.skip(f"pip cannot fetch {PLUGIN} here: {got.stderr.strip().splitlines()[-1:]}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
    path = os.pathsep.join(filter(None, [str(site), inherited.get("PYTHONPATH")]))
    return inherited | {"PYTHONPATH": path, "BNB_BACKENDS": NAME, "BNB_BACKENDS_STRICT": "1"}


def described(environment):
    result = python("-m", "bitsandbytes.cli", "plugins", "list", "--json", **environment)
    assert result.returncode == 0, result.stderr
    return next(plugin for plugin in json.loads(result.stdout) if plugin["name"] == NAME)


def test_it_is_discovered_loaded_and_listed(environment):
    plugin = described(environment)
    assert (plugin["distribution"], plugin["style"], plugin["status"]) == (PLUGIN, "callable", "called")
    assert "xpu" in plugin["devices"]
    native = [op for op, kind in plugin["ops"].items() if kind == "native"]
    assert {"quantize_4bit", "dequantize_4bit", "int8_linear_matmul"} <= set(native)


@pytest.mark.skipif(torch.xpu.is_available(), reason="this machine has an Intel GPU")
def test_it_says_why_it_serves_nothing_here(environment):
    plugin = described(environment)
    assert plugin["available"] is False
    assert "torch can use no device of type" in plugin["reason"]
    assert "xpu" in plugin["reason"]
    result = python("-m", "bitsandbytes.cli", "plugins", "check", NAME, "--device", "xpu", **environment)
    assert result.returncode == 1
    assert "torch cannot use device 'xpu' here" in result.stderr


@pytest.mark.parametrize("first", ["bitsandbytes", "bitsandbytes_intel"])
def test_whichever_is_imported_first(environment, first):
    code = f"""
import torch, {first}
import bitsandbytes, bitsandbytes_intel
from bitsandbytes.backends.registry import REGISTRY
w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
packed, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4")
assert (bitsandbytes.functional.dequantize_4bit(packed, state) - w).abs().max() < 0.5
plugin, = [p for p in REGISTRY.plugins if p.name == {NAME!r}]
assert plugin.status.value == "called", plugin
assert torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::int8_linear_matmul", "XPU")
assert REGISTRY.reports == []
print("fine")
"""
    result = python("-c", code, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "fine"
