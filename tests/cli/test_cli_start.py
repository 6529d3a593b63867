"""Starting: without the extra, without torch, as a module."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path


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


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "x.safetensors")
    convert = ("convert", "x.safetensors", "\N{SNOWMAN}.safetensors")
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "lowbits", *convert, "--scheme", "float8-e4m3fn"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": paths},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u2603.safetensors" in done.stdout + done.stderr
