"""Where the full-precision weight of a packed layer can be had again."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lowbits.core.memory import bytes_of, is_dense, same_bits
from lowbits.errors import ConfigError, SourceUnavailableError

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

KEEP_SOURCE: Final = ("auto", "memory", "file", "none")

#: What ``keep_source="auto"`` may fill of the free host memory with originals and packed weights.
AUTO_MEMORY_SHARE: Final = 0.6


@dataclass(frozen=True, slots=True)
class Extent:
    """Where bytes lie in a file: `nbytes` of them, from byte `offset` on.

    Attributes:
        stamp: modification time in ns, size and inode of the file when it was opened: another one
            since means other bytes; None where nobody is to look.
    """

    path: Path
    offset: int
    nbytes: int
    stamp: tuple[int, int, int] | None = None


class Source(ABC):
    """A way back to a weight."""

    #: As the report calls it.
    kind: ClassVar[str]
    #: The file that `weight` reads, where it reads one.
    path: Path | None = None

    def settle(self) -> None:  # noqa: B027 - most sources have nothing to free
        """Free what the way back does not need; called once the layer is packed."""

    @abstractmethod
    def verify(self) -> None:
        """Raise `SourceUnavailableError` where `parameter` would not give the original bits."""

    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """Return the original weight, bit for bit, to be held by its layer again."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the original weight's values, to be read only; they lie wherever they are kept."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what a layer held before, by what each name adds to the weight's."""
        return {"": self.parameter()}


@final
class MemorySource(Source):
    """The original Parameter object itself: costs its bytes, in host memory."""

    kind: ClassVar[str] = "memory"

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._device = parameter, parameter.device

    def settle(self) -> None:
        """Move the bytes to the host; the object stays the same."""
        if self._device.type != "cpu":
            self._parameter.data = self._parameter.data.cpu()

    def verify(self) -> None:
        """Nothing can be lost."""

    def parameter(self) -> nn.Parameter:
        """Return the object that the layer had, on the device where it was."""
        if self._parameter.device != self._device:
            self._parameter.data = self._parameter.data.to(self._device)
        return self._parameter

    def weight(self) -> Tensor:
        """Return the object's values on the host."""
        return self._parameter.detach()


