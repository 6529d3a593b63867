"""llama.cpp's ``_S``, ``_M`` and ``_L`` mixes: more bits for the layers that need them most.

A mix is a type, and others for attention's values and for the second matrix of feed-forward
networks. Source: ``llama_tensor_get_type`` with the names of image models, as in ComfyUI-GGUF's
lcpp.patch; here the names are those of diffusers and transformers as well, and layers that stand
for the same in models which that patch does not name: a layer gets its type under either name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

#: Values, of image and of text tokens.
_VALUE: Final = r"(^|[._])(to_v|v_proj|add_v_proj|attn_v|v|v_img|w[12]v)$"
#: Queries, keys and values in one matrix.
_FUSED: Final = r"(^|[._])(to_qkv|to_added_qkv|qkv|qkv_proj|in_proj_weight)$"
#: The way back from the wide middle of a feed-forward network.
_DOWN: Final = (
    r"(^|\.)(ffn_down|ffn\.2|(ff|ffn|ff_context|img_mlp|txt_mlp)\.net\.2|wo|fc2|down_proj"
    r"|(mlp|img_mlp|txt_mlp|adaln_modulation_mlp)\.2|mlp\.layer2|mlp[XC]?\.c_proj"
    r"|(ff|ff_context)\.(linear_out|out_projection)"
    r"|(feed_forward|ff_[it]|shared_experts|experts\.\d+)\.(w2|linear_2))$"
)


@final
@dataclass(frozen=True)
class MixRule:
    """Another type for some layers.

    Attributes:
        pattern: regular expression searched for in the layer's dotted name.
        type_name: the type they get.
        first: only so many layers, in the model's order; None: all.
    """

    pattern: str
    type_name: str
    first: int | None = None


@final
@dataclass(frozen=True)
class Mix:
    """A mix of types.

    Attributes:
        type_name: of layers that no rule names.
        rules: tried in order.
    """

    type_name: str
    rules: tuple[MixRule, ...] = ()


MIXES: Final = {
    "Q3_K_S": Mix("Q3_K"),
    "Q3_K_M": Mix(
        "Q3_K",
        (
            MixRule(_VALUE, "Q5_K", first=2),
            MixRule(_VALUE, "Q4_K"),
            MixRule(_FUSED, "Q4_K"),
            MixRule(_DOWN, "Q4_K"),
        ),
    ),
    "Q3_K_L": Mix(
        "Q3_K", (MixRule(_VALUE, "Q5_K"), MixRule(_FUSED, "Q4_K"), MixRule(_DOWN, "Q5_K"))
    ),
    "Q4_K_S": Mix("Q4_K", (MixRule(_VALUE, "Q5_K", first=4), MixRule(_DOWN, "Q5_K"))),
    "Q4_K_M": Mix(
        "Q4_K", (MixRule(_VALUE, "Q6_K"), MixRule(_FUSED, "Q5_K"), MixRule(_DOWN, "Q6_K"))
    ),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix(
        "Q5_K", (MixRule(_VALUE, "Q6_K"), MixRule(_FUSED, "Q6_K"), MixRule(_DOWN, "Q6_K"))
    ),
}
