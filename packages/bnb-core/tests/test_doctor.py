"""``bnb doctor``: the report, and the faults that it finds in real installations."""

import base64
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import bitsandbytes
from bitsandbytes.backends.plugin import Plugin, Status
from bitsandbytes.backends.registry import Registry
from bitsandbytes.contract import OPS
from bitsandbytes.diagnostics import findings, installation, machine, selftest
from bitsandbytes.diagnostics.finding import Level
from bitsandbytes.diagnostics.machine import Device
from bitsandbytes.diagnostics.report import collect

CPU = Device("cpu", ("2 threads",))
CUDA = Device("cuda", ("a card",))

WRONG = """
import torch
from bitsandbytes.backends import Availability, Backend, Kernel

def wrong(A, B):
    return A.int() @ B.int().T + 1

def missing():
    raise OSError("libgone.so.7: cannot open shared object file: No such file or directory")

backend = Backend(
    name="wrong", version="1.0", devices=("cpu",), op_api=(1, 1), probe=lambda: Availability(True),
    load=lambda: [Kernel("int8_linear_matmul", wrong)],
)
"""


def report_of(site, *arguments, **variables):
    result = site.bnb("doctor", "--json", *arguments, **variables)
    return result.returncode, json.loads(result.stdout)


def texts(report):
    return [finding["text"] for finding in report["findings"]]


