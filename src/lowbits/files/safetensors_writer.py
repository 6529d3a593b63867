"""Safetensors files written a few tensors at a time, in shards with an index where they are large.

[Note: header last]
The header of a file stands in front of its tensors, and is known only once all of them are made:
the form of a packed weight, a checksum. Room is left for what it can take at most, the data is
written behind it, then the header, and spaces where it takes less.

Source: https://huggingface.co/docs/safetensors, "Format", which allows those spaces; the index and
its shards are named as in https://huggingface.co/docs/transformers/big_models.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from errno import ENAMETOOLONG
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, final

import torch

from lowbits.core.memory import bytes_of
from lowbits.errors import BackendError, ConfigError, FormatError
from lowbits.files.atomic import atomic_files
from lowbits.files.safetensors import CHECKSUM, DTYPES, MAX_HEADER_BYTES, METADATA
from lowbits.files.sharded import CHECKSUMS, INDEX_SUFFIX, SUFFIX, index_of, read_index
from lowbits.progress import ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from lowbits.files.atomic import AtomicFiles
    from lowbits.progress import CancelToken, ProgressCallback

#: Above it, files are split: what huggingface's libraries do by default or did.
SHARD_BYTES: Final = 5_000_000_000

#: Stands in an index: shards that others wrote are not removed.
_WRITER: Final = "lowbits"

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

#: Of the header and of tensors, so that each begins at a multiple of its dtype's size.
_ALIGNMENT: Final = 8

#: What any number of a header is smaller than.
_LARGEST: Final = 2**64


@final
@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are made together, and go into one file.

    Attributes:
        name: of the group; of an ordinary tensor, its own.
        nbytes: of all of them: files are split, and progress is told, by it.
        header_bytes: what they take in the file's header at most; see `header_bytes`.
        read: gives them by name, on any device; called once, when it is their turn.
    """

    name: str
    nbytes: int
    header_bytes: int
    read: Callable[[], Mapping[str, Tensor]]


@final
@dataclass(frozen=True)
class Metadata:
    """Metadata that is known only once the tensors of a file are.

    Attributes:
        header_bytes: what it takes in the header at most, beside what groups count as theirs.
        make: gives it for the names of a file's groups, all of which were read.
    """

    header_bytes: int
    make: Callable[[Sequence[str]], Mapping[str, str]]


def plain_group(
    name: str, dtype: torch.dtype, shape: Sequence[int], read: Callable[[], Tensor]
) -> TensorGroup:
    """Return the group of one tensor, which `read` must give in this dtype and shape.

    Raises:
        ConfigError: the format has no such tensors.
    """
    shape = tuple(shape)
    _require_storable(name, dtype, shape)
    return TensorGroup(
        name,
        math.prod(shape) * dtype.itemsize,
        header_bytes(name, dimensions=len(shape)),
        partial(_read_plain, name, dtype, shape, read),
    )


def header_bytes(name: str, count: int = 1, dimensions: int = 8) -> int:
    """Return what tensors take in a header at most.

    Args:
        name: the longest of their names.
        count: how many there are at most.
        dimensions: that each of them has at most.
    """
    entry = _entry(max(DTYPES, key=len), [_LARGEST] * dimensions, _LARGEST, _LARGEST)
    return count * json_bytes({name: entry})


def json_bytes(value: Any) -> int:
    """Return what a JSON value takes in a header at most."""
    # Escapes are longer than what they stand for: it is no less in UTF-8.
    return len(json.dumps(value))


