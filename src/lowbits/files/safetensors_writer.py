"""Safetensors files written tensor by tensor, in shards with an index where they are large.

Source: https://huggingface.co/docs/safetensors, "Format"; the index and its shards are named as in
https://huggingface.co/docs/transformers/big_models.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, final

import torch

from lowbits.core.memory import bytes_of
from lowbits.errors import ConfigError, FormatError
from lowbits.files.atomic import atomic_files
from lowbits.files.safetensors import DTYPES, MAX_HEADER_BYTES, METADATA
from lowbits.files.sharded import INDEX_SUFFIX, SUFFIX, read_index
from lowbits.progress import ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from lowbits.progress import CancelToken, ProgressCallback

#: Above it, files are split: what huggingface's libraries do by default or did.
MAX_SHARD_BYTES: Final = 5_000_000_000

_STAGE: Final = "save"

#: Stands in an index: shards that others wrote are not removed.
_WRITER: Final = "lowbits"

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_RANKS: Final = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@final
@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written.

    Attributes:
        name: in the file.
        dtype: that `read` will give.
        shape: that `read` will give.
        read: gives the tensor, on any device; called once, when it is its turn.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str | Path,
    entries: Iterable[TensorEntry],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressCallback | None = None,
    cancel: CancelToken | None = None,
) -> tuple[Path, ...]:
    """Write tensors to a safetensors file, or to shards and an index.

    Holds one tensor at a time in memory: what `read` gives, and a copy where that is not contiguous
    or on another device. A single file is byte for byte that of ``safetensors.torch.save_file``.
    Whatever is raised, what was at `path` stays, also where the tensors are read from it. After
    success, what a former call left there under other names (shards and their index) is removed. A
    process that is killed while shards take their places leaves them without an index, which
    `lowbits.files.sharded.open_tensors` refuses.

    Args:
        path: ends with ``.safetensors``. Shards are ``<name>-00001-of-00002.safetensors``, their
            index is ``<name>.safetensors.index.json``.
        entries: the tensors; shards keep their order, each is sorted by dtype and name.
        metadata: of each file.
        max_shard_bytes: that a file's tensors take, unless it is one larger tensor.
        progress: called after each tensor, with the bytes of the file.
        cancel: stops between two tensors.

    Returns:
        The file; or the index, then the shards.

    Raises:
        ConfigError: a name, a dtype or the metadata cannot be written.
        FormatError: `read` gave another dtype or shape than its entry says.
        CancelledError: `cancel` was set.
        OSError: the system refuses to write.
    """
    path, entries, metadata = Path(path), list(entries), dict(metadata or {})
    _check(path, entries, metadata)
    shards = _split(path, entries, max_shard_bytes)
    headers = {file: _header(shard, metadata, file) for file, shard in shards.items()}
    index = path.with_name(path.name.removesuffix(SUFFIX) + INDEX_SUFFIX)
    former = _former_shards(index)
    report = _Report(sum(entry.nbytes for entry in entries), progress, cancel)
    with atomic_files() as files:
        for file, shard in shards.items():
            with files.open(file) as opened:
                opened.write(headers[file])
                _write_tensors(opened, shard, file, report)
        if len(shards) > 1:
            with files.open(index) as opened:
                opened.write(_index(shards))
            if any(file.exists() for file in shards):
                # Names are equal: with its old index, a mixture of shards would look whole.
                files.hide(index)
    written = (index, *shards) if len(shards) > 1 else (path,)
    for file in {path, *former}.difference(written):
        file.unlink(missing_ok=True)
    return written


@final
class _Report:
    """Tells the caller how far it is."""

    def __init__(
        self, total_bytes: int, progress: ProgressCallback | None, cancel: CancelToken | None
    ) -> None:
        self._done_bytes, self._total_bytes = 0, total_bytes
        self._progress, self._cancel = progress, cancel

    def begin(self) -> None:
        if self._cancel:
            self._cancel.raise_if_cancelled(_STAGE)

    def done(self, entry: TensorEntry) -> None:
        self._done_bytes += entry.nbytes
        if self._progress:
            event = ProgressEvent(_STAGE, entry.name, self._done_bytes, self._total_bytes)
            self._progress(event)


def _check(path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> None:
    if path.suffix != SUFFIX:
        raise ConfigError(f"path: expected a name that ends with {SUFFIX}, got {path.name!r}")
    names: set[str] = set()
    for entry in entries:
        if not entry.name or entry.name == METADATA or entry.name in names:
            problem = "there twice" if entry.name in names else "not allowed"
            raise ConfigError(f"entries: a tensor's name, {entry.name!r}, is {problem}")
        is_scalar_pair = entry.dtype == torch.float4_e2m1fn_x2 and not entry.shape
        if entry.dtype not in _NAMES or is_scalar_pair:
            raise ConfigError(
                f"{entry.name}: safetensors files have no {entry.dtype} {entry.shape}"
            )
        names.add(entry.name)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ConfigError("metadata: expected strings by name")


def _split(
    path: Path, entries: Iterable[TensorEntry], max_shard_bytes: int
) -> dict[Path, list[TensorEntry]]:
    """Return what goes into each file, in the order in which it lies there."""
    shards: list[list[TensorEntry]] = [[]]
    taken = 0
    for entry in entries:
        if shards[-1] and taken + entry.nbytes > max_shard_bytes:
            shards.append([])
            taken = 0
        shards[-1].append(entry)
        taken += entry.nbytes
    for shard in shards:
        shard.sort(key=lambda entry: (-_RANKS[entry.dtype], entry.name))
    if len(shards) == 1:
        return {path: shards[0]}
    stem, count = path.name.removesuffix(SUFFIX), len(shards)
    return {
        path.with_name(f"{stem}-{number:05}-of-{count:05}{SUFFIX}"): shard
        for number, shard in enumerate(shards, 1)
    }


def _header(entries: Iterable[TensorEntry], metadata: Mapping[str, str], path: Path) -> bytes:
    header: dict[str, object] = {METADATA: metadata} if metadata else {}
    start = 0
    for entry in entries:
        shape = list(entry.shape)
        if entry.dtype == torch.float4_e2m1fn_x2:
            # The format counts values, torch counts pairs.
            shape[-1] *= 2
        stop = start + entry.nbytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": shape,
            "data_offsets": [start, stop],
        }
        start = stop
    try:
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a name or the metadata is no Unicode text: {error}") from error
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise ConfigError(
            f"{path.name}: names and metadata take {len(raw)} bytes, where the format allows "
            f"{MAX_HEADER_BYTES}"
        )
    return len(raw).to_bytes(8, "little") + raw


def _index(shards: Mapping[Path, Sequence[TensorEntry]]) -> bytes:
    total_size = sum(entry.nbytes for shard in shards.values() for entry in shard)
    weight_map = {entry.name: file.name for file, shard in shards.items() for entry in shard}
    index = {"metadata": {"total_size": total_size, "writer": _WRITER}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _write_tensors(
    file: BinaryIO, entries: Iterable[TensorEntry], path: Path, report: _Report
) -> None:
    for entry in entries:
        report.begin()
        # In a function of its own: the tensor is let go before the next one is read.
        _write(file, entry, path)
        report.done(entry)


def _write(file: BinaryIO, entry: TensorEntry, path: Path) -> None:
    tensor = entry.read().detach()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
        raise FormatError(
            f"expected {entry.dtype} of shape {tuple(entry.shape)}, got {tensor.dtype} of "
            f"{tuple(tensor.shape)}",
            path,
            entry.name,
        )
    # Conjugated and negated views are only marked as such: their bytes are those before.
    tensor = tensor.resolve_conj().resolve_neg().to("cpu").contiguous()
    file.write(bytes_of(tensor))


def _former_shards(index: Path) -> list[Path]:
    """Return an index that lowbits wrote, and its shards; nothing of what others wrote."""
    try:
        former = read_index(index)
    except (FileNotFoundError, FormatError):
        return []
    metadata, listed = former.get("metadata"), former.get("weight_map")
    if not isinstance(metadata, dict) or not isinstance(listed, dict):
        return []
    if metadata.get("writer") != _WRITER:
        return []
    stem = re.escape(index.name.removesuffix(INDEX_SUFFIX))
    shard = re.compile(rf"{stem}-\d{{5,}}-of-\d{{5,}}{re.escape(SUFFIX)}")
    names = {name for name in map(str, listed.values()) if shard.fullmatch(name)}
    return [index, *(index.with_name(name) for name in names)]
