"""The commands of ``lowbits`` that are about files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

import lowbits
from lowbits.cli import options, tables
from lowbits.cli.bars import Bars
from lowbits.cli.loading import quiet

_Checkpoint = Annotated[
    Path,
    typer.Argument(exists=True, help="A safetensors or GGUF file, or the folder of a model."),
]

_PHASES: Final = {"check": "checking values", "convert": "converting"}


def inspect(path: _Checkpoint, as_json: options.Json = False) -> None:
    """Say what is in a checkpoint, without reading its tensors."""
    with quiet():
        found = lowbits.inspect(path)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.table())


def convert(
    src: _Checkpoint,
    dst: Annotated[
        Path, typer.Argument(help="A .safetensors or .gguf file, or a folder for a folder.")
    ],
    scheme: options.Scheme,
    rule: options.Rules = None,
    skip: options.Skip = None,
    on_requantize: options.OnRequantize = "warn",
    show_report: options.ShowReport = False,
) -> None:
    """Write a checkpoint in another scheme, a weight at a time."""
    with Bars(tables.make_console(stderr=True), in_bytes=True) as bars, quiet():
        report = lowbits.convert(
            src,
            dst,
            scheme,
            rules=options.rules(rule),
            skip=tuple(skip or ()),
            on_requantize=on_requantize,
            progress=lambda event: bars.track(
                _PHASES[event.stage], event.done_bytes, event.total_bytes or None
            ),
        )
    typer.echo(report.table() if show_report else report.summary())
    for warning in () if show_report else report.warnings:
        typer.echo(f"note: {warning}")
    typer.echo(f"wrote {dst}")
