r"""Pixel Reasoner: a bonus for looking closer while few of a prompt's thoughts do, a price for looking too often.

    paper:             r' = r + alpha max(H - rate, 0) [n > 0] + beta min(N - n, 0)     alpha 0.5, H 0.3, beta 0.05, N 1
    release_verl_tool  the same
    release_official   r' = r + [n > 0] (0.25 max(0.3 - rate, 0) / (c rate) - 0.05 (n - 1))     c 1.5 video, 2 images

with r the rule's verdict on the boxed answer, n the visual operations of a thought, and rate the share of the thoughts
on its prompt that have any. Su et al., arXiv:2505.15966; TIGER-AI-Lab/Pixel-Reasoner,
curiosity_driven_rl/openrlhf/trainer/ppo_utils/experience_maker.py; TIGER-AI-Lab/verl-tool,
verl_tool/workers/reward_manager/pixel_reasoner.py.

In the official release a right answer whose last call failed counts 0, but the flag is looked up by the place inside
the group, so every group is read by the first group's flags; an answer that cannot be read pays -1; one without a box
stops the batch; and a list is matched by substrings ("1, 2" in "1782"). In verl-tool words are products of letters, so
that anagrams are equal. `paper`, the default: operations that worked are counted, an unread or missing answer is wrong
(0), lists are compared part by part, words as words, and unjudged members stay out of the rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from record.trajectory import Modality, Trajectory
from rewards.contract import RewardError, groups_of, policy_text
from rewards.functions.answers import COMPARISONS, best, math_agrees, parsed, references, verified
from rewards.functions.text import boxed, plain, transcript, unwrapped
from rewards.functions.tool_use import ToolCall, tool_calls
from rewards.published.judge_helpers import log_parts, one_of, totals
from runtime.errors import UserError

Variant = Literal["paper", "release_official", "release_verl_tool"]
RateOver = Literal["group", "batch"]

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Shares of right answers below which a prompt is called impossible (0), hard (1), medium (2), easy (3); else solved (4)
DIFFICULTIES = (1 / 8, 3 / 8, 6 / 8, 1.0)


# ---- shaping ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shaping:
    """The paper's constants."""

    rate: float = 0.3  # H: below this share of thoughts with an operation, an operation is paid
    free: int = 1  # N: operations that cost nothing
    alpha: float = 0.5
    beta: float = 0.05


def rate_of(operations: Sequence[int | None]) -> float:
    """The share with any operation, among those that are counted (not None); 0 over none."""
    counted = [n for n in operations if n is not None]
    return sum(n > 0 for n in counted) / len(counted) if counted else 0.0


def shaped(correct: float, operations: int, rate: float, shaping: Shaping = Shaping()) -> dict[str, float]:
    """The paper's formula for one thought: total, accuracy, curiosity, penalty."""
    curiosity = shaping.alpha * max(shaping.rate - rate, 0.0) if operations else 0.0
    penalty = shaping.beta * min(shaping.free - operations, 0)
    return {"total": correct + curiosity + penalty, "accuracy": correct, "curiosity": curiosity, "penalty": penalty}


@dataclass(frozen=True)
class Sample:
    """One thought as the official release's shaping sees it."""

    correct: float  # 1 right, 0 wrong, -1 not to be read
    calls: int
    is_video: bool = False
    last_call_failed: bool = False


def shaped_official(
    sample: Sample,
    rate: float,
    failed: bool,
    target: float = 0.3,
    scale: float = 0.25,
    video: float = 1.5,
    images: float = 2.0,
    step: float = 0.05,
) -> dict[str, float]:
    """The official release's formula for one thought. `failed`: the flag it goes by, which need not be its own."""
    correct = 0.0 if failed and sample.correct > 0.5 else sample.correct
    curiosity = penalty = 0.0
    if sample.calls > 0:
        curiosity = scale * max(target - rate, 0.0) / ((video if sample.is_video else images) * rate)
        penalty = -step * (sample.calls - 1)
    return {"total": correct + curiosity + penalty, "accuracy": correct, "curiosity": curiosity, "penalty": penalty}


@dataclass(frozen=True)
class Group:
    """One prompt's thoughts, shaped, and what the official release logs about the prompt."""

    samples: list[dict[str, float]]
    difficulty_label: int  # 0 impossible ... 4 solved
    solved_without_tool: bool
    uniform: bool  # the totals hardly differ: such a group teaches nothing and is filtered out


