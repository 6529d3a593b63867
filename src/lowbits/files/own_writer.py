"""Writes lowbits' own files: a weight at a time, whose stored form is known once it is made.

The header of a safetensors file stands in front of tensors that are not there yet when it is begun.
Room is left for it, as much as names and counts of tensors can need, and what it does not take is
filled with spaces, which the format allows (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final, final

from lowbits.core.backend import Packed
from lowbits.core.memory import bytes_of
from lowbits.core.packed import storage_dtype
from lowbits.errors import BackendError
from lowbits.files.atomic import atomic_files
from lowbits.files.manifest import CHECKSUM, Manifest, PackedEntry, field_name
from lowbits.files.safetensors import DTYPES, METADATA
from lowbits.files.safetensors_writer import index_json, remove_former, shard_names
from lowbits.files.sharded import INDEX_SUFFIX, SUFFIX
from lowbits.progress import CancelToken, ProgressCallback, ProgressEvent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from lowbits.files.weights import Weight

#: Bytes of a file, above which it is split: what other libraries do.
SHARD_BYTES: Final = 5_000_000_000

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
#: Tensors of a packed weight, at most, and what each of them takes in the header beside its name.
_FIELDS: Final = 8
_TENSOR_BYTES: Final = 160
#: What the manifest says of a packed weight beside its name, at most.
_ENTRY_BYTES: Final = 640
#: Of the manifest itself.
_MANIFEST_BYTES: Final = 1024
#: Tensors of other sizes are written last, so that those behind them are aligned.
_ALIGNMENT: Final = 8


@final
@dataclass(frozen=True)
class WriteOptions:
    """How to write.

    Attributes:
        versions: of the packages that made the weights, by their names.
        max_shard_bytes: of a file, unless it is one larger weight.
        stage: as progress calls it.
    """

    versions: Mapping[str, str]
    max_shard_bytes: int = SHARD_BYTES
    stage: str = "save"
    progress: ProgressCallback | None = None
    cancel: CancelToken | None = None


def write_own(
    path: Path, weights: Mapping[str, Weight], ties: Mapping[str, str], options: WriteOptions
) -> None:
    """Write weights to a safetensors file, or to shards with an index.

    Holds one weight at a time. What was at `path` stays until all is written, also where weights
    are read from it; shards of a former, larger save are removed then.

    Args:
        path: ends with ``.safetensors``.
        weights: by name, in the order to write them in.
        ties: the stored name of each other name.
        options: how.

    Raises:
        CancelledError: nothing has changed.
        OSError: the system refuses to write.
    """
    shards = _split(path, weights, options.max_shard_bytes)
    total, done = sum(weight.nbytes for weight in weights.values()), 0
    listed: dict[Path, dict[str, int]] = {}
    index = path.with_name(path.name.removesuffix(SUFFIX) + INDEX_SUFFIX)
    with atomic_files() as files:
        for file, shard in shards.items():
            here = {alias: name for alias, name in ties.items() if name in shard}
            with files.open(file) as opened:
                writer = _Writer(opened, _header_bytes(shard, here))
                for name, weight in shard.items():
                    if options.cancel:
                        options.cancel.raise_if_cancelled("saving")
                    writer.add(name, weight)
                    done += weight.nbytes
                    if options.progress:
                        options.progress(ProgressEvent(options.stage, name, done, total))
                listed[file] = writer.finish(here, options.versions)
        if len(shards) > 1:
            with files.open(index) as opened:
                opened.write(index_json(listed))
            if any(file.exists() for file in shards):
                files.hide(index)  # with its old index, a mixture of shards would look whole
    remove_former(path, index, (index, *shards) if len(shards) > 1 else tuple(shards))


def _split(
    path: Path, weights: Mapping[str, Weight], max_shard_bytes: int
) -> dict[Path, dict[str, Weight]]:
    """Return the weights of each file; a packed weight's tensors stay together."""
    shards: list[dict[str, Weight]] = [{}]
    taken = 0
    for name, weight in weights.items():
        if shards[-1] and taken + weight.nbytes > max_shard_bytes:
            shards.append({})
            taken = 0
        shards[-1][name] = weight
        taken += weight.nbytes
    return dict(zip(shard_names(path, len(shards)), shards, strict=True))


def _header_bytes(weights: Mapping[str, Weight], ties: Mapping[str, str]) -> int:
    """Return what the header of these may take at most."""
    size = _MANIFEST_BYTES + sum(len(json.dumps(pair)) + 8 for pair in ties.items()) * 2
    for name, weight in weights.items():
        own = len(json.dumps(name)) * 2 + _TENSOR_BYTES
        size += own if weight.scheme is None else own * _FIELDS + _ENTRY_BYTES
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@final
class _Writer:
    """Writes one file; its header comes last."""

    def __init__(self, file: BinaryIO, header_bytes: int) -> None:
        self._file, self._header_bytes = file, header_bytes
        file.write(header_bytes.to_bytes(8, "little") + b" " * header_bytes)
        self._digest = hashlib.blake2b(digest_size=16)
        self._offset = 0
        self._header: dict[str, object] = {}
        self._sizes: dict[str, int] = {}
        self._packed: dict[str, PackedEntry] = {}
        self._last: list[tuple[str, Tensor]] = []

    def add(self, name: str, weight: Weight) -> None:
        """Read a weight, and write what it is stored as."""
        value = weight.read()
        if isinstance(value, Packed):
            self._packed[name] = PackedEntry.of(weight, value)
        for key, tensor in _tensors(name, value):
            if tensor.nbytes % _ALIGNMENT:
                self._last.append((key, tensor))
            else:
                self._write(key, tensor)

    def finish(self, ties: Mapping[str, str], versions: Mapping[str, str]) -> dict[str, int]:
        """Write what is left, and the header; return the bytes of each tensor."""
        for key, tensor in sorted(self._last, key=lambda item: -item[1].dtype.itemsize):
            self._write(key, tensor)
        metadata = Manifest(self._packed, ties, versions).to_metadata()
        metadata[CHECKSUM] = self._digest.hexdigest()
        header = {METADATA: metadata, **self._header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self._header_bytes:
            raise BackendError(
                f"names of stored tensors take {len(text)} bytes, {self._header_bytes} were left: "
                f"a backend stores a weight as more than {_FIELDS} tensors"
            )
        self._file.seek(8)
        self._file.write(text)
        self._file.seek(0, 2)
        return self._sizes

    def _write(self, key: str, tensor: Tensor) -> None:
        data = bytes_of(tensor)
        self._file.write(data)
        self._digest.update(data)
        stop = self._offset + tensor.nbytes
        self._header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, stop],
        }
        self._sizes[key] = tensor.nbytes
        self._offset = stop


def _tensors(name: str, value: Tensor | Packed) -> Iterator[tuple[str, Tensor]]:
    """Yield what a weight is stored as: of a packed one, integers, which no cast changes."""
    if not isinstance(value, Packed):
        yield name, value.detach().cpu().contiguous()
        return
    for field, tensor in value.tensors.items():
        yield field_name(name, field), tensor.contiguous().view(storage_dtype(tensor.dtype))
