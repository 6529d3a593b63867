"""peft's LoRA on packed pipelines, through diffusers' own functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from loras import save_lora
from pipelines import PIPELINES, draw

import lowbits
from lowbits.core.packed import PackedLayer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("scheme", ["bnb-nf4", "torchao-int8", "gguf-q8_0", "float8-e4m3fn"])
@pytest.mark.parametrize("order", ["lora first", "packed first"])
def test_a_lora_acts_beside_packed_weights_and_is_taken_away(
    scheme: str, order: str, tmp_path: Path
) -> None:
    save_lora(tmp_path)
    pipe: Any = PIPELINES["flux"].build()
    plain = draw("flux", pipe)
    pipe.load_lora_weights(tmp_path)
    with_lora = draw("flux", pipe)
    effect = float((with_lora - plain).abs().mean())
    assert effect > 0.01
    if order == "packed first":
        pipe = PIPELINES["flux"].build()
    handle = lowbits.apply(pipe, scheme, rules={"*": scheme}, device="cpu")
    if order == "packed first":
        packed = draw("flux", pipe)
        pipe.load_lora_weights(tmp_path)
    got = draw("flux", pipe)
    assert not any(
        isinstance(module, PackedLayer)
        for name, module in pipe.transformer.named_modules()
        if "lora_" in name
    )
    pipe.disable_lora()
    without = draw("flux", pipe)
    if order == "packed first":
        assert torch.equal(without, packed)
    change = (got - without, with_lora - plain)
    cosine = torch.cosine_similarity(change[0].flatten(), change[1].flatten(), dim=0)
    assert float(cosine) > 0.5, "the LoRA changes the picture as it does in full precision"
    pipe.enable_lora()
    handle.restore()
    assert torch.equal(draw("flux", pipe), with_lora), "the adapter goes on working"
    pipe.unload_lora_weights()
    assert torch.equal(draw("flux", pipe), plain)
