"""What is asked of the operating system: aligned and page-locked memory, and file reads.

Windows and macOS lack `os.preadv`, ``O_DIRECT`` or `os.posix_fadvise`: where a call is missing, a
portable one takes its place.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import weakref
from functools import partial
from io import FileIO
from typing import TYPE_CHECKING, Any, Final, Self, final

import torch

from lowbits.core.memory import available_host_bytes, bytes_of
from lowbits.core.source import stamp_of
from lowbits.errors import (
    CancelledError,
    ConfigError,
    FormatError,
    InsufficientMemoryError,
    LowbitsError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from lowbits.core.source import Extent

    _ShouldStop = Callable[[], bool] | None

#: What ``O_DIRECT`` asks of file offsets, lengths and addresses: no disk in use has larger blocks.
ALIGNMENT: Final = 4096

# Larger ones are no faster and save little CPU time (per GB 0.11 s with 1 MiB, 0.07 s with 16 MiB,
# 0.05 s with 64 MiB), but a cancelled read ends with its chunk.
_CHUNK_BYTES: Final = 16 << 20
_WINDOW_BYTES: Final = 8 << 20

_HUGE_PAGE: Final = 2 << 20

_cuda: Any = torch.cuda  # parts of it are not typed

_logger = logging.getLogger(__name__)


def aligned_empty(nbytes: int, alignment: int = ALIGNMENT) -> Tensor:
    """Return uninitialised host memory whose address is a multiple of `alignment`.

    Costs ``nbytes + alignment`` bytes of address space, so that a part of it can be returned; the
    pages that are never written cost no memory. It is an ordinary tensor, also when it is made
    under ``torch.inference_mode``.

    Returns:
        ``(nbytes,)`` uint8 on the CPU.
    """
    if nbytes >= _HUGE_PAGE:
        alignment = max(alignment, _HUGE_PAGE)
    with torch.inference_mode(mode=False):
        memory = torch.empty(nbytes + alignment, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % alignment
        aligned = memory[start : start + nbytes]
    _ask_for_huge_pages(aligned)
    return aligned


def _ask_for_huge_pages(memory: Tensor) -> None:
    """Let the system back memory by pages of 2 MiB, where it can: before anything is written there.

    A disk's controller is given a list of the physical pages of a direct read, and a read of 16 MiB
    into scattered pages of 4 KiB takes three times as long as into whole ones.
    """
    whole = memory.nbytes // _HUGE_PAGE * _HUGE_PAGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if whole and advice is not None:
        libc = ctypes.CDLL(None)
        # It may refuse: that costs speed, and nothing else.
        libc.madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(whole), advice)


@final
class Reader:
    """Reads parts of files into host memory; each file is opened once, and stays open.

    Any number of threads may read at once. With `direct`, the system's page cache is passed by
    (``O_DIRECT``): that costs a third of the CPU time or less, and takes no memory from others, but
    each read waits for the disk. It is for files that are larger than the free memory. Costs one
    window of 8 MiB for each thread that reads directly from, or to, addresses that are not aligned.

    Args:
        direct: whether to pass the page cache by. Where a file system refuses, and where the
            system has no ``O_DIRECT``, the file is read as usual: `is_direct` tells.
        immutable: whether a file must stay as it was when it was opened; not for a `ScratchFile`,
            to which units are appended meanwhile.
    """

    def __init__(self, *, direct: bool = False, immutable: bool = True) -> None:
        self._direct, self._immutable = direct, immutable
        self._files: dict[Path, _File] | None = {}
        self._lock = threading.Lock()
        self._windows = threading.local()

    def read(self, extent: Extent, out: Tensor, should_stop: _ShouldStop = None) -> None:
        """Fill `out` with the bytes of an extent.

        A direct read has no detour where ``out.data_ptr() - extent.offset`` is a multiple of
        `ALIGNMENT`; elsewhere the bytes are copied once more, out of a window.

        Args:
            extent: what to read.
            out: ``(extent.nbytes,)`` uint8, contiguous, on the CPU; overwritten. After an error it
                holds anything.
            should_stop: asked before each chunk of at most 16 MiB.

        Raises:
            CancelledError: `should_stop` said so.
            FormatError: the file cannot be read, ends before the extent does, or has another size
                or date than when it was opened, or than the extent says.
            ConfigError: `out` is not such a tensor.
        """
        if out.dtype != torch.uint8 or out.nbytes != extent.nbytes:
            raise ConfigError(
                f"out: expected {extent.nbytes} values of uint8, got {out.numel()} of {out.dtype}"
            )
        what = f"{extent.nbytes} bytes at offset {extent.offset} of {extent.path}"
        try:
            file = self._file(extent.path)
            if extent.stamp is not None and extent.stamp != file.first_stamp:
                raise FormatError(f"{extent.path} was changed, or replaced, since it was compared")
            got = self._fill(file, out, extent.offset, should_stop)
            if got < extent.nbytes:
                raise FormatError(f"expected {what}, got {got}: it was truncated, or is another")
            if self._immutable and file.stamp() != file.first_stamp:
                raise FormatError(f"{extent.path} was changed since it was opened: load it again")
        except OSError as error:
            raise FormatError(f"cannot read {what}: {error}") from error

    def is_direct(self, path: Path) -> bool:
        """Return whether a file is read past the page cache; certain after the first read."""
        return self._file(path).is_direct

    def close(self) -> None:
        """Close all files, each when the last read that is under way has ended."""
        with self._lock:
            self._files = None
            self._windows = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, path: Path) -> _File:
        with self._lock:
            if self._files is None:
                raise LowbitsError(
                    f"cannot read {path}: the reader was closed; a backward pass has to be run "
                    "before streaming ends, or is configured anew"
                )
            if path not in self._files:
                self._files[path] = _File(path, direct=self._direct)
            return self._files[path]

    def _fill(self, file: _File, out: Tensor, offset: int, should_stop: _ShouldStop) -> int:
        """Return how many bytes there were: fewer than asked for only at the file's end."""
        view, address, done = bytes_of(out), out.data_ptr(), 0
        while done < len(view):
            if should_stop is not None and should_stop():
                raise CancelledError(f"a read of {file.path} was cancelled")
            got = self._read_some(file, view[done:], address + done, offset + done)
            if not got:
                break
            done += got
        return done

    def _read_some(self, file: _File, view: memoryview, address: int, offset: int) -> int:
        """Read the largest piece that can be had in one way; 0 at the file's end."""
        if not file.is_direct:
            return file.read_at(view[:_CHUNK_BYTES], offset)
        if address % ALIGNMENT != offset % ALIGNMENT:
            return self._read_window(file, address, len(view), offset)
        whole_blocks = len(view) // ALIGNMENT * ALIGNMENT
        to_next_block = -offset % ALIGNMENT
        if to_next_block or not whole_blocks:
            nbytes = min(to_next_block or len(view), len(view))
            return self._read_window(file, address, nbytes, offset)
        return file.read_at(view[: min(_CHUNK_BYTES, whole_blocks)], offset)

    def _read_window(self, file: _File, address: int, nbytes: int, offset: int) -> int:
        """Read whole blocks aside, and copy what was asked for."""
        if "window" not in self._windows.__dict__:
            self._windows.window = aligned_empty(_WINDOW_BYTES)
        window: Tensor = self._windows.window
        skipped = offset % ALIGNMENT
        wanted = min(_WINDOW_BYTES, rounded_up(skipped + nbytes))
        got = file.read_at(bytes_of(window)[:wanted], offset - skipped)
        copied = max(0, min(nbytes, got - skipped))
        # Not a slice assignment: this one lets other threads run meanwhile.
        ctypes.memmove(address, window.data_ptr() + skipped, copied)
        return copied


