"""Loading pipelines, and what a model folder says about comparisons of it."""

from __future__ import annotations

import json
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

RECIPE: Final = "compare.json"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off the terminal what other libraries say while they are imported and loaded.

    They announce packages that they do without, and each other's deprecations: nothing that the
    user of a command can act on.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def pick_device(device: str | None) -> torch.device:
    """Return the device of this name; None: the accelerator if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    from lowbits.core.device import default_device, usable_device

    return default_device() if device is None else usable_device(device)


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """Load a diffusers pipeline on the CPU: in float32 if it will run there, else in bfloat16.

    What lowbits has packed, and saved, stays packed.

    Raises:
        ConfigError: the folder has no pipeline in it.
    """
    import torch

    import lowbits

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    is_packed = bool(packed_models(folder))
    with quiet(), _no_loading_bars():
        from lowbits.integrations.models import load_rest

        if is_packed:
            pipe = lowbits.load_pipeline(folder, dtype=dtype)
        else:
            pipe = load_rest(folder, {}, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def packed_models(folder: Path) -> list[str]:
    """Return the names of the models of a pipeline's folder that lowbits has packed.

    Raises:
        ConfigError: the folder has no pipeline in it.
    """
    from lowbits.files.own import own_file_in
    from lowbits.integrations.models import components_in

    return [name for name in components_in(folder) if own_file_in(folder / name)]


def load_loras(pipe: Any, loras: Mapping[Path, float]) -> dict[str, float]:
    """Load LoRAs into a pipeline, and set their strengths.

    Args:
        pipe: changed in place.
        loras: the strength of each safetensors file, or folder.

    Returns:
        The strength of each adapter, by the name that it has in the pipeline.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ConfigError: the pipeline takes none, or the file is none for it.
    """
    if not loras:
        return {}
    with quiet():
        import_module("peft")  # diffusers does not say how to install it
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigError(f"lora_weights: a {type(pipe).__name__} takes no LoRA")
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, path in zip(names, loras, strict=True):
        where = {"weight_name": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        try:
            with quiet():
                pipe.load_lora_weights(folder, adapter_name=name, local_files_only=True, **where)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise ConfigError(
                f"lora_weights: {path} cannot be loaded into a {type(pipe).__name__}: {error}"
            ) from error
    pipe.set_adapters(names, list(loras.values()))
    return dict(zip(names, loras.values(), strict=True))


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    import diffusers
    import transformers

    logs = [diffusers.utils.logging, transformers.utils.logging]
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


@final
@dataclass(frozen=True)
class Recipe:
    """What to draw with a model, and how to tell what is on the pictures.

    Attributes:
        prompts: what to draw.
        labels: what the picture of each prompt should be recognised as; empty: it is not asked.
        call: keywords of the pipeline's call.
        classifier: weights of the `lowbits.cli.reader` that recognises the labels, in their order.
    """

    prompts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    classifier: Path | None = None


def read_recipe(folder: Path) -> Recipe:
    """Return what a model's ``compare.json`` says; an empty recipe where there is none.

    Raises:
        ConfigError: the file does not hold what it should.
    """
    path = folder / RECIPE
    if not path.exists():
        return Recipe()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    _check_recipe(path, data)
    prompts, labels = tuple(data.get("prompts", ())), tuple(data.get("labels", ()))
    classifier = data.get("classifier")
    return Recipe(prompts, labels, data.get("call", {}), classifier and folder / classifier)


def _check_recipe(path: Path, data: Any) -> None:
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected an object")
    kinds: dict[str, type] = {"prompts": list, "labels": list, "call": dict, "classifier": str}
    for name, kind in kinds.items():
        value: Any = data.get(name, kind())
        if not isinstance(value, kind):
            got = type(value).__name__
            raise ConfigError(f"{path}: {name}: got {got}, expected {kind.__name__}")
        wrong = [item for item in data.get(name, ()) if not isinstance(item, str)]
        if kind is list and wrong:
            raise ConfigError(f"{path}: {name}: got {wrong[0]!r}, expected a text")
    prompts, labels = data.get("prompts", []), data.get("labels", [])
    if labels and len(labels) != len(prompts):
        raise ConfigError(f"{path}: got {len(labels)} labels for {len(prompts)} prompts")
