"""Files that take their places whole, or leave what was there."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from errno import ENOENT
from pathlib import Path
from typing import Any, NoReturn

import pytest
from files.forked import DiedError, become_nobody, in_child, limit_files, needs_fork

from lowbits.files.atomic import atomic_file, atomic_files

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")


def write(path: Path, text: bytes = b"new") -> None:
    with atomic_file(path) as file:
        file.write(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["a", "ä ö ü 漢字 🙂.bin", "n" * 250])
def test_new_and_old_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for text in (b"one", b"two", b""):
        write(path, text)
        assert path.read_bytes() == text
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            assert path.read_bytes() == b"old"
            raise error

    with pytest.raises(error):
        fail()
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a"])


def test_what_reads_the_old_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as source, atomic_file(path) as file:
        while part := source.read(1 << 16):
            file.write(part[:-1])
    assert path.stat().st_size == (1 << 20) - 16


def refuse(*_: Any) -> NoReturn:
    raise OSError(95, "operation not supported")


def test_a_file_system_that_cannot_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="not supported"):
        write(path)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a"])


@posix
def test_modes_are_those_of_ordinary_files(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write(tmp_path / "new")
        (tmp_path / "plain").write_bytes(b"")
        assert mode_of(tmp_path / "new") == mode_of(tmp_path / "plain") == 0o640
        (tmp_path / "plain").chmod(0o606)
        write(tmp_path / "plain")
        assert mode_of(tmp_path / "plain") == 0o606
    finally:
        os.umask(umask)


@posix
def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "target"
    link.symlink_to("there/target")
    for text in (b"one", b"two"):
        write(link, text)
        assert link.is_symlink()
        assert target.read_bytes() == text
    assert names(tmp_path / "there") == ["target"]
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "a")


@posix
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(FileExistsError, match="not a regular file"):
            write(path)
    assert not Path(os.devnull).is_file()
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "a")


def write_as_nobody(path: Path) -> None:
    become_nobody()
    write(path)


@needs_fork
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        in_child(lambda: write_as_nobody(path))
    tmp_path.chmod(0o755)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a"])


@posix
def test_the_file_is_on_the_disk_before_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if is_folder else "file")
        sync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write(tmp_path / "a")
    assert events == ["file", "rename", "folder"]


@posix
def test_a_file_system_that_syncs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def write_two(folder: Path, *, fails: bool = False) -> None:
    with atomic_files() as files:
        for name in ("a", "b"):
            with files.open(folder / name) as file:
                file.write(b"new")
        assert not (folder / "a").exists() or (folder / "a").read_bytes() == b"old"
        files.hide(folder / "index")
        if fails:
            raise InterruptedError


def test_several_files_take_their_places_together(tmp_path: Path) -> None:
    write_two(tmp_path)
    assert names(tmp_path) == ["a", "b"]
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "index").write_bytes(b"old")
    with pytest.raises(InterruptedError):
        write_two(tmp_path, fails=True)
    assert names(tmp_path) == ["a", "b", "index"]
    assert (tmp_path / "a").read_bytes() == b"old"
    write_two(tmp_path)
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("places", [0, 1])
def test_a_rename_that_fails_among_several(
    places: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden file comes back where nothing was replaced; a mixture must not look whole."""
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "index").write_bytes(b"old")
    replace, renamed = Path.replace, list[Path]()

    def limited(path: Path, target: Path) -> Path:
        if target.name in "ab" and len(renamed) == places:
            refuse()
        if target.name in "ab":
            renamed.append(target)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", limited)
    with pytest.raises(OSError, match="not supported"):
        write_two(tmp_path)
    assert names(tmp_path) == (["a"] if places else ["a", "index"])
    assert (tmp_path / "a").read_bytes() == (b"new" if places else b"old")


def test_one_of_several_may_fail_alone(tmp_path: Path) -> None:
    with atomic_files() as files:
        for name, content in (("a", b"1"), ("b", None)):
            try:
                with files.open(tmp_path / name) as file:
                    file.write(content)  # type: ignore[arg-type]
            except TypeError:
                assert name == "b"
    assert names(tmp_path) == ["a"]


def write_megabytes(path: Path, parts: int) -> None:
    """Write more than the system will let a file hold."""
    limit_files(1 << 20)
    with atomic_file(path) as file:
        for _ in range(parts):
            file.write(bytes(1 << 16))


@needs_fork
@pytest.mark.parametrize("parts", [17, 100])
def test_a_full_disk(parts: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
        in_child(lambda: write_megabytes(path, parts))
    assert caught.value.errno == errno.EFBIG
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a"])


def die_while_writing(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(DiedError, match="SIGKILL"):
        in_child(lambda: die_while_writing(path))
    assert path.read_bytes() == b"old"
    assert next(iter(names(tmp_path))).startswith(".a.")
    write(path)
    assert path.read_bytes() == b"new"


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "x"):
        raise FileNotFoundError(ENOENT, "gone", "source")
    assert caught.value.filename == "source"


def test_all_of_a_file_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is buffered still; and nothing stays open."""
    sizes: list[int] = []
    opened: list[int] = []
    closed: list[int] = []
    fsync, open_, close = os.fsync, os.open, os.close

    def synced(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def opening(*args: Any) -> int:
        opened.append(open_(*args))
        return opened[-1]

    def closing(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "open", opening)
        patch.setattr(os, "close", closing)
        with atomic_file(tmp_path / "x") as file:
            file.write(b"abc")
    assert sizes[0] == 3
    assert opened == closed
