"""VisTA: the policy picks tools for a chart question, and a frozen model answers it with and without their outputs.

    1 if it is right with the tools;  -0.5 if it is right only without them;  0 if it is right with neither

Huang et al., arXiv:2505.20289; OoDBag/VisTA, vista/src/r1-v/src/open_r1/grpo.py.

In the release a frozen model that failed to answer pays 0, a question that its table of data does not hold exactly once
stops the run with a KeyError, the format part is 0 for everything, and the comparison drops the sign of a number,
takes "0.0" for another number than "0", and reads "3 4" as 34. `repaired`, the default, leaves what could not be
answered or found unjudged, compares numbers as numbers (ChartQA's relaxed accuracy), and can pay the format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from record.trajectory import Author, Trajectory
from rewards.contract import RewardContext, RewardError, policy_text
from rewards.functions.answers import best, references
from rewards.functions.comparisons import normalised, relaxed
from rewards.functions.text import blocks
from rewards.judge.base import Question
from rewards.published.judge_helpers import log_parts, one_of, question_of

Variant = Literal["repaired", "release"]
TOOLS = 9  # numbered from 0
TOLERANCE = 0.05

_ANSWER = re.compile(r"<answer>(.*?)</answer>")  # on one line
_LISTED = re.compile(r"\[(.*?)\]")


def tool_gain(right_without: bool, right_with: bool, gain: float = 1.0, loss: float = -0.5) -> float:
    """The formula at the top of this file."""
    return gain if right_with else loss if right_without else 0.0


# ---- the repaired reading -------------------------------------------------------------------------------------------


def read_tools(text: str, number: int = TOOLS) -> tuple[list[int], bool]:
    """The tools that the last answer block names, each once, in order, and whether it is a well-formed selection.

    An empty block is one: no tool. Anything that is no list of known tools is not, and selects none.
    """
    found = blocks(text, "answer")
    if not found:
        return [], False
    items = [item.strip() for item in found[-1].strip("[] \n").split(",")] if found[-1].strip("[] \n") else []
    if not all(re.fullmatch(r"\d+", item) and int(item) < number for item in items):
        return [], False
    return list(dict.fromkeys(int(item) for item in items)), True


def final_answer(reply: str) -> str:
    """The last answer block of the frozen model's reply, or the whole of it."""
    found = blocks(reply, "answer")
    return found[-1] if found else reply.strip()


# ---- the release's ---------------------------------------------------------------------------------------------------


def read_tools_release(text: str, number: int = TOOLS) -> list[int] | None:
    """What follows the first "assistant" up to a blank line, or all; therein the first answer block, else the first
    square brackets, else all; its numbers from 0 to 8, each once. None where it is no list or none is left."""
    _, chat, rest = text.partition("assistant")
    said = rest.lstrip().split("\n\n", 1)[0] if chat else text
    inside = _ANSWER.search(said) or _LISTED.search(said)
    try:
        numbers = [int(item) for item in (inside.group(1) if inside else said).split(",") if item.strip()]
    except ValueError:
        return None
    return list(dict.fromkeys(n for n in numbers if 0 <= n < number)) or None


def final_answer_release(reply: str) -> str:
    """The first answer block after the first "assistant" (if it occurs), or the whole reply."""
    _, chat, rest = reply.partition("assistant")
    found = _ANSWER.search(rest if chat else reply)
    return (found.group(1) if found else reply).strip()


def relaxed_match_release(prediction: str, gold: str) -> bool:
    """Within 5 % of a number, by whichever reading of the prediction works first: a number, a ratio a:b, or all its
    digits and points run together. Lists are compared item by item in any order, other text in lower case."""
    said, wanted = str(prediction).strip().lower(), str(gold).strip().lower()
    if wanted.replace(".", "").isdigit():  # everything but digits and points inside a number goes, the sign too
        said = re.sub(r"\.(?!\d)", "", "".join(c for c in said if c.isdigit() or c == "."))
    if wanted.endswith("]"):
        return sorted(re.sub(r"[\[\]]", "", wanted).split(", ")) == sorted(
            item.strip() for item in re.split(" and |, ", said)
        )
    try:
        target = _number(wanted)
    except ValueError:
        return said == wanted
    for read in (_number, _ratio):
        try:
            return abs(read(said) - target) / abs(target) <= TOLERANCE
        except (ValueError, ZeroDivisionError):  # also for a target of 0: then only equal strings are left
            continue
    digits = "".join(re.findall(r"[\d.]+", said))
    try:
        return bool(digits) and abs(_number(digits) - target) / abs(target) <= TOLERANCE
    except (ValueError, ZeroDivisionError):
        return said == wanted


def score_release(without: str | None, with_tools: str | None, gold: str, matches: int = 1) -> dict[str, Any]:
    """total, right_without and right_with as the release gives them.

    Args:
        without, with_tools: the frozen model's replies; None where it failed, which pays 0.
        matches: how many rows of the release's table of data have this question and answer.

    Raises:
        KeyError: not exactly one; the release meant to pay 0 and stops on a counter that is not there.
    """
    if matches != 1:
        raise KeyError("reward_0")
    if without is None or with_tools is None:
        return {"total": 0.0}
    right = [relaxed_match_release(final_answer_release(reply), gold) for reply in (without, with_tools)]
    return {"total": tool_gain(*right), "right_without": right[0], "right_with": right[1]}


def _number(text: str) -> float:
    return float(text.rstrip("%"))


