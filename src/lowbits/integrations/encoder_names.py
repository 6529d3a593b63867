"""Names of llama.cpp for the tensors of text encoders, and what transformers calls them.

Source: the tensor names of ``gguf/constants.py``, and the conversion of weights in
``convert_hf_to_gguf.py`` (ggml-org/llama.cpp).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from lowbits.errors import FormatError
from lowbits.files.rows import Segment
from lowbits.integrations.row_tracing import rows_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbits.integrations.row_tracing import Shapes

_T5: Final[Mapping[str, str]] = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
}
_T5_BLOCK: Final[Mapping[str, str]] = {
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi": "ffn_up",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}
_LLM: Final[Mapping[str, str]] = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
_LLM_BLOCK: Final[Mapping[str, str]] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_T5_NAME: Final = re.compile(r"encoder\.block\.(\d+)\.(.+)")
_LLM_NAME: Final = re.compile(r"(?:\w+\.)*?layers\.(\d+)\.(.+)")

#: What transformers calls the models of an architecture. Gemma is none: llama.cpp stores the
#: weights of its norms with one added.
_MODEL_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "llama": ("llama", "mistral"),
    "qwen2": ("qwen2",),
    "qwen2vl": ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2"),
    "qwen3": ("qwen3",),
    "qwen3vl": ("qwen3_vl", "qwen3_vl_text"),
}

#: Those whose queries and keys llama.cpp stores in another order of rows.
_PERMUTED: Final = ("llama",)


def llama_cpp_map(
    own: Shapes, shapes: Shapes, config: Any, arch: str
) -> dict[str, tuple[Segment, ...]]:
    """Return the tensors of a text encoder as rows of those of a llama.cpp file.

    Args:
        own: the model's shapes by its own names.
        shapes: the file's.
        config: the model's, of transformers.
        arch: the file's architecture.

    Raises:
        FormatError: the file is of another model, or a tensor is missing.
    """
    t5 = any(_T5_NAME.match(name) for name in own)
    names = {name: _t5_name(name) if t5 else _llm_name(name) for name in own}
    missing = [f"{name} ({names[name]})" for name in own if names[name] not in shapes]
    if missing:
        seeing = any(".visual." in f".{name}" for name in missing)
        raise FormatError(
            f"lacks {len(missing)} tensors of the model: {', '.join(missing[:4])}"
            + ("; llama.cpp keeps what sees in a file of its own (mmproj)" if seeing else "")
        )
    heads = {} if t5 else _heads(config, arch)
    return {
        name: _segments(names[name], shapes[names[name]], _heads_of(name, heads)) for name in own
    }


def _t5_name(name: str) -> str:
    found = _T5_NAME.match(name)
    if not found:
        return _translated(name, _T5)
    return f"enc.blk.{found[1]}.{_translated(found[2], _T5_BLOCK)}"


def _llm_name(name: str) -> str:
    found = _LLM_NAME.fullmatch(name)
    if found and "visual." not in name:
        return f"blk.{found[1]}.{_translated(found[2], _LLM_BLOCK)}"
    module, _, tail = name.rpartition(".")
    return f"{_LLM.get(module.rpartition('.')[2], module)}.{tail}"


def _translated(name: str, table: Mapping[str, str]) -> str:
    module, _, tail = name.rpartition(".")
    return f"{table.get(module, module)}.{tail}"


def _heads(config: Any, arch: str) -> dict[str, int]:
    """Return how many heads the tensors have whose rows are in another order."""
    config = getattr(config, "text_config", None) or config
    types = _MODEL_TYPES.get(arch, ())
    if config.model_type not in types:
        raise FormatError(
            f"is of architecture {arch!r}; the model is a {config.model_type}"
            + ("" if types else f". Known: {', '.join(_MODEL_TYPES)}")
        )
    if arch not in _PERMUTED:
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def _heads_of(name: str, heads: Mapping[str, int]) -> int:
    return next((count for part, count in heads.items() if f".{part}." in name), 0)


def _segments(name: str, shape: tuple[int, ...], heads: int) -> tuple[Segment, ...]:
    """Return all rows; those of permuted heads in their order.

    llama.cpp rotates neighbours where transformers rotates halves: of a head's rows it stores the
    first of the first half, the first of the second half, and so on.
    """
    rows = rows_in(shape)
    if not heads:
        return (Segment(name, 0, rows),)
    if rows % (2 * heads):
        raise FormatError(f"has {rows} rows, which are not those of {heads} heads", tensor=name)
    size = rows // heads
    return tuple(
        Segment(name, head + half, head + size, 2)
        for head in range(0, rows, size)
        for half in (0, 1)
    )
