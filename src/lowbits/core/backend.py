"""What a backend is: a codec between weights and plain tensors, over one library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import device, dtype, nn

    from lowbits.core.foreign import Foreign
    from lowbits.core.scheme import Scheme

#: Some rows of a weight: ``(start, stop)``, or a 1-D integer tensor of row numbers.
Rows = tuple[int, int] | Tensor


@final
@dataclass(frozen=True)
class Packed:
    """A weight as plain tensors, in the dtypes that their values have.

    Attributes:
        scheme: name of the scheme.
        shape: ``(rows, row_length)`` of the weight.
        tensors: what is stored, by name; owned by this object. ``"qdata"`` are the codes.
        row_sliceable: whether dim 0 of each tensor is dim 0 of the weight.
    """

    scheme: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    row_sliceable: bool = True

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: device) -> Packed:
        """Return it on a device."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def rows_at_once(self, limit: int) -> int:
        """Return how many rows to ask `QuantBackend.unpack` for at a time, at most ``limit``.

        Where codes run across rows, a backend decodes the whole weight at each call: ask for all.
        """
        return limit if self["qdata"].shape[0] == self.shape[0] else self.shape[0]

    def rows(self, rows: Rows | None) -> Packed:
        """Return some rows: views for ``(start, stop)``, gathered ones for an index tensor."""
        if rows is None:
            return self
        if isinstance(rows, tuple):
            start, stop = rows
            tensors = {name: tensor[start:stop] for name, tensor in self.tensors.items()}
            return replace(self, shape=(stop - start, self.shape[1]), tensors=tensors)
        tensors = {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}
        return replace(self, shape=(rows.numel(), self.shape[1]), tensors=tensors)


class QuantBackend(ABC):
    """A codec over one library: makes packed weights, and reads them.

    An instance holds no state that a layer needs: layers name their backend, and a pickled layer
    finds it again through the registry.
    """

    #: Unique name, the prefix of its schemes' names by convention.
    name: ClassVar[str]
    #: The pip requirement that makes the backend usable; None where it needs nothing.
    requires: ClassVar[str | None] = None
    #: Device types that its schemes run on; empty: all.
    devices: ClassVar[tuple[str, ...]] = ()
    #: What the layers look like that `adopt` takes over; None where it takes none.
    foreign: ClassVar[Foreign | None] = None

    @abstractmethod
    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes that this backend offers; imports nothing."""

    def unavailable(self, scheme: Scheme) -> str | None:  # noqa: ARG002 - part of the interface
        """Say why one scheme cannot be used although the backend can, or None where it can."""
        return None

    @abstractmethod
    def probe(self) -> str | None:
        """Do a tiny real operation with the library, and return the library's version.

        Raises:
            Exception: whatever the library raises; the registry turns it into a reason.
        """

    @abstractmethod
    def pack(self, weight: Tensor, scheme: Scheme) -> Packed:
        """Quantize a weight.

        Args:
            weight: ``(rows, row_length)``, float32, contiguous, finite, not empty; not kept, not
                changed. It may be a few rows of a larger weight: the parts are put together along
                dim 0 where the first part says that it is ``row_sliceable``.
            scheme: one of `schemes`, which accepts this row length.

        Returns:
            Plain contiguous tensors on the weight's device.
        """

    @abstractmethod
    def unpack(
        self, packed: Packed, dtype: dtype, out: Tensor | None = None, rows: Rows | None = None
    ) -> Tensor:
        """Dequantize a weight, or some of its rows.

        Args:
            packed: what `pack` made, on any device.
            dtype: floating dtype of the result.
            out: ``(rows, row_length)`` of that dtype, contiguous; written and returned.
            rows: ``(start, stop)``, or a 1-D integer tensor of row numbers.

        Returns:
            ``(rows, row_length)`` on the device of `packed`.
        """

    def packed_bytes(self, scheme: Scheme, rows: int, row_length: int) -> int:
        """Return the exact bytes that a weight of this shape takes, scales included."""
        code_bytes = -(-row_length * scheme.code_bits // 8)
        groups = row_length // scheme.group_size(row_length) if row_length else 1
        return int(rows * (code_bytes + groups * scheme.group_bits // 8))

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor | None:  # noqa: ARG002 - part of the interface
        """Compute ``x @ weight.T + bias`` without dequantizing first, or return None.

        Args:
            x: ``(..., row_length)``, in the dtype that the layer computes in.
            packed: a 2-D weight.
            bias: ``(rows,)`` in x's dtype.
        """
        return None

    def sliceable(self, packed: Packed) -> Packed | None:  # noqa: ARG002 - part of the interface
        """Return the same values as a weight whose rows can be told apart, or None."""
        return None

    def adopt(self, layer: nn.Module) -> Packed | None:  # noqa: ARG002 - part of the interface
        """Return the weight of a layer that the library itself quantized, with the same values.

        Args:
            layer: not changed. The library is not imported: it made the layer, or did not.

        Returns:
            Plain tensors, which may share the layer's memory; None where the library did not
            quantize it. The scheme may be another backend's.

        Raises:
            FormatError: the library did, and no scheme holds it: says why.
        """
        return None

    def __reduce__(self) -> tuple[Callable[[str], QuantBackend], tuple[str]]:
        from lowbits.core.registry import backend

        return backend, (self.name,)

    @final
    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Compute a linear layer: by `linear`, else on the dequantized weight."""
        y = self.linear(x, packed, bias)
        return functional.linear(x, self.unpack(packed, x.dtype), bias) if y is None else y
