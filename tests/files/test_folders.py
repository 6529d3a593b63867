"""Folders that take their places whole, whatever is raised on the way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowbits.files.folders import atomic_folder, copy

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = ("transformer", "vae")


def write(folder: Path, text: str) -> None:
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        for name in ("config.json", "lowbits.safetensors"):
            (folder / part / name).write_text(text)
    (folder / "model_index.json").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def failing(real: Callable[..., Any], left: list[int], error: BaseException) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return real(*args, **kwargs)

    return method


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("full")])
@pytest.mark.parametrize("number", range(1, 14))
def test_each_part_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    folder = tmp_path / "pipe"
    write(folder, "old")
    for part in PARTS:
        (folder / part / "notes.txt").write_text("mine")
        (folder / part / "lowbits-00001-of-00002.safetensors").write_text("old")
    left = [number]
    is_raised = False
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing(Path.replace, left, error))
        patch.setattr(shutil, "move", failing(shutil.move, left, error))
        try:
            with atomic_folder(folder) as new:
                write(new, "new")
        except type(error):
            is_raised = True
    found = contents(folder)
    everything = {text for name, text in found.items() if not name.endswith("notes.txt")}
    assert len(everything) == 1, found
    for part in PARTS:
        own = {name: text for name, text in found.items() if name.startswith(part)}
        assert own.pop(f"{part}/notes.txt") == "mine"
        assert len(set(own.values())) == 1, own
        is_old = f"{part}/lowbits-00001-of-00002.safetensors" in own
        assert own[f"{part}/config.json"] == ("old" if is_old else "new")
    if not is_raised:
        assert left[0] > 0
        assert set(found.values()) == {"new", "mine"}
    assert not [name for name in found if ".tmp" in name and "notes" in name]


def test_a_part_on_another_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "pipe", tmp_path / "disk"
    write(folder, "old")
    other.mkdir()
    (folder / "vae").rename(other / "vae")
    (folder / "vae").symlink_to(other / "vae", target_is_directory=True)

    def move(source: Path, target: Path) -> None:
        if Path(target).parent == other:
            Path(target).mkdir()
            raise OSError("no space left")
        source.replace(target)

    monkeypatch.setattr(shutil, "move", move)
    with pytest.raises(OSError, match="no space"), atomic_folder(folder) as new:
        write(new, "new")
    assert contents(other) == {
        "vae/config.json": "old",
        "vae/lowbits.safetensors": "old",
    }
    monkeypatch.undo()
    with atomic_folder(folder) as new:
        write(new, "new")
    assert set(contents(other).values()) == {"new"}
    assert (folder / "vae").is_symlink()


def test_a_part_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pipe"
    write(folder, "old")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "vae")
    with pytest.raises(PermissionError, match="vae"), atomic_folder(folder) as new:
        write(new, "new")
    assert set(contents(folder).values()) == {"old"}
    assert sorted(path.name for path in folder.iterdir()) == ["model_index.json", *PARTS]


def test_a_file_where_a_folder_is(tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    write(folder, "old")
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").mkdir()
    with pytest.raises(FileExistsError, match="model_index"), atomic_folder(folder) as new:
        write(new, "new")
    assert set(contents(folder).values()) == {"old"}
    assert sorted(path.name for path in folder.iterdir()) == ["model_index.json", *PARTS]


def test_copies_of_what_is_read_only_are_not(tmp_path: Path) -> None:
    write(tmp_path / "store", "old")
    for path in (tmp_path / "store").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    copy(tmp_path / "store", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "store")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "copy").rglob("*"))


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_that_is_there_is_written_on_its_own_disk(
    tmp_path: Path, *, is_there: bool
) -> None:
    folder = tmp_path / "pipe"
    if is_there:
        folder.mkdir()
    with atomic_folder(folder) as new:
        assert new.parent == (folder if is_there else tmp_path)
        (new / "x").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_one_part_that_cannot_be_put_back_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renames fail, that of the index, and the first one of the way back."""
    folder = tmp_path / "pipe"
    write(folder, "old")
    calls, replace = [], Path.replace

    def fail(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) in (5, 6):
            raise OSError("as asked")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="as asked"), atomic_folder(folder) as new:
            write(new, "new")
    parts = [(folder / part / "config.json").read_text() for part in PARTS]
    assert sorted(parts) == ["new", "old"]
    assert (folder / "model_index.json").read_text() == "old"


def test_what_cannot_be_removed_is_told_and_the_rest_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pipe"
    write(folder, "old")
    remove = shutil.rmtree

    def refuse(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError("in use")
        remove(path, ignore_errors=True)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with atomic_folder(folder) as new:
            write(new, "new")
    assert {(folder / part / "config.json").read_text() for part in PARTS} == {"new"}
    assert caplog.text.count("what it held before is left: in use") == len(PARTS)


def test_a_link_to_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    with atomic_folder(tmp_path / "link") as new:
        write(new, "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model_index.json").read_text() == "new"
