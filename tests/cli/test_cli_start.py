"""Starting: without the extra, without torch, as a module."""

from __future__ import annotations

import subprocess
import sys


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_a_missing_extra_is_named() -> None:
    for package in ("typer", "rich"):
        block = f"import sys; sys.modules[{package!r}] = None\n"
        done = _python("-c", f"{block}from lowbits.__main__ import main; main()")
        assert done.returncode == 1
        assert done.stderr == (
            f"error: the command line needs {package}: pip install 'lowbits[cli]'\n"
        )


def test_other_missing_modules_are_not_hidden() -> None:
    block = "import sys; sys.modules['lowbits.cli.bars'] = None\n"
    done = _python("-c", f"{block}from lowbits.__main__ import main; main()")
    assert "ModuleNotFoundError" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from lowbits.__main__ import main
sys.argv = ["lowbits", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
heavy = {"torch", "numpy", "diffusers", "transformers", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


def test_it_runs_as_a_module() -> None:
    done = _python("-m", "lowbits", "--version")
    assert done.stdout.startswith("lowbits ")
