"""Layers that other libraries quantized, taken over: the same values, nothing else of theirs."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from oracles import bitsandbytes_takes_blocks_across_rows, bitsandbytes_values
from torch import nn
from torch.nn import functional

import lowbits
from lowbits.core.packed import PackedLinear, packed_weight
from lowbits.core.surgery import Journal
from lowbits.errors import AlreadyPatchedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Make = type[nn.Module]
PLAIN = set(nn.Linear(1, 1).__dict__) | {"lowbits_layouts"}


class Model(nn.Module):
    """Two layers around a norm; the first one is a part of a list."""

    def __init__(self, make: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make(64, 96), nn.LayerNorm(96)])
        self.out = make(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.out(x)
        return y


def bnb_4bit(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        nn_of = pytest.importorskip("bitsandbytes").nn
        model = Model(lambda *args, **kwargs: nn_of.Linear4bit(*args, **kwargs, **options))
        return model.to("cpu").requires_grad_(requires_grad=False)

    return make


def bnb_int8() -> nn.Module:
    nn_of = pytest.importorskip("bitsandbytes").nn
    return Model(lambda *a, **k: nn_of.Linear8bitLt(*a, **k, has_fp16_weights=False)).to("cpu")


def torchao(config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        model = Model()
        quantization.quantize_(model, getattr(quantization, config)(**options))
        return model

    return make


def quanto(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("optimum.quanto")
        model = Model()
        library.quantize(model, weights=getattr(library, kind))
        library.freeze(model)
        return model

    return make


def gguf(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = pytest.importorskip("gguf")
        utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
        quant_type = package.GGMLQuantizationType[kind]
        backend: Any = lowbits.backend("gguf")

        def layer(inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
            made: nn.Module = utils.GGUFLinear(inputs, outputs, bias, torch.float32)
            data = backend.encode(torch.randn(outputs, inputs), kind)
            made.weight = utils.GGUFParameter(data, quant_type=quant_type)
            return made

        return Model(layer)

    return make


def theirs(layer: Any) -> Tensor:
    """Return what a layer's library decodes its weight to."""
    weight: Any = layer.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        values: Tensor = bitsandbytes_values(weight.data, weight.quant_state)
    elif kind == "Int8Params":
        state = layer.state if weight.SCB is None else weight
        values = weight.data.float() * (state.SCB.view(-1, 1) / 127)
    elif kind == "GGUFParameter":
        import gguf as package  # diffusers decodes in float16

        values = torch.from_numpy(package.dequantize(weight.as_tensor().numpy(), weight.quant_type))
    elif kind == "WeightQBitsTensor":  # its own decoder compiles C++
        data, bits = weight._data._data, weight._qtype.bits
        parts = [(data >> bits * i) & (2**bits - 1) for i in range(8 // bits)]
        codes = torch.cat(parts)[: weight._scale.shape[0]]
        values = (weight._scale * codes - weight._shift).view(weight.shape)
    else:
        values = weight.dequantize()
    return values.detach().float().clone()


CASES: list[tuple[str, Callable[[], nn.Module], float]] = [
    ("bnb-fp4", bnb_4bit(compress_statistics=False), 1e-5),
    ("bnb-nf4", bnb_4bit(quant_type="nf4", compress_statistics=False), 1e-5),
    ("bnb-nf4-dq", bnb_4bit(quant_type="nf4"), 1e-5),
    # bitsandbytes quantizes the activations as well.
    ("bnb-int8", bnb_int8, 0.1),
    ("torchao-int8", torchao("Int8WeightOnlyConfig"), 1e-5),
    ("torchao-int8-dynamic", torchao("Int8DynamicActivationInt8WeightConfig"), 0.1),
    ("torchao-float8", torchao("Float8WeightOnlyConfig"), 1e-5),
    ("quanto-int8", quanto("qint8"), 1e-5),
    ("quanto-float8", quanto("qfloat8_e4m3fn"), 1e-5),
    ("float8-e5m2", quanto("qfloat8_e5m2"), 1e-5),
    ("quanto-int4", quanto("qint4"), 1e-5),
    ("quanto-int2", quanto("qint2"), 1e-5),
    ("gguf-q8_0", gguf("Q8_0"), 1e-2),
    ("gguf-q4_0", gguf("Q4_0"), 1e-2),
]
every_case = pytest.mark.parametrize(("scheme", "make", "atol"), CASES, ids=[c[0] for c in CASES])


def reference(model: Any, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights as the library decodes them, and what they make of an input."""
    values = {name: theirs(model.get_submodule(name)) for name in ("layers.0", "out")}
    hidden = functional.linear(x, values["layers.0"], model.layers[0].bias)
    return values, functional.linear(model.layers[1](hidden), values["out"])


@every_case
def test_values_and_outputs_stay(
    scheme: str, make: Callable[[], nn.Module], atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a CPU without int8 products: a dynamic scheme does not round activations there.
    monkeypatch.setattr("lowbits.backends.torchao.int8_rows", lambda *_: None)
    model: Any = make()
    x = torch.randn(5, 64)
    values, expected = reference(model, x)
    is_4_bit = scheme.startswith(("bnb-nf4", "bnb-fp4"))
    is_wrong = is_4_bit and not bitsandbytes_takes_blocks_across_rows()
    before = expected if is_wrong or scheme.startswith("quanto-int") else model(x)
    report = lowbits.adopt(model)
    assert {layer.fqn for layer in report.packed} == {"layers.0", "out"}
    assert {layer.scheme for layer in report.packed} == {scheme}
    for name, value in values.items():
        layer = model.get_submodule(name)
        assert type(layer) is PackedLinear
        assert set(layer.__dict__) == PLAIN
        assert set(layer._buffers) == set()
        backend = layer.lowbits_layouts["weight"].backend
        assert torch.equal(backend.unpack(packed_weight(layer), torch.float32), value)
        assert torch.equal(layer.weight.float(), value)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("scheme", "make"), [c[:2] for c in CASES], ids=[c[0] for c in CASES])
@torch.no_grad()
def test_what_nobody_has_taken_over_is_left_as_it_is(
    scheme: str, make: Callable[[], nn.Module]
) -> None:
    model: Any = nn.Sequential(make(), nn.Linear(32, 16))
    x, compiles = torch.randn(5, 64), scheme.startswith(("quanto-int4", "quanto-int2"))
    expected = torch.zeros(0) if compiles else model(x)
    for budget in ("auto", "1MB"):
        with lowbits.apply(model, device="cpu", gpu_weights=budget) as owned:
            assert owned.stats().device == "cpu"
            assert compiles or torch.equal(model(x), expected)
    with lowbits.apply(model, "float8-e4m3fn", device="cpu", rules={"1": "float8-e4m3fn"}):
        assert isinstance(model[1], PackedLinear)
        assert not isinstance(model[0].layers[0], PackedLinear)


@every_case
def test_what_is_taken_over_is_packed_as_any_copy(
    scheme: str, make: Callable[[], nn.Module], atol: float
) -> None:
    model = make()
    lowbits.adopt(model)
    x = torch.randn(5, 64)
    y = model(x)
    assert lowbits.handle(model) is None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        twin.load_state_dict(model.state_dict())
    streamed = copy.deepcopy(model)
    with lowbits.apply(streamed, "native", device="cpu"):
        assert torch.equal(streamed(x), y)
    assert b"bitsandbytes" not in pickle.dumps(model)
    assert lowbits.adopt(model).packed == ()
    lowbits.dequantize(model)
    assert {type(layer) for layer in model.modules()} == {
        Model, nn.ModuleList, nn.Linear, nn.LayerNorm,
    }  # fmt: skip
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=max(atol, 1e-5))


def test_report_says_what_each_layer_is() -> None:
    model = torchao("Int8WeightOnlyConfig")()
    report = lowbits.adopt(model)
    rows = {layer.fqn: layer for layer in report.layers}
    assert set(rows) == {
        "layers.0", "layers.0.bias", "layers.1", "layers.1.bias", "out",
    }  # fmt: skip
    first = rows["layers.0"]
    assert (first.bytes_before, first.bytes_after) == (64 * 96 * 4, 64 * 96 + 96 * 4)
    assert (first.kind, first.shape) == ("Linear", (96, 64))
    assert first.reason == "as torchao quantized it"
    assert first.source == "none"
    assert not report.restorable
    assert rows["layers.1"].source == "-"


@pytest.mark.parametrize(
    ("mapping", "scheme", "reason"),
    [
        ("SYMMETRIC", "torchao-int8-dynamic", "as torchao quantized it"),
        (
            "ASYMMETRIC",
            "torchao-int8",
            "as torchao quantized it; inputs are not quantized any more: no scheme does it so",
        ),
    ],
)
def test_report_says_where_inputs_are_not_quantized_any_more(
    mapping: str, scheme: str, reason: str
) -> None:
    library = pytest.importorskip("torchao.quantization")
    how = library.MappingType[mapping]
    model = torchao("Int8DynamicActivationInt8WeightConfig", act_mapping_type=how)()
    row = lowbits.adopt(model).layers[0]
    assert (row.scheme, row.reason) == (scheme, reason)


@pytest.mark.parametrize("make", [bnb_4bit(quant_type="nf4"), torchao("Int8WeightOnlyConfig")])
def test_layers_stay_the_same_objects_with_their_hooks(make: Callable[[], nn.Module]) -> None:
    model: Any = make()
    seen: list[str] = []
    layer = model.out
    layer.register_forward_hook(lambda *_: seen.append("out"))
    lowbits.adopt(model)
    assert model.out is layer
    model(torch.randn(2, 64))
    assert seen == ["out"]


def test_quanto_layers_are_replaced_everywhere_with_their_hooks() -> None:
    """Python cannot set the class of a layer that was mixed with an ABC."""
    model: Any = quanto("qint8")()
    seen: list[str] = []
    model.out.register_forward_hook(lambda *_: seen.append("out"))
    model.again = model.out
    lowbits.adopt(model)
    assert model.again is model.out
    model(torch.randn(2, 64))
    assert seen == ["out"]


def test_a_quanto_layer_alone_is_left() -> None:
    model: Any = quanto("qint8")()
    row = lowbits.adopt(model.out).layers[0]
    assert row.reason == "a QLinear can only be taken over in a module"
    assert type(model.out).__name__ == "QLinear"


def test_int8_after_its_first_pass() -> None:
    model: Any = bnb_int8()
    x = torch.randn(2, 64)
    model(x)
    assert model.out.weight.SCB is None
    values, expected = reference(model, x)
    lowbits.adopt(model)
    assert torch.equal(model.out.weight.float(), values["out"])
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_a_bias_that_was_cast_in_a_pass() -> None:
    model: Any = bnb_4bit(quant_type="nf4", compute_dtype=torch.bfloat16)()
    x = torch.randn(3, 64)
    model(x)
    assert model.layers[0].bias.dtype == torch.bfloat16
    lowbits.adopt(model)
    assert model.layers[0].bias.dtype == model.layers[0].weight.dtype == torch.float32
    expected = model(x)
    lowbits.dequantize(model)
    torch.testing.assert_close(model(x), expected)


def test_codes_in_the_order_of_a_cpu() -> None:
    """What bitsandbytes does in the first pass where the CPU has AVX512-BF16."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    model: Any = bnb_4bit(quant_type="nf4", compress_statistics=False)()
    weight = model.layers[0].weight
    expected = theirs(model.layers[0])
    model.layers[0].bias = None  # whose dtype could be taken for the weight's
    scale = weight.quant_state.absmax.bfloat16().float() / weight.quant_state.absmax
    weight.data, state = bnb._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert state.packing_format_for_cpu
    lowbits.adopt(model)
    expected *= scale.view(96, 1)
    assert model.layers[0].weight.dtype == torch.float32
    torch.testing.assert_close(model.layers[0].weight.float(), expected, rtol=1e-6, atol=0)


def test_wide_blocks() -> None:
    model: Any = bnb_4bit(quant_type="nf4")()
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(256, 8, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        torch.randn(8, 256), requires_grad=False, blocksize=128, quant_type="nf4"
    ).to("cpu")
    model.extra = layer
    values = theirs(layer)
    lowbits.adopt(model)
    assert torch.equal(model.extra.weight.float(), values)


def test_ties_stay() -> None:
    model: Any = torchao("Int8WeightOnlyConfig")()
    model.twin = nn.Linear(96, 32, bias=False)
    model.twin.weight = model.out.weight
    report = lowbits.adopt(model)
    assert model.twin.weight_qdata is model.out.weight_qdata
    row = next(layer for layer in report.layers if layer.fqn == "twin")
    assert (row.bytes_before, row.bytes_after) == (0, 0)
    assert row.reason == "tied; as torchao quantized it"


def test_convolutions_and_embeddings() -> None:
    library = pytest.importorskip("optimum.quanto")
    model: Any = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU())
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    x = torch.randn(1, 4, 5, 5)
    weight: Any = model[0].weight
    expected = functional.conv2d(x, weight._data * weight._scale, model[0].bias, groups=2)
    assert lowbits.adopt(model).packed[0].kind == "Conv2d"
    torch.testing.assert_close(model(x), expected.relu())
    bnb = pytest.importorskip("bitsandbytes")
    embedding: Any = bnb.nn.EmbeddingNF4(32, 64).to("cpu")
    values = theirs(embedding)
    lowbits.adopt(embedding)
    rows = torch.tensor([[3, 0], [31, 3]])
    assert torch.equal(embedding(rows), values[rows])


def left(model: nn.Module) -> list[str]:
    return [layer.reason for layer in lowbits.adopt(model).layers if layer.fqn == "out"]


def test_layers_that_cannot_be_taken_over_are_reported() -> None:
    library = pytest.importorskip("optimum.quanto")
    bnb = pytest.importorskip("bitsandbytes")
    model: Any = Model()
    library.quantize(model, weights=library.qint8)
    assert left(model) == ["quanto did not quantize it yet: call optimum.quanto.freeze"]
    model = Model()
    library.quantize(model, weights=library.qint8, activations=library.qint8)
    library.freeze(model)
    assert left(model) == ["quanto quantizes its activations too"]
    assert type(model.out).__name__ == "QLinear"
    model = Model(bnb.nn.Linear4bit)
    assert left(model) == ["bitsandbytes did not quantize it yet: it does when it is moved"]
    assert left(Model(bnb.nn.Linear8bitLt)) == left(model)
    model = bnb_4bit()()
    model.out.forward = model.out.forward
    assert left(model) == ["somebody wraps its forward (accelerate?): remove that hook first"]
    assert type(model.layers[0]) is PackedLinear


def test_a_class_that_inherits_from_a_library_is_left() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    class Mine(bnb.nn.Linear4bit):  # type: ignore[name-defined,misc]
        pass

    model = Model(Mine).to("cpu")
    assert left(model) == ["its class Mine inherits from one of bitsandbytes"]


def test_weights_of_no_scheme_are_left() -> None:
    model: Any = torchao("Int8WeightOnlyConfig")()
    model.out.weight.zero_point.fill_(3)
    assert left(model) == ["its zero point is not 0 (asymmetric int8)"]
    assert type(model.out) is nn.Linear


def test_ordinary_models_stay_as_they_are() -> None:
    model = Model()
    before = dict(model.named_parameters())
    assert lowbits.adopt(model).packed == ()
    assert dict(model.named_parameters()) == before
    assert not model._state_dict_hooks


@pytest.mark.parametrize(
    "make", [bnb_4bit(quant_type="nf4"), bnb_int8, quanto("qint8"), torchao("Int8WeightOnlyConfig")]
)
def test_all_or_nothing(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    parts = list(model.modules())
    before = [(type(p), dict(p.__dict__), dict(p._parameters), dict(p._buffers)) for p in parts]
    install, calls = Journal.install, []

    def fail(self: Journal, *args: Any) -> None:
        calls.append(args)
        install(self, *args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "install", fail)
    with pytest.raises(KeyboardInterrupt):
        lowbits.adopt(model)
    assert len(calls) == 2
    assert list(model.modules()) == parts
    after = [(type(p), dict(p.__dict__), dict(p._parameters), dict(p._buffers)) for p in parts]
    for (cls, state, parameters, buffers), old in zip(after, before, strict=True):
        assert cls is old[0]
        assert list(state) == list(old[1])
        assert all(state[name] is old[1][name] for name in state)
        assert all(parameters[name] is old[2][name] for name in parameters)
        assert list(parameters) == list(old[2])
        assert list(buffers) == list(old[3])


def test_an_applied_model_is_refused() -> None:
    model = Model()
    lowbits.apply(model, "native", device="cpu")
    with pytest.raises(AlreadyPatchedError, match="Model was applied: lowbits.restore"):
        lowbits.adopt(model)


def test_streamed_after_it_was_taken_over() -> None:
    model: Any = bnb_4bit(quant_type="nf4")()
    lowbits.adopt(model)
    x = torch.randn(5, 64)
    y = model(x)
    streamer = lowbits.LayerStreamer(model, device="cpu", budget="1MB")
    with streamer:
        assert torch.equal(model(x), y)
