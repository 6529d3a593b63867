"""The part of the contract that is about layers: a packed one behaves as the one it was."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lowbits
from lowbits.core.packed import PackedLayer, stored_bytes
from lowbits.core.scheme import EMBEDDING

if TYPE_CHECKING:
    from torch import Tensor

    from lowbits.core.backend import QuantBackend
    from lowbits.core.scheme import Scheme


class Model(nn.Module):
    """A layer of each kind, tied embeddings, a buffer, a norm, attention with a raw Parameter."""

    offset: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(32, 64)
            self.tied = nn.Embedding(32, 64)
            self.tied.weight = self.table.weight
            self.conv1 = nn.Conv1d(32, 32, 3, padding=1, groups=2)
            self.conv2 = nn.Conv2d(32, 32, 3, padding=1, stride=2)
            self.conv3 = nn.Conv3d(32, 32, 1)
            self.norm = nn.LayerNorm(64)
            self.blocks = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64, bias=False)])
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.register_buffer("offset", torch.randn(64))

    def forward(self, tokens: Tensor) -> Tensor:
        """Run ``(batch, 32)`` tokens through every layer; returns ``(batch, 32, 64)``."""
        x = self.table(tokens) + self.tied(tokens.flip(1)) + self.offset
        x = x + self.conv1(x)
        x = (
            x
            + self.conv2(x[..., None].expand(-1, -1, -1, 2))[..., :1].repeat_interleave(2, 2)[
                ..., 0
            ]
        )
        x = self.norm(x + self.conv3(x[..., None, None])[..., 0, 0])
        x = x + self.blocks[1](torch.relu(self.blocks[0](x)))
        y: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return y


def tokens(batch: int = 2) -> Tensor:
    """Return fixed inputs of `Model`, ``(batch, 32)``."""
    return torch.arange(batch * 32).view(batch, 32) * 7 % 32


def packed_model(scheme: str) -> tuple[Model, lowbits.Handle]:
    """Return a model with every layer packed that the scheme can hold."""
    model = Model().eval()
    return model, lowbits.quantize(model, scheme, rules={"*": scheme}, keep_source="memory")


def dense_twin(model: Model) -> Model:
    """Return an ordinary model that holds the packed one's weights as quantized."""
    twin = copy.deepcopy(model)
    lowbits.dequantize(twin)
    return twin


def close(got: Tensor, expected: Tensor, scheme: Scheme) -> bool:
    """Compare two outputs: exactly up to rounding, or to a step of quantized activations."""
    tolerance = 0.1 if "dynamic" in scheme.name else 1e-5
    return float((got - expected).norm() / expected.norm()) <= tolerance


def check_forward_is_that_of_its_weights(backend: QuantBackend, scheme: Scheme) -> None:
    """Packed layers of every kind compute what their dequantized weights do, batch 0 included."""
    model, handle = packed_model(scheme.name)
    kinds = {layer.kind for layer in handle.report().packed}
    assert set(scheme.kinds) - {"Parameter"} <= kinds | {"Conv1d", "Conv3d"}
    with torch.no_grad():
        assert close(model(tokens()), dense_twin(model)(tokens()), scheme)
        assert model.blocks[0](torch.zeros(0, 64)).shape == (0, 96)


def check_restore_gives_everything_back(backend: QuantBackend, scheme: Scheme) -> None:
    """Undo: the same Parameter objects, classes, order, hooks and bits; no leaked attributes."""
    model = Model().eval()
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


def check_copies_are_packed_alike(backend: QuantBackend, scheme: Scheme) -> None:
    """Copies by deepcopy, pickle and torch.save give the same output, without the handle."""
    model, _ = packed_model(scheme.name)
    expected = model(tokens())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301 - made in the line
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(tokens()), expected)
        assert lowbits.handle(twin) is None
        ties = zip(twin.table.parameters(), twin.tied.parameters(), strict=True)
        assert all(a is b for a, b in ties), "tied weights must stay tied"


def check_state_dict_round_trip(backend: QuantBackend, scheme: Scheme) -> None:
    """The state dict is plain tensors, loads strictly, and is refused where it does not belong."""
    model, _ = packed_model(scheme.name)
    state = model.state_dict()
    assert all(type(value) in (torch.Tensor, nn.Parameter) for value in state.values())
    assert "blocks.0.weight" not in state
    assert state["blocks.0.weight"].shape == (96, 64)
    twin = Model(seed=1).eval()
    lowbits.quantize(twin, scheme.name, rules={"*": scheme.name})
    twin.load_state_dict(state)
    assert torch.equal(twin(tokens()), _with_buffers_of(model, twin)(tokens()))
    try:
        twin.load_state_dict(Model().state_dict())
    except RuntimeError as error:
        assert "full-precision weight" in str(error)  # noqa: PT017 - no pytest here
    else:
        raise AssertionError("full-precision weights were loaded into packed layers")


def _with_buffers_of(model: Model, other: Model) -> Model:
    model.offset = other.offset
    return model


def check_casts_keep_the_codes(backend: QuantBackend, scheme: Scheme) -> None:
    """`.half()` and `.to(dtype)` change the dtype that the layer answers and nothing stored."""
    model, _ = packed_model(scheme.name)
    layer: Any = model.blocks[0]
    codes, bits = layer.weight_qdata.clone(), stored_bytes(layer)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert next(layer.parameters()).dtype == dtype
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight_qdata, codes)
        assert stored_bytes(layer) == bits
        with torch.no_grad():
            y = model(tokens())
        assert y.dtype == dtype
        assert y.isfinite().all()


def check_gradients_pass_through(backend: QuantBackend, scheme: Scheme) -> None:
    """Inputs and biases get the gradients that the dequantized layer gives."""
    model, _ = packed_model(scheme.name)
    twin = dense_twin(model)
    grads = []
    for layer in (model.blocks[0], twin.blocks[0]):
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        layer(x).square().sum().backward()
        assert layer.bias.grad is not None
        assert x.grad is not None
        grads.append((x.grad, layer.bias.grad))
    for got, expected in zip(*grads, strict=True):
        assert close(got, expected, scheme)


def check_weights_are_read_only(backend: QuantBackend, scheme: Scheme) -> None:
    """Writes into a packed weight raise: they would be lost."""
    model, _ = packed_model(scheme.name)
    layer: Any = model.blocks[0]
    writes = (
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.copy_(torch.zeros(96, 64)),
        lambda: setattr(layer.weight, "data", torch.zeros(96, 64)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(96, 64))),
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
    """Packing twice raises, and changes nothing."""
    model, handle = packed_model(scheme.name)
    expected = model(tokens())
    try:
        lowbits.quantize(model, scheme.name)
    except lowbits.errors.AlreadyPatchedError:
        assert torch.equal(model(tokens()), expected)
        assert handle.is_active
        return
    raise AssertionError("a packed model was packed again")


def check_what_does_not_fit_is_reported(backend: QuantBackend, scheme: Scheme) -> None:
    """Layers that a scheme refuses are left alone with a reason, or fall back and say so."""
    model = nn.ModuleList(
        [nn.Linear(64, 96), nn.Linear(33, 160), nn.ConvTranspose2d(64, 64, 3), nn.Conv2d(64, 64, 1)]
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
