"""Models of diffusers and transformers as folders: their configs, their empty skeletons."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from lowbits.errors import ConfigError, FormatError
from lowbits.files.checkpoint import CONFIG, read_config
from lowbits.files.safetensors import read_safetensors
from lowbits.files.sharded import SUFFIX
from lowbits.integrations.diffusers import QUANTIZER_ENTRIES, default_reason
from lowbits.integrations.module_tensors import tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import nn

    from lowbits.integrations.row_tracing import Shapes

INDEX: Final = "model_index.json"
#: Libraries whose classes can be made empty here.
_LIBRARIES: Final = ("diffusers", "transformers")
#: The first diffusers whose `from_pretrained` calls its ``torch_dtype`` ``dtype``.
_DTYPE_RENAMED: Final = (0, 40)


def save_config(module: nn.Module, folder: Path) -> None:
    """Write a model's ``config.json`` into a folder, where it has one: plain modules have none."""
    model: Any = module
    if hasattr(model, "save_config"):  # diffusers'
        model.save_config(folder)
    elif hasattr(getattr(model, "config", None), "save_pretrained"):  # transformers'
        model.config.save_pretrained(folder)


def copy_config(source: Path, target: Path) -> None:
    """Copy a model's ``config.json``, where it has one, to a folder where lowbits has the weights.

    Without what a library has left in it that quantized the model: it would be followed.
    """
    config = read_config(source)
    if config is None:
        return
    kept = {key: value for key, value in config.items() if key not in QUANTIZER_ENTRIES}
    if len(kept) == len(config):
        shutil.copyfile(source / CONFIG, target / CONFIG)
    else:
        (target / CONFIG).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def components_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Return library and class of each component that a pipeline's folder lists.

    Raises:
        ConfigError: it is no pipeline's.
    """
    index = folder / INDEX
    if not folder.exists():
        raise ConfigError(f"there is no folder {folder}; names of the hub are not looked up")
    if not index.is_file():
        raise ConfigError(f"{folder} has no {INDEX}: it is not a diffusers pipeline")
    try:
        entries = _read_index(folder)
        listed = {name: value for name, value in entries.items() if isinstance(value, list)}
        return {
            name: (str(value[0]), str(value[1]))
            for name, value in listed.items()
            if len(value) == 2 and value[0]
        }
    except (ValueError, AttributeError) as error:
        raise FormatError(f"it is not what a pipeline's index should be: {error}", index) from error


def _read_index(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


def refuse_pipeline(path: Path, instead: str = "") -> None:
    """Raise where a path is the folder of a pipeline, of which one model is meant.

    Args:
        path: of a checkpoint.
        instead: what else the caller may do.

    Raises:
        ConfigError: naming its models.
    """
    if (path / INDEX).is_file():
        listed = components_in(path)
        models = ", ".join(sorted(n for n in listed if any((path / n).glob(f"*{SUFFIX}*"))))
        raise ConfigError(
            f"path: {path} is a pipeline of several models: name one of {models}{instead}"
        )


def skeleton(folder: Path, library: str, class_name: str) -> nn.Module:
    """Return a model of a folder's config whose Parameters are on the meta device.

    Buffers that no file holds (tables of positions) are made as its class makes them.

    Raises:
        ConfigError: a class of neither diffusers nor transformers.
    """
    if library not in _LIBRARIES:
        raise ConfigError(
            f"{folder.name} is a {library}.{class_name}: make the model yourself, call "
            "lowbits.load(folder, into=model), and pass it to load_pipeline by its name"
        )
    from accelerate import init_empty_weights

    model_class = _class_of(library, class_name)
    if model_class is None:
        raise ConfigError(f"{folder.name}: this {library} has no {class_name}: pip install -U it")
    with init_empty_weights(include_buffers=False):
        if library == "diffusers":
            model = model_class.from_config(model_class.load_config(folder))
        else:
            model = model_class(model_class.config_class.from_pretrained(folder))
    if library == "transformers":
        model.tie_weights()  # the empty Parameters that took their places are not
    empty: nn.Module = model.eval()
    return empty


def _class_of(library: str, class_name: str) -> Any:
    return getattr(importlib.import_module(library), class_name, None)


def wrapper_class(library: str, class_name: str) -> Any:
    """Return the class of what has no config, and a folder for each of its models; None: of others.

    Several ControlNets, or adapters, of diffusers are such models.
    """
    if library != "diffusers" or importlib.util.find_spec(library) is None:
        return None
    found = _class_of(library, class_name)
    is_wrapper = hasattr(found, "from_pretrained") and not hasattr(found, "from_config")
    return found if is_wrapper else None


def folders_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folder of each model in a wrapper's, and the class that its config names."""
    path = folder
    for number in itertools.count(1):
        config = read_config(path)
        if config is None:
            return
        yield path, config.get("_class_name", "")
        path = folder.with_name(f"{folder.name}_{number}")