def test_the_report_of_a_working_installation(plugin_site):
    code, report = report_of(plugin_site)
    assert code == 0, report["findings"]
    assert report["healthy"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["type"] == "cpu"
    assert [step["passed"] for step in report["selftest"]["cpu"]] == [True] * len(selftest.STEPS)


def test_the_report_for_people_and_the_module_as_a_command(plugin_site):
    result = plugin_site.run("-m", "bitsandbytes")
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("Versions", "Devices", "Self-test", "4-bit matmul", torch.__version__):
        assert text in result.stdout
    assert "Self-test" not in plugin_site.run("-m", "bitsandbytes", "--no-selftest").stdout


def test_a_kernel_that_computes_wrong_numbers_is_found(plugin_site):
    plugin_site.install("wrong", WRONG)
    code, report = report_of(plugin_site)
    assert code == 1
    assert any(text.startswith("self-test on 'cpu': int8 matmul failed") for text in texts(report))
    steps = {step["name"]: step["passed"] for step in report["selftest"]["cpu"]}
    assert steps.pop("int8 matmul") is False
    assert all(steps.values())


def test_a_missing_shared_library_is_named(plugin_site):
    plugin_site.install("wrong", WRONG.replace('load=lambda: [Kernel("int8_linear_matmul", wrong)]', "load=missing"))
    code, report = report_of(plugin_site, "--no-selftest")
    assert code == 1
    (finding,) = [finding for finding in report["findings"] if "libgone.so.7" in finding["text"]]
    assert finding["level"] == "error"
    assert "install the library libgone.so.7" in finding["mend"]


@pytest.mark.parametrize("kind", list(selftest.STEPS))
@pytest.mark.parametrize("fault", [lambda x: x + 1, lambda x: x * math.nan, lambda x: x.flatten()[:3]])
def test_each_step_of_the_selftest_can_fail(monkeypatch, kind, fault):
    step = selftest.STEPS[kind]

    def faulty(device):
        actual, expected, allowed = step(device)
        return fault(actual.double()), expected, allowed

    monkeypatch.setitem(selftest.STEPS, kind, faulty)
    failed = [step.name for step in selftest.run_selftest("cpu") if not step.passed]
    assert failed == [kind]


# --- files ----------------------------------------------------------------------------------------


def copy_of_core(site):
    """The package, installed as from a wheel: files and a record with their hashes."""
    package = Path(bitsandbytes.__file__).parent
    target = site.path / "bitsandbytes"
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    files = []
    for path in sorted(target.rglob("*.py")):
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
        files.append((path.relative_to(site.path).as_posix(), digest))
    info = site.record("bnb-core", bitsandbytes.__version__, [])
    (info / "RECORD").write_text("".join(f"{name},sha256={digest},1\n" for name, digest in files))
    return target


def test_a_distribution_that_has_written_over_the_package(plugin_site):
    package = copy_of_core(plugin_site)
    (package / "__init__.py").write_text('__version__ = "0.50.2"\n')
    plugin_site.record("bitsandbytes", "0.50.2", ["bitsandbytes/__init__.py", "bitsandbytes/functional.py"])
    code, report = report_of(plugin_site)
    assert code == 1
    (finding,) = report["findings"]
    assert "another distribution has replaced modules of bnb-core" in finding["text"]
    assert "bitsandbytes 0.50.2" in finding["text"]
    assert finding["mend"] == "pip uninstall -y bitsandbytes && pip install --force-reinstall --no-deps bnb-core"


def test_a_distribution_that_the_package_was_written_over(plugin_site):
    copy_of_core(plugin_site)
    plugin_site.record("bitsandbytes", "0.49.0", ["bitsandbytes/__init__.py", "bitsandbytes/old.py"])
    warned = plugin_site.run("-c", "import bitsandbytes")
    assert warned.returncode == 0
    assert warned.stderr.count("distribution bitsandbytes 0.49.0 has its own modules") == 1
    code, report = report_of(plugin_site, "--no-selftest")
    assert code == 1
    assert len([text for text in texts(report) if "0.49.0 has its own" in text]) == 1
    assert any("uninstalling it would delete files of bnb-core" in text for text in texts(report))


def test_a_changed_file_is_named(plugin_site):
    package = copy_of_core(plugin_site)
    with (package / "consts.py").open("a") as file:
        file.write("# edited\n")
    code, report = report_of(plugin_site, "--no-selftest")
    assert code == 1
    assert "files of bnb-core are not as they were installed: bitsandbytes/consts.py" in texts(report)


def test_an_untouched_installation_has_no_such_finding(plugin_site):
    copy_of_core(plugin_site)
    code, report = report_of(plugin_site, "--no-selftest")
    assert code == 0
    assert not [text for text in texts(report) if "bitsandbytes/" in text]


def test_the_loader_of_another_package_calls_a_description(recwarn):
    from bitsandbytes.backends import Availability, Backend

    backend = Backend("some", "1", ("cpu",), (1, 1), lambda: Availability(True), list)
    assert backend() is None
    assert "another distribution has written its files over the package" in str(recwarn.pop().message)


def test_a_folder_that_hides_the_installed_package(plugin_site, tmp_path):
    installed = tmp_path / "installed"
    installed.mkdir()
    # The directory that the program is run from has a source checkout without metadata.
    checkout = copy_of_core(plugin_site)
    shutil.copytree(checkout, installed / "bitsandbytes")
    (info,) = plugin_site.path.glob("bnb_core-*.dist-info")
    shutil.move(info, installed)
    code, report = report_of(plugin_site, "--no-selftest", PYTHONPATH=str(installed))
    assert code == 1
    (finding,) = [finding for finding in report["findings"] if "is in the way" in finding["text"]]
    assert f"imported from {checkout}, " in finding["text"]
    assert f"installed in {installed}:" in finding["text"]


def test_two_installations_of_the_core(plugin_site, tmp_path):
    copy_of_core(plugin_site)
    second = tmp_path / "user-site"
    info = second / "bnb_core-0.49.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bnb-core\nVersion: 0.49.9\n")
    path = os.pathsep.join([str(plugin_site.path), str(second)])
    _code, report = report_of(plugin_site, "--no-selftest", PYTHONPATH=path)
    (finding,) = [text for text in texts(report) if "times, and the first is used" in text]
    assert f"{bitsandbytes.__version__} in {plugin_site.path}, 0.49.9 in {second}" in finding


# --- versions, torch, devices ---------------------------------------------------------------------


def versions(monkeypatch, **by_name):
    monkeypatch.setattr(findings, "installed_version", lambda name: by_name.get(name.replace("-", "_")))
    monkeypatch.setattr(findings, "overwritten_files", list)
    monkeypatch.setattr(findings, "intruders", list)
    return {finding.text: finding.level for finding in findings.installation_findings()}


def test_versions_that_agree(monkeypatch):
    assert versions(monkeypatch, bnb_core="0.50.2", bitsandbytes="0.50.2") == {}


def test_versions_that_do_not_agree(monkeypatch):
    (text,) = versions(monkeypatch, bnb_core="0.50.2")
    assert "accelerate and diffusers look the library up by that name" in text
    (text,) = versions(monkeypatch, bnb_core="0.50.2", bitsandbytes="0.49.1")
    assert "distribution bitsandbytes 0.49.1 does not belong to bnb-core 0.50.2" in text
    found = versions(monkeypatch, bnb_core="0.50.1", bitsandbytes="0.50.2")
    assert Level.ERROR in found.values()
    (text,) = versions(monkeypatch, bitsandbytes="0.50.2")
    assert "bnb-core has no metadata here" in text


