"""The contract of a backend: what each of its schemes is checked for, on small layers.

Checks run on torch's default device: ``with torch.device("cuda"): check()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import nn
from torch.nn import functional

import lowbits
from lowbits.core.registry import DEFAULT
from lowbits.core.scheme import ALL_KINDS, LINEAR
from lowbits.testing import copies, layers, modes, tracing
from lowbits.testing.layers import random

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lowbits.core.backend import Packed, QuantBackend
    from lowbits.core.scheme import Scheme

#: A relative error that no sensible format exceeds on Gaussian weights: e5m2 has 5.3 %.
_FLOOR: Final = 0.06
#: Times the step of a uniform code; NF4 has 0.092 = 1.5 / 16, int4 per 128 has 0.1, int2 has 0.5.
_STEPS: Final = 2.2
#: What three values, made for weights that have no others, do to Gaussian ones: 0.81.
_TERNARY: Final = 0.85

_LAYER_PARTS: Final = (layers, copies, modes, tracing)

_ROWS: Final = 48
_ROW_LENGTH: Final = 256


@final
@dataclass(frozen=True)
class Check:
    """One property of one scheme; call it, it raises `AssertionError` where it does not hold.

    Attributes:
        subject: ``"codec"`` (what `QuantBackend` promises; milliseconds) or ``"layer"`` (what
            packed layers make of it; the same code for all schemes, some in a process of its own).
    """

    name: str
    scheme: str
    subject: str
    function: Callable[[QuantBackend, Scheme], None]

    def __call__(self) -> None:
        """Run the check."""
        backend, scheme = DEFAULT.require(self.scheme)
        assert backend is not None
        self.function(backend, scheme)

    def __str__(self) -> str:
        return f"{self.scheme}-{self.name}"


def checks(backend_name: str) -> tuple[Check, ...]:
    """Return every check for every scheme of a registered backend.

    Args:
        backend_name: as registered; an installed entry point of ``lowbits.backends`` is.
    """
    backend = lowbits.backend(backend_name)
    parts = {
        "codec": _checks_in(globals(), "_check_"),
        "layer": [check for part in _LAYER_PARTS for check in _checks_in(vars(part), "check_")],
    }
    return tuple(
        Check(name, scheme.name, subject, function)
        for scheme in backend.schemes()
        if scheme.can_quantize and not scheme.mix
        for subject, functions in parts.items()
        for name, function in functions
    )


def _checks_in(
    namespace: Mapping[str, Any], prefix: str
) -> list[tuple[str, Callable[[QuantBackend, Scheme], None]]]:
    return [
        (name.removeprefix(prefix), value)
        for name, value in namespace.items()
        if name.startswith(prefix)
    ]


def _weight(rows: int = _ROWS, row_length: int = _ROW_LENGTH, seed: int = 0) -> Tensor:
    return random(rows, row_length, seed=seed) * 0.05


def _unpacked(backend: QuantBackend, packed: Packed) -> Tensor:
    return backend.unpack(packed, torch.float32)


def _check_description(backend: QuantBackend, scheme: Scheme) -> None:
    assert scheme in backend.schemes()
    assert scheme.kinds
    assert set(scheme.kinds) <= set(ALL_KINDS)
    info = next(info for info in lowbits.schemes() if info.name == scheme.name)
    assert info.backend == backend.name
    assert 0 < info.bits_per_weight < 32
    assert all(lowbits.backend(backend.name) is DEFAULT.find(f)[0] for f in scheme.fallbacks)


def _check_error_is_the_formats_step(backend: QuantBackend, scheme: Scheme) -> None:
    weight = _weight()
    values = _unpacked(backend, backend.pack(weight, scheme))
    assert values.shape == weight.shape
    error = float((values - weight).norm() / weight.norm())
    is_ternary = 1 < scheme.code_bits < 2
    assert error <= (_TERNARY if is_ternary else max(_FLOOR, _STEPS * 2.0**-scheme.code_bits)), (
        error
    )


def _check_bytes_are_exact(backend: QuantBackend, scheme: Scheme) -> None:
    for rows in (1, _ROWS):
        packed = backend.pack(_weight(rows), scheme)
        stored = sum(tensor.nbytes for tensor in packed.tensors.values())
        assert stored == backend.packed_bytes(scheme, rows, _ROW_LENGTH)
        assert packed.shape == (rows, _ROW_LENGTH)
        assert packed.scheme == scheme.name


def _check_tensors_are_plain(backend: QuantBackend, scheme: Scheme) -> None:
    packed = backend.pack(_weight(), scheme)
    assert "qdata" in packed.tensors
    for tensor in packed.tensors.values():
        assert type(tensor) is torch.Tensor
        assert tensor.dim() > 0
        assert packed.row_sliceable is False or tensor.shape[0] == _ROWS


def _check_packing_is_deterministic(backend: QuantBackend, scheme: Scheme) -> None:
    weight = _weight()
    before = weight.clone()
    first = backend.pack(weight, scheme)
    assert torch.equal(weight, before)
    weight.fill_(torch.nan)  # the next part of a weight lies in the same memory
    second = backend.pack(before, scheme)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second[name])


def _check_some_rows_are_those_rows(backend: QuantBackend, scheme: Scheme) -> None:
    packed = backend.pack(_weight(), scheme)
    values = _unpacked(backend, packed)
    out = torch.full((7, _ROW_LENGTH), torch.nan)
    assert backend.unpack(packed, torch.float32, out=out, rows=(5, 12)) is out
    assert torch.equal(out, values[5:12])
    index = torch.tensor([3, 0, 3, _ROWS - 1])
    assert torch.equal(backend.unpack(packed, torch.float32, rows=index), values[index])
    if packed.row_sliceable:
        part = backend.pack(_weight()[4:9].contiguous(), scheme)
        for name, tensor in part.tensors.items():
            assert torch.equal(tensor, packed[name][4:9]), (
                "a part must pack as it does in the whole"
            )


def _check_dtypes(backend: QuantBackend, scheme: Scheme) -> None:
    packed = backend.pack(_weight(), scheme)
    values = _unpacked(backend, packed)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = backend.unpack(packed, dtype)
        out = backend.unpack(packed, dtype, out=torch.empty(_ROWS, _ROW_LENGTH, dtype=dtype))
        assert cast.dtype == dtype
        assert torch.equal(cast, out)
        assert torch.allclose(cast.float(), values, rtol=2**-7, atol=1e-6)


def _check_odd_rows_stay_finite(backend: QuantBackend, scheme: Scheme) -> None:
    weight = _weight()
    weight[0], weight[1], weight[2] = 0.0, 1e-30, 100.0
    weight[3] *= 1e-12
    weight[4, 0] = 60.0
    packed = backend.pack(weight, scheme)
    values = _unpacked(backend, packed)
    assert values.isfinite().all()
    assert torch.equal(values[0], weight[0]), "a row of zeros must stay one"
    # Where rows share scales, a tiny one is off by a part of the largest in the weight.
    assert values[1].abs().max() <= (1e-3 if packed.row_sliceable else 1e-2 * 100)
    assert torch.allclose(values[2], weight[2], rtol=0.15)


def _check_odd_row_lengths(backend: QuantBackend, scheme: Scheme) -> None:
    for row_length in (33, 48, 96, 384):
        if scheme.refusal(LINEAR, row_length):
            continue
        weight = _weight(5, row_length)
        packed = backend.pack(weight, scheme)
        values = _unpacked(backend, packed)
        assert values.shape == weight.shape
        assert torch.equal(backend.unpack(packed, torch.float32, rows=(1, 4)), values[1:4])
        stored = sum(tensor.nbytes for tensor in packed.tensors.values())
        assert stored == backend.packed_bytes(scheme, 5, row_length)


def _check_linear_multiplies_by_the_weight(backend: QuantBackend, scheme: Scheme) -> None:
    packed = backend.pack(_weight(), scheme)
    x = random(3, 5, _ROW_LENGTH, seed=1)
    bias = torch.arange(_ROWS, dtype=torch.float32)
    expected = functional.linear(x, _unpacked(backend, packed), bias)
    got = backend.matmul(x, packed, bias)
    assert got.shape == expected.shape
    # Schemes that quantize activations too are off by a step of those.
    tolerance = 0.06 if "dynamic" in scheme.name else 1e-5
    error = (got - expected).norm() / (expected - bias).norm()
    assert float(error) <= tolerance, float(error)


def _check_layer_of_a_model(backend: QuantBackend, scheme: Scheme) -> None:
    """A model of one layer: the smallest use of `lowbits.quantize`."""
    layer = nn.Linear(_ROW_LENGTH, _ROWS)
    original = layer.weight
    with lowbits.quantize(layer, scheme.name) as handle:
        (row,) = handle.report().packed
        assert row.scheme == scheme.name
        assert row.bytes_after == backend.packed_bytes(scheme, _ROWS, _ROW_LENGTH)
    assert layer.weight is original
    assert type(layer) is nn.Linear
