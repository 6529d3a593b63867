"""The commands of ``lowbits``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, final

import typer
from rich.text import Text
from typer.core import TyperGroup

import lowbits
from lowbits.cli import files, options, tables
from lowbits.cli.bars import Bars
from lowbits.cli.loading import (
    Recipe,
    load_loras,
    load_pipeline,
    packed_models,
    pick_device,
    quiet,
    read_recipe,
)
from lowbits.errors import ConfigError, LowbitsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Packages that commands need, and the extra that brings them.
_EXTRAS: Final = {
    "PIL": "cli",
    "numpy": "cli",
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "peft": "lora",
}

#: What a pipeline raises that cannot take a value, besides what lowbits and the system raise.
_OTHERS: Final = (ValueError, TypeError, RuntimeError, OverflowError)
_ERRORS: Final = (LowbitsError, ModuleNotFoundError, OSError, *_OTHERS)

#: Pictures of each prompt: with mini-FLUX, two to three minutes on two cores.
_SEEDS: Final = 10


@final
class _Commands(TyperGroup):
    """Commands whose errors are one red line each."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, typer.Exit, typer.Abort):  # the first: a pager that was closed
            raise
        except _ERRORS as error:
            message = _message(error)
            if ctx.params.get("debug") or message is None:
                raise
            line = Text(f"error: {message}", style="red")
            tables.make_console(stderr=True).print(line, soft_wrap=True)
            raise typer.Exit(1) from None


