"""How a model is written as a GGUF file: the type of each tensor, its shape, the metadata.

Rules follow ComfyUI-GGUF's convert.py and lcpp.patch, where a target does not need others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias, final

import torch

from lowbits.backends.gguf.mixes import MIXES, Mix, MixRule
from lowbits.backends.gguf.quantize import QUANTIZERS
from lowbits.backends.gguf.types import TYPES
from lowbits.errors import ConfigError, suggestion
from lowbits.files.gguf_architectures import ARCHITECTURES, Architecture, architecture

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

#: An entry of the metadata: key, type (``str``, ``u32``, ``i32``) and value; a tuple is an array.
Entry: TypeAlias = tuple[str, str, str | int | tuple[int, ...]]

#: Who a file is written for: ComfyUI-GGUF, stable-diffusion.cpp, diffusers' ``from_single_file``.
TARGETS: Final = ("comfy", "sdcpp", "diffusers")

#: The largest number that float16 holds: of unquantized values, and of the scales in blocks.
_MAX_F16: Final = 65504.0
#: Tensors of no more values stay in float32.
_SMALL: Final = 1024
#: Bytes of a tensor's name: 128 in patched ggml, with the zero at its end.
_MAX_NAME: Final = 127
#: Dimensions of a tensor that ggml computes with.
_MAX_DIMS: Final = 4
#: Rows that ComfyUI-GGUF's reshaped tensors have, and the fewest values it reshapes.
_RESHAPED_ROW: Final = 256
_RESHAPED_MIN: Final = 512

_WEIGHT: Final = ".weight"
_EMBEDDING: Final = re.compile(
    r"(^|\.)(token_embd|position_embd|embed_tokens|shared|wte|wpe|\w*embedding(_table)?"
    r"|relative_attention_bias|attn_rel_b)\.weight$"
)

_CLASSIC: Final = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
#: What a reader decodes, where that is not all of ggml's types. diffusers 0.42.1:
#: ``SUPPORTED_GGUF_QUANT_TYPES``; ComfyUI-GGUF: what gguf 0.19.0 dequantizes.
_READABLE: Final = {
    "diffusers": frozenset(("F32", "F16", "BF16", "IQ4_NL", "IQ4_XS", *_CLASSIC)),
    "comfy": frozenset(("F32", *TYPES)) - {"Q1_0", "Q2_0"},
    "sdcpp": frozenset(("F32", *TYPES)),
}

#: ``general.file_type``: llama.cpp's ``llama_ftype``. A type that it has as a mix only is that mix
#: with the fewest layers of other types; one that it does not have at all is not here.
FILE_TYPES: Final = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K": 14,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K": 16,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4": 38,
    "NVFP4": 39,
    "Q1_0": 40,
}


@final
@dataclass(frozen=True)
class TensorPlan:
    """How a tensor is written.

    Attributes:
        name: in the file.
        shape: of the tensor, torch's order.
        stored_shape: that it has in the file, torch's order; of as many values.
        type_name: ggml's name of its type; None where `settled` chooses one by its values.
        reason: why it is not of the type asked for, or which mix chose; else empty.
        is_weight: whether it is the weight of a layer, not a bare Parameter.
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    type_name: str | None
    reason: str = ""
    is_weight: bool = True


def plan_types(
    names_shapes: Mapping[str, tuple[int, ...]],
    type_or_mix: str,
    arch: str | None,
    target: str,
    *,
    linear: Collection[str] | None = None,
) -> list[TensorPlan]:
    """Choose the type of each tensor of a file.

    Args:
        names_shapes: names, of the reference model or of diffusers, and shapes, torch's order, in
            the file's order.
        type_or_mix: ggml's name of a type that lowbits can make, e.g. ``"Q4_K"``, or of a mix.
        arch: the value of ``general.architecture``; None: none is written, and nothing is kept in
            high precision for its name.
        target: one of :data:`TARGETS`.
        linear: names of the weights of Linear layers, where that is known; None: weights of two
            dimensions that are not called embeddings.

    Raises:
        ConfigError: an unknown target, type or architecture, a type that the target does not read,
            no architecture for a target that needs one, or a name that readers do not take.
    """
    _check_target(target, arch)
    for name in names_shapes:
        _check_name(name)
    mix = _mix_of(type_or_mix, target)
    planner = _Planner(
        type_or_mix.upper(), mix, architecture(arch) if arch else None, target, linear
    )
    return [planner(name, tuple(shape)) for name, shape in names_shapes.items()]


