"""Sessions for checking, testing, measuring; see CONTRIBUTING.md for those off by default."""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2.9"
# uv does not look where pip finds torch's CPU build: pip it is.
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = ("-c", "constraints.txt")
BACKENDS = ("bnb", "torchao", "quanto", "gguf", "float8")
#: From seconds to 20 minutes each; every one prints what it did not run.
CPU_BENCHMARKS = (
    *("bench_import", "conversion_memory", "bench_gguf", "bench_layers", "bench_model"),
    *("bench_streaming", "bench_lora", "convert_files"),
)
#: With their arguments; the report on the GPU does not overwrite the one on the CPU.
GPU_BENCHMARKS = (
    (
        *("bench_layers", "--device", "cuda", "--preset", "full", "--threads", "8"),
        *("--json", "out/bench_layers_gpu.json"),
    ),
    ("bench_flux_gpu",),
    (
        *("bench_streaming", "--device", "cuda", "--threads", "8"),
        *("--json", "out/bench_streaming_gpu.json"),
    ),
    (
        *("bench_lora", "--parts", "merge", "--device", "cuda", "--threads", "8"),
        *("--json", "out/bench_lora_gpu.json"),
    ),
)
PRINT_ACCELERATOR = (
    "import torch as t; d = t.accelerator.current_accelerator(check_available=True); "
    "print(t.get_device_module(d).get_device_name(d) if d else 'no accelerator')"
)
#: Which tests run before a commit, and how.
QUICK = ("-m", "not slow and not gpu")
PARALLEL = ("-n", "2", "--dist", "worksteal")
#: What each worker of the tests may use, so that they do not fight for cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def install(session: nox.Session, extras: str, *groups: str) -> None:
    """Install the project with some extras and dependency groups, in the tested versions."""
    requirements = [r for group in groups for r in nox.project.dependency_groups(PROJECT, group)]
    target = f".[{extras}]" if extras else "."
    session.install(*CONSTRAINTS, "-e", target, *requirements)


def install_for_tests(session: nox.Session) -> None:
    install(session, "all", "test")
    session.install("--no-deps", "./tests/toy_backend")


@nox.session(default=False, venv_backend="none")
def develop(session: nox.Session) -> None:
    """Install into this environment what `nox --no-venv --no-install` needs, once for all."""
    groups = [r for g in ("test", "lint") for r in nox.project.dependency_groups(PROJECT, g)]
    install = ("python", "-m", "pip", "install", "--quiet")
    session.run(*install, *CONSTRAINTS, "-e", ".[all]", *groups)
    session.run(*install, "--no-deps", "./tests/toy_backend")


@nox.session
def lint(session: nox.Session) -> None:
    install(session, "", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    install(session, "cli", "test", "lint")
    session.install(*CONSTRAINTS, "nox")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    install_for_tests(session)
    session.run("pytest", *QUICK, *(session.posargs or PARALLEL), env=ENVIRONMENT)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Run what `tests` does, and fail where it leaves out more than 5 % of the branches."""
    install_for_tests(session)
    arguments = (*QUICK, *(session.posargs or PARALLEL))
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *arguments, env=ENVIRONMENT)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report", "--sort=cover", "--fail-under=95")


@nox.session
def backends(session: nox.Session) -> None:
    """Run every test, slow ones too: the full product of schemes and checks, in 40 minutes."""
    install_for_tests(session)
    arguments = ("-m", "not gpu", *PARALLEL, *session.posargs)
    session.run("pytest", *arguments, env=ENVIRONMENT)
    check = "import lowbits as l; assert all(b.available for b in l.backends()), l.backends()"
    session.run("python", "-c", check)


@nox.session
def property(session: nox.Session) -> None:  # noqa: A001 - the session's name
    install_for_tests(session)
    session.run(
        "pytest",
        "-m",
        "property",
        "--hypothesis-profile=thorough",
        *session.posargs,
        env=ENVIRONMENT,
    )


@nox.session(default=False)
@nox.parametrize("backend", BACKENDS)
def one_backend(session: nox.Session, backend: str) -> None:
    """Install one backend alone: the others are reported as missing, and it works."""
    install(session, backend if backend != "float8" else "", "test")
    session.run("pytest", "tests/backends/test_contract.py", "-k", f"[{backend}", env=ENVIRONMENT)


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the contract with the lowest versions that pyproject.toml admits."""
    extras = PROJECT["project"]["optional-dependencies"]
    lowest = [
        r.replace(">=", "==") for name in ("bnb", "torchao", "quanto", "gguf") for r in extras[name]
    ]
    session.install(*CONSTRAINTS, "torch", *nox.project.dependency_groups(PROJECT, "test"))
    session.install("--no-deps", "-e", ".")
    session.install(*lowest)
    # Old versions warn about what newer ones of torch have deprecated since.
    arguments = ("-W", "default", "tests/backends/test_contract.py")
    session.run("pytest", *arguments, env=ENVIRONMENT)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    install(session, "", "docs")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run what a CPU can measure, in about an hour; arguments go to ``lowbits compare``."""
    install_for_tests(session)
    for script in CPU_BENCHMARKS:
        session.run("python", f"benchmarks/{script}.py", env=ENVIRONMENT)
    session.run("lowbits", "compare", "benchmarks/miniflux", "--out", "out", *session.posargs)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run tests and benchmarks on a GPU, whose name is printed first."""
    install_for_tests(session)
    session.run("python", "-c", PRINT_ACCELERATOR)
    session.run("pytest", "-m", "gpu", *session.posargs)
    for script in GPU_BENCHMARKS:
        session.run("python", f"benchmarks/{script[0]}.py", *script[1:])