def torch_built_for(monkeypatch, cuda=None, hip=None, vendors=()):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(findings, "gpu_vendors", lambda: list(vendors))


def test_a_torch_without_gpu_support_on_a_machine_with_a_gpu(monkeypatch):
    torch_built_for(monkeypatch, vendors=["NVIDIA"])
    (finding,) = findings.torch_findings([CPU])
    assert "a driver for NVIDIA GPUs is loaded, but this torch is a build without GPU support" in finding.text


def test_a_torch_without_gpu_support_beside_a_gpu_backend(monkeypatch):
    torch_built_for(monkeypatch)
    registry = Registry()
    registry.plugins.append(Plugin("cuda", status=Status.SKIPPED))
    monkeypatch.setattr(findings, "REGISTRY", registry)
    (finding,) = findings.torch_findings([CPU])
    assert "backend 'cuda' is installed, but torch" in finding.text


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    torch_built_for(monkeypatch, cuda="12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (finding,) = findings.torch_findings([CPU])
    assert "can use none: CUDA_VISIBLE_DEVICES hides every GPU" in finding.text


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


def test_a_driver_that_is_too_old(monkeypatch):
    torch_built_for(monkeypatch, cuda="12.8")
    monkeypatch.setattr(findings, "why_no_cuda", lambda: TOO_OLD)
    (finding,) = findings.torch_findings([CPU])
    assert TOO_OLD in finding.text
    assert finding.mend.startswith("install a driver for CUDA 12.8 or later")


@pytest.mark.parametrize(("cuda", "hip", "plugin"), [("12.8", None, "rocm"), (None, "6.4", "cuda")])
def test_a_backend_for_the_other_vendor(monkeypatch, cuda, hip, plugin):
    torch_built_for(monkeypatch, cuda=cuda, hip=hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    registry = Registry()
    registry.plugins.append(Plugin(plugin))
    monkeypatch.setattr(findings, "REGISTRY", registry)
    (finding,) = findings.torch_findings([CPU, CUDA])
    assert f"backend {plugin!r} is installed, but torch" in finding.text
    assert finding.mend.startswith(f"pip uninstall -y bnb-{plugin} && pip install")


def test_a_torch_that_is_too_old(monkeypatch):
    torch_built_for(monkeypatch)
    monkeypatch.setattr(torch, "__version__", "2.3.1+cpu")
    (finding,) = findings.torch_findings([CPU])
    assert (finding.level, finding.mend) == (Level.ERROR, "pip install --upgrade torch")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("/lib/libc.so.6: version `GLIBC_2.34' not found (required by _C.so)", "libc has GLIBC 2.34 or later"),
        ("libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "libstdc++ has GLIBCXX 3.4.32 or later"),
        ("_C.so: undefined symbol: _ZN3c105ErrorC2E", "built against other versions of its libraries"),
        ("libnvJitLink.so.12: cannot open shared object file", "install the library libnvJitLink.so.12"),
        ("no card", ""),
    ],
)
def test_what_a_native_module_wants_that_does_not_load(error, hint):
    registry = Registry()
    plugin = Plugin("late", "bnb-late", "1.0")
    plugin.fail(Status.BROKEN, f"loading its kernels raised ImportError: {error}", ImportError(error))
    registry.plugins.append(plugin)
    (finding,) = [finding for finding in findings.plugin_findings([], registry) if "'late'" in finding.text]
    assert hint in finding.mend
    assert finding.mend.endswith("pip install --upgrade --force-reinstall --no-deps bnb-late")


def test_a_runtime_of_another_version_on_the_path_of_the_loader(monkeypatch, tmp_path):
    from bitsandbytes.diagnostics import cuda

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cuda, "CUDA_RUNTIME_LIB_PATTERNS", ("libcudart*.so*",))
    for major in (11, 12):
        (tmp_path / str(major)).mkdir()
        (tmp_path / str(major) / f"libcudart.so.{major}").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join([str(tmp_path / "12"), str(tmp_path / "11"), ""]))
    (finding,) = findings.environment_findings()
    assert f"the runtime of CUDA 11 in {tmp_path / '11'}" in finding.text
    monkeypatch.setattr(torch.version, "cuda", None)
    assert list(findings.environment_findings()) == []


