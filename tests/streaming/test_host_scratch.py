"""The scratch file: what it gives back, where it lies, and that nothing of it is left."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lowbits.core.source import Extent
from lowbits.errors import ConfigError, InsufficientMemoryError, LowbitsError
from lowbits.streaming import scratch as scratch_files
from lowbits.streaming.host import ALIGNMENT, Reader
from lowbits.streaming.scratch import ScratchFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def read(reader: Reader, path: Path, offset: int, nbytes: int) -> bytes:
    out = torch.empty(nbytes, dtype=torch.uint8)
    reader.read(Extent(path, offset, nbytes), out)
    return bytes(out.tolist())


PARTS = {
    0: torch.arange(7, dtype=torch.float32),
    256: torch.randn(3, 5).to(torch.bfloat16),
    512: torch.randn(33).to(torch.float8_e4m3fn),
    600: torch.empty(0, 4),
    768: torch.tensor(2.5, dtype=torch.float64),
    1024: torch.arange(9000, dtype=torch.int16).view(90, 100),
    20_000: torch.ones(1, dtype=torch.bool),
}


def expected_unit(nbytes: int) -> bytes:
    unit = bytearray(nbytes)
    for offset, tensor in PARTS.items():
        data = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        unit[offset : offset + len(data)] = data
    return bytes(unit)


@pytest.mark.parametrize("direct", [False, True])
def test_scratch_gives_back_what_was_written(
    tmp_path: Path,
    direct: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scratch_files, "_CHUNK_BYTES", 1000 if not direct else ALIGNMENT)
    reader = Reader(direct=direct, immutable=False)
    scratch = ScratchFile(tmp_path)
    first = scratch.append(PARTS.items(), 20_001)
    assert (first.offset, first.nbytes, scratch.nbytes) == (0, 20_001, 5 * ALIGNMENT)
    assert read(reader, scratch.path, 0, 20_001) == expected_unit(20_001)
    second = scratch.append(reversed(PARTS.items()), 5 * ALIGNMENT)
    empty = scratch.append([], 10)
    assert (second.offset, empty.offset) == (5 * ALIGNMENT, 10 * ALIGNMENT)
    assert scratch.path.stat().st_size == scratch.nbytes == 11 * ALIGNMENT
    assert read(reader, scratch.path, second.offset, 5 * ALIGNMENT) == expected_unit(5 * ALIGNMENT)
    assert read(reader, scratch.path, empty.offset, ALIGNMENT) == bytes(ALIGNMENT)
    scratch.close()
    scratch.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LowbitsError, match="it was closed"):
        scratch.append([], 1)


def test_scratch_goes_with_its_object(tmp_path: Path) -> None:
    scratch = ScratchFile(tmp_path)
    assert scratch.path.exists()
    del scratch
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_file_that_cannot_be_removed_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch = ScratchFile(tmp_path)
    (scratch.path.parent / "someone else's").touch()
    scratch.close()
    assert f"cannot remove {scratch.path.parent}" in caplog.text


def test_a_scratch_file_that_is_still_read_goes_at_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On Windows: a reader that is collected together with it may be closed after it."""
    late: list[Callable[[], None]] = []

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("in use")

    def register(function: Callable[..., None], *args: object, **kwargs: object) -> None:
        late.append(partial(function, *args, **kwargs))

    monkeypatch.setattr(atexit, "register", register)
    scratch = ScratchFile(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        scratch.close()
        assert scratch.path.exists()
        assert len(late) == 1
        assert not caplog.text
        late[0]()
        assert "cannot remove" in caplog.text
    late[0]()
    assert list(tmp_path.iterdir()) == []
    assert len(late) == 1


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make a file in .*missing.*set TMPDIR"):
        ScratchFile(tmp_path / "missing")


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 100), (1, 36), (97, 100)])
def test_a_part_outside_of_its_unit_is_refused(tmp_path: Path, offset: int, nbytes: int) -> None:
    scratch = ScratchFile(tmp_path)
    with pytest.raises(ConfigError, match=f"36 bytes at offset {offset} exceed"):
        scratch.append([(offset, torch.ones(9))], nbytes)
    assert scratch.path.stat().st_size == 0


