"""Packed layers: the same objects, holding plain tensors instead of a weight.

[Note: packed layers]
A packed layer is the layer that was there before, with its class set to a subclass and its weight
replaced, in ``_parameters``, by frozen Parameters that safetensors, deepcopy, a streamer and
``.to()`` handle without knowing what they are:

    weight_like    shape (0,), the weight's dtype and device: the first thing that queries find
    weight_qdata   codes, as integers
    weight_scale   scales, as *integers* of the same width, which no cast of floats changes

``layer.weight`` reads as a `WeightProxy`. Names, hooks and references to the layer stay valid.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
from torch import Tensor, nn

from lowbits.core import functional
from lowbits.core.backend import Packed, QuantBackend
from lowbits.core.capability import compute_dtype
from lowbits.core.memory import PRODUCT_WEIGHTS, storage_bytes
from lowbits.core.proxy import WeightProxy
from lowbits.core.state import PackedMetadata
from lowbits.errors import FormatError, PatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LAYOUT_VERSION: Final = 1

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@final
@dataclass(frozen=True)
class Field:
    """One stored tensor: its Parameter's name, the dtype of its values, the dtype it is held in."""

    name: str
    parameter: str
    dtype: torch.dtype
    storage_dtype: torch.dtype


@final
@dataclass(frozen=True)
class Layout:
    """How a weight is stored in a layer's Parameters.

    Attributes:
        scheme: name of the scheme.
        backend: its codec.
        shape: of the weight as the layer sees it.
        rows: the weight as ``(rows, row_length)``, as the backend sees it.
        fields: the stored tensors.
        row_sliceable: whether dim 0 of each is dim 0 of the weight.
        compute_dtype: that the layer multiplies in; None: what is fast on its device.
        keeps_fp32: where that is float16 in place of bfloat16, this layer stays in float32.
    """

    scheme: str
    backend: QuantBackend
    shape: torch.Size
    rows: tuple[int, int]
    fields: tuple[Field, ...]
    row_sliceable: bool
    compute_dtype: torch.dtype | None = None
    keeps_fp32: bool = False
    version: int = LAYOUT_VERSION

    def stamp(self) -> Tensor:
        """Return what identifies the stored bytes, as uint8 JSON: part of the state dict."""
        text = json.dumps({"version": self.version, "scheme": self.scheme, "shape": [*self.shape]})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that values are held in: integers where they are floating."""
    return _INTEGERS[dtype.itemsize] if dtype.is_floating_point else dtype


def storage_form(
    name: str, packed: Packed, backend: QuantBackend, shape: torch.Size
) -> tuple[Layout, dict[str, Tensor]]:
    """Return the layout of a packed weight, and its tensors by Parameter name, as integers."""
    fields, tensors = [], {}
    for field_name, tensor in packed.tensors.items():
        field = Field(field_name, f"{name}_{field_name}", tensor.dtype, storage_dtype(tensor.dtype))
        fields.append(field)
        tensors[field.parameter] = tensor.contiguous().view(field.storage_dtype)
    layout = Layout(
        packed.scheme, backend, shape, packed.shape, tuple(fields), packed.row_sliceable
    )
    return layout, tensors


def marker_name(name: str) -> str:
    """Return the name of the marker Parameter of a packed weight."""
    return f"{name}_like"


@final
class Layouts(dict[str, Layout]):
    """The layouts of a layer's packed weights by name, and the proxies that were read of them.

    Copies and pickles have proxies of their own.
    """

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        super().__init__(layouts)
        self.proxies: dict[str, tuple[object, object, object, WeightProxy]] = {}

    def __reduce__(self) -> tuple[type[Layouts], tuple[dict[str, Layout]]]:
        return Layouts, (dict(self),)


class PackedLayer(nn.Module):
    """What packed layers of all kinds share; a mix-in in front of the layer's own class.

    It adds no public method: it may stand in front of a class that has one of that name.
    """

    lowbits_base: type[nn.Module]
    lowbits_names: tuple[str, ...]
    lowbits_layouts: Layouts

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an ordinary layer: adapter libraries call ``type(layer)(in_features, ...)``."""
        return cls.lowbits_base(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).lowbits_names:
            if value is getattr(self, name):
                return  # peft gives a layer that it unwraps its own weight
            scheme = self.lowbits_layouts[name].scheme
            raise PatchError(
                f"cannot set {name!r} of a {type(self).lowbits_base.__name__} stored as {scheme}; "
                "call lowbits.restore(target) first, or lowbits.dequantize(layer)"
            )
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter; a packed weight's proxy is none (`torch.nn.utils.prune`)."""
        if isinstance(param, WeightProxy):
            raise PatchError(
                f"cannot keep a packed weight as {name!r} of a "
                f"{type(self).lowbits_base.__name__}: it is read only; call "
                "lowbits.restore(target) first, or lowbits.dequantize(layer)"
            )
        super().register_parameter(name, param)

    def get_extra_state(self) -> Tensor:
        """Return the layouts' stamps: a state dict says which scheme its bytes are in."""
        return torch.cat([layout.stamp() for layout in self.lowbits_layouts.values()])

    def set_extra_state(self, state: Any) -> None:
        """Accept a stamp; it was compared before anything was loaded."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,  # noqa: FBT001 - torch's signature
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load stored tensors, reinterpreting and never converting them."""
        problems = _load_problems(self, state_dict, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        for layout in self.lowbits_layouts.values():
            for field in layout.fields:
                key = prefix + field.parameter
                if key in state_dict and state_dict[key].dtype != field.storage_dtype:
                    state_dict[key] = state_dict[key].view(field.storage_dtype)
        if not _holds_these_bytes(self, state_dict, prefix):
            # Another object says that the journal's originals are no longer this layer's.
            self.__dict__["lowbits_layouts"] = Layouts(self.lowbits_layouts)
        metadata = dict(local_metadata)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 - torch's signature
    ) -> None:
        """Save stored tensors; an ordinary layer, which would read none of them, is told."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata, name = getattr(destination, "_metadata", {}), prefix.removesuffix(".")
        if name in metadata:
            metadata[name] = PackedMetadata(metadata[name], name, self._schemes())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        return _new_packed, (cls.lowbits_base, cls.lowbits_names), self.__dict__.copy()

    def _get_name(self) -> str:
        return f"Packed{type(self).lowbits_base.__name__}"

    def extra_repr(self) -> str:
        """Add the schemes to the layer's own description."""
        return ", ".join(
            part for part in (super().extra_repr(), f"scheme={self._schemes()}") if part
        )

    def _schemes(self) -> str:
        return ", ".join(sorted({layout.scheme for layout in self.lowbits_layouts.values()}))


