"""`lowbits backends`, `lowbits schemes`, help and version."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.testing import CliRunner

import lowbits
from lowbits.cli import tables
from lowbits.cli.app import app

if TYPE_CHECKING:
    import pytest


def _rendered(table: object, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_tables_list_everything() -> None:
    result = CliRunner().invoke(app, ["backends"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for backend in lowbits.backends():
        assert backend.name in result.stdout
    result = CliRunner().invoke(app, ["schemes"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for scheme in lowbits.schemes():
        assert scheme.name in result.stdout
        assert scheme.summary in result.stdout
    assert "Automatic" in result.stdout


def test_json_has_every_field() -> None:
    result = CliRunner().invoke(app, ["backends", "--json"])
    names = [field.name for field in fields(lowbits.BackendInfo)]
    assert [list(row) for row in json.loads(result.stdout)] == [names] * len(lowbits.backends())
    result = CliRunner().invoke(app, ["schemes", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows.keys() == {scheme.name for scheme in lowbits.schemes()}
    assert rows["bnb-nf4"]["bits_per_weight"] == 4.5
    assert rows["bnb-nf4"]["forge_name"] == "bnb-nf4"


def test_a_backend_that_does_not_work_says_why() -> None:
    info = lowbits.BackendInfo(
        "quanto", None, available=False, reason="no module", install="pip install 'optimum-quanto'"
    )
    text = _rendered(tables.backends_table([info]))
    assert "no module" in text
    assert "pip install 'optimum-quanto'" in text
    scheme = replace(lowbits.schemes()[1], backend="quanto", available=False, reason="no module")
    assert [str(line) for line in tables.reason_lines([scheme])] == ["quanto: no module"]


def test_layer_kinds_are_said_shortly() -> None:
    first = lowbits.schemes()[0]
    schemes = [
        replace(first, name="every", layer_kinds=("A", "B", "C")),
        replace(first, name="most", layer_kinds=("A", "B")),
        replace(first, name="one", layer_kinds=("A",), row_multiple=32),
    ]
    lines = [line.split() for line in _rendered(tables.schemes_table(schemes, 200)).splitlines()]
    kinds = {line[0]: line[3 : line.index("yes")] for line in lines if "yes" in line}
    assert kinds == {"every": ["all", "any"], "most": ["no", "C", "any"], "one": ["A", "32n"]}


def test_a_narrow_terminal_gets_a_narrow_table() -> None:
    schemes = lowbits.schemes()
    text = _rendered(tables.schemes_table(schemes, 80), 90)
    assert "summary" not in text
    assert "wider terminal" in text
    lines = [line.split() for line in text.splitlines()]
    here = {line[0]: line[-2] for line in lines if line and line[0] in {s.name for s in schemes}}
    assert here.keys() == {scheme.name for scheme in schemes}, "names are in one line"
    assert {name for name, text in here.items() if text == "read"} == {
        scheme.name for scheme in schemes if not scheme.can_quantize
    }
    assert all(scheme.name in text for scheme in schemes)


def test_what_is_piped_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert tables.make_console().width > 150
    monkeypatch.setenv("COLUMNS", "90")
    assert tables.make_console().width == 90


def test_the_version_is_shown() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"lowbits {lowbits.__version__}\n"


def test_run_offers_every_option_of_apply() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    offered = {parameter.name for parameter in group.commands["run"].params}
    callbacks = {"progress", "cancel"}
    renamed = {"components": "component", "rules": "rule"}
    wanted = {field.name for field in fields(lowbits.LowbitsConfig)} - callbacks
    assert {renamed.get(name, name) for name in wanted} <= offered
