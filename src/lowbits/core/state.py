"""What a state dict of packed layers tells the ordinary layers that it is loaded into."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NoReturn, final

from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class PackedMetadata(dict[str, Any]):
    """A packed layer's entry in the metadata of a state dict; copies and pickles are plain ones.

    An ordinary layer finds none of its tensors there. With ``strict=False``, as diffusers makes one
    model of another, torch says nothing, and it keeps the random values that it has. But it asks
    its metadata how to load.
    """

    def __init__(self, values: Mapping[str, Any], name: str, schemes: str) -> None:
        """Take what torch has noted.

        Args:
            values: of torch.
            name: of the layer, for the message.
            schemes: that it is stored in, for the message.
        """
        super().__init__(values)
        self._stored = f"{name or 'weight'} is stored as {schemes}"

    def get(self, *_: Any) -> NoReturn:
        """Refuse to be loaded into what is not packed.

        Raises:
            PatchError: always; packed layers do not ask.
        """
        raise PatchError(
            f"this state dict is of a packed model ({self._stored}), and an ordinary layer finds "
            "no weight in it: make one model of another (ControlNetModel.from_unet, ...) before "
            "lowbits.apply; now, call lowbits.restore or lowbits.dequantize first"
        )

    def __reduce__(self) -> tuple[type[OrderedDict[str, Any]], tuple[list[tuple[str, Any]]]]:
        return OrderedDict, (list(self.items()),)
