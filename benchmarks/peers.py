"""The same layers in the libraries that the schemes come from, with their documented fast settings.

bitsandbytes computes in the inputs' dtype, torchao and quanto through their ``quantize_`` and
``quantize`` + ``freeze``, GGUF and the plain float8 cast in diffusers' `GGUFLinear` and layerwise
casting. Layers are changed in place, or replaced in their parents, as those libraries do it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

import lowbits

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_DERIVED: Final = re.compile(r"^gguf-(q\d_k_[sml]|.*-best)$")


@final
@dataclass(frozen=True)
class Peer:
    """Who else stores weights this way.

    Attributes:
        name: of the library and its layer.
        convert: ``(model, names, dtype)``: changes the layers of these names for inputs of a dtype.
    """

    name: str
    convert: Callable[[nn.Module, Collection[str], torch.dtype], None]


class NoPeerError(LookupError):
    """No library has such a layer."""


def peer_of(scheme: str) -> Peer:
    """Return the upstream layer of a scheme.

    Raises:
        NoPeerError: no library has one.
    """
    if scheme.startswith("gguf-"):
        name, _, effort = scheme.removeprefix("gguf-").partition("-")
        if name.upper() in _diffusers_types():
            return Peer("diffusers GGUFLinear", partial(_to_gguf, (name.upper(), effort)))
    if scheme not in _PEERS:
        raise NoPeerError("no library has such a layer")
    return _PEERS[scheme]


def packable_schemes() -> list[str]:
    """Return lowbits' own schemes that can be quantized to here, and that hold Linear layers.

    GGUF's mixes are left out, which store a layer in one of the other schemes, and the ``-best``
    schemes, whose bytes take as long to read as those of the schemes without it.
    """
    return [
        info.name
        for info in lowbits.schemes()
        if info.available and info.can_quantize and "Linear" in info.layer_kinds
        if info.name != "native"
        and not _DERIVED.search(info.name)
        and type(lowbits.backend(info.backend)).__module__.startswith("lowbits.backends.")
    ]


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all storages behind a model, inside of tensor subclasses too."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += _bitsandbytes_state(module)
    storages = {}
    for tensor in tensors:
        for plain in _plain(tensor):
            storage = plain.untyped_storage()
            storages[storage.data_ptr() or id(plain)] = storage.nbytes()
    return sum(storages.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.as_tensor() if type(tensor).__name__ == "GGUFParameter" else tensor.data  # type: ignore[attr-defined]
        return
    for name in flatten()[0]:
        yield from _plain(getattr(tensor, name))


def _bitsandbytes_state(module: nn.Module) -> list[Tensor]:
    """Return what bitsandbytes keeps beside the weight: scales, code books, nested ones too."""
    weight = module._parameters.get("weight")
    holders = [getattr(weight, "quant_state", None), getattr(module, "state", None)]
    holders += [getattr(holders[0], "state2", None)]
    names = ("absmax", "code", "offset", "CB", "SCB")
    found = [getattr(holder, name, None) for holder in holders for name in names]
    found += [getattr(weight, name, None) for name in ("CB", "SCB")]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _layers(
    model: nn.Module, names: Collection[str], kind: type[nn.Module] = nn.Linear
) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield parent, name in the parent, and layer."""
    for name in names:
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        layer = getattr(parent, child)
        if isinstance(layer, kind):
            yield parent, child, layer


def _require_all(model: nn.Module, names: Collection[str]) -> None:
    """Refuse a model of which not one layer can be replaced."""
    if not any(True for _ in _layers(model, names)):
        raise NoPeerError("this library has layers for Linear only")


def _to_bnb_4bit(
    model: nn.Module, names: Collection[str], dtype: torch.dtype, *, kind: str, nested: bool
) -> None:
    import bitsandbytes as bnb

    _require_all(model, names)
    for parent, child, layer in _layers(model, names):
        device = layer.weight.device
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=dtype,
            compress_statistics=nested,
            quant_type=kind,
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            compress_statistics=nested,
            quant_type=kind,
            module=new,
        )
        new.bias = layer.bias
        setattr(parent, child, new.to(device))


def _to_bnb_int8(model: nn.Module, names: Collection[str], _: torch.dtype) -> None:
    import bitsandbytes as bnb

    _require_all(model, names)
    for parent, child, layer in _layers(model, names):
        device = layer.weight.device
        new = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            has_fp16_weights=False,
            threshold=0.0,
            device="meta",
        )
        # It quantizes what moves from a CPU to its device, and nothing else.
        weight = layer.weight.data.cpu()
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        setattr(parent, child, new.to(device))


