"""A vocabulary as one grammar sees it: the text of each id, and the interned sets of ids that may come next."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from formats.base import AllowedSet, Vocabulary
from formats.grammar import Grammar
from record.trajectory import ranges_of
from runtime.errors import UserError

_SPECIAL = re.compile(r"<[^<>\s]+>")


class Lexicon:
    """Facts about ids, computed once per (grammar, vocabulary). Equal sets are one object."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self.grammar = grammar
        self.vocabulary = vocabulary
        self._looks: dict[int, tuple[str, int, bool]] = {}
        self._sets: dict[bytes, AllowedSet] = {}
        words = np.setdiff1d(np.arange(vocabulary.size), [*vocabulary.code_ids, vocabulary.eoi, vocabulary.boi])
        self.words = self.intern("words", words)  # the image limit is reached
        self.text = self.intern("text", [*words, vocabulary.boi])
        self.codes = self.intern("codes", vocabulary.code_ids)

    def intern(self, name: str, ids: Iterable[int]) -> AllowedSet:
        ranges = ranges_of(np.fromiter(ids, np.int64))
        return self._sets.setdefault(ranges.tobytes(), AllowedSet(name, ranges))

    def look(self, id: int) -> tuple[str, int, bool]:
        """The id's text, where in it a tag may begin (-1: nowhere), and whether it is blank."""
        found = self._looks.get(id)
        if found is None:
            piece = self.vocabulary.piece(id)
            at = min((i for i in map(piece.find, self.grammar.tag_starts) if i >= 0), default=-1)
            found = self._looks[id] = (piece, at, not piece.strip())
        return found

    def spell(self, tag: str) -> tuple[int, ...]:
        """The tag's canonical ids.

        Raises:
            UserError: the vocabulary cannot spell it.
        """
        ids = tuple(int(i) for i in self.vocabulary.encode(tag))
        if not ids or "".join(map(self.vocabulary.piece, ids)).strip() != tag:
            spelt = "".join(map(self.vocabulary.piece, ids))
            raise UserError(
                f"format '{self.grammar.name}': the vocabulary spells the tag '{tag}' as '{spelt}'; "
                "add the tag to the tokenizer"
            )
        return ids

    @cached_property
    def body(self) -> list[int]:
        """Ids of which a fully constrained body is made: neither special nor able to begin a tag."""
        vocabulary = self.vocabulary
        special = {int(i) for i in vocabulary.code_ids} | {
            vocabulary.boi,
            vocabulary.eoi,
            vocabulary.eos,
            vocabulary.pad,
        }
        special |= {i for i in (vocabulary.bos, vocabulary.sep) if i is not None}
        ids = []
        for id in range(vocabulary.size):
            if id not in special:
                piece, at, _ = self.look(id)
                if piece and at < 0 and not _SPECIAL.fullmatch(piece.strip()):
                    ids.append(id)
        return ids

    @cached_property
    def visible(self) -> list[int]:
        """Those of `body` that surely show something: with one of them a body is not blank."""
        # A replacement character stands for part of a multi-byte character, which may turn out to be a space.
        ids = [id for id in self.body if any(not c.isspace() and c != "\ufffd" for c in self.look(id)[0])]
        if not ids:
            raise UserError(f"format '{self.grammar.name}': the vocabulary has no word that a body could begin with")
        return ids
