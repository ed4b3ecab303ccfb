"""A vocabulary as one grammar sees it: the text of each id, and the interned sets of ids that may come next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from formats.base import AllowedSet, Codes, SeenOnly, Vocabulary
from formats.grammar import Grammar, Role
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
        self._beginnings: dict[tuple[str, ...], AllowedSet | None] = {}
        self.imaging = vocabulary.imaging
        self.code_ids = self.imaging.ids if isinstance(self.imaging, Codes) else np.empty(0, np.int32)
        self.open = None if isinstance(self.imaging, SeenOnly) else self.imaging.open
        self.close = None if isinstance(self.imaging, SeenOnly) else self.imaging.close
        self.special = {int(i) for i in (*self.code_ids, *vocabulary.never)}
        self.special |= {id for id in (self.open, self.close) if id is not None}
        words = np.setdiff1d(np.arange(vocabulary.size), sorted(self.special))
        self.words = self.intern("words", words)  # the image limit is reached
        self.text = self.words if self.open is None else self.intern("text", [*words, self.open])
        # Before the turn may end: no end of turn.
        self.going_on = self.intern("going on", [*np.setdiff1d(words, [*_one(vocabulary.eos)]), *_one(self.open)])
        self.codes = self.intern("codes", self.code_ids)
        self._check_imaging()

    def _check_imaging(self) -> None:
        """Raises UserError where the family cannot make what the grammar has the policy draw."""
        drawn = [role.name for role in self.grammar.drawn]
        if drawn and isinstance(self.imaging, SeenOnly):
            raise UserError(
                f"format '{self.grammar.name}': the policy draws in the role '{drawn[0]}', but its family only "
                "sees images"
            )
        written = [role.name for role in self.grammar.written]
        if drawn and written and self.open is None:
            raise UserError(
                f"format '{self.grammar.name}': the family draws images without an opening marker, so nothing tells "
                f"the words of '{written[0]}' from an image"
            )
        if written and self.vocabulary.eos is None:
            raise UserError(
                f"format '{self.grammar.name}': '{written[0]}' is text, and the family has no id that ends a turn"
            )

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

    def beginnings(self, names: tuple[str, ...]) -> AllowedSet | None:
        """With which ids one of these roles begins; None: with any word, or with none that is known."""
        if names not in self._beginnings:
            self._beginnings[names] = self._find_beginnings([self.grammar.by_name[name] for name in names])
        return self._beginnings[names]

    def _find_beginnings(self, roles: Sequence[Role]) -> AllowedSet | None:
        own = [role for role in roles if role.by_policy]
        try:
            ids = [self.spell(role.tags[0][0])[0] for role in own if role.tags]
        except UserError:  # under the constraint of images nobody has promised that tags can be spelt
            return None
        if any(role.is_free for role in own):
            return None
        ids += _one(self.open) if any(role.is_image for role in own) else []
        return self.intern("begins " + ", ".join(role.name for role in own), ids) if ids else None

    @cached_property
    def body(self) -> list[int]:
        """Ids of which a fully constrained body is made: neither special nor able to begin a tag."""
        vocabulary = self.vocabulary
        special = self.special | {vocabulary.pad}
        special |= {i for i in (vocabulary.eos, vocabulary.bos, vocabulary.sep) if i is not None}
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


def _one(id: int | None) -> list[int]:
    return [] if id is None else [id]
