"""torchao's weights in files that diffusers, transformers or torchao wrote.

``x.weight`` stands in the file as ``x._weight_qdata``, ``x._weight_scale``, ...; the metadata says
in JSON what class of torchao's they make. Source: ``flatten_tensor_state_dict`` of torchao 0.18
(``torchao/prototype/safetensors/safetensors_support.py``).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import torch

from lowbits.backends.torchao import stored, stored_scheme
from lowbits.errors import FormatError
from lowbits.files.forms.found import Checkpoint, Found, Listed, parsed, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lowbits.core.backend import Packed
    from lowbits.files.weights import StoredTensor

_NAMES: Final = "tensor_names"
_DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def find(checkpoint: Checkpoint) -> Iterator[Found]:
    """Yield the weights that torchao stored."""
    some = next(iter(checkpoint.tensors.values()), None)
    for name, description in _descriptions(checkpoint.metadata) if some else ():
        assert some
        found = parsed(description, some, f"the metadata of {name}")
        kind, names = found.get("_type"), found.get("_tensor_data_names")
        if kind == "Tensor":
            continue
        if not isinstance(kind, str) or not _is_names(names):
            raise refusal(some, f"metadata of {name}: {kind!r} of {names!r}")
        module, _, weight = name.rpartition(".")
        prefix = f"{module}._{weight}_" if module else f"_{weight}_"
        present = checkpoint.present(prefix + part for part in names)
        if present:  # else they are in another file
            first = checkpoint.tensors[present[0]]
            held = {part: checkpoint.need(prefix + part, first) for part in names}
            yield _weight(checkpoint, name, kind, found.get("_data"), held)


def _descriptions(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each name that torchao described; metadata of others is not looked into."""
    try:
        names = json.loads(metadata.get(_NAMES, "[]"))
    except (ValueError, RecursionError):
        return
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name in metadata:
            yield name, metadata[name]


def _is_names(names: object) -> TypeGuard[list[str]]:
    return isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)


def _weight(
    checkpoint: Checkpoint, name: str, kind: str, data: Any, parts: Mapping[str, StoredTensor]
) -> Found:
    options = data if isinstance(data, dict) else {}
    first = next(iter(parts.values()))
    codes = parts.get("qdata", first)
    shape = _shape(options.get("shape"), codes, kind)
    is_dynamic = _quantizes_rows(options) and "act_quant_scale" not in parts
    dtype = _dtype(options, parts)
    try:
        scheme = stored_scheme(kind, codes.dtype, shape[-1], is_dynamic=is_dynamic)
    except FormatError as error:
        listed = Listed(name, shape, dtype, f"torchao:{kind}")
        return checkpoint.refused(listed, [p.name for p in parts.values()], error.args[0])

    def make(tensors: Mapping[str, Tensor]) -> Packed:
        return stored(kind, shape, tensors, is_dynamic=is_dynamic)

    return checkpoint.found(Listed(name, shape, dtype, scheme), parts, make)


def _shape(described: Any, codes: StoredTensor, kind: str) -> tuple[int, ...]:
    """Return a weight's shape: that of its codes, unless those are packed."""
    if described is None:
        shape: Sequence[Any] = codes.shape
    else:
        shape = described if isinstance(described, list) else ()
    if not shape or not all(type(n) is int and 0 < n < 1 << 48 for n in shape):
        raise refusal(codes, f"a {kind} of shape {described or codes.shape!r}")
    if math.prod(shape) > 8 * codes.extent.nbytes:
        raise refusal(codes, f"{codes.extent.nbytes} bytes of codes do not make {list(shape)}")
    return tuple(shape)


def _dtype(options: Mapping[str, Any], parts: Mapping[str, StoredTensor]) -> torch.dtype | None:
    described = options.get("dtype")
    if isinstance(described, dict):
        return _DTYPES.get(str(described.get("_data")))
    # Int4Tensor keeps its scales in the dtype of the weight, and no other word of it.
    return parts["scale"].dtype if "shape" in options and "scale" in parts else None


def _quantizes_rows(options: Mapping[str, Any]) -> bool:
    """Say whether activations are quantized too, each row by itself and symmetrically."""
    how = options.get("act_quant_kwargs")
    described = how.get("_data") if isinstance(how, dict) else None
    if not isinstance(described, dict):
        return False
    granularity, mapping = described.get("granularity"), described.get("mapping_type")
    is_by_row = isinstance(granularity, dict) and granularity.get("_type") == "PerRow"
    is_symmetric = not isinstance(mapping, dict) or mapping.get("_data") == "SYMMETRIC"
    return is_by_row and is_symmetric
