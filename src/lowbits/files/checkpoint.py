"""Checkpoints of every kind as weights: what a file is, is said by its bytes, not by its name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.errors import ConfigError, FormatError
from lowbits.files.folders import BESIDE_LOADED, refuse_other_weights
from lowbits.files.forms.recognise import recognise
from lowbits.files.gguf import read_gguf
from lowbits.files.manifest import MANIFEST
from lowbits.files.own import manifest_of, own_file_in, own_weights
from lowbits.files.pickles import open_pickle
from lowbits.files.sharded import SUFFIX, open_tensors
from lowbits.files.weights import open_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbits.core.registry import BackendRegistry
    from lowbits.files.weights import Weight

GGUF: Final = "gguf"
SAFETENSORS: Final = "safetensors"
OWN: Final = "lowbits"
PICKLE: Final = "pickle"

#: What weights' files are called; folders may have any other name with a dot.
FILE_SUFFIXES: Final = (SUFFIX, ".gguf", ".pt", ".pth", ".bin", ".ckpt")

#: Parts of the names of a LoRA's factors.
_FACTORS: Final = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")

CONFIG: Final = "config.json"
_CONFIG_BYTES: Final = 1 << 24
#: How files begin: GGUF's magic in both byte orders, zip archives and pickles of torch.
_MAGIC: Final = {b"GGUF": GGUF, b"FUGG": GGUF, b"PK\x03\x04": PICKLE, b"\x80\x02": PICKLE}


@final
@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its tensors are not read before they are asked for.

    Attributes:
        path: that was opened: a file, an index, or a folder.
        format: ``"gguf"``, ``"safetensors"``, ``"lowbits"`` (safetensors with its manifest) or
            ``"pickle"``.
        weights: by name; tied ones by each of their names.
        architecture: as a GGUF file says; None where nothing is said.
        versions: of the packages that made it, where it says so.
        problems: what is odd about it and does not keep it from being read.
    """

    path: Path
    format: str
    weights: Mapping[str, Weight]
    architecture: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class OpenOptions:
    """How to open.

    Attributes:
        registry: of the schemes.
        verify: whether the checksums of lowbits' own files are compared: reads them whole.
        allow_pickle: whether torch may unpickle it, harmless types only.
        allow_nonfinite: whether scales may be NaN or infinite.
    """

    registry: BackendRegistry
    verify: bool = False
    allow_pickle: bool = False
    allow_nonfinite: bool = False


def refuse_adapters(opened: Checkpoint) -> None:
    """Raise where a checkpoint is a LoRA, whose factors are no model's weights.

    Raises:
        ConfigError: saying what loads it.
    """
    if any(part in f".{name}." for name in opened.weights for part in _FACTORS):
        raise ConfigError(
            f"{opened.path} is a LoRA: pipe.load_lora_weights loads it, packed or not; it is not "
            "packed itself"
        )


def open_checkpoint(path: str | Path, options: OpenOptions) -> Checkpoint:
    """Open a GGUF file, a safetensors file, index or folder, or, if allowed, a pickle.

    Raises:
        FormatError: it is none of those, or not what it claims to be.
        ConfigError: it is a pickle, and those are not allowed; there is nothing to verify; or the
            folder holds weights twice.
        OSError: the system refuses to open it.
    """
    opened = _opened(Path(path), options)
    if options.verify and opened.format != OWN:
        raise ConfigError(
            f"verify: {path} has no checksum to compare with; files that lowbits wrote have one"
        )
    return opened


def _opened(path: Path, options: OpenOptions) -> Checkpoint:
    if path.is_dir():
        own = own_file_in(path)
        if own is not None:
            refuse_other_weights(path, BESIDE_LOADED)
        return _safetensors(own or path, options)
    kind = SAFETENSORS if path.suffix == ".json" or not path.exists() else _kind(path)
    if kind == GGUF:
        file = read_gguf(path)
        weights = file.weights(allow_nonfinite=options.allow_nonfinite)
        return Checkpoint(path, GGUF, weights, file.architecture, problems=file.problems)
    if kind == SAFETENSORS:
        return _safetensors(path, options)
    if not options.allow_pickle:
        raise ConfigError(
            f"{path} is a pickle, which may run code of whoever made it: save it as safetensors. "
            "If you trust them, lowbits.load and inspect take allow_pickle=True (torch then loads "
            "harmless types only)"
        )
    return Checkpoint(path, PICKLE, open_pickle(path))


def _kind(path: Path) -> str:
    with open_file(path) as file:
        start = file.read(9)
    # What is called .gguf and begins as neither is told that it is no GGUF file.
    is_gguf = path.suffix.lower() == ".gguf" and not start.endswith(b"{")
    other = GGUF if is_gguf else SAFETENSORS
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), other)


def _safetensors(path: Path, options: OpenOptions) -> Checkpoint:
    opened = open_tensors(path)
    opened.require_readable()
    if MANIFEST in opened.metadata:
        manifest = manifest_of(opened.files, verify=options.verify)
        weights = own_weights(
            opened.tensors,
            manifest,
            options.registry,
            path,
            allow_nonfinite=options.allow_nonfinite,
        )
        return Checkpoint(path, OWN, weights, versions=manifest.versions)
    found = recognise(
        opened.tensors,
        opened.metadata,
        read_config(opened.files[0].parent),
        allow_nonfinite=options.allow_nonfinite,
    )
    return Checkpoint(path, SAFETENSORS, found)


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """Return what the config of a model's folder says, if there is one.

    Raises:
        FormatError: it is no JSON.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    with open_file(path) as file:
        text = file.read(_CONFIG_BYTES)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"it is no JSON: {error}", path) from error
    return config if isinstance(config, dict) else None
