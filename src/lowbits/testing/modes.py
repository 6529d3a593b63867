"""The part of the contract about training, autocast, threads, hooks and functional transforms."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lowbits
from lowbits.testing.layers import (
    close,
    dense_twin,
    inputs_of,
    model_for,
    packed_model,
    random,
    same_codes,
    stored,
    tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbits.core.backend import QuantBackend
    from lowbits.core.scheme import Scheme
    from lowbits.testing.layers import Model

_THREADS: Final = 8


def check_gradients_pass_through(backend: QuantBackend, scheme: Scheme) -> None:
    """Inputs and biases get the gradients that the dequantized layer gives."""
    model, _ = packed_model(scheme.name)
    grads = []
    for layer in (model.blocks[0], dense_twin(model).blocks[0]):
        x = inputs_of(layer).requires_grad_()
        layer(x).square().sum().backward()
        assert layer.bias.grad is not None
        assert x.grad is not None
        grads.append((x.grad, layer.bias.grad))
    for got, expected in zip(*grads, strict=True):
        assert close(got, expected, scheme)


def check_adapters_train_through_packed_layers(backend: QuantBackend, scheme: Scheme) -> None:
    """Low-rank factors beside a packed layer, under another one, get the right gradients."""
    model, _ = packed_model(scheme.name)
    codes = stored(model)
    got, expected = (_adapter_gradients(each) for each in (model, dense_twin(model)))
    for name, gradient in expected.items():
        assert close(got[name], gradient, scheme), name
    assert same_codes(model, codes)


def _adapter_gradients(model: Model) -> dict[str, Tensor]:
    first, second = model.train().blocks
    x = inputs_of(first)
    down = random(x.shape[1], 4, seed=1).requires_grad_()
    up = random(4, 96, seed=2).requires_grad_()
    second(torch.tanh(first(x) + x @ down @ up)).square().mean().backward()
    assert down.grad is not None
    assert up.grad is not None
    return {"down": down.grad, "up": up.grad}


def check_train_and_eval(backend: QuantBackend, scheme: Scheme) -> None:
    """Switching modes reaches packed layers, and changes no result of a model without dropout."""
    model, _ = packed_model(scheme.name)
    expected = model(tokens())
    for is_training in (True, False):
        model.train(is_training)
        assert all(module.training is is_training for module in model.modules())
        assert torch.allclose(model(tokens()), expected, rtol=1e-4, atol=1e-5)


def check_requires_grad(backend: QuantBackend, scheme: Scheme) -> None:
    """Freezing works; integers cannot be trained, torch says so, and the model stays usable."""
    model, _ = packed_model(scheme.name)
    expected, codes = model(tokens()), stored(model)
    model.requires_grad_(requires_grad=False)
    try:
        model.requires_grad_(requires_grad=True)
    except RuntimeError as error:
        assert "floating point" in str(error)  # noqa: PT017 - no pytest here
    else:
        raise AssertionError("packed integers were made trainable")
    for parameter in model.parameters():
        # Markers are floating, and empty.
        parameter.requires_grad_(parameter.is_floating_point() and parameter.numel() > 0)
    assert torch.equal(model(tokens()), expected)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(tokens()).square().mean().backward()
    optimizer.step()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.blocks.parameters())
    assert not torch.equal(model(tokens()), expected)
    assert same_codes(model, codes)


def check_autocast(backend: QuantBackend, scheme: Scheme) -> None:
    """Under autocast results are bfloat16, close to the ordinary layer's, with the same codes."""
    model, _ = packed_model(scheme.name)
    twin, codes = dense_twin(model), stored(model)
    x = inputs_of(model.blocks[0])
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        got, expected = model.blocks[0](x), twin.blocks[0](x)
        assert model.conv1(torch.ones(1, 32, 8)).dtype == torch.bfloat16
        assert model(tokens()).dtype == twin(tokens()).dtype
    assert got.dtype == expected.dtype == torch.bfloat16
    assert float((got - expected).norm() / expected.norm()) <= 0.05
    assert same_codes(model, codes)


def check_inference_mode_first(backend: QuantBackend, scheme: Scheme) -> None:
    """What is kept between calls is made outside of inference mode: training works after it."""
    model, _ = packed_model(scheme.name)
    with torch.inference_mode():
        first = model(tokens())
    assert torch.allclose(first, model(tokens()), rtol=1e-4, atol=1e-5)
    x = inputs_of(model.blocks[0]).requires_grad_()
    model.blocks[1](model.blocks[0](x)).sum().backward()
    assert x.grad is not None
    assert not x.grad.is_inference()


