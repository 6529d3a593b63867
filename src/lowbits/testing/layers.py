"""The part of the contract that is about layers: packing, reading, and undoing it; the model."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

import lowbits
from lowbits.core.packed import PackedLayer
from lowbits.core.registry import DEFAULT
from lowbits.core.scheme import EMBEDDING, LINEAR

if TYPE_CHECKING:
    from torch import Tensor

    from lowbits.core.backend import QuantBackend
    from lowbits.core.scheme import Scheme


#: Width of `Model`'s attention, and of all of it but for schemes that want longer rows.
_WIDTH: Final = 64


class Model(nn.Module):
    """A layer of each kind, tied embeddings, a buffer, a norm, attention with a raw Parameter.

    Args:
        seed: of its weights.
        row_length: of ``table``, ``tied`` and ``blocks[0]``; 64 or more.
    """

    offset: Tensor

    def __init__(self, seed: int = 0, row_length: int = _WIDTH) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(32, row_length)
            self.tied = nn.Embedding(32, row_length)
            self.tied.weight = self.table.weight
            self.conv1 = nn.Conv1d(32, 32, 3, padding=1, groups=2)
            self.conv2 = nn.Conv2d(32, 32, 3, padding=1, stride=2)
            self.conv3 = nn.Conv3d(32, 32, 1)
            self.norm = nn.LayerNorm(row_length)
            self.blocks = nn.ModuleList(
                [nn.Linear(row_length, 96), nn.Linear(96, _WIDTH, bias=False)]
            )
            self.attention = nn.MultiheadAttention(_WIDTH, 4, batch_first=True)
            self.register_buffer("offset", torch.randn(row_length))

    def forward(self, tokens: Tensor) -> Tensor:
        """Run ``(batch, 32)`` tokens through every layer; returns ``(batch, 32, 64)``."""
        x = self.table(tokens) + self.tied(tokens.flip(1)) + self.offset
        x = x + self.conv1(x)
        # Not two columns: on a CPU with AMX, torch 2.13 convolves those to NaN in bfloat16.
        columns = x[..., None].expand(-1, -1, -1, 3)
        x = x + self.conv2(columns)[..., 0].repeat_interleave(2, 2)
        x = self.norm(x + self.conv3(x[..., None, None])[..., 0, 0])
        x = x[..., :_WIDTH] + self.blocks[1](torch.relu(self.blocks[0](x)))
        y: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return y


def tokens(batch: int = 2) -> Tensor:
    """Return fixed inputs of `Model`, ``(batch, 32)``."""
    return torch.arange(batch * 32).view(batch, 32) * 7 % 32


def random(*shape: int, seed: int) -> Tensor:
    """Return normally distributed values, the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return values.to(torch.get_default_device())


def row_length_for(scheme: Scheme) -> int:
    """Return a row length of 64 or more that a scheme can hold."""
    return math.lcm(_WIDTH, scheme.row_multiple)


def model_for(scheme_name: str, seed: int = 0) -> Model:
    """Return an ordinary model whose first Linear and Embedding the scheme can hold."""
    return Model(seed, row_length_for(DEFAULT.require(scheme_name)[1])).eval()


def packed_model(scheme: str, seed: int = 0) -> tuple[Model, lowbits.Handle]:
    """Return a model with every layer packed that the scheme can hold."""
    model = model_for(scheme, seed)
    # Beside the weights, whatever they are stored in, a LoRA is exactly what it is elsewhere.
    handle = lowbits.quantize(model, scheme, rules={"*": scheme}, lora="fp16", keep_source="memory")
    assert scheme_of(model.blocks[0]) == scheme
    return model, handle


def scheme_of(layer: Any) -> str:
    """Return the scheme of a packed layer's weight."""
    name: str = layer.lowbits_layouts["weight"].scheme
    return name


def inputs_of(layer: nn.Module, batch: int = 3) -> Tensor:
    """Return fixed inputs of a Linear, ``(batch, in_features)`` in -1..1."""
    assert isinstance(layer, nn.Linear)
    return torch.linspace(-1, 1, batch * layer.in_features).view(batch, -1)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that packed layers store, by name."""
    return {
        name: parameter.clone()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.is_floating_point()
    }


def same_codes(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Say whether a model stores bit for bit what it did at the time of `stored`."""
    now = stored(model)
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


def dense_twin(model: Model) -> Model:
    """Return an ordinary model that holds the packed one's weights as quantized."""
    twin = copy.deepcopy(model)
    lowbits.dequantize(twin)
    return twin


def close(got: Tensor, expected: Tensor, scheme: Scheme) -> bool:
    """Compare two outputs: exactly up to rounding, or to a step of quantized activations."""
    tolerance = 0.1 if "dynamic" in scheme.name else 1e-5
    return float((got - expected).detach().norm() / expected.detach().norm()) <= tolerance


def check_forward_is_that_of_its_weights(backend: QuantBackend, scheme: Scheme) -> None:
    """Packed layers of every kind compute what their dequantized weights do, batch 0 included."""
    model, handle = packed_model(scheme.name)
    kinds = {layer.kind for layer in handle.report().packed}
    lengths = {LINEAR: row_length_for(scheme), EMBEDDING: row_length_for(scheme), "Conv2d": 32 * 9}
    for kind, row_length in lengths.items():
        assert kind in kinds or scheme.refusal(kind, row_length), f"{kind} was left alone"
    with torch.no_grad():
        assert close(model(tokens()), dense_twin(model)(tokens()), scheme)
        assert model.blocks[0](inputs_of(model.blocks[0])[:0]).shape == (0, 96)


