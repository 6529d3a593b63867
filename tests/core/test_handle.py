"""The handle, and what packed models show of themselves."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import lowbits
from lowbits import errors


def quantized() -> tuple[nn.Sequential, lowbits.Handle]:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    return model, lowbits.quantize(model, "torchao-int8", keep_source="memory")


def test_it_says_whether_it_is_active() -> None:
    _, handle = quantized()
    assert repr(handle).startswith("Handle(active: ")
    handle.restore()
    assert repr(handle).startswith("Handle(restored: ")
    model, handle = quantized()
    new = handle.switch("bnb-nf4")
    assert repr(handle).startswith("Handle(switched: ")
    lowbits.dequantize(model)
    assert repr(new).startswith("Handle(spent: ")


def test_a_packed_weight_says_what_it_is_and_is_not_printed_in_full() -> None:
    layer: Any = quantized()[0][0]
    assert repr(layer.weight) == (
        "WeightProxy(torchao-int8, shape=(64, 64), dtype=torch.float32, device='cpu')"
    )
    assert repr(layer.weight) == str(layer.weight)


def test_a_state_dict_answers_for_packed_weights_and_for_nothing_else() -> None:
    model, _ = quantized()
    state = model.state_dict()
    assert "0.weight" not in state
    assert state["0.weight"].shape == (64, 64)
    for key in ("2.weight", "0.other", "other", "0.weight.other"):
        with pytest.raises(KeyError, match=key):
            state[key]


def test_what_was_only_quantized_cannot_be_placed() -> None:
    model, handle = quantized()
    with pytest.raises(errors.ConfigError, match="never moves a module: use lowbits.apply"):
        handle.reconfigure(gpu_weights="1MB")
    assert lowbits.handle(model) is handle


def test_a_whole_around_a_packed_part_is_refused() -> None:
    model, _ = quantized()
    with pytest.raises(errors.AlreadyPatchedError, match="holds packed layers already"):
        lowbits.quantize(nn.Sequential(model[0], nn.Linear(64, 64)), "bnb-nf4")


@pytest.mark.parametrize("how", ["restore", "reconfigure", "switch", "with"])
def test_a_handle_that_could_not_be_switched_goes_on(how: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    weight, asked = model[0].weight, [False]

    def progress(_: Any) -> None:
        if asked[0]:
            raise RuntimeError("stop")

    handle = lowbits.apply(model, "bnb-nf4", device="cpu", keep_source="memory", progress=progress)
    asked[0] = True
    with pytest.raises(RuntimeError, match="stop"):
        handle.switch("gguf-q8_0")
    assert (handle.is_active, handle.is_streamed) == (True, False)
    assert {layer.scheme for layer in handle.report().packed} == {"bnb-nf4"}
    asked[0] = False
    if how == "reconfigure":
        handle.reconfigure(gpu_weights=handle.report().bytes_after - 1)
        assert handle.is_streamed
        assert handle.stats().budget_bytes == handle.report().bytes_after - 1
    elif how == "switch":
        assert handle.switch("gguf-q8_0").is_active
        assert not handle.is_active
    with handle:
        pass
    assert model[0].weight is weight
    assert lowbits.handle(model) is None
