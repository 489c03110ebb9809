"""Where the GPU runtime's libraries lie, and the historical diagnostics of the CUDA set-up."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from bitsandbytes.cextension import HIP_ENVIRONMENT, get_cuda_bnb_library_path
from bitsandbytes.cuda_specs import CUDASpecs
from bitsandbytes.diagnostics.utils import print_dedented

logger = logging.getLogger(__name__)

CUDART_PATH_PREFERRED_ENVVARS = ("CONDA_PREFIX", "LD_LIBRARY_PATH")

#: Variables that hold paths, but never one of a library.
CUDART_PATH_IGNORED_ENVVARS = {
    "DBUS_SESSION_BUS_ADDRESS",
    "GOOGLE_VM_CONFIG_LOCK_FILE",
    "HOME",
    "LESSCLOSE",
    "LESSOPEN",
    "MAIL",
    "OLDPWD",
    "PWD",
    "SHELL",
    "SSH_AUTH_SOCK",
    "SSH_TTY",
    "TMUX",
    "XDG_DATA_DIRS",
    "XDG_GREETER_DATA_DIR",
    "XDG_RUNTIME_DIR",
    "_",
}

CUDA_RUNTIME_LIB_PATTERNS = (
    ("amdhip64*.dll", "libamdhip64.so*") if HIP_ENVIRONMENT else ("cudart64*.dll", "libcudart*.so*", "nvcuda*.dll")
)


def find_cuda_libraries_in_path_list(paths_list_candidate: str) -> Iterable[Path]:
    """Runtime libraries in the folders of a list such as ``LD_LIBRARY_PATH`` holds."""
    for text in paths_list_candidate.split(os.pathsep):
        folder = Path(text)
        try:
            if not text or not folder.is_dir():
                continue
            for place in {folder, folder / "lib"}:
                for pattern in CUDA_RUNTIME_LIB_PATTERNS:
                    yield from (path for path in place.glob(pattern) if path.is_file())
        except OSError as error:
            logger.debug("cannot look into %s: %s", folder, error)


def is_relevant_candidate_env_var(env_var: str, value: str) -> bool:
    """Whether a variable may hold a path with libraries in it."""
    is_path = os.sep in value or (os.altsep is not None and os.altsep in value)
    is_something_else = (
        env_var in CUDART_PATH_IGNORED_ENVVARS
        or "CONDA" in env_var
        or "BASH_FUNC" in env_var
        or "\n" in value
        or "://" in value
    )
    return env_var in CUDART_PATH_PREFERRED_ENVVARS or (is_path and not is_something_else)


def get_potentially_lib_path_containing_env_vars() -> dict[str, str]:
    """The variables of the environment that may hold a path with libraries in it."""
    return {name: value for name, value in os.environ.items() if is_relevant_candidate_env_var(name, value)}


def find_cudart_libraries() -> Iterator[Path]:
    """Runtime libraries that the environment points to; preferred variables come first."""
    candidates = get_potentially_lib_path_containing_env_vars()
    preferred = [candidates.pop(name) for name in CUDART_PATH_PREFERRED_ENVVARS if name in candidates]
    seen: set[Path] = set()
    for value in [*preferred, *candidates.values()]:
        for path in find_cuda_libraries_in_path_list(value):
            if path not in seen:
                seen.add(path)
                yield path


def print_diagnostics(cuda_specs: CUDASpecs) -> None:
    """Print the version of the GPU runtime and the best GPU's capability."""
    (_print_hip_diagnostics if HIP_ENVIRONMENT else _print_cuda_diagnostics)(cuda_specs)


def _print_cuda_diagnostics(cuda_specs: CUDASpecs) -> None:
    print(
        f"PyTorch settings found: CUDA_VERSION={cuda_specs.cuda_version_string}, "
        f"Highest Compute Capability: {cuda_specs.highest_compute_capability}."
    )
    _print_leftover(cuda_specs)


def _print_hip_diagnostics(cuda_specs: CUDASpecs) -> None:
    print(f"PyTorch settings found: ROCM_VERSION={cuda_specs.cuda_version_string}")
    _print_leftover(cuda_specs)


def _print_leftover(cuda_specs: CUDASpecs) -> None:
    path = get_cuda_bnb_library_path(cuda_specs)
    if path.is_file():
        print(f"{path.name} lies in the package's folder. It belongs to another distribution and is not used.")


def print_runtime_diagnostics() -> None:
    """Print the runtime libraries that the environment points to."""
    libraries = list(find_cudart_libraries())
    built_for = torch.version.hip or torch.version.cuda
    if not libraries:
        print(f"No GPU runtime library lies on a path of the environment; torch brings its own ({built_for}).")
    elif len(libraries) > 1:
        listed = "\n".join(f"  {path}" for path in libraries)
        print_dedented(f"Several GPU runtime libraries lie on paths of the environment:\n{listed}")