def high_precision_type(
    source_dtype: torch.dtype, max_abs: float, ndim: int, target: str, *, is_weight: bool = True
) -> str:
    """Return the type of a tensor that is not quantized.

    Args:
        source_dtype: of its values.
        max_abs: the largest magnitude among them; infinity and NaN are kept as they are.
        ndim: dimensions of the tensor as a module holds it.
        target: one of :data:`TARGETS`.
        is_weight: whether it is the weight of a layer, not a bare Parameter.

    Returns:
        ``"BF16"`` for matrices that are in bfloat16, where the target takes them; else ``"F16"``,
        unless values are too large for it or it is not a tensor of 2 to 4 dimensions: ``"F32"``.
    """
    if ndim < 2 or ndim > _MAX_DIMS:
        return "F32"
    # Readers take bytes in bfloat16 for the weights of Linear layers only: what else is in it loads
    # as twice as many bytes, or not at all. diffusers does not tell a Linear from an Embedding.
    if source_dtype == torch.bfloat16 and ndim == 2 and is_weight and target != "diffusers":
        return "BF16"
    return "F16" if max_abs <= _MAX_F16 else "F32"


def settled(plan: TensorPlan, source_dtype: torch.dtype, max_abs: float, target: str) -> TensorPlan:
    """Return the plan with a type that holds the tensor's values.

    Args:
        plan: of the tensor.
        source_dtype: of its values.
        max_abs: the largest magnitude among them.
        target: one of :data:`TARGETS`.

    Returns:
        The plan; with a type of high precision where it had none, or where float16, which blocks
        have their scales in, may not hold the values.
    """
    fits = max_abs <= _MAX_F16 or plan.type_name in ("F32", "BF16")
    if plan.type_name and fits:
        return plan
    ndim = len(plan.shape)
    name = high_precision_type(source_dtype, max_abs, ndim, target, is_weight=plan.is_weight)
    if not plan.type_name:
        return replace(plan, type_name=name)
    reason = f"instead of {plan.type_name}: values up to {max_abs:g} do not fit in float16"
    return replace(plan, type_name=name, reason=_joined(plan.reason, reason))


def metadata_for(arch: str | None, type_or_mix: str) -> list[Entry]:
    """Return the metadata of a file, as (key, type, value).

    Args:
        arch: as for `plan_types`.
        type_or_mix: as for `plan_types`.
    """
    entries: list[Entry] = []
    if arch is not None:
        entries.append(("general.architecture", "str", architecture(arch).name))
    entries.append(("general.quantization_version", "u32", 2))
    file_type = FILE_TYPES.get(type_or_mix.upper())
    if file_type is not None:
        entries.append(("general.file_type", "u32", file_type))
    return entries


def shapes_metadata(plans: Iterable[TensorPlan]) -> list[Entry]:
    """Return the metadata from which ComfyUI-GGUF gives reshaped tensors their shapes back."""
    return [
        (f"comfy.gguf.orig_shape.{plan.name}", "i32", plan.shape)
        for plan in plans
        if plan.stored_shape != plan.shape and len(plan.shape) > 1
    ]


def check_metadata(entries: Iterable[Entry], plans: Iterable[TensorPlan], target: str) -> None:
    """Refuse metadata with which a target does not open the file.

    Raises:
        ConfigError: an array beside a tensor of five dimensions, for stable-diffusion.cpp: its
            reader of such files does not know arrays.
    """
    array = next((key for key, _, value in entries if isinstance(value, tuple)), None)
    wide = next((plan.name for plan in plans if len(plan.stored_shape) > _MAX_DIMS), None)
    if target == "sdcpp" and array and wide:
        raise ConfigError(
            f"metadata: stable-diffusion.cpp does not open files that hold an array ({array}) "
            f"and a tensor of more than {_MAX_DIMS} dimensions ({wide}): leave the array out"
        )