@pytest.mark.parametrize(
    ("capability", "built_for", "found"),
    [
        ((8, 6), ["sm_80", "sm_90"], False),
        ((6, 1), ["sm_75", "sm_80"], True),
        ((12, 0), ["sm_80", "sm_90a"], True),
        ((12, 0), ["sm_90", "compute_90"], False),
        ((9, 0), ["sm_90a"], False),
    ],
)
def test_a_gpu_that_torch_has_no_code_for(monkeypatch, capability, built_for, found):
    torch_built_for(monkeypatch, cuda="12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    assert bool(list(findings.torch_findings([CPU, CUDA]))) is found


def test_a_device_without_a_backend():
    (finding,) = findings.plugin_findings([CUDA], Registry())
    assert finding.level is Level.WARNING
    assert "no backend for device 'cuda' is installed" in finding.text
    assert finding.mend == f"pip install 'bnb-core[{'rocm' if torch.version.hip else 'cuda'}]'"


def test_variables_without_effect(monkeypatch):
    monkeypatch.setenv("BNB_CUDA_VERSION", "999")
    (finding,) = findings.environment_findings()
    assert "BNB_CUDA_VERSION has no effect" in finding.text


def test_devices_of_this_machine():
    devices = machine.usable_devices()
    assert devices[0].type == "cpu"
    assert ("cuda" in {device.type for device in devices}) == torch.cuda.is_available()


def test_the_report_in_this_process_is_json():
    assert json.loads(json.dumps(collect().as_dict()))["devices"]


def test_owners_are_found_by_their_files(plugin_site):
    from importlib import metadata

    plugin_site.record("other-fork", "1.2", ["bitsandbytes/__init__.py", "bitsandbytes/data.bin"])
    plugin_site.record("bitsandbytes", "0.50.2", ["bitsandbytes-0.50.2.dist-info/METADATA"])
    plugin_site.record("bitsandbytes-like", "1.0", ["bitsandbytes_like/__init__.py"])
    (owner,) = installation.owners(metadata.distributions(path=[str(plugin_site.path)]))
    assert (owner.label, owner.files) == ("other-fork 1.2", ("bitsandbytes/__init__.py",))


# --- facades --------------------------------------------------------------------------------------


def test_the_c_library_facade():
    from bitsandbytes import cextension

    assert cextension.parse_cuda_version("128") == "12.8"
    assert cextension.parse_cuda_version("1210") == "12.10"
    assert cextension._split_cuda_version("713", True) == (7, 13)
    symbol = cextension.ErrorHandlerMockBNBNativeLibrary("it is not there").cdequantize_blockwise_fp32
    with pytest.raises(RuntimeError, match="'cdequantize_blockwise_fp32': it is not there"):
        symbol(1, 2)
    # A caller tells a real C function by this attribute.
    assert not hasattr(symbol, "restype")


def test_the_cuda_facades_without_a_gpu_backend():
    from bitsandbytes.backends.cuda import ops
    from bitsandbytes.cuda_specs import CUDASpecs

    assert ops._gemm_4bit_use_custom_fn(0, torch.float16, 1, 64, 64) is False
    assert ops._gemm_4bit_custom_max_m == 1536
    assert CUDASpecs((7, 5), "128", (12, 8)).has_imma
    assert not CUDASpecs((7, 0), "128", (12, 8)).has_imma


def test_runtime_libraries_on_the_path_are_found(monkeypatch, tmp_path, capsys):
    from bitsandbytes.diagnostics import cuda

    (tmp_path / "libcudart.so.12").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/nowhere:{tmp_path}")
    monkeypatch.setattr(cuda, "CUDA_RUNTIME_LIB_PATTERNS", ("libcudart*.so*",))
    assert next(cuda.find_cudart_libraries()) == tmp_path / "libcudart.so.12"


def test_coverage_names_every_op():
    plugin = Plugin("styled", status=Status.CALLED, direct_ops=(("quantize_4bit", "xpu"),))
    coverage = Registry().coverage(plugin)
    assert coverage.keys() == OPS.keys()
    assert [name for name, kind in coverage.items() if kind == "native"] == ["quantize_4bit"]
