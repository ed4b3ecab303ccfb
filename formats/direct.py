"""Draw one image and end, without a word: what thinking in several images is measured against."""

from __future__ import annotations

from typing import Any

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from record.trajectory import Modality

GRAMMAR = Grammar(
    name="direct",
    roles=(Role("final", Modality.IMAGE, label="image", color="draw"),),
    follow={START: ("final",), "final": (END,)},
    max_images=1,
)


def direct(**options: Any) -> DeclaredFormat:
    """final."""
    return DeclaredFormat(GRAMMAR, **options)
