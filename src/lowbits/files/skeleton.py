"""A model's layers guessed from the names and shapes in a checkpoint, without its class.

What is packed by default, and which layers a glob names, is decided on modules; a lone file has
none. Empty ones stand in: they are never run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbits.files.weights import Weight

#: Two-dimensional weights that are looked up by row, in the names of transformers and llama.cpp.
_EMBEDDING: Final = re.compile(
    r"(^|\.)(shared|embed_tokens|token_embd|token_embedding|position_embedding|word_embeddings"
    r"|relative_attention_bias|wte|wpe)$"
)
_CONVOLUTIONS: Final = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def skeleton_of(weights: Mapping[str, Weight]) -> nn.Module:
    """Return modules on the meta device that hold tensors of these names, shapes and dtypes."""
    root = nn.Module()
    for name, weight in weights.items():
        dtype = weight.dtype or torch.float32
        tensor = torch.empty(weight.shape, dtype=dtype, device="meta")
        fqn, _, last = name.rpartition(".")
        module = _module(root, fqn)
        if dtype.is_floating_point:
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[last] = tensor
    for fqn, module in list(root.named_modules()):
        module.__class__ = _class_of(fqn, module)
    return root


def _module(root: nn.Module, fqn: str) -> nn.Module:
    """Return the module of a dotted name, made where it is not there."""
    module = root
    for name in fqn.split(".") if fqn else ():
        child = module._modules.get(name)
        if child is None:
            child = module._modules[name] = nn.Module()
        module = child
    return module


def _class_of(fqn: str, module: nn.Module) -> type[nn.Module]:
    """Return the class of layer, or list of blocks, that a module stands for."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        is_list = any(name.isdecimal() for name in module._modules)
        return nn.ModuleList if is_list else nn.Module
    if weight.dim() > 2:
        return _CONVOLUTIONS.get(weight.dim(), nn.Module)
    if not _EMBEDDING.search(fqn):
        return nn.Linear
    module.__dict__["max_norm"] = None
    return nn.Embedding
