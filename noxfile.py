"""All automation: ``nox -l`` lists the sessions, ``nox -s demo`` and ``nox -s tests`` are the two to know.

The sessions share one virtual environment, ``.nox/work``, because torch alone takes a gigabyte. It has
this project's wheels in it, built from their own source archives, so that what is tested is what is
shipped. Nothing is written outside of the checkout.

``BNB_TORCH`` replaces the requirement of torch, for instance ``BNB_TORCH=torch==2.4.1``.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import nox
from nox.command import CommandFailed

# nox runs this file without its folder among the places that modules are found in.
sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from automation import (
    DISTRIBUTIONS,
    ROOT,
    STATE,
    TORCH,
    Environment,
    StepError,
    Steps,
    build_distributions,
    source_files,
    with_model,
    with_project,
    with_upstream,
)

CACHE = STATE / "cache"
REPORTS = STATE / "reports"
MODEL = CACHE / "SmolLM2-135M-Instruct"

#: Architecture that the check without a GPU compiles the CUDA kernels for.
CUDA_ARCHITECTURE = "90a-real"
NATIVE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".mm", ".metal"}

#: No backend: the reference implementations serve every op.
REFERENCE_ONLY = {"BNB_BACKENDS": ""}
#: A backend that cannot be loaded is an error, not a fallback.
BACKENDS_REQUIRED = {"BNB_BACKENDS_STRICT": "1"}

nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests"]
os.environ.update(
    BNB_TEST_MODEL=str(MODEL),
    HF_HUB_OFFLINE="1",
    HF_HOME=str(CACHE / "huggingface"),
    MPLCONFIGDIR=str(CACHE / "matplotlib"),
    PIP_DISABLE_PIP_VERSION_CHECK="1",
    PIP_NO_CACHE_DIR="1",
    TOKENIZERS_PARALLELISM="false",
    TORCHINDUCTOR_CACHE_DIR=str(CACHE / "inductor"),
    XDG_CACHE_HOME=str(CACHE),
)


# --- steps ------------------------------------------------------------------------------------------


def check_style(environment: Environment) -> None:
    """Formatting, lint rules, and the C++ header that is generated from the Python tables."""
    environment.install_groups("lint")
    environment.run("-m", "ruff", "check", ".")
    environment.run("-m", "ruff", "format", "--check", ".")
    native = [file for file in source_files(ROOT / "packages") if file.suffix in NATIVE_SUFFIXES]
    environment.script("clang-format", "--dry-run", "-Werror", *native)
    environment.run("tools/gen_codebooks.py", "--check")


def check_types(environment: Environment) -> None:
    """Static types of the packages."""
    environment.install_groups("types")
    environment.run("-m", "mypy")


def run_native_tests(environment: Environment, *, sanitize: bool) -> str:
    """Compile the C++ of every package with a ``tests/native`` folder for this machine, and run it with ctest."""
    packages = [file.parents[2] for file in sorted((ROOT / "packages").glob("*/tests/native/CMakeLists.txt"))]
    for package in packages:
        build = STATE / ("sanitize" if sanitize else "native") / package.name
        configure(environment, package, build, "-DBNB_TESTS=ON", f"-DBNB_SANITIZE={'ON' if sanitize else 'OFF'}")
        environment.script("cmake", "--build", build)
        environment.script("ctest", "--test-dir", build, "--output-on-failure")
    return ", ".join(package.name for package in packages)


def configure(environment: Environment, package: Path, build: Path, *options: str) -> None:
    """Configure the C++ of a package with the tools of the environment."""
    environment.install_groups("native")
    tools = [f"-DCMAKE_MAKE_PROGRAM={environment.scripts / 'ninja'}", f"-DPython_EXECUTABLE={environment.python}"]
    environment.script("cmake", "-S", package, "-B", build, "-G", "Ninja", *tools, *options)


def count_instructions(environment: Environment, *options: str) -> str:
    """Compare the instructions of the CPU kernels with the table of the last count, where valgrind is at hand."""
    if shutil.which("valgrind") is None:
        return "left out: no valgrind on PATH"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"left out: the table is of x86-64, this is {platform.machine()}"
    build = STATE / "native" / "bnb-cpu"
    configure(environment, ROOT / "packages" / "bnb-cpu", build, "-DBNB_TESTS=ON", "-DBNB_SANITIZE=OFF")
    environment.script("cmake", "--build", build, "--target", "instructions")
    program = build / "tests" / "native" / "instructions"
    environment.run("tools/count_instructions.py", program, *options)
    return "scalar and AVX2"


def run_on_aarch64(environment: Environment) -> str:
    """Cross-compile the C++ tests of bnb-cpu for AArch64 and run them with QEMU, where both are at hand."""
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(tool) is None]
    if missing:
        return f"left out: no {' and no '.join(missing)} on PATH"
    build = STATE / "aarch64" / "bnb-cpu"
    configure(environment, ROOT / "packages" / "bnb-cpu", build, "--preset", "aarch64")
    environment.script("cmake", "--build", build)
    environment.script("ctest", "--test-dir", build, "--output-on-failure")
    return "by QEMU"


def check_cuda(environment: Environment) -> str:
    """Build the CUDA module for one architecture, where a compiler is at hand, and test what needs no GPU."""
    package = ROOT / "packages" / "bnb-cuda"
    source, built = package / "src", "not built: no nvcc on PATH"
    if shutil.which("nvcc") is not None:
        build = STATE / "native" / "bnb-cuda"
        configure(environment, package, build, f"-DCMAKE_CUDA_ARCHITECTURES={CUDA_ARCHITECTURE}")
        environment.script("cmake", "--build", build)
        # The package with its module, as a wheel would install it.
        source = STATE / "native" / "bnb-cuda-package"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(package / "src", source)
        for module in build.glob("_C.*"):
            shutil.copy2(module, source / "bnb_cuda")
        environment.run("-c", "import bnb_cuda._C", env={"PYTHONPATH": str(source)})
        built = f"built for {CUDA_ARCHITECTURE}"
    counts = run_pytest(environment, "cuda", package / "tests", env={"PYTHONPATH": str(source)})
    return f"{built}; {counts}"


def run_pytest(environment: Environment, name: str, *paths: str | Path, env: dict[str, str] | None = None) -> str:
    """Run pytest on ``paths``, or on the paths among the arguments given after ``--``; returns its counts."""
    given = environment.session.posargs
    named = any(not argument.startswith("-") and Path(argument.partition("::")[0]).exists() for argument in given)
    if not paths and not named:
        raise StepError(f"there are no tests for {name}")
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    # Machines that test are shared, and threads that spin while they wait for each other stall on a busy one.
    env = {"OMP_WAIT_POLICY": "passive", **(env or {})}
    try:
        environment.run("-m", "pytest", f"--junitxml={report}", *(() if named else paths), *given, env=env)
    except CommandFailed as error:
        raise StepError(pytest_counts(report) or str(error)) from error
    return pytest_counts(report)


def pytest_counts(report: Path) -> str:
    """What pytest's report says in numbers, or nothing when pytest did not get that far."""
    if not report.exists():
        return ""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for kind in totals:
            totals[kind] += int(suite.get(kind, 0))
    passed = totals.pop("tests") - sum(totals.values())
    labels = {"failures": "failed", "errors": "errors", "skipped": "skipped"}
    return ", ".join(
        [f"{passed} passed", *(f"{totals[kind]} {label}" for kind, label in labels.items() if totals[kind])]
    )


