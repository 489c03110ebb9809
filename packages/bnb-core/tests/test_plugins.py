"""Backend plugins, each really installed: a module, metadata and an entry point on the path of a subprocess."""

import pytest

#: Prints what an op answers on the CPU; the plugins below answer a number of their own.
PRELUDE = """
import warnings
warnings.simplefilter("always")
caught = warnings.catch_warnings(record=True)
messages = caught.__enter__()
import torch, bitsandbytes
from bitsandbytes.backends.registry import REGISTRY
from bitsandbytes.errors import BackendError, BackendWarning
a = torch.ones(2, 4, dtype=torch.int8)

def answer(op="int8_linear_matmul"):
    return getattr(torch.ops.bitsandbytes, op)(a, a)[0, 0].item()

def told():
    return [str(m.message) for m in messages if isinstance(m.message, BackendWarning)]

def failures():
    return [text for text in told() if "two plugins are called" not in text]

def plugin(name):
    return next(p for p in REGISTRY.plugins if p.name == name)
"""

#: What the reference answers to the call above.
REFERENCE = 4


def backend_source(name, value=7, op="int8_linear_matmul", **fields):
    """A backend with one kernel that answers `value`."""
    fields = {
        "name": repr(name),
        "version": "'1.0'",
        "devices": "('cpu',)",
        "op_api": "(1, 1)",
        "probe": "probe",
        "load": "load",
        **fields,
    }
    arguments = ", ".join(f"{field}={text}" for field, text in fields.items())
    return f"""
import torch
from bitsandbytes.backends import Availability, Backend, Kernel

log = []

def probe():
    log.append("probe")
    return Availability(True)

def run(A, B):
    return torch.full((A.shape[0], B.shape[0]), {value}, dtype=torch.int32)

def accepts(A, B):
    return A.shape[0] == 2

def load():
    log.append("load")
    return [Kernel({op!r}, run)]

backend = Backend({arguments})
"""


def test_a_good_backend_serves_its_op_and_the_reference_the_others(plugin_site):
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(
        PRELUDE
        + """
codes, absmax = torch.ops.bitsandbytes.quantize_4bit(torch.ones(64), 64, "nf4", torch.uint8)
print(answer(), answer(), codes.unique().tolist(), absmax.item(), told())
"""
    )
    assert out.split() == ["7", "7", "[255]", "1.0", "[]"]


def test_probing_and_loading_wait_for_the_first_call(plugin_site):
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(
        PRELUDE
        + """
import sys
log = sys.modules["plugin_good"].log
print(log)
answer(); answer()
print(log)
"""
    )
    assert out.splitlines() == ["[]", "['probe', 'load']"]


def test_the_contract_is_checked_before_a_kernel_runs(plugin_site):
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(
        PRELUDE
        + """
for dtype in (torch.int8, torch.float32):
    try:
        print(torch.ops.bitsandbytes.int8_linear_matmul(a, a.to(dtype))[0, 0].item())
    except bitsandbytes.errors.ArgumentTypeError as error:
        print("refused", "float32" in str(error))
"""
    )
    assert out.split("\n")[:2] == ["7", "refused True"]


def test_a_call_that_a_kernel_does_not_accept_goes_on_to_the_next_and_to_the_reference(plugin_site):
    guarded = backend_source("guarded", 7, priority="2").replace(
        "Kernel('int8_linear_matmul', run)", ("Kernel('int8_linear_matmul', run, accepts)")
    )
    second = backend_source("second", 8, priority="1").replace(
        "Kernel('int8_linear_matmul', run)", ("Kernel('int8_linear_matmul', run, lambda A, B: A.shape[0] == 3)")
    )
    plugin_site.install("guarded", guarded)
    plugin_site.install("second", second)
    out = plugin_site.python(
        PRELUDE
        + """
for rows in (2, 3, 5):
    x = torch.ones(rows, 4, dtype=torch.int8)
    print(torch.ops.bitsandbytes.int8_linear_matmul(x, x)[0, 0].item())
print(told())
"""
    )
    assert out.split("\n")[:4] == ["7", "8", str(REFERENCE), "[]"]


