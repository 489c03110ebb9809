"""Entry of the diagnostics under its historical path."""

from __future__ import annotations

import platform

import torch

from bitsandbytes import __version__ as bnb_version
from bitsandbytes.consts import PACKAGE_GITHUB_URL
from bitsandbytes.cuda_specs import get_cuda_specs
from bitsandbytes.diagnostics.cuda import print_diagnostics
from bitsandbytes.diagnostics.installation import installed_version
from bitsandbytes.diagnostics.selftest import run_selftest
from bitsandbytes.diagnostics.utils import print_dedented, print_header

__all__ = [
    "PACKAGE_GITHUB_URL",
    "bnb_version",
    "get_cuda_specs",
    "get_package_version",
    "main",
    "print_dedented",
    "print_diagnostics",
    "print_header",
    "sanity_check",
    "show_environment",
]

_RELATED_PACKAGES = [
    "accelerate",
    "diffusers",
    "numpy",
    "pip",
    "peft",
    "safetensors",
    "transformers",
    "triton",
    "trl",
]


def get_package_version(name: str) -> str:
    """Version of an installed distribution, or ``"not found"``."""
    return installed_version(name) or "not found"


def show_environment() -> None:
    """Print the versions that a report of a problem needs."""
    print(f"Platform: {platform.platform()}")
    print(f"Python: {platform.python_version()}")
    print(f"PyTorch: {torch.__version__}")
    for label, version in (("CUDA", torch.version.cuda), ("HIP", torch.version.hip)):
        print(f"  {label}: {version or 'N/A'}")
    print("Related packages:")
    for name in _RELATED_PACKAGES:
        print(f"  {name}: {get_package_version(name)}")


def sanity_check() -> None:
    """Run the self-test on the best device.

    Raises:
        RuntimeError: a step of it failed; the text names the step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for step in run_selftest(device):
        if not step.passed:
            raise RuntimeError(f"self-test on {device!r}: {step.name} failed: {step.detail}")


def main() -> None:
    """Run ``bnb doctor`` and exit with its code."""
    from bitsandbytes.cli.main import main as cli

    cli(["doctor"])
