"""What the published rewards share: the question, the reference, and one batch of judge calls for a whole step.

A missing reference means that the reward does not apply to the row (None). Asking about many rows at once is what lets
the judge's client run them side by side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from record.trajectory import Trajectory
from rewards.contract import RewardContext
from rewards.functions.answers import references
from rewards.judge.base import AnswerCheck, Question
from runtime.errors import UserError, nearest


def one_of(reward: str, option: str, value: Any, known: Sequence[str]) -> None:
    """Raises UserError for an option's value that the reward does not know."""
    if value not in known:
        raise UserError(f"{reward}: no {option} '{value}'; {nearest(str(value), known)}")


def column_or(
    trajectories: Sequence[Trajectory], column: str | None, value: str, reward: str, known: Sequence[str]
) -> list[str | None]:
    """What each record says in `column` (None where it lacks that), or `value` where no column is named.

    Raises:
        UserError: a record with something else than the known words in it.
    """
    if column is None:
        one_of(reward, "kind of data", value, known)
        return [value] * len(trajectories)
    for trajectory in trajectories:
        said = trajectory.record.get(column)
        if said is not None and said not in known:
            raise UserError(
                f"{reward}: the record of trajectory {trajectory.key} has {said!r} in column '{column}'; "
                f"{nearest(str(said), known)}"
            )
    return [trajectory.record.get(column) for trajectory in trajectories]


def question_of(trajectory: Trajectory) -> str:
    """The record's question, or the prompt."""
    said = trajectory.record.get("question")
    return str(said) if said is not None else trajectory.prompt


def gold_of(trajectory: Trajectory, gold: str) -> str | None:
    """The record's reference; several are put to a judge as alternatives."""
    return " or ".join(references(trajectory.record, gold)) or None


def check(trajectory: Trajectory, answer: str, gold: str) -> AnswerCheck:
    """Ask whether `answer` says what the record's reference says."""
    return AnswerCheck(question_of(trajectory), answer, gold_of(trajectory, gold) or "")


def verdicts(context: RewardContext, reward: str, checks: Sequence[AnswerCheck | None]) -> list[bool | None]:
    """The judge's verdict on each check in one batch; None where nothing was asked or nothing was judged."""
    asked = [c for c in checks if c is not None]
    if not asked:
        return [None] * len(checks)
    said = iter(context.judge_for(reward).agrees(asked))
    return [None if c is None else next(said) for c in checks]


def resolve_verdicts(
    context: RewardContext,
    reward: str,
    trajectories: Sequence[Trajectory],
    asked: Sequence[str | None],
    known: Sequence[bool | None],
    gold: str,
    unread: bool | None = None,
) -> list[bool | None]:
    """Whether each row's answer is right: what is `known` without asking, else the judge's word on `asked`.

    `unread` stands for a verdict that could not be had: None, or False in a release that pays it as wrong. A row that
    is neither known nor asked is None.
    """
    asking = [answer if right is None else None for answer, right in zip(asked, known, strict=True)]
    said = verdicts(
        context,
        reward,
        [None if answer is None else check(t, answer, gold) for t, answer in zip(trajectories, asking, strict=True)],
    )
    return [
        right if right is not None else None if answer is None else unread if verdict is None else verdict
        for right, answer, verdict in zip(known, asking, said, strict=True)
    ]


def log_parts(parts: Sequence[dict[str, float] | None], log_metric: Any, log_extra: Any) -> None:
    """Each part's mean over the judged rows as a metric, and each row's parts as a column."""
    judged = [row for row in parts if row is not None]
    if log_metric is not None and judged:
        for name in judged[0]:
            log_metric(name, sum(row[name] for row in judged) / len(judged))
    if log_extra is not None:
        log_extra("parts", list(parts))


def totals(parts: Sequence[dict[str, float] | None]) -> list[float | None]:
    return [None if row is None else row["total"] for row in parts]


def flags(context: RewardContext, reward: str, questions: Sequence[Question | None], key: str) -> list[bool | None]:
    """0 or 1 under `key` in the JSON object of each reply; None where nothing was asked or none can be read."""
    asked = [q for q in questions if q is not None]
    if not asked:
        return [None] * len(questions)
    replies = iter(context.judge_for(reward).ask(asked))
    return [None if q is None else flag_in(next(replies).text, key) for q in questions]


def flag_in(reply: str | None, key: str) -> bool | None:
    """The 0 or 1 under `key` in the first JSON object of a reply; None where there is none."""
    found = re.search(r"\{[^{}]*\}", reply or "")
    if found is None:
        return None
    try:
        value = json.loads(found.group())[key]
    except (ValueError, KeyError, TypeError):
        return None
    return bool(value) if value in (0, 1) else None
