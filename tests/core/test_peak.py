"""What a conversion takes is known before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core import peak
from lowbits.core.convert import _packed_bytes
from lowbits.core.memory import PART_WEIGHTS
from lowbits.core.peak import conversion_peak, require_room
from lowbits.core.registry import DEFAULT
from lowbits.core.select import Component, Decision, Selection, select

if TYPE_CHECKING:
    from pathlib import Path

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
LAYER = 256 * 256
PASSING = LAYER * 4 * 6


def build() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)), nn.LayerNorm(256))


def decide(model: nn.Module) -> list[Decision]:
    return select([Component("", model, "bnb-nf4")], Selection({}, (), DEFAULT))


def packed_layer() -> int:
    return LAYER // 2 + LAYER // 64 * 4


def test_on_the_host_packed_weights_and_one_part() -> None:
    decisions = decide(build())
    found = conversion_peak(decisions, (), CPU, None, _packed_bytes)
    assert found == {CPU: 3 * packed_layer() + packed_layer() + PASSING}


def test_originals_in_files_make_room() -> None:
    decisions = decide(build())
    ties = {decision.tie for decision in decisions}
    found = conversion_peak(decisions, ties, CPU, None, _packed_bytes)
    assert found == {CPU: packed_layer() + PASSING}


def test_on_a_device_with_what_is_moved_there() -> None:
    decisions = decide(build())
    found = conversion_peak(decisions, (), GPU, None, _packed_bytes)
    assert found == {GPU: 4 * packed_layer() + PASSING}
    held = conversion_peak(decisions, (), GPU, CPU, _packed_bytes)
    assert held == {GPU: packed_layer() + PASSING, CPU: 4 * packed_layer()}


def test_a_part_bounds_what_a_large_layer_takes() -> None:
    model = nn.Linear(2048, 2048, bias=False)
    (decision,) = decide(model)
    found = conversion_peak([decision], (), CPU, None, _packed_bytes)
    assert found == {CPU: PART_WEIGHTS * 4 * 6 + _packed_bytes(decision)}


def test_what_is_not_there_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = build()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    least = packed_layer() + PASSING
    monkeypatch.setattr(peak, "available_host_bytes", lambda: least)
    with pytest.raises(errors.InsufficientMemoryError, match="keep_source='file'") as caught:
        lowbits.quantize(model, "bnb-nf4")
    assert caught.value.needed_bytes == least + 3 * packed_layer()
    assert caught.value.available_bytes == least
    assert caught.value.device == "cpu"
    assert lowbits.handle(model) is None
    assert type(model[0]) is nn.Linear
    lowbits.quantize(model, "bnb-nf4", keep_source="file", source=tmp_path).restore()


def test_a_device_that_is_full_is_refused_where_it_is_known() -> None:
    require_room({GPU: 10}, None)
    require_room({GPU: 10}, lambda _: None)
    require_room({GPU: 10}, lambda _: 10)
    with pytest.raises(errors.InsufficientMemoryError, match="cuda:0") as caught:
        require_room({GPU: 10}, lambda _: 9)
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (10, 9)