def unit_core(environment: Environment) -> str:
    """Tests of the core, on the reference implementations."""
    environment.install_groups("plugins")
    return run_pytest(environment, "unit-core", *tests_of("bnb-core", conform=False), env=REFERENCE_ONLY)


def unit_backends(environment: Environment) -> str:
    """Tests of the backends that are built here."""
    paths = [path for name in DISTRIBUTIONS if name != "bnb-core" for path in tests_of(name, conform=False)]
    return run_pytest(environment, "unit-backends", *paths, env=BACKENDS_REQUIRED)


def conform_reference(environment: Environment) -> str:
    """The conformance kit against the reference implementations."""
    return run_pytest(environment, "conform-reference", *tests_of("bnb-core", conform=True), env=REFERENCE_ONLY)


def conform_backends(environment: Environment) -> str:
    """The conformance kit against every backend that is built here."""
    paths = [path for name in DISTRIBUTIONS if name != "bnb-core" for path in tests_of(name, conform=True)]
    return run_pytest(environment, "conform-backends", *paths, env=BACKENDS_REQUIRED)


def across_packages(environment: Environment) -> str:
    """Tests of the repository as a whole that need no language model."""
    environment.install_groups("plugins")
    return run_pytest(environment, "repository", *sorted((ROOT / "tests").glob("test_*.py")))


def downstream_libraries(environment: Environment) -> str:
    """The libraries that build on this one, on a real language model."""
    environment.install_groups("downstream")
    return run_pytest(environment, "downstream", "tests/downstream", env=BACKENDS_REQUIRED)


def tests_of(distribution: str, *, conform: bool) -> list[Path]:
    """Test files of a package: those that run the conformance kit, or the others."""
    files = sorted((ROOT / "packages" / distribution / "tests").rglob("test_*.py"))
    return [file.relative_to(ROOT) for file in files if file.stem.startswith("test_conform") is conform]


