"""What a diffusers pipeline is made of, and which of it is worth packing.

The only file that knows diffusers' pipelines (`keymaps` knows its converters). It never imports it:
an object can only be a pipeline where somebody else did.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, final

from torch import nn

from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from lowbits.streaming.engine import Engine

#: Names that diffusers' pipelines give to what runs at every step.
_DENOISERS: Final = ("transformer", "unet", "prior", "decoder", "controlnet", "dit")
#: What pipelines that are made of several put before the names of each one's components.
_PARTS: Final = ("prior_", "decoder_")

#: What quantizers of diffusers and transformers set on the models that they load.
_QUANTIZER_FLAGS: Final = (
    *("hf_quantizer", "is_quantized", "quantization_method"),
    *("is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable"),
)
#: What they leave in a model's config.
QUANTIZER_ENTRIES: Final = ("quantization_config", "_pre_quantization_dtype", "_is_quantized")


def is_pipeline(target: Any) -> bool:
    """Say whether an object is a diffusers pipeline, modular or not."""
    diffusers = sys.modules.get("diffusers")
    is_classic = diffusers is not None and isinstance(target, diffusers.DiffusionPipeline)
    return is_classic or is_modular(target)


def is_modular(target: Any) -> bool:
    """Say whether an object is a modular pipeline of diffusers."""
    home = sys.modules.get("diffusers.modular_pipelines.modular_pipeline")
    return home is not None and isinstance(target, home.ModularPipeline)


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """Return a pipeline's modules by name; None and what is no module are not in it."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoisers_of(components: Iterable[str]) -> list[str]:
    """Return which components, by name, run at every step."""
    return [name for name in components if _is_denoiser(name)]


def _is_denoiser(name: str) -> bool:
    return _own_name(name).startswith(_DENOISERS)


def _own_name(name: str) -> str:
    """Return a component's name in that part of a combined pipeline which it belongs to."""
    for part in _PARTS:
        name = name.removeprefix(part)
    return name


def default_reasons(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return why components are left alone by default; those that are packed are not in it.

    Packed: what runs at every step, and text encoders but CLIP. The denoiser is nearly all of the
    time and bytes; T5, Gemma, Llama, ... are most of the rest. CLIP and the VAE are small, and
    pictures are sensitive to both.
    """
    found = {name: default_reason(name, type(part).__name__) for name, part in components.items()}
    return {name: reason for name, reason in found.items() if reason}


def default_reason(name: str, class_name: str) -> str:
    """Return why a component is left alone by default; empty for what is packed."""
    if _is_denoiser(name):
        return ""
    name = _own_name(name)
    if name.startswith("text_encoder"):
        is_clip = "CLIP" in class_name
        return "CLIP text encoder: small and sensitive; name it to pack it" if is_clip else ""
    if name.startswith("vae") or "Autoencoder" in class_name:
        return "VAE: small and sensitive; name it to pack it"
    return f"{class_name}: not packed by default; name it to pack it"


def kept_in_fp32(module: nn.Module) -> tuple[str, ...]:
    """Return the names of modules that a model of diffusers or transformers keeps in float32."""
    lists = (
        getattr(part, attribute, None)
        for part in module.modules()
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    )
    return tuple({name: None for names in lists for name in names or ()})


def forget_quantizer(module: nn.Module) -> None:
    """Let a model forget the quantizer of diffusers or transformers that loaded it.

    Its flags make ``.to(dtype)`` and others refuse, or act as for layers that are not there any
    more.
    """
    for part in module.modules():
        for name in _QUANTIZER_FLAGS:
            part.__dict__.pop(name, None)
        frozen = part.__dict__.get("_internal_dict")  # diffusers' config: it refuses deletions
        if frozen is not None:
            kept = {key: frozen[key] for key in frozen if key not in QUANTIZER_ENTRIES}
            part.__dict__["_internal_dict"] = type(frozen)(kept)
        config = part.__dict__.get("config")
        entries = vars(config) if hasattr(config, "__dict__") else {}
        for name in QUANTIZER_ENTRIES:
            entries.pop(name, None)


def announce_device(module: nn.Module, engine: Engine) -> Callable[[], None]:
    """Let a pipeline find the device that a streamed component computes on.

    Diffusers asks the ``_hf_hook`` of each component, as it does where accelerate moves weights,
    and tells it when ``encode`` or ``decode`` is called in place of the model itself.

    Returns:
        What takes it back.
    """
    announcement = _Announcement(engine)
    module.__dict__["_hf_hook"] = announcement

    def take_back() -> None:
        if module.__dict__.get("_hf_hook") is announcement:
            del module.__dict__["_hf_hook"]

    return take_back


@final
class _Announcement:
    """Answers diffusers; copies and pickles of the model have one that answers nothing."""

    #: Tells the streamer that this hook moves nothing.
    is_lowbits = True

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = engine

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Refuse to be joined with a hook of accelerate's that moves weights."""
        raise PatchError(
            f"this {type(module).__name__} is streamed: accelerate cannot move its weights too. "
            "Undo the streaming (lowbits.restore), or change it (handle.reconfigure)"
        )

    @property
    def execution_device(self) -> torch.device | None:
        """The device that the model computes on."""
        return self._engine.device if self._engine else None

    def pre_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the model to the device."""
        if self._engine:
            self._engine.enter()
        return args, kwargs

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Change nothing: ``remove_all_hooks`` does not end the streaming."""
        return module

    def __reduce__(self) -> tuple[type[_Announcement], tuple[()]]:
        return _Announcement, ()
