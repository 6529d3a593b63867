"""What the operating system is asked for: real files, and the calls that a system may lack."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.core.source import Extent
from lowbits.errors import (
    CancelledError,
    ConfigError,
    FormatError,
    LowbitsError,
)
from lowbits.streaming import host
from lowbits.streaming.host import ALIGNMENT, Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CONTENT = random.Random(0).randbytes((1 << 20) + 1234)  # noqa: S311 - only content

posix = pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "weights"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["buffered", "direct"])
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(direct=request.param) as reader:
        yield reader


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "posix_fadvise", "O_DIRECT"):
        monkeypatch.delattr(os, name, raising=False)


def filled(nbytes: int, shift: int = 0) -> Tensor:
    """Return an aligned buffer, moved by some bytes, that is not what a file holds."""
    return host.aligned_empty(nbytes + shift)[shift:].fill_(0xA5)


def read(reader: Reader, path: Path, offset: int, nbytes: int, shift: int = 0) -> bytes:
    out = filled(nbytes, shift)
    reader.read(Extent(path, offset, nbytes), out)
    return bytes(out.tolist())


@pytest.mark.parametrize("alignment", [64, ALIGNMENT, 1 << 16])
@pytest.mark.parametrize("nbytes", [0, 1, ALIGNMENT, 100_001])
def test_memory_is_aligned_and_ordinary(nbytes: int, alignment: int) -> None:
    with torch.inference_mode():
        memory = host.aligned_empty(nbytes, alignment)
    assert memory.shape == (nbytes,)
    assert memory.dtype == torch.uint8
    assert memory.data_ptr() % alignment == 0
    assert not memory.is_inference()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, len(CONTENT)),
        (0, ALIGNMENT),
        (ALIGNMENT, 64 * ALIGNMENT),
        (ALIGNMENT, 100),
        (100, 50),
        (100, ALIGNMENT),
        (ALIGNMENT - 1, 2),
        (1 << 20, 1234),
        (1 << 20, 1),
        (len(CONTENT) - 1, 1),
        (0, 0),
        (len(CONTENT), 0),
    ],
)
def test_reads_the_bytes_of_an_extent(
    reader: Reader, path: Path, offset: int, nbytes: int, shift: int
) -> None:
    assert read(reader, path, offset, nbytes, shift) == CONTENT[offset : offset + nbytes]


@given(data=st.data())
def test_direct_and_buffered_reads_agree(path: Path, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, len(CONTENT)) | st.sampled_from(range(0, 1 << 20, ALIGNMENT)))
    nbytes = data.draw(st.integers(0, min(3 * ALIGNMENT, len(CONTENT) - offset)))
    # Half of the examples at an address that lies as the offset does: those have no detour.
    shift = data.draw(st.integers(0, ALIGNMENT) | st.just(offset % ALIGNMENT))
    chunk, window = data.draw(st.tuples(*[st.sampled_from([ALIGNMENT, 2 * ALIGNMENT])] * 2))
    with pytest.MonkeyPatch.context() as patch, Reader() as buffered, Reader(direct=True) as direct:
        patch.setattr(host, "_CHUNK_BYTES", chunk)
        patch.setattr(host, "_WINDOW_BYTES", window)
        expected = CONTENT[offset : offset + nbytes]
        assert read(buffered, path, offset, nbytes, shift) == expected
        assert read(direct, path, offset, nbytes, shift) == expected


@pytest.mark.parametrize("nbytes", [1, 1234, 2 * ALIGNMENT])
def test_nothing_beside_the_extent_is_written(reader: Reader, path: Path, nbytes: int) -> None:
    memory = filled(4 * ALIGNMENT)
    reader.read(Extent(path, 5, nbytes), memory[ALIGNMENT : ALIGNMENT + nbytes])
    assert bytes(memory[ALIGNMENT : ALIGNMENT + nbytes].tolist()) == CONTENT[5 : 5 + nbytes]
    assert (memory[:ALIGNMENT] == 0xA5).all()
    assert (memory[ALIGNMENT + nbytes :] == 0xA5).all()


def test_many_threads_read_at_once(reader: Reader, path: Path) -> None:
    offsets = [number * 5000 for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda offset: read(reader, path, offset, 4500), offsets))
    assert results == [CONTENT[offset : offset + 4500] for offset in offsets]


@pytest.mark.parametrize(
    ("offset", "nbytes", "got"),
    [(0, len(CONTENT) + 1, len(CONTENT)), (1 << 20, ALIGNMENT, 1234), (1 << 22, 7, 0)],
)
def test_an_extent_beyond_the_end_is_refused(
    reader: Reader, path: Path, offset: int, nbytes: int, got: int
) -> None:
    message = f"expected {nbytes} bytes at offset {offset} of {path}, got {got}: it was truncated"
    with pytest.raises(FormatError, match=message):
        read(reader, path, offset, nbytes)


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_was_truncated_is_refused(tmp_path: Path, direct: bool) -> None:  # noqa: FBT001
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:20_000])
    with Reader(direct=direct) as reader:
        read(reader, path, 0, 20_000)
        os.truncate(path, 10_000)
        with pytest.raises(FormatError, match="expected 20000 bytes at offset 0 of .*, got 10000"):
            read(reader, path, 0, 20_000)
        with pytest.raises(FormatError, match="was changed"):
            read(reader, path, 0, 10_000)


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:8000])
    with Reader() as reader:
        read(reader, path, 0, 8000)
        os.utime(path, ns=(0, 0))
        with pytest.raises(FormatError, match="was changed since it was opened: load it again"):
            read(reader, path, 0, 8000)


@posix
def test_a_file_that_was_removed_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with Reader() as reader:
        read(reader, path, 0, 10)
        path.unlink()
        assert read(reader, path, 10, 1000) == CONTENT[10:1010]


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with Reader() as reader, pytest.raises(FormatError, match="cannot read 1 bytes at offset 2 of"):
        read(reader, tmp_path / "missing", 2, 1)


@pytest.mark.parametrize(
    "out", [torch.empty(3, dtype=torch.uint8), torch.empty(2, dtype=torch.int8)]
)
def test_a_buffer_of_another_size_or_dtype_is_refused(path: Path, out: Tensor) -> None:
    with Reader() as reader, pytest.raises(ConfigError, match="out: expected 2 values of uint8"):
        reader.read(Extent(path, 0, 2), out)


@pytest.mark.parametrize(
    "out",
    [torch.empty(4, dtype=torch.uint8)[::2], torch.empty(2, dtype=torch.uint8, device="meta")],
)
def test_a_buffer_that_is_not_plain_memory_is_refused(path: Path, out: Tensor) -> None:
    with Reader() as reader, pytest.raises(ConfigError, match="contiguous tensor on the CPU"):
        reader.read(Extent(path, 0, 2), out)


@pytest.mark.parametrize("direct", [False, True])
def test_a_read_is_cancelled_between_chunks(
    path: Path,
    direct: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "_CHUNK_BYTES", ALIGNMENT)
    out, answers = filled(10 * ALIGNMENT), iter([False, False, True])
    with Reader(direct=direct) as reader, pytest.raises(CancelledError, match="was cancelled"):
        reader.read(Extent(path, 0, out.nbytes), out, lambda: next(answers))
    assert bytes(out[: 2 * ALIGNMENT].tolist()) == CONTENT[: 2 * ALIGNMENT]
    assert (out[2 * ALIGNMENT :] == 0xA5).all()


def test_a_closed_reader_says_so(path: Path) -> None:
    reader = Reader()
    read(reader, path, 0, 1)
    reader.close()
    reader.close()
    with pytest.raises(LowbitsError, match="the reader was closed"):
        read(reader, path, 0, 1)


@posix
def test_closing_waits_for_the_read_that_is_under_way(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, reading, closed = Reader(), threading.Event(), threading.Event()
    system_call = os.preadv

    def slow(descriptor: int, views: list[memoryview], offset: int) -> int:
        reading.set()
        assert closed.wait(60)
        return system_call(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", slow)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(read, reader, path, 0, 100)
        assert reading.wait(60)
        reader.close()
        closed.set()
        assert result.result() == CONTENT[:100]


@posix
def test_descriptors_are_closed(path: Path) -> None:
    def count() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    reader = Reader()
    read(reader, path, 0, 1)
    assert count() == before + 1
    reader.close()
    assert count() == before


@posix
@pytest.mark.parametrize("refuses", ["open", "preadv"])
def test_a_file_system_without_direct_reads_is_read_as_usual(
    path: Path, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {"open": os.open, "preadv": os.preadv}

    def is_direct_call(target: Any, argument: Any) -> bool:
        import fcntl

        flags = argument if refuses == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        return bool(flags & os.O_DIRECT)

    def refusing(target: Any, argument: Any, *rest: Any) -> int:
        if is_direct_call(target, argument):
            raise OSError(errno.EINVAL, "invalid argument")
        result: int = calls[refuses](target, argument, *rest)
        return result

    monkeypatch.setattr(os, refuses, refusing)
    with Reader(direct=True) as reader:
        assert read(reader, path, ALIGNMENT, ALIGNMENT) == CONTENT[ALIGNMENT : 2 * ALIGNMENT]
        assert not reader.is_direct(path)
        assert read(reader, path, 3, 9999) == CONTENT[3:10_002]


@posix
@pytest.mark.parametrize("failing", ["open", "preadv"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_other_errors_are_not_taken_for_a_refusal(
    path: Path, failing: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, failing, fail)
    with Reader(direct=True) as reader, pytest.raises(FormatError, match=os.strerror(code)):
        read(reader, path, 0, 10)


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("direct", [False, True])
def test_reads_the_same_without_the_calls_of_posix(path: Path, direct: bool) -> None:  # noqa: FBT001
    with Reader(direct=direct) as reader:
        assert read(reader, path, 17, 50_000) == CONTENT[17:50_017]
        assert not reader.is_direct(path)
        test_many_threads_read_at_once(reader, path)
        with pytest.raises(FormatError, match="was truncated"):
            read(reader, path, 0, len(CONTENT) + 1)
    assert host.drop_cached_pages(path) is False


@posix
def test_cached_pages_are_dropped(path: Path) -> None:
    assert host.drop_cached_pages(path) is True
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("free", "nbytes", "expected"), [(None, 1 << 50, False), (10, 10, False), (10, 11, True)]
)
def test_a_file_is_compared_with_the_free_memory(
    free: int | None,
    nbytes: int,
    expected: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "available_host_bytes", lambda: free)
    assert host.file_is_larger_than_memory(nbytes) is expected
