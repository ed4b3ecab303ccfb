"""Draw at once, criticise in words, draw again.

Thinking with Generated Images (arXiv:2505.22525), vision generation with self-critique: the prompt ends with the
marker that begins the first image, so that it is forced; then free text and a second image. Here critique and redraw
may repeat.
"""

from __future__ import annotations

from typing import Any

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from record.trajectory import Modality

GRAMMAR = Grammar(
    name="self_critique",
    roles=(
        Role("sketch", Modality.IMAGE, label="sketch", color="draw"),
        Role("critique", label="critique", color="inspect"),
        Role("redraw", Modality.IMAGE, label="redrawn", color="draw"),
    ),
    follow={
        START: ("sketch",),
        "sketch": ("critique",),
        "critique": ("redraw",),
        "redraw": ("critique", END),
    },
    max_images=4,
)


def self_critique(**options: Any) -> DeclaredFormat:
    """sketch -> critique -> redraw, then (critique -> redraw)*."""
    return DeclaredFormat(GRAMMAR, **{"guidance": ("obj", "full"), **options})
