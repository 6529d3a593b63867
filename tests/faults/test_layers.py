"""Unusual layers, inputs and modes of running."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core.packed import PackedLayer
from lowbits.core.registry import BackendRegistry

SCHEME = "float8-e4m3fn"
STANCE: Any = torch.compiler.set_stance


def pack(target: Any, **options: Any) -> lowbits.Handle:
    return lowbits.quantize(target, SCHEME, **{"keep_source": "memory", **options})


def check_equals_dequantized(target: nn.Module, *inputs: torch.Tensor) -> None:
    pack(target, rules={"*": SCHEME})
    assert any(isinstance(module, PackedLayer) for module in target.modules())
    with torch.no_grad():
        got = target(*inputs)
        lowbits.dequantize(target)
        assert torch.allclose(got, target(*inputs), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": "same", "dilation": 2},
        {"groups": 32},
        {"groups": 4, "stride": 2, "bias": False},
    ],
)
def test_convolutions(options: dict[str, Any]) -> None:
    check_equals_dequantized(nn.Conv2d(32, 64, 3, **options), torch.randn(2, 32, 9, 9))


def test_a_channels_last_convolution() -> None:
    layer: Any = nn.Conv2d(32, 64, 3)
    check_equals_dequantized(layer.to(memory_format=torch.channels_last), torch.randn(2, 32, 9, 9))


@pytest.mark.parametrize("first", [True, False])
def test_attention_and_its_fast_path(first: bool) -> None:  # noqa: FBT001
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=first).eval()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    check_equals_dequantized(encoder, torch.randn(2, 5, 64))


def test_attention_with_other_key_widths_and_biases() -> None:
    layer = nn.MultiheadAttention(
        64, 4, kdim=96, vdim=128, add_bias_kv=True, batch_first=True
    ).eval()
    pack(layer, rules={"*": SCHEME})
    inputs = (torch.randn(2, 5, 64), torch.randn(2, 7, 96), torch.randn(2, 7, 128))
    with torch.no_grad():
        got = layer(*inputs)[0]
        lowbits.dequantize(layer)
        assert torch.allclose(got, layer(*inputs)[0], atol=1e-4)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 32, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.expand(4, -1, -1), self.gate) + x @ self.gate[1]


def test_a_stack_of_experts_that_a_rule_names() -> None:
    target = Experts()
    handle = lowbits.quantize(target, "native", rules={"gate": SCHEME}, keep_source="memory")
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        got = target(x)
        handle.restore()
        assert torch.allclose(got, target(x), rtol=0.2, atol=3.0)
    assert type(target) is Experts


class Scaled(nn.Linear):
    """Has a forward and a name of its own for what a packed layer calls otherwise."""

    weight_factor = 2.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        return nn.functional.linear(input.to(self.weight.dtype), self.weight * self.weight_factor)


def test_a_subclass_with_a_forward_of_its_own() -> None:
    check_equals_dequantized(Scaled(64, 96), torch.randn(2, 64))


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_a_name_that_is_taken_is_refused(kind: str) -> None:
    layer = nn.Linear(64, 96)
    if kind == "parameter":
        layer.register_parameter("weight_qdata", nn.Parameter(torch.ones(1)))
    elif kind == "buffer":
        layer.register_buffer("weight_qdata", torch.ones(1))
    else:
        layer.weight_qdata = "mine"  # type: ignore[assignment]
    with pytest.raises(errors.PatchError, match="weight_qdata"):
        pack(layer)
    assert type(layer) is nn.Linear


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(64, 64))
        self.mix_scale = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mix_scale(x @ self.mix)
        return y


def test_a_submodules_name_is_not_taken() -> None:
    target = Child()
    try:
        lowbits.quantize(target, "native", rules={"mix": SCHEME})
    except errors.PatchError:
        return
    assert target(torch.ones(1, 64)).shape == (1, 64)


class Alias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 96, bias=False)
        self.head = self.inner.weight


def test_a_tie_between_different_names_is_packed_or_left_alone() -> None:
    target = Alias()
    lowbits.quantize(target, SCHEME, rules={"head": SCHEME, "inner": SCHEME})
    assert target.head.shape == (96, 64)


def test_one_module_under_two_names_is_packed_once() -> None:
    layer = nn.Linear(64, 96)
    target = nn.ModuleDict({"one": layer, "other name": layer, "weight": nn.Linear(64, 96)})
    handle = pack(target)
    assert len(handle.report().packed) == 2
    assert target.state_dict()["weight.weight"].shape == (96, 64)
    handle.restore()
    assert target["one"] is target["other name"]


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(64, 96).t(),
        torch.randn(1, 64).expand(96, 64),
        torch.randn(200, 64)[3:99],
        torch.randn(96, 128)[:, ::2],
    ],
)
def test_views_are_packed_by_value_and_restored_as_they_were(weight: torch.Tensor) -> None:
    layer = nn.Linear(64, 96)
    layer.weight = parameter = nn.Parameter(weight)
    handle = pack(layer)
    assert torch.allclose(layer.weight.clone(), weight, rtol=0.07, atol=0.02)
    handle.restore()
    assert layer.weight is parameter
    assert parameter.stride() == weight.stride()
    assert parameter.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_dtypes_that_are_no_full_precision_are_reported(dtype: torch.dtype) -> None:
    odd = nn.Linear(64, 96, bias=False)
    odd.weight = nn.Parameter(torch.ones(96, 64).to(dtype), requires_grad=False)
    target = nn.ModuleList([odd, nn.Linear(64, 96)])
    rows = {row.fqn: row for row in pack(target).report().layers}
    assert "not a full precision" in rows["0"].reason
    assert rows["1"].scheme == SCHEME


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_and_batches() -> None:
    target = nn.ModuleList([nn.Linear(0, 8), nn.Linear(8, 0), nn.Linear(64, 96)])
    rows = {row.fqn: row for row in pack(target, rules={"*": SCHEME}).report().layers}
    assert rows["0"].reason == rows["1"].reason == "empty"
    for batch in ((0, 64), (2, 0, 64), (64,)):
        assert target[2](torch.zeros(batch)).shape == (*batch[:-1], 96)
    with pytest.raises(RuntimeError):
        target[2](torch.zeros(2, 128))


def test_double_precision() -> None:
    layer = nn.Linear(64, 96).double()
    check_equals_dequantized(layer, torch.randn(2, 64, dtype=torch.float64))


def test_integer_inputs_are_refused() -> None:
    layer = nn.Linear(64, 96)
    pack(layer)
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 64, dtype=torch.long))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_decides_the_result_dtype(kind: Any, dtype: torch.dtype | None) -> None:
    layer, x = (
        (nn.Linear(64, 96), torch.ones(1, 64))
        if kind is nn.Linear
        else (nn.Conv1d(64, 96, 1), torch.ones(1, 64, 3))
    )
    pack(layer, compute_dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_scratch_made_in_inference_mode_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbits.core.functional.PART_WEIGHTS", 5000)
    target = nn.Sequential(nn.Linear(64, 700), nn.Linear(700, 64))
    pack(target)
    x = torch.randn(3, 64)
    results = []
    with torch.inference_mode():
        results.append(target(x).clone())
    with torch.no_grad():
        results.append(target(x))
    leaf = x.clone().requires_grad_()
    results.append(target(leaf))
    results[-1].sum().backward()
    assert leaf.grad is not None
    assert all(torch.equal(torch.as_tensor(r).detach(), results[1]) for r in results)


@pytest.mark.parametrize("scheme", ["bnb-nf4", "quanto-int8", "torchao-int8-dynamic", "gguf-q4_0"])
def test_threads_get_what_one_gets(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbits.core.functional.PART_WEIGHTS", 5000)
    target = nn.Sequential(nn.Linear(64, 600), nn.Linear(600, 96), nn.Linear(96, 640))
    lowbits.quantize(target, scheme, rules={"*": scheme})
    inputs = [torch.randn(4, 64) for _ in range(8)]
    with torch.no_grad():
        expected = [target(x) for x in inputs]
    wrong: list[int] = []
    barrier = threading.Barrier(8)

    def work(i: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        for _ in range(5):
            with torch.no_grad():
                if not torch.equal(target(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_functional_call_replaces_the_bias() -> None:
    layer = nn.Linear(64, 96)
    pack(layer)
    x, bias = torch.ones(1, 64), torch.ones(96)
    got = torch.func.functional_call(layer, {"bias": bias}, x)
    with torch.no_grad():
        layer.bias.copy_(bias)
    assert torch.equal(got, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiles_whole_and_once(dtype: torch.dtype) -> None:
    target: Any = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).to(dtype)
    pack(target)
    compiled: Any = torch.compile(target, backend="eager", fullgraph=True)
    x = torch.randn(2, 64, dtype=dtype)
    with torch.no_grad():
        first = compiled(x)
        with STANCE("fail_on_recompile"):
            second = compiled(x)
        assert torch.equal(first, second)
        assert torch.allclose(first, target(x), atol=1e-2)


def test_vmap_of_an_embedding() -> None:
    layer = nn.Embedding(32, 64)
    pack(layer, rules={"*": SCHEME})
    indices = torch.arange(6).view(3, 2)
    assert torch.equal(torch.vmap(layer)(indices), layer(indices))


def test_a_forward_on_the_meta_device() -> None:
    layer = nn.Linear(64, 96)
    pack(layer)
    assert layer.to("meta")(torch.empty(2, 64, device="meta")).shape == (2, 96)


@pytest.mark.parametrize("scheme", ["torchao-int8-dynamic", "torchao-float8-dynamic"])
@pytest.mark.parametrize("way", ["grad", "compile"])
def test_traced_gradients_through_quantized_activations(
    way: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbits.backends.torchao.int8_rows", lambda *_: 1)
    monkeypatch.setattr("lowbits.backends.torchao.has_float8_product", lambda *_: True)
    layer: Any = nn.Linear(64, 96)
    lowbits.quantize(layer, scheme, rules={"*": scheme})
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.grad
    assert expected is not None
    if way == "grad":
        got = torch.func.grad(lambda y: layer(y).square().sum())(x.detach())
    else:
        y = x.detach().requires_grad_()
        compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
        compiled(y).square().sum().backward()
        assert y.grad is not None
        got = y.grad
    assert (got - expected).norm() <= 0.1 * expected.norm()


def test_a_lazy_layer_is_reported() -> None:
    target = nn.ModuleList([nn.Linear(64, 96), nn.LazyLinear(8)])
    try:
        rows = {row.fqn: row for row in pack(target).report().layers}
    except errors.LowbitsError:
        return
    assert rows["1"].reason


def test_errors_go_through_pickle() -> None:
    layer = nn.Conv2d(1, 1, 1)
    with pytest.raises(errors.NoCapableBackendError) as caught:
        pack(nn.Sequential(layer))
    twin = pickle.loads(pickle.dumps(caught.value))
    assert str(twin) == str(caught.value)
    assert twin.failures == caught.value.failures


def test_a_backend_is_registered_once_and_names_both_sides() -> None:
    registry = BackendRegistry(discover=False)
    backend = lowbits.backend("float8")
    registry.register(backend)
    with pytest.raises(errors.DuplicateBackendError, match="float8"):
        registry.register(backend)


def test_a_broken_plugin_is_reported_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, name: str, made: Any) -> None:
            self.name, self.made = name, made

        def load(self) -> Any:
            if self.made is None:
                raise ImportError("no native library")
            return lambda: self.made

    entries = [Entry("a", None), Entry("b", object()), Entry("c", lowbits.backend("float8"))]
    monkeypatch.setattr("lowbits.core.registry.metadata.entry_points", lambda **_: entries)
    registry = BackendRegistry()
    infos = {info.name: info for info in registry.infos()}
    assert infos["float8"].available
    assert "no native library" in str(infos["a"].reason)
    assert not infos["b"].available
    with pytest.raises(errors.BackendUnavailableError, match="no native library"):
        registry.backend("a")


def test_the_registry_is_loaded_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = BackendRegistry()
    loads: list[str] = []

    def add(backend: Any) -> None:
        loads.append(backend.name)
        registry._backends[backend.name] = backend

    monkeypatch.setattr(registry, "_add", add)
    threads = [threading.Thread(target=registry.all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == len(set(loads)) >= 5
