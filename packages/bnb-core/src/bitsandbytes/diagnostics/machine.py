"""Devices of this machine, as torch and the operating system see them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """A device type that torch can use here."""

    type: str
    #: Name of each device of the type.
    names: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The device for ``--json``."""
        return asdict(self)


def usable_devices() -> list[Device]:
    """Device types that torch can use on this machine, the CPU first."""
    devices = [Device("cpu", (f"{os.cpu_count()} threads, {torch.backends.cpu.get_cpu_capability()}",))]
    for device in ("cuda", "xpu", "mps", "hpu", torch._C._get_privateuse1_backend_name()):
        module = getattr(torch, device, None)
        if module is None or not hasattr(module, "is_available") or not module.is_available():
            continue
        devices.append(Device(device, _names(device, module)))
    return devices


def _names(device: str, module: Any) -> tuple[str, ...]:
    # torch.mps and most extensions have a single device, without a name.
    if not hasattr(module, "device_count") or not hasattr(module, "get_device_name"):
        return (device,)
    return tuple(_describe(device, module, index) for index in range(module.device_count()))


def _describe(device: str, module: Any, index: int) -> str:
    name = str(module.get_device_name(index))
    if device != "cuda":
        return name
    properties = torch.cuda.get_device_properties(index)
    kind = getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return f"{name} ({kind.partition(':')[0]}, {properties.total_memory / 2**30:.0f} GiB)"


def torch_build() -> str:
    """What kind of build of torch this is, in words."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if getattr(torch.version, "xpu", None):
        return f"XPU {torch.version.xpu}"
    return "MPS" if torch.backends.mps.is_built() else "CPU only"


def gpu_vendors() -> list[str]:
    """Vendors of GPUs whose kernel driver is loaded, by the files that the drivers bring."""
    marks = {"NVIDIA": ("/proc/driver/nvidia/version", "/dev/nvidiactl"), "AMD": ("/dev/kfd",)}
    return [vendor for vendor, paths in marks.items() if any(Path(path).exists() for path in paths)]


def why_no_cuda() -> str:
    """Why a build of torch for GPUs cannot use one here."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return "no GPU is visible"
