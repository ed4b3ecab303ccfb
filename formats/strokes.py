"""Think in strokes: plan, sketch, inspect, and refine by redrawing until nothing is wrong.

The roles and tags are those of Think-in-Strokes (plan `<ins>` what to draw next and `<des>` what the canvas then
shows; inspection; `<refine>`); the tag of the inspection is ours, for theirs is plain text.
"""

from __future__ import annotations

from typing import Any

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from record.trajectory import Modality

GRAMMAR = Grammar(
    name="strokes",
    roles=(
        Role("plan", tags=(("<ins>", "</ins>"), ("<des>", "</des>")), label="plan", color="plan"),
        Role("sketch", Modality.IMAGE, label="sketch", color="draw"),
        Role("inspect", tags=(("<inspect>", "</inspect>"),), label="inspection", color="inspect"),
        Role("refine", tags=(("<refine>", "</refine>"),), label="refinement", color="refine"),
        Role("redraw", Modality.IMAGE, label="redrawn", color="draw"),
    ),
    follow={
        START: ("plan",),
        "plan": ("sketch",),
        "sketch": ("inspect",),
        "inspect": ("refine", "plan", END),
        "refine": ("redraw",),
        "redraw": ("inspect",),
    },
    max_images=4,
)


def strokes(**options: Any) -> DeclaredFormat:
    """plan -> sketch -> inspect -> (refine -> redraw -> inspect)*, again from plan or to the end."""
    return DeclaredFormat(GRAMMAR, **options)