def load_rest(
    folder: Path, parts: dict[str, nn.Module], dtype: torch.dtype | None, **options: Any
) -> Any:
    """Return a pipeline of a folder around models that are loaded already.

    Args:
        folder: of the pipeline.
        parts: by name; at least one.
        dtype: of the others; None: what most of each one's bytes are stored in, or, where no
            safetensors file tells, that of the first part.
        options: of ``DiffusionPipeline.from_pretrained``.
    """
    import diffusers

    wanted: Any = dtype
    if dtype is None:
        names = components_in(folder).keys() - parts.keys()
        found = {name: _stored_dtype(folder / name, options.get("variant")) for name in names}
        first = next(p.dtype for p in next(iter(parts.values())).parameters())
        wanted = {name: stored or first for name, stored in found.items()} | {"default": first}
    version = tuple(map(int, diffusers.__version__.split(".")[:2]))
    name = "dtype" if version >= _DTYPE_RENAMED else "torch_dtype"
    options.setdefault("local_files_only", True)
    # By its own class: the general one loads from the folder what is passed for an optional part.
    base: Any = diffusers.DiffusionPipeline
    pipeline_class = getattr(diffusers, str(_read_index(folder).get("_class_name")), base)
    return pipeline_class.from_pretrained(folder, **{name: wanted}, **parts, **options)


def _stored_dtype(folder: Path, variant: str | None) -> torch.dtype | None:
    """Return the dtype that most of a model's floating bytes are stored in."""
    between = f".{variant}" if variant else ""
    sizes: Counter[torch.dtype] = Counter()
    for path in folder.glob(f"*{SUFFIX}"):
        if "".join(path.suffixes) == between + SUFFIX:
            for tensor in read_safetensors(path).tensors.values():
                if tensor.dtype.is_floating_point:
                    sizes[tensor.dtype] += tensor.extent.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def packed_by_default(name: str, listed: tuple[str, str] | None) -> bool:
    """Say whether a component of a pipeline's folder is packed where nobody names it."""
    if listed is None or listed[0] not in _LIBRARIES:
        return False
    return not default_reason(name, listed[1]) and name not in ("scheduler", "tokenizer")


def empty_model(folder: Path, shapes: Shapes) -> nn.Module | None:
    """Return a model of a folder's config on the meta device, if these are its tensors.

    Args:
        folder: of the model; one without a config, or a file, has no model.
        shapes: of the tensors, by name; of tied ones a single name is enough.
    """
    config = read_config(folder)
    if config is None:
        return None
    architectures = config.get("architectures") or [None]
    library = "diffusers" if "_class_name" in config else "transformers"
    class_name = config.get("_class_name") or architectures[0]
    if importlib.util.find_spec(library) is None or not class_name:
        return None
    model = skeleton(folder, library, class_name)
    return model if tensors_of(model).fit(shapes) else None
