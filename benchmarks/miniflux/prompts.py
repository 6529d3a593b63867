"""The prompts of mini-FLUX, and tokenizers made from their words alone: nothing is downloaded."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Final

from transformers import CLIPTokenizer, T5Tokenizer

CLASS_NAMES: Final = (
    ("a t-shirt", "a T-shirt", "a tee"),
    ("trousers", "pants", "a pair of trousers"),
    ("a pullover", "a sweater", "a jumper"),
    ("a dress", "a gown"),
    ("a coat", "a jacket"),
    ("a sandal", "a high heel"),
    ("a shirt", "a blouse"),
    ("a sneaker", "a trainer", "a running shoe"),
    ("a bag", "a handbag", "a purse"),
    ("an ankle boot", "a boot"),
)
"""How a prompt may name each class, in the data set's order; scoring uses the first name."""

TEMPLATES: Final = (
    "a photo of {}",
    "A photo of {}",
    "a picture of {}",
    "an image of {}",
    "a grey photo of {}",
    "a product photo of {}",
    "a small picture of {}",
    "{}",
)

SCORED_PROMPTS: Final = tuple(TEMPLATES[0].format(names[0]) for names in CLASS_NAMES)

CLIP_LENGTH: Final = 32
"""Tokens that the CLIP encoder has positions for."""

_WORDS: Final = tuple(
    sorted(
        {
            word
            for template in TEMPLATES
            for names in CLASS_NAMES
            for name in names
            for word in template.format(name).split()
        }
    )
)


def clip_tokenizer() -> CLIPTokenizer:
    """Build a byte-level BPE like CLIP's in which each prompt word is one token.

    The vocabulary is the 256 bytes, their word-final forms, the merged pieces and two markers.
    """
    alphabet = _byte_alphabet()
    # CLIP lower-cases and splits at "-".
    words = sorted({part for word in _WORDS for part in word.lower().replace("-", " - ").split()})
    merges = _learn_merges(words)
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Build a unigram tokenizer: a piece for each prompt word, else printable ASCII characters."""
    space = "\u2581"  # what SentencePiece writes for the space before a word
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -2.0)]
    pieces += [(space + word, -3.0) for word in _WORDS]
    pieces += [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)]
    return T5Tokenizer(vocab=pieces, model_max_length=512)


def _byte_alphabet() -> list[str]:
    """List the 256 characters that stand for bytes, as in GPT-2's ``bytes_to_unicode``."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = range(256, 512 - len(printable))
    return [chr(code) for code in (*printable, *stand_ins)]


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair of pieces until every word is one piece."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in spellings for pair in pairwise(pieces)):
        # The pair itself breaks ties: the vocabulary must not depend on hash order.
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for pieces in spellings:
            _merge(pieces, best)
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> None:
    for index in reversed(range(len(pieces) - 1)):
        if (*pieces[index : index + 2],) == pair:
            pieces[index : index + 2] = ["".join(pair)]
