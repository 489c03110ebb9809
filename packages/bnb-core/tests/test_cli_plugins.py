"""``bnb`` and ``bnb plugins``, with really installed plugins."""

import json

import pytest
import torch

from bitsandbytes.contract import OP_API_VERSION, OPS

GOOD = """
import torch
from bitsandbytes.backends import Availability, Backend, Kernel

backend = Backend(
    name="good",
    version="1.0",
    devices=("cpu",),
    op_api=(1, 1),
    probe=lambda: Availability(True),
    load=lambda: [Kernel("int8_linear_matmul", lambda A, B: (A.int() @ B.int().T)), Kernel("tomorrow", print)],
)
"""
ABSENT = GOOD.replace('"good"', '"absent"').replace("Availability(True)", 'Availability(False, "no [red] card")')
CALLABLE = """
import torch

def backend():
    torch.library.impl("bitsandbytes::int8_linear_matmul", "XPU")(lambda A, B: A)
"""


@pytest.fixture
def three_plugins(plugin_site):
    plugin_site.install("good", GOOD, distribution="bnb-good", version="2.5")
    plugin_site.install("absent", ABSENT)
    plugin_site.install("styled", CALLABLE)
    return plugin_site


def listed(result):
    return {plugin["name"]: plugin for plugin in json.loads(result.stdout)}


def test_list_for_programs(three_plugins):
    result = three_plugins.bnb("plugins", "list", "--json")
    assert result.returncode == 0, result.stderr
    plugins = listed(result)
    assert {"good", "absent", "styled"} <= plugins.keys()
    good = plugins["good"]
    assert (good["distribution"], good["version"], good["target"]) == ("bnb-good", "2.5", "plugin_good:backend")
    assert (good["devices"], good["status"], good["available"]) == (["cpu"], "registered", True)
    assert (good["op_api"], good["core_op_api"], good["priority"]) == ([1, 1], OP_API_VERSION, 0)
    assert good["ops"].keys() == OPS.keys()
    assert [op for op, kind in good["ops"].items() if kind == "native"] == ["int8_linear_matmul"]
    assert good["unknown_ops"] == ["tomorrow"]
    assert (plugins["absent"]["available"], plugins["absent"]["ops"]) == (False, None)
    assert plugins["absent"]["reason"] == "no [red] card"
    styled = plugins["styled"]
    assert styled["available"] is torch.xpu.is_available()
    assert styled["available"] or "torch can use no device of type xpu here" in styled["reason"]
    assert (styled["style"], styled["devices"], styled["status"]) == ("callable", ["xpu"], "called")
    assert [op for op, kind in styled["ops"].items() if kind == "native"] == ["int8_linear_matmul"]


def test_list_for_people(three_plugins):
    result = three_plugins.bnb("plugins", "list")
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "bnb-good 2.5" in rows["good"]
    assert f"1 of {len(OPS)}" in rows["good"]
    assert "available" in rows["good"]
    assert "not available" in rows["absent"]
    assert "absent: no [red] card" in result.stdout


@pytest.mark.parametrize(
    ("source", "status"),
    [("import nowhere_to_be_found", "broken"), (GOOD.replace("(1, 1)", "(90, 91)"), "incompatible")],
)
def test_a_failed_plugin_is_in_the_list_and_in_the_exit_code(plugin_site, source, status):
    plugin_site.install("good", source, distribution="bnb-bad")
    result = plugin_site.bnb("plugins", "list", "--json")
    assert result.returncode == 1
    plugin = listed(result)["good"]
    assert plugin["status"] == status
    assert plugin["mend"].startswith("pip install")
    assert plugin["reason"]
    table = plugin_site.bnb("plugins", "list")
    assert table.returncode == 1
    assert status in table.stdout
    assert f"to mend it: {plugin['mend']}" in table.stdout


def test_a_plugin_that_breaks_when_it_is_loaded(plugin_site):
    plugin_site.install("good", GOOD.replace("load=lambda: [", "load=lambda: [1 / 0, "))
    result = plugin_site.bnb("plugins", "show", "good", "--json")
    assert result.returncode == 1
    plugin = json.loads(result.stdout)
    assert plugin["status"] == "broken"
    assert "ZeroDivisionError" in plugin["reason"]
    assert plugin["available"] is False
    assert plugin["ops"] is None


def test_show(three_plugins):
    result = three_plugins.bnb("plugins", "show", "good")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["int8_linear_matmul", "│", "native"] in lines
    assert ["quantize_4bit", "│", "reference"] in lines
    assert ["Unknown", "ops", "tomorrow"] in lines


def test_show_of_a_name_that_is_not_installed(three_plugins):
    result = three_plugins.bnb("plugins", "show", "goood")
    assert result.returncode == 2
    assert "no backend is called 'goood'" in result.stderr
    assert "good" in result.stderr


def test_what_plugins_print_does_not_get_into_the_output(plugin_site):
    plugin_site.install("good", GOOD.replace("load=lambda: [", "load=lambda: print('noise on load') or ["))
    plugin_site.install(
        "styled", CALLABLE.replace("def backend():", "print('noise')\ndef backend():\n    print('more')")
    )
    result = plugin_site.bnb("plugins", "list", "--json")
    assert listed(result)["styled"]["status"] == "called"
    assert "noise on load" in result.stderr
    assert "more" in result.stderr


def test_a_skipped_plugin_says_what_skipped_it(plugin_site):
    plugin_site.install("good", GOOD)
    result = plugin_site.bnb("plugins", "list", "--json", BNB_BACKENDS="", BNB_DISABLE_BACKENDS=None)
    assert result.returncode == 0
    assert (listed(result)["good"]["status"], listed(result)["good"]["reason"]) == ("skipped", "not in BNB_BACKENDS")


def test_the_group(plugin_site):
    version = plugin_site.bnb("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("bnb-core 0.50.2, torch ")
    overview = plugin_site.bnb("--help")
    for command in ("doctor", "inspect", "plugins", "quantize"):
        assert command in overview.stdout
    assert plugin_site.bnb("nonsense").returncode == 2


def test_every_command_can_be_imported():
    from bitsandbytes.cli.main import COMMANDS, main

    context = main.make_context("bnb", ["doctor"], resilient_parsing=True)
    assert {name: main.get_command(context, name).name for name in COMMANDS} == {name: name for name in COMMANDS}