class _Planner:
    """Plans the tensors of one file, in its order."""

    def __init__(
        self,
        asked: str,
        mix: Mix,
        arch: Architecture | None,
        target: str,
        linear: Collection[str] | None,
    ) -> None:
        self._asked, self._mix, self._target = asked, mix, target
        self._arch, self._linear = arch or Architecture(""), linear
        self._taken: Counter[MixRule] = Counter()
        self._note = _unknown(arch)

    def __call__(self, name: str, shape: tuple[int, ...]) -> TensorPlan:
        plan = TensorPlan(name, shape, self._stored_shape(shape), None)
        plan = replace(plan, is_weight=name.endswith(_WEIGHT))
        reason = self._float32_reason(plan)
        if reason or self._mix.type_name == "F32":
            return replace(plan, type_name="F32", reason=reason)
        reason = self._kept_reason(plan)
        return replace(plan, reason=reason) if reason else self._quantized(plan)

    def _stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file: of tensors without dimensions, one."""
        size = math.prod(shape)
        is_reshaped = self._arch.is_reshaped and self._target == "comfy" and len(shape) > 1
        if not is_reshaped or size < _RESHAPED_MIN or size % _RESHAPED_ROW:
            return shape or (1,)
        return shape if shape[-1] % _RESHAPED_ROW == 0 else (size // _RESHAPED_ROW, _RESHAPED_ROW)

    def _float32_reason(self, plan: TensorPlan) -> str:
        size, ndim = math.prod(plan.shape), len(plan.shape)
        if ndim < 2:
            return "vector"
        if ndim > _MAX_DIMS:
            return f"{ndim} dimensions"
        if size <= _SMALL:
            return f"tiny: {size} weights"
        part = self._arch.needs_float32(plan.name)
        return f"{self._arch.name} keeps {part} in float32" if part else ""

    def _kept_reason(self, plan: TensorPlan) -> str:
        """Say why a tensor is in high precision whatever is asked for."""
        part = self._arch.keeps(plan.name)
        if part:
            return f"{self._arch.name} keeps {part} in high precision"
        if not plan.is_weight:
            return "not the weight of a layer"
        if len(plan.stored_shape) != 2:
            return f"not a matrix: {len(plan.stored_shape)} dimensions"
        is_reshaped = plan.stored_shape != plan.shape
        if self._linear is not None and plan.name not in self._linear and not is_reshaped:
            return "not the weight of a Linear layer"
        if self._linear is None and self._target != "comfy" and _EMBEDDING.search(plan.name):
            return f"embedding: {self._target} takes it unquantized"
        return ""

    def _quantized(self, plan: TensorPlan) -> TensorPlan:
        asked, row = self._of_mix(plan.name.removesuffix(_WEIGHT)), plan.stored_shape[-1]
        tried = list(_with_fallbacks(asked))
        fits = next((n for n in tried if row % TYPES[n].weights == 0), None)
        refused = tried[: tried.index(fits)] if fits else tried
        blocks = " or ".join(f"{TYPES[n].weights} ({n})" for n in refused)
        chosen = f"{self._asked}: {asked}" if asked != self._mix.type_name else ""
        broken = f"rows of {row} are not whole blocks of {blocks}" if blocks else ""
        return replace(plan, type_name=fits, reason=_joined(chosen, broken, self._note))

    def _of_mix(self, dotted: str) -> str:
        rules = (rule for rule in self._mix.rules if re.search(rule.pattern, dotted))
        rule = next((rule for rule in rules if self._taken[rule] != rule.first), None)
        if rule is None:
            return self._mix.type_name
        self._taken[rule] += 1
        return rule.type_name


def _with_fallbacks(type_name: str) -> Iterator[str]:
    """Yield a type, and those that take its place where its blocks do not divide a row."""
    name: str | None = type_name
    while name:
        yield name
        name = TYPES[name].fallback


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def _unknown(arch: Architecture | None) -> str:
    if arch is None:
        return "no architecture: nothing is kept in high precision for its name"
    if arch.name in ARCHITECTURES:
        return ""
    return f"unknown architecture {arch.name}: nothing is kept in high precision for its name"


def _mix_of(type_or_mix: str, target: str) -> Mix:
    name = type_or_mix.upper()
    known = ("F32", *QUANTIZERS, *MIXES)
    if name not in known:
        fate = "can be decoded only" if name in TYPES else "is unknown" + suggestion(name, known)
        raise ConfigError(f"type: {type_or_mix!r} {fate}; lowbits makes {', '.join(known)}")
    mix = MIXES.get(name, Mix(name))
    for used in {mix.type_name, *(rule.type_name for rule in mix.rules)} - _READABLE[target]:
        readable = ", ".join(n for n in known if n in _READABLE[target])
        raise ConfigError(f"type: {target} does not read {used}; it reads {readable}")
    return mix


def _check_target(target: str, arch: str | None) -> None:
    if target not in TARGETS:
        hint = suggestion(target, TARGETS)
        raise ConfigError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}{hint}")
    if target == "comfy" and arch is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"arch: ComfyUI-GGUF needs an architecture; known: {known}")


def _check_name(name: str) -> None:
    size = len(name.encode())
    if not 0 < size <= _MAX_NAME:
        raise ConfigError(
            f"the tensor name {name!r} has {size} bytes; GGUF readers take 1 to {_MAX_NAME}"
        )
