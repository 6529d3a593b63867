"""lowbits' own files: safetensors of what packed modules hold, and a manifest that explains it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Final, cast, final

import torch
from torch import Tensor, nn

from lowbits.core.backend import Packed
from lowbits.core.names import dotted, modules_beside_adapters
from lowbits.core.packed import (
    PackedLayer,
    marker_name,
    packed_weight,
    stored_names,
)
from lowbits.errors import FormatError, PatchError, UnknownSchemeError
from lowbits.files.manifest import Manifest, field_name, read_manifest
from lowbits.files.safetensors import CHECKSUM, read_safetensors
from lowbits.files.sharded import INDEX_SUFFIX
from lowbits.files.soundness import require_decodable, require_finite
from lowbits.files.weights import Weight, open_file, plain_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lowbits.core.backend import QuantBackend
    from lowbits.core.packed import Layout
    from lowbits.core.registry import BackendRegistry
    from lowbits.core.scheme import Scheme
    from lowbits.files.manifest import PackedEntry
    from lowbits.files.safetensors import SafetensorsFile
    from lowbits.files.weights import StoredTensor

#: In place of ``diffusion_pytorch_model.safetensors`` and ``model.safetensors``: other loaders find
#: nothing under those names, and say so, where they would put random weights for what is packed.
OWN_FILE: Final = "lowbits.safetensors"


#: Tensors that are nothing but their values; ours are, too: those that are streamed.
_PLAIN: Final = (Tensor, nn.Parameter, nn.Buffer)
_OURS: Final = "lowbits."

_READ_BYTES: Final = 1 << 22


def own_file_in(folder: Path) -> Path | None:
    """Return the file that lowbits wrote into a model's folder, which shards may stand for."""
    file = folder / OWN_FILE
    index = file.with_name(file.stem + INDEX_SUFFIX)
    return file if file.exists() or index.exists() else None


def weights_of(module: nn.Module) -> tuple[dict[str, Weight], dict[str, str]]:
    """Return the weights of a module, packed or not, and its ties: stored name by other name.

    Nothing is copied before it is read; streamed weights are read from where they wait. Adapters
    are left out, and layers go by the names that they have without them.

    Raises:
        PatchError: a weight is another library's tensor, or has no data; or a module has a state
            that is no tensor.
    """
    found = _Found()
    for fqn, part in modules_beside_adapters(module):
        found.add(fqn, part)
    return found.weights, found.ties


