"""Pipelines that are not one folder for each model as it was made: several nets, fused, modular."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.modular_pipelines import FluxAutoBlocks
from PIL import Image
from pipelines import PIPELINES, draw

import lowbits
from lowbits import errors
from lowbits.core.packed import PackedLayer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def is_packed(module: nn.Module) -> bool:
    return any(isinstance(part, PackedLayer) for part in module.modules())


def controlled(n_nets: int) -> Any:
    pipe: Any = PIPELINES["sd15"].build()
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config({**pipe.unet.config, "time_embedding_dim": None})
    nets: list[Any] = [ControlNetModel.from_unet(unet.eval()).eval() for _ in range(n_nets)]
    for net in nets:
        for block in net.controlnet_down_blocks:
            torch.nn.init.normal_(block.weight, std=0.2)  # which begin as zeros
    parts = {**pipe.components, "unet": unet, "controlnet": nets}
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)


def controlled_picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    nets = len(pipe.controlnet.nets)
    generator = torch.Generator().manual_seed(0)
    call = {**PIPELINES["sd15"].call, "image": [PICTURE] * nets, "generator": generator}
    return torch.from_numpy(pipe(**call).images)


@pytest.mark.parametrize("by", ["save", "save_pretrained"])
@pytest.mark.parametrize("rules", [{}, {"controlnet.nets.1": "native"}])
def test_several_controlnets(tmp_path: Path, by: str, rules: dict[str, str]) -> None:
    pipe = controlled(3)
    handle = lowbits.apply(pipe, "bnb-nf4", device="cpu", rules=rules)
    expected = controlled_picture(pipe)
    if by == "save":
        lowbits.save(pipe, tmp_path / "pipe")
    else:
        pipe.save_pretrained(tmp_path / "pipe")
    folders = sorted(path.name for path in (tmp_path / "pipe").glob("controlnet*"))
    assert folders == ["controlnet", "controlnet_1", "controlnet_2"]
    loaded = lowbits.load_pipeline(tmp_path / "pipe")
    assert type(loaded.controlnet) is MultiControlNetModel
    assert [is_packed(net) for net in loaded.controlnet.nets] == [True, not rules, True]
    assert torch.equal(controlled_picture(loaded), expected)
    assert torch.equal(controlled_picture(pipe), expected)
    handle.restore()
    assert all("save_pretrained" not in vars(part) for part in pipe.controlnet.modules())


def test_several_controlnets_are_converted(tmp_path: Path) -> None:
    pipe = controlled(2)
    pipe.save_pretrained(tmp_path / "src")
    lowbits.convert(tmp_path / "src", tmp_path / "packed", "bnb-nf4")
    loaded = lowbits.load_pipeline(tmp_path / "packed")
    assert all(map(is_packed, loaded.controlnet.nets))
    lowbits.apply(pipe, "bnb-nf4", device="cpu")
    assert torch.equal(controlled_picture(loaded), controlled_picture(pipe))


def test_fused_projections(tmp_path: Path) -> None:
    """diffusers keeps what it has fused, and reads that again."""
    pipe: Any = PIPELINES["flux"].build()
    pipe.transformer.fuse_qkv_projections()
    lowbits.apply(pipe, "torchao-int8", device="cpu")
    expected = draw("flux", pipe)
    pipe.save_pretrained(tmp_path)
    loaded = lowbits.load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw("flux", loaded), expected, atol=0.02, rtol=0)


def test_a_modular_pipeline(tmp_path: Path) -> None:
    pipe: Any = PIPELINES["flux"].build()
    modular = FluxAutoBlocks().init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    modular.update_components(**{n: p for n, p in parts.items() if n in modular.component_names})
    with lowbits.apply(modular, "bnb-nf4", device="cpu") as handle:
        assert {row.component for row in handle.report().packed} == {
            "transformer",
            "text_encoder_2",
        }
        assert is_packed(pipe.transformer)
        with pytest.raises(errors.ConfigError, match="a modular pipeline is not saved as a whole"):
            lowbits.save(modular, tmp_path / "pipe")
        lowbits.save(modular.transformer, tmp_path / "transformer")
    assert not is_packed(pipe.transformer)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_reasons_are_of_what_was_asked_for() -> None:
    pipe: Any = PIPELINES["sd15"].build()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(errors.NoCapableBackendError) as caught:
        lowbits.apply(pipe, "bnb-int8", device="cpu")
    assert "enable_layerwise_casting" in str(caught.value)
    assert all(name.startswith("unet.") for name in caught.value.failures)
