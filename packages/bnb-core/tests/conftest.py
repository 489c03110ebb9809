"""Core is tested on its reference implementations alone, whatever backends are installed."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

os.environ["BNB_BACKENDS"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Modules that several test files share.
sys.path.insert(0, str(Path(__file__).parent))


class PluginSite:
    """A folder on the path of subprocesses, in which distributions are really installed.

    Backends that happen to be installed in this environment are disabled there.
    """

    def __init__(self, path: Path, server: "ForkServer"):
        self.path = path
        self.server = server

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
        for file in files:
            path = self.path / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
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
        installed = {entry.name for entry in metadata.entry_points(group="bitsandbytes.backends")}
        if installed:
            env["BNB_DISABLE_BACKENDS"] = ",".join(sorted(installed))
        return {name: value for name, value in (env | variables).items() if value is not None}

    def run(self, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments: ``-c CODE`` or ``-m MODULE ...``."""
        environment = self.environment(**variables)
        if hasattr(os, "fork"):
            return self.server.run(arguments, environment, self.path)
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=self.path, capture_output=True, text=True, timeout=120
        )

    def python(self, code: str, **variables: str | None) -> str:
        """Run code that must succeed; returns what it printed."""
        result = self.run("-c", textwrap.dedent(code), **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def bnb(self, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run("-m", "bitsandbytes.cli", *arguments, **variables)


class ForkServer:
    """A process that has imported torch, and nothing else, and runs Python in forks of itself.

    A fresh interpreter for each test would spend nearly all its time on importing torch.
    """

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )

    def run(
        self, arguments: tuple[str, ...], environment: dict[str, str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        """Run one command and wait for it."""
        request = {"arguments": arguments, "environment": environment, "folder": str(folder)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess(arguments, answer["code"], answer["stdout"], answer["stderr"])

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """The process that the subprocesses of all tests are forked from."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def plugin_site(tmp_path: Path, fork_server: ForkServer) -> PluginSite:
    """An empty folder for distributions."""
    path = tmp_path / "site"
    path.mkdir()
    return PluginSite(path, fork_server)
