"""Tensors of a checkpoint as rows of a model's tensors, and the other way round.

Weights may be packed, so nothing but rows of dim 0 is split and joined. What goes where is not
written here: it is read off the converter that diffusers' ``from_single_file`` would use
(``diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES``, huggingface/diffusers).

diffusers is imported while a map of one of its models is made, never before.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from lowbits.errors import ConfigError, FormatError
from lowbits.files.rows import KeyMap, Segment
from lowbits.integrations.architectures import prefixes_of, recognized
from lowbits.integrations.encoder_names import llama_cpp_map
from lowbits.integrations.module_tensors import tensors_of
from lowbits.integrations.reference_names import reference_namer
from lowbits.integrations.row_tracing import (
    Trace,
    backward,
    forward,
    require_same_tensor,
    rows_in,
    trace,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from lowbits.integrations.architectures import Architecture
    from lowbits.integrations.module_tensors import ModuleTensors
    from lowbits.integrations.row_tracing import Shape, Shapes

    _Converter = Callable[..., Mapping[str, Any]]

#: What a converter wants in front of all names; others want nothing there.
_PREFIXES: Final[Mapping[str, str]] = {
    "UNet2DConditionModel": "model.diffusion_model.",
    "CosmosTransformer3DModel": "net.",
    "AutoencoderKLLTXVideo": "vae.",
}

#: Tensors that a converter splits at rows written into it, and how many it takes them to have.
_FIXED_ROWS: Final[Mapping[str, tuple[re.Pattern[str], int]]] = {
    "FluxTransformer2DModel": (re.compile(r"single_blocks\.\d+\.linear1\."), 7 * 3072),
    "ChromaTransformer2DModel": (re.compile(r"single_blocks\.\d+\.linear1\."), 7 * 3072),
    "HunyuanVideoTransformer3DModel": (re.compile(r"single_blocks\.\d+\.linear1\."), 7 * 3072),
    "Lumina2Transformer2DModel": (re.compile(r".+\.attention\.qkv\."), 2304 + 2 * 768),
}

#: Architectures that a model of a class may be; of others, whatever a converter makes.
_ARCHITECTURES: Final[Mapping[str, tuple[str, ...]]] = {
    "UNet2DConditionModel": ("sd1", "sdxl"),
    "FluxTransformer2DModel": ("flux",),
    "ChromaTransformer2DModel": ("flux",),
    "Flux2Transformer2DModel": ("flux",),
    "SD3Transformer2DModel": ("sd3",),
    "AuraFlowTransformer2DModel": ("aura",),
    "HiDreamImageTransformer2DModel": ("hidream",),
    "CosmosTransformer3DModel": ("cosmos",),
    "LTXVideoTransformer3DModel": ("ltxv",),
    "HunyuanVideoTransformer3DModel": ("hyvid",),
    "WanTransformer3DModel": ("wan",),
    "WanVACETransformer3DModel": ("wan",),
    "Lumina2Transformer2DModel": ("lumina2",),
    "ZImageTransformer2DModel": ("lumina2",),
    "QwenImageTransformer2DModel": ("qwen_image",),
    "AutoencoderKL": ("vae",),
    "AutoencoderKLWan": ("wan_vae",),
}

#: What checkpoints hold besides weights, weights that only other models of a kind read, those of
#: IP-Adapters, which are loaded by themselves, and what diffusers fuses, which keeps the weights
#: that it is made of: no model is made with them.
_NOT_READ: Final = re.compile(
    r"(.*\.)?(position_ids|logit_scale|scaled_fp8|spiece_model|__index_timestep_zero__|_extra_state)"
    r"|.*\.to_(added_)?q?kv\.(weight|bias)"
    r"|.*\.processor\..*|encoder_hid_proj\.image_projection_layers\..*"
    r"|text_projection\.weight|lm_head\.weight|output\.weight|rope_freqs\.weight"
)

#: How many more tensors than the model a checkpoint may hold: refused before anything is traced.
_TIMES_MORE, _MORE = 2, 64


def map_for(module: nn.Module, shapes: Shapes, arch: str | None = None) -> KeyMap:
    """Return the tensors of a module as rows of those of a checkpoint.

    The names may be the module's own, those of the reference, or llama.cpp's, with or without a
    prefix, alone or among other models of the same file.

    Args:
        module: of diffusers, transformers or any other; on the meta device too.
        shapes: of the checkpoint's tensors, by name, as a module would hold them; leading dims of
            one element may be absent.
        arch: ``general.architecture`` of a GGUF file, where there is one.

    Returns:
        By the module's names; a tensor that has several is in it under the first.

    Raises:
        FormatError: nothing in the checkpoint is this module: tensors are missing, are too many,
            or have other shapes.
    """
    own = tensors_of(module)
    parts = {
        prefix: {
            name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)
        }
        for prefix in prefixes_of(shapes)
    }
    same = {prefix: part for prefix, part in parts.items() if own.are_in(part)}
    fitting = (prefix for prefix, part in same.items() if own.fit(part))
    prefix = next(fitting, next(iter(same), None))
    found = None
    if prefix is None:
        prefix, found = _recognized(module, parts, arch)
    part = parts[prefix]
    if prefix in same or (found is not None and found.naming == "library"):
        keymap = _same_names(module, own, part)
    elif found is not None and found.part == "text_encoder":
        keymap = _text_encoder(module, own, part, found)
    else:
        keymap = to_diffusers(part, module)
    return {
        name: tuple(replace(segment, source=prefix + segment.source) for segment in segments)
        for name, segments in keymap.items()
    }


def classes_of(architecture: str) -> tuple[str, ...]:
    """Return diffusers' classes of models of an architecture."""
    return tuple(name for name, known in _ARCHITECTURES.items() if architecture in known)


