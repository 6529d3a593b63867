"""Whole diffusers pipelines, every Linear, Conv and Embedding of them packed, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from pipelines import PIPELINES, draw
from torch import nn

import lowbits
from lowbits import errors
from lowbits.core.packed import PackedLayer
from lowbits.integrations.diffusers import components_of, default_reason, denoisers_of

#: Mean difference of pictures in 0..1 that random tiny models show: a floor against garbage.
LIMIT = {"bnb-nf4": 0.12, "torchao-int8": 0.02, "gguf-q8_0": 0.02, "float8-e4m3fn": 0.06}


def pack_all(pipe: Any, scheme: str) -> lowbits.Handle:
    return lowbits.apply(
        pipe, scheme, components=list(components_of(pipe)), rules={"*": scheme}, device="cpu"
    )


@pytest.mark.parametrize("scheme", LIMIT)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_layer_packed_and_restored(name: str, scheme: str) -> None:
    pipe = PIPELINES[name].build()
    expected = draw(name, pipe)
    handle = pack_all(pipe, scheme)
    left = [
        row
        for row in handle.report().layers
        if row.kind in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding") and row.source == "-"
    ]
    assert all("not a multiple" in row.reason for row in left), left
    assert scheme.startswith("gguf") or not left
    got = draw(name, pipe)
    assert got.isfinite().all()
    assert 0 < float((got - expected).abs().mean()) < LIMIT[scheme]
    lowbits.restore(pipe)
    assert torch.equal(draw(name, pipe), expected)
    assert not any(
        isinstance(module, PackedLayer)
        for part in components_of(pipe).values()
        for module in part.modules()
    )


def test_defaults_pack_the_denoiser_and_t5_and_say_why_not_the_rest() -> None:
    pipe = PIPELINES["flux"].build()
    report = lowbits.apply(pipe, "bnb-nf4").report()
    packed = {row.component for row in report.packed}
    assert packed == {"transformer", "text_encoder_2"}
    reasons = {row.component: row.reason for row in report.layers if row.kind == "Linear"}
    assert reasons["text_encoder"].startswith("CLIP text encoder: small and sensitive")
    assert reasons["vae"].startswith("VAE: small and sensitive")
    adaln = [row for row in report.packed if ".norm1.linear" in row.fqn]
    assert adaln, "AdaLN projections are 27 % of FLUX: they are packed"
    assert "text_encoder: 410.35 KiB -> 410.35 KiB (1.00x), 0 weights packed" in report.table()


def test_defaults_know_components_of_pipelines_that_are_made_of_several() -> None:
    """Kandinsky, Stable Cascade: the names of one part begin with its own."""
    kinds = {
        "prior_prior": "PriorTransformer",
        "prior_image_encoder": "CLIPVisionModelWithProjection",
        "prior_text_encoder": "CLIPTextModelWithProjection",
        "decoder": "StableCascadeUNet",
        "decoder_text_encoder_2": "T5EncoderModel",
    }
    packed = [name for name, kind in kinds.items() if not default_reason(name, kind)]
    assert packed == ["prior_prior", "decoder", "decoder_text_encoder_2"]
    assert denoisers_of(kinds) == ["prior_prior", "decoder"]


def test_a_scheme_for_each_component() -> None:
    pipe = PIPELINES["flux"].build()
    handle = lowbits.apply(
        pipe, components={"transformer": "bnb-nf4", "text_encoder_2": "torchao-int8", "vae": None}
    )
    schemes = {row.component: row.scheme for row in handle.report().packed}
    assert schemes == {"transformer": "bnb-nf4", "text_encoder_2": "torchao-int8"}


def test_general_rules_do_not_reach_into_components_that_were_left_out() -> None:
    pipe = PIPELINES["flux"].build()
    handle = lowbits.apply(pipe, "bnb-nf4", rules={"*": "bnb-nf4"})
    assert "vae" not in {row.component for row in handle.report().packed}
    handle.restore()
    handle = lowbits.apply(pipe, "bnb-nf4", rules={"vae.decoder": "float8-e4m3fn"})
    assert ("vae", "float8-e4m3fn") in {(r.component, r.scheme) for r in handle.report().packed}


def test_an_unknown_component_is_refused_with_a_suggestion() -> None:
    pipe = PIPELINES["flux"].build()
    with pytest.raises(errors.ConfigError, match="no 'transfromer'; did you mean 'transformer'"):
        lowbits.apply(pipe, components={"transfromer": "bnb-nf4"})


def test_none_components_and_shared_ones() -> None:
    pipe = PIPELINES["sd3"].build()
    pipe.text_encoder_3 = None
    assert {row.component for row in lowbits.apply(pipe, "bnb-nf4").report().packed} == {
        "transformer"
    }
    lowbits.restore(pipe)
    pipe.register_modules(text_encoder_2=pipe.text_encoder)
    report = lowbits.apply(
        pipe, "bnb-nf4", components=["transformer", "text_encoder", "text_encoder_2"]
    ).report()
    components = {row.component for row in report.layers}
    assert "text_encoder" in components
    assert "text_encoder_2" not in components, "a shared module is counted once"


def test_another_pipeline_over_the_same_modules() -> None:
    pipe = PIPELINES["sdxl"].build()
    handle = lowbits.apply(pipe, "bnb-nf4")
    other = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    assert lowbits.handle(other) is handle
    with pytest.raises(errors.AlreadyPatchedError, match="unet is packed already.*switch"):
        lowbits.apply(other, "bnb-nf4")
    expected = draw("sdxl", pipe)
    again = type(pipe).from_pipe(other)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw("sdxl", again), expected)
    lowbits.restore(other)
    assert lowbits.handle(pipe) is None


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_sdxl_in_float16_upcasts_its_packed_vae() -> None:
    pipe = PIPELINES["sdxl"].build(dtype=torch.float16)
    expected = draw("sdxl", pipe)
    handle = pack_all(pipe, "bnb-int8")
    codes = {n: p.clone() for n, p in pipe.vae.named_parameters() if n.endswith("qdata")}
    got = draw("sdxl", pipe)
    assert pipe.vae.dtype == pipe.unet.dtype == torch.float16
    assert all(torch.equal(codes[n], p) for n, p in pipe.vae.named_parameters() if n in codes)
    assert float((got - expected).abs().mean()) < 0.03
    handle.restore()
    with torch.no_grad():
        assert torch.allclose(draw("sdxl", pipe), expected, atol=5e-3)


def test_dtype_and_device_queries_answer_as_before() -> None:
    pipe = PIPELINES["flux"].build(dtype=torch.bfloat16)
    lowbits.apply(pipe, "float8-e4m3fn")
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.text_encoder_2.dtype == torch.bfloat16
    assert pipe.transformer.device == torch.device("cpu")
    assert draw("flux", pipe).isfinite().all()


def test_t5_reads_the_dtype_of_its_packed_output_projection() -> None:
    pipe = PIPELINES["flux"].build(dtype=torch.float16)
    handle = pack_all(pipe, "gguf-q8_0")
    wo = pipe.text_encoder_2.encoder.block[0].layer[-1].DenseReluDense.wo
    assert isinstance(wo, PackedLayer)
    assert wo.weight.dtype == torch.float32, "transformers keeps wo in float32 at float16"
    assert draw("flux", pipe).isfinite().all()
    handle.restore()


def test_a_target_that_is_neither_module_nor_pipeline() -> None:
    with pytest.raises(errors.ConfigError, match="got dict, expected a torch.nn.Module or a diff"):
        lowbits.apply({}, "bnb-nf4")
    with pytest.raises(errors.NotPatchedError, match="has no handle"):
        lowbits.restore(nn.Linear(2, 2))
