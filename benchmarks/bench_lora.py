"""Say how much of a LoRA survives in each scheme, and time attaching, changing and merging one.

    python benchmarks/bench_lora.py
    python benchmarks/bench_lora.py --parts survival --schemes bnb-nf4,gguf-q4_k
    python benchmarks/bench_lora.py --size 256 --blocks 3 --rounds 3     # tries the script

Survival is ``sum of <Q(W+dW) - Q(W), dW> / sum of <dW, dW>``, decoded in float32, of LoRAs of rank
16 whose norm is a share of the weight's: merged from W, merged into the dequantized weight as other
tools do, and beside it (the layer's output for the identity). Times are medians; callables take
turns.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
from paired import (
    Budget,
    Pace,
    machine,
    machine_line,
    number,
    parser,
    sample_s,
    split,
    table,
    write_json,
)
from peers import packable_schemes
from torch import Tensor, nn

import lowbits
from lowbits.core.packing import pack_weight
from lowbits.core.registry import DEFAULT
from lowbits.lora.merge import LowRank, MergedWeight, Survival

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

RANK: Final = 16
SHARES: Final = (0.01, 0.03, 0.1)
MINI_FLUX: Final = Path(__file__).parent / "miniflux" / "transformer"
PARTS: Final = ("survival", "attach", "merge")
#: What LoRAs of FLUX are commonly trained on.
TARGETS: Final = ("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "net.2")
MERGED: Final = ("bnb-nf4", "torchao-int8", "float8-e4m3fn", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k")
#: Of weights that are merged into: what models are published in, and what costs no cast.
DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@final
@dataclass(frozen=True)
class Survived:
    """What survives of LoRAs in one scheme, by their share of the weight's norm."""

    scheme: str
    weights: str
    bits: float
    error: float
    merged: dict[float, float]
    requantized: dict[float, float]
    beside: dict[str, float]

    def cells(self) -> list[str]:
        """Return the row of the table."""
        merged = [number(self.merged[share], 3) for share in SHARES]
        again = [number(self.requantized[share], 3) for share in SHARES]
        beside = [number(value, 4) for value in self.beside.values()]
        bits = f"{self.bits:.2f}"
        return [self.scheme, self.weights, bits, f"{self.error:.2%}", *merged, *again, *beside]


def gaussian(size: int) -> list[Tensor]:
    """Return weights as a fresh model has them."""
    return [torch.randn(size, size) * 0.02 for _ in range(2)]


def mini_flux() -> list[Tensor]:
    """Return the matrices of mini-FLUX's blocks that every scheme can hold."""
    from safetensors.torch import load_file

    tensors = load_file(MINI_FLUX / "diffusion_pytorch_model.safetensors")
    blocks = {name: tensor.float() for name, tensor in tensors.items() if "blocks" in name}
    return [t for t in blocks.values() if t.dim() == 2 and t.shape[1] % 256 == 0]


def lora_for(weight: Tensor, share: float) -> LowRank:
    """Return a random LoRA whose product has a share of the weight's norm."""
    up, down = torch.randn(weight.shape[0], RANK), torch.randn(RANK, weight.shape[1])
    return LowRank(up, down, share * float(weight.norm() / (up @ down).norm()))


def survival_of(scheme_name: str, label: str, weights: Sequence[Tensor]) -> Survived:
    """Measure one scheme on some weights, with the same LoRAs for every scheme."""
    backend, scheme = DEFAULT.require(scheme_name)
    assert backend
    torch.default_generator.manual_seed(1)
    cpu, stored, wrong, norm = torch.device("cpu"), 0, 0.0, 0.0
    merged = {share: Survival() for share in SHARES}
    again = {share: Survival() for share in SHARES}
    for weight in weights:
        plain = pack_weight(weight, "Linear", scheme, backend, cpu)
        decoded = backend.unpack(plain, torch.float32)
        stored += sum(tensor.nbytes for tensor in plain.tensors.values())
        wrong += float((decoded - weight).square().sum())
        norm += float(weight.square().sum())
        for share in SHARES:
            lora = (lora_for(weight, share),)
            for source, counted in ((weight, merged[share]), (decoded, again[share])):
                total = MergedWeight(source, lora, cpu)
                counted.add(total, plain, total.pack(scheme, backend), backend)
    bits = stored * 8 / sum(weight.numel() for weight in weights)
    return Survived(
        scheme_name,
        label,
        bits,
        (wrong / norm) ** 0.5,
        {share: counted.share for share, counted in merged.items()},
        {share: counted.share for share, counted in again.items()},
        {str(dtype)[6:]: beside(scheme_name, weights[0], dtype) for dtype in _DTYPES},
    )


