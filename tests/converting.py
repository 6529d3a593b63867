"""A small model in a file, and what files and modules hold, for tests of conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

import lowbits
from lowbits.core.backend import Packed
from lowbits.core.registry import DEFAULT
from lowbits.files.checkpoint import OpenOptions, open_checkpoint
from lowbits.files.own import weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lowbits.files.weights import Weight


class Block(nn.Module):
    """Two layers of whole GGUF blocks, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 64)
        self.down = nn.Linear(64, 256, bias=False)
        self.norm = nn.LayerNorm(256)


class Net(nn.Module):
    """What a file without a config may be of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 256)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(256, 8)


def net(dtype: torch.dtype = torch.bfloat16) -> Net:
    return Net().to(dtype)


def net_file(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    path = folder / "net.safetensors"
    save_file(net(dtype).state_dict(), path)
    return path


def loaded(path: Path, into: nn.Module) -> nn.Module:
    lowbits.load(path, into=into)
    return into


def contents(weights: Mapping[str, Weight]) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Return scheme and tensors of each weight."""
    found = {}
    for name, weight in weights.items():
        value = weight.read()
        parts = dict(value.tensors) if isinstance(value, Packed) else {"": value}
        found[name] = (value.scheme if isinstance(value, Packed) else "", parts)
    return found


def require_same(got: nn.Module, wanted: nn.Module) -> None:
    """Compare modules bit for bit: schemes, codes, scales, and what is not packed."""
    left, right = contents(weights_of(got)[0]), contents(weights_of(wanted)[0])
    assert left.keys() == right.keys()
    for name, (scheme, parts) in right.items():
        assert left[name][0] == scheme, name
        assert left[name][1].keys() == parts.keys(), name
        for field, tensor in parts.items():
            other = left[name][1][field]
            assert other.dtype == tensor.dtype, (name, field)
            assert other.shape == tensor.shape, (name, field)
            assert torch.equal(bits(other), bits(tensor)), (name, field)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def stored(path: Path) -> Mapping[str, Weight]:
    return open_checkpoint(path, OpenOptions(DEFAULT)).weights


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