def _ratio(text: str) -> float:
    above, below = text.split(":")
    return float(above) / float(below)


# ---- the reward ------------------------------------------------------------------------------------------------------


def vista(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    without: str = "answer_without_tools",
    with_tools: str = "answers_with_tools",
    outputs: str = "tool_outputs",
    gain: float = 1.0,
    loss: float = -0.5,
    format: float = 0.0,
    tools: int = TOOLS,
    **columns: Any,
) -> list[float | None]:
    """1, -0.5 or 0 by whether the tools that the policy picked help a frozen model; None without a reference or where
    it did not answer.

    The frozen model's replies are taken from the record where it has them (they can be computed before training), and
    asked of the judge's endpoint otherwise, all at once: the question and the prompt's image, with and without the
    tools' outputs. Logs the shares right without and with, of well-formed picks, and the tools picked.

    Args:
        variant: repaired or release (at the top of this file).
        without: column with the frozen model's reply without tools.
        with_tools: column {"0,3": its reply with tools 0 and 3}; keys are ascending.
        outputs: column {"0": what tool 0 says of this image}, for asking.
        gain, loss, format: pay for being right with the tools, for being right only without, for a well-formed pick.
        tools: how many there are, numbered from 0.
    """
    one_of("vista", "variant", variant, get_args(Variant))
    picks = [_picked(t, variant, tools) for t in trajectories]
    replies = _replies(trajectories, [pick for pick, _ in picks], context, gold, without, with_tools, outputs, variant)
    rows: list[dict[str, float] | None] = []
    for t, (pick, formed), (plain, helped) in zip(trajectories, picks, replies, strict=True):
        golds = references(t.record, gold)
        if not golds:
            rows.append(None)
            continue
        right: list[bool] | None = None
        if plain is not None and helped is not None:
            right = [bool(_right(reply, golds, variant)) for reply in (plain, helped)]
        elif variant == "repaired":
            rows.append(None)
            continue
        pay = tool_gain(right[0], right[1], gain, loss) if right is not None else 0.0
        rows.append(
            {
                "total": pay + format * formed,
                "right_without": float(right is not None and right[0]),
                "right_with": float(right is not None and right[1]),
                "format": float(formed),
                "tools": float(len(pick)),
            }
        )
    log_parts(rows, log_metric, log_extra)
    return [None if row is None else row["total"] for row in rows]


def _picked(t: Trajectory, variant: Variant, tools: int) -> tuple[list[int], bool]:
    if variant == "release":
        return read_tools_release(policy_text(t), tools) or [], False  # its format part pays nobody
    return read_tools(policy_text(t), tools)


def _right(reply: str, golds: Sequence[str], variant: Variant) -> float | None:
    if variant == "release":
        return best(relaxed_match_release, final_answer_release(reply), golds)
    return best(relaxed_or_listed, final_answer(reply), golds)


def relaxed_or_listed(answer: str, gold: str) -> float:
    """ChartQA's relaxed accuracy; a reference "[red, green]" is met by the same items in any order."""
    if not (gold.strip().startswith("[") and gold.strip().endswith("]")):
        return relaxed(answer, gold)
    wanted, said = (
        sorted(normalised(item) or item.strip() for item in re.split(r"\s+and\s+|,", text.strip().strip("[]")) if item)
        for text in (gold, answer)
    )
    return float(wanted == said)


def _replies(
    trajectories: Sequence[Trajectory],
    picks: Sequence[list[int]],
    context: RewardContext,
    gold: str,
    without: str,
    with_tools: str,
    outputs: str,
    variant: Variant,
) -> list[tuple[str | None, str | None]]:
    """The frozen model's replies without and with the picked tools."""
    places: list[tuple[int, int]] = []
    questions: list[Question] = []
    found: list[list[str | None]] = [[None, None] for _ in trajectories]
    for row, (t, pick) in enumerate(zip(trajectories, picks, strict=True)):
        if not references(t.record, gold):
            continue
        known = t.record.get(with_tools) or {}
        found[row] = [t.record.get(without), known.get(",".join(map(str, sorted(pick))))]
        if found[row][0] is None:
            places.append((row, 0))
            questions.append(_question(t, []))
        if found[row][1] is None and (pick or variant == "release"):
            places.append((row, 1))
            questions.append(_question(t, _outputs(t, pick, outputs)))
    if questions:
        for (row, which), reply in zip(places, context.judge_for("vista").ask(questions), strict=True):
            found[row][which] = reply.text
    for row, pick in enumerate(picks):
        if not pick and variant == "repaired":  # without a tool it is one and the same question
            found[row][1] = found[row][0]
    return [(plain, helped) for plain, helped in found]


def _outputs(t: Trajectory, pick: Sequence[int], column: str) -> list[str]:
    if not pick:
        return []
    known = t.record.get(column)
    if not isinstance(known, dict):
        raise RewardError(
            f"vista: the record of '{t.prompt}' has no '{column}' {{tool: its output}} and no reply of "
            f"the frozen model with the tools {pick}"
        )
    return [str(known[str(tool)]) for tool in sorted(pick) if str(tool) in known]


def _question(t: Trajectory, told: Sequence[str]) -> Question:
    shown = [s.image for s in t.segments if s.author is Author.USER and s.image is not None]
    hints = "\n\nWhat other programs read in the chart:\n" + "\n\n".join(told) if told else ""
    return Question.of(
        f"{question_of(t)}{hints}\n\nGive your final answer inside <answer></answer>, as briefly as possible.", shown
    )