def to_diffusers(shapes: Shapes, module: nn.Module) -> KeyMap:
    """Return the tensors of a diffusers model as rows of those of a reference checkpoint.

    Args:
        shapes: of the checkpoint's tensors, by names without a prefix.
        module: the model, or one like it on the meta device.

    Raises:
        FormatError: tensors are missing, too many, or of other shapes, or diffusers has no
            converter for this model.
    """
    own = tensors_of(module)
    most = _TIMES_MORE * len(own.shapes) + _MORE
    if len(shapes) > most:
        raise FormatError(
            f"holds {len(shapes)} tensors, where a {type(module).__name__} has {len(own.shapes)}"
        )
    return forward(_trace(module, own, shapes), own.shapes, shapes)


def to_reference(module: nn.Module) -> KeyMap:
    """Return the tensors of a reference checkpoint as rows of those of a diffusers model.

    It is the way back of `to_diffusers`, and found by it: of tensors with the reference's names
    the converter must make exactly this model.

    Args:
        module: the model; packed weights count as what they are of.

    Raises:
        ConfigError: the reference's names are not known for this model, or its shapes are not
            those of a reference model.
    """
    own = tensors_of(module)
    names: dict[str, Shape] = {}
    try:
        class_name, _ = _converter_of(module)
        name_of = reference_namer(class_name, own.shapes, module.config)
        for name, shape in own.shapes.items():
            names.setdefault(name_of(name), shape)
        inverse = backward(_trace(module, own, names), own.shapes)
    except FormatError as err:
        raise ConfigError(
            f"this {type(module).__name__} has no form with the reference's names: {err}. Save it "
            "with diffusers' names"
        ) from err
    return {name: inverse[name] for name in names}


def _trace(module: nn.Module, own: ModuleTensors, shapes: Shapes) -> Trace:
    """Return how a model is made of tensors of a reference checkpoint, all of them."""
    class_name, converter = _converter_of(module)
    prefix = _PREFIXES.get(class_name, "")
    pattern, rows = _FIXED_ROWS.get(class_name, (None, 0))

    def convert(state_dict: dict[str, Tensor]) -> Mapping[str, Any]:
        for name in list(state_dict) if prefix else ():
            state_dict[prefix + name] = state_dict.pop(name)
        return converter(config=module.config, checkpoint=state_dict)

    def fixed_rows(name: str) -> int | None:
        return rows if pattern is not None and pattern.match(name) else None

    traced = trace(convert, shapes, fixed_rows)
    _require_all(module, own, traced.targets)
    others = [name for name in traced.targets if name not in own.shapes]
    _refuse_others(module, own, [*traced.left, *others])
    return Trace({name: traced.targets[name] for name in own.shapes}, ())


