"""How much of a device a placement may take."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from streaming.models import Stack, inputs, same, smallest_budget

import lowbits
from lowbits import _api
from lowbits.errors import InsufficientMemoryError
from lowbits.streaming import device_ops
from lowbits.streaming.masters import FileMaster, HostMaster
from lowbits.streaming.models import Placement

CPU = torch.device("cpu")
GIB = 1 << 30


class Card:
    """What a device says about its memory."""

    def __init__(self, free: int | None, total: int | None = None) -> None:
        self.free, self.total = free, total

    def free_bytes(self) -> int | None:
        return self.free

    def total_bytes(self) -> int | None:
        return self.total


@pytest.mark.parametrize(
    ("card", "options", "nbytes", "held", "expected"),
    [
        # Sizes do not ask the device.
        (Card(None), {"gpu_weights": 5 * GIB}, 4 * GIB, 0, None),
        (Card(None), {"gpu_weights": 5 * GIB}, 5 * GIB, 0, None),
        (Card(None), {"gpu_weights": 5 * GIB}, 5 * GIB + 1, 0, 5 * GIB),
        (Card(2 * GIB), {"gpu_weights": 5 * GIB}, 6 * GIB, 0, 5 * GIB),
        # Of 8 GiB free a tenth of the whole device stays free, and a GiB at least.
        (Card(8 * GIB, 8 * GIB), {}, 7 * GIB, 0, None),
        (Card(8 * GIB, 8 * GIB), {}, 7 * GIB + 1, 0, 7 * GIB),
        (Card(8 * GIB, 40 * GIB), {}, 4 * GIB, 0, None),
        (Card(8 * GIB, 40 * GIB), {}, 4 * GIB + 1, 0, 4 * GIB),
        (Card(20 * GIB), {}, 18 * GIB, 0, None),
        (Card(20 * GIB), {}, 18 * GIB + 1, 0, 18 * GIB),
        # What is on the device already makes room.
        (Card(3 * GIB, 8 * GIB), {}, 7 * GIB, 5 * GIB, None),
        (Card(3 * GIB, 8 * GIB), {}, 8 * GIB, 5 * GIB, 7 * GIB),
        (Card(GIB // 2, 8 * GIB), {}, GIB, 0, 0),
        (Card(8 * GIB, 8 * GIB), {"reserve": 0}, 8 * GIB, 0, None),
        (Card(8 * GIB, 8 * GIB), {"reserve": 3 * GIB}, 8 * GIB, 0, 5 * GIB),
        (Card(8 * GIB, 8 * GIB), {"reserve": 9 * GIB}, GIB, 0, 0),
        (Card(8 * GIB, 8 * GIB), {"gpu_weights": "all"}, 8 * GIB, 0, None),
        (Card(8 * GIB, 8 * GIB), {"gpu_weights": "all"}, 9 * GIB, GIB, None),
        # A device that does not say is trusted.
        (Card(None), {}, 100 * GIB, 0, None),
        (Card(None), {"gpu_weights": "all"}, 100 * GIB, 0, None),
    ],
)
def test_the_budget_of_a_placement(
    card: Card, options: dict[str, Any], nbytes: int, held: int, expected: int | None
) -> None:
    placement = Placement(torch.device("cuda"), **options)
    with (
        mock.patch("lowbits.streaming.models.device_ops", return_value=card),
        mock.patch("lowbits.streaming.budget.sys.platform", "linux"),
    ):
        assert placement.budget(nbytes, held) == expected


def test_windows_keeps_more_free_and_all_may_be_too_much() -> None:
    card = Card(8 * GIB, 8 * GIB)
    with (
        mock.patch("lowbits.streaming.models.device_ops", return_value=card),
        mock.patch("lowbits.streaming.budget.sys.platform", "win32"),
    ):
        assert Placement(torch.device("cuda")).budget(9 * GIB, 0) == 6 * GIB
        with pytest.raises(InsufficientMemoryError, match="gpu_weights='all'") as caught:
            Placement(torch.device("cuda"), "all").budget(9 * GIB, GIB - 1)
    error = caught.value
    assert (error.needed_bytes, error.available_bytes) == (9 * GIB, 9 * GIB - 1)
    assert error.device == "cuda"
    # On the CPU weights are loaded already: only a size streams.
    assert Placement(CPU).budget(9 * GIB, 0) is None
    assert Placement(CPU, GIB).budget(9 * GIB, 0) == GIB


@pytest.mark.parametrize("location", ["cpu", "disk"])
def test_another_budget_moves_no_weight_where_the_cut_stays(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stack(12)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        expected = model(inputs())
        handle = lowbits.apply(
            model, device="cpu", gpu_weights=whole // 2, location=location, swap="queue"
        )
        assert same(model(inputs()), expected)

        def refuse(*_: Any) -> None:
            raise AssertionError("read whole")

        with monkeypatch.context() as patch:
            patch.setattr(FileMaster, "copy", refuse)
            patch.setattr(HostMaster, "copy", refuse)
            for budget in (whole // 3, whole * 2 // 3, whole // 2):
                handle.reconfigure(gpu_weights=budget)
                assert handle.stats().budget_bytes == budget
                assert handle.stats().peak_device_bytes <= budget
                for _ in range(3):
                    assert same(model(inputs()), expected)
                assert 0 < handle.stats().peak_device_bytes <= budget
            with pytest.raises(InsufficientMemoryError) as caught:
                handle.reconfigure(gpu_weights=100)
            assert same(model(inputs()), expected)
            assert handle.stats().budget_bytes == whole // 2
        units = len(handle.stats().units)
        # So little that blocks are split.
        handle.reconfigure(gpu_weights=caught.value.needed_bytes)
        assert len(handle.stats().units) > units
        assert same(model(inputs()), expected)
    handle.restore()


@torch.no_grad()
def test_another_budget_after_an_adapter_came_that_nobody_trains() -> None:
    """It is cut with its blocks then, and streamed."""
    model = Stack(12, 64, hidden=64).requires_grad_(requires_grad=False).eval()
    whole = sum(parameter.nbytes for parameter in model.parameters())
    handle = lowbits.apply(model, device="cpu", gpu_weights=whole * 4 // 10, location="cpu")
    model(inputs(64))
    config = LoraConfig(r=16, target_modules=["up", "down"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    model.requires_grad_(requires_grad=False)
    expected = copy.deepcopy(model)(inputs(64))
    budget = whole // 2
    handle.reconfigure(gpu_weights=budget)
    for _ in range(3):
        assert same(model(inputs(64)), expected)
    assert handle.stats().peak_device_bytes <= budget
    handle.restore()


@torch.no_grad()
def test_a_cap_that_is_taken_away_asks_nothing() -> None:
    model = Stack(8).requires_grad_(requires_grad=False).eval()
    handle = lowbits.apply(model, device="cpu", gpu_weights=smallest_budget(model), location="cpu")
    model.blocks[0].register_buffer("more", torch.zeros(20_000))
    lowbits.device_budget("cpu", None)
    with pytest.raises(InsufficientMemoryError):
        model(inputs())
    handle.restore()


@pytest.mark.parametrize(("free", "is_streamed"), [(GIB, False), (GIB - 1, True)])
def test_on_metal_what_is_on_the_host_makes_room(
    free: int, monkeypatch: pytest.MonkeyPatch, *, is_streamed: bool
) -> None:
    """Both are one memory: a model that is loaded there fits beside what is left free."""
    monkeypatch.setattr(device_ops, "available_host_bytes", lambda: free)
    models = {"": torch.nn.Linear(512, 512, bias=False)}
    config = lowbits.LowbitsConfig(reserve=GIB)
    target = _api._Target(models, config, torch.device("mps"))
    assert target.choose(models, config, 512 * 512 * 4, None).is_streamed == is_streamed
