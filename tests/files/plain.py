"""A plain module that holds one of everything, and weights for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lowbits
from lowbits.core.backend import Packed
from lowbits.core.packed import PackedLayer
from lowbits.core.registry import DEFAULT
from lowbits.files.load import LoadOptions, install, stage
from lowbits.files.own_writer import WriteOptions, write_own
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lowbits.core.report import LayerReport, Report


WIDTH = 64


class Model(nn.Module):
    """One of each thing that a module may hold."""

    table: Tensor
    count: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.register_buffer("table", torch.randn(3, 5))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("cache", torch.full((4,), 3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.gain
        y: Tensor = self.head(self.norm(x + self.shift[0, 0]))
        return y + self.cache.sum() + self.table.mean() + self.count


IDS = torch.arange(10)


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = Model()
    if seed:  # what files bring must differ from what is there
        made.count += seed
        made.gain.data += seed
    return made


def on_meta() -> Any:
    """Return a model without data, as accelerate's ``init_empty_weights`` makes it."""
    made = model()
    cache = made.cache
    made.to("meta").cache = cache
    made.head.weight = made.embed.weight  # a move to meta makes two of it
    return made


@torch.no_grad()
def out(module: nn.Module) -> Tensor:
    y: Tensor = module(IDS)
    return y


def saved(path: Path, module: nn.Module, scheme: str = "") -> Path:
    """Write a module, quantized if it is to be, and leave it so."""
    if scheme:
        lowbits.quantize(module, scheme, rules={"*": scheme})
    file = path / "m.safetensors"
    lowbits.save(module, file)
    return file


def state(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_untouched(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    now = module.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert not any(isinstance(part, PackedLayer) for part in module.modules())
    assert lowbits.handle(module) is None


def pack(values: Tensor, scheme: str) -> Packed:
    backend, found = DEFAULT.find(scheme)
    assert backend
    return backend.pack(values.float(), found)


def unpacked(packed: Packed) -> Tensor:
    backend, _ = DEFAULT.find(packed.scheme)
    assert backend
    return backend.unpack(packed, torch.float32)


def weight_of(name: str, value: Tensor | Packed, dtype: torch.dtype | None = None) -> Weight:
    """Return a weight as a reader gives it."""
    if isinstance(value, Packed):
        nbytes = sum(tensor.nbytes for tensor in value.tensors.values())
        return Weight(name, value.shape, dtype, nbytes, lambda: value, value.scheme)
    return Weight(name, tuple(value.shape), value.dtype, value.nbytes, lambda: value)


def file_of(path: Path, weights: Mapping[str, Tensor | Packed]) -> Path:
    """Write a file of lowbits' own with these weights."""
    made = {
        name: weight_of(name, value, torch.float32 if isinstance(value, Packed) else None)
        for name, value in weights.items()
    }
    file = path / "f.safetensors"
    write_own(file, made, {}, WriteOptions({}))
    return file


def rows_by_name(report: Report) -> dict[str, LayerReport]:
    return {layer.fqn: layer for layer in report.layers}


def load_rows(into: nn.Module, weights: Mapping[str, Any], key_map: Any, **options: Any) -> Report:
    """Load by a key map of one's own."""
    found = {name: weight_of(name, value, torch.float32) for name, value in weights.items()}
    return install([stage(into, found, key_map, LoadOptions(DEFAULT, **options))])
