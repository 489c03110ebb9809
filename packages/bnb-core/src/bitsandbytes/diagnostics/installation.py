"""Whether the files of the package ``bitsandbytes`` are the ones that ``bnb-core`` installed.

Several published distributions bring a folder ``bitsandbytes/`` of their own. Installers write over
each other's files without a word; afterwards the package is a mixture. Nothing here imports another
part of the package: it must run in such a mixture.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

PACKAGE = "bitsandbytes"
CORE = "bnb-core"
#: The distribution without files that stands for the name under which others look the package up.
SHIM = "bitsandbytes"
PACKAGE_DIR = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Owner:
    """A distribution that claims files under ``bitsandbytes/``."""

    name: str
    version: str
    files: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, ``None`` when there is none of this name."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def owners(distributions: Iterable[metadata.Distribution] | None = None) -> list[Owner]:
    """Distributions whose record lists modules under ``bitsandbytes/``, each once.

    An editable installation lists none: its files stay where they are.
    """
    found: dict[str, Owner] = {}
    for distribution in metadata.distributions() if distributions is None else distributions:
        name = distribution.metadata["Name"]
        # A name appears once per folder of the path; the first is the one that is imported.
        if not name or name in found:
            continue
        paths = (str(file) for file in distribution.files or ())
        files = tuple(path for path in paths if PurePosixPath(path).parts[:1] == (PACKAGE,) and path.endswith(".py"))
        if files:
            found[name] = Owner(name, distribution.version, files)
    return sorted(found.values(), key=lambda owner: owner.name)


@dataclass(frozen=True)
class Copy:
    """One installation of ``bnb-core`` on the path."""

    version: str
    folder: Path
    #: Where its modules lie; ``None`` where the metadata does not say, as for an editable installation.
    package: Path | None


def copies_of_core(distributions: Iterable[metadata.Distribution] | None = None) -> list[Copy]:
    """Every installation of ``bnb-core`` on the path, the one in use first."""
    found: dict[Path, Copy] = {}
    for distribution in metadata.distributions(name=CORE) if distributions is None else distributions:
        folder = Path(str(distribution.locate_file(""))).resolve()
        listed = any(file.parts[:2] == (PACKAGE, "__init__.py") for file in distribution.files or ())
        found.setdefault(folder, Copy(distribution.version, folder, folder / PACKAGE if listed else None))
    return list(found.values())


def intruders() -> list[Owner]:
    """Distributions other than ``bnb-core`` that claim files of the package."""
    return [owner for owner in owners() if owner.name.lower().replace("_", "-") != CORE]


def second_owner() -> str | None:
    """What is wrong when a distribution called ``bitsandbytes`` has files of its own, else ``None``.

    This is the cheap part of the examination, one look-up by name, done on every import.
    """
    try:
        distribution = metadata.distribution(SHIM)
    except metadata.PackageNotFoundError:
        return None
    if f"{PACKAGE}/__init__.py," not in (distribution.read_text("RECORD") or ""):
        return None
    return (
        f"distribution {SHIM} {distribution.version} has its own modules in the folder {PACKAGE}/ of {CORE}: whichever "
        f"was installed last has written over the other. To mend it: {restore_command([SHIM])}"
    )


def restore_command(names: Iterable[str]) -> str:
    """What removes other owners of the folder and puts the files of ``bnb-core`` back."""
    return f"pip uninstall -y {' '.join(names)} && pip install --force-reinstall --no-deps {CORE}"


def overwritten_files() -> list[str]:
    """Files of ``bnb-core`` whose content is not what it installed."""
    try:
        core = metadata.distribution(CORE)
    except metadata.PackageNotFoundError:
        return []
    changed = []
    for file in core.files or ():
        if file.parts[:1] != (PACKAGE,) or file.hash is None or file.hash.mode != "sha256":
            continue
        path = Path(str(file.locate()))
        if not path.is_file() or _digest(path) != file.hash.value:
            changed.append(str(file))
    return changed


def core_is_intact() -> bool:
    """Whether the modules that the doctor needs are those of ``bnb-core``."""
    init = PACKAGE_DIR / "__init__.py"
    return init.is_file() and f"{PACKAGE}/__init__.py" not in overwritten_files()


def _digest(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