_DTYPES: Final = (torch.float32, torch.bfloat16)


@torch.no_grad()
def beside(scheme: str, weight: Tensor, dtype: torch.dtype) -> float:
    """Return what acts of peft's side branch at 1 %, in the output for the identity."""
    from peft import LoraConfig, inject_adapter_in_model

    rows, row_length = weight.shape
    lora = lora_for(weight, SHARES[0])
    model = nn.Sequential(nn.Linear(row_length, rows, bias=False)).to(dtype)
    model[0].weight.data = weight.to(dtype)
    inputs = torch.eye(row_length, dtype=dtype)
    with lowbits.quantize(model, scheme, rules={"*": scheme}, lora="fp16", keep_source="memory"):
        before = model(inputs).float()
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
        inject_adapter_in_model(config, model)
        wrapper: Any = model[0]
        wrapper.lora_A["default"].weight.data = lora.down.to(dtype)
        wrapper.lora_B["default"].weight.data = (lora.up * lora.scale).to(dtype)
        change = model(inputs).float() - before
    meant = (lora.up @ lora.down * lora.scale).T
    return float((change * meant).sum() / meant.square().sum())


@final
@dataclass(frozen=True)
class Attached:
    """Seconds of what is done with a LoRA on one model, and on the same model packed."""

    what: str
    layers: int
    dense: float
    packed: float

    def cells(self) -> list[str]:
        """Return the row of the table."""
        times = (number(self.dense * 1e3, 1), number(self.packed * 1e3, 1))
        return [self.what, str(self.layers), *times, number(self.packed / self.dense)]


def attach(blocks: int, scheme: str, pace: Pace) -> list[Attached]:
    """Time peft's and diffusers' calls on a narrow FLUX, packed and not."""
    models = {"dense": _narrow_flux(blocks), "packed": _narrow_flux(blocks)}
    lowbits.quantize(models["packed"], scheme, keep_source="memory")
    samples: dict[tuple[str, str], list[float]] = {}
    layers = 0
    for is_warm in (False, *[True] * pace.rounds):
        for name, model in models.items():
            gc.collect()  # what one model's layers leave would be collected in the other's time
            for what, call in _steps(model).items():
                seconds = sample_s(call, torch.device("cpu"))
                if is_warm:
                    samples.setdefault((what, name), []).append(seconds)
                layers = max(layers, _count(model))
    return [
        Attached(what, layers, *(statistics.median(samples[what, name]) for name in models))
        for what in _steps(models["dense"])
    ]


