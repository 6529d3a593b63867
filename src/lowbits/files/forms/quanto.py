"""optimum-quanto's weights in files: its own state dicts, and what diffusers and transformers save.

``x.weight._data`` and ``x.weight._scale`` make an 8-bit weight; ``x.weight._data._data``,
``x.weight._scale`` and ``x.weight._shift`` one of 2 or 4 bits, whose shape the file does not say.
Source: ``QTensor.save_to_state_dict`` of optimum-quanto 0.2.7.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lowbits.backends.quanto import BYTE_SCHEMES, regrouped, stored_bits, stored_bytes
from lowbits.core.backend import Packed
from lowbits.files.forms.found import Checkpoint, Found, Listed, refusal, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lowbits.files.weights import StoredTensor, Weight

_BIT_SCHEMES: Final = ("quanto-int4", "quanto-int2")
_BITS: Final = "._data._data"
_BYTES: Final = "._data"
#: Scales of activations, beside each weight whether these are quantized or not.
_ACTIVATIONS: Final = ("input_scale", "output_scale")


def find(checkpoint: Checkpoint) -> Iterator[Found]:
    """Yield the weights that quanto stored."""
    for name, codes in checkpoint.tensors.items():
        if name.endswith(_BITS):
            yield _bits(checkpoint, name.removesuffix(_BITS), codes)
        elif name.endswith(_BYTES) and f"{name.removesuffix(_BYTES)}._scale" in checkpoint.tensors:
            yield _bytes(checkpoint, name.removesuffix(_BYTES), codes)


def fitted(
    weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Weight]:
    """Return weights whose shape the file does not say in those that a module's have."""
    return {
        name: _fitted(weight, tuple(shapes[name]))
        if weight.scheme in _BIT_SCHEMES and name in shapes
        else weight
        for name, weight in weights.items()
    }


def _fitted(weight: Weight, shape: tuple[int, ...]) -> Weight:
    if weight.shape == shape or math.prod(weight.shape) != math.prod(shape):
        return weight

    def read() -> Packed:
        packed = weight.read()
        assert isinstance(packed, Packed)
        return regrouped(packed, (shape[0], math.prod(shape[1:])))

    return replace(weight, shape=shape, read=read)


def _bytes(checkpoint: Checkpoint, name: str, codes: StoredTensor) -> Found:
    rows, _ = rows_of(codes)
    scale = checkpoint.tensors[f"{name}._scale"]
    scheme, others = BYTE_SCHEMES.get(codes.dtype), _activations(checkpoint, name)
    if scheme is None:
        listed = Listed(name, codes.shape, scale.dtype, f"quanto:{codes.dtype}")
        message = f"quanto's codes of {codes.dtype} are of no scheme"
        return checkpoint.refused(listed, (codes.name, scale.name, *others), message)
    if math.prod(scale.shape) not in (1, rows) or not scale.dtype.is_floating_point:
        raise refusal(scale, f"{scale.dtype} of shape {scale.shape} for {rows} rows")
    listed = Listed(name, codes.shape, scale.dtype, scheme)
    return checkpoint.found(listed, {"codes": codes, "scale": scale}, _make_bytes, others)


def _make_bytes(tensors: Mapping[str, Tensor]) -> Packed:
    return stored_bytes(tensors["codes"], tensors["scale"])


def _bits(checkpoint: Checkpoint, name: str, codes: StoredTensor) -> Found:
    packed_rows, group_size = rows_of(codes)
    scale = checkpoint.need(f"{name}._scale", codes)
    shift = checkpoint.need(f"{name}._shift", codes)
    groups = math.prod(scale.shape)
    if groups != math.prod(shift.shape) or not scale.dtype.is_floating_point:
        raise refusal(scale, f"{scale.dtype} of shape {scale.shape}, shifts of {shift.shape}")
    bits = _width(checkpoint, packed_rows, groups, codes)
    shape = _shape(checkpoint, name, groups, group_size)

    def make(tensors: Mapping[str, Tensor]) -> Packed:
        packed = stored_bits(bits, tensors["codes"], tensors["scale"], tensors["shift"])
        return regrouped(packed, shape)

    weight = Listed(name, shape, scale.dtype, f"quanto-int{bits}")
    parts = {"codes": codes, "scale": scale, "shift": shift}
    return checkpoint.found(weight, parts, make, _activations(checkpoint, name))


def _width(checkpoint: Checkpoint, packed_rows: int, groups: int, codes: StoredTensor) -> int:
    """Return the bits of a code: as many as the groups fit in so many rows with."""
    fitting = [bits for bits in (4, 2) if packed_rows == -(-groups // (8 // bits))]
    said = checkpoint.quantization.get("weights_dtype", checkpoint.quantization.get("weights"))
    if len(fitting) > 1:
        fitting = [bits for bits in fitting if said == f"int{bits}"]
    if len(fitting) != 1:
        raise refusal(
            codes,
            f"{packed_rows} rows for {groups} groups: neither int4 nor int2 (config: {said!r})",
        )
    return fitting[0]


def _shape(checkpoint: Checkpoint, name: str, groups: int, group_size: int) -> tuple[int, int]:
    """Return a weight's shape: the bias has its rows; without one, each group counts as a row."""
    bias = checkpoint.tensors.get(f"{name.removesuffix('weight')}bias")
    rows = bias.shape[0] if bias and len(bias.shape) == 1 else 0
    if not rows or groups % rows:
        return groups, group_size
    return rows, groups // rows * group_size


def _activations(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    module = name.removesuffix("weight")
    return checkpoint.present(f"{module}{scale}" for scale in _ACTIVATIONS)
