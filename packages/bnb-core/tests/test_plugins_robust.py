"""Plugins that are slow, incomplete or in the way, and applications without metadata; each really installed."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from test_plugins import PRELUDE, REFERENCE, backend_source

NATIVE = """
from bitsandbytes.backends import Availability, Backend, Kernel

def load():
    from native_part import kernels
    return kernels()

backend = Backend(
    name="native", version="1.0", devices=("cpu",), op_api=(1, 1), probe=lambda: Availability(True), load=load
)
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler on Linux")
@pytest.mark.parametrize("when", ["at import", "on first use"])
def test_a_module_whose_shared_library_is_missing(plugin_site, tmp_path, when):
    """A real extension module, linked against a library that is then taken away."""

    def compile_library(name, *arguments):
        (tmp_path / "source.c").write_text(
            "int answer(void) { return 1; }\nvoid *PyInit_native_part(void) { return 0; }\n"
        )
        command = ["cc", "-shared", "-fPIC", "-o", str(name), str(tmp_path / "source.c"), *arguments]
        subprocess.run(command, check=True, capture_output=True)

    compile_library(tmp_path / "libvendor_runtime.so", "-Wl,-soname,libvendor_runtime.so.7")
    compile_library(plugin_site.path / "native_part.so", "-Wl,--no-as-needed", f"-L{tmp_path}", "-lvendor_runtime")
    source = "import native_part\n" + NATIVE if when == "at import" else NATIVE
    plugin_site.install("native", source, distribution="bnb-native-part")
    out = plugin_site.python(
        PRELUDE
        + """
print("warned", failures())
try:
    print(answer())
except BackendError as error:
    print("raised", error)
print(plugin("native").status.value)
"""
    )
    warned, used, status = out.splitlines()
    missing = "libvendor_runtime.so.7: cannot open shared object file"
    assert status == "broken"
    if when == "at import":
        # Nothing tells which device it would have served.
        assert missing in warned
        assert used == str(REFERENCE)
    else:
        assert warned == "warned []"
        assert missing in used
        assert "backend 'native' (bnb-native-part 1.0) is broken" in used
    report = plugin_site.bnb("doctor", "--no-selftest")
    assert "install the library libvendor_runtime.so.7" in report.stdout


NOWHERE = {
    "no module of this name": ("plugin_gone:backend", "ModuleNotFoundError"),
    "no attribute of this name": ("plugin_real:nothing", "AttributeError"),
    "no submodule of this name": ("plugin_real.deeper:backend", "ModuleNotFoundError"),
    "a module alone": ("plugin_real", "TypeError: it is a module"),
    "no object reference": ("not an object reference", ""),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("target", "cause"), NOWHERE.values(), ids=NOWHERE)
def test_an_entry_point_to_nothing(plugin_site, target, cause):
    (plugin_site.path / "plugin_real.py").write_text("")
    plugin_site.record("dist-real", "1.0", [], f"[bitsandbytes.backends]\nreal = {target}\n")
    plugin_site.install("good", backend_source("good"))
    out = plugin_site.python(PRELUDE + "print(answer(), plugin('real').status.value)\nprint(failures())")
    first, warned = out.splitlines()
    assert first == "7 broken"
    assert "backend 'real' (dist-real 1.0) is broken" in warned
    assert cause in warned
    listed = plugin_site.bnb("plugins", "list")
    assert listed.returncode == 1
    assert "broken" in listed.stdout


def test_a_slow_import_is_done_once_and_the_doctor_names_it(plugin_site):
    slow = "import time\ntime.sleep(0.6)\nimport builtins\nbuiltins.imports = getattr(builtins, 'imports', 0) + 1\n"
    plugin_site.install("slow", slow + backend_source("slow"))
    out = plugin_site.python(PRELUDE + "import builtins\nprint(answer(), answer(), builtins.imports)")
    assert out.split() == ["7", "7", "1"]
    report = plugin_site.bnb("doctor", "--no-selftest")
    assert report.returncode == 0, report.stdout
    assert "importing backend 'slow' takes 0." in report.stdout


