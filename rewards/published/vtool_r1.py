"""VTool-R1: the outcome alone, 1 for a right final answer and 0 for any other; tool use is neither paid nor priced.

    llm_judge        1 if a judge finds the answer right
    rule_similarity  the alternative without a judge: how near each part of the answer is to a part of the reference

Wu et al., arXiv:2505.19255; VTool-R1/VTool-R1 (release_v1), examples/reward_function/refocus_llm.py and
refocus.py; VTool-R1/training-v2 (release_v2), recipe/vtool/reward_utils.py.

The first release finds no answer where other lines follow without a full stop; the second takes the first answer of the
whole conversation, so that a later turn cannot change it and an observation can give it, judges the whole text where
there is no answer, and pays a failed judge as wrong; the similarity adds up over the parts of the answer, so that
"5||5||5" earns 3 for "5". `repaired`, the default, takes the last answer of the policy's own words to the end of its
line, pays nothing where there is none, leaves the unjudged unjudged, and matches parts one to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from record.trajectory import Trajectory
from rewards.contract import RewardContext
from rewards.functions.answers import references
from rewards.functions.text import policy_turns, transcript, without_chat_marks
from rewards.published.judge_helpers import gold_of, log_parts, one_of, resolve_verdicts, totals

Variant = Literal["repaired", "release_v1", "release_v2"]

GOLD_BREAK, ANSWER_BREAK = "|||", "||"
_V1 = re.compile(r"FINAL ANSWER:\s*(.*?)(?=\.\s|\.?$)")
_V2 = (
    re.compile(r"FINAL ANSWER:\s*(.*?)\s*TERMINATE", re.DOTALL),
    re.compile(r"FINAL ANSWER:\s*(.*?)(?=\s*(?:\||$))", re.DOTALL),
    re.compile(r"ANSWER:\s*(.*?)(?=\s*(?:\||$))", re.DOTALL),
)
_LABEL = re.compile(r"(?:FINAL )?ANSWER:[ \t]*\n?")


def answer_v1(text: str) -> str | None:
    """The first release's: behind the first final-answer label, on one line, up to a full stop that a blank follows."""
    found = _V1.search(text)
    return found.group(1) if found else None


def answer_v2(text: str) -> str:
    """The second release's: behind the first label up to TERMINATE, or else up to a bar; the whole text without one."""
    text = text.replace("||", "|")
    found = next((match for pattern in _V2 if (match := pattern.search(text))), None)
    return (found.group(1) if found else text).strip()


def answer_repaired(turns: Sequence[str]) -> str | None:
    """Behind the last label of the policy's last turn that has one, to the end of its line; None without one."""
    for turn in reversed(turns):
        if found := list(_LABEL.finditer(turn)):
            line = without_chat_marks(turn[found[-1].end() :]).partition("\n")[0]
            return line.partition("TERMINATE")[0].strip().removesuffix(".").strip() or None
    return None


def nearness(answer: str, gold: str) -> float:
    """1 - |a - b| / max(|a|, |b|) for two numbers, 0 where exactly one of them is 0; else 1 for the same text."""
    a, b = _number(answer), _number(gold)
    if a is None or b is None:
        return float(answer == gold)
    if a == b:
        return 1.0
    return 0.0 if a == 0 or b == 0 else 1 - abs(a - b) / max(abs(a), abs(b))


def similarity_release(answer: str | None, gold: str) -> float:
    """The sum over the answer's parts of the nearness to the best part of the reference, over the reference's parts."""
    if answer is None:
        return 0.0
    golds = [part.strip() for part in gold.split(GOLD_BREAK)]
    return sum(max(nearness(part.strip(), one) for one in golds) for part in answer.split(ANSWER_BREAK)) / len(golds)


def similarity(answer: str | None, gold: str) -> float:
    """The same with parts matched one to one and divided by the larger number of parts, so that it stays in [0, 1]."""
    if answer is None:
        return 0.0
    from scipy.optimize import linear_sum_assignment

    golds = [part.strip() for part in gold.split(GOLD_BREAK)]
    parts = [part.strip() for part in re.split(r"\|{2,3}", answer)]
    table = np.array([[max(nearness(part, one), 0.0) for one in golds] for part in parts])
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum()) / max(len(golds), len(parts))


def vtool_r1(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    **columns: Any,
) -> list[float | None]:
    """1 if a judge finds the final answer right, else 0; None without a reference or a verdict.

    Args:
        variant: repaired, release_v1 or release_v2 (at the top of this file).
    """
    one_of("vtool_r1", "variant", variant, get_args(Variant))
    golds = [gold_of(t, gold) for t in trajectories]
    answers = [
        None if reference is None else _answer(t, variant) for t, reference in zip(trajectories, golds, strict=True)
    ]
    known = [
        False if reference is not None and given is None else None
        for reference, given in zip(golds, answers, strict=True)
    ]
    right = resolve_verdicts(
        context, "vtool_r1", trajectories, answers, known, gold, unread=None if variant == "repaired" else False
    )
    parts: list[dict[str, float] | None] = [
        None if correct is None else {"total": float(correct), "accuracy": float(correct)} for correct in right
    ]
    log_parts(parts, log_metric, log_extra)
    return totals(parts)


def vtool_r1_similarity(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    log_metric: Any = None,
    log_extra: Any = None,
    variant: Literal["repaired", "release_v1"] = "repaired",
    gold: str = "ground_truth",
    **columns: Any,
) -> list[float | None]:
    """How near the parts of the answer are to those of the reference, in [0, 1]; None without a reference.

    Args:
        variant: repaired or release_v1 (at the top of this file; the release's may pass 1).
        gold: the record's column; its parts are parted by three bars, or it is a list of them.
    """
    one_of("vtool_r1_similarity", "variant", variant, ("repaired", "release_v1"))
    rule = similarity if variant == "repaired" else similarity_release
    values: list[float | None] = []
    for trajectory in trajectories:
        golds = references(trajectory.record, gold)
        values.append(rule(_answer(trajectory, variant), GOLD_BREAK.join(golds)) if golds else None)
    if log_extra is not None:
        log_extra("answer", [_answer(t, variant) for t in trajectories])
    return values


def _answer(trajectory: Trajectory, variant: Variant) -> str | None:
    if variant == "repaired":
        return answer_repaired(policy_turns(trajectory))
    return (answer_v1 if variant == "release_v1" else answer_v2)(transcript(trajectory))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
