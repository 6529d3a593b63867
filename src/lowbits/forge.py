"""Forge's menu: its strings as they stand in its interface, and what each does here."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final, final

from lowbits import _api
from lowbits.config import FP16_LORA, scheme_name
from lowbits.errors import ConfigError, suggestion
from lowbits.integrations.diffusers import components_of, denoisers_of, is_pipeline

if TYPE_CHECKING:
    from lowbits.core.handle import Handle

#: What Forge writes as MB: it divides a device's memory by 1024 * 1024.
_MB: Final = 1 << 20

_LOW_BITS: Final = tuple(
    name + suffix
    for name in ("Automatic", "bnb-nf4", "float8-e4m3fn", "bnb-fp4", "float8-e5m2")
    for suffix in ("", FP16_LORA)
)


#: Options of `lowbits.apply` that have another name here.
_NAMES: Final = {
    "scheme": "diffusion_in_low_bits",
    "swap": "swap_method",
    "location": "swap_location",
    "gpu_weights": "gpu_weights_mb",
    "never_oom": "never_oom_unet, never_oom_vae",
}


@final
@dataclass(frozen=True)
class ForgeOption:
    """One control of Forge's interface.

    Attributes:
        label: as it is written there.
        keyword: of `lowbits.forge.apply`.
        choices: that it offers, as they are written there; empty where it takes a number.
        default: that it has there; None: what Forge works out from the device.
    """

    label: str
    keyword: str
    choices: tuple[Any, ...]
    default: Any


def options() -> tuple[ForgeOption, ...]:
    """Return the controls of Forge that `apply` understands, in the order of its interface.

    Source: labels and entries of stable-diffusion-webui-forge, ``modules_forge/main_entry.py`` and
    ``extensions-builtin/sd_forge_neveroom``, "Never OOM Integrated".
    """
    return (
        ForgeOption("Diffusion in Low Bits", "diffusion_in_low_bits", _LOW_BITS, "Automatic"),
        ForgeOption("Swap Method", "swap_method", ("Queue", "Async"), "Queue"),
        ForgeOption("Swap Location", "swap_location", ("CPU", "Shared"), "CPU"),
        ForgeOption("GPU Weights (MB)", "gpu_weights_mb", (), None),
        ForgeOption(
            "Enabled for UNet (always maximize offload)", "never_oom_unet", (False, True), False
        ),
        ForgeOption("Enabled for VAE (always tiled)", "never_oom_vae", (False, True), False),
    )


def apply(
    pipe: Any,
    *,
    diffusion_in_low_bits: str = "Automatic",
    swap_method: str = "Queue",
    swap_location: str = "CPU",
    gpu_weights_mb: int | None = None,
    never_oom_unet: bool = False,
    never_oom_vae: bool = False,
    **others: Any,
) -> Handle:
    """Do what Forge's options ask for, in place; see the documentation's page "Forge".

    Entries may be written in any case.

    Args:
        pipe: a diffusers pipeline, whose denoiser is packed, or a `torch.nn.Module`.
        diffusion_in_low_bits: how the denoiser's weights are stored; ``"Automatic"`` keeps them. A
            LoRA is merged into them, or acts beside them where the entry ends in "(fp16 LoRA)".
        swap_method: ``"Queue"`` copies weights when they are needed, ``"Async"`` ahead of it.
        swap_location: where weights wait: ``"CPU"`` or ``"Shared"``, page-locked host memory.
        gpu_weights_mb: a hard cap on weights on the device, in MB of 1048576 bytes; None: what
            fits beside what is left free for activations.
        never_oom_unet: no block of the denoiser stays on the device.
        never_oom_vae: the VAE always works in tiles.
        others: of `lowbits.apply`, as ``device``, ``components`` and ``keep_source``.

    Raises:
        ConfigError: no entry of Forge's.
        LowbitsError: what `lowbits.apply` raises.
    """
    for theirs, ours in _NAMES.items():
        if theirs in others:
            raise ConfigError(f"{theirs}: it is called {ours} here, as in Forge")
    given = locals()
    chosen = {o.keyword: _choice(o, given[o.keyword]) for o in options() if o.choices}
    never_oom = {"denoiser": never_oom_unet, "vae": never_oom_vae}
    return _api.apply(
        pipe,
        scheme_name(chosen["diffusion_in_low_bits"]),
        gpu_weights="auto" if gpu_weights_mb is None else _megabytes(gpu_weights_mb),
        swap=chosen["swap_method"].lower(),
        location=chosen["swap_location"].lower(),
        never_oom=tuple(part for part, is_asked in never_oom.items() if is_asked),
        **{
            "components": _denoisers(pipe),
            "lora": "fp16" if chosen["diffusion_in_low_bits"].endswith(FP16_LORA) else "merge",
            **others,
        },
    )


def _megabytes(value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < inf or value != int(value):
        raise ConfigError(f"gpu_weights_mb: got {value!r}, expected megabytes as 6144")
    return int(value) * _MB


def _choice(option: ForgeOption, value: Any) -> Any:
    """Return a choice as it is written in Forge."""
    names = {str(choice).lower(): choice for choice in option.choices}
    if str(value).lower() not in names:
        known = [str(choice) for choice in option.choices]
        raise ConfigError(
            f"{option.keyword}: got {value!r}, expected one of {', '.join(known)}"
            f"{suggestion(str(value), known)}"
        )
    return names[str(value).lower()]


def _denoisers(pipe: Any) -> list[str] | None:
    return denoisers_of(components_of(pipe)) or None if is_pipeline(pipe) else None