def check_restore_gives_everything_back(backend: QuantBackend, scheme: Scheme) -> None:
    """Undo: the same Parameter objects, classes, order, hooks and bits; no leaked attributes."""
    model = model_for(scheme.name)
    calls: list[str] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("hook"))
    expected = model(tokens())
    before = _anatomy(model)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    handle = lowbits.quantize(model, scheme.name, rules={"*": scheme.name}, keep_source="memory")
    assert [m for m in model.modules() if isinstance(m, PackedLayer)]
    handle.restore()
    assert _anatomy(model) == before
    assert all(torch.equal(bits[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(tokens()), expected)
    assert calls == ["hook"] * 2


def _anatomy(model: nn.Module) -> list[Any]:
    return [
        (fqn, id(m), type(m), [(k, id(v)) for k, v in m._parameters.items()], sorted(m.__dict__))
        for fqn, m in model.named_modules()
    ]


def check_weights_are_read_only(backend: QuantBackend, scheme: Scheme) -> None:
    """Writes into a packed weight raise: they would be lost."""
    model, _ = packed_model(scheme.name)
    layer: Any = model.blocks[0]
    zeros = torch.zeros(layer.weight.shape)
    writes = (
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.copy_(zeros),
        lambda: setattr(layer.weight, "data", zeros),
        lambda: setattr(layer, "weight", nn.Parameter(zeros)),
        lambda: layer.weight.__setitem__(0, 0.0),
    )
    before = layer.weight.clone()
    for write in writes:
        try:
            write()
        except lowbits.errors.PatchError:
            continue
        raise AssertionError("a write into a packed weight went through")
    assert torch.equal(layer.weight.clone(), before)


def check_second_apply_is_refused(backend: QuantBackend, scheme: Scheme) -> None:
    """Applying twice raises; quantizing twice as before does nothing."""
    model, handle = packed_model(scheme.name)
    expected = model(tokens())
    for again in (lowbits.apply, lowbits.quantize):
        other = scheme.name if again is lowbits.apply else _another(scheme)
        try:
            again(model, other, rules={"*": other})
        except lowbits.errors.AlreadyPatchedError:
            continue
        raise AssertionError("a packed model was packed again")
    assert lowbits.quantize(model, scheme.name, rules={"*": scheme.name}) is handle
    assert torch.equal(model(tokens()), expected)
    assert handle.is_active


def check_a_copy_is_packed_in_another_scheme(backend: QuantBackend, scheme: Scheme) -> None:
    """What nobody has the originals of is decoded layer by layer, with one warning, and undone."""
    model, _ = packed_model(scheme.name)
    copied = copy.deepcopy(model)
    before = {name: value.clone() for name, value in copied.state_dict().items()}
    dense = {fqn: packed.weight.clone() for fqn, packed in _packed_layers(copied)}
    again = lowbits.quantize(copied, scheme.name, rules={"*": scheme.name})
    assert not again.report().packed
    again.restore()
    other = _another(scheme)
    handle = lowbits.quantize(copied, other, rules={"*": other}, keep_source="memory")
    assert {row.scheme for row in handle.report().packed} == {other}
    for warning in handle.report().warnings:
        assert f"from {scheme.name} to {other}" in warning
    assert len(handle.report().warnings) == (scheme.code_bits < 16)
    for fqn, layer in _packed_layers(copied):
        if fqn not in dense:
            continue
        alone = nn.Linear(1, 1)
        alone.weight = nn.Parameter(dense[fqn].float().flatten(1))
        lowbits.quantize(alone, other)
        assert torch.equal(alone.weight.clone().view(dense[fqn].shape), layer.weight.float())
    assert copied.tied.weight_like is copied.table.weight_like
    assert copied(tokens()).isfinite().all()
    handle.restore()
    after = copied.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], value) for name, value in after.items())


def _another(scheme: Scheme) -> str:
    return "float8-e5m2" if scheme.name == "float8-e4m3fn" else "float8-e4m3fn"


def _packed_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (fqn, module)
        for fqn, module in model.named_modules()
        if isinstance(module, PackedLayer) and "weight" in module.lowbits_layouts
    ]


def check_what_does_not_fit_is_reported(backend: QuantBackend, scheme: Scheme) -> None:
    """Layers that a scheme refuses are left alone with a reason, or fall back and say so."""
    model = nn.ModuleList(
        [
            nn.Linear(row_length_for(scheme), 96),
            nn.Linear(33, 160),
            nn.ConvTranspose2d(64, 64, 3),
            nn.Conv2d(64, 64, 1),
        ]
    )
    handle = lowbits.quantize(model, scheme.name, rules={"*": scheme.name})
    rows = {row.fqn: row for row in handle.report().layers}
    assert rows["2"].scheme == "native"
    assert "ConvTranspose2d" in rows["2"].reason
    for fqn in ("1", "3"):
        assert rows[fqn].scheme == scheme.name or rows[fqn].reason
    assert EMBEDDING in scheme.kinds or EMBEDDING not in {
        row.kind for row in handle.report().packed
    }
