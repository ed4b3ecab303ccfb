"""Intermediate images towards a final one: a plan in words, images of parts with words between, the whole.

Thinking with Generated Images (arXiv:2505.22525), vision generation with intermediate subgoals. Free text without
tags. Guidance is theirs: `obj` for the first two images, `full` from the third.
"""

from __future__ import annotations

from typing import Any

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from record.trajectory import Modality

GRAMMAR = Grammar(
    name="subgoals",
    roles=(
        Role("plan", label="plan", color="plan"),
        Role("subgoal", Modality.IMAGE, label="subgoal", color="draw"),
        Role("reflect", label="reflection", color="inspect"),
        # Nothing announces the final image: it is the one that the turn ends with.
        Role("final", Modality.IMAGE, label="final image", color="draw"),
    ),
    follow={
        START: ("plan",),
        "plan": ("subgoal",),
        "subgoal": ("reflect",),
        "reflect": ("subgoal", "final"),
        "final": (END,),
    },
    max_images=4,
)


def subgoals(**options: Any) -> DeclaredFormat:
    """plan -> subgoal -> (reflect -> subgoal)* -> reflect -> final."""
    return DeclaredFormat(GRAMMAR, **{"guidance": ("obj", "obj", "full"), **options})
