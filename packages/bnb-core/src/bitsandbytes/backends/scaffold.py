"""Writes a new backend package from the templates in ``bitsandbytes/templates/backend``.

A template is a text in which ``%%name`` stands for a value; ``__module__`` in a path stands for the
name of the module, and ``dot_`` at the beginning of a name for a dot.
"""

from __future__ import annotations

import re
import shutil
import string
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import bnb_native
from bitsandbytes.contract import OP_API_VERSION
from bitsandbytes.errors import ArgumentError

TEMPLATES = Path(__file__).resolve().parents[1] / "templates" / "backend"
SUFFIX = ".tmpl"
#: Backends of this project; their names are taken.
OWN_NAMES = ("cpu", "cuda", "rocm", "xpu", "mps", "hpu")

PROBE_CPU = """
    return Availability(True)
"""
PROBE_DEVICE = """
    import torch

    is_available = getattr(getattr(torch, "{device}", None), "is_available", None)
    if is_available is None or not is_available():
        return Availability(False, "torch has no usable device of type {device!r} here; install its driver and torch")
    return Availability(True)
"""
CALL_CPU = """
    packed, absmax = A.contiguous(), absmax.contiguous()
    target = out if out.is_contiguous() else torch.empty(shape, dtype=dtype)
    _C.dequantize_4bit(
        packed.data_ptr(),
        absmax.data_ptr(),
        target.numel(),
        blocksize,
        QUANT_TYPES[quant_type],
        DTYPES[dtype],
        target.data_ptr(),
    )
    if target is not out:
        out.copy_(target)
"""
CALL_DEVICE = """
    # The kernel runs on the host, so that this package works as it was generated: operands are copied
    # there, and the result back. A kernel for the device takes the pointers as they are, is launched on
    # the current stream of A.device, and is not waited for.
    packed, absmax = A.cpu().contiguous(), absmax.cpu().contiguous()
    target = torch.empty(shape, dtype=dtype)
    _C.dequantize_4bit(
        packed.data_ptr(),
        absmax.data_ptr(),
        target.numel(),
        blocksize,
        QUANT_TYPES[quant_type],
        DTYPES[dtype],
        target.data_ptr(),
    )
    out.copy_(target)
"""
STEPS_CPU = "1. Replace the loop in `kernels/dequantize_4bit.h` by one that is worth having, and give it threads."
STEPS_DEVICE = (
    "1. The kernel runs on the host, between two copies, so that the package works as it is. Replace it by one for\n"
    "   the device: compile it in `CMakeLists.txt`, launch it in `kernels/bind.cpp`, and drop the copies in `ops.py`.\n"
    "1. Where the device comes with an extension of torch, import that at the top of `__init__.py`."
)


class Template(string.Template):
    """``%%name``: a dollar sign means something in nearly every language that a package is written in."""

    delimiter = "%%"


def write_backend(name: str, device: str, folder: Path) -> Path:
    """Write a complete backend package.

    Args:
        name: short name of the backend, as ``BNB_BACKENDS`` will take it.
        device: device type of torch that it serves.
        folder: where the package goes; it must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        ArgumentError: a name is not usable.
        FileExistsError: there is something in the folder.
    """
    values = _values(name, device)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside it and moved there as a whole: an interrupted run leaves no half of a package.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workspace:
        draft = Path(workspace) / "package"
        for path, text in _rendered(values):
            target = draft / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        bnb_native.copy_to(draft)
        if folder.exists():
            folder.rmdir()
        shutil.move(draft, folder)
    return folder


def _values(name: str, device: str) -> dict[str, str]:
    from bitsandbytes import __version__

    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise ArgumentError(f"the name {name!r} is not usable: small letters, digits, single - and _ between them")
    if name in OWN_NAMES:
        raise ArgumentError(f"the name {name!r} is taken by a backend of this project; choose another one")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", device):
        raise ArgumentError(f"{device!r} is no device type; give one as in torch.device, without an index")
    on_cpu = device == "cpu"
    probe = PROBE_CPU if on_cpu else PROBE_DEVICE.format(device=device)
    return {
        "name": name,
        "distribution": f"bnb-{name.replace('_', '-')}",
        "module": f"bnb_{name.replace('-', '_')}",
        "device": device,
        "core_version": __version__,
        "op_api": str(OP_API_VERSION),
        "probe": _block(probe),
        "call": _block(CALL_CPU if on_cpu else CALL_DEVICE),
        "next_steps": STEPS_CPU if on_cpu else STEPS_DEVICE,
    }


def _block(text: str) -> str:
    """The body of a function, indented once."""
    return textwrap.indent(textwrap.dedent(text).strip("\n"), "    ")


def _rendered(values: dict[str, str]) -> Iterator[tuple[PurePosixPath, str]]:
    for file in sorted(TEMPLATES.rglob(f"*{SUFFIX}")):
        names = [
            re.sub("^dot_", ".", part).replace("__module__", values["module"])
            for part in file.relative_to(TEMPLATES).parts
        ]
        text = Template(file.read_text(encoding="utf-8")).substitute(values)
        yield PurePosixPath(*names[:-1], names[-1].removesuffix(SUFFIX)), text
