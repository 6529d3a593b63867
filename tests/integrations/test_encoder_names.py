"""Text encoders: their own names, those of checkpoints of several models, and llama.cpp's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
from keymaps import joined, shapes_of
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from lowbits.errors import FormatError
from lowbits.files.rows import Segment
from lowbits.integrations.keymaps import map_for
from lowbits.integrations.module_tensors import tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
LLM = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CLIP = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 12,
}


def assert_read(model: Any, file: Mapping[str, Tensor], arch: str | None = None) -> None:
    keymap, own = map_for(model, shapes_of(file), arch), model.state_dict()
    assert keymap.keys() == tensors_of(model).shapes.keys()
    for name, tensor in joined(keymap, file).items():
        assert torch.equal(tensor, own[name]), name


def llama_cpp(model: Any, arch: gguf.MODEL_ARCH) -> dict[str, Tensor]:
    """Name a model's tensors by gguf's own table, and order them as llama.cpp's converter does."""
    names = gguf.get_tensor_name_map(arch, LLM["num_hidden_layers"])
    file = {}
    for name in tensors_of(model).shapes:
        full = (
            name if name.startswith(("model.", "lm_head", "shared", "encoder")) else f"model.{name}"
        )
        there = names.get_name(full, try_suffixes=(".weight", ".bias"))
        assert there is not None, full
        file[there] = model.state_dict()[name]
    return file


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """Order rows as ``LlamaModel.permute`` of convert_hf_to_gguf.py (ggml-org/llama.cpp) does."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


@pytest.fixture(scope="module")
def t5() -> Any:
    return T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu"))


@pytest.fixture(scope="module")
def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**LLM, tie_word_embeddings=False))


@pytest.mark.parametrize("arch", [None, "t5", "t5encoder"])
def test_t5_of_llama_cpp(t5: Any, arch: str | None) -> None:
    file = llama_cpp(t5, gguf.MODEL_ARCH.T5)
    assert {"enc.blk.1.ffn_gate.weight", "enc.blk.0.attn_rel_b.weight"} <= file.keys()
    assert_read(t5, file, arch)


def test_t5_without_gates_and_umt5_of_llama_cpp() -> None:
    plain = T5EncoderModel(T5Config(**T5, feed_forward_proj="relu"))
    assert_read(plain, llama_cpp(plain, gguf.MODEL_ARCH.T5))
    multilingual = UMT5EncoderModel(UMT5Config(**T5))
    file = llama_cpp(multilingual, gguf.MODEL_ARCH.T5)
    assert "enc.blk.1.attn_rel_b.weight" in file
    assert_read(multilingual, file)


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer.", "transformer."])
@pytest.mark.parametrize("without", [[], ["shared.weight"], ["encoder.embed_tokens.weight"]])
def test_t5_of_transformers_by_either_name_of_its_embedding(
    t5: Any, prefix: str, without: list[str]
) -> None:
    file = {prefix + name: t for name, t in t5.state_dict().items() if name not in without}
    assert_read(t5, file)
    assert_read(t5, {**file, f"{prefix}scaled_fp8": torch.zeros(0)})


def test_llama_of_llama_cpp_has_its_heads_in_order_again(llama: Any) -> None:
    file = llama_cpp(llama, gguf.MODEL_ARCH.LLAMA)
    for index in range(2):
        for part, heads in (("q", 4), ("k", 2)):
            name = f"blk.{index}.attn_{part}.weight"
            file[name] = permuted(file[name], heads)
    file["rope_freqs.weight"] = torch.zeros(4)
    assert_read(llama, file)
    assert_read(llama, file, "llama")
    keymap = map_for(llama, shapes_of(file))
    assert keymap["model.layers.0.self_attn.k_proj.weight"] == (
        Segment("blk.0.attn_k.weight", 0, 8, 2),
        Segment("blk.0.attn_k.weight", 1, 8, 2),
        Segment("blk.0.attn_k.weight", 8, 16, 2),
        Segment("blk.0.attn_k.weight", 9, 16, 2),
    )


def test_qwen_of_llama_cpp() -> None:
    two, three = Qwen2Model(Qwen2Config(**LLM)), Qwen3Model(Qwen3Config(**LLM))
    second = llama_cpp(two, gguf.MODEL_ARCH.QWEN2)
    assert_read(two, second)
    assert_read(two, second, "qwen2vl")
    assert_read(two, {**second, "output.weight": torch.zeros(40, 32)}, "qwen2")
    assert_read(three, llama_cpp(three, gguf.MODEL_ARCH.QWEN3))


def test_a_model_that_sees_lacks_its_other_file() -> None:
    with torch.device("meta"):
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={**LLM, "rope_parameters": rope},
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                },
            )
        )
    file = shapes_of(llama_cpp(Qwen2Model(Qwen2Config(**LLM)), gguf.MODEL_ARCH.QWEN2))
    with pytest.raises(FormatError, match="keeps what sees in a file of its own \\(mmproj\\)"):
        map_for(model, file, "qwen2vl")
    text = model.model.language_model
    keymap = map_for(text, file, "qwen2vl")
    assert keymap.keys() == tensors_of(text).shapes.keys()
    assert keymap["layers.1.mlp.up_proj.weight"] == (Segment("blk.1.ffn_up.weight", 0, 48),)


def test_language_models_of_another_kind_are_refused(llama: Any) -> None:
    file = shapes_of(llama_cpp(llama, gguf.MODEL_ARCH.LLAMA))
    with pytest.raises(FormatError, match="architecture 'gemma2'; the model is a llama. Known"):
        map_for(llama, file, "gemma2")
    with pytest.raises(FormatError, match="architecture 'llama'; the model is a qwen2"):
        map_for(
            Qwen2Model(Qwen2Config(**LLM, attention_bias=False)),
            {
                **file,
                **{
                    f"blk.{i}.attn_{part}.bias": (16 if part != "q" else 32,)
                    for i in (0, 1)
                    for part in "qkv"
                },
            },
            "llama",
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.attn_q.weight": None}, "lacks 1 tensors of the model"),
        ({"blk.1.attn_z.weight": (2, 2)}, "holds 1 tensors that a LlamaForCausalLM does not read"),
        ({"blk.1.attn_q.weight": (31, 32)}, "has 31 rows, which are not those of 4 heads"),
        ({"blk.1.attn_q.weight": (24, 32)}, "has shape"),
        ({"token_embd.weight": (32, 40)}, "has shape"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    llama: Any, change: dict[str, Any], message: str
) -> None:
    file = {**shapes_of(llama_cpp(llama, gguf.MODEL_ARCH.LLAMA)), **change}
    with pytest.raises(FormatError, match=message):
        map_for(llama, {name: shape for name, shape in file.items() if shape is not None})


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
        "transformer.",
    ],
)
def test_clip_in_files_has_text_model_in_front(prefix: str) -> None:
    model = CLIPTextModel(CLIPTextConfig(**CLIP))
    own = model.state_dict()
    file = {f"{prefix}text_model.{name.removeprefix('text_model.')}": t for name, t in own.items()}
    file[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)
    file[f"{prefix}text_projection.weight"] = torch.zeros(12, 16)
    assert_read(model, file)


def test_of_two_clips_the_one_of_this_size_is_taken() -> None:
    small = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP))
    large = CLIPTextModelWithProjection(CLIPTextConfig(**{**CLIP, "hidden_size": 24}))
    file = {f"text_encoders.clip_l.transformer.{n}": t for n, t in small.state_dict().items()}
    file |= {f"text_encoders.clip_g.transformer.{n}": t for n, t in large.state_dict().items()}
    assert_read(small, file)
    assert_read(large, file)


def test_names_of_open_clip_are_refused_with_the_reason() -> None:
    model = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP))
    prefix = "conditioner.embedders.1.model."
    file = {f"{prefix}transformer.resblocks.0.attn.in_proj_weight": (48, 16)}
    with pytest.raises(FormatError, match="OpenCLIP, whose text_projection is transposed"):
        map_for(model, {**file, f"{prefix}text_projection": (16, 12)})