BREAKAGES = {
    "raises at import": ("raise OSError('libgone.so: cannot open shared object file')", "OSError: libgone.so"),
    "exits at import": ("import sys; sys.exit('no runtime')", "SystemExit: no runtime"),
    "has no such attribute": ("pass", "AttributeError"),
    "is no backend": ("backend = 5", "TypeError: it is a int, expected a Backend or a callable"),
    "raises in its entry": ("def backend(): raise RuntimeError('no card')", "RuntimeError: no card"),
    "exits in its entry": ("def backend(): raise SystemExit(3)", "SystemExit: 3"),
    "has a bad description": (
        backend_source("cpu", devices="'cpu'"),
        "ArgumentTypeError: Backend.devices is 'cpu', expected a tuple like ('cuda',)",
    ),
    "has another name": (backend_source("other"), "the description is called 'other', the entry point 'cpu'"),
}


@pytest.mark.parametrize(("source", "cause"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_plugin_is_reported_once_and_raises_when_its_device_is_used(plugin_site, source, cause):
    # Should a backend called "cpu" be installed here, the distribution that sorts first is used.
    plugin_site.install("cpu", source, distribution="bnb-broken", version="3.1", module="broken_plugin")
    out = plugin_site.python(
        PRELUDE
        + """
print(failures())
for _ in range(2):
    try:
        answer()
    except BackendError as error:
        print("raised", error)
print(len(failures()), plugin("cpu").status.value)
""",
        BNB_DISABLE_BACKENDS=None,
        BNB_BACKENDS="cpu",
    )
    warned, first, second, last = out.splitlines()
    for text in (warned, first, second):
        assert "backend 'cpu' (bnb-broken 3.1) is broken" in text
        assert cause in text.replace("\\'", "'")
        assert "To mend it: pip install" in text
        assert "BNB_DISABLE_BACKENDS=cpu" in text
    assert last == "1 broken"


def test_a_broken_plugin_of_unknown_device_leaves_the_others_alone(plugin_site):
    plugin_site.install("mystery", "raise ImportError('gone')")
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(PRELUDE + "print(len(told()), answer(), plugin('mystery').status.value)")
    assert out.split() == ["1", "7", "broken"]


@pytest.mark.parametrize("where", ["probe", "load"])
@pytest.mark.parametrize("how", ["raise RuntimeError('driver is too old')", "raise SystemExit(1)", "return 5"])
def test_a_backend_that_fails_on_first_use_raises_there(plugin_site, where, how):
    source = backend_source("late").replace(f'    log.append("{where}")', f'    log.append("{where}")\n    {how}')
    plugin_site.install("late", source, distribution="bnb-late")
    out = plugin_site.python(
        PRELUDE
        + """
print(told())
for _ in range(2):
    try:
        answer()
    except BackendError as error:
        print(error)
import sys
print(sys.modules["plugin_late"].log.count("probe"), plugin("late").status.value)
"""
    )
    before, first, second, last = out.splitlines()
    assert before == "[]"
    assert first == second
    assert "backend 'late' (bnb-late 1.0) is broken" in first
    assert ("probe" if where == "probe" else "loading its kernels") in first
    assert last == "1 broken"


def test_a_broken_backend_does_not_stop_a_working_one_for_the_same_device(plugin_site):
    broken = backend_source("broken", priority="9").replace('log.append("load")', "raise OSError('libgone.so')")
    plugin_site.install("broken", broken)
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(PRELUDE + "print(answer(), answer(), len(told()))\nprint(told()[0])")
    assert out.splitlines()[0] == "7 7 1"
    assert "'broken'" in out.splitlines()[1]


def test_a_backend_that_is_not_available_leaves_its_device_to_the_reference_and_says_why(plugin_site):
    source = backend_source("absent").replace("Availability(True)", "Availability(False, 'no such card')")
    plugin_site.install("absent", source)
    out = plugin_site.python(PRELUDE + "print(answer(), answer(), len(told()))\nprint(told()[0])")
    assert out.splitlines()[0] == f"{REFERENCE} {REFERENCE} 1"
    assert "does not serve device 'cpu' here: no such card" in out


@pytest.mark.parametrize(
    ("op_api", "upgrade"),
    [("(0, 0)", "pip install --upgrade dist-skewed"), ("(2, 4)", "pip install --upgrade bnb-core")],
)
def test_version_skew_is_found_before_anything_native_loads(plugin_site, op_api, upgrade):
    plugin_site.install("skewed", backend_source("skewed", op_api=op_api))
    out = plugin_site.python(
        PRELUDE
        + """
import sys
print(told()[0])
try:
    answer()
except BackendError as error:
    print(error)
print(sys.modules["plugin_skewed"].log, plugin("skewed").status.value)
"""
    )
    warned, raised, last = out.splitlines()
    assert warned == raised
    assert "incompatible: it was built for op API" in warned
    assert upgrade in warned
    assert last == "['probe'] incompatible"


def test_a_failed_backend_that_is_not_meant_for_this_machine_blocks_nothing(plugin_site):
    source = backend_source("skewed", op_api="(0, 0)").replace("Availability(True)", "Availability(False, 'no card')")
    plugin_site.install("skewed", source)
    assert plugin_site.python(PRELUDE + "print(answer(), len(told()))").split() == [str(REFERENCE), "1"]


def test_two_plugins_with_one_name(plugin_site):
    plugin_site.install("twin", backend_source("twin", 7), distribution="dist-a", module="twin_a")
    plugin_site.install("twin", backend_source("twin", 8), distribution="dist-b", module="twin_b")
    out = plugin_site.python(PRELUDE + "print(answer(), len(told()), len(REGISTRY.plugins))\nprint(told()[0])")
    values, message = out.splitlines()
    assert values.split()[:2] == ["7", "1"]
    assert "two plugins are called 'twin': dist-a 1.0 (twin_a:backend) and dist-b 1.0 (twin_b:backend)" in message


def test_equal_priority_for_one_op_is_reported_and_a_higher_one_decides(plugin_site):
    plugin_site.install("one", backend_source("one", 7))
    plugin_site.install("two", backend_source("two", 8))
    code = PRELUDE + "print(answer(), answer(), len(told()))\nprint(*told())"
    values, message = plugin_site.python(code).split("\n")[:2]
    assert values == "7 7 1"
    assert "backends 'one' and 'two' both serve int8_linear_matmul on device 'cpu' with the same priority" in message
    assert "BNB_DISABLE_BACKENDS=two" in message

    (plugin_site.path / "plugin_two.py").write_text(backend_source("two", 8, priority="1"))
    assert plugin_site.python(code).split("\n")[0] == "8 8 0"


def test_equal_priority_for_different_ops_is_no_conflict(plugin_site):
    plugin_site.install("one", backend_source("one", 7))
    plugin_site.install("two", backend_source("two", 8, op="int8_linear_matmul.out"))
    assert plugin_site.python(PRELUDE + "print(answer(), told())").split() == ["7", "[]"]


CALLABLE = """
import torch

def backend():
    import bitsandbytes
    assert bitsandbytes.__version__ and hasattr(torch.ops.bitsandbytes, "int8_linear_matmul")
    from bitsandbytes._ops import register_kernel

    def run(A, B):
        return torch.full((A.shape[0], B.shape[0]), 9, dtype=torch.int32)

    register_kernel("bitsandbytes::int8_linear_matmul", "cpu")(run)
    torch.library.impl("bitsandbytes::int8_linear_matmul", "XPU")(run)
    torch.library.impl("bitsandbytes::int8_linear_matmul.out", "XPU")(lambda A, B, out: out.fill_(9))
    return True
"""


def test_a_plugin_in_the_style_of_upstream(plugin_site):
    plugin_site.install("styled", CALLABLE)
    out = plugin_site.python(
        PRELUDE
        + """
print(answer(), told(), plugin("styled").status.value, plugin("styled").devices)
print(plugin("styled").direct_ops)
"""
    )
    assert out.splitlines() == [
        "9 [] called ('cpu', 'xpu')",
        "(('int8_linear_matmul', 'cpu'), ('int8_linear_matmul', 'xpu'), ('int8_linear_matmul.out', 'xpu'))",
    ]


def test_kernels_registered_directly_win_over_a_described_backend_and_that_is_reported(plugin_site):
    # The name of the described one sorts first: the order of loading must not matter.
    plugin_site.install("a_described", backend_source("a_described", 7))
    plugin_site.install("styled", CALLABLE)
    out = plugin_site.python(PRELUDE + "print(answer(), len(told()))\nprint(told()[0])")
    assert out.splitlines()[0] == "9 1"
    assert "backend 'styled' has registered kernels for int8_linear_matmul on device 'cpu' with torch directly" in out
    assert "those of backend 'a_described' are not used" in out


def test_a_callable_that_fails_half_way_blocks_the_devices_that_it_touched(plugin_site):
    plugin_site.install("styled", CALLABLE.replace("    return True", "    raise RuntimeError('half way')"))
    out = plugin_site.python(
        PRELUDE
        + """
print(len(told()), answer())
try:
    torch.ops.bitsandbytes.quantize_4bit(torch.ones(64), 64, "nf4", torch.uint8)
except BackendError as error:
    print(error)
"""
    )
    assert out.splitlines()[0] == "1 9"
    assert "half way" in out.splitlines()[1]


def test_a_plugin_that_is_imported_first_and_imports_the_core(plugin_site):
    plugin_site.install("early", backend_source("early").replace("import torch", "import torch, bitsandbytes"))
    out = plugin_site.python(
        "import plugin_early"
        + PRELUDE
        + """
print(plugin("early").status.value, answer(), plugin("early").status.value, answer(), told())
"""
    )
    assert out.split() == ["pending", "7", "registered", "7", "[]"]


def test_a_callable_plugin_that_is_imported_first_and_imports_the_core(plugin_site):
    plugin_site.install("early", CALLABLE.replace("import torch", "import torch, bitsandbytes", 1))
    out = plugin_site.python(
        "import plugin_early" + PRELUDE + "print(answer(), answer(), plugin('early').status.value)"
    )
    assert out.split() == ["9", "9", "called"]


def test_allow_list_really_prevents_the_import(plugin_site):
    plugin_site.install("one", backend_source("one", 7))
    plugin_site.install("two", backend_source("two", 8))
    code = PRELUDE + "import sys\nprint(answer(), 'plugin_one' in sys.modules, 'plugin_two' in sys.modules, told())"
    assert plugin_site.python(code, BNB_DISABLE_BACKENDS=None, BNB_BACKENDS=" two ,").split() == [
        "8", "False", "True", "[]",
    ]  # fmt: skip
    assert plugin_site.python(code, BNB_DISABLE_BACKENDS=None, BNB_BACKENDS="").split() == [
        str(REFERENCE), "False", "False", "[]",
    ]  # fmt: skip
    out = plugin_site.python(code, BNB_BACKENDS="one,two", BNB_DISABLE_BACKENDS="one")
    assert out.split() == ["8", "False", "True", "[]"]


@pytest.mark.parametrize("variable", ["BNB_BACKENDS", "BNB_DISABLE_BACKENDS"])
def test_an_unknown_name_in_a_list_is_reported(plugin_site, variable):
    plugin_site.install("one", backend_source("one", 7))
    out = plugin_site.python(PRELUDE + "print(*told())", **{variable: "oen"})
    assert f"{variable} names 'oen', but no such backend is installed" in out
    assert "one" in out


STRICT_CASES = {
    "broken": ({"bad": "raise OSError('libgone.so')"}, {}, "libgone.so"),
    "broken load": ({"bad": backend_source("bad").replace('log.append("load")', "raise OSError('x.so')")}, {}, "x.so"),
    "skew": ({"bad": backend_source("bad", op_api="(7, 7)")}, {}, "op API 7"),
    "conflict": ({"one": backend_source("one"), "two": backend_source("two")}, {}, "same priority"),
    "foreign": ({"one": backend_source("one"), "styled": CALLABLE}, {}, "with torch directly"),
    "unknown name": ({}, {"BNB_BACKENDS": "nope", "BNB_DISABLE_BACKENDS": None}, "BNB_BACKENDS names 'nope'"),
}


@pytest.mark.parametrize(("plugins", "env", "message"), STRICT_CASES.values(), ids=STRICT_CASES)
def test_strict_mode_raises_at_import(plugin_site, plugins, env, message):
    for name, source in plugins.items():
        plugin_site.install(name, source)
    result = plugin_site.run("-c", "import bitsandbytes", BNB_BACKENDS_STRICT="1", **env)
    assert result.returncode == 1
    assert "BackendError" in result.stderr.splitlines()[-1]
    assert message in result.stderr.splitlines()[-1]


def test_strict_mode_accepts_what_is_right(plugin_site):
    plugin_site.install("good", backend_source("good"))
    absent = backend_source("absent").replace("Availability(True)", "Availability(False, 'no such card')")
    plugin_site.install("absent", absent)
    assert plugin_site.python(PRELUDE + "print(answer())", BNB_BACKENDS_STRICT="yes").split() == ["7"]


def test_one_note_where_a_device_has_no_backend(plugin_site):
    code = PRELUDE + (
        "from bitsandbytes.backends.settings import Settings\n"
        "REGISTRY.settings = Settings(allow={allow}, deny=frozenset({deny}), strict=False)\n"
        "print(answer(), answer(), len(told()), *told())"
    )
    out = plugin_site.python(code.format(allow=None, deny=[]), BNB_DISABLE_BACKENDS=None, BNB_BACKENDS="")
    assert out.startswith(f"{REFERENCE} {REFERENCE} 1 no bitsandbytes backend for device 'cpu' is installed")
    assert "pip install 'bnb-core[cpu]'" in out
    # Whoever chose the reference is not told.
    quiet = plugin_site.python(code.format(allow="frozenset()", deny=[]), BNB_DISABLE_BACKENDS=None, BNB_BACKENDS="")
    assert quiet.split() == [str(REFERENCE), str(REFERENCE), "0"]
    quiet = plugin_site.python(code.format(allow=None, deny=["cpu"]), BNB_DISABLE_BACKENDS=None, BNB_BACKENDS="")
    assert quiet.split() == [str(REFERENCE), str(REFERENCE), "0"]


def test_backends_and_notes_under_torch_compile(plugin_site):
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(
        PRELUDE
        + """
@torch.compile(fullgraph=True, backend="aot_eager")
def compiled(x):
    return torch.ops.bitsandbytes.int8_linear_matmul(x, x) + 1

print(compiled(a)[0, 0].item(), torch.ops.bitsandbytes.int8_linear_matmul(a.to("meta"), a.to("meta")).shape)
"""
    )
    assert out.strip() == "8 torch.Size([2, 2])"


def test_import_from_several_threads(plugin_site):
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(
        """
import threading, torch
failures, answers = [], []
def work():
    try:
        import bitsandbytes
        a = torch.ones(2, 4, dtype=torch.int8)
        answers.append(torch.ops.bitsandbytes.int8_linear_matmul(a, a)[0, 0].item())
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
import sys
print(set(answers), failures, sys.modules["plugin_good"].log)
"""
    )
    assert out.strip() == "{7} [] ['probe', 'load']"


def test_an_application_without_metadata(plugin_site):
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(
        "import importlib.metadata\nimportlib.metadata.entry_points = lambda **params: ()\n"
        + PRELUDE
        + "print(answer(), REGISTRY.plugins)",
        BNB_DISABLE_BACKENDS=None,
    )
    assert out.split() == [str(REFERENCE), "[]"]


def test_a_device_that_an_extension_adds_after_the_import(plugin_site):
    plugin_site.install("mydev", backend_source("mydev", devices="('mydev',)"))
    out = plugin_site.python(
        PRELUDE
        + """
print(sorted(REGISTRY._libraries))
torch.utils.rename_privateuse1_backend("mydev")
print(REGISTRY.before_reference("mydev"), sorted(REGISTRY._libraries), REGISTRY.before_reference("mydev"))
print(torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::int8_linear_matmul", "PrivateUse1"))
"""
    )
    assert out.splitlines() == ["[]", "True ['mydev'] False", "True"]


def test_the_entry_can_be_called_without_the_dispatcher(plugin_site):
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(
        PRELUDE
        + """
entry = REGISTRY.entry("int8_linear_matmul", "cpu")
print(entry(a, a)[0, 0].item(), REGISTRY.entry("int8_linear_matmul", "xpu"))
"""
    )
    assert out.split() == ["7", "None"]


def test_a_kernel_for_an_op_that_the_core_does_not_know(plugin_site):
    plugin_site.install("future", backend_source("future", op="op_of_tomorrow"))
    out = plugin_site.python(PRELUDE + "print(answer(), plugin('future').unknown_ops)")
    assert out.strip() == f"{REFERENCE} ('op_of_tomorrow',)"


def test_a_warning_points_at_the_line_of_the_user(plugin_site):
    plugin_site.install("bad", "raise ImportError('gone')")
    (plugin_site.path / "program.py").write_text("import torch\nimport bitsandbytes  # the line of the user\n")
    result = plugin_site.run("-m", "program")
    assert result.returncode == 0
    first, second = result.stderr.splitlines()[:2]
    assert "program.py:2: BackendWarning: backend 'bad'" in first
    assert second.strip() == "import bitsandbytes  # the line of the user"
