"""What is in a checkpoint, without reading its tensors."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from lowbits.core.report import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbits.files.checkpoint import Checkpoint


@final
@dataclass(frozen=True)
class FormCount:
    """How much of a checkpoint is stored in one way.

    Attributes:
        form: a scheme's name, or a dtype's.
        tensors: weights that are.
        weights: their values.
        nbytes: their bytes, scales included.
    """

    form: str
    tensors: int
    weights: int
    nbytes: int


@final
@dataclass(frozen=True)
class Inspection:
    """A row for each form of a checkpoint, and what is known of the whole.

    Attributes:
        path: that was looked at.
        format: ``"gguf"``, ``"safetensors"``, ``"lowbits"`` or ``"pickle"``.
        architecture: as the file says, or as its names tell; None where neither does.
        loads_as: the class of model that `lowbits.load` takes it for; None where none is known.
        forms: by bytes, the most first.
        versions: of the packages that made it, where it says so.
        problems: what is odd about it.
    """

    path: str
    format: str
    architecture: str | None
    loads_as: str | None
    forms: tuple[FormCount, ...]
    versions: Mapping[str, str]
    problems: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(form.nbytes for form in self.forms)

    @property
    def weights(self) -> int:
        """Values of all weights."""
        return sum(form.weights for form in self.forms)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a value takes, scales included."""
        return self.nbytes * 8 / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        totals = {"nbytes": self.nbytes, "weights": self.weights}
        return {**asdict(self), **totals, "bits_per_weight": self.bits_per_weight}

    def table(self) -> str:
        """Return a text of a few lines, and one for each form."""
        made_by = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        facts = {
            "format": self.format + (f", by {made_by}" if made_by else ""),
            "architecture": self.architecture or "not known",
            "loads as": self.loads_as or "any module with these names",
            "weights": f"{self.weights / 1e6:.2f} million, {format_bytes(self.nbytes)}, "
            f"{self.bits_per_weight:.3f} bits each",
        }
        width = max(len(form.form) for form in self.forms) if self.forms else 0
        lines = [f"{name + ':':<14}{value}" for name, value in facts.items()]
        lines += [
            f"  {form.form:<{width}}  {form.tensors:>5} tensors  {form.weights / 1e6:>10.2f} M  "
            f"{format_bytes(form.nbytes):>11}"
            for form in self.forms
        ]
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])

    def __str__(self) -> str:
        return self.table()


def inspected(opened: Checkpoint, architecture: str | None, loads_as: str | None) -> Inspection:
    """Count what a checkpoint holds, tied weights once.

    Args:
        opened: the checkpoint.
        architecture: that its names tell.
        loads_as: the class of model that it is for.
    """
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for weight in {id(weight): weight for weight in opened.weights.values()}.values():
        form = weight.scheme or str(weight.dtype).removeprefix("torch.")
        tensors[form] += 1
        weights[form] += math.prod(weight.shape)
        nbytes[form] += weight.nbytes
    forms = tuple(
        FormCount(form, tensors[form], weights[form], size) for form, size in nbytes.most_common()
    )
    return Inspection(
        str(opened.path),
        opened.format,
        opened.architecture or architecture,
        loads_as,
        forms,
        dict(opened.versions),
        tuple(opened.problems),
    )
