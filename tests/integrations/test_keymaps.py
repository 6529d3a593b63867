"""Reference checkpoints of diffusers' models: there, back, and as diffusers itself reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from keymaps import joined, shapes_of
from tiny_models import CONFIGS, tiny
from torch import nn

import lowbits
from lowbits.errors import ConfigError, FormatError
from lowbits.files.rows import Segment
from lowbits.integrations.keymaps import (
    _converter_of,
    map_for,
    to_diffusers,
    to_reference,
)
from lowbits.integrations.module_tensors import tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MINIFLUX = Path(__file__).parents[2] / "benchmarks" / "miniflux" / "transformer"

LUMINA_BLOCK = [
    *(f"attention.{part}" for part in ("qkv", "out", "q_norm", "k_norm")),
    *(f"feed_forward.w{index}" for index in (1, 2, 3)),
    *(f"{part}_norm{index}" for part in ("attention", "ffn") for index in (1, 2)),
]

#: What each reference checkpoint calls its tensors, without blocks' numbers and `.weight`, of
#: which a converter that renames by substrings would accept wrong ones too.
#: Source: the models' own code, and files of city96 on the Hub.
NAMES = {
    "flux": """img_in txt_in time_in.in_layer time_in.out_layer vector_in.in_layer
        vector_in.out_layer guidance_in.in_layer guidance_in.out_layer
        double_blocks.#.img_mod.lin double_blocks.#.txt_mod.lin double_blocks.#.img_attn.qkv
        double_blocks.#.txt_attn.qkv double_blocks.#.img_attn.proj double_blocks.#.txt_attn.proj
        double_blocks.#.img_attn.norm.query_norm.scale double_blocks.#.img_attn.norm.key_norm.scale
        double_blocks.#.txt_attn.norm.query_norm.scale double_blocks.#.txt_attn.norm.key_norm.scale
        double_blocks.#.img_mlp.0 double_blocks.#.img_mlp.2 double_blocks.#.txt_mlp.0
        double_blocks.#.txt_mlp.2 single_blocks.#.modulation.lin single_blocks.#.linear1
        single_blocks.#.linear2 single_blocks.#.norm.query_norm.scale
        single_blocks.#.norm.key_norm.scale final_layer.linear final_layer.adaLN_modulation.1""",
    "sd3": """pos_embed x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 y_embedder.mlp.0
        y_embedder.mlp.2 context_embedder joint_blocks.#.x_block.attn.qkv
        joint_blocks.#.x_block.attn.proj joint_blocks.#.x_block.attn.ln_q
        joint_blocks.#.x_block.attn.ln_k joint_blocks.#.x_block.attn2.qkv
        joint_blocks.#.x_block.attn2.proj joint_blocks.#.x_block.attn2.ln_q
        joint_blocks.#.x_block.attn2.ln_k joint_blocks.#.x_block.mlp.fc1
        joint_blocks.#.x_block.mlp.fc2 joint_blocks.#.x_block.adaLN_modulation.1
        joint_blocks.#.context_block.attn.qkv joint_blocks.#.context_block.attn.proj
        joint_blocks.#.context_block.attn.ln_q joint_blocks.#.context_block.attn.ln_k
        joint_blocks.#.context_block.mlp.fc1 joint_blocks.#.context_block.mlp.fc2
        joint_blocks.#.context_block.adaLN_modulation.1 final_layer.linear
        final_layer.adaLN_modulation.1""",
    "wan-image": """patch_embedding text_embedding.0 text_embedding.2 time_embedding.0
        time_embedding.2 time_projection.1 img_emb.proj.0 img_emb.proj.1 img_emb.proj.3
        img_emb.proj.4 blocks.#.modulation blocks.#.self_attn.q blocks.#.self_attn.k
        blocks.#.self_attn.v blocks.#.self_attn.o blocks.#.self_attn.norm_q
        blocks.#.self_attn.norm_k blocks.#.norm3 blocks.#.cross_attn.q blocks.#.cross_attn.k
        blocks.#.cross_attn.v blocks.#.cross_attn.o blocks.#.cross_attn.norm_q
        blocks.#.cross_attn.norm_k blocks.#.cross_attn.k_img blocks.#.cross_attn.v_img
        blocks.#.cross_attn.norm_k_img blocks.#.ffn.0 blocks.#.ffn.2 head.head
        head.modulation""",
    "z-image": """x_pad_token cap_pad_token x_embedder t_embedder.mlp.0 t_embedder.mlp.2
        cap_embedder.0 cap_embedder.1 final_layer.linear final_layer.adaLN_modulation.1
        noise_refiner.#.adaLN_modulation.0 layers.#.adaLN_modulation.0 """
    + " ".join(
        f"{block}.#.{part}"
        for block in ("noise_refiner", "context_refiner", "layers")
        for part in LUMINA_BLOCK
    ),
    "sd15": """time_embed.0 time_embed.2 input_blocks.0.0 out.0 out.2 middle_block.1.norm
        middle_block.1.proj_in middle_block.1.proj_out input_blocks.3.0.op input_blocks.6.0.op
        input_blocks.9.0.op output_blocks.2.1.conv output_blocks.5.2.conv output_blocks.8.2.conv
        input_blocks.1.0.in_layers.0 input_blocks.1.0.in_layers.2 input_blocks.1.0.emb_layers.1
        input_blocks.1.0.out_layers.0 input_blocks.1.0.out_layers.3 input_blocks.11.0.in_layers.0
        input_blocks.7.0.skip_connection output_blocks.11.0.skip_connection
        output_blocks.11.1.transformer_blocks.0.attn1.to_q
        middle_block.1.transformer_blocks.0.ff.net.0.proj middle_block.0.in_layers.0
        middle_block.2.out_layers.3""",
}