@final
class PackedSource(Source):
    """What a weight was before it was quantized a second time: costs its bytes, in host memory."""

    kind: ClassVar[str] = "memory"

    def __init__(self, scheme: str, stored: Mapping[str, nn.Parameter]) -> None:
        """Keep the Parameters of a packed weight.

        Args:
            scheme: that they are in.
            stored: by what each name adds to the weight's.
        """
        self._scheme, self._stored = scheme, dict(stored)
        self._devices = {name: parameter.device for name, parameter in stored.items()}

    def settle(self) -> None:
        """Move the bytes to the host; the objects stay the same."""
        for parameter in self._stored.values():
            parameter.data = parameter.data.cpu()

    def verify(self) -> None:
        """Nothing can be lost."""

    def parameter(self) -> nn.Parameter:
        """Refuse: what was decoded from the first form is not the original."""
        raise SourceUnavailableError(
            f"the full-precision weight is not known: it was {self._scheme} when it was packed. "
            "Load the model in full precision and pack that"
        )

    def weight(self) -> Tensor:
        """Refuse."""
        return self.parameter()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the objects that the layer had, on the devices where they were."""
        for name, parameter in self._stored.items():
            parameter.data = parameter.data.to(self._devices[name])
        return self._stored


@final
class NoSource(Source):
    """Nothing was kept."""

    kind: ClassVar[str] = "none"

    def verify(self) -> None:
        """Refuse: dequantized weights are not the original ones."""
        raise SourceUnavailableError(
            "the full-precision weights were not kept (keep_source='none'): load the model again, "
            "or pack with keep_source='memory' or source=path; lowbits.dequantize(target) gives "
            "ordinary layers with the weights as quantized"
        )

    def parameter(self) -> nn.Parameter:
        """Refuse."""
        self.verify()
        raise AssertionError

    def weight(self) -> Tensor:
        """Refuse."""
        return self.parameter()


@final
class FileSource(Source):
    """A tensor of a safetensors file that was compared with the weight, byte for byte.

    Costs no memory. What is read back is compared with the digest of what was read then: a file
    that was changed in between is refused.
    """

    kind: ClassVar[str] = "file"
    path: Path

    def __init__(self, path: Path, key: str, parameter: nn.Parameter, digest: bytes) -> None:
        self.path, self._key, self._digest = path, key, digest
        self._dtype, self._device = parameter.dtype, parameter.device
        # Convolutions may be in another memory format than files are.
        self._stride = parameter.stride() if is_dense(parameter) else None
        self._requires_grad = parameter.requires_grad
        # While somebody else holds the Parameter (a tied layer), it is the one to give back.
        self._alive = weakref.ref(parameter)

    def verify(self) -> None:
        """Read the tensor, and compare its digest."""
        self._read()

    def parameter(self) -> nn.Parameter:
        """Return the Parameter where it still exists, else read the tensor into a new one."""
        alive = self._alive()
        if alive is None:
            tensor = self._read().to(self._device, self._dtype, copy=True)
            if self._stride is not None and self._stride != tensor.stride():
                laid_out = torch.empty_strided(
                    tensor.shape, self._stride, dtype=self._dtype, device=self._device
                )
                tensor = laid_out.copy_(tensor)
            alive = nn.Parameter(tensor, requires_grad=self._requires_grad)
            self._alive = weakref.ref(alive)
        return alive

    def weight(self) -> Tensor:
        """Read the tensor."""
        return self._read().to(self._dtype)

    def _read(self) -> Tensor:
        try:
            tensor = read_tensor(self.path, self._key)
        except Exception as error:
            raise SourceUnavailableError(
                f"cannot read {self._key!r} from {self.path} again: {error}"
            ) from error
        if digest(tensor) != self._digest:
            raise SourceUnavailableError(
                f"{self._key!r} in {self.path} is not what it was when the weight was packed"
            )
        return tensor


@final
class SourceFiles:
    """The safetensors files that a caller says the weights came from."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # it is read later, too, from wherever the process is
        if not self.path.exists():
            raise ConfigError(f"source: no such file or folder: {path}")
        self._index: dict[str, Mapping[str, Sequence[Path]]] = {}

    def prove(self, component: str, fqn: str, parameter: nn.Parameter) -> FileSource | None:
        """Return the tensor that has this weight's bits, or None where there is none.

        A file may hold the weight in another dtype, if converting gives these bits exactly as
        loading did. A path, a size or a date prove nothing: a LoRA may have been fused since.
        """
        for stored, extent in self._alike(component, fqn, parameter):
            return FileSource(extent.path, fqn, parameter, digest(stored))
        return None

    def locate(self, component: str, fqn: str, tensor: Tensor) -> Extent | None:
        """Return where a tensor's bytes lie in a file, or None where they do not, bit for bit.

        Every byte is compared: a path, a size or a date prove nothing.
        """
        if not tensor.is_contiguous():
            return None
        for stored, extent in self._alike(component, fqn, tensor):
            if stored.dtype == tensor.dtype:
                return extent
        return None

    def _alike(self, component: str, fqn: str, tensor: Tensor) -> Iterator[tuple[Tensor, Extent]]:
        """Yield what each file holds that has a tensor's bits, converted if need be, and where.

        The place is looked up first: its stamp is that of what is compared, or older.
        """
        for file in self._files(component).get(fqn, ()):
            extent, stored = extent_of(file, fqn), read_tensor(file, fqn)
            if stored.shape == tensor.shape and same_bits(tensor, stored):
                yield stored, extent

    def _files(self, component: str) -> Mapping[str, Sequence[Path]]:
        """Return which files hold each tensor of a component: variants may lie side by side."""
        if component not in self._index:
            index: dict[str, list[Path]] = defaultdict(list)
            for file in self._safetensors_of(component):
                for key in _keys_of(file):
                    index[key].append(file)
            self._index[component] = index
        return self._index[component]

    def _safetensors_of(self, component: str) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        folder = self.path / component
        return sorted(
            (folder if component and folder.is_dir() else self.path).glob("*.safetensors")
        )


def _keys_of(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ConfigError(
            f"source: {file} is no safetensors file ({error}): name the one, or the folder, that "
            "the model was loaded from in full precision"
        ) from error


def read_tensor(path: Path, key: str) -> Tensor:
    """Return one tensor of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def extent_of(path: Path, key: str) -> Extent:
    """Return where the bytes of a tensor lie in a safetensors file.

    Source: https://huggingface.co/docs/safetensors, "Format": eight bytes give the length of a JSON
    header, from whose end the offsets in it count.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(length))[key]["data_offsets"]
        return Extent(path, 8 + length + start, stop - start, stamp_of(file))


def stamp_of(file: io.BufferedReader | io.FileIO) -> tuple[int, int, int]:
    """Return what tells a file from one that takes its place: time, size and inode."""
    status = os.fstat(file.fileno())
    return status.st_mtime_ns, status.st_size, status.st_ino


def digest(tensor: Tensor) -> bytes:
    """Return the BLAKE2b digest of a CPU tensor's bytes."""
    # Named: the view does not keep what it shows.
    tensor = tensor.contiguous()
    return hashlib.blake2b(bytes_of(tensor), digest_size=16).digest()
