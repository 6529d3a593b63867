"""The contact sheet: a row of pictures for each scheme, a column for each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.ImageFont import FreeTypeFont

PAPER: Final = (251, 250, 247)
BAND: Final = (240, 238, 232)
INK: Final = (32, 32, 36)
MUTED: Final = (132, 129, 122)
RULE: Final = (221, 218, 210)

MARGIN: Final = 72
GAP: Final = 14
#: Height of the title above the column labels, of the labels, and of the line at the foot.
TITLE: Final = 118
LABELS: Final = 64
FOOT: Final = 62
#: Width of the names of rows, and of each figure beside them.
NAME: Final = 310
FIGURE: Final = 104

#: Pixels that pictures are enlarged to, at least, and shrunk to, at most.
_SMALL: Final = 112
_LARGE: Final = 256

#: Pillow's own font has one weight: a thin stroke around the letters makes a bolder one.
_BOLD: Final = 0.5


@final
@dataclass(frozen=True)
class SheetRow:
    """A row: its name, its figures as texts, its pictures."""

    name: str
    figures: tuple[str, ...]
    pictures: tuple[Image.Image, ...]


@final
@dataclass(frozen=True)
class Sheet:
    """What a contact sheet says and shows.

    Attributes:
        title: what was compared.
        subtitle: how.
        footer: where and when.
        figures: headings of the rows' figures; two lines each at most.
        columns: labels of the columns of pictures.
        rows: the first one is set apart: the others are compared with it.
    """

    title: str
    subtitle: str
    footer: str
    figures: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[SheetRow, ...]


@final
@dataclass(frozen=True)
class Layout:
    """Where things are on a sheet, in pixels.

    Attributes:
        tile: width and height of a picture as it is shown.
        rows: of pictures.
        columns: of pictures.
        figures: columns of figures.
    """

    tile: tuple[int, int]
    rows: int
    columns: int
    figures: int

    @property
    def left(self) -> int:
        """Where the pictures begin."""
        return MARGIN + NAME + self.figures * FIGURE + 2 * GAP

    @property
    def top(self) -> int:
        """Where the pictures begin."""
        return MARGIN + TITLE + LABELS

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        width = self.left + self.columns * (self.tile[0] + GAP) - GAP + MARGIN
        bottom = self.row_top(self.rows) - GAP
        return width, bottom + FOOT + MARGIN - GAP

    def row_top(self, row: int) -> int:
        """Return where a row of pictures begins; the first row has room below it."""
        return self.top + row * (self.tile[1] + GAP) + (2 * GAP if row else 0)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return the upper left corner of a picture."""
        return self.left + column * (self.tile[0] + GAP), self.row_top(row)

    def figure_right(self, figure: int) -> int:
        """Return the right edge of a column of figures."""
        return MARGIN + NAME + (figure + 1) * FIGURE - GAP


def layout(sheet: Sheet) -> Layout:
    """Return the layout of a sheet: small pictures are enlarged by whole factors."""
    width, height = sheet.rows[0].pictures[0].size
    tile = shown_size(width, height)
    return Layout(tile, len(sheet.rows), len(sheet.columns), len(sheet.figures))


def shown_size(width: int, height: int) -> tuple[int, int]:
    """Return the size that a picture is shown in: a whole multiple of it, or reduced."""
    longest = max(width, height)
    if longest > _LARGE:
        return round(width * _LARGE / longest), round(height * _LARGE / longest)
    factor = max(1, -(-_SMALL // longest))
    return width * factor, height * factor


def render(sheet: Sheet) -> Image.Image:
    """Draw a sheet; its size is that of its `layout`."""
    place = layout(sheet)
    image = Image.new("RGB", place.size, PAPER)
    pen = ImageDraw.Draw(image)
    _draw_title(pen, sheet, place)
    _draw_headings(pen, sheet, place)
    for number, row in enumerate(sheet.rows):
        if number == 0:
            _draw_band(pen, place)
        _draw_row(image, pen, row, place, number)
    return image


def shorten(text: str, font: FreeTypeFont, width: int) -> str:
    """Return a text cut, with an ellipsis, to so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text.rstrip()}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def wrap(text: str, font: FreeTypeFont, width: int, lines: int = 2) -> list[str]:
    """Break a text between words into so many lines at most; the last one is shortened."""
    broken: list[str] = []
    words = text.split()
    while words and len(broken) < lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        broken.append(shorten(" ".join(words[:count]), font, width))
        words = words[count:]
    return [*broken, shorten(" ".join(words), font, width)] if words else broken


def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType, which contact sheets need")
    return font


def _draw_title(pen: ImageDraw.ImageDraw, sheet: Sheet, place: Layout) -> None:
    width = place.size[0] - 2 * MARGIN
    title, small, foot = _font(44), _font(21), _font(18)
    pen.text(
        (MARGIN - 2, MARGIN - 14),
        shorten(sheet.title, title, width),
        INK,
        title,
        stroke_width=_BOLD,
    )
    pen.text((MARGIN, MARGIN + 48), shorten(sheet.subtitle, small, width), MUTED, small)
    bottom = place.size[1] - MARGIN + GAP
    pen.text((MARGIN, bottom), shorten(sheet.footer, foot, width), MUTED, foot, anchor="ls")


def _draw_headings(pen: ImageDraw.ImageDraw, sheet: Sheet, place: Layout) -> None:
    small, label = _font(18), _font(20)
    base = place.top - GAP - 10
    for number, heading in enumerate(sheet.figures):
        _draw_lines(
            pen, heading.split("\n"), (place.figure_right(number), base), (small, MUTED, "rs")
        )
    for number, text in enumerate(sheet.columns):
        x = place.corner(0, number)[0] + place.tile[0] // 2
        lines = wrap(text, label, place.tile[0] + GAP - 4)
        _draw_lines(pen, lines, (x, base), (label, INK, "ms"))


def _draw_lines(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    end: tuple[int, int],
    style: tuple[FreeTypeFont, tuple[int, int, int], str],
) -> None:
    """Draw lines of text of which the last one stands on a given base line."""
    font, colour, anchor = style
    pitch = round(font.size * 1.2)
    for number, line in enumerate(reversed(lines)):
        pen.text((end[0], end[1] - number * pitch), line, colour, font, anchor=anchor)


def _draw_band(pen: ImageDraw.ImageDraw, place: Layout) -> None:
    """Set the first row apart from those that are compared with it."""
    top, bottom = place.row_top(0) - GAP, place.row_top(0) + place.tile[1] + GAP
    box = (MARGIN - 2 * GAP, top, place.size[0] - MARGIN + 2 * GAP, bottom)
    pen.rounded_rectangle(box, 12, BAND)


def _draw_row(
    image: Image.Image, pen: ImageDraw.ImageDraw, row: SheetRow, place: Layout, number: int
) -> None:
    name, figure = _font(27), _font(23)
    middle = place.row_top(number) + place.tile[1] // 2
    if number > 1:
        y = place.row_top(number) - GAP // 2 - 1
        pen.line((MARGIN, y, place.left - 2 * GAP, y), RULE)
    text = shorten(row.name, name, NAME - GAP)
    pen.text((MARGIN, middle), text, INK, name, anchor="lm", stroke_width=_BOLD)
    for column, value in enumerate(row.figures):
        pen.text((place.figure_right(column), middle), value, INK, figure, anchor="rm")
    for column, picture in enumerate(row.pictures):
        image.paste(_fitted(picture, place.tile), place.corner(number, column))


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    shrinks = picture.width > size[0]
    method = Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST
    return picture.resize(size, method)
