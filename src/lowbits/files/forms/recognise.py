"""Which tensors of a safetensors checkpoint are parts of low-bit weights, and of which ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lowbits.errors import FormatError
from lowbits.files.forms import bnb, quanto, scaled, torchao
from lowbits.files.forms.found import Checkpoint, Found
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbits.files.weights import StoredTensor

#: In the order in which they claim tensors.
_FORMS: Final = (torchao.find, quanto.find, bnb.find, scaled.find)


def recognise(
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    *,
    allow_nonfinite: bool = False,
) -> dict[str, Weight]:
    """Return the weights that the tensors of a checkpoint make.

    Tensors that make one low-bit weight become one weight, which reads as a `Packed` of the same
    values: nothing is quantized again. What no scheme holds is listed under a scheme with a colon
    in its name, ``"comfy:nvfp4"``, which is no scheme's, and raises when it is read. Scales of
    activations and markers belong to no weight, and are left out.

    quanto's int4 and int2 weights have a shape only where there is a bias beside them; else each of
    their groups counts as a row, and `lowbits.backends.quanto.regrouped` makes the module's rows.

    Args:
        tensors: of a file, or of all files of a folder, by name.
        metadata: of the file's header, or of all of them together.
        config: the folder's config.json, if it has one.
        allow_nonfinite: read scales and float8 values that are NaN or infinite as well.

    Returns:
        Weights by name, in the order of the file.

    Raises:
        FormatError: parts of a weight that are missing, or do not fit each other; nothing but
            descriptions was read. The same error is raised when a weight is read.
    """
    rest = Checkpoint(tensors, metadata, config or {}, allow_nonfinite)
    claimed: dict[str, Found] = {}
    for form in _FORMS:
        for found in list(form(rest)):
            _claim(found, claimed, tensors)
        rest = rest.without(claimed)
    scaled.unclaimed(rest)
    return _in_order(tensors, claimed)


def _claim(found: Found, claimed: dict[str, Found], tensors: Mapping[str, StoredTensor]) -> None:
    for name in found.parts:
        if name in claimed:
            raise FormatError("it is a part of two weights", tensors[name].extent.path, name)
        claimed[name] = found


def _in_order(
    tensors: Mapping[str, StoredTensor], claimed: Mapping[str, Found]
) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    seen: set[int] = set()
    for name, part in tensors.items():
        found = claimed.get(name)
        if found is None:
            weight = Weight(name, part.shape, part.dtype, part.extent.nbytes, part.read)
        elif found.weight is None or id(found) in seen:
            continue
        else:
            seen.add(id(found))
            weight = found.weight
        if weight.name in weights:
            raise FormatError("two weights of this name", part.extent.path, weight.name)
        weights[weight.name] = weight
    return weights