def check_threads(backend: QuantBackend, scheme: Scheme) -> None:
    """Eight threads at once get what one gets."""
    model, _ = packed_model(scheme.name)
    inputs = [(tokens() + i) % 32 for i in range(_THREADS)]
    barrier = threading.Barrier(_THREADS, timeout=60)

    @torch.no_grad()
    def run(x: Tensor) -> list[Tensor]:
        barrier.wait()
        return [model(x) for _ in range(3)]

    with torch.no_grad():
        expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(_THREADS) as pool:
        for results, wanted in zip(pool.map(run, inputs), expected, strict=True):
            assert all(torch.equal(result, wanted) for result in results)


def check_hooks_keep_firing(backend: QuantBackend, scheme: Scheme) -> None:
    """Hooks of all kinds fire on a packed layer, whether they were there before or came after."""
    model = model_for(scheme.name)
    calls: list[str] = []
    _hook(model.blocks[0], "early", calls)
    handle = lowbits.quantize(model, scheme.name, rules={"*": scheme.name}, keep_source="memory")
    _hook(model.blocks[0], "late", calls)
    model.to(torch.bfloat16).float()
    x = inputs_of(model.blocks[0]).requires_grad_()
    expected = sorted(f"{when} {what}" for when in ("early", "late") for what in _HOOKS)
    for _ in range(2):
        calls.clear()
        model.blocks[0](x).sum().backward()
        assert sorted(calls) == expected
        if handle.is_active:
            handle.restore()


_HOOKS: Final = {
    "before": "register_forward_pre_hook",
    "after": "register_forward_hook",
    "backward": "register_full_backward_hook",
}


def _hook(layer: nn.Module, when: str, calls: list[str]) -> None:
    for what, register in _HOOKS.items():
        getattr(layer, register)(lambda *_, call=f"{when} {what}": calls.append(call))


def check_parametrizations_are_refused(backend: QuantBackend, scheme: Scheme) -> None:
    """What computes a weight from another tensor is refused; the layer goes on as it was."""
    model, _ = packed_model(scheme.name)
    layer: Any = model.blocks[0]
    pruning: Any = prune
    x = inputs_of(layer)
    expected, before, names = layer(x), sorted(layer.__dict__), list(layer._parameters)
    changes: tuple[tuple[Callable[[], object], str], ...] = (
        (
            lambda: parametrize.register_parametrization(layer, "weight", nn.Identity()),
            f"scheme={scheme.name}",
        ),
        (lambda: parametrizations.weight_norm(layer), f"scheme={scheme.name}"),
        (lambda: pruning.l1_unstructured(layer, "weight", amount=0.5), "lowbits.restore"),
        # Deprecated by torch for the one above; it finds no such Parameter.
        (lambda: torch.nn.utils.weight_norm(layer), "weight"),
    )
    for change, message in changes:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                change()
        except (ValueError, KeyError, lowbits.errors.PatchError) as error:
            assert message in str(error)  # noqa: PT017 - no pytest here
        else:
            raise AssertionError("a packed weight was parametrized")
        assert sorted(layer.__dict__) == before
        assert list(layer._parameters) == names
    assert torch.equal(layer(x), expected)


def check_functional_transforms(backend: QuantBackend, scheme: Scheme) -> None:
    """`functional_call`, `vmap` and `grad` of `torch.func` see through packed layers."""
    model, _ = packed_model(scheme.name)
    twin = dense_twin(model)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, parameters, tokens()), model(tokens()))
    layer, dense = model.blocks[0], twin.blocks[0]
    x = inputs_of(layer, 6).view(3, 2, -1)
    with torch.no_grad(), warnings.catch_warnings():
        # torch loops over what it has no batching rule for (integer products), and says so.
        warnings.simplefilter("ignore", UserWarning)
        assert close(torch.func.vmap(layer)(x), dense(x), scheme)
        images = torch.linspace(-1, 1, 3 * 32 * 8).view(3, 32, 8)
        assert close(torch.func.vmap(model.conv1)(images), twin.conv1(images), scheme)
    got, expected = (
        torch.func.grad(lambda y, of=each: of(y).square().sum())(x) for each in (layer, dense)
    )
    assert close(got, expected, scheme)


def check_shared_memory(backend: QuantBackend, scheme: Scheme) -> None:
    """`share_memory` puts what is stored where other processes can see it."""
    model, _ = packed_model(scheme.name)
    expected, codes = model(tokens()), stored(model)
    model.share_memory()
    assert all(p.untyped_storage().is_shared() for p in model.parameters())
    assert same_codes(model, codes)
    assert torch.equal(model(tokens()), expected)


def check_parameters_are_counted_twice(backend: QuantBackend, scheme: Scheme) -> None:
    """The report counts logical weights; the model's own Parameters are what is stored."""
    model, handle = packed_model(scheme.name)
    logical = sum(p.numel() for p in model_for(scheme.name).parameters())
    assert handle.report().parameters == logical
    numbers = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    assert handle.report().bytes_after == numbers