def packed_weight(layer: PackedLayer, name: str = "weight") -> Packed:
    """Return a packed weight of a layer; its tensors are the layer's own.

    Raises:
        FormatError: something cast the stored integers, so that the weight is lost.
    """
    return _packed_in(layer._parameters, layer.lowbits_layouts[name])


def _packed_in(parameters: Mapping[str, Any], layout: Layout) -> Packed:
    """Return stored tensors in the dtypes that their values have."""
    values = {}
    for field in layout.fields:
        tensor = parameters[field.parameter]
        if tensor.dtype != field.storage_dtype:
            raise FormatError(_cast_message(layout, field, tensor))
        is_stored_so = field.dtype == field.storage_dtype
        values[field.name] = tensor if is_stored_so else tensor.view(field.dtype)
    return Packed(layout.scheme, layout.rows, values, layout.row_sliceable)


def dequantized(
    layer: PackedLayer, name: str = "weight", dtype: torch.dtype | None = None
) -> Tensor:
    """Return a packed weight's values; a copy in ``dtype``, or in the weight's own."""
    layout = layer.lowbits_layouts[name]
    dtype = dtype or _marker(layer, name).dtype
    return layout.backend.unpack(packed_weight(layer, name), dtype).view(layout.shape)


#: `dequantized`, out of graphs, of what is streamed.
_dequantized_apart: Final[Callable[..., Tensor]] = torch.compiler.disable(dequantized)  # type: ignore[no-untyped-call]


