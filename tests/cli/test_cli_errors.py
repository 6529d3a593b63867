"""What the system refuses is one line, as lowbits' own errors are."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import lowbits
from lowbits.cli.app import app

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result


def inspect(path: Path, *options: str) -> Result:
    return CliRunner().invoke(app, [*options, "inspect", str(path)])


def test_bytes_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"garbage" * 9)
    result = inspect(path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}: not a safetensors file")
    assert result.stderr.count("\n") == 1


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir()
    result = inspect(tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {path}: Is a directory\n"
    assert isinstance(inspect(tmp_path, "--debug").exception, IsADirectoryError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "a.gguf"), "a.gguf: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (OSError("no config:\n\n  look into\n  'a'"), "no config: look into 'a'"),
        (ValueError("a\nb"), "ValueError: a b (lowbits --debug shows where)"),
        (RuntimeError("shape"), "RuntimeError: shape (lowbits --debug shows where)"),
    ],
)
def test_errors_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def refuse(_: Path) -> Any:
        raise error

    monkeypatch.setattr(lowbits, "inspect", refuse)
    result = inspect(tmp_path)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {line}\n")
    assert inspect(tmp_path, "--debug").exception is error


def test_a_reader_that_went_away_is_told_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> Any:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(lowbits, "inspect", refuse)
    result = inspect(tmp_path)
    assert (result.exit_code, result.output) == (1, "")