def shape_official(groups: Sequence[Sequence[Sample]]) -> list[Group]:
    """The official release over a rollout batch; every group is read by the first group's failure flags, as there."""
    shaped_groups: list[Group] = []
    flags = [sample.last_call_failed for group in groups for sample in group]
    for group in groups:
        rate = rate_of([sample.calls for sample in group])
        rows = [shaped_official(sample, rate, flags[place]) for place, sample in enumerate(group)]
        mean = math.fsum(row["total"] for row in rows) / len(rows)
        deviation = math.fsum(abs(row["total"] - mean) for row in rows) / len(rows)
        right = math.fsum(sample.correct for sample in group) / len(group)
        shaped_groups.append(
            Group(
                rows,
                sum(right >= bound for bound in DIFFICULTIES),
                any(s.correct > 0.5 and s.calls == 0 for s in group),
                deviation < 0.01,
            )
        )
    return shaped_groups


# ---- accuracy ---------------------------------------------------------------------------------------------------


def accuracy(text: str, golds: Sequence[str]) -> float | None:
    r"""1 if the last \boxed{} of the policy's words agrees with any reference, else 0, also without a box; None where
    math-verify ran out of time. Where a reference is a list the answer must have the same parts, in any order."""
    found = boxed(text)
    return best(_agrees, found[-1], golds) if found else 0.0


def _agrees(answer: str, gold: str) -> float | None:
    gold = boxed(gold)[-1] if boxed(gold) else gold
    if re.fullmatch(r"[(\[]?[A-H][)\].]*", plain(unwrapped(gold))):
        return COMPARISONS["choice"](answer, gold)
    theirs = _parts(gold)
    mine = _parts(answer)
    if len(theirs) == 1:
        return best(math_agrees, answer, theirs)
    if len(mine) != len(theirs):
        return 0.0
    left = list(mine)
    for part in theirs:  # equality is transitive here, so the first match is as good as any
        match = next((other for other in left if math_agrees(other, part)), None)
        if match is None:
            return 0.0
        left.remove(match)
    return 1.0


def _parts(text: str) -> list[str]:
    bare = unwrapped(text)
    parts = [part.strip() for part in re.split(r",(?!\d{3}(?:\D|$))\s*|\s+and\s+", bare) if part.strip()]
    # A tuple, an interval or a formula is one answer; one part stays as it is, where \text may hold a unit.
    return [text.strip()] if len(parts) == 1 or re.search(r"[()\[\]{}\\]", bare) else parts


def tidied(answer: str) -> str:
    r"""LaTeX that both releases take out before they parse: \dfrac, \text, \varnothing, minutes, cm."""
    for old, new in (("dfrac", "frac"), ("\\text", ""), ("\\varnothing", "\\emptyset"), ("minutes", ""), ("cm", "")):
        answer = answer.replace(old, new)
    return answer


def accuracy_verl_tool(text: str, gold: str | Sequence[str]) -> float:
    """verl-tool's: math-verify over the whole text, letter case ignored at a second try; the best of several golds."""
    if not isinstance(gold, str):
        return max(accuracy_verl_tool(text, one) for one in gold)
    mine = tidied(text)
    theirs = tidied(gold) if "\\boxed" in gold else f"\\boxed{{{gold}}}"
    return float(_same(mine, theirs) or _same(mine.lower(), theirs.lower()))


def _same(answer: str, gold: str) -> bool:
    mine, theirs = parsed(answer), parsed(gold)
    return mine is not None and theirs is not None and bool(verified(theirs, mine))


def ended(text: str) -> bool:
    """Whether the official release takes the thought for finished."""
    return any(token in text for token in END_TOKENS)


def accuracy_official(text: str, gold: str | Sequence[str]) -> float:
    """The official release's: 1 right, 0 wrong, -1 where the answer (or the reference) cannot be read. Letter case does
    not count. From the last "boxed" on; a reference with commas is right if each of its parts occurs there.

    Raises:
        ValueError: the text has no box, which stops the release's whole batch.
    """
    golds = [g.lower() for g in ([gold] if isinstance(gold, str) else gold)]
    percent = next((g.replace("%", "") for g in golds if "%" in g), None)
    if not isinstance(gold, str) and percent is not None and percent not in golds:
        golds.insert(0, percent)
    text, result = text.lower(), 0.0
    for one in golds:
        tail = "\\" + text[text.rindex("boxed") :]
        result = _official(tail, one)
        if result > 0.5:
            break
        if "," in one and all(part.strip() in tail for part in one[len("\\boxed{") : -1].split(",")):
            return 1.0
    return result


