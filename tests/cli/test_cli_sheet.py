"""The contact sheet's layout, and the blind test's pairs."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from PIL import Image, ImageFont
from PIL.ImageFont import FreeTypeFont

from lowbits.cli.blind import blind_page, choose_pairs
from lowbits.cli.sheet import (
    GAP,
    MARGIN,
    PAPER,
    Layout,
    Sheet,
    SheetRow,
    layout,
    render,
    shorten,
    shown_size,
    wrap,
)


def _font() -> FreeTypeFont:
    font = ImageFont.load_default(20)
    assert isinstance(font, FreeTypeFont)
    return font


def _picture(level: int = 0) -> Image.Image:
    return Image.new("RGB", (32, 32), (level, 0, 0))


def _sheet(rows: int, columns: int) -> Sheet:
    row = SheetRow("a scheme with quite a long name", ("4.50",), (_picture(200),) * columns)
    names = tuple(f"a photo of number {n} among many other ones" for n in range(columns))
    return Sheet("title", "subtitle", "footer", ("bits",), names, (row,) * rows)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((32, 32), (128, 128)), ((64, 32), (128, 64)), ((200, 100), (200, 100)),
     ((1024, 512), (256, 128))],
)  # fmt: skip
def test_pictures_are_enlarged_by_whole_factors(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert shown_size(*size) == shown


def test_tiles_are_apart_and_inside() -> None:
    place = Layout(tile=(100, 80), rows=3, columns=4, figures=2)
    assert place.corner(0, 1)[0] - place.corner(0, 0)[0] == 100 + GAP
    assert place.corner(2, 0)[1] - place.corner(1, 0)[1] == 80 + GAP
    assert place.corner(1, 0)[1] - place.corner(0, 0)[1] > 80 + GAP  # the reference is set apart
    right, bottom = place.corner(2, 3)
    assert place.size[0] == right + 100 + MARGIN
    assert place.size[1] > bottom + 80 + MARGIN
    assert place.figure_right(1) < place.corner(0, 0)[0]


def test_a_sheet_is_drawn_as_it_is_laid_out() -> None:
    sheet = _sheet(3, 2)
    image, place = render(sheet), layout(sheet)
    assert image.size == place.size
    for row in range(3):
        for column in range(2):
            x, y = place.corner(row, column)
            assert image.getpixel((x, y)) == image.getpixel((x + 127, y + 127)) == (200, 0, 0)
    assert image.getpixel((1, 1)) == PAPER


def test_long_texts_are_cut() -> None:
    font = _font()
    assert shorten("short", font, 200) == "short"
    cut = shorten("a rather long text that has no room", font, 100)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100
    assert wrap("bag", font, 100) == ["bag"]
    lines = wrap("a photo of a very beautiful and long dress", font, 120)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    assert all(font.getlength(line) <= 120 for line in lines)


def test_pairs_are_fair() -> None:
    reference = [_picture(1), _picture(2)]
    schemes = {name: [_picture(3), _picture(4)] for name in ("a", "b", "c")}
    notes = dict.fromkeys(schemes, "4 bits")
    pairs = choose_pairs(["x", "y"], reference, schemes, notes, count=12)
    assert Counter(pair.scheme for pair in pairs) == {"a": 4, "b": 4, "c": 4}
    assert Counter(pair.prompt for pair in pairs) == {"x": 6, "y": 6}
    assert {pair.quantized for pair in pairs} == {0, 1}
    for pair in pairs:
        full, packed = pair.pictures[1 - pair.quantized], pair.pictures[pair.quantized]
        assert packed in schemes[pair.scheme]
        assert full in reference
    again = choose_pairs(["x", "y"], reference, schemes, notes, count=12)
    other = choose_pairs(["x", "y"], reference, schemes, notes, count=12, seed=1)
    assert again == pairs != other


def test_texts_cannot_leave_the_page_s_data() -> None:
    prompt = "</script><b>"
    pairs = choose_pairs([prompt], [_picture()], {"a": [_picture()]}, {"a": ""}, count=1)
    page = blind_page("<i>", pairs)
    assert prompt not in page
    assert "<i>," not in page
    found = re.search(r'id="pairs">(.*?)</script>', page, re.DOTALL)
    assert found
    assert json.loads(found[1])[0]["prompt"] == prompt
