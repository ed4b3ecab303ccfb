"""A question about an image that the prompt shows, and its answer in free words.

The image stands among the same ids (or in a form that the family sees) as one that was drawn, so that what is learned
of it here serves wherever an image is looked at.
"""

from __future__ import annotations

from typing import Any

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role

NAME = "questions"
GRAMMAR = Grammar(
    name=NAME,
    roles=(Role("answer", label="answer", color="inspect"),),
    follow={START: ("answer",), "answer": (END,)},
    max_images=0,
)


def questions(**options: Any) -> DeclaredFormat:
    """answer, and the end. A recipe names it by its path: `format: {name: "formats.questions:questions"}`."""
    return DeclaredFormat(GRAMMAR, **options)
