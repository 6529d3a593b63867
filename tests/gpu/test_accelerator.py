"""The same on an accelerator; `nox -s gpu` prints its name first."""

from __future__ import annotations

import pytest
import torch

import lowbits
from lowbits.core.registry import DEFAULT
from lowbits.testing.layers import (
    close,
    dense_twin,
    model_for,
    packed_model,
    same_codes,
    stored,
    tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]

#: Those that store weights; a mix chooses among them.
SCHEMES = [
    info
    for info in lowbits.schemes()[1:]
    if info.can_quantize and not DEFAULT.require(info.name)[1].mix
]


@pytest.mark.parametrize("info", SCHEMES, ids=lambda info: info.name)
def test_packs_moves_computes_and_comes_back(info: lowbits.SchemeInfo) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    model = model_for(info.name)
    expected = model(tokens())
    handle = lowbits.apply(model, info.name, rules={"*": info.name}, keep_source="memory")
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert next(model.parameters()).device.type == device.type
    _, scheme = DEFAULT.find(info.name)
    with torch.no_grad():
        got = model(tokens().to(device))
        assert close(got, dense_twin(model)(tokens().to(device)), scheme)
    handle.restore()
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("info", SCHEMES, ids=lambda info: info.name)
def test_moves_there_and_back_leave_every_bit(info: lowbits.SchemeInfo) -> None:
    """bitsandbytes #937 and #1664: moves quantized again what was quantized."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    model, _ = packed_model(info.name)
    codes, expected = stored(model), model(tokens())
    model.to(device).cpu()
    assert same_codes(model, codes)
    assert torch.equal(model(tokens()), expected)
