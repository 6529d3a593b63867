"""What a comparison leaves behind: a report, a contact sheet, a blind test."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import torch

import lowbits
from lowbits.cli.blind import blind_page, choose_pairs
from lowbits.cli.drawing import to_image
from lowbits.cli.sheet import Sheet, SheetRow, render
from lowbits.cli.tables import format_psnr, format_share

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from lowbits.cli.compare import Comparison, Plan, Result

_MIB: Final = 2**20

_PACKAGES: Final = (
    "lowbits",
    "torch",
    "diffusers",
    "transformers",
    "bitsandbytes",
    "torchao",
    "optimum-quanto",
    "gguf",
)


def write_outputs(comparison: Comparison, model: str, folder: Path, *, blind: bool) -> list[Path]:
    """Write a comparison into a folder, which is made where it is missing.

    Returns:
        The files: ``report.json``, ``contact_sheet.png``, and ``blind.html`` if asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, sheet, page = (
        folder / name for name in ("report.json", "contact_sheet.png", "blind.html")
    )
    data = to_dict(comparison, model)
    report.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    render(make_sheet(comparison, model, data["machine"])).save(sheet)
    if not blind or not comparison.results:
        return [report, sheet]
    page.write_text(_blind_page(comparison, model), encoding="utf-8")
    return [report, sheet, page]


def to_dict(comparison: Comparison, model: str) -> dict[str, Any]:
    """Return a comparison as plain data for JSON.

    Keys: ``model``, ``prompts``, ``labels``, ``call``, ``seeds``, ``batch``, ``pictures`` (drawn
    with each scheme), ``device``, ``lora_strengths`` (of each adapter, for each share that was
    drawn at; only where there are LoRAs), ``full_precision`` and ``schemes`` (see `result_dict`),
    ``skipped`` (``scheme`` and ``reason``), ``machine`` (``platform``, ``cpu_count``, ``threads``,
    ``python``, ``packages``, ``date``).
    """
    plan = comparison.plan
    return {
        "model": model,
        "prompts": list(plan.recipe.prompts),
        "labels": list(plan.recipe.labels),
        "call": dict(plan.recipe.call),
        "seeds": list(range(plan.seeds)),
        "batch": plan.batch,
        "pictures": plan.pictures,
        "device": str(plan.device),
        **({"lora_strengths": _strengths(plan)} if plan.adapters else {}),
        "full_precision": result_dict(comparison.reference),
        "schemes": [result_dict(result) for result in comparison.results],
        "skipped": [{"scheme": item.scheme, "reason": item.reason} for item in comparison.skipped],
        "machine": machine(),
    }


def result_dict(result: Result) -> dict[str, Any]:
    """Return a scheme's figures as plain data.

    ``psnr_db`` is null where the pictures equal those of full precision, or hold NaN (``has_nan``);
    figures that were not measured are null too. ``lora``, the way that LoRAs act, is there only if
    they do.
    """
    return {
        "scheme": result.scheme,
        **({"lora": result.lora} if result.lora else {}),
        "bits_per_weight": result.stored.bits_per_weight,
        "packed_component_bytes": result.stored.component_bytes,
        "total_bytes": result.stored.total_bytes,
        "convert_s": result.convert_s,
        "convert_peak_bytes": result.convert_peak_bytes,
        "seconds_per_picture": result.seconds_per_picture,
        "psnr_db": result.psnr_db if math.isfinite(result.psnr_db) else None,
        "has_nan": math.isnan(result.psnr_db),
        "accuracy": result.accuracy,
        "restored": result.restored,
    }


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def make_sheet(comparison: Comparison, model: str, where: dict[str, Any]) -> Sheet:
    """Lay a comparison out as a contact sheet."""
    plan = comparison.plan
    recipe = plan.recipe
    is_read = comparison.reference.accuracy is not None
    figures = ("bits per\nweight", "packed\nparts, MiB", "PSNR,\ndB", "read as\nasked")
    steps = recipe.call.get("num_inference_steps")
    details = [
        f"{steps} steps" if steps else "",
        f"the first of {plan.seeds} seeds" if plan.seeds > 1 else "seed 0",
        f"figures over {plan.pictures} pictures a row",
    ]
    packages = where["packages"]
    return Sheet(
        title=f"{model} in low bits",
        subtitle="  ·  ".join(filter(None, details)),
        footer=f"lowbits {packages['lowbits']}  ·  torch {packages['torch']}  ·  {plan.device}"
        f"  ·  {where['date']}",
        figures=figures if is_read else figures[:-1],
        columns=_columns(plan),
        rows=tuple(
            _sheet_row(result, plan, is_read=is_read)
            for result in (comparison.reference, *comparison.results)
        ),
    )


def _sheet_row(result: Result, plan: Plan, *, is_read: bool) -> SheetRow:
    figures = [
        f"{result.stored.bits_per_weight:.2f}",
        f"{result.stored.component_bytes / _MIB:.1f}",
        "-" if result.convert_s is None else format_psnr(result.psnr_db),
        *([format_share(result.accuracy)] if is_read else []),
    ]
    return SheetRow(result.name, tuple(figures), _images(result, plan))


def _blind_page(comparison: Comparison, model: str) -> str:
    plan = comparison.plan
    pairs = choose_pairs(
        _columns(plan),
        _images(comparison.reference, plan),
        {result.name: _images(result, plan) for result in comparison.results},
        {
            result.name: f"{result.stored.bits_per_weight:.2f} bits per weight"
            for result in comparison.results
        },
    )
    return blind_page(f"{model}, lowbits {lowbits.__version__}", pairs)


def _columns(plan: Plan) -> tuple[str, ...]:
    """Say what each column shows: a prompt, at each strength of the LoRA if there is one."""
    names = plan.recipe.labels or plan.recipe.prompts
    if not plan.adapters:
        return names
    return tuple(f"LoRA {share:g}: {name}" for name in names for share in plan.shares)


def _images(result: Result, plan: Plan) -> tuple[Image, ...]:
    """Return the pictures in the order of the columns."""
    by_share = result.pictures.reshape(len(plan.shares), -1, *result.pictures.shape[1:])
    return tuple(map(to_image, by_share.transpose(0, 1).flatten(0, 1)))


def _strengths(plan: Plan) -> list[dict[str, float]]:
    return [
        {name: share * strength for name, strength in plan.adapters.items()}
        for share in plan.shares
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
