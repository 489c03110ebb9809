"""Version of the GPU runtime and capability of the GPUs, under their historical names."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CUDASpecs:
    """What torch's GPU runtime and the GPUs of this machine are."""

    highest_compute_capability: tuple[int, int]
    #: Major and minor version without a separator: ``"128"``.
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the best GPU has int8 tensor cores."""
        return torch.version.hip is not None or self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Compute capability of every visible GPU, in ascending order."""
    count = torch.cuda.device_count()
    return sorted(torch.cuda.get_device_capability(torch.device("cuda", index)) for index in range(count))


@functools.cache
def get_cuda_version_tuple() -> tuple[int, int] | None:
    """Major and minor version of the CUDA or HIP runtime that torch was built for."""
    version = torch.version.cuda or torch.version.hip
    if not version:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """The version of the runtime without a separator: ``"128"``."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """Runtime and GPUs of this machine, ``None`` without a usable GPU."""
    version = get_cuda_version_tuple()
    if version is None or not torch.cuda.is_available():
        return None
    return CUDASpecs(get_compute_capabilities()[-1], f"{version[0]}{version[1]}", version)


def get_rocm_gpu_arch() -> str:
    """Name of the first AMD GPU's architecture, such as ``"gfx90a"``; ``"unknown"`` elsewhere."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return "unknown"
    return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
