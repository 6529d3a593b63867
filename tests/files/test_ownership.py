"""Whose memory a weight is: loaded modules hold their own, and what is read is not written to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import lowbits
from lowbits.core.backend import Packed
from lowbits.core.registry import DEFAULT
from lowbits.core.select import Component, Selection, select
from lowbits.files.checkpoint import OpenOptions, open_checkpoint
from lowbits.files.convert import converted
from lowbits.files.load import LoadOptions, install, stage
from lowbits.files.own import weights_of
from lowbits.files.pickles import memory_weights
from lowbits.files.rows import Segment, rearranged
from lowbits.files.skeleton import skeleton_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lowbits.files.weights import Weight


class Two(nn.Module):
    """Two matrices, tied or not, and a buffer."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64, bias=False)
        self.b = nn.Linear(64, 64, bias=False)
        self.register_buffer("c", torch.arange(64))
        if is_tied:
            self.b.weight = self.a.weight


def places(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]


def held(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()]


def require_own_memory(module: nn.Module, others: Iterable[Tensor] = ()) -> None:
    """Check that each tensor has a storage that is as large as it, and nobody else's."""
    found = places(held(module))
    assert len(set(found)) == len(found)
    assert not set(found) & set(places(others))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held(module))


def whole(weights: Mapping[str, Weight]) -> dict[str, list[Segment]]:
    rows = {name: weight.shape[0] for name, weight in weights.items()}
    return {name: [Segment(name, 0, count)] for name, count in rows.items()}


def loaded(weights: Mapping[str, Weight]) -> nn.Module:
    module = Two()
    install([stage(module, weights, whole(weights), LoadOptions(DEFAULT))])
    return module


def test_a_module_does_not_hold_the_tensors_of_a_state_dict() -> None:
    states = Two().state_dict()
    module = loaded(memory_weights(states))
    require_own_memory(module, states.values())
    assert all(torch.equal(tensor, states[name]) for name, tensor in module.state_dict().items())


def test_a_module_does_not_hold_those_of_a_packed_one() -> None:
    source = Two()
    lowbits.quantize(source, "gguf-q8_0", rules={"*": "gguf-q8_0"})
    module = loaded(weights_of(source)[0])
    require_own_memory(module, held(source))
    assert torch.equal(module.state_dict()["a.weight_qdata"], source.state_dict()["a.weight_qdata"])


@pytest.mark.parametrize("on_meta", [False, True])
def test_a_module_does_not_hold_parts_of_what_was_pickled(tmp_path: Path, *, on_meta: bool) -> None:
    flat = torch.randn(3 * 64 * 64)
    same = flat[: 64 * 64].view(64, 64)
    torch.save({"a.weight": same, "b.weight": same, "c": torch.arange(64)}, tmp_path / "m.pt")
    with torch.device("meta" if on_meta else "cpu"):
        module = Two()
    lowbits.load(tmp_path / "m.pt", into=module, allow_pickle=True)
    require_own_memory(module)
    assert torch.equal(module.b.weight, same)


def test_what_was_tied_in_a_file_is_not_in_a_module_that_ties_nothing(tmp_path: Path) -> None:
    lowbits.save(Two(is_tied=True), tmp_path / "m.safetensors")
    module = Two()
    lowbits.load(tmp_path / "m.safetensors", into=module)
    require_own_memory(module)
    assert torch.equal(module.a.weight, module.b.weight)


def bits(value: Tensor | Packed) -> list[Tensor]:
    return list(value.tensors.values()) if isinstance(value, Packed) else [value]


def test_weights_say_whether_others_hold_what_they_give(tmp_path: Path) -> None:
    source = Two()
    states = source.state_dict()
    lowbits.save(source, tmp_path / "m.safetensors")
    file = open_checkpoint(tmp_path / "m.safetensors", OpenOptions(DEFAULT)).weights
    halves = {"h": [Segment("a.weight", 0, 32)], "w": [Segment("a.weight", 0, 64)]}
    memory = memory_weights(states)
    for weights in (
        file,
        memory,
        weights_of(source)[0],
        rearranged(file, halves, DEFAULT),
        rearranged(memory, halves, DEFAULT),
    ):
        for weight in weights.values():
            first, again = weight.read(), weight.read()
            assert weight.is_shared or places(bits(first)) != places(bits(again)), weight.name
    assert all(weight.is_shared for weight in memory.values())
    assert not any(weight.is_shared for weight in file.values())


def test_what_is_read_is_not_written_to(tmp_path: Path) -> None:
    states = Two().state_dict()
    before = copy.deepcopy(states)
    for kind in ("Q8_0", "Q4_K_M", "F16", "F32"):
        lowbits.save_gguf(states, tmp_path / "m.gguf", kind, arch=None, target="sdcpp")
    weights = memory_weights(states)
    for scheme in ("gguf-q8_0", "float8-e4m3fn", "bnb-nf4"):
        model = skeleton_of(weights)
        selection = Selection({"*": scheme}, (), DEFAULT, sees_meta=True)
        decisions = select([Component("", model, scheme)], selection)
        made = converted(weights, decisions, torch.device("cpu"), DEFAULT)
        packed: Any = made["a.weight"].read()
        assert packed.scheme == scheme
        assert not set(places(bits(packed))) & set(places(states.values()))
    assert all(torch.equal(states[name], tensor) for name, tensor in before.items())


class Based(nn.Module):
    """Has a part that is called as what peft wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.base_layer = nn.Linear(64, 64)


def test_a_part_that_is_called_as_what_peft_wraps(tmp_path: Path) -> None:
    made, loaded = Based(), Based()
    lowbits.save(made, tmp_path / "x.safetensors")
    lowbits.load(tmp_path / "x.safetensors", into=loaded)
    assert all(
        torch.equal(a, b) for a, b in zip(made.parameters(), loaded.parameters(), strict=True)
    )
