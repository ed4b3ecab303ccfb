"""Learning-rate schedules that a recipe may name: those of transformers' get_scheduler that need no further arguments.

The others want a key that no recipe has (a least rate, the steps of a decay), or the loss of an evaluation, and
transformers would say so only once the weights are loaded.
"""

from __future__ import annotations

from typing import Literal

Schedule = Literal[
    "constant_with_warmup",
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]
POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends


def check_schedule(kind: Schedule, learning_rate: float) -> None:
    """Raises ValueError for a polynomial schedule that would rise: it ends at POLYNOMIAL_END."""
    if kind == "polynomial" and learning_rate <= POLYNOMIAL_END:
        raise ValueError(
            f"learning_rate is {learning_rate:g}, and lr_scheduler_type: polynomial ends at {POLYNOMIAL_END:g}; give a "
            "larger rate, or another schedule"
        )
