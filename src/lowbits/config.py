"""The options of `lowbits.apply`, each with its help: the one source for every interface."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.errors import ConfigError, suggestion
from lowbits.progress import CancelToken, ProgressCallback

if TYPE_CHECKING:
    import torch  # not at run time: a command line's help needs the texts and not torch

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?")

#: How streamed weights are copied, and where they wait: the last two are names of other projects.
SWAPS: Final = ("auto", "queue", "async")
LOCATIONS: Final = ("auto", "cpu", "shared", "disk", "pageable", "pinned")

#: What Forge appends to an entry of its menu where LoRA adapters stay beside the weights.
FP16_LORA: Final = " (fp16 LoRA)"

#: Entries of Forge's "Diffusion in Low Bits" menu whose names are not a scheme's.
_FORGE: Final = {"Automatic": "native"}


def _option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@final
@dataclass(frozen=True)
class LowbitsConfig:
    """Everything `lowbits.apply` can be told, as one value.

    Example:
        >>> LowbitsConfig(scheme="bnb-nf4", keep_source="none").scheme
        'bnb-nf4'
    """

    scheme: Any = _option("native", "scheme that weights are packed in, see lowbits.schemes()")
    components: Mapping[str, Any] | Sequence[str] | None = _option(
        None, "components to pack, or a scheme for each; default: denoiser and large text encoders"
    )
    rules: Mapping[str, Any] | None = _option(
        None, "scheme by glob over layer names; the last match counts"
    )
    skip: Sequence[str] = _option((), "globs over layer names that are left alone")
    device: torch.device | str | None = _option(
        None, "device that the target runs on; default: the accelerator if there is one"
    )
    compute_dtype: torch.dtype | None = _option(
        None, "dtype that packed layers multiply in; default: what is fast on the device"
    )
    gpu_weights: int | str = _option(
        "auto",
        "weights on the device, at most: a size as '6GB', 'all', or 'auto', which streams only "
        "what does not fit",
    )
    reserve: int | str = _option(
        "auto", "device memory that gpu_weights='auto' leaves free for activations"
    )
    swap: str = _option(
        "auto",
        "how streamed weights are copied: one by one, or ahead of their use",
        SWAPS,
    )
    location: str = _option(
        "auto",
        "where streamed weights wait: host memory, page-locked host memory, or a file",
        LOCATIONS,
    )
    lora: str = _option(
        "auto",
        "where a LoRA acts: beside packed weights at 16 bits, or merged into them; auto merges "
        "only into weights stored in 16 bits or more",
        ("auto", "fp16", "merge"),
    )
    keep_source: str = _option(
        "auto", "where originals are kept for restore()", ("auto", "memory", "file", "none")
    )
    source: str | Path | None = _option(
        None, "safetensors file or folder that the weights were loaded from"
    )
    never_oom: Collection[str] = _option(
        (),
        "what must not run out of memory: no block of the 'denoiser' stays on the device, and the "
        "'vae' always works in tiles",
        ("denoiser", "vae"),
    )
    on_requantize: str = _option(
        "warn",
        "what to do where weights are in low bits already, and would be quantized a second time",
        ("warn", "error", "allow"),
    )
    progress: ProgressCallback | None = _option(None, "called after each packed layer")
    cancel: CancelToken | None = _option(None, "stops the operation between two layers when set")

    def __post_init__(self) -> None:
        for item in fields(self):
            if choices := item.metadata["choices"]:
                value = getattr(self, item.name)
                is_one = isinstance(value, str) or not isinstance(value, Collection)
                for one in (value,) if is_one or item.default != () else value:
                    require_choice(item.name, one, choices)
        for option, words in (("gpu_weights", ("auto", "all")), ("reserve", ("auto",))):
            value = getattr(self, option)
            if value not in words:
                # The one place where a frozen field is set: sizes are ints from here on.
                object.__setattr__(self, option, parse_size(value, option, words))
        self._require_types()

    def require_default(self, why: str) -> None:
        """Raise `ConfigError` where an option is not as by default, but the scheme; and why."""
        for item in fields(self)[1:]:
            if getattr(self, item.name) != item.default:
                raise ConfigError(f"{item.name}: {why}")

    def _require_types(self) -> None:
        """Raise `ConfigError` where a value has no chance of being one."""
        if self.scheme is None:
            raise ConfigError("scheme: got None, expected one as 'bnb-nf4'; 'native' packs nothing")
        for option in ("components", "skip", "never_oom"):
            value = getattr(self, option)
            if isinstance(value, str):
                raise ConfigError(
                    f"{option}: got the string {value!r}, expected a sequence of them"
                )
            if value is not None or option != "components":
                _require_strings(option, value)
        if self.rules is not None and not isinstance(self.rules, Mapping):
            raise ConfigError(f"rules: got {self.rules!r}, expected a scheme by glob, as a dict")
        _require_strings("rules", self.rules or {})
        require_dtype("compute_dtype", self.compute_dtype)
        if self.source is not None and not isinstance(self.source, str | PathLike):
            raise ConfigError(f"source: got {self.source!r}, expected a path")
        if self.progress is not None and not callable(self.progress):
            raise ConfigError(f"progress: got {self.progress!r}, expected a function")
        if self.cancel is not None and not isinstance(self.cancel, CancelToken):
            raise ConfigError(f"cancel: got {self.cancel!r}, expected a lowbits.CancelToken")


def _require_strings(option: str, value: Any) -> None:
    if not isinstance(value, Collection) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{option}: got {value!r}, expected strings, as ['0', 'blocks.*']")


def require_dtype(option: str, value: Any, expected: str = "one as torch.bfloat16") -> None:
    """Raise `ConfigError` where a value is neither None nor a dtype that can be computed in."""
    if value is None or (getattr(value, "is_floating_point", False) and value.itemsize > 1):
        return
    raise ConfigError(f"{option}: got {value!r}, expected {expected}")


def require_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ConfigError` where a value is not among the choices."""
    if value not in choices:
        raise ConfigError(
            f"{option}: got {value!r}, expected one of {', '.join(choices)}"
            f"{suggestion(value, choices) if isinstance(value, str) else ''}"
        )


def parse_size(value: Any, option: str, words: Sequence[str] = ()) -> int:
    """Return a size in bytes: ``6_000_000_000``, ``"6GB"`` (1e9), ``"6GiB"`` (2**30), ``"512 MB"``.

    Args:
        value: of the option.
        option: its name, for the message.
        words: that would do in place of a size, for the message.

    Raises:
        ConfigError: not a size.

    Example:
        >>> parse_size("1.5KiB", "budget")
        1536
    """
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if is_whole and not isinstance(value, bool) and value >= 0:
        return int(value)
    match = _SIZE.fullmatch(value.strip().upper()) if isinstance(value, str) else None
    if match is None:
        others = "".join(f", or {word!r}" for word in words)
        raise ConfigError(
            f"{option}: got {value!r}, expected bytes or a size as '6GB' or '512MiB'{others}"
        )
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(Decimal(number) * (1024 if binary else 1000) ** power)


def scheme_name(value: str) -> str:
    """Return the scheme that a string means: a scheme's name, or an entry of Forge's menu.

    Forge's suffix ``" (fp16 LoRA)"`` says that a LoRA stays beside the weights: on packed layers it
    always does.

    Example:
        >>> scheme_name("bnb-nf4 (fp16 LoRA)")
        'bnb-nf4'
    """
    name = value.removesuffix(FP16_LORA)
    return _FORGE.get(name, name)