def _official(tail: str, gold: str) -> float:
    gold = tidied(gold)
    theirs = parsed(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")
    mine = parsed(tidied(tail))
    if not theirs or not mine:
        return -1.0
    return float(bool(verified(mine, theirs)))


# ---- the reward -------------------------------------------------------------------------------------------------


def pixel_reasoner(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    log_metric: Any = None,
    log_extra: Any = None,
    variant: Variant = "paper",
    gold: str = "ground_truth",
    video: str = "is_video",
    rate: float = 0.3,
    free: int = 1,
    alpha: float = 0.5,
    beta: float = 0.05,
    rate_over: RateOver = "group",
    failed_call_voids: bool = False,
    **columns: Any,
) -> list[float | None]:
    """The shaped reward at the top of this file; None without a reference or where the rule ran out of time.

    Logs rate, accuracy, curiosity and penalty; the rate is over the same operations and thoughts as the formula's.

    Args:
        variant: paper, release_official or release_verl_tool.
        gold: the record's column with the reference, or a list of references of which any will do.
        video: the record's column that says whether it is about a video (release_official; else the trajectory's own
            images say it).
        rate, free, alpha, beta: H, N and the weights of the paper's formula.
        rate_over: whose share of thoughts with operations counts: those on the same prompt, or the whole batch's.
        failed_call_voids: a right answer whose last operation failed counts 0, as the official release means it.
    """
    one_of("pixel_reasoner", "variant", variant, get_args(Variant))
    one_of("pixel_reasoner", "rate_over", rate_over, get_args(RateOver))
    if not 0 <= rate <= 1 or free < 0:
        raise UserError(f"pixel_reasoner: rate is {rate} and free {free}; rate is a share, 0 to 1, free at least 0")
    calls = [tool_calls(t) for t in trajectories]
    # The official release counts every call, the paper's form those that worked.
    operations = [len(mine) if variant == "release_official" else sum(call.ok for call in mine) for mine in calls]
    correct = [_correct(t, references(t.record, gold), variant) for t in trajectories]
    groups = [[i for i in rows if correct[i] is not None] for rows in groups_of(trajectories)]
    groups = [rows for rows in groups if rows]
    parts: list[dict[str, float] | None] = [None] * len(trajectories)
    if variant == "release_official":
        samples = [
            [
                Sample(correct[i] or 0.0, operations[i], _is_video(trajectories[i], video), _last_failed(calls[i]))
                for i in rows
            ]
            for rows in groups
        ]
        for rows, group in zip(groups, shape_official(samples), strict=True):
            for i, shaped_sample in zip(rows, group.samples, strict=True):
                parts[i] = shaped_sample
    else:
        shaping = Shaping(rate, free, alpha, beta)
        for rows in groups if rate_over == "group" else [sorted(i for group in groups for i in group)]:
            share = rate_of([operations[i] for i in rows])
            for i in rows:
                void = failed_call_voids and variant == "paper" and _last_failed(calls[i])
                parts[i] = shaped(0.0 if void else correct[i] or 0.0, operations[i], share, shaping)
    if log_metric is not None and groups:
        log_metric("rate", rate_of([operations[i] for rows in groups for i in rows]))
    log_parts(parts, log_metric, log_extra)
    return totals(parts)


def _correct(trajectory: Trajectory, golds: list[str], variant: Variant) -> float | None:
    if not golds:
        return None
    if variant == "paper":
        return accuracy(policy_text(trajectory), golds)
    if variant == "release_verl_tool":
        return accuracy_verl_tool(transcript(trajectory), golds)
    gold = golds[0] if len(golds) == 1 else golds
    try:
        return accuracy_official(transcript(trajectory), gold)
    except ValueError:
        raise RewardError(
            f"pixel_reasoner: trajectory {trajectory.key} has no boxed answer, at which release_official "
            f"stops; variant: paper takes it for wrong"
        ) from None


def _last_failed(calls: Sequence[ToolCall]) -> bool:
    return bool(calls) and not calls[-1].ok


def _is_video(trajectory: Trajectory, column: str) -> bool:
    said = trajectory.record.get(column)
    if said is not None:
        return bool(said)
    return any(segment.modality is Modality.VIDEO_FRAMES for segment in trajectory.segments)
