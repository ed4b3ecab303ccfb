"""What was measured of each answer of an evaluation, one a line: what a gain is taken apart by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out prompt."""

    prompt: int  # number of its prompt
    sample: int
    measures: Mapping[str, float | None]  # reward, reward/<part>, final_image ...; None: not judged
    credit: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by part and role: rewards/credit.py

    @classmethod
    def of_json(cls, row: Mapping[str, Any]) -> Answer:
        """Raises KeyError, TypeError, ValueError or AttributeError where `row` is none."""
        return cls(
            int(row["prompt"]),
            int(row["sample"]),
            {str(name): None if value is None else float(value) for name, value in row["measures"].items()},
            {part: {role: float(value) for role, value in of.items()} for part, of in row["credit"].items()},
        )

    @property
    def parts(self) -> dict[str, float | None]:
        """The reward's parts by name."""
        return {name.removeprefix("reward/"): value for name, value in self.measures.items() if "/" in name}

    @property
    def reward(self) -> float | None:
        return self.measures.get("reward")


def lines_of(answers: Iterable[Answer]) -> str:
    """Answers as JSON, one a line."""
    return "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