def _converter_of(module: nn.Module) -> tuple[str, _Converter]:
    """Return diffusers' converter for a model, with the name of the class that it is listed under.

    Raises:
        FormatError: there is none.
    """
    if _is_of(module, "diffusers"):
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        for cls in type(module).__mro__:
            if cls.__name__ in SINGLE_FILE_LOADABLE_CLASSES:
                entry = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]
                return cls.__name__, entry["checkpoint_mapping_fn"]
    raise FormatError(
        f"diffusers has no converter that makes a {type(module).__name__} of other names"
    )


def _is_of(module: nn.Module, package: str) -> bool:
    return any(cls.__module__.partition(".")[0] == package for cls in type(module).__mro__)


def _recognized(
    module: nn.Module, parts: Mapping[str, Shapes], arch: str | None
) -> tuple[str, Architecture | None]:
    """Return the prefix of what the module can be made of, and what that is.

    Where nothing is recognized, it is for diffusers' converter to say what it cannot use.

    Raises:
        FormatError: the checkpoint holds something else, or what nothing can be made of.
    """
    found = {prefix: recognized(part, arch) for prefix, part in parts.items()}
    known = {prefix: which for prefix, which in found.items() if which is not None}
    if _is_of(module, "diffusers"):
        class_name, _ = _converter_of(module)
        wanted = _ARCHITECTURES.get(class_name)
        for prefix, which in known.items():
            if which.name in wanted if wanted else which.part == "denoiser":
                return prefix, which
        if not known:
            return list(parts)[-1], None
    for prefix, which in known.items():
        if which.part == "text_encoder" and _is_of(module, "transformers"):
            return prefix, which
    own = tensors_of(module)
    nearest = max(parts.values(), key=lambda part: len(own.names_in(part)))
    if 2 * len(own.names_in(nearest)) >= len(own.shapes):
        _require_all(module, own, own.names_in(nearest))
    held = ", ".join(dict.fromkeys(which.name for which in known.values()))
    raise FormatError(
        f"holds {held or 'nothing that is recognized'}, no {type(module).__name__}; its names: "
        f"{', '.join(list(parts[''])[:4])}, ...; tried as the model's own, as a reference's and "
        f"as llama.cpp's, without a prefix{_listed(' and without', parts)}"
    )


def _listed(intro: str, prefixes: Iterable[str]) -> str:
    named = ", ".join(repr(prefix) for prefix in prefixes if prefix)
    return f"{intro} {named}" if named else ""


def _text_encoder(
    module: nn.Module, own: ModuleTensors, shapes: Shapes, found: Architecture
) -> KeyMap:
    if found.naming == "open_clip":
        raise FormatError(
            "has the names of OpenCLIP, whose text_projection is transposed: rows of it are not "
            f"rows of a {type(module).__name__}. Take a file with the names of transformers"
        )
    keymap = llama_cpp_map(own.shapes, shapes, module.config, found.name)
    used = {segment.source for segments in keymap.values() for segment in segments}
    _refuse_others(module, own, [name for name in shapes if name not in used])
    for name, segments in keymap.items():
        source = segments[0].source
        require_same_tensor(name, own.shapes[name], source, shapes[source])
    return keymap


def _same_names(module: nn.Module, own: ModuleTensors, shapes: Shapes) -> KeyMap:
    there = own.names_in(shapes)
    _require_all(module, own, there)
    _refuse_others(
        module, own, [name for name in shapes if name not in own.shapes and name not in own.aliases]
    )
    for name, source in there.items():
        require_same_tensor(name, own.shapes[name], source, shapes[source])
    return {name: (Segment(there[name], 0, rows_in(shapes[there[name]])),) for name in own.shapes}


def _require_all(module: nn.Module, own: ModuleTensors, there: Iterable[str]) -> None:
    missing = own.shapes.keys() - set(there)
    if missing:
        names = [name for name in own.shapes if name in missing]
        raise FormatError(
            f"lacks {len(names)} of the {len(own.shapes)} tensors of a {type(module).__name__}: "
            f"{', '.join(names[:4])}"
        )


def _refuse_others(module: nn.Module, own: ModuleTensors, names: Iterable[str]) -> None:
    """Refuse tensors that the model does not read; its class may say that some are no matter."""
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    others = [
        name
        for name in names
        if name not in own.aliases
        and not _NOT_READ.fullmatch(name)
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if others:
        raise FormatError(
            f"holds {len(others)} tensors that a {type(module).__name__} does not read: "
            f"{', '.join(others[:4])}"
        )
