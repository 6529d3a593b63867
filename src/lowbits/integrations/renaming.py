"""Renaming by tables of names, and the names of latent diffusion's U-Nets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lowbits.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_LDM_RESNET: Final[Mapping[str, str]] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_LDM_OUTSIDE: Final = """
time_embedding.linear_1                            time_embed.0
time_embedding.linear_2                            time_embed.2
add_embedding.linear_1                             label_emb.0.0
add_embedding.linear_2                             label_emb.0.2
class_embedding.linear_1                           label_emb.0.0
class_embedding.linear_2                           label_emb.0.2
class_embedding                                    label_emb
conv_in                                            input_blocks.0.0
conv_norm_out                                      out.0
conv_out                                           out.2
mid_block.attentions.0                             middle_block.1
"""

_LDM_PLACE: Final = re.compile(
    r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?"
    r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
)


def rules_of(table: str) -> list[tuple[re.Pattern[str], str]]:
    """Return the rules of a table; how it is written is told in `reference_names`."""
    lines = [line.split() for line in table.splitlines() if line]
    return [
        (
            re.compile(own.replace(".", r"\.").replace("#", r"(\d+)") + r"(?=\.|$)"),
            reference.replace("#", r"\1"),
        )
        for own, reference in lines
    ]


def renamed(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    """Return a name with its beginning replaced by the first rule that fits."""
    for pattern, replacement in rules:
        found = pattern.match(name)
        if found:
            return found.expand(replacement) + name[found.end() :]
    return name


def ldm_namer(names: set[str], layers_per_block: object) -> Callable[[str], str]:
    """Name a U-Net as latent diffusion does: blocks in one row, each in numbered places.

    A block that follows ``layers_per_block`` resnets holds the down- or upsampler; in the second
    half it comes behind the last attention, which may be absent.

    Source: ``convert_ldm_unet_checkpoint``.
    """
    if not isinstance(layers_per_block, int):
        raise ConfigError(
            "no reference names are known for a U-Net whose blocks differ in their number of "
            "layers. Save it with diffusers' names"
        )
    rules, per_block = rules_of(_LDM_OUTSIDE), layers_per_block + 1

    def place(block: str, index: int, part: str, layer: int) -> str:
        if block == "mid_block":
            return f"middle_block.{2 * layer}"
        if part == "downsamplers":
            return f"input_blocks.{1 + index * per_block + layers_per_block}.0.op"
        if part == "upsamplers":
            attends = any(name.startswith(f"up_blocks.{index}.attentions.") for name in names)
            return f"output_blocks.{index * per_block + layers_per_block}.{1 + attends}.conv"
        at = index * per_block + layer
        half = f"input_blocks.{1 + at}" if block == "down_blocks" else f"output_blocks.{at}"
        return f"{half}.{int(part == 'attentions')}"

    def reference(name: str) -> str:
        found = _LDM_PLACE.match(name)
        if not found or name.startswith("mid_block.attentions."):
            return renamed(name, rules)
        block, index, part, layer = found.groups()
        rest = name[found.end() :]
        if part.endswith("samplers"):
            rest = rest.removeprefix("conv.")
        if part == "resnets":
            inner, _, tail = rest.partition(".")
            rest = f"{_LDM_RESNET.get(inner, inner)}.{tail}"
        return f"{place(block, int(index or 0), part, int(layer))}.{rest}"

    return reference
