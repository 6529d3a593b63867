"""The blind test: a page of pairs of pictures, of which one is drawn with packed weights."""

from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

PAIRS: Final = 10

_Item = TypeVar("_Item")

_PLACE: Final = "@@PAIRS@@"
_TITLE: Final = "@@TITLE@@"


@final
@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt from the same noise.

    Attributes:
        prompt: what was asked for.
        scheme: that one of them was drawn with.
        note: what is said about it in the end, e.g. its bits per weight.
        pictures: left and right.
        quantized: which of them was drawn with packed weights: 0 or 1.
    """

    prompt: str
    scheme: str
    note: str
    pictures: tuple[Image, Image]
    quantized: int


def choose_pairs(
    prompts: Sequence[str],
    reference: Sequence[Image],
    schemes: Mapping[str, Sequence[Image]],
    notes: Mapping[str, str],
    *,
    seed: int = 0,
    count: int = PAIRS,
) -> list[Pair]:
    """Choose pairs at random, but every scheme and every prompt about equally often.

    Args:
        prompts: of the pictures.
        reference: the pictures in full precision, one of each prompt.
        schemes: the pictures of each scheme, in the same order.
        notes: what is said about each scheme in the end.
        seed: of the choice; equal seeds choose equal pairs.
        count: of pairs.
    """
    chance = random.Random(seed)  # noqa: S311 - a game, not a key
    names = _dealt(list(schemes), count, chance)
    numbers = _dealt(list(range(len(prompts))), count, chance)
    pairs = []
    for name, number in zip(names, numbers, strict=True):
        quantized = chance.randrange(2)
        pair = (reference[number], schemes[name][number])
        pictures = pair if quantized else pair[::-1]
        pairs.append(Pair(prompts[number], name, notes[name], pictures, quantized))
    return pairs


def blind_page(title: str, pairs: Sequence[Pair]) -> str:
    """Return the page: one HTML file that needs nothing else, and no network."""
    template = resources.files("lowbits.cli").joinpath("blind.html").read_text(encoding="utf-8")
    data = json.dumps([_plain(pair) for pair in pairs])
    # "</script>" in a prompt would end the element that holds the data.
    page = template.replace(_PLACE, data.replace("<", "\\u003c"))
    return page.replace(_TITLE, title.replace("&", "&amp;").replace("<", "&lt;"))


def _dealt(items: Sequence[_Item], count: int, chance: random.Random) -> list[_Item]:
    """Deal so many items from shuffled decks of all of them."""
    dealt: list[_Item] = []
    while len(dealt) < count:
        dealt += chance.sample(items, len(items))
    return dealt[:count]


def _plain(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": pair.prompt,
        "scheme": pair.scheme,
        "note": pair.note,
        "pictures": [_data_uri(picture) for picture in pair.pictures],
        "quantized": pair.quantized,
    }


def _data_uri(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
