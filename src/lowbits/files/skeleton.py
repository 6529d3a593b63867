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
        module = _module(root, fqn, tensor if last == "weight" else None)
        if dtype.is_floating_point:
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[last] = tensor
    return root


def _module(root: nn.Module, fqn: str, weight: torch.Tensor | None) -> nn.Module:
    """Return the module of a dotted name, made where it is not there; a layer for a weight."""
    parent, last = root, ""
    for part in fqn.split(".") if fqn else ():
        if last:
            parent = _child(parent, last)
        last = part
        if part.isdecimal() and not isinstance(parent, nn.ModuleList):
            parent.__class__ = nn.ModuleList  # so that it counts as a list of blocks
    if not last:
        return root
    made = _layer(fqn, weight)
    known = parent._modules.get(last)
    if known is None or made is not None:
        new = made or nn.Module()
        if known is not None:  # its bias came first
            new._parameters.update(known._parameters)
            new._modules.update(known._modules)
        parent._modules[last] = new
    child = parent._modules[last]
    assert child is not None
    return child


def _child(parent: nn.Module, name: str) -> nn.Module:
    child = parent._modules.get(name)
    if child is None:
        child = parent._modules[name] = nn.Module()
    return child


def _layer(fqn: str, weight: torch.Tensor | None) -> nn.Module | None:
    """Return an empty layer of the kind that a weight of this shape has; None for a vector's."""
    if weight is None or weight.dim() < 2:
        return None
    if weight.dim() == 2:
        kind: type[nn.Module] = nn.Embedding if _EMBEDDING.search(fqn) else nn.Linear
    else:
        kind = _CONVOLUTIONS.get(weight.dim(), nn.Module)
    layer: nn.Module = kind.__new__(kind)
    nn.Module.__init__(layer)
    if kind is nn.Embedding:
        layer.max_norm = None
    return layer
