"""What was done, byte by byte."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

from lowbits.core.names import dotted

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADER: Final = (
    *("layer", "n", "kind", "shape", "scheme"),
    *("before", "after", "bits", "source", "why"),
)
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


@final
@dataclass(frozen=True)
class LayerReport:
    """One parameter or buffer of the target.

    Attributes:
        fqn: dotted name in its component; a layer's weight goes by the layer's name.
        component: name of the component; empty where the target is itself a module.
        kind: ``"Linear"``, ``"Conv2d"``, ``"bias"``, ...
        shape: of the full-precision tensor.
        scheme: that it is stored in; ``"native"`` where it was left alone.
        bytes_before: of the full-precision tensor, or as it was stored before, where it is packed
            anew; 0 where a tied one was counted already.
        bytes_after: of what is stored now.
        bits_per_weight: of what is stored now.
        source: where the original can be had again: ``"memory"``, ``"file"``, ``"none"``; ``"-"``
            for what was left alone.
        reason: why it was left alone, or is not in the scheme asked for.
    """

    fqn: str
    component: str
    kind: str
    shape: tuple[int, ...]
    scheme: str
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    source: str
    reason: str


@final
@dataclass(frozen=True)
class Report:
    """Every component and layer: how it is stored, what it cost and costs, and why.

    Attributes:
        layers: every parameter and buffer, in the order of the model.
        warnings: what the caller should know, e.g. that originals were not kept.
    """

    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...] = ()

    def noting(self, notes: Iterable[str]) -> Report:
        """Return the same report with more warnings."""
        return replace(self, warnings=(*self.warnings, *notes))

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters and buffers in full precision."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters and buffers as they are stored now."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Logical weights of all parameters, tied ones once; a module's own count sees codes."""
        return sum(
            _numel(layer.shape)
            for layer in self.layers
            if layer.kind != "buffer" and layer.bytes_before
        )

    @property
    def restorable(self) -> bool:
        """Whether `restore` can give every weight back."""
        return all(layer.source != "none" for layer in self.layers)

    @property
    def packed(self) -> tuple[LayerReport, ...]:
        """The layers that are packed."""
        return tuple(layer for layer in self.layers if layer.source != "-")

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The layers that were packed before, and stay as they are."""
        return tuple(layer for layer in self.layers if layer.reason == already(layer.scheme))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "parameters": self.parameters,
            "restorable": self.restorable,
            "warnings": list(self.warnings),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def table(self) -> str:
        """Return a table: like layers of all blocks in one row, dotted numbers as ``*``.

        Tensors that no scheme holds (biases, norms, buffers) share a row for each component and
        reason; so do components that were left alone. `layers` names each of them.
        """
        groups: dict[tuple[str, ...], list[LayerReport]] = defaultdict(list)
        whole = {name for name in self._components() if not self._part(name).packed}
        for layer in self.layers:
            key = _group(layer)
            if layer.component in whole:
                key = (layer.component or "(all)", "", "", layer.scheme, "")
            groups[key].append(layer)
        rows = [_HEADER, *(_row(key, group) for key, group in groups.items())]
        return "\n".join([*_aligned(rows), "", *self._totals()])

    def _components(self) -> list[str]:
        return list(dict.fromkeys(layer.component for layer in self.layers))

    def _part(self, component: str) -> Report:
        return Report(tuple(layer for layer in self.layers if layer.component == component))

    def _totals(self) -> list[str]:
        names = self._components()
        lines = [f"{name or 'model'}: {self._part(name).summary()}" for name in names]
        if len(lines) > 1:
            lines.append(f"all: {self.summary()}")
        return lines + [f"note: {warning}" for warning in self.warnings]

    def summary(self) -> str:
        """Return one line: bytes before and after, packed layers, the way back."""
        packed = self.packed
        before, after = self.bytes_before, self.bytes_after
        ratio = before / after if after else 1.0
        text = f"{format_bytes(before)} -> {format_bytes(after)} ({ratio:.2f}x)"
        text = f"{text}, {_count(packed)} weights packed"
        if packed:
            sources = ", ".join(dict.fromkeys(layer.source for layer in packed))
            text = f"{text} as {_schemes(packed)}, originals: {sources}"
        if kept := self.kept:
            text = f"{text}; {_count(kept)} were packed before, as {_schemes(kept)}"
        return text

    def __str__(self) -> str:
        return self.table()


def already(scheme: str) -> str:
    """Return the reason of a layer that is in a scheme, and stays as it is."""
    return f"stored as {scheme} already"


def format_bytes(count: int) -> str:
    """Return bytes in the largest IEC unit that keeps at least one digit before the point."""
    value = float(count)
    for unit in _UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} {_UNITS[-1]}"


def _count(layers: Iterable[LayerReport]) -> int:
    """Count weights, tied ones once."""
    return sum(1 for layer in layers if layer.bytes_after)


def _schemes(layers: Iterable[LayerReport]) -> str:
    return ", ".join(dict.fromkeys(layer.scheme for layer in layers))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _group(layer: LayerReport) -> tuple[str, ...]:
    """Return the table row that a layer belongs to: name, kind, shape, scheme, reason."""
    if layer.source == "-" and layer.reason in (layer.kind, "norm"):
        name = dotted(layer.component, "*")
        return name, layer.reason, "", layer.scheme, ""
    fqn = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", layer.fqn)
    name = dotted(layer.component, fqn) or "(the module itself)"
    shape = "x".join(map(str, layer.shape)) or "scalar"
    return name, layer.kind, shape, layer.scheme, layer.reason


def _row(key: tuple[str, ...], group: list[LayerReport]) -> tuple[str, ...]:
    name, kind, shape, scheme, reason = key
    weights = sum(_numel(layer.shape) for layer in group if layer.bytes_before)
    after = sum(layer.bytes_after for layer in group)
    return (
        name,
        str(len(group)),
        kind,
        shape,
        scheme,
        format_bytes(sum(layer.bytes_before for layer in group)),
        format_bytes(after),
        f"{after * 8 / weights:.3f}" if weights else "-",
        ", ".join(dict.fromkeys(layer.source for layer in group)),
        reason or ("" if kind else _main_reason(group)),
    )


def _main_reason(group: list[LayerReport]) -> str:
    """Return why most bytes of a component were left alone, norms and biases aside."""
    sizes: dict[str, int] = defaultdict(int)
    for layer in group:
        if layer.reason not in (layer.kind, "norm"):
            sizes[layer.reason] += layer.bytes_before
    return max(sizes, key=lambda reason: sizes[reason], default="")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = (1, 5, 6, 7)
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
