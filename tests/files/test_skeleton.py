"""Layers guessed from names and shapes, against the modules of the models themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from pipelines import PIPELINES
from tiny_models import CONFIGS, tiny
from torch import nn
from transformers import T5EncoderModel

from lowbits.core.registry import DEFAULT
from lowbits.core.select import Component, Selection, select
from lowbits.files.skeleton import skeleton_of
from lowbits.files.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL = Path(__file__).parents[2] / "benchmarks" / "miniflux"
Decided = dict[str, tuple[str, str | None]]


def weights(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None) -> dict[str, Weight]:
    def refuse() -> torch.Tensor:
        raise AssertionError("read")

    return {name: Weight(name, shape, dtype, 0, refuse) for name, shape in shapes.items()}


def guess(*shapes: tuple[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.Module:
    return skeleton_of(weights(dict(shapes), dtype))


def decided(module: nn.Module, scheme: str = "torchao-int8") -> Decided:
    """Return the kind of each tensor, and the scheme that it would be packed in."""
    chosen = select([Component("", module, scheme)], Selection({}, (), DEFAULT, sees_meta=True))
    return {d.fqn: (d.kind, d.scheme.name if d.scheme else None) for d in chosen}


def packed(module: nn.Module, scheme: str) -> dict[str, str]:
    return {fqn: name for fqn, (_, name) in decided(module, scheme).items() if name}


def stand_in(module: nn.Module) -> nn.Module:
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    return skeleton_of({n: replace(w, dtype=dtypes[n]) for n, w in weights(shapes, None).items()})


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("a.weight", (64, 128), "Linear"),
        ("a.weight", (64, 128, 3), "Conv1d"),
        ("a.weight", (64, 128, 3, 3), "Conv2d"),
        ("a.weight", (64, 16, 1, 2, 2), "Conv3d"),
        ("shared.weight", (64, 128), "Embedding"),
        ("encoder.embed_tokens.weight", (64, 128), "Embedding"),
        ("token_embd.weight", (64, 128), "Embedding"),
        ("text_model.embeddings.token_embedding.weight", (64, 128), "Embedding"),
        ("text_model.embeddings.position_embedding.weight", (64, 128), "Embedding"),
        ("embeddings.word_embeddings.weight", (64, 128), "Embedding"),
        ("layer.0.SelfAttention.relative_attention_bias.weight", (64, 128), "Embedding"),
        ("x.not_shared.weight", (64, 128), "Linear"),
        ("shared.up.weight", (64, 128), "Linear"),
    ],
)
def test_kinds_go_by_names_and_shapes(name: str, shape: tuple[int, ...], kind: str) -> None:
    fqn = name.removesuffix(".weight")
    assert decided(guess((name, shape)))[fqn] == (kind, "torchao-int8")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("norm.weight", (128,)),
        ("a.bias", (128,)),
        ("scale_shift_table", (6, 2048)),
        ("pos_embed", (1, 64, 128)),
        ("a.in_proj_weight", (384, 128)),
        ("a.weight", (2, 3, 4, 5, 6, 7)),
        ("a.weight", ()),
    ],
)
def test_what_no_layer_has_is_left_alone(name: str, shape: tuple[int, ...]) -> None:
    [(_, scheme)] = decided(guess((name, shape))).values()
    assert scheme is None


def test_integers_are_buffers() -> None:
    [(kind, scheme)] = decided(guess(("ids.weight", (64, 128)), dtype=torch.int64)).values()
    assert (kind, scheme) == ("buffer", None)


@pytest.mark.parametrize("names", [("a.b.bias", "a.b.weight"), ("a.b.weight", "a.b.bias")])
def test_the_order_of_names_does_not_matter(names: tuple[str, str]) -> None:
    shapes = {"a.b.bias": (64,), "a.b.weight": (64, 128)}
    module = guess(*((name, shapes[name]) for name in names))
    assert set(module.state_dict()) == set(names)
    assert decided(module)["a.b"] == ("Linear", "torchao-int8")


def test_names_shapes_and_dtypes_are_those_of_the_file() -> None:
    shapes = {
        "a.0.weight": (4, 8),
        "a.0.bias": (4,),
        "b": (3,),
        "c.d.e.f": (1, 2, 3),
        "w.weight": (),
    }
    module = skeleton_of(weights(shapes, torch.float16))
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == shapes
    assert all(t.dtype == torch.float16 and t.is_meta for t in module.state_dict().values())
    assert {t.dtype for t in skeleton_of(weights(shapes, None)).state_dict().values()} == {
        torch.float32
    }


def test_lists_of_blocks_have_no_first_and_last_projections() -> None:
    wide = (2048, 64)
    module = guess(
        ("blocks.0.proj.weight", wide), ("img_in.weight", wide), ("mid.mlp.2.weight", wide)
    )
    schemes = {fqn: scheme for fqn, (_, scheme) in decided(module).items()}
    assert schemes == {
        "blocks.0.proj": "torchao-int8",
        "img_in": None,
        "mid.mlp.2": "torchao-int8",
    }


def test_a_layer_may_have_parts_and_numbers() -> None:
    shapes = {"x.weight": (64, 128), "x.0.weight": (64, 128), "x.parametrizations.y": (4,)}
    for names in (list(shapes), list(shapes)[::-1]):
        module = guess(*((name, shapes[name]) for name in names))
        assert set(module.state_dict()) == set(shapes)
        assert decided(module)["x"][0] == decided(module)["x.0"][0] == "Linear"


@pytest.mark.parametrize("scheme", ["bnb-nf4", "gguf-q4_k_m"])
def test_mini_flux_is_packed_as_its_own_classes_are(scheme: str) -> None:
    models: list[Any] = [
        FluxTransformer2DModel.from_pretrained(MODEL / "transformer"),
        T5EncoderModel.from_pretrained(MODEL / "text_encoder_2"),
    ]
    for model in models:
        wanted = packed(model, scheme)
        got = packed(stand_in(model), scheme)
        assert len(wanted) > 10
        assert got == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_denoisers_are_packed_as_their_own_classes_are(name: str) -> None:
    model = tiny(name)
    assert packed(stand_in(model), "float8-e4m3fn") == packed(model, "float8-e4m3fn")


@pytest.mark.parametrize(
    "name", [n if n == "sd3" else pytest.param(n, marks=pytest.mark.slow) for n in PIPELINES]
)
def test_parts_of_pipelines_are_packed_as_their_own_classes_are(name: str) -> None:
    for part in PIPELINES[name].build().components.values():
        if isinstance(part, nn.Module):
            assert packed(stand_in(part), "torchao-int8") == packed(part, "torchao-int8")
