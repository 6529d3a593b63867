"""What a state dict of packed layers tells the ordinary layers that it is loaded into."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from collections.abc import Mapping

_ADVICE: Final = (
    "it is of a packed model, and an ordinary layer finds no weight in it: make one model of "
    "another (ControlNetModel.from_unet, ...) before lowbits.apply; now, call lowbits.restore or "
    "lowbits.dequantize first"
)


@final
class PackedMetadata(dict[str, Any]):
    """A packed layer's entry in the metadata of a state dict; copies and pickles are plain ones.

    An ordinary layer finds none of its tensors there. With ``strict=False``, as diffusers makes one
    model of another, torch says nothing, and it keeps the random values that it has. But it asks
    its metadata how to load, and there is told what to raise.
    """

    def __init__(self, values: Mapping[str, Any], name: str, schemes: str) -> None:
        """Take what torch has noted.

        Args:
            values: of torch.
            name: of the layer, for the message.
            schemes: that it is stored in, for the message.
        """
        super().__init__(values)
        self._message = f"{name or 'weight'} is stored as {schemes} in the state dict: {_ADVICE}"

    def get(self, key: str, default: Any = None) -> Any:
        """Answer; let a load that asks fail, once for all of its layers. Packed ones do not ask."""
        # The list that torch raises of, strict or not, is a local of who asks, and nowhere else.
        errors = sys._getframe(1).f_locals.get("error_msgs")
        if isinstance(errors, list) and not any(_ADVICE in error for error in errors):
            errors.append(self._message)
        return super().get(key, default)

    def __reduce__(self) -> tuple[type[OrderedDict[str, Any]], tuple[list[tuple[str, Any]]]]:
        return OrderedDict, (list(self.items()),)