# --- sessions ---------------------------------------------------------------------------------------


@nox.session
def demo(session: nox.Session) -> None:
    """Build, install, then run a real language model in 4 and 8 bit and check what comes out."""
    with_model(session).run("examples/demo/run.py", *session.posargs, env=BACKENDS_REQUIRED)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that must pass before a change lands; arguments after ``--`` go to pytest."""
    environment = with_model(session)
    steps = Steps(session)
    for name, step in {
        "lint": check_style,
        "types": check_types,
        "native": functools.partial(run_native_tests, sanitize=False),
        "instructions": count_instructions,
        "cuda": check_cuda,
        "unit, core": unit_core,
        "unit, backends": unit_backends,
        "conformance, reference": conform_reference,
        "conformance, backends": conform_backends,
        "repository": across_packages,
        "downstream": downstream_libraries,
    }.items():
        steps.run(name, functools.partial(step, environment))
    steps.finish()


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint rules of Python and C++, and generated files."""
    environment = Environment(session)
    environment.install(TORCH)
    check_style(environment)


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the packages."""
    check_types(with_project(session))


@nox.session
def native(session: nox.Session) -> None:
    """The C++ tests of every package that has some."""
    run_native_tests(Environment(session), sanitize=False)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    run_native_tests(Environment(session), sanitize=True)


@nox.session
def instructions(session: nox.Session) -> None:
    """Instruction counts of the CPU kernels against the committed table; ``-- --update`` writes it."""
    session.log(count_instructions(Environment(session), *session.posargs))


@nox.session
def aarch64(session: nox.Session) -> None:
    """The C++ tests of bnb-cpu for AArch64, cross-compiled and run by QEMU."""
    session.log(run_on_aarch64(Environment(session)))


@nox.session
def unit(session: nox.Session) -> None:
    """Tests that need no language model: those of the packages, and those of the repository as a whole."""
    run_some(session, {"core": unit_core, "backends": unit_backends, "repository": across_packages})


@nox.session
def conform(session: nox.Session) -> None:
    """The conformance kit against the reference and every backend that is built here."""
    run_some(session, {"reference": conform_reference, "backends": conform_backends})


def run_some(session: nox.Session, chosen: dict[str, Callable[[Environment], str]]) -> None:
    """Run pytest steps; with paths after ``--``, pytest once on these, with every backend that is installed."""
    environment = with_project(session)
    if any(Path(argument.partition("::")[0]).exists() for argument in session.posargs):
        run_pytest(environment, "chosen")
        return
    steps = Steps(session)
    for name, step in chosen.items():
        steps.run(name, functools.partial(step, environment))
    steps.finish()


@nox.session
def downstream(session: nox.Session) -> None:
    """transformers, peft, accelerate, diffusers and others on the real language model."""
    downstream_libraries(with_model(session))


@nox.session
def deepspeed(session: nox.Session) -> None:
    """ZeRO with these optimizers, apart from the rest: other libraries change what they do where DeepSpeed is."""
    environment = with_project(session, "deepspeed")
    environment.install("setuptools", "wheel", "ninja")
    environment.run("-m", "pip", "install", "--quiet", "--no-build-isolation", "deepspeed", env={"DS_BUILD_OPS": "0"})
    session.log(run_pytest(environment, "deepspeed", ROOT / "tests" / "test_deepspeed.py"))


@nox.session
def compare(session: nox.Session) -> None:
    """Compare bytes and numbers with the upstream release, which gets an environment of its own."""
    theirs, ours = with_upstream(session), with_project(session)
    ours.run("-m", "tests.compare.run", "--ours", ours.python, "--theirs", theirs.python, *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Source archives and wheels of every distribution into ``dist``."""
    for wheel in build_distributions(Environment(session)):
        session.log(wheel.relative_to(ROOT))


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site in ``.nox/site``; a link that leads nowhere is an error."""
    environment = Environment(session, "docs")
    environment.install_groups("docs")
    site = STATE / "site"
    environment.run("-m", "sphinx", "--fail-on-warning", "--keep-going", "-E", "-q", "-c", "docs", ROOT, site)
    session.log(f"{site.relative_to(ROOT)}/index.html")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks of the CPU next to torch and the upstream release; after ``--``, names of scripts and options."""
    names = [argument for argument in session.posargs if argument.endswith(".py")]
    options = [argument for argument in session.posargs if not argument.endswith(".py")]
    theirs, ours = with_upstream(session), with_project(session)
    for script in names or sorted((ROOT / "benchmarks").glob("cpu_*.py")):
        ours.run(script, "--peer", theirs.python, *options, env=BACKENDS_REQUIRED)
