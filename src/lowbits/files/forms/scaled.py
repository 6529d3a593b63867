"""Float8 and int8 weights with one scale, or one for each row, or none.

Plain casts to float8; ComfyUI's "scaled fp8" (``scaled_fp8``, ``scale_weight``); its newer layout
(``weight_scale``, with a description of each layer in ``comfy_quant`` or in the file's metadata);
and what else has ``weight_scale``, to multiply by. Source: ``QUANTIZATION.md`` and
``convert_old_quants`` of ComfyUI, read for the format.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from lowbits.backends import float8, torchao
from lowbits.files.forms.found import (
    Checkpoint,
    Found,
    Listed,
    parsed,
    read_json,
    refusal,
    rows_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lowbits.core.backend import Packed
    from lowbits.files.weights import StoredTensor

_METADATA: Final = "_quantization_metadata"
_MARKER: Final = "scaled_fp8"
_DESCRIPTION: Final = ".comfy_quant"
#: In front of a diffusion model's names in ComfyUI's checkpoints; some metadata goes without it.
_PREFIX: Final = "model.diffusion_model."
_FLOAT8: Final = {f"float8_{name}": dtype for name, dtype in float8.FORMATS.items()}
_INT8: Final = "int8_tensorwise"
_SCALES: Final = ("scale_weight", "weight_scale")
#: What belongs to a layer beside its weight and scale, and changes nothing of the weight.
_UNREAD: Final = ("scale_input", "input_scale", "comfy_quant")
#: What changes it, or the activations that it is for.
_BLOCKS: Final = "weight_scale_inv"
_ALTERING: Final = ("weight_scale_2", "pre_quant_scale", "weight_zero_point", _BLOCKS)


def find(checkpoint: Checkpoint) -> Iterator[Found]:
    """Yield the weights that are float8, or int8 with a scale."""
    formats = _formats(checkpoint)
    for name, part in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        described = formats.get(module) if module != name else None
        if name.rpartition(".")[2] == _MARKER:
            yield Found(None, (name,))
        elif described is not None:
            yield _described(checkpoint, module, part, described)
        elif (
            part.dtype in _FLOAT8.values()
            and len(part.shape) > 1
            and not _is_scale(checkpoint, name)
        ):
            yield _weight(checkpoint, module, part, part.dtype)
        elif part.dtype == torch.int8 and _scale(checkpoint, module) and name != module:
            yield _weight(checkpoint, module, part, torch.int8)


def _is_scale(checkpoint: Checkpoint, name: str) -> bool:
    """Say whether a tensor belongs to a weight beside it: nvfp4 has scales in float8."""
    module, _, last = name.rpartition(".")
    return last in (*_SCALES, *_ALTERING, *_UNREAD) and f"{module}.weight" in checkpoint.tensors


def unclaimed(checkpoint: Checkpoint) -> None:
    """Raise `FormatError` where a scale is left, whose weight would be read without it."""
    for name, part in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "scale_weight" or name.endswith(_DESCRIPTION):
            raise refusal(part, f"{module}.weight is missing, or neither float8 nor int8")


def _formats(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return what ComfyUI's descriptions say of each layer."""
    formats: dict[str, Mapping[str, Any]] = {
        name.removesuffix(_DESCRIPTION): read_json(part)
        for name, part in checkpoint.tensors.items()
        if name.endswith(_DESCRIPTION)
    }
    if _METADATA in checkpoint.metadata and checkpoint.tensors:
        first = next(iter(checkpoint.tensors.values()))
        layers = parsed(checkpoint.metadata[_METADATA], first, _METADATA).get("layers")
        for layer, value in layers.items() if isinstance(layers, dict) else ():
            is_bare = f"{layer}.weight" not in checkpoint.tensors
            described = value if isinstance(value, dict) else {"format": value}
            formats.setdefault(_PREFIX + layer if is_bare else layer, described)
    return formats


def _described(
    checkpoint: Checkpoint, module: str, part: StoredTensor, described: Mapping[str, Any]
) -> Found:
    kind, params = described.get("format"), described.get("params")
    options = {**params, **described} if isinstance(params, dict) else described
    if kind == _INT8 and not options.get("convrot") and part.dtype == torch.int8:
        return _weight(checkpoint, module, part, torch.int8)
    dtype = _FLOAT8.get(kind) if isinstance(kind, str) else None
    if dtype is not None and part.dtype in (dtype, torch.uint8):
        return _weight(checkpoint, module, part, dtype)
    label = f"{kind} (convrot)" if options.get("convrot") else str(kind)
    message = f"ComfyUI's format {label} in {part.dtype} is of no scheme"
    return _refused(checkpoint, module, part, f"comfy:{label}", message)


def _weight(checkpoint: Checkpoint, module: str, part: StoredTensor, dtype: torch.dtype) -> Found:
    rows, _ = rows_of(part)
    scale = _scale(checkpoint, module)
    altering = _companions(checkpoint, module, _ALTERING)
    named = [checkpoint.tensors[name] for name in altering]
    if scale and not _is_by_row(scale, rows):
        named.append(scale)
    if named:
        shown = ", ".join(f"{tensor.name} {tensor.dtype} {tensor.shape}" for tensor in named)
        is_blocks = bool(altering) and altering[0].endswith(_BLOCKS)
        label = "scaled:blocks" if is_blocks else "scaled:unknown"
        message = f"weights of {part.dtype} with {shown} are of no scheme"
        return _refused(checkpoint, module, part, label, message)
    if scale is None and (part.dtype != dtype or dtype == torch.int8):
        raise refusal(part, f"its scale is missing: {module}.weight_scale")
    parts = {"codes": part} if scale is None else {"codes": part, "scale": scale}

    def make(tensors: Mapping[str, Tensor]) -> Packed:
        codes = tensors["codes"].view(dtype)
        if dtype != torch.int8:
            return float8.stored(codes, tensors.get("scale"))
        flat = codes.view(rows, -1)
        held = {"qdata": flat, "scale": tensors["scale"]}
        return torchao.stored("Int8Tensor", flat.shape, held, is_dynamic=False)

    weight = Listed(part.name, part.shape, None, _scheme(dtype, scale))
    return checkpoint.found(weight, parts, make, _companions(checkpoint, module, _UNREAD))


def _scheme(dtype: torch.dtype, scale: StoredTensor | None) -> str:
    if dtype == torch.int8:
        return "torchao-int8"
    name = str(dtype).removeprefix("torch.float8_")
    return f"float8-{name}" if scale else f"float8-{name}-raw"


def _refused(
    checkpoint: Checkpoint, module: str, part: StoredTensor, label: str, message: str
) -> Found:
    parts = [n for n in checkpoint.tensors if n.startswith(f"{module}.weight_")]
    named = _companions(checkpoint, module, (*_SCALES, *_UNREAD, *_ALTERING))
    weight = Listed(part.name, part.shape, None, label)
    return checkpoint.refused(weight, list(dict.fromkeys((part.name, *parts, *named))), message)


def _scale(checkpoint: Checkpoint, module: str) -> StoredTensor | None:
    names = _companions(checkpoint, module, _SCALES)
    return checkpoint.tensors[names[0]] if names else None


def _companions(checkpoint: Checkpoint, module: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return checkpoint.present(f"{module}.{name}" for name in names)


def _is_by_row(scale: StoredTensor, rows: int) -> bool:
    count = math.prod(scale.shape)
    is_column = len(scale.shape) < 2 or scale.shape[-1] == 1
    return scale.dtype.is_floating_point and count in (1, rows) and is_column
