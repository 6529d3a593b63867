"""Reading off what a converter of state dicts does with rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lowbits.errors import FormatError
from lowbits.files.rows import Segment
from lowbits.integrations.row_tracing import Trace, backward, forward, trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SOURCES = {"a": (6, 5), "b": (4, 5), "c": (2, 3, 4)}


def traced(converter: Callable[[dict[str, Tensor]], Any]) -> Trace:
    return trace(converter, SOURCES, lambda _: None)


def test_renaming_splitting_joining_and_swapping() -> None:
    def convert(given: dict[str, Tensor]) -> dict[str, Tensor]:
        first, second, third = given.pop("a").chunk(3)
        low, high = given.pop("b").chunk(2)
        return {
            "A": first,
            "BA": torch.cat([third, second]),
            "B": torch.cat([high, low]),
            "C": given["c"],
        }

    done = traced(convert)
    targets = {"A": (2, 5), "BA": (4, 5), "B": (4, 5), "C": (2, 12)}
    assert done.left == ()
    assert forward(done, targets, SOURCES) == {
        "A": (Segment("a", 0, 2),),
        "BA": (Segment("a", 4, 6), Segment("a", 2, 4)),
        "B": (Segment("b", 2, 4), Segment("b", 0, 2)),
        "C": (Segment("c", 0, 2),),
    }
    assert backward(done, targets) == {
        "a": (Segment("A", 0, 2), Segment("BA", 2, 4), Segment("BA", 0, 2)),
        "b": (Segment("B", 2, 4), Segment("B", 0, 2)),
        "c": (Segment("C", 0, 2),),
    }


def test_whole_tensors_are_joined_whatever_their_rows_are() -> None:
    done = traced(lambda given: {"AB": torch.cat([given["a"], given["b"]]), "c": given["c"]})
    assert forward(done, {"AB": (10, 5), "c": (2, 3, 4)}, SOURCES)["AB"] == (
        Segment("a", 0, 6),
        Segment("b", 0, 4),
    )
    with pytest.raises(FormatError, match="AB: its 11 rows cannot be made of a, b"):
        forward(done, {"AB": (11, 5), "c": (2, 3, 4)}, SOURCES)


def test_tensors_that_are_not_touched_are_told_and_those_taken_away_are_not() -> None:
    def convert(given: dict[str, Tensor]) -> dict[str, Tensor]:
        given.pop("b")
        return {"A": given.pop("a")}

    assert traced(convert).left == ("c",)


def test_one_tensor_may_be_several() -> None:
    done = traced(lambda given: {"A": given["a"], "A2": given["a"]})
    targets = {"A": (6, 5), "A2": (6, 5)}
    assert set(forward(done, targets, SOURCES).values()) == {(Segment("a", 0, 6),)}
    assert backward(done, targets) == {"a": (Segment("A", 0, 6),)}


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda given: {"A": given["a"][::2]}, "not made of whole runs"),
        (lambda given: {"A": given["a"].reshape(2, -1).T}, "not made of whole runs"),
        (lambda given: {"A": given["a"][:5]}, "not made of whole runs"),
        (lambda _: {"A": None}, "A: the tensors that it is made of are missing"),
        (lambda given: {"A": given["a"][:0]}, "are missing"),
        (lambda given: {"A": given["x"]}, "the converter refuses these tensors: KeyError"),
        (lambda given: {"A": torch.split(given["a"], [5, 99])[0]}, "the converter refuses"),
    ],
)
def test_what_is_no_rows_is_refused(
    convert: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        traced(convert)


def test_rows_used_twice_or_never_are_refused() -> None:
    halves = traced(lambda given: {"A": given["a"].chunk(2)[0], "B": given["a"].chunk(2)[0]})
    with pytest.raises(FormatError, match="a: some of its rows are used twice, or never"):
        forward(halves, {"A": (3, 5), "B": (3, 5)}, SOURCES)
    half = traced(lambda given: {"A": given["a"].chunk(2)[0]})
    with pytest.raises(FormatError, match="a: some of its rows are never used"):
        forward(half, {"A": (3, 5)}, SOURCES)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"A": (2, 5), "B": (2, 5), "C": (3, 5)}, "a: has 6 rows where the model's shapes ask for"),
        ({"A": (2, 5), "B": (2, 5), "C": (2, 4)}, "a: its rows have 5 values; those of C have 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    targets: dict[str, tuple[int, ...]], message: str
) -> None:
    done = traced(lambda given: dict(zip("ABC", given["a"].chunk(3), strict=True)))
    with pytest.raises(FormatError, match=message):
        forward(done, targets, SOURCES)


def test_a_renamed_tensor_keeps_its_elements() -> None:
    done = traced(lambda given: {"A": given["a"], "C": given["c"]})
    assert forward(done, {"A": (6, 5, 1, 1), "C": (2, 12)}, SOURCES)["A"] == (Segment("a", 0, 6),)
    for wrong in ((5, 6), (6, 6), (30,), (6,)):
        with pytest.raises(FormatError, match="a: has shape \\[6, 5\\]"):
            forward(done, {"A": wrong, "C": (2, 12)}, SOURCES)


def test_parts_of_any_ratio_share_what_a_converter_splits_at_fixed_rows() -> None:
    def convert(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip("qkv", torch.split(given["a"], [30, 10, 10]), strict=True))

    done = trace(convert, {"a": (12, 5)}, lambda _: 50)
    assert forward(done, {"q": (4, 5), "k": (4, 5), "v": (4, 5)}, {"a": (12, 5)})["v"] == (
        Segment("a", 8, 12),
    )
