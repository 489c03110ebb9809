"""What can be wrong with an installation, and what mends it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import torch
from packaging.version import Version

from bitsandbytes.backends.plugin import FAILED, WHEELS, Plugin, Status
from bitsandbytes.backends.registry import REGISTRY, Registry
from bitsandbytes.backends.settings import DENY
from bitsandbytes.diagnostics.cuda import find_cuda_libraries_in_path_list
from bitsandbytes.diagnostics.finding import Finding, Level
from bitsandbytes.diagnostics.installation import (
    CORE,
    PACKAGE_DIR,
    SHIM,
    copies_of_core,
    installed_version,
    intruders,
    overwritten_files,
    restore_command,
    second_owner,
)
from bitsandbytes.diagnostics.machine import Device, gpu_vendors, torch_build, why_no_cuda
from bitsandbytes.diagnostics.utils import listed

#: How to get a fitting torch; its index differs by GPU, so the selector on its site is the way.
OTHER_TORCH = 'install a build of torch for this GPU: choose it on PyTorch\'s page "Get started"'

#: What the metadata of bnb-core demands, for those who installed without it.
OLDEST_TORCH = (2, 4)
#: Seconds from which the import of a plugin is worth a word.
SLOW_IMPORT = 0.5


def installation_findings() -> Iterator[Finding]:
    """Distributions that share the folder, and versions that do not fit."""
    changed = overwritten_files()
    for owner in intruders():
        harm = f"it has replaced {listed(changed)}" if changed else "uninstalling it would delete files of bnb-core"
        yield Finding(
            Level.ERROR,
            f"distribution {owner.label} has its own {len(owner.files)} modules in the folder bitsandbytes/; {harm}",
            restore_command([owner.name]),
        )
    if changed and not intruders():
        yield Finding(
            Level.ERROR,
            f"files of bnb-core are not as they were installed: {listed(changed)}",
            f"pip install --force-reinstall --no-deps {CORE}",
        )
    yield from _version_findings()


def place_findings() -> Iterator[Finding]:
    """Whether the package that is imported is the one that is installed, and installed once."""
    copies = copies_of_core()
    if len(copies) > 1:
        places = ", ".join(f"{copy.version} in {copy.folder}" for copy in copies)
        yield Finding(
            Level.WARNING,
            f"bnb-core is installed {len(copies)} times, and the first is used: {places}",
            f"pip uninstall -y {CORE}, until pip finds no more, then pip install {CORE}",
        )
    if copies and copies[0].package is not None and copies[0].package != PACKAGE_DIR:
        yield Finding(
            Level.ERROR,
            f"bitsandbytes is imported from {PACKAGE_DIR}, but bnb-core is installed in {copies[0].folder}: a folder "
            "of that name is in the way, in the current directory or on PYTHONPATH",
            f"rename {PACKAGE_DIR}, or run from another directory",
        )


def _version_findings() -> Iterator[Finding]:
    from bitsandbytes import __version__

    core, shim = installed_version(CORE), installed_version(SHIM)
    if core is None:
        yield Finding(
            Level.WARNING,
            "bnb-core has no metadata here (a frozen application or a bare source tree): no backend can be found",
            f"pip install {CORE}",
        )
    elif core != __version__:
        yield Finding(
            Level.ERROR,
            f"the metadata of bnb-core says {core}, its code {__version__}: an installation was interrupted",
            f"pip install --force-reinstall --no-deps {CORE}",
        )
    if shim is None:
        yield Finding(
            Level.WARNING,
            "no distribution is called `bitsandbytes`: accelerate and diffusers look the library up by that name and "
            "will say that it is not installed",
            f"install the metadata-only wheel bitsandbytes {__version__} of this project, which owns no file",
        )
    elif shim != __version__:
        yield Finding(
            Level.WARNING,
            f"distribution bitsandbytes {shim} does not belong to bnb-core {__version__}",
            f"install the metadata-only wheel bitsandbytes {__version__} of this project",
        )


def torch_findings(devices: list[Device]) -> Iterator[Finding]:
    """Whether this build of torch fits the machine and the plugins."""
    gpu_build = torch.version.cuda is not None or torch.version.hip is not None
    if Version(torch.__version__).release < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Finding(
            Level.ERROR,
            f"torch {torch.__version__} is older than {oldest}, the oldest that bnb-core works with",
            "pip install --upgrade torch",
        )
    usable = {device.type for device in devices}
    plugins = [plugin.name for plugin in REGISTRY.plugins if plugin.name in ("cuda", "rocm")]
    if not gpu_build and (vendors := gpu_vendors()):
        yield Finding(
            Level.WARNING,
            f"a driver for {' and '.join(vendors)} GPUs is loaded, but this torch is a build without GPU support",
            OTHER_TORCH,
        )
    elif not gpu_build and plugins:
        yield Finding(
            Level.WARNING,
            f"backend {plugins[0]!r} is installed, but torch {torch.__version__} is a build without GPU support",
            f"{OTHER_TORCH}; or, on a machine without one: pip uninstall -y bnb-{plugins[0]}",
        )
    if gpu_build and "cuda" not in usable:
        reason = why_no_cuda()
        yield Finding(
            Level.WARNING,
            f"torch {torch.__version__} is built for GPUs but can use none: {reason}",
            _mend_of_no_gpu(reason),
        )
    other = "rocm" if torch.version.cuda else "cuda"
    if gpu_build and other in plugins:
        fitting = "cuda" if torch.version.cuda else "rocm"
        yield Finding(
            Level.WARNING,
            f"backend {other!r} is installed, but torch {torch.__version__} is a build for {torch_build()}",
            f"pip uninstall -y bnb-{other} && pip install 'bnb-core[{fitting}]'; or {OTHER_TORCH}",
        )
    if "cuda" in usable and torch.version.cuda:
        yield from _capability_findings()


def _mend_of_no_gpu(reason: str) -> str:
    if "driver" in reason and "too old" in reason:
        return f"install a driver for CUDA {torch.version.cuda} or later; or a torch for the CUDA that nvidia-smi shows"
    if "hides every GPU" in reason:
        return "unset CUDA_VISIBLE_DEVICES"
    return "check the driver with nvidia-smi or rocm-smi; in a container, pass the GPU through (docker run --gpus all)"


def _capability_findings() -> Iterator[Finding]:
    built_for = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        # A binary for one minor version runs on the later ones of the same major; PTX on all later GPUs.
        binaries = [int(arch[3:].rstrip("af")) for arch in built_for if arch.startswith("sm_")]
        runs = any(arch // 10 == major and arch % 10 <= minor for arch in binaries)
        if built_for and not runs and not any(arch.startswith("compute_") for arch in built_for):
            yield Finding(
                Level.ERROR,
                f"GPU {index} has compute capability {major}.{minor}; torch is built for {', '.join(built_for)}",
                OTHER_TORCH,
            )


def plugin_findings(devices: list[Device], registry: Registry = REGISTRY) -> Iterator[Finding]:
    """Failed plugins, devices without a backend, conflicts."""
    for plugin in registry.plugins:
        if plugin.status in FAILED:
            level = Level.ERROR if plugin.blocks() else Level.WARNING
            mend = f"{_library_hint(plugin)}{plugin.mend}"
            yield Finding(
                level, f"backend {plugin.name!r} ({plugin.distribution} {plugin.version}): {plugin.cause}", mend
            )
        if plugin.unknown_ops:
            yield Finding(
                Level.WARNING,
                f"backend {plugin.name!r} has kernels for ops that this core does not know: "
                f"{listed(list(plugin.unknown_ops))}; they are never called",
                f"pip install --upgrade {CORE}",
            )
        if plugin.import_seconds >= SLOW_IMPORT:
            yield Finding(
                Level.WARNING,
                f"importing backend {plugin.name!r} takes {plugin.import_seconds:.1f} s of each import of bitsandbytes",
                f"report it to {plugin.distribution}; to do without it: export {DENY}={plugin.name}",
            )
    for device in devices:
        yield from _device_findings(device.type, registry)
    told = {plugin.describe_failure() for plugin in registry.plugins if plugin.status in FAILED} | {second_owner()}
    for report in registry.reports:
        if report not in told:
            yield Finding(Level.WARNING, report)


def _device_findings(device: str, registry: Registry) -> Iterator[Finding]:
    claims = [plugin for plugin in registry.plugins if device in plugin.devices]
    if any(plugin.availability().available for plugin in claims) or any(plugin.blocks() for plugin in claims):
        return
    skipped = [plugin for plugin in claims if plugin.status is Status.SKIPPED]
    declined = [plugin for plugin in claims if plugin.status is Status.REGISTERED]
    if skipped:
        yield Finding(Level.INFO, f"device {device!r} runs on the reference: {skipped[0].name!r} is {skipped[0].cause}")
    elif declined:
        reason = declined[0].availability().reason.rstrip(". ")
        yield Finding(Level.WARNING, f"backend {declined[0].name!r} does not serve device {device!r}: {reason}")
    else:
        wheel = WHEELS.get(device)
        yield Finding(
            Level.WARNING,
            f"no backend for device {device!r} is installed; it runs on the slower PyTorch reference",
            f"pip install {wheel!r}" if wheel else "install a backend plugin for this device",
        )


def _library_hint(plugin: Plugin) -> str:
    """For a failure to load native code: what that kind of failure wants, before the general mend."""
    text = str(plugin.error or "")
    if found := re.search(r"version [`'](GLIBC(?:XX)?|CXXABI)_([\d.]+)' not found", text):
        library = "libc" if found[1] == "GLIBC" else "libstdc++"
        return (
            f"install a system or an environment whose {library} has {found[1]} {found[2]} or later; if there is one: "
        )
    if "undefined symbol" in text:
        return "the module was built against other versions of its libraries; install a wheel built for these: "
    if "cannot open shared object file" not in text and "DLL load failed" not in text:
        return ""
    library = text.partition(":")[0]
    return f"install the library {library} or put its folder on LD_LIBRARY_PATH; if it came with the wheel: "


def environment_findings() -> Iterator[Finding]:
    """Variables that do not do what their name promises."""
    for variable in ("BNB_CUDA_VERSION", "BNB_ROCM_VERSION"):
        if os.environ.get(variable):
            yield Finding(
                Level.INFO,
                f"{variable} has no effect: a backend wheel has one library for all supported runtimes",
                f"unset {variable}",
            )
    yield from _runtime_findings()


def _runtime_findings() -> Iterator[Finding]:
    """A CUDA runtime on the path of the loader that comes before the one that torch brought."""
    if not torch.version.cuda:
        return
    wanted = torch.version.cuda.partition(".")[0]
    for folder in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        names = [path.name for path in find_cuda_libraries_in_path_list(folder)]
        majors = {found[1] for name in names if (found := re.match(r"libcudart\.so\.(\d+)", name))}
        if majors and wanted not in majors:
            yield Finding(
                Level.WARNING,
                f"LD_LIBRARY_PATH has the runtime of CUDA {', '.join(sorted(majors))} in {folder}; torch is built for "
                f"CUDA {torch.version.cuda} and brings its own",
                f"take {folder} out of LD_LIBRARY_PATH",
            )