def write_safetensors(
    path: str | Path,
    groups: Iterable[TensorGroup],
    metadata: Mapping[str, str] | Metadata | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
    stage: str = "save",
) -> tuple[Path, ...]:
    """Write tensors to a safetensors file, or to shards and an index.

    Holds one group at a time in memory, and a copy of a tensor that is not contiguous or on another
    device; also tensors whose bytes are no multiple of 8, small in models, which are written last.

    Whatever is raised, what was at `path` stays, also where the tensors are read from it. After
    success, what a former call left there under other names is removed. A process that is killed
    while shards take their places leaves them without an index: `open_tensors` refuses those.

    Args:
        path: ends with ``.safetensors``. Shards are ``<name>-00001-of-00002.safetensors``, their
            index is ``<name>.safetensors.index.json``.
        groups: in the order to read and to write them in.
        metadata: of each file; a checksum, `CHECKSUM`, is added.
        max_shard_bytes: that a file's tensors take, unless it is one larger group.
        progress: called after each group.
        cancel: stops between two groups.
        stage: as progress calls it.

    Returns:
        The file; or the index, then the shards.

    Raises:
        ConfigError: a name, a dtype or the metadata cannot be written.
        BackendError: a header takes more than its groups said.
        FormatError: `read` gave another dtype or shape than `plain_group` was told.
        CancelledError: `cancel` was set.
        OSError: the system refuses to write.
    """
    path, groups = Path(path), list(groups)
    _check(path, groups)
    made = metadata if isinstance(metadata, Metadata) else _constant(metadata or {})
    shards = _split(path, groups, max_shard_bytes)
    rooms = {file: _room(file, shard, made) for file, shard in shards.items()}
    index = index_of(path)
    former = _former_shards(index)
    report = _Report(stage, sum(group.nbytes for group in groups), progress, cancel)
    taken: set[str] = set()
    listed: dict[Path, _Written] = {}
    with atomic_files() as files:
        for file, shard in shards.items():
            with files.open(file) as opened:
                writer = _Writer(opened, rooms[file], taken)
                listed[file] = _write_groups(writer, shard, made, report)
        if len(shards) > 1:
            _write_index(files, index, listed)
    written = (index, *shards) if len(shards) > 1 else (path,)
    for file in {path, *former}.difference(written):
        file.unlink(missing_ok=True)
    return written


@final
class _Report:
    """Tells the caller how far it is."""

    def __init__(
        self,
        stage: str,
        total_bytes: int,
        progress: ProgressCallback | None,
        cancel: CancelToken | None,
    ) -> None:
        self._stage, self._done_bytes, self._total_bytes = stage, 0, total_bytes
        self._progress, self._cancel = progress, cancel

    def begin(self) -> None:
        if self._cancel:
            self._cancel.raise_if_cancelled(self._stage)

    def done(self, group: TensorGroup) -> None:
        self._done_bytes += group.nbytes
        if self._progress:
            self._progress(
                ProgressEvent(self._stage, group.name, self._done_bytes, self._total_bytes)
            )


class _Stored(NamedTuple):
    """A tensor as it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes | memoryview


class _Written(NamedTuple):
    """What is in a file: the bytes of each tensor, and the checksum of all of them."""

    sizes: Mapping[str, int]
    checksum: str


@final
class _Writer:
    """Writes one file. See [Note: header last]."""

    def __init__(self, file: BinaryIO, room: int, taken: set[str]) -> None:
        self._file, self._room, self._taken = file, room, taken
        self._digest = hashlib.blake2b(digest_size=16)
        self._entries: dict[str, dict[str, Any]] = {}
        self._sizes: dict[str, int] = {}
        self._offset = 0
        self._kept: list[_Stored] = []
        file.seek(8 + room)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, or keep those behind which others would not be aligned."""
        for name, tensor in tensors.items():
            _claim(name, self._taken)
            shape = tuple(tensor.shape)
            _require_storable(name, tensor.dtype, shape)
            # Conjugated and negated views are only marked as such: their bytes are those before.
            held = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            data = bytes_of(held)
            if len(data) % _ALIGNMENT:
                self._kept.append(_Stored(name, held.dtype, shape, bytes(data)))
            else:
                self._write(_Stored(name, held.dtype, shape, data))

    def finish(self, metadata: Mapping[str, str]) -> _Written:
        """Write what was kept, and the header."""
        for stored in sorted(self._kept, key=lambda stored: -stored.dtype.itemsize):
            self._write(stored)
        checksum = self._digest.hexdigest()
        metadata = {**metadata, CHECKSUM: checksum}
        header = _encoded({METADATA: metadata, **self._entries})
        if len(header) > self._room:
            raise BackendError(
                f"the header takes {len(header)} bytes, and its tensors were said to take "
                f"{self._room} at most: a backend stores a weight as too many tensors"
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        return _Written(self._sizes, checksum)

    def _write(self, stored: _Stored) -> None:
        self._file.write(stored.data)
        self._digest.update(stored.data)
        size, shape = len(stored.data), list(stored.shape)
        if stored.dtype == torch.float4_e2m1fn_x2:
            # The format counts values, torch counts pairs.
            shape[-1] *= 2
        start, self._offset = self._offset, self._offset + size
        self._entries[stored.name] = _entry(_NAMES[stored.dtype], shape, start, self._offset)
        self._sizes[stored.name] = size


def _entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _encoded(value: Any) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a name or the metadata is no Unicode text: {error}") from error


def _check(path: Path, groups: Iterable[TensorGroup]) -> None:
    if path.suffix != SUFFIX:
        raise ConfigError(f"path: expected a name that ends with {SUFFIX}, got {path.name!r}")
    taken: set[str] = set()
    for group in groups:
        _claim(group.name, taken)
    _encoded(list(taken))


def _claim(name: str, taken: set[str]) -> None:
    """Add a name to those that are taken."""
    if not name or name == METADATA or name in taken:
        problem = "there twice" if name in taken else "not allowed"
        raise ConfigError(f"groups: a tensor's name, {name!r}, is {problem}")
    taken.add(name)


def _require_storable(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    is_scalar_pair = dtype == torch.float4_e2m1fn_x2 and not shape
    if dtype not in _NAMES or is_scalar_pair:
        raise ConfigError(f"{name}: safetensors files have no {dtype} {shape}")


def _read_plain(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]
) -> dict[str, Tensor]:
    tensor = read()
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"expected {dtype} of shape {shape}, got {tensor.dtype} of {tuple(tensor.shape)}",
            tensor=name,
        )
    return {name: tensor}