def assert_same(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    assert tensors.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(tensors[name].reshape(tensor.shape), tensor), name


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny(name) for name in CONFIGS}


@pytest.fixture(scope="module")
def references(models: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: joined(to_reference(model), model.state_dict()) for name, model in models.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same(
    name: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    model, reference = models[name], references[name]
    keymap = to_diffusers(shapes_of(reference), model)
    assert_same(joined(keymap, reference), model)
    assert joined(to_reference(model), joined(keymap, reference)).keys() == reference.keys()


@pytest.mark.parametrize(
    "name", sorted(CONFIGS.keys() - {"flux", "flux-schnell", "chroma", "lumina2", "hunyuan"})
)
def test_diffusers_reads_the_reference_as_this_model(
    name: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    model = models[name]
    prefix = "model.diffusion_model." if name.startswith("sd1") or name == "sdxl" else ""
    _, converter = _converter_of(model)
    state_dict = {prefix + key: tensor for key, tensor in references[name].items()}
    assert_same(converter(config=model.config, checkpoint=state_dict), model)


@pytest.mark.parametrize("name", ["sd3", "sdxl", "wan", "z-image"])
def test_from_single_file_loads_the_reference(
    name: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    model = models[name]
    model.save_config(tmp_path)
    file = {f"model.diffusion_model.{key}": tensor for key, tensor in references[name].items()}
    loaded = type(model).from_single_file(file, config=str(tmp_path))
    assert_same(loaded.state_dict(), model)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("flux", {"attention_head_dim": 128, "num_attention_heads": 24}),
        ("chroma", {"attention_head_dim": 128, "num_attention_heads": 24}),
        ("hunyuan", {"attention_head_dim": 128, "num_attention_heads": 24}),
        ("lumina2", {"hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8}),
    ],
)
def test_converters_of_one_width_agree_at_that_width(name: str, width: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = tiny(name, **width)
    backward = to_reference(model)
    # Converters look at rows only, so one value stands for each.
    rows = {key: torch.randn(shape[0], 1) for key, shape in tensors_of(model).shapes.items()}
    reference = joined(backward, rows)
    _, converter = _converter_of(model)
    converted = converter(config=model.config, checkpoint=dict(reference))
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    wide = {
        key: (len(tensor), *own[backward[key][0].source][1:]) for key, tensor in reference.items()
    }
    ours = joined(to_diffusers(wide, model), reference)
    assert converted.keys() == ours.keys() == rows.keys()
    for key, tensor in rows.items():
        assert torch.equal(converted[key], tensor), key
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_the_names_are_those_of_reference_checkpoints(
    name: str, references: dict[str, dict[str, Tensor]]
) -> None:
    names = {re.sub(r"\.(weight|bias)$", "", key) for key in references[name]}
    if name != "sd15":
        pattern = r"^(\w*blocks|layers|\w+_refiner)\.\d+"
        names = {re.sub(pattern, r"\1.#", key) for key in names}
        assert names == set(NAMES[name].split())
    assert names >= set(NAMES[name].split())


def test_sdxl_has_the_marks_of_sdxl(references: dict[str, dict[str, Tensor]]) -> None:
    assert references["sdxl"].keys() >= {
        "input_blocks.3.0.op.weight",
        "input_blocks.6.0.op.weight",
        "output_blocks.2.2.conv.weight",
        "output_blocks.5.2.conv.weight",
        "label_emb.0.0.weight",
        "input_blocks.8.1.transformer_blocks.1.attn2.to_k.weight",
    }


def test_a_fused_weight_is_rows_of_its_parts(models: dict[str, Any]) -> None:
    keymap = to_reference(models["flux"])
    block, hidden = "single_transformer_blocks.1", 80
    assert keymap["single_blocks.1.linear1.weight"] == (
        Segment(f"{block}.attn.to_q.weight", 0, hidden),
        Segment(f"{block}.attn.to_k.weight", 0, hidden),
        Segment(f"{block}.attn.to_v.weight", 0, hidden),
        Segment(f"{block}.proj_mlp.weight", 0, 4 * hidden),
    )
    # The reference has the shift first, diffusers the scale.
    assert keymap["final_layer.adaLN_modulation.1.weight"] == (
        Segment("norm_out.linear.weight", hidden, 2 * hidden),
        Segment("norm_out.linear.weight", 0, hidden),
    )


@pytest.mark.parametrize("guidance", [True, False])
def test_full_models_are_mapped(guidance: bool) -> None:  # noqa: FBT001
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=guidance)
    backward = to_reference(model)
    assert len(backward) == (780 if guidance else 776)  # of FLUX.1-dev and -schnell
    shapes = tensors_of(model).shapes
    reference = {
        name: (sum(s.stop - s.start for s in segments), *shapes[segments[0].source][1:])
        for name, segments in backward.items()
    }
    assert reference["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert reference["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
    assert to_diffusers(reference, model).keys() == shapes.keys()


def test_mini_flux_there_and_back() -> None:
    model = diffusers.FluxTransformer2DModel.from_pretrained(MINIFLUX)
    reference = joined(to_reference(model), model.state_dict())
    assert reference["single_blocks.0.linear1.weight"].shape == (7 * 256, 256)
    assert_same(joined(map_for(model, shapes_of(reference)), reference), model)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefix_is_found(
    name: str, prefix: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    state_dict = {prefix + key: tensor for key, tensor in references[name].items()}
    keymap = map_for(models[name], shapes_of(state_dict))
    assert_same(joined(keymap, state_dict), models[name])


@pytest.mark.parametrize("prefix", ["", "transformer.", "net.", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["flux", "z-image", "sdxl"])
def test_a_models_own_names_are_taken_as_they_are(
    name: str, prefix: str, models: dict[str, Any]
) -> None:
    state_dict = {prefix + key: tensor for key, tensor in models[name].state_dict().items()}
    keymap = map_for(models[name], shapes_of(state_dict))
    assert_same(joined(keymap, state_dict), models[name])
    assert all(len(segments) == 1 for segments in keymap.values())


def test_any_module_has_its_own_names() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    keymap = map_for(module, shapes_of(module.state_dict()))
    assert keymap["1.num_batches_tracked"] == (Segment("1.num_batches_tracked", 0, 1),)
    assert joined(keymap, module.state_dict())["0.weight"].shape == (3, 2)


@pytest.mark.parametrize("name", ["sd3", "wan", "wan-vace", "z-image"])
def test_leading_dims_of_one_may_be_absent(
    name: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    flat = {
        key: tensor.flatten(0, 1) if len(tensor) == 1 and tensor.dim() > 1 else tensor
        for key, tensor in references[name].items()
    }
    assert shapes_of(flat) != shapes_of(references[name])
    assert_same(joined(map_for(models[name], shapes_of(flat)), flat), models[name])


def test_of_several_models_in_a_file_the_right_one_is_taken(
    models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    file = {f"model.diffusion_model.{key}": t for key, t in references["sdxl"].items()}
    file |= {f"first_stage_model.{key}": t for key, t in vae.state_dict().items()}
    file |= {"model_ema.decay": torch.zeros(()), "alphas_cumprod": torch.zeros(1000)}
    assert_same(joined(map_for(models["sdxl"], shapes_of(file)), file), models["sdxl"])
    assert_same(joined(map_for(vae, shapes_of(file)), file), vae)
    with pytest.raises(FormatError, match="holds sdxl, vae, no FluxTransformer2DModel"):
        map_for(models["flux"], shapes_of(file))


def ldm_name(name: str, levels: int) -> str:
    """Name an AutoencoderKL's tensor as latent diffusion does."""
    level = re.search(r"up_blocks\.(\d+)", name)
    if level:
        name = name.replace(level[0], f"up.{levels - 1 - int(level[1])}")
    for pattern, reference in (
        (r"down_blocks\.(\d+)", r"down.\1"),
        (r"(up|down)\.(\d+)\.resnets", r"\1.\2.block"),
        (r"(?:down|up)samplers\.0\.conv", "Xsample.conv"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ):
        name = re.sub(pattern, reference, name)
    return name.replace("Xsample", "downsample" if "down." in name else "upsample")


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_vaes_are_read(prefix: str, quant: bool) -> None:  # noqa: FBT001
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    reference = {prefix + ldm_name(key, 2): tensor for key, tensor in vae.state_dict().items()}
    assert f"{prefix}encoder.down.0.downsample.conv.weight" in reference
    convolutions = {
        key: tensor[..., None, None] if ".attn_1." in key and tensor.dim() == 2 else tensor
        for key, tensor in reference.items()
    }
    assert_same(joined(map_for(vae, shapes_of(convolutions)), convolutions), vae)


def test_packed_weights_count_as_weights() -> None:
    model = tiny("flux", attention_head_dim=32, num_attention_heads=2, axes_dims_rope=(8, 12, 12))
    shapes, keymap = tensors_of(model).shapes, to_reference(model)
    assert lowbits.quantize(model, "gguf-q8_0").report().packed
    assert tensors_of(model).shapes == shapes
    assert to_reference(model) == keymap


REFERENCES = ["flux", "sd3", "sdxl", "sd15", "wan", "qwen-image", "z-image", "lumina2", "hunyuan"]


@pytest.mark.parametrize("name", REFERENCES)
def test_a_missing_block_is_refused(
    name: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    shapes = shapes_of(references[name])
    lost = next(key for key in reversed(shapes) if re.search(r"(blocks|layers)\.1\.", key))
    fewer = {key: shape for key, shape in shapes.items() if key != lost}
    with pytest.raises(FormatError):
        map_for(models[name], fewer)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_tensor_too_many_is_refused(
    name: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    more = {**shapes_of(references[name]), "lora_unet.up.weight": (4, 4)}
    with pytest.raises(FormatError, match="lora_unet"):
        map_for(models[name], more)


@pytest.mark.parametrize("name", REFERENCES)
def test_wrong_shapes_are_refused(
    name: str, models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    shapes = shapes_of(references[name])
    for key in list(shapes)[:: max(1, len(shapes) // 12)]:
        first, *others = shapes[key]
        for wrong in ((first + 1, *others), (2 * first, *others), (*shapes[key], 2), (0, *others)):
            with pytest.raises(FormatError) as caught:
                map_for(models[name], {**shapes, key: wrong})
            assert str(caught.value)


def test_rows_that_do_not_exist_are_refused_in_no_time(
    models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    shapes = shapes_of(references["flux"])
    with pytest.raises(FormatError, match="rows"):
        map_for(models["flux"], {**shapes, "single_blocks.0.linear1.weight": (2**60, 80)})
    many = {f"single_blocks.{index}.linear1.bias": (2**40,) for index in range(10_000)}
    with pytest.raises(FormatError, match="holds 10089 tensors"):
        map_for(models["flux"], {**shapes, **many})
    far = {**shapes, "double_blocks.1000000000000.img_mod.lin.weight": (1, 1)}
    with pytest.raises(FormatError):
        map_for(models["flux"], far)
    with pytest.raises(FormatError):
        map_for(models["flux"], {**shapes, "double_blocks.one.img_mod.lin.weight": (1, 1)})


def test_another_model_is_refused(
    models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    with pytest.raises(FormatError, match="holds sd3, no FluxTransformer2DModel"):
        map_for(models["flux"], shapes_of(references["sd3"]))
    with pytest.raises(FormatError, match="lacks 2 of the"):
        map_for(
            models["flux-schnell"],
            shapes_of(dict(list(models["flux-schnell"].state_dict().items())[2:])),
        )
    with pytest.raises(FormatError, match="nothing that is recognized"):
        map_for(nn.Linear(2, 2), {"a.weight": (2, 2)})
    with pytest.raises(FormatError, match="the converter refuses"):
        map_for(models["flux"], {"a.weight": (2, 2)})


def test_what_no_model_reads_is_left_out(
    models: dict[str, Any], references: dict[str, dict[str, Tensor]]
) -> None:
    shapes = shapes_of(references["z-image"])
    more = {**shapes, "norm_final.weight": (64,), "scaled_fp8": (0,)}
    assert map_for(models["z-image"], more) == map_for(models["z-image"], shapes)


def test_models_without_a_reference_are_told() -> None:
    model = diffusers.PixArtTransformer2DModel(
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=8,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        norm_num_groups=1,
    )
    with pytest.raises(ConfigError, match="has no form with the reference's names"):
        to_reference(model)
    with pytest.raises(ConfigError, match="has no form"):
        to_reference(nn.Linear(2, 2))


def test_a_model_that_is_read_only_is_told() -> None:
    dit = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=1,
        attention_head_dim=16,
        num_layers=1,
        text_embed_dim=8,
        adaln_lora_dim=4,
    )
    with pytest.raises(ConfigError, match="no reference names are known for a CosmosTransformer"):
        to_reference(dit)
    uneven = tiny("sd15", layers_per_block=(1, 2, 2, 1))
    with pytest.raises(ConfigError, match="whose blocks differ in their number of layers"):
        to_reference(uneven)