def _to_torchao(
    make_config: Callable[[torch.device], Any],
    model: nn.Module,
    names: Collection[str],
    _: torch.dtype,
) -> None:
    from torchao.quantization import quantize_

    _require_all(model, names)
    config = make_config(next(model.parameters()).device)
    quantize_(model, config, filter_fn=lambda m, fqn: isinstance(m, nn.Linear) and fqn in names)


def _torchao_config(name: str, **options: Any) -> Callable[[torch.device], Any]:
    def make(_: torch.device) -> Any:
        from torchao import quantization

        given = {key: value() if callable(value) else value for key, value in options.items()}
        return getattr(quantization, name)(**given)

    return make


def _per_row() -> Any:
    from torchao.quantization import PerRow

    return PerRow()


def _torchao_int4(device: torch.device) -> Any:
    """Return the packing that has a kernel on the device: tinygemm's tiles, or the CPU's."""
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=128)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")


def _to_quanto(qtype_name: str, model: nn.Module, names: Collection[str], _: torch.dtype) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, qtype_name), include=list(names))
    quanto.freeze(model)


def _to_layerwise_casting(
    storage: torch.dtype, model: nn.Module, names: Collection[str], dtype: torch.dtype
) -> None:
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

    for _, _, layer in _layers(model, names, nn.Module):
        apply_layerwise_casting_hook(layer, storage, dtype, non_blocking=False)


def _diffusers_types() -> tuple[str, ...]:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    return tuple(qtype.name for qtype in dequantize_functions)


def gguf_bytes(weight: Tensor, type_name: str, effort: str = "") -> Tensor:
    """Quantize to GGUF blocks: with the ``gguf`` package where it can, else with lowbits.

    Args:
        weight: ``(rows, columns)``.
        type_name: ggml's name, e.g. ``"Q4_K"``.
        effort: of lowbits' quantizer, which is asked first where one is given.

    Returns:
        ``(rows, row_bytes)`` uint8 on the weight's device.
    """
    import gguf

    values, qtype = weight.detach().float(), gguf.GGMLQuantizationType[type_name]
    try:
        if not effort:
            packed = gguf.quants.quantize(values.cpu().numpy(), qtype)
            return torch.from_numpy(packed).to(weight.device)
    except NotImplementedError:
        effort = "ref"
    backend: Any = lowbits.backend("gguf")
    encoded: Tensor = backend.encode(values, type_name, effort=effort)
    return encoded


def _to_gguf(
    kind: tuple[str, str], model: nn.Module, names: Collection[str], dtype: torch.dtype
) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    _require_all(model, names)
    qtype = gguf.GGMLQuantizationType[kind[0]]
    for parent, child, layer in _layers(model, names):
        new = GGUFLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=dtype,
            device="meta",
        )
        new.weight = GGUFParameter(gguf_bytes(layer.weight, *kind), quant_type=qtype)
        new.bias = layer.bias
        setattr(parent, child, new)


def _torchao(name: str, **options: Any) -> Peer:
    return Peer(f"torchao {name}", partial(_to_torchao, _torchao_config(name, **options)))


def _cast(storage: torch.dtype) -> Peer:
    return Peer("diffusers layerwise casting", partial(_to_layerwise_casting, storage))


_PEERS: Final = {
    "bnb-nf4": Peer("bitsandbytes Linear4bit", partial(_to_bnb_4bit, kind="nf4", nested=False)),
    "bnb-nf4-dq": Peer("bitsandbytes Linear4bit", partial(_to_bnb_4bit, kind="nf4", nested=True)),
    "bnb-fp4": Peer("bitsandbytes Linear4bit", partial(_to_bnb_4bit, kind="fp4", nested=False)),
    "bnb-int8": Peer("bitsandbytes Linear8bitLt", _to_bnb_int8),
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-int4": Peer("torchao Int4WeightOnlyConfig", partial(_to_torchao, _torchao_int4)),
    "torchao-float8": _torchao("Float8WeightOnlyConfig"),
    "torchao-int8-dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8-dynamic": _torchao(
        "Float8DynamicActivationFloat8WeightConfig", granularity=_per_row
    ),
    "quanto-int8": Peer("quanto qint8", partial(_to_quanto, "qint8")),
    "quanto-int4": Peer("quanto qint4", partial(_to_quanto, "qint4")),
    "quanto-int2": Peer("quanto qint2", partial(_to_quanto, "qint2")),
    "quanto-float8": Peer("quanto qfloat8", partial(_to_quanto, "qfloat8")),
    "float8-e4m3fn": _cast(torch.float8_e4m3fn),
    "float8-e5m2": _cast(torch.float8_e5m2),
    "float8-e4m3fn-raw": _cast(torch.float8_e4m3fn),
    "float8-e5m2-raw": _cast(torch.float8_e5m2),
}
