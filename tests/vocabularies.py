"""Two small vocabularies for tests of formats: one token a tag, and pieces that cut tags and join neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from formats.base import Codes

CODES, CODES_PER_IMAGE = 6, 3


class _Pieces:
    """pad, bos, eos, BOI, EOI, sep, the visual codes, then pieces of text."""

    def __init__(self, texts: Iterable[str], sep: bool = True):
        self.pad, self.bos, self.eos, self.boi, self.eoi = range(5)
        self.never = np.empty(0, np.int32)
        self.sep = 5 if sep else None
        self.code_ids = np.arange(6, 6 + CODES, dtype=np.int32)[::-1].copy()  # their order says nothing
        self.codes_per_image = CODES_PER_IMAGE
        self.imaging = Codes(self.code_ids, CODES_PER_IMAGE, self.boi, self.eoi)
        self.texts = [""] * (6 + CODES) + list(dict.fromkeys(texts))
        self.size = len(self.texts)
        self.ids = {text: id for id, text in enumerate(self.texts) if text}

    def piece(self, id: int) -> str:
        return self.texts[id]

    def decode(self, ids) -> str:
        return "".join(self.texts[int(id)] for id in ids)


class WordVocabulary(_Pieces):
    """A tag is one token; words carry the space before them."""

    def __init__(self, tags: Iterable[str] = ()):
        words = ("red", "blue", "circle", "fine", "wrong", "add")
        super().__init__([*tags, *(f" {word}" for word in words), " ", "."])

    def encode(self, text: str) -> list[int]:
        tags = [t for t in self.ids if t.startswith("<")]
        parts = re.findall("|".join([*map(re.escape, tags), r"\w+", r"\."]), text)
        return [self.ids[part if part in self.ids else f" {part}"] for part in parts]


class PieceVocabulary(_Pieces):
    """Single characters and some merges, taken greedily: tags are several ids, and `><` joins two of them."""

    MERGES = (
        "</",
        "><",
        "<i",
        "ins",
        "des",
        "in",
        "sp",
        "ect",
        "ref",
        "ine>",
        ">\n",
        ">.",
        " red",
        " circle",
        "e ",
        "<a",
        "\ufffd",
    )

    def __init__(self) -> None:
        super().__init__([*self.MERGES, *"abcdefghijklmnopqrstuvwxyz<>/ .\n"])

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = max((p for p in self.ids if text.startswith(p)), key=len)
            ids.append(self.ids[piece])
            text = text[len(piece) :]
        return ids
