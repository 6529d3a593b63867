"""The options that commands share, and how their texts become values."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbits.config import LowbitsConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

#: Keywords of a pipeline's call that commands give themselves.
_OWN_KEYWORDS = ("prompt", "generator", "output_type", "num_images_per_prompt")

#: What typer would show of a Literal, of which it takes no lists.
_LORA_WAYS = next(f.metadata["choices"] for f in fields(LowbitsConfig) if f.name == "lora")

_PACKING = "Packing"
_STREAMING = "Streaming"


def _help(option: str, more: str = "") -> str:
    """Return what `LowbitsConfig` says of an option, as a sentence."""
    texts = {item.name: item.metadata["help"] for item in fields(LowbitsConfig)}
    return f"{texts[option][0].upper()}{texts[option][1:]}. {more}".strip()


def _picture_path(path: Path) -> Path:
    if path.suffix.lower() not in _PICTURE_SUFFIXES:
        raise typer.BadParameter(f"{path.name} ends in none of {', '.join(_PICTURE_SUFFIXES)}")
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder")
    return path


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", exists=True, file_okay=False, help="Folder of a diffusers pipeline."
    ),
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

Picture = Annotated[
    Path, typer.Option("--out", "-o", callback=_picture_path, help="Picture to write.")
]
Seed = Annotated[
    int,
    typer.Option(
        min=-(2**63), max=2**63 - 1, help="Seed of the noise that the picture starts from."
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Height = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=JSON",
        help="Keyword of the pipeline's call, such as true_cfg_scale=2.0; repeatable.",
    ),
]
ShowReport = Annotated[bool, typer.Option("--report", help="Print what was done to each layer.")]

Scheme = Annotated[
    str,
    typer.Option(
        "--scheme",
        "-s",
        rich_help_panel=_PACKING,
        help=_help("scheme"),
    ),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        metavar="NAME[=SCHEME]",
        rich_help_panel=_PACKING,
        help=_help("components"),
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="GLOB=SCHEME",
        rich_help_panel=_PACKING,
        help=_help("rules"),
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="GLOB",
        rich_help_panel=_PACKING,
        help=_help("skip"),
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PACKING,
        help=_help("device"),
    ),
]
ComputeDtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(
        rich_help_panel=_PACKING,
        help=_help("compute_dtype"),
    ),
]
Lora = Annotated[
    Literal["auto", "fp16", "merge"],
    typer.Option(rich_help_panel=_PACKING, help=_help("lora")),
]
LoraWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-weights",
        metavar="PATH[=STRENGTH]",
        rich_help_panel=_PACKING,
        help="LoRA to load, a safetensors file or a folder, and its strength; repeatable.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar=f"[{'|'.join(_LORA_WAYS)}]",
        rich_help_panel=_PACKING,
        help=_help("lora", "Repeatable: each scheme has a row for each."),
    ),
]
KeepSource = Annotated[
    Literal["auto", "memory", "file", "none"],
    typer.Option(rich_help_panel=_PACKING, help=_help("keep_source")),
]
Source = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        rich_help_panel=_PACKING,
        help=_help("source", "By default MODEL, with --keep-source file."),
    ),
]

NeverOom = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[denoiser|vae]", rich_help_panel=_STREAMING, help=_help("never_oom", "Repeatable.")
    ),
]
OnRequantize = Annotated[
    Literal["warn", "error", "allow"],
    typer.Option(rich_help_panel=_PACKING, help=_help("on_requantize")),
]

GpuWeights = Annotated[
    str,
    typer.Option(metavar="SIZE", rich_help_panel=_STREAMING, help=_help("gpu_weights")),
]
Reserve = Annotated[
    str,
    typer.Option(metavar="SIZE", rich_help_panel=_STREAMING, help=_help("reserve")),
]
Swap = Annotated[
    Literal["auto", "queue", "async"],
    typer.Option(rich_help_panel=_STREAMING, help=_help("swap")),
]
Location = Annotated[
    Literal["auto", "cpu", "shared", "disk", "pageable", "pinned"],
    typer.Option(rich_help_panel=_STREAMING, help=_help("location")),
]

Folder = Annotated[
    Path,
    typer.Option(
        "--out", "-o", file_okay=False, help="Folder for report.json and contact_sheet.png."
    ),
]
SchemeList = Annotated[
    str | None,
    typer.Option(
        "--schemes", metavar="A,B,C", help="Schemes to compare. Default: eight common ones."
    ),
]
AllSchemes = Annotated[bool, typer.Option("--all", help="Compare every scheme there is.")]
Seeds = Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Pictures drawn at once. Default: all of a prompt.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="What to draw; repeatable. Default: those of compare.json."),
]
Blind = Annotated[
    bool, typer.Option("--blind", help="Also write blind.html: can you tell which is quantized?")
]


def split_pairs(
    items: Sequence[str] | None, option: str, expected: str = "KEY=VALUE"
) -> dict[str, str]:
    """Return ``KEY=VALUE`` texts as a mapping.

    Raises:
        typer.BadParameter: a text has no ``=``.
    """
    pairs = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"got {item!r}, expected {expected}", param_hint=option)
        pairs[key] = value
    return pairs


def rules(items: Sequence[str] | None) -> dict[str, str]:
    """Return ``GLOB=SCHEME`` texts as a mapping."""
    return split_pairs(items, "--rule", "GLOB=SCHEME")


def call_settings(items: Sequence[str] | None, **named: int | None) -> dict[str, Any]:
    """Return keywords for the pipeline's call: those named and not None, then ``--set`` texts.

    Raises:
        typer.BadParameter: a value is no JSON, or a keyword is not for the caller to say.
    """
    settings: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    for key, text in split_pairs(items, "--set").items():
        if key in _OWN_KEYWORDS:
            raise typer.BadParameter(f"{key} is what the command itself says", param_hint="--set")
        try:
            settings[key] = json.loads(text, parse_constant=_finite, parse_float=_finite)
        except ValueError as error:
            raise typer.BadParameter(
                f"{key}: {text!r} is no JSON; a text needs double quotes: '{key}=\"...\"'",
                param_hint="--set",
            ) from error
    return settings


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def strengths(items: Sequence[str] | None) -> dict[Path, float]:
    """Return the strength of each LoRA of ``PATH`` and ``PATH=STRENGTH`` texts.

    Raises:
        typer.BadParameter: no such file or folder, or no number.
    """
    loras = {}
    for item in items or ():
        name, _, strength = item.rpartition("=") if "=" in item else (item, "", "1")
        if not Path(name).exists():
            raise typer.BadParameter(f"no such file or folder: {name}", param_hint="--lora-weights")
        try:
            loras[Path(name)] = _finite(strength)
        except ValueError as error:
            raise typer.BadParameter(
                f"got {item!r}, expected PATH=STRENGTH, a number", param_hint="--lora-weights"
            ) from error
    return loras


def lora_ways(items: Sequence[str] | None, loras: Mapping[Path, float]) -> tuple[str, ...]:
    """Return the ways that LoRAs are to act, each once: ``auto`` where none is said.

    Raises:
        typer.BadParameter: there is no such way, or no LoRA.
    """
    unknown = [item for item in items or () if item not in _LORA_WAYS]
    if unknown:
        expected = ", ".join(_LORA_WAYS)
        raise typer.BadParameter(f"got {unknown[0]!r}, expected {expected}", param_hint="--lora")
    if items and not loras:
        raise typer.BadParameter("needs --lora-weights", param_hint="--lora")
    return tuple(dict.fromkeys(items or ("auto",)))


def components(items: Sequence[str] | None, scheme: str) -> dict[str, str] | None:
    """Return the scheme of each component of ``NAME`` and ``NAME=SCHEME`` texts; None for none."""
    if not items:
        return None
    return {name: own or scheme for name, _, own in (item.partition("=") for item in items)}
