"""Draw, look closer at a part of it, and say what is seen: the crop comes back as a picture of the environment's.

The loop of DeepEyes (arXiv:2505.14362) around a picture that the policy has drawn itself, in the tags of `strokes`.
"""

from __future__ import annotations

from typing import Any

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from record.trajectory import Author, Modality

GRAMMAR = Grammar(
    name="look",
    roles=(
        Role("plan", tags=(("<ins>", "</ins>"),), label="plan", color="plan"),
        Role("sketch", Modality.IMAGE, label="sketch", color="draw"),
        Role("look", tags=(("<look>", "</look>"),), max_tokens=4, label="looks at", color="inspect"),
        Role("crop", Modality.IMAGE, author=Author.ENVIRONMENT, label="crop", color="draw"),
        Role("error", author=Author.ENVIRONMENT, label="error", color="fault"),
        Role("inspect", tags=(("<inspect>", "</inspect>"),), label="inspection", color="inspect"),
    ),
    follow={
        START: ("plan",),
        "plan": ("sketch",),
        "sketch": ("look",),
        "look": ("crop", "error"),
        "crop": ("inspect",),
        "error": ("inspect",),
        "inspect": ("look", "plan", END),
    },
    max_images=3,
)


def look(**options: Any) -> DeclaredFormat:
    """plan -> sketch -> look -> (crop | error) -> inspect, again from look or plan, or to the end."""
    return DeclaredFormat(GRAMMAR, **options)
