"""Core is tested on its reference implementations alone, whatever backends are installed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import importlib_metadata
import pytest

os.environ["BNB_BACKENDS"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class PluginSite:
    """A folder on the path of subprocesses, in which distributions are really installed.

    Backends that happen to be installed in this environment are disabled there.
    """

    def __init__(self, path: Path):
        self.path = path

    def install(
        self,
        name: str,
        source: str,
        *,
        distribution: str | None = None,
        version: str = "1.0",
        module: str | None = None,
        attribute: str = "backend",
        group: str = "bitsandbytes.backends",
    ) -> None:
        """Write a module and the metadata that an installer would write for it."""
        module = module or f"plugin_{name}"
        distribution = distribution or f"dist-{name}"
        (self.path / f"{module}.py").write_text(textwrap.dedent(source))
        entry_points = f"[{group}]\n{name} = {module}:{attribute}\n"
        self.record(distribution, version, [f"{module}.py"], entry_points)

    def record(self, distribution: str, version: str, files: list[str], entry_points: str = "") -> Path:
        """Write the metadata of a distribution."""
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        if entry_points:
            (info / "entry_points.txt").write_text(entry_points)
        return info

    def environment(self, **variables: str | None) -> dict[str, str]:
        """Environment of a subprocess; a variable that is ``None`` is not set."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
        env["PYTHONPATH"] = os.pathsep.join([str(self.path), *filter(None, [env.get("PYTHONPATH")])])
        env["OMP_NUM_THREADS"] = "1"
        installed = {entry.name for entry in importlib_metadata.entry_points(group="bitsandbytes.backends")}
        if installed:
            env["BNB_DISABLE_BACKENDS"] = ",".join(sorted(installed))
        return {name: value for name, value in (env | variables).items() if value is not None}

    def run(self, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments."""
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environment(**variables),
            cwd=self.path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def python(self, code: str, **variables: str | None) -> str:
        """Run code that must succeed; returns what it printed."""
        result = self.run("-c", textwrap.dedent(code), **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def bnb(self, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run("-m", "bitsandbytes.cli", *arguments, **variables)


@pytest.fixture
def plugin_site(tmp_path: Path) -> PluginSite:
    """An empty folder for distributions."""
    path = tmp_path / "site"
    path.mkdir()
    return PluginSite(path)
