"""Small GGUF files, changed at random: they load, or the typed error is raised."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import pytest
from files.gguf_bytes import F32, Q8_0, Gguf, array_head, floats, info, key, q8_0, small, string
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbits.errors import FormatError
from lowbits.files.gguf import read_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from hypothesis.strategies import SearchStrategy

ORIGINAL = Gguf(
    [key("comfy.gguf.orig_shape.w", "i32", [4, 4, 2]), key("general.alignment", "u32", 64)],
    [info("w", (32, 1), Q8_0, 0), info("b", (), F32, 64)],
    q8_0(0.5, [1] * 32) + bytes(30) + floats(2),
    alignment=64,
)
ARRAYS = Gguf(
    [
        array_head("tokens", "str", 40) + b"".join(string("x" * i) for i in range(40)),
        array_head("scores", "f32", 100) + floats(*range(100)),
        key("flags", "bool", [True, False]),
    ],
    [info("five", (1, 2, 1, 2, 1))],
    floats(*range(4)),
)
SEEDS = [
    *(small(order, version).bytes() for order in "<>" for version in (2, 3)),
    *(file.bytes() for file in (ORIGINAL, ARRAYS, Gguf())),
]
#: What counts, lengths, sizes and offsets are bounded by, or overflow at.
BOUNDARIES = [
    *(0, 1, 2, 4, 5, 8, 9, 13, 31, 32, 33, 127, 255, 256, 2**16 - 1, 2**16, 2**20, 2**31 - 1),
    *(2**31, 2**32 - 1, 2**32, 2**40, 2**60 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1),
]


def flipped(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place % len(data)] ^= 1 << bit
    return bytes(changed)


def overwritten(data: bytes, place: int, number: int, code: str) -> bytes:
    new = struct.pack(code, number % 2 ** (8 * struct.calcsize(code)))
    place %= len(data)
    return data[:place] + new + data[place + len(new) :]


def cut(data: bytes, place: int) -> bytes:
    return data[: place % len(data) + 1]


def removed(data: bytes, place: int, count: int) -> bytes:
    place %= len(data)
    return data[:place] + data[place + count :] or data


def repeated(data: bytes, place: int, count: int) -> bytes:
    place %= len(data)
    return data[:place] + data[place : place + count] + data[place:]


def spliced(data: bytes, place: int, other: bytes, start: int) -> bytes:
    return data[: place % len(data)] + other[start % len(other) :]


PLACES = st.integers(0, 2000)
CHANGES: SearchStrategy[tuple[object, ...]] = st.one_of(
    st.tuples(st.just(flipped), PLACES, st.integers(0, 7)),
    st.tuples(
        st.just(overwritten), PLACES, st.sampled_from(BOUNDARIES),
        st.sampled_from(["B", "<I", ">I", "<Q", ">Q"]),
    ),
    st.tuples(st.just(cut), PLACES),
    st.tuples(st.just(removed), PLACES, st.integers(1, 40)),
    st.tuples(st.just(repeated), PLACES, st.integers(1, 80)),
    st.tuples(st.just(spliced), PLACES, st.sampled_from(SEEDS), PLACES),
)  # fmt: skip


def read_all(path: Path) -> None:
    """Do what there is to do with a file, each part whatever became of the others."""
    file = read_gguf(path)
    for name in file.metadata:
        with contextlib.suppress(FormatError):
            file.metadata.typed(name)
    for name, weight in file.weights(allow_nonfinite=True).items():
        with contextlib.suppress(FormatError):
            assert file.dequantize(name).shape == weight.shape
        with contextlib.suppress(FormatError):
            weight.read()
        with contextlib.suppress(FormatError):
            file.read(name)


@pytest.mark.property
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.sampled_from(SEEDS), changes=st.lists(CHANGES, min_size=1, max_size=4))
def test_a_changed_file_loads_or_is_refused(
    tmp_path: Path, seed: bytes, changes: list[tuple[object, ...]]
) -> None:
    data = seed
    for change, *arguments in changes:
        assert callable(change)
        data = change(data, *arguments)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with contextlib.suppress(FormatError):
        read_all(path)


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_every_place_holds_every_boundary(tmp_path: Path, number: int) -> None:
    """Write the most telling numbers over each byte of a header, four and eight bytes wide."""
    seed = SEEDS[number]
    header_bytes = min(len(seed), 320)
    path = tmp_path / "model.gguf"
    for place in range(4, header_bytes):
        for code, value in (("<I", 2**31), ("<Q", 2**63), ("<Q", 2**40), (">Q", 2**62)):
            path.write_bytes(overwritten(seed, place, value, code))
            with contextlib.suppress(FormatError):
                read_all(path)