@final
class _Found:
    """Weights of modules, tied ones under the first name that they have."""

    def __init__(self) -> None:
        self.weights: dict[str, Weight] = {}
        self.ties: dict[str, str] = {}
        self._names: dict[int, str] = {}

    def add(self, fqn: str, part: nn.Module) -> None:
        """Add what a module holds itself."""
        stored: set[str] = set()
        if not isinstance(part, PackedLayer):
            _refuse_extra_state(fqn, part)
        else:
            for name, layout in part.lowbits_layouts.items():
                stored |= set(stored_names(part, name))
                self._packed(dotted(fqn, name), part, name, layout)
        passing = part._non_persistent_buffers_set | stored
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and name not in passing and self._is_new(fqn, name, tensor):
                self._plain(dotted(fqn, name), tensor)

    def _is_new(self, fqn: str, name: str, tensor: Tensor) -> bool:
        full = dotted(fqn, name)
        first = self._names.setdefault(id(tensor), full)
        if first != full:
            self.ties[full] = first
        return first == full

    def _packed(self, full: str, layer: PackedLayer, name: str, layout: Layout) -> None:
        marker = cast("Tensor", layer._parameters[marker_name(name)])
        first = self._names.setdefault(id(marker), full)
        if first != full:
            self.ties[full] = first
            return
        self.weights[full] = Weight(
            full,
            tuple(layout.shape),
            marker.dtype,
            sum(cast("Tensor", layer._parameters[key]).nbytes for key in stored_names(layer, name)),
            partial(_packed_on_host, layer, name),
            layout.scheme,
            layout.compute_dtype,
            is_shared=True,
        )

    def _plain(self, full: str, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise PatchError(f"cannot save {full}: it has no data (meta device)")
        kind = type(tensor)
        if kind not in _PLAIN and not kind.__module__.startswith(_OURS):
            raise PatchError(
                f"cannot save {full}: it is another library's {kind.__name__}; "
                "lowbits.adopt(target) turns those into packed weights, which can be saved"
            )
        shape, read = tuple(tensor.shape), partial(_on_host, tensor)
        self.weights[full] = Weight(full, shape, tensor.dtype, tensor.nbytes, read, is_shared=True)


def _refuse_extra_state(fqn: str, part: nn.Module) -> None:
    if type(part).get_extra_state is not nn.Module.get_extra_state:
        raise PatchError(
            f"cannot save {fqn or 'the module'}: a {type(part).__name__} keeps a state beside its "
            "tensors (get_extra_state), which files do not hold: torch.save its state_dict()"
        )


def _packed_on_host(layer: PackedLayer, name: str) -> Packed:
    packed = packed_weight(layer, name)
    return replace(packed, tensors={key: _on_host(t) for key, t in packed.tensors.items()})


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def versions(weights: Iterable[Weight]) -> dict[str, str]:
    """Return the versions of the packages that made some weights, as far as they are known here."""
    backends = {weight.scheme.partition("-")[0] for weight in weights if weight.scheme}
    packages = {"bnb": "bitsandbytes", "torchao": "torchao", "quanto": "optimum-quanto"}
    names = ("lowbits", "torch", *(packages[b] for b in sorted(backends & packages.keys())))
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a packed model needs no library to be saved
            continue
    return found


def manifest_of(files: Iterable[Path], *, verify: bool) -> Manifest:
    """Return what the manifests of a file, or of all shards, say together.

    Args:
        files: of one checkpoint.
        verify: whether to read them whole, and compare their checksums.

    Raises:
        FormatError: a file is not one of lowbits', or its bytes are not those that were written.
    """
    parts = []
    for path in files:
        header = read_safetensors(path)
        part = read_manifest(header.metadata, path)
        if part is None:
            raise FormatError("it has no manifest, and other shards have", path)
        if verify:
            _verify(path, header)
        parts.append(part)
    return Manifest(
        {name: entry for part in parts for name, entry in part.weights.items()},
        {alias: name for part in parts for alias, name in part.ties.items()},
        {name: version for part in parts for name, version in part.versions.items()},
    )


def _verify(path: Path, header: SafetensorsFile) -> None:
    """Compare the checksum of everything behind the header."""
    start = min((tensor.extent.offset for tensor in header.tensors.values()), default=0)
    found = hashlib.blake2b(digest_size=16)
    with open_file(path) as file:
        file.seek(start)
        while start and (data := file.read(_READ_BYTES)):
            found.update(data)
    if found.hexdigest() != header.metadata.get(CHECKSUM):
        raise FormatError("its bytes are not those that were written: its checksum differs", path)


def own_weights(
    tensors: Mapping[str, StoredTensor],
    manifest: Manifest,
    registry: BackendRegistry,
    path: object,
    *,
    allow_nonfinite: bool = False,
) -> dict[str, Weight]:
    """Return the weights of a file that lowbits wrote; those that are tied by all of their names.

    Raises:
        FormatError: tensors and manifest do not belong together.
    """
    rest = dict(tensors)
    weights: dict[str, Weight] = {}
    for name, entry in manifest.weights.items():
        fields = {}
        for field in entry.fields:
            tensor = rest.pop(field_name(name, field), None)
            if tensor is None:
                raise FormatError(f"the file has no {field} of it", path, name)
            fields[field] = tensor
        backend = _require_consistent(name, entry, fields, registry, path)
        reader = _Reader(name, entry, fields, backend, path, allow_nonfinite)
        nbytes = sum(tensor.extent.nbytes for tensor in fields.values())
        weights[name] = Weight(
            name,
            entry.shape,
            entry.dtype,
            nbytes,
            reader,
            entry.scheme,
            entry.compute_dtype,
        )
    for name, weight in plain_weights(rest).items():
        if weights.setdefault(name, weight) is not weight:
            raise FormatError("it is there packed, and as it is too", path, name)
    for alias, name in manifest.ties.items():
        if name not in weights:
            raise FormatError(f"is tied to {name}, which is not in the file", path, alias)
        if weights.setdefault(alias, weights[name]) is not weights[name]:
            raise FormatError(f"is tied to {name}, and in the file too", path, alias)
    return weights


def _require_consistent(
    name: str,
    entry: PackedEntry,
    fields: Mapping[str, StoredTensor],
    registry: BackendRegistry,
    path: object,
) -> QuantBackend:
    """Return a weight's backend; raise where its tensors cannot be what the manifest says."""
    try:
        backend, scheme = registry.find(entry.scheme)
    except UnknownSchemeError as error:
        raise FormatError(f"is stored as {entry.scheme}: {error}", path, name) from error
    if backend is None:
        raise FormatError("is called packed, and native at once", path, name)
    sizes = {field: tensor.extent.nbytes for field, tensor in fields.items()}
    for field, tensor in fields.items():
        dtype = entry.fields[field]
        is_cut = entry.row_sliceable and tensor.shape[:1] != entry.rows[:1]
        if tensor.dtype.itemsize != dtype.itemsize or is_cut:
            raise FormatError(
                f"its {field} is {tensor.dtype} {tensor.shape}, expected {dtype} for "
                f"{entry.rows[0]} rows",
                path,
                name,
            )
    nbytes, expected = sum(sizes.values()), backend.packed_bytes(scheme, *entry.rows)
    # A library's own scales may be float32 where the scheme's are float16.
    wide = sum(sizes[f] // 2 for f, dtype in entry.fields.items() if dtype == torch.float32)
    if expected not in (nbytes, nbytes - wide) and not _has_other_groups(scheme, entry, fields):
        raise FormatError(
            f"takes {nbytes} bytes; {entry.scheme} takes {expected} for {entry.rows}", path, name
        )
    return backend


def _has_other_groups(
    scheme: Scheme, entry: PackedEntry, fields: Mapping[str, StoredTensor]
) -> bool:
    """Say whether as many codes as there should be share scales of other groups.

    Those of a layer that another library quantized may (`lowbits.adopt`).
    """
    if not scheme.group_bits or not {"qdata", "scale"} <= fields.keys():
        return False
    weights = math.prod(entry.rows)
    scales = math.prod(fields["scale"].shape)
    code_bytes = -(-weights * int(scheme.code_bits) // 8)
    return fields["qdata"].extent.nbytes == code_bytes and 0 < scales <= weights // 2


@final
@dataclass(frozen=True)
class _Reader:
    """Reads a packed weight."""

    name: str
    entry: PackedEntry
    fields: Mapping[str, StoredTensor]
    backend: QuantBackend
    path: object
    allow_nonfinite: bool

    def __call__(self) -> Packed:
        entry = self.entry
        tensors = {key: t.read().view(entry.fields[key]) for key, t in self.fields.items()}
        packed = Packed(entry.scheme, entry.rows, tensors, entry.row_sliceable)
        require_decodable(packed, self.backend, self.path, self.name)
        if not self.allow_nonfinite:
            require_finite(packed, self.path, self.name)
        return packed