def read_weight(layer: PackedLayer, name: str = "weight") -> Tensor:
    """Return what an attribute read of a packed weight gives: a proxy."""
    if torch.compiler.is_compiling():
        # A compiler cannot look into the proxy; it drops what is not used.
        stored = layer._parameters[layer.lowbits_layouts[name].fields[0].parameter]
        is_here = type(stored) is nn.Parameter
        return dequantized(layer, name) if is_here else _dequantized_apart(layer, name)
    # The dictionary, not what is in it now: a streamed weight is elsewhere by the time it is used.
    # A layer that is restored gets another one.
    parameters: dict[str, Any] = layer._parameters
    marker, layouts = parameters[marker_name(name)], layer.lowbits_layouts
    known = layouts.proxies.get(name)
    if known and known[0] is parameters and known[1:3] == (marker.dtype, marker.device):
        return known[3]  # adapter libraries read it dozens of times per layer
    layout = layouts[name]

    def read() -> Packed:
        return _packed_in(parameters, layout)

    # Not called: a metaclass takes time.
    proxy = WeightProxy.__new__(
        WeightProxy, read, layout.scheme, layout.backend, layout.shape, marker
    )
    if not torch.is_inference_mode_enabled():  # what is made there is of no use elsewhere
        layouts.proxies[name] = (parameters, marker.dtype, marker.device, proxy)
    return proxy


def stored_names(layer: PackedLayer, name: str = "weight") -> tuple[str, ...]:
    """Return the names of the Parameters that hold a packed weight, and of its marker."""
    fields = layer.lowbits_layouts[name].fields
    return (marker_name(name), *(field.parameter for field in fields))


def stored_bytes(layer: PackedLayer, name: str = "weight") -> int:
    """Return the bytes of the storages that hold a packed weight."""
    return storage_bytes(cast("Tensor", layer._parameters[n]) for n in stored_names(layer, name))


def workspace_bytes(root: nn.Module) -> int:
    """Return what the largest packed weight of a model takes while it is decoded for a product.

    On a CPU a part of it at a time; elsewhere all of it, from the device's allocator.
    """
    sizes = [0]
    for layer in root.modules():
        if not isinstance(layer, PackedLayer):
            continue
        for name, layout in layer.lowbits_layouts.items():
            marker, weights = _marker(layer, name), layout.shape.numel()
            dtype = layout.compute_dtype or marker.dtype
            is_cpu = marker.device.type == "cpu"
            sizes.append(min(weights, PRODUCT_WEIGHTS) * 4 if is_cpu else weights * dtype.itemsize)
    return max(sizes)


def _marker(layer: PackedLayer, name: str) -> Tensor:
    return cast("Tensor", layer._parameters[marker_name(name)])


def _compute_dtype(layer: PackedLayer) -> torch.dtype:
    marker = _marker(layer, "weight")
    layout = layer.lowbits_layouts["weight"]
    explicit = layout.compute_dtype
    if explicit is not None:
        is_too_narrow = layout.keeps_fp32 and explicit == torch.float16 != marker.dtype
        return torch.float32 if is_too_narrow else explicit
    return compute_dtype(marker.device, marker.dtype, keeps_fp32=layout.keeps_fp32)


def _cast_message(layout: Layout, field: Field, tensor: Tensor) -> str:
    return (
        f"{field.parameter} of a layer stored as {layout.scheme} was cast to {tensor.dtype}; "
        f"expected {field.storage_dtype}: its bytes are lost. Use module.to(dtype), which keeps "
        "them, instead of casting Parameters one by one"
    )


