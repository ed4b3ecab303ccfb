"""How short a thought of so many images can be: whether there is room for it is known before anything is sampled."""

from __future__ import annotations

from typing import Any

from formats.base import Vocabulary
from formats.grammar import END, START, Grammar, Role


def least_words(fmt: Any, vocabulary: Vocabulary, images: int) -> int:
    """The fewest ids beside images with which a turn of the format comes to its image of that number.

    Each body has at least one id, and each tag those that spell it. 0 for a format without a grammar: nothing is known
    of its words.
    """
    grammar = getattr(fmt, "grammar", None)
    if not isinstance(grammar, Grammar) or images < 1:
        return 0
    least: dict[tuple[str, int], int] = {(START, 0): 0}
    settled = False
    while not settled:  # Bellman and Ford's: as many rounds as the longest of the shortest ways has segments
        settled = True
        for (place, drawn), words in list(least.items()):
            for name in grammar.follow[place] if drawn < images else ():
                if name == END:
                    continue
                role = grammar.by_name[name]
                state = name, drawn + (role.is_image and role.by_policy)
                way = words + _least(role, vocabulary)
                if way < least.get(state, way + 1):
                    least[state], settled = way, False
    return min((words for (_, drawn), words in least.items() if drawn == images), default=0)


def _least(role: Role, vocabulary: Vocabulary) -> int:
    if role.is_image or not role.by_policy:
        return 0
    tags = sum(len(vocabulary.encode(tag)) for pair in role.tags for tag in pair)
    return tags + max(1, len(role.tags)) + role.ends_turn
