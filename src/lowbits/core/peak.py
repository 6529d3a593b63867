"""What a conversion takes at its peak, and whether that is there: asked before it begins."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, final

import torch

from lowbits.core.homes import same_device
from lowbits.core.memory import available_host_bytes, part_weights
from lowbits.core.report import format_bytes
from lowbits.errors import InsufficientMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from lowbits.core.select import Decision

_HOST: Final = torch.device("cpu")

#: Of a part that is packed, libraries make so many copies in float32, at most.
_COPIES: Final = 6


@final
class Peak:
    """Bytes that a conversion takes above what is there now, on each device, step by step."""

    def __init__(self) -> None:
        self._now: dict[torch.device, int] = defaultdict(int)
        self.bytes: dict[torch.device, int] = defaultdict(int)

    def take(self, device: torch.device, nbytes: int, *, passing: int = 0) -> None:
        """Take bytes for good, or give them back, and some more for a moment before.

        Args:
            device: whose memory it is.
            nbytes: from now on; negative where they are given back.
            passing: beside them while this lasts.
        """
        self._now[device] += nbytes
        self.bytes[device] = max(self.bytes[device], self._now[device] + passing)


def conversion_peak(
    decisions: Sequence[Decision],
    in_files: Collection[int],
    device: torch.device | None,
    hold: torch.device | None,
    packed_bytes: Callable[[Decision], int],
) -> dict[torch.device, int]:
    """Return the bytes that packing takes on each device above what is there now, at most.

    Args:
        decisions: of every parameter and buffer; nothing is packed yet.
        in_files: identities of tensors whose originals go as they are packed.
        device: that quantizes; None: the one each weight lies on.
        hold: that holds the result; None: the one that quantizes.
        packed_bytes: of a weight.
    """

    def same(place: torch.device) -> torch.device:
        """Call a device as the caller does, who may say ``cuda`` for ``cuda:0``."""
        return device if device and same_device(place, device) else place

    peak = Peak()
    unique = {decision.tie: decision for decision in decisions}
    for tie, decision in unique.items():
        if decision.scheme is None:
            continue
        home = same(decision.tensor.device)
        worker = device or home
        part = min(decision.shape.numel(), part_weights(worker)) * 4 * _COPIES
        size = packed_bytes(decision)
        peak.take(worker, 0, passing=part + size)
        peak.take(hold or worker, size)
        if home.type != _HOST.type or tie in in_files:
            peak.take(home, -decision.nbytes)
        if home.type != _HOST.type and tie not in in_files:
            peak.take(_HOST, decision.nbytes)
    for decision in unique.values() if device and not hold else ():
        if decision.scheme is None and same(decision.tensor.device) != device:
            peak.take(device or _HOST, decision.nbytes)
    return {place: nbytes for place, nbytes in peak.bytes.items() if nbytes}


def require_room(
    peak: dict[torch.device, int], free_bytes: Callable[[torch.device], int | None] | None
) -> None:
    """Raise where a conversion would not come to its end.

    Args:
        peak: bytes that it takes on each device.
        free_bytes: of a device, None where that is not known; None: only the host is looked at.

    Raises:
        InsufficientMemoryError: naming what takes less.
    """
    for device, needed in peak.items():
        is_host = device.type == _HOST.type
        free = available_host_bytes() if is_host else free_bytes and free_bytes(device)
        if free is not None and needed > free:
            raise InsufficientMemoryError(
                f"packing takes {format_bytes(needed)} of {device} beside the model, and "
                f"{format_bytes(free)} are free: with keep_source='file' and source=path originals "
                "go as their layers are packed; a smaller scheme, or fewer components, take less",
                needed,
                free,
                str(device),
            )