@final
class _File:
    """One open file. It is closed with the last reference to it.

    So no read that is under way can lose its descriptor, whose number another file may get.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        self.path = path
        self._raw, self.is_direct = _open(path, direct=direct)
        weakref.finalize(self, self._raw.close)
        self._lock = threading.Lock()
        self.first_stamp = self.stamp()
        if not self.is_direct:
            self._expect_sequential_reads()

    def read_at(self, view: memoryview, offset: int) -> int:
        """Read into `view` what one call of the system gives; 0 at the file's end."""
        if not hasattr(os, "preadv"):
            with self._lock:
                self._raw.seek(offset)
                return self._raw.readinto(view)
        was_direct = self.is_direct
        try:
            return os.preadv(self._raw.fileno(), [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not was_direct:
                raise
        self._leave_direct()
        return os.preadv(self._raw.fileno(), [view], offset)

    def stamp(self) -> tuple[int, int, int]:
        """Return what a write changes."""
        return stamp_of(self._raw)

    def _leave_direct(self) -> None:
        """Read through the page cache from now on: some file systems refuse at the first read."""
        import fcntl

        descriptor = self._raw.fileno()
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        # After the flag: a thread that sees False must not meet a refusal any more.
        self.is_direct = False
        self._expect_sequential_reads()

    def _expect_sequential_reads(self) -> None:
        # Linux reads twice as far ahead then.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._raw.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _open(path: Path, *, direct: bool) -> tuple[FileIO, bool]:
    """Return an unbuffered file, and whether it passes the page cache by."""
    flag: int = getattr(os, "O_DIRECT", 0)
    if direct and flag and hasattr(os, "preadv"):
        try:
            return FileIO(path, opener=lambda name, flags: os.open(name, flags | flag)), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return FileIO(path), False


@final
class PinnedSlab:
    """Page-locked host memory: an accelerator copies it while the program goes on.

    Costs host memory that cannot be swapped out, until `release`, or until the slab is collected.
    Memory that is no longer locked must not be in use by a copy: see `pinned_empty`. Views of the
    tensor stay valid as ordinary memory.

    Attributes:
        tensor: uint8 on the CPU, uninitialised; gone after `release`.
    """

    def __init__(self, tensor: Tensor, unlock: Callable[[], None] | None = None) -> None:
        self.tensor = tensor
        self._unlock = weakref.finalize(self, unlock or (lambda: None))
        # The end of the process unlocks all, faster; the device may be shut down by then.
        self._unlock.atexit = False

    def release(self) -> None:
        """Unlock the memory, and drop the tensor."""
        self._unlock()
        self.__dict__.pop("tensor", None)


def pinned_empty(nbytes: int, settle: Callable[[], None] | None = None) -> PinnedSlab:
    """Return page-locked host memory, uninitialised.

    With CUDA and ROCm, once the device is initialised, it costs `nbytes` rounded up to a page.
    Elsewhere, and where registering fails, torch's allocator makes it: that rounds up to a power
    of two, and keeps the memory for the next request.

    Args:
        nbytes: its size.
        settle: waits until no copy reads it; called before it is unlocked. None: whoever holds the
            slab has waited.

    Raises:
        InsufficientMemoryError: nothing here can lock memory, or not that much.
    """
    try:
        slab = _registered(nbytes, settle) if nbytes and _cuda.is_initialized() else None
        with torch.inference_mode(mode=False):
            return slab or PinnedSlab(
                torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            )
    except (OSError, RuntimeError) as error:
        raise InsufficientMemoryError(
            f"cannot lock {nbytes / 2**30:.2f} GiB of host memory: {error}"
        ) from error


def _registered(nbytes: int, settle: Callable[[], None] | None) -> PinnedSlab | None:
    """Lock memory of this size, or return None."""
    # Shared, as mmap's default is: of a private page that the program writes to after a fork it
    # gets a copy, and the device goes on with the other.
    memory = mmap.mmap(-1, nbytes)
    with torch.inference_mode(mode=False):
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
    address = tensor.data_ptr()
    if not _succeeds("cudaHostRegister", address, nbytes, 0):
        return None
    # The mapping goes along: locked memory must not be unmapped.
    return PinnedSlab(tensor, partial(_unregister, address, memory, settle))


def _unregister(address: int, _mapping: mmap.mmap, settle: Callable[[], None] | None) -> None:
    # Not in a forked child, which has neither the device nor the lock.
    if not _cuda.is_initialized():
        return
    try:
        if settle is not None:
            settle()
    except RuntimeError as error:
        _logger.warning("a copy from page-locked memory had failed: %s", error)
    _succeeds("cudaHostUnregister", address)


def _succeeds(name: str, *args: int) -> bool:
    """Call the CUDA (or HIP) runtime; a failure is logged."""
    code = int(getattr(_cuda.cudart(), name)(*args))
    if code:
        _logger.warning("%s failed with error %d", name, code)
        _forget_device_error()
    return not code


def _forget_device_error() -> None:
    """Let one kernel fail: the runtime reports its last error to the next launch, whatever it is.

    Torch has no binding of ``cudaGetLastError``, which its own check after a launch calls.
    """
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        _logger.debug("reported, as expected: %s", error)


def drop_cached_pages(path: Path) -> bool:
    """Make the next read of a file come from the disk; return False where nothing can do that.

    For measurements. Pages that a process has mapped stay in memory.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        # Only what is on the disk already can be dropped.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def file_is_larger_than_memory(nbytes: int) -> bool:
    """Return whether a file of this size would not stay in the free memory; unknown: False."""
    free = available_host_bytes()
    return free is not None and nbytes > free


def rounded_up(nbytes: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
