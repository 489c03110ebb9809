"""What can be wrong with an installation, and what mends it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from bitsandbytes.backends.plugin import FAILED, WHEELS, Plugin, Status
from bitsandbytes.backends.registry import REGISTRY, Registry
from bitsandbytes.diagnostics.finding import Finding, Level
from bitsandbytes.diagnostics.installation import (
    CORE,
    SHIM,
    installed_version,
    intruders,
    overwritten_files,
    restore_command,
    second_owner,
)
from bitsandbytes.diagnostics.machine import Device, gpu_vendors, why_no_cuda
from bitsandbytes.diagnostics.utils import listed

#: How to get a fitting torch; its index differs by GPU, so the selector on its site is the way.
OTHER_TORCH = 'install a build of torch for this GPU: choose it on PyTorch\'s page "Get started"'


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
        yield Finding(
            Level.WARNING,
            f"torch {torch.__version__} is built for GPUs but can use none: {why_no_cuda()}",
            "check the driver with nvidia-smi or rocm-smi; in a container, pass the GPU through",
        )
    if "cuda" in usable and torch.version.cuda:
        yield from _capability_findings()


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
    """For a failure to load a shared library: which one, before the general mend."""
    text = str(plugin.error or "")
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
