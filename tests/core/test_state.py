"""State dicts of packed layers, and the ordinary models that they are loaded into."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

import lowbits


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "inner"])
def test_an_ordinary_model_is_not_left_with_its_random_values(
    prefix: str, *, strict: bool, assign: bool
) -> None:
    def made() -> nn.Module:
        return nn.Sequential(OrderedDict(inner=nn.Linear(64, 64), other=nn.LayerNorm(64)))

    model, other = made(), made()
    lowbits.quantize(model, "bnb-nf4")
    state = model.get_submodule(prefix).state_dict()
    into = other.get_submodule(prefix)
    with pytest.raises(RuntimeError, match="is stored as bnb-nf4.* lowbits.dequantize first"):
        into.load_state_dict(state, strict=strict, assign=assign)
    packed = copy.deepcopy(model)
    packed.get_submodule(prefix).load_state_dict(state, strict=strict, assign=assign)
    lowbits.dequantize(model)
    into.load_state_dict(model.get_submodule(prefix).state_dict(), strict=strict)


def test_the_metadata_of_a_state_dict_is_saved_as_that_of_any() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    lowbits.quantize(model, "bnb-nf4")
    state, file = model.state_dict(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded._metadata["0"]) is OrderedDict
    assert loaded._metadata == state._metadata  # type: ignore[attr-defined]
    copy.deepcopy(model).load_state_dict(loaded)


def test_many_packed_layers_are_told_once() -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))

    model = made()
    lowbits.quantize(model, "bnb-nf4", rules={"*": "bnb-nf4"})
    with pytest.raises(RuntimeError) as caught:
        made().load_state_dict(model.state_dict(), strict=False)
    assert str(caught.value).count("it is of a packed model") == 1
