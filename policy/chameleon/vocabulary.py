"""Chameleon's ids: words, visual codes and markers in one vocabulary, read from the tokenizer's own map.

The released names are `IMGIMG<code, digits as A-J>Z` for a visual code, `<racm3:break>` and `<eoss>` for the begin
and end of an image, `<reserved08706>` for the separator that ends the prompt. Code k's id is looked up by name: the
order of the ids says nothing about the order of the codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from formats.base import Codes
from runtime.errors import UserError

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
BOI, EOI = "<racm3:break>", "<eoss>"
SEP = "<reserved08706>"
IMAGE = "<image>"  # transformers' placeholder for an image that is yet to be encoded; never sampled

_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


class VocabularyError(UserError):
    """A tokenizer that lacks what images need, or text that its words cannot say."""


def code_name(code: int) -> str:
    """12 -> 'IMGIMGBCZ'."""
    return f"IMGIMG{str(code).translate(_LETTERS)}Z"


def code_table(vocabulary_map: Mapping[str, int], source: str = "the vocabulary map") -> np.ndarray:
    """Id of each visual code, int32 [K]. Raises VocabularyError where the codes have a gap or there are none."""
    ids: dict[int, int] = {}
    for name, id in vocabulary_map.items():
        if match := _CODE.fullmatch(name):
            ids[int(match[1].translate(_DIGITS))] = id
    if not ids:
        raise VocabularyError(f"{source}: it has no visual codes (tokens such as '{code_name(0)}')")
    for code in range(len(ids)):
        if code not in ids:
            raise VocabularyError(f"{source}: it has {len(ids)} visual codes, but none is named '{code_name(code)}'")
    return np.array([ids[code] for code in range(len(ids))], np.int32)


class ChameleonVocabulary:
    """The `Vocabulary` of a Chameleon tokenizer, the released one or a tiny one.

    Args:
        tokenizer: its `get_vocab()` is the vocabulary map.
        codes_per_image: N, the codes between BOI and EOI.
        size: of the model's output, which may be padded beyond the tokenizer's; None: the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, codes_per_image: int, size: int | None = None):
        self.tokenizer = tokenizer
        self.codes_per_image = codes_per_image
        self.map: dict[str, int] = tokenizer.get_vocab()
        source = str(tokenizer.name_or_path or "the tokenizer")
        self.size = size if size is not None else max(self.map.values()) + 1
        if max(self.map.values()) >= self.size:
            raise VocabularyError(f"{source}: it has ids up to {max(self.map.values())}, the model {self.size}")
        self.code_ids = code_table(self.map, source)
        self.code_of = np.full(self.size, -1, np.int32)  # int32 [V]; -1: no visual code
        self.code_of[self.code_ids] = np.arange(len(self.code_ids))
        for name in (BOI, EOI, EOS, PAD):
            if name not in self.map:
                raise VocabularyError(f"{source}: it has no token '{name}', which a Chameleon tokenizer has")
        self.boi, self.eoi, self.eos, self.pad = (self.map[name] for name in (BOI, EOI, EOS, PAD))
        self._imaging = Codes(self.code_ids, codes_per_image, self.boi, self.eoi)
        self.bos: int | None = self.map.get(BOS)
        named_sep = tokenizer.sep_token if tokenizer.sep_token in self.map else SEP
        self.sep: int | None = self.map.get(named_sep)
        structural = {self.boi, self.eoi, self.eos, self.pad, self.bos, self.sep, self.map.get(IMAGE)}
        self._silent = np.zeros(self.size, bool)  # ids that are no text
        self._silent[self.code_ids] = True
        self._silent[[id for id in structural if id is not None]] = True
        self._bytes, self._words, self._tags = _pieces(tokenizer, self.size)
        self._text = [
            "" if silent else piece.decode("utf-8", "replace")
            for piece, silent in zip(self._bytes, self._silent, strict=True)
        ]

    @property
    def imaging(self) -> Codes:
        return self._imaging

    @property
    def never(self) -> np.ndarray:
        """transformers' placeholder of an image that is yet to be encoded."""
        return np.array([id for id in (self.map.get(IMAGE),) if id is not None], np.int32)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS.

        Raises VocabularyError for text that spells a marker, and for words that a word-level tokenizer lacks.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        silent = [id for id in ids if self._silent[id]]
        if silent:
            marker = self.tokenizer.convert_ids_to_tokens(silent[0])
            raise VocabularyError(f"the text holds the marker '{marker}', which only the model may write: {text!r}")
        if self._words and self.map.get(UNK) in ids:
            tags = "|".join(re.escape(str(self.tokenizer.convert_ids_to_tokens(id))) for id in self._tags)
            unknown = sorted(set(re.sub(tags, " ", text).split()) - set(self.map))
            raise VocabularyError(
                f"the tokenizer has no word for {', '.join(map(repr, unknown))} in {text!r}; it "
                "knows the task's words, spaces between them (policy.tiny.words adds others)"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; markers and visual codes have none."""
        words = [int(id) for id in ids if not self._silent[id]]
        if not self._words:
            return b"".join(self._bytes[id] for id in words).decode("utf-8", "replace")
        text, glued = "", True  # no space at the start, nor after a tag
        for id in words:
            text += self._text[id].lstrip(" ") if glued else self._text[id]
            glued = id in self._tags
        return text

    def piece(self, id: int) -> str:
        """The text of one id alone; "" for markers and visual codes. Concatenated pieces contain every tag verbatim."""
        return self._text[id]

    def to_codes(self, ids: np.ndarray) -> np.ndarray:
        """Visual codes of ids, int64. Raises VocabularyError for an id that is none."""
        ids = np.asarray(ids, np.int64)
        if len(ids.ravel()) and not (0 <= ids.min() and ids.max() < self.size):
            raise VocabularyError(f"ids from {ids.min()} to {ids.max()}: the vocabulary has {self.size}")
        codes = self.code_of[ids].astype(np.int64)
        if (codes < 0).any():
            id = int(ids[codes < 0].ravel()[0])
            raise VocabularyError(f"id {id} is no visual code; an image's content is its codes without BOI and EOI")
        return codes

    def to_ids(self, codes: np.ndarray) -> np.ndarray:
        """Ids of visual codes, int32."""
        return self.code_ids[np.asarray(codes, np.int64)]


def _pieces(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[list[bytes], bool, frozenset[int]]:
    """Each id's bytes [V]; whether the tokenizer is word-level; the ids of added tokens that are text (tags)."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    words = described["model"]["type"] == "WordLevel"
    byte_level = '"ByteLevel"' in json.dumps([described.get("decoder"), described.get("pre_tokenizer")])
    to_byte = _byte_level_alphabet()
    added = {int(entry["id"]) for entry in described.get("added_tokens", [])}
    pieces = [b""] * size
    for token, id in tokenizer.get_vocab().items():
        if id in added:
            pieces[id] = token.encode()
        elif words:
            pieces[id] = (" " + token).encode()
        elif byte_level:
            pieces[id] = bytes(to_byte[char] for char in token if char in to_byte)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            pieces[id] = bytes([int(match[1], 16)])
        else:
            pieces[id] = token.replace("\u2581", " ").encode()
    return pieces, words, frozenset(added)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (GPT-2's), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(rest)}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer files of a released or saved folder. Raises VocabularyError naming the file."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise VocabularyError(f"{file}: there is no such file; a model's folder holds the tokenizer's files too")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for what it cannot parse
        raise VocabularyError(f"{file}: cannot be read as a tokenizer ({error})") from error