def _load_problems(layer: PackedLayer, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """Say why a state dict cannot be loaded into a packed layer."""
    problems = []
    for name, layout in layer.lowbits_layouts.items():
        if prefix + name in state_dict:
            problems.append(
                f"{prefix}{name} is a full-precision weight, and the layer is stored as "
                f"{layout.scheme}: load it before packing, or after lowbits.restore"
            )
        for field in layout.fields:
            value = state_dict.get(prefix + field.parameter)
            if value is not None and value.dtype not in (field.dtype, field.storage_dtype):
                problems.append(
                    f"{prefix}{field.parameter} has dtype {value.dtype}, expected "
                    f"{field.storage_dtype}: values are never converted on loading"
                )
    stamp = state_dict.get(prefix + "_extra_state")
    if stamp is not None:
        found, wanted = (bytes(s.tolist()).decode() for s in (stamp, layer.get_extra_state()))
        if found != wanted:
            problems.append(f"{prefix[:-1]}: the state dict holds {found}, the layer is {wanted}")
    return problems


def _holds_these_bytes(layer: PackedLayer, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Say whether loading a state dict would change nothing that is stored."""
    for layout in layer.lowbits_layouts.values():
        for field in layout.fields:
            new, old = state_dict.get(prefix + field.parameter), layer._parameters[field.parameter]
            if new is None or old is None:
                continue
            if new.is_meta or old.is_meta or not torch.equal(new.to(old.device), old):
                return False
    return True


def _is_packed(layer: nn.Module) -> bool:
    """Say whether a layer is packed still: others may have kept a packed one's bound forward."""
    return "lowbits_layouts" in layer.__dict__


def _proxy_property(name: str) -> property:
    def read(self: PackedLayer) -> Tensor:
        return read_weight(self, name)

    return property(read, doc=f"The packed {name}, as a read-only `WeightProxy`.")


class PackedLinear(PackedLayer, nn.Linear):
    """A packed `torch.nn.Linear`."""

    lowbits_base = nn.Linear
    lowbits_names = ("weight",)
    weight = _proxy_property("weight")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Compute ``input @ weight.T + bias`` in the dtype that is fast here; in input's dtype."""
        if not _is_packed(self):
            return nn.Linear.forward(self, input)
        backend = self.lowbits_layouts["weight"].backend
        return functional.linear(
            input, packed_weight(self), self.bias, backend, _compute_dtype(self)
        )


class _PackedConv(PackedLayer):
    """A packed convolution: the weight is dequantized whole, its row is an output channel."""

    lowbits_names = ("weight",)
    weight = _proxy_property("weight")
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Convolve in the dtype that is fast here; in input's dtype."""
        if not _is_packed(self):
            return self._conv_forward(input, self.weight, self.bias)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._conv_forward(x, weight.view(layout.shape), bias)

        layout = self.lowbits_layouts["weight"]
        return functional.convolution(
            input, packed_weight(self), self.bias, layout.backend, _compute_dtype(self), convolve
        )


class PackedConv1d(_PackedConv, nn.Conv1d):
    """A packed `torch.nn.Conv1d`."""

    lowbits_base = nn.Conv1d


class PackedConv2d(_PackedConv, nn.Conv2d):
    """A packed `torch.nn.Conv2d`."""

    lowbits_base = nn.Conv2d


class PackedConv3d(_PackedConv, nn.Conv3d):
    """A packed `torch.nn.Conv3d`."""

    lowbits_base = nn.Conv3d


class PackedEmbedding(PackedLayer, nn.Embedding):
    """A packed `torch.nn.Embedding`: only the rows that are looked up are decoded."""

    lowbits_base = nn.Embedding
    lowbits_names = ("weight",)
    weight = _proxy_property("weight")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Look rows up, in the weight's dtype."""
        if not _is_packed(self):
            return nn.Embedding.forward(self, input)
        backend = self.lowbits_layouts["weight"].backend
        return functional.embedding(
            input, packed_weight(self), backend, _marker(self, "weight").dtype
        )


_FAST: Final[tuple[type[PackedLayer], ...]] = (
    PackedLinear,
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedEmbedding,
)


def packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[PackedLayer]:
    """Return the packed subclass of a layer class; the same one each time, for compilers.

    A class that inherits its forward from one of torch's layers gets the fast one; any other keeps
    its forward, which finds proxies where it reads its weights. Both keep the class's name: device
    maps and offload hooks of accelerate go by names of classes.
    """
    return _packed_class(cast("Any", base), names)


@cache
def _packed_class(base: type[Any], names: tuple[str, ...]) -> type[PackedLayer]:
    for fast in _FAST:
        if names == ("weight",) and issubclass(base, fast.lowbits_base):
            if base is fast.lowbits_base:
                return fast
            if base.forward is fast.lowbits_base.forward:
                return type(base.__name__, (fast, base), {"lowbits_base": base})
    members = {name: _proxy_property(name) for name in names}
    members |= {"lowbits_base": base, "lowbits_names": names}  # type: ignore[dict-item]
    return type(base.__name__, (PackedLayer, base), members)


def _new_packed(base: type[nn.Module], names: tuple[str, ...]) -> PackedLayer:
    """Make an empty packed layer for pickle and deepcopy, which fill it."""
    return object.__new__(packed_class(base, names))