def _narrow_flux(blocks: int) -> Any:
    from diffusers import FluxTransformer2DModel

    double = max(1, blocks // 3)
    model = FluxTransformer2DModel(
        num_layers=double,
        num_single_layers=blocks - double,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    return model.eval().requires_grad_(requires_grad=False)


def _steps(model: Any) -> dict[str, Callable[[], object]]:
    """Return a life of a LoRA, step by step."""
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters
    from peft import LoraConfig

    config = LoraConfig(r=RANK, target_modules=list(TARGETS))
    strength = partial(set_weights_and_activate_adapters, model, ["one"], [0.5])
    return {
        "attach": lambda: model.add_adapter(config, adapter_name="one"),
        "change the strength": strength,
        "detach": model.unload_lora,
    }


def _count(model: nn.Module) -> int:
    return sum(hasattr(module, "lora_A") for module in model.modules())


@final
@dataclass(frozen=True)
class Merging:
    """Seconds to quantize layers, to merge a LoRA into them, and to take it out: medians.

    ``ratio``, of merging to quantizing, is the median of the rounds' ratios: what slows the machine
    down for some rounds slows both down.
    """

    scheme: str
    weights: str
    quantize: float
    merge: float
    unmerge: float
    ratio: float

    def cells(self) -> list[str]:
        """Return the row of the table."""
        times = [number(value, 3) for value in (self.quantize, self.merge, self.unmerge)]
        return [self.scheme, self.weights, *times, number(self.ratio)]


def merging(scheme: str, weights: str, size: int, device: torch.device, pace: Pace) -> Merging:
    """Time merging beside quantizing the same layers."""
    from peft import LoraConfig, inject_adapter_in_model

    def layers() -> nn.Sequential:
        made = (nn.Linear(size, size, bias=False, dtype=DTYPES[weights]) for _ in range(2))
        return nn.Sequential(*made).to(device)

    model, other = layers(), layers()
    lowbits.quantize(model, scheme, rules={"*": scheme}, lora="fp16", keep_source="memory")
    config = LoraConfig(r=RANK, target_modules=["0", "1"], init_lora_weights=False)
    inject_adapter_in_model(config, model)

    def quantize() -> None:
        lowbits.quantize(other, scheme, rules={"*": scheme}, keep_source="memory")

    work = {
        "quantize": quantize,
        "restore": partial(lowbits.restore, other),
        "merge": partial(lowbits.merge_lora, model),
        "unmerge": partial(lowbits.unmerge_lora, model),
    }
    samples: dict[str, list[float]] = {name: [] for name in work}
    for is_warm in (False, *[True] * pace.rounds):
        for name, call in work.items():
            seconds = sample_s(call, device)
            if is_warm:
                samples[name].append(seconds)
    times = {name: statistics.median(values) for name, values in samples.items()}
    rounds = zip(samples["merge"], samples["quantize"], strict=True)
    ratio = statistics.median(merge / quantize for merge, quantize in rounds)
    return Merging(scheme, weights, times["quantize"], times["merge"], times["unmerge"], ratio)


_HEADERS: Final[dict[str, tuple[str, ...]]] = {
    "survival": (
        *("scheme", "weights", "bits", "error"),
        *(f"merged, {share:.0%}" for share in SHARES),
        *(f"requantized, {share:.0%}" for share in SHARES),
        *("beside, float32", "beside, bfloat16"),
    ),
    "attach": ("step", "layers", "peft alone, ms", "packed, ms", "of peft's"),
    "merge": ("scheme", "weights", "quantize, s", "merge, s", "take out, s", "merge, of quantize"),
}


def options() -> argparse.Namespace:
    """Parse the command line."""
    made = parser("bench_lora", __doc__, rounds=5)
    made.set_defaults(seconds=1200.0)
    made.add_argument("--parts", type=split, default=list(PARTS), help=", ".join(PARTS))
    made.add_argument("--schemes", type=split, default=packable_schemes())
    made.add_argument("--merged", type=split, default=list(MERGED), help="schemes that are timed")
    made.add_argument("--size", type=int, default=1024, help="of Gaussian weights")
    made.add_argument("--width", type=int, default=3072, help="of layers that are merged into")
    made.add_argument("--blocks", type=int, default=57, help="of the model that is attached to")
    return made.parse_args()


def measured(given: argparse.Namespace, budget: Budget) -> dict[str, list[Any]]:
    """Measure what is asked for."""
    rows: dict[str, list[Any]] = {part: [] for part in given.parts}
    pace = Pace(given.rounds, 1, 600.0)
    work: list[tuple[str, str, Callable[[], Any]]] = [
        ("attach", "attach", partial(attach, given.blocks, "torchao-int8", pace))
    ]
    for scheme in given.merged:
        for dtype in DTYPES:
            merge = partial(merging, scheme, dtype, given.width, given.device, pace)
            work.append(("merge", f"merge {scheme} {dtype}", merge))
    torch.default_generator.manual_seed(0)
    for label, weights in (("Gaussian", gaussian(given.size)), ("mini-FLUX", mini_flux())):
        for scheme in given.schemes:
            survival = partial(survival_of, scheme, label, weights)
            work.append(("survival", f"{label} {scheme}", survival))
    for part, what, call_of in work:
        if part not in rows or not budget.allows(what):
            continue
        try:
            found = call_of()
            found = found if isinstance(found, list) else [found]
        except Exception as error:  # noqa: BLE001 - the others are measured all the same
            budget.skip(what, error)
            continue
        rows[part] += found
        for row in found:
            print(" ".join(row.cells()), flush=True)
    return rows


def main() -> None:
    """Measure, print, and write."""
    warnings.simplefilter("ignore")
    given = options()
    torch.set_num_threads(given.threads)
    where, budget = machine(given.device), Budget(given.seconds)
    print(machine_line(where), flush=True)
    rows = measured(given, budget)
    tables = {part: [asdict(row) for row in found] for part, found in rows.items()}
    write_json(given.json, {"machine": where, **tables, "not_run": budget.not_run})
    for part, found in rows.items():
        print("", table(_HEADERS[part], [row.cells() for row in found]), sep="\n")
    print("", machine_line(where), "", budget.text(), sep="\n")


if __name__ == "__main__":
    main()
