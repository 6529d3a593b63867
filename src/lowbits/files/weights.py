"""What a checkpoint holds: tensors as they stand in files, and the weights that those make."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from lowbits.core.memory import bytes_of
from lowbits.core.source import stamp_of
from lowbits.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from lowbits.core.backend import Packed
    from lowbits.core.source import Extent


@final
@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file, in the byte order of this machine; nothing is read until it is asked for.

    Attributes:
        name: in the file.
        dtype: of its values.
        shape: of the tensor.
        extent: its bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    extent: Extent

    def read(self) -> Tensor:
        """Return the tensor, on the CPU, in memory of its own.

        Raises:
            FormatError: the file is not what it was when it was opened.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        read_into(tensor, self.extent, self.name)
        return tensor


@final
@dataclass(frozen=True)
class Weight:
    """A weight of a checkpoint, however it is stored; nothing is read until it is asked for.

    Attributes:
        name: dotted name of the Parameter or buffer, as the file has it.
        shape: as a module holds it.
        dtype: of its values; of what it was before it was packed, None where the file does not say.
        nbytes: in the file, scales included.
        read: gives a tensor on the CPU; of a packed weight, its tensors. Nobody writes to them; see
            `is_shared` before keeping them.
        scheme: that it is stored in; None where it is an ordinary tensor.
        compute_dtype: that a packed layer multiplies in; None: what is fast on its device.
        is_shared: whether others may hold what `read` gives: a module, a state dict, a pickle that
            was loaded. Whoever keeps it copies it then; of a file, each `read` gives memory of its
            own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    nbytes: int
    read: Callable[[], Tensor | Packed]
    scheme: str | None = None
    compute_dtype: torch.dtype | None = None
    is_shared: bool = False


def plain_weights(tensors: Mapping[str, StoredTensor]) -> dict[str, Weight]:
    """Return tensors of files as ordinary weights, in their order."""
    return {
        name: Weight(name, stored.shape, stored.dtype, stored.extent.nbytes, stored.read)
        for name, stored in tensors.items()
    }


def open_file(path: Path) -> io.BufferedReader:
    """Open a file to be read, without waiting for a pipe's other end.

    Raises:
        FormatError: it is a pipe, a socket or a device.
        OSError: it is missing, a folder, or may not be read.
    """
    return io.BufferedReader(_open_raw(path))


def read_into(out: Tensor, extent: Extent, name: str = "") -> None:
    """Fill a tensor with bytes of a file.

    Args:
        out: contiguous, on the CPU, of as many bytes as the extent.
        extent: where they lie.
        name: of the tensor, for the message.

    Raises:
        FormatError: the file ends before, or it has another stamp than the extent has.
        OSError: it is missing, or may not be read.
    """
    view, done = bytes_of(out), 0
    with _open_raw(extent.path) as file:
        if extent.stamp is not None and extent.stamp != stamp_of(file):
            raise FormatError(
                "the file was changed or replaced since it was opened: open it again",
                extent.path,
                name,
            )
        file.seek(extent.offset)
        while done < extent.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise FormatError(
                    f"the file ends after {done} of {extent.nbytes} bytes of it",
                    extent.path,
                    name,
                    extent.offset,
                )
            done += count


def _open_raw(path: Path) -> io.FileIO:
    """Open a file as `open_file` does, without a buffer."""
    file = io.FileIO(path, opener=_open_at_once)
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise FormatError("not a regular file", path)
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
