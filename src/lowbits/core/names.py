"""Dotted names of modules and tensors."""

from __future__ import annotations

from typing import Final

#: What adapter libraries put between a layer and its name, and how they call the layer then.
WRAPPED: Final = "base_layer"


def dotted(*parts: str) -> str:
    """Join the parts of a name; empty ones (the target itself, a layer's own weight) leave no dot.

    Example:
        >>> dotted("", "blocks.0", "weight")
        'blocks.0.weight'
    """
    return ".".join(part for part in parts if part)
