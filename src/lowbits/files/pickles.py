"""Pickled checkpoints (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), read only on demand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbits.errors import FormatError
from lowbits.files.weights import Weight, open_file

if TYPE_CHECKING:
    from collections.abc import Mapping


def open_pickle(path: str | Path) -> dict[str, Weight]:
    """Read a pickled checkpoint into memory, all of it.

    Only for callers that were told to: torch's unpickler admits a list of harmless types alone
    (``weights_only=True``, and no second try without), but is no sandbox.

    Returns:
        The tensors of the state dict, or of the one under the key ``state_dict``, by name; reading
        one gives the tensor in memory, not a copy.

    Raises:
        FormatError: torch refuses it, or it is not a dict of plain tensors: sparse, quantized and
            expanded ones are refused, and those without data.
        OSError: it is missing, a folder, or may not be read.
    """
    path = Path(path)
    return memory_weights(_state_dict(_load(path), path))


def memory_weights(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Return tensors that are in memory as weights; reading one gives the tensor, not a copy."""
    return {name: _in_memory(name, tensor) for name, tensor in tensors.items()}


def _in_memory(name: str, tensor: Tensor) -> Weight:
    read = partial(_identity, tensor)
    return Weight(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes, read, is_shared=True)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _load(path: Path) -> Any:
    try:
        with open_file(path) as file:
            return torch.load(file, weights_only=True, mmap=False, map_location="cpu")
    except (OSError, MemoryError, FormatError):
        raise
    except Exception as error:
        raise FormatError(f"torch cannot read it: {error}", path) from error


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise FormatError(f"expected a dict of tensors, got a {type(loaded).__name__}", path)
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FormatError(
                f"expected names and tensors, got a {type(tensor).__name__}", path, str(name)
            )
        reason = _why_refused(tensor)
        if reason:
            raise FormatError(
                f"expected a plain tensor with all of its values, {reason}", path, name
            )
    # What a view says of its values' signs is not in the bytes.
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in loaded.items()}


def _why_refused(tensor: Tensor) -> str:
    """Say why the bytes of a tensor are not its values; empty where they are."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"got a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"it is stored as {tensor.layout}"
    if tensor.is_quantized or tensor.is_nested:
        return f"it is {'quantized' if tensor.is_quantized else 'nested'}"
    if tensor.is_meta:
        return "it has no data (meta device)"
    stored = tensor.untyped_storage().nbytes()
    if stored < tensor.nbytes:
        # A few bytes in a file may stand for terabytes.
        return f"it has {stored} bytes for {tensor.nbytes}: save it with .contiguous()"
    return ""