class Full(io.FileIO):
    """A file on a disk with room for some bytes."""

    room = 5000

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "no space left on device")
        return super().write(data)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_files, "FileIO", Full)
    monkeypatch.setattr(scratch_files, "_CHUNK_BYTES", 1000)
    scratch = ScratchFile(tmp_path)
    kept = scratch.append([(0, torch.full((100,), 7, dtype=torch.uint8))], 100)
    with pytest.raises(InsufficientMemoryError, match="no space left.*set TMPDIR") as caught:
        scratch.append([(0, torch.ones(4000, dtype=torch.uint8))], 4000)
    assert isinstance(caught.value.__cause__, OSError)
    assert scratch.path.stat().st_size == scratch.nbytes == ALIGNMENT
    out = torch.empty(100, dtype=torch.uint8)
    monkeypatch.undo()
    with Reader() as reader:
        reader.read(kept, out)
    assert (out == 7).all()
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    def parts() -> Iterator[tuple[int, Tensor]]:
        yield 0, torch.ones(100)
        raise KeyboardInterrupt

    scratch = ScratchFile(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        scratch.append(parts(), 1000)
    assert scratch.path.stat().st_size == scratch.nbytes == 0


def test_too_little_space_is_refused_before_a_write(tmp_path: Path) -> None:
    scratch = ScratchFile(tmp_path)
    message = r"has [\d.]+ GiB of free space, and 1048576.00 GiB are needed: set TMPDIR"
    with pytest.raises(InsufficientMemoryError, match=message):
        scratch.append([(0, torch.ones(9))], 1 << 50)
    assert scratch.path.stat().st_size == 0


EXITS = {
    "normal": "",
    "exception": "1 / 0",
    "forked child": """
for leave in (sys.exit, lambda: (scratch.close(), os._exit(0))):
    child = os.fork()
    if child == 0:
        leave()
    os.waitpid(child, 0)
    assert scratch.path.exists()
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_scratch_is_gone_at_exit(tmp_path: Path, how: str) -> None:
    if "child" in how and not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    code = f"""
import os, sys, torch
from lowbits.streaming.scratch import ScratchFile
scratch = ScratchFile({str(tmp_path)!r})
scratch.append([(0, torch.ones(9))], 100)
assert scratch.path.exists()
{EXITS[how]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (how == "exception"), done.stderr
    assert ("AssertionError" in done.stderr, list(tmp_path.iterdir())) == (False, [])


MOUNTS = r"""
/dev/sda1 / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
/dev/sdb1 /memory ext4 rw 0 0
tmpfs /memory tmpfs rw,nosuid 0 0
/dev/sdc1 /memory/disk xfs rw 0 0
ramfs /with\040blank ramfs rw 0 0
tmpfs /hidden tmpfs rw 0 0
/dev/sdd1 /hidden ext4 rw 0 0
""".strip()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", False),
        ("/memory", True),
        ("/memory/below/it", True),
        ("/memory/disk/x", False),
        ("/memory-of", False),
        ("/with blank/x", True),
        ("/hidden", False),
    ],
)
def test_knows_what_is_kept_in_memory(
    path: str,
    expected: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = tmp_path / "mounts"
    monkeypatch.setattr(scratch_files, "_MOUNTS", table)
    assert scratch_files.is_in_memory(Path(path)) is False
    table.write_text(MOUNTS)
    assert scratch_files.is_in_memory(Path(path)) is expected


def test_scratch_lies_where_it_saves_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table, memory, disk = (tmp_path / name for name in ("mounts", "memory", "disk"))
    monkeypatch.setattr(scratch_files, "_MOUNTS", table)
    monkeypatch.setattr(scratch_files, "_DISK_TEMP", disk)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(memory))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "named"))
    assert scratch_files.scratch_directory() == tmp_path / "named"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "named")
    assert scratch_files.scratch_directory() == tmp_path / "named", "the process may go elsewhere"
    monkeypatch.delenv("TMPDIR")
    memory.mkdir()
    assert scratch_files.scratch_directory() == memory
    table.write_text(f"tmpfs {memory.resolve()} tmpfs rw 0 0")
    assert scratch_files.scratch_directory() == memory
    assert "is kept in memory: set TMPDIR" in caplog.text
    disk.mkdir()
    assert scratch_files.scratch_directory() == disk
    scratch = ScratchFile()
    assert scratch.path.parent.parent == disk
