"""Whether a packed weight that was read is one: it can be decoded, and to numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from lowbits.backends.gguf.backend import PREFIX, type_name
from lowbits.core.memory import PART_WEIGHTS, temporary
from lowbits.errors import FormatError
from lowbits.files.gguf_types import STORED_TYPES, is_finite

if TYPE_CHECKING:
    from torch import Tensor

    from lowbits.core.backend import Packed, QuantBackend

#: What decoders raise of tensors of other shapes and dtypes than they expect.
_UNDECODABLE: Final = (RuntimeError, LookupError, ValueError, TypeError, AssertionError)


def require_decodable(packed: Packed, backend: QuantBackend, path: object, name: str) -> None:
    """Raise `FormatError` where stored tensors do not make a weight: its first row is decoded."""
    try:
        backend.unpack(packed, torch.float32, rows=(0, 1))
    except _UNDECODABLE as error:
        fields = ", ".join(f"{key} {tuple(t.shape)}" for key, t in packed.tensors.items())
        raise FormatError(
            f"{fields} cannot be decoded as {packed.scheme} of {packed.shape}: {error}", path, name
        ) from error


def require_finite(packed: Packed, path: object, name: str) -> None:
    """Raise `FormatError` where scales, or values that have none, are NaN or infinite."""
    bad = _count_nonfinite(packed)
    if bad:
        raise FormatError(
            f"{bad} of its {packed.scheme} scales or values are NaN or infinite; "
            "allow_nonfinite=True reads it all the same",
            path,
            name,
        )


def _count_nonfinite(packed: Packed) -> int:
    """Count what is not finite; of GGUF's blocks, whether anything is."""
    if packed.scheme.startswith(PREFIX):
        kind = STORED_TYPES[type_name(packed.scheme)]
        return int(not is_finite(packed["qdata"].reshape(-1, kind.block_bytes), kind))
    floats = (tensor for tensor in packed.tensors.values() if tensor.is_floating_point())
    bad = sum(int((~tensor.isfinite()).sum()) for tensor in floats)
    if "float8" not in packed.scheme:
        return bad
    # All codes from there on but the sign: e4m3 has one NaN, e5m2 an exponent of them.
    limit = 0x7C if "e5m2" in packed.scheme else 0x7F
    parts = torch.split(packed["qdata"].view(torch.uint8).view(-1), PART_WEIGHTS)
    return bad + sum(_count_from(part, limit) for part in parts)


def _count_from(codes: Tensor, limit: int) -> int:
    """Count codes from a limit on, but for their sign; mostly there are none."""
    # In room that stays: what comes and goes between weights would leave holes in the heap.
    magnitudes = torch.bitwise_and(codes, 0x7F, out=temporary("magnitudes", codes, torch.uint8))
    return int((magnitudes >= limit).sum()) if magnitudes.amax() >= limit else 0
