"""Tensors of a checkpoint that may lie in several safetensors files: folders, shards, variants."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.core.source import stamp_of
from lowbits.errors import FormatError
from lowbits.files.safetensors import CHECKSUM, MAX_HEADER_BYTES, parse_json, read_safetensors
from lowbits.files.weights import open_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lowbits.files.weights import StoredTensor

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = f"{SUFFIX}.index.json"

#: In the metadata of an index: the checksum of each shard, by its name; see `CHECKSUM`.
CHECKSUMS: Final = "checksums"

#: ``model-00001-of-00002``, the variant before or behind the number.
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<rest>\..+)?")

#: ``model.fp16``; not ``v1.5-pruned``.
_VARIANT: Final = re.compile(r"(?P<stem>.+)\.(?P<variant>[A-Za-z]\w*)")


@final
@dataclass(frozen=True)
class Tensors:
    """Tensors of one or more files.

    Attributes:
        path: that was asked for.
        tensors: by name, over all files.
        metadata: of all files; where they differ, the first one's.
        files: that hold the tensors.
        problems: tensors that cannot be read, by name, and why.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    files: tuple[Path, ...]
    problems: Mapping[str, str]

    def require_readable(self) -> None:
        """Raise `FormatError` where a tensor cannot be read."""
        for name, problem in self.problems.items():
            raise FormatError(problem, self.path, name)


def open_tensors(path: str | Path, variant: str | None = None) -> Tensors:
    """Read the headers of a checkpoint: a file, an index of shards, or a folder of either.

    Args:
        path: the file, its index (``*.safetensors.index.json``), or the folder; where a file is
            missing, its index is looked for.
        variant: which of several copies in a folder to take, e.g. ``"fp16"``. None: the one
            without a variant, or else the only one there is.

    Raises:
        FormatError: a file is none of safetensors, shards and index contradict one another, a
            tensor is there twice, or a folder leaves open what is meant.
        OSError: the system refuses to open a file.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, variant)
    if path.suffix == ".json":
        return _open_index(path, path)
    index = index_of(path)
    # In this order: the name of an index is longer, and may be too long.
    if not path.exists() and index.exists():
        return _open_index(index, path)
    return _merge(path, [path], {})


def index_of(file: Path) -> Path:
    """Return where the index is, or would be, of a file that is split into shards."""
    return file.with_name(file.name.removesuffix(SUFFIX) + INDEX_SUFFIX)


def files_of(file: Path) -> list[Path]:
    """Return the files that a save to some path may have written: the file, and shards of it."""
    own = _parse(file)
    alike = ((_parse(other), other) for other in file.parent.glob(f"*{SUFFIX}"))
    return [other for name, other in alike if (name.stem, name.variant) == (own.stem, own.variant)]


@final
@dataclass(frozen=True)
class _Name:
    """What the name of a file, or of an index, says; `count` is 0 but for a shard."""

    file: Path
    stem: str
    variant: str | None
    count: int

    @property
    def is_index(self) -> bool:
        return self.file.suffix == ".json"


def _parse(file: Path) -> _Name:
    name, count = file.name, 0
    if file.suffix == ".json":
        name, _, rest = name.removesuffix(".json").rpartition(f"{SUFFIX}.index")
        name += rest
    else:
        name = name.removesuffix(SUFFIX)
        if match := _SHARD.fullmatch(name):
            name, count = match["stem"] + (match["rest"] or ""), int(match["count"])
    match = _VARIANT.fullmatch(name)
    stem, variant = (match["stem"], match["variant"]) if match else (name, None)
    return _Name(file, stem, variant, count)


def _open_folder(folder: Path, variant: str | None) -> Tensors:
    found = [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}.index*.json")]
    # Hidden: what a killed process left, and what some systems put beside each file.
    names = [_parse(file) for file in sorted(found) if not file.name.startswith(".")]
    if not names:
        raise FormatError(f"no file in it ends with {SUFFIX}", folder)
    names = _of_variant(names, variant, folder)
    indices = [name for name in names if name.is_index]
    if not indices:
        _check_whole(names, folder)
        return _merge(folder, [name.file for name in names], {})
    rivals = [n for n in names if n.stem == indices[0].stem and not n.is_index and not n.count]
    if len(indices) > 1 or rivals:
        raise FormatError(_which([n.file.name for n in (*indices, *rivals)]), folder)
    return _open_index(indices[0].file, folder)


def _of_variant(names: list[_Name], variant: str | None, folder: Path) -> list[_Name]:
    by_variant: dict[str | None, list[_Name]] = defaultdict(list)
    for name in names:
        by_variant[name.variant].append(name)
    if variant is None and None not in by_variant and len(by_variant) == 1:
        return names
    if variant not in by_variant:
        there = ", ".join(sorted(v or "none" for v in by_variant))
        wanted = "without a variant" if variant is None else f"of variant {variant!r}"
        raise FormatError(f"no file {wanted}; variants there: {there}", folder)
    return by_variant[variant]


def _check_whole(names: Iterable[_Name], folder: Path) -> None:
    """Refuse shards that no index lists: of a save that was cut short, files may not match."""
    shards = [name.file.name for name in names if name.count]
    if shards:
        raise FormatError(f"the index of {shards[0]} and other shards is missing", folder)


def _which(names: list[str]) -> str:
    return f"it holds {' and '.join(names)}: pass the path of the one that is meant"


def read_index(index: Path) -> dict[str, Any]:
    """Return the JSON object of an index, its size checked before it is read.

    Raises:
        FormatError: it is not strict JSON, or too large.
        OSError: it is missing, or may not be read.
    """
    with open_file(index) as file:
        return parse_json(file.read(min(stamp_of(file)[1], MAX_HEADER_BYTES + 1)), index)


def _open_index(index: Path, path: Path) -> Tensors:
    content = read_index(index)
    listed, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(listed, dict) or not all(isinstance(s, str) for s in listed.values()):
        raise FormatError("expected an object 'weight_map' of strings", index)
    shards = {shard: _shard(index, shard) for shard in sorted(set(listed.values()))}
    if not shards:
        raise FormatError("its 'weight_map' lists no tensors", index)
    checksums = metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None
    merged = _merge(path, shards.values(), checksums if isinstance(checksums, dict) else {})
    for name, shard in listed.items():
        stored = merged.tensors.get(name)
        if name not in merged.problems and (stored is None or stored.extent.path != shards[shard]):
            raise FormatError(f"{index.name} lists it, but it is not there", shards[shard], name)
    return merged


def _shard(index: Path, name: str) -> Path:
    """Return the path of a shard, which may not lie outside of its index's folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if leaves or not name or "\0" in name:
        raise FormatError(f"{name!r} is no name of a file beside it", index)
    shard = index.parent / name
    if not shard.is_file():
        raise FormatError(f"shard {name!r} is missing", index)
    return shard


def _merge(path: Path, files: Iterable[Path], checksums: Mapping[str, Any]) -> Tensors:
    """Read the headers of files that hold one checkpoint together, and are of one save."""
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    problems: dict[str, str] = {}
    holder: dict[str, Path] = {}
    files = tuple(files)
    for file in files:
        header = read_safetensors(file)
        own = header.metadata.get(CHECKSUM)
        if own and checksums.get(file.name, own) != own:
            raise FormatError("it was saved at another time than its index: save again", file)
        for name in (*header.tensors, *header.problems):
            if name in holder:
                raise FormatError(f"{holder[name].name} holds it too", file, name)
            holder[name] = file
        tensors.update(header.tensors)
        problems.update(header.problems)
        metadata = dict(header.metadata) | metadata
    return Tensors(path, tensors, metadata, files, problems)
