"""Quantization configs of diffusers and transformers as schemes.

They are recognized by their class's name, so that none of the libraries is imported for it: an
object of such a class can only exist where its library does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, final

import torch

from lowbits.config import scheme_name
from lowbits.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TORCHAO: Final[Mapping[str, str]] = {
    "Int8WeightOnlyConfig": "torchao-int8",
    "Int4WeightOnlyConfig": "torchao-int4",
    "Float8WeightOnlyConfig": "torchao-float8",
    "Int8DynamicActivationInt8WeightConfig": "torchao-int8-dynamic",
    "Float8DynamicActivationFloat8WeightConfig": "torchao-float8-dynamic",
}

#: Options of these that change what is stored, or what it is multiplied with.
_TORCHAO_STORAGE: Final = (
    *("group_size", "granularity", "weight_dtype", "activation_dtype"),
    *("act_mapping_type", "reduce_range", "int4_choose_qparams_algorithm"),
)


@final
@dataclass(frozen=True)
class Request:
    """What a config asks for.

    Attributes:
        scheme: name of the scheme.
        skip: globs of what it leaves alone.
        compute_dtype: that layers multiply in, or None.
    """

    scheme: str
    skip: tuple[str, ...] = ()
    compute_dtype: Any = None


def request_of(value: Any) -> Request:
    """Return what a scheme argument asks for: a name, an entry of Forge's menu, or a config object.

    Raises:
        ConfigError: it is none of these, or asks for what no scheme does.
    """
    if isinstance(value, Request):
        return value
    if isinstance(value, str):
        return Request(scheme_name(value))
    readers = {
        "BitsAndBytesConfig": _bitsandbytes,
        "TorchAoConfig": _torchao,
        "QuantoConfig": _quanto,
        "GGUFQuantizationConfig": _gguf,
    }
    reader = readers.get(type(value).__name__)
    if reader is None:
        raise ConfigError(
            f"scheme: got {value!r}, expected a scheme's name (lowbits.schemes() lists them), an "
            f"entry of Forge's menu, or one of {', '.join(readers)}, PipelineQuantizationConfig"
        )
    return reader(value)


def is_pipeline_config(value: Any) -> bool:
    """Say whether a value is diffusers' config for several components."""
    return type(value).__name__ == "PipelineQuantizationConfig"


def component_requests(config: Any) -> dict[str, Any]:
    """Return the config of each component that a `PipelineQuantizationConfig` names."""
    if config.quant_mapping:
        return dict(config.quant_mapping)
    if not config.components_to_quantize:
        raise ConfigError(
            "PipelineQuantizationConfig: give quant_mapping, or components_to_quantize; or name "
            "the components in lowbits.apply(components=...)"
        )
    return dict.fromkeys(config.components_to_quantize, _backend_config(config))


def _backend_config(config: Any) -> Request:
    """Return what the options of a backend ask for, which diffusers makes a config of."""
    if config.quant_backend not in _BACKENDS:
        raise ConfigError(
            f"PipelineQuantizationConfig: quant_backend {config.quant_backend!r} does not name a "
            "scheme; use quant_mapping with one config for each component"
        )
    reader, usual = _BACKENDS[config.quant_backend]
    return reader(SimpleNamespace(**{**usual, **(config.quant_kwargs or {})}))


def _four_bit(kind: str, *, nested: bool, dtype: Any) -> Request:
    if nested and kind != "nf4":
        raise ConfigError(
            "BitsAndBytesConfig: double quantization is offered for nf4 only (bnb-nf4-dq)"
        )
    return Request(f"bnb-{kind}{'-dq' if nested else ''}", compute_dtype=dtype)


def _bitsandbytes(config: Any) -> Request:
    skip = _globs(config.llm_int8_skip_modules)
    if config.load_in_8bit:
        return Request("bnb-int8", skip)
    if not config.load_in_4bit:
        raise ConfigError("BitsAndBytesConfig: neither load_in_4bit nor load_in_8bit is set")
    dtype = config.bnb_4bit_compute_dtype
    request = _four_bit(
        config.bnb_4bit_quant_type,
        nested=config.bnb_4bit_use_double_quant,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
    )
    return Request(request.scheme, skip, request.compute_dtype)


def _torchao(config: Any) -> Request:
    kind = type(config.quant_type).__name__
    if kind not in _TORCHAO:
        raise ConfigError(f"TorchAoConfig: no scheme does {kind}; known: {', '.join(_TORCHAO)}")
    default = type(config.quant_type)()
    for option in _TORCHAO_STORAGE:
        wanted, usual = getattr(config.quant_type, option, None), getattr(default, option, None)
        if wanted != usual and not _is_by_row(wanted):
            raise ConfigError(
                f"TorchAoConfig: {kind}({option}={wanted}) is not offered, {usual} is"
            )
    return Request(_TORCHAO[kind], _globs(config.modules_to_not_convert))


def _is_by_row(granularity: Any) -> bool:
    """Say whether that is how schemes store weights; torchao's usual one may be coarser."""
    parts = granularity if isinstance(granularity, (list, tuple)) else [granularity]
    return all(type(part).__name__ == "PerRow" and part.dim == -1 for part in parts)


def _quanto(config: Any) -> Request:
    if (activations := getattr(config, "activations", None)) is not None:
        raise ConfigError(f"QuantoConfig: no scheme does activations={activations!r}")
    kind = getattr(config, "weights_dtype", None) or config.weights
    return Request(f"quanto-{kind}", _globs(config.modules_to_not_convert))


def _gguf(config: Any) -> Request:  # noqa: ARG001 - one of the readers
    raise ConfigError(
        "GGUFQuantizationConfig names no type, its file does: name a scheme, e.g. 'gguf-q8_0'"
    )


def _globs(names: Any) -> tuple[str, ...]:
    """Return globs that match as diffusers' lists do: a name is a part of the dotted name."""
    return tuple(glob for name in names or () for glob in (name, f"*.{name}"))


_BNB: Final[Mapping[str, Any]] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "llm_int8_skip_modules": None,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": None,
}

#: Who reads a backend's options, and what they are where none is given.
_BACKENDS: Final[Mapping[str, tuple[Callable[[Any], Request], Mapping[str, Any]]]] = {
    "bitsandbytes_4bit": (_bitsandbytes, {**_BNB, "load_in_4bit": True}),
    "bitsandbytes_8bit": (_bitsandbytes, {**_BNB, "load_in_8bit": True}),
    "quanto": (_quanto, {"weights_dtype": "int8", "modules_to_not_convert": None}),
    "torchao": (_torchao, {"quant_type": None, "modules_to_not_convert": None}),
}