def _constant(metadata: Mapping[str, str]) -> Metadata:
    """Return metadata that is the same for each file."""
    metadata = dict(metadata)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ConfigError("metadata: expected strings by name")
    _encoded(metadata)
    return Metadata(json_bytes(metadata), lambda _: metadata)


def _split(
    path: Path, groups: Iterable[TensorGroup], max_shard_bytes: int
) -> dict[Path, list[TensorGroup]]:
    """Return what goes into each file, in the order in which it is read."""
    shards: list[list[TensorGroup]] = [[]]
    taken = 0
    for group in groups:
        if shards[-1] and taken + group.nbytes > max_shard_bytes:
            shards.append([])
            taken = 0
        shards[-1].append(group)
        taken += group.nbytes
    if len(shards) == 1:
        return {path: shards[0]}
    stem, count = path.name.removesuffix(SUFFIX), len(shards)
    return {
        path.with_name(f"{stem}-{number:05}-of-{count:05}{SUFFIX}"): shard
        for number, shard in enumerate(shards, 1)
    }


def _room(path: Path, groups: Iterable[TensorGroup], metadata: Metadata) -> int:
    """Return the bytes to leave for a header."""
    frame = json_bytes({METADATA: {CHECKSUM: "0" * 32}})
    room = frame + metadata.header_bytes + sum(group.header_bytes for group in groups)
    room += -room % _ALIGNMENT
    if room > MAX_HEADER_BYTES:
        raise ConfigError(
            f"{path.name}: names and metadata may take {room} bytes, where the format allows "
            f"{MAX_HEADER_BYTES}"
        )
    return room


def _write_groups(
    writer: _Writer, groups: Sequence[TensorGroup], metadata: Metadata, report: _Report
) -> _Written:
    """Fill a file."""
    for group in groups:
        report.begin()
        # Not given a name here: the tensors are let go before the next ones are read.
        writer.add(group.read())
        report.done(group)
    return writer.finish(metadata.make([group.name for group in groups]))


def _write_index(files: AtomicFiles, index: Path, listed: Mapping[Path, _Written]) -> None:
    metadata = {
        "total_size": sum(sum(shard.sizes.values()) for shard in listed.values()),
        "writer": _WRITER,
        CHECKSUMS: {file.name: shard.checksum for file, shard in listed.items()},
    }
    weight_map = {name: file.name for file, shard in listed.items() for name in shard.sizes}
    content = {"metadata": metadata, "weight_map": weight_map}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    with files.open(index) as opened:
        opened.write(f"{text}\n".encode())
    if any(file.exists() for file in listed):
        # Names are equal: with its old index, a mixture of shards would look whole.
        files.hide(index)


def _former_shards(index: Path) -> list[Path]:
    """Return an index that lowbits wrote, and its shards; nothing of what others wrote."""
    try:
        former = read_index(index)
    except (FileNotFoundError, FormatError):
        return []
    except OSError as error:
        if error.errno == ENAMETOOLONG:
            return []
        raise
    metadata, listed = former.get("metadata"), former.get("weight_map")
    if not isinstance(metadata, dict) or not isinstance(listed, dict):
        return []
    if metadata.get("writer") != _WRITER:
        return []
    stem = re.escape(index.name.removesuffix(INDEX_SUFFIX))
    shard = re.compile(rf"{stem}-\d{{5,}}-of-\d{{5,}}{re.escape(SUFFIX)}")
    names = {name for name in map(str, listed.values()) if shard.fullmatch(name)}
    return [index, *(index.with_name(name) for name in names)]