def _message(error: Exception) -> str | None:
    if isinstance(error, LowbitsError):
        return str(error)
    if isinstance(error, _OTHERS):
        notes = getattr(error, "__notes__", ())
        said = " ".join(" ".join((str(error), *notes)).split())
        return f"{type(error).__name__}: {said} (lowbits --debug shows where)"
    if isinstance(error, OSError):
        is_about_file = error.filename is not None and error.strerror
        said = f"{error.filename}: {error.strerror}" if is_about_file else str(error)
        return " ".join(said.split())  # those of other libraries have several lines
    package = (getattr(error, "name", None) or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    return f"this command needs {package}: pip install 'lowbits[{extra}]'" if extra else None


app = typer.Typer(
    name="lowbits",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Run any torch module or diffusers pipeline in the memory you have.",
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"lowbits {lowbits.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None: ...


@app.command()
def backends(as_json: options.Json = False) -> None:
    """List the libraries that pack weights, and which of them work here."""
    with quiet():
        infos = lowbits.backends()
    if as_json:
        _echo_json(infos)
    else:
        tables.make_console().print(tables.backends_table(infos))


@app.command()
def schemes(as_json: options.Json = False) -> None:
    """List the ways to store a weight."""
    with quiet():
        infos = lowbits.schemes()
    if as_json:
        _echo_json(infos)
        return
    console = tables.make_console()
    console.print(tables.schemes_table(infos, console.width))
    for line in tables.reason_lines(infos):
        console.print(line, soft_wrap=True)


def _echo_json(infos: Sequence[lowbits.BackendInfo | lowbits.SchemeInfo]) -> None:
    typer.echo(json.dumps([asdict(info) for info in infos], indent=2))


@app.command()
def run(  # noqa: PLR0913 - a parameter is an option
    *,
    model: options.Model,
    prompt: options.Prompt,
    scheme: options.Scheme = "native",
    out: options.Picture,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    settings: options.Settings = None,
    show_report: options.ShowReport = False,
    component: options.Components = None,
    rule: options.Rules = None,
    skip: options.Skip = None,
    device: options.Device = None,
    compute_dtype: options.ComputeDtype = None,
    lora: options.Lora = "auto",
    lora_weights: options.LoraWeights = None,
    keep_source: options.KeepSource = "none",
    source: options.Source = None,
    on_requantize: options.OnRequantize = "warn",
    gpu_weights: options.GpuWeights = "auto",
    reserve: options.Reserve = "auto",
    swap: options.Swap = "auto",
    location: options.Location = "auto",
    never_oom: options.NeverOom = None,
) -> None:
    """Draw a picture with packed weights."""
    call = options.call_settings(settings, num_inference_steps=steps, height=height, width=width)
    out.parent.mkdir(parents=True, exist_ok=True)  # before there is a picture to lose
    import torch

    from lowbits.cli.drawing import draw, to_image

    call = {**read_recipe(model).call, **call}
    with Bars(tables.make_console(stderr=True)) as bars:
        bars.track("loading", 0, None)
        place = pick_device(device)
        parts, rules = options.components(component, scheme), options.rules(rule)
        _require(scheme, *(parts or {}).values(), *rules.values())
        pipe = load_pipeline(model, place)
        load_loras(pipe, options.strengths(lora_weights))
        config = lowbits.LowbitsConfig(
            scheme=scheme, components=parts, rules=rules or None, skip=tuple(skip or ()),
            device=place, compute_dtype=getattr(torch, compute_dtype) if compute_dtype else None,
            gpu_weights=gpu_weights, reserve=reserve, swap=swap, location=location, lora=lora,
            keep_source=keep_source, source=source or (model if keep_source == "file" else None),
            on_requantize=on_requantize, never_oom=tuple(never_oom or ()),
            progress=lambda event: bars.track("packing", event.done_bytes, event.total_bytes),
        )  # fmt: skip
        with quiet():
            handle = lowbits.apply(pipe, config)
        pictures = draw(pipe, prompt, [seed], call, lambda done: bars.track("drawing", done, 1))
    to_image(pictures[0]).save(out)
    typer.echo(handle.report().table() if show_report else _summary(handle.report()))
    typer.echo(f"weights: {handle.stats()}")
    typer.echo(f"wrote {out}")


@app.command()
def compare(  # noqa: PLR0913 - a parameter is an option
    *,
    model: options.Model,
    out: options.Folder,
    scheme_list: options.SchemeList = None,
    all_schemes: options.AllSchemes = False,
    seeds: options.Seeds = _SEEDS,
    prompts: options.Prompts = None,
    steps: options.Steps = None,
    settings: options.Settings = None,
    batch: options.Batch = None,
    device: options.Device = None,
    lora: options.Loras = None,
    lora_weights: options.LoraWeights = None,
    blind: options.Blind = False,
) -> None:
    """Draw the same pictures with several schemes, and measure what each costs and saves.

    Prompts, labels and settings come from the model's compare.json, if it has one. With LoRAs, each
    picture is drawn at none, half and all of their strengths.
    """
    strengths = options.strengths(lora_weights)
    ways = options.lora_ways(lora, strengths)
    recipe = _recipe(model, prompts, options.call_settings(settings, num_inference_steps=steps))
    out.mkdir(parents=True, exist_ok=True)  # before there are pictures to lose
    console = tables.make_console(stderr=True)
    with Bars(console) as bars:
        bars.track("loading", 0, None)
        from lowbits.cli import compare as comparing
        from lowbits.cli.outputs import write_outputs

        with quiet():
            names = _scheme_names(scheme_list, all_schemes=all_schemes)
            usable, skipped = comparing.usable_schemes(names)
        place = pick_device(device)
        _require_full_precision(model)
        pipe = load_pipeline(model, place)
        adapters = load_loras(pipe, strengths)
        plan = comparing.Plan(recipe, usable, seeds, batch or seeds, place, adapters, ways)
        found = comparing.compare(pipe, plan, bars.track)
    found = replace(found, skipped=(*skipped, *found.skipped))
    shown = tables.make_console()
    shown.print(tables.comparison_table(found))
    for line in tables.skipped_lines(found):
        shown.print(line, soft_wrap=True)
    for path in write_outputs(found, model.resolve().name, out, blind=blind):
        typer.echo(f"wrote {path}")


app.command()(files.convert)
app.command()(files.inspect)


def _summary(report: lowbits.Report) -> str:
    """Return one line, and what there is to know but that nothing can be restored."""
    notes = [f"note: {text}" for text in report.warnings if "restore()" not in text]
    return "\n".join((report.summary(), *notes))


def _require_full_precision(model: Path) -> None:
    if packed := packed_models(model):
        raise ConfigError(
            f"{model} was saved packed ({', '.join(packed)}): compare wants the pipeline in full "
            "precision, which it measures against; lowbits run draws with this one"
        )


def _require(*schemes: str) -> None:
    """Raise what applying would raise about these names: before a pipeline is loaded for it."""
    from lowbits.config import scheme_name
    from lowbits.core.registry import DEFAULT

    with quiet():
        for scheme in schemes:
            DEFAULT.require(scheme_name(scheme))


def _recipe(model: Any, prompts: list[str] | None, call: dict[str, Any]) -> Recipe:
    """Return the model's recipe with what the command line changes in it."""
    recipe = read_recipe(model)
    if prompts:
        recipe = replace(recipe, prompts=tuple(prompts), labels=(), classifier=None)
    if not recipe.prompts:
        raise ConfigError(f"{model} has no compare.json with prompts: pass --prompt")
    return replace(recipe, call={**recipe.call, **call})


def _scheme_names(listed: str | None, *, all_schemes: bool) -> tuple[str, ...]:
    from lowbits.cli.compare import DEFAULT_SCHEMES

    if listed is not None and all_schemes:
        raise typer.BadParameter("--schemes and --all exclude each other")
    if all_schemes:
        packable = (info for info in lowbits.schemes() if info.can_quantize)
        return tuple(info.name for info in packable if info.backend != "-")
    if listed is not None:
        names = tuple(name.strip() for name in listed.split(",") if name.strip())
        if not names:
            raise typer.BadParameter(f"got {listed!r}, expected names as bnb-nf4,gguf-q8_0")
        return names
    return DEFAULT_SCHEMES