def test_a_quick_import_is_not_worth_a_word(plugin_site):
    plugin_site.install("good", backend_source("good"))
    assert "importing backend" not in plugin_site.bnb("doctor", "--no-selftest").stdout


def test_first_calls_from_several_threads(plugin_site):
    """Probe and load run once, and no thread gets an answer of the reference in between."""
    slow = backend_source("good").replace(
        '    log.append("load")', '    import time; time.sleep(0.2); log.append("load")'
    )
    plugin_site.install("good", slow)
    out = plugin_site.python(
        PRELUDE
        + """
import sys, threading
answers, barrier = [], threading.Barrier(8)
def work():
    barrier.wait()
    answers.append(answer())
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(answers, sys.modules["plugin_good"].log)
"""
    )
    assert out.strip() == "[7, 7, 7, 7, 7, 7, 7, 7] ['probe', 'load']"


def test_import_from_several_threads_with_a_slow_plugin(plugin_site):
    """A thread that finds the import under way waits for it, backends included."""
    plugin_site.install("slow", "import time\ntime.sleep(0.3)\n" + backend_source("slow"))
    out = plugin_site.python(
        """
import threading, torch
found, barrier = [], threading.Barrier(6)
def work():
    barrier.wait()
    import bitsandbytes
    from bitsandbytes.backends.registry import REGISTRY
    a = torch.ones(2, 4, dtype=torch.int8)
    found.append((len([p for p in REGISTRY.plugins if p.name == "slow"]),
                  torch.ops.bitsandbytes.int8_linear_matmul(a, a)[0, 0].item()))
threads = [threading.Thread(target=work) for _ in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
print(set(found), len(found))
"""
    )
    assert out.strip() == "{(1, 7)} 6"


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_an_application_with_modules_but_without_metadata(plugin_site, tmp_path):
    """What a freezer makes: every module, no metadata of any distribution, no site folder."""
    import bitsandbytes

    frozen = tmp_path / "frozen"
    frozen.mkdir()
    core = Path(bitsandbytes.__file__).parent
    # Some systems name folders that need not exist.
    folders = [Path(folder) for folder in site.getsitepackages() if Path(folder).is_dir()]
    packages = [path for folder in folders for path in folder.iterdir()]
    for path in [core, core.parent / "bnb_native", *packages]:
        link = frozen / path.name
        if not path.name.endswith((".dist-info", ".egg-info", ".pth")) and not link.exists():
            link.symlink_to(path)
    code = """
import warnings
warnings.simplefilter("error")
import importlib.metadata, sys
assert not list(importlib.metadata.distributions()), sys.path
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    import torch, bitsandbytes
    from bitsandbytes.backends.registry import REGISTRY
    a = torch.ones(2, 4, dtype=torch.int8)
    print(torch.ops.bitsandbytes.int8_linear_matmul(a, a)[0, 0].item(), REGISTRY.plugins, bitsandbytes.__version__)
from bitsandbytes.diagnostics.report import collect
report = collect(selftest=False)
print([finding.text for finding in report.findings if "has no metadata here" in finding.text])
"""
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(frozen), "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.split() == [str(REFERENCE), "[]", bitsandbytes.__version__]
    assert "a frozen application" in second


@pytest.mark.parametrize("name", ["two words", "Ünïcode", "dots.in.it", "a-b"])
def test_names_of_every_kind(plugin_site, name):
    plugin_site.record("dist-odd", "1.0", [], f"[bitsandbytes.backends]\n{name} = plugin_odd:backend\n")
    (plugin_site.path / "plugin_odd.py").write_text(backend_source(name))
    out = plugin_site.python(PRELUDE + f"print(answer(), plugin({name!r}).status.value, told())")
    assert out.split() == ["7", "registered", "[]"]
