"""OpenThinkIMG (V-ToolRL): turns of JSON with a thought and actions; the action Terminate gives the answer.

    accuracy in {0, 1}; format = share of turns with a JSON object that has a thought or actions

Only accuracy is switched on by default. Su et al., arXiv:2505.08617; OpenThinkIMG/OpenThinkIMG,
r1_v/open_r1/tool_grpo.py.

The release first gives the whole last turn to math-verify, so that a number in the thought can stand for the answer;
it reads the answer of the first action only, whatever that is; its format part finds no object nested deeper than four;
and it stops on a completion that is no list of turns. `repaired`, the default, takes the answer of the Terminate
action, wherever in the turn it is, or a bare last turn as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from record.trajectory import Trajectory
from rewards.functions.answers import best, math_agrees, parsed, references, verified
from rewards.functions.comparisons import exact
from rewards.functions.text import policy_turns, without_chat_marks
from rewards.published.judge_helpers import log_parts, one_of, totals
from runtime.errors import UserError

Variant = Literal["repaired", "release"]
DEPTH = 4  # of brackets that the release's search sees
_WORDED = ("thought", "thoughts", "actions")


# ---- the repaired reading -------------------------------------------------------------------------------------------


def object_in(turn: str) -> dict[str, Any] | None:
    """The first readable JSON object in a turn, words around it or not."""
    decoder = json.JSONDecoder()
    start = turn.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(turn, start)
            return found
        except (ValueError, RecursionError):
            start = turn.find("{", start + 1)
    return None


def well_formed(turn: str) -> bool:
    found = object_in(turn)
    return found is not None and any(key in found for key in _WORDED)


def answer_in(turn: str) -> str | None:
    """The answer of the turn's Terminate action; the turn itself where it holds no object; None without an answer."""
    found = object_in(turn)
    if found is None:
        return None if "{" in turn else turn.strip() or None
    actions = found.get("actions")
    for action in actions if isinstance(actions, list) else ():
        arguments = action.get("arguments") if isinstance(action, dict) else None
        if isinstance(arguments, dict) and action.get("name") == "Terminate" and arguments.get("ans") is not None:
            return str(arguments["ans"]).strip()
    return None


def same(answer: str, gold: str) -> bool | None:
    """The same words, or mathematically equal; None where that could not be told in time."""
    return True if exact(answer, gold) else math_agrees(answer, gold)


# ---- the release's ---------------------------------------------------------------------------------------------------


def _nested(opening: str, closing: str, depth: int = DEPTH) -> str:
    """Pattern of a balanced bracket of at most so many levels."""
    a, b = re.escape(opening), re.escape(closing)
    inside = rf"[^{a}{b}]"
    for _ in range(depth - 1):
        inside = rf"(?:{inside}|{a}{inside}*{b})"
    return rf"{a}{inside}*{b}"


_OBJECT = re.compile(_nested("{", "}"))
_ACTIONS = re.compile(rf'"actions"\s*:\s*({_nested("[", "]")})')


def format_release(turns: Sequence[str] | None, text: str = "") -> float:
    """The share of well-formed turns; without turns whether the word Terminate occurs in the text."""
    if not turns:
        return float("Terminate" in text)
    return sum(map(_well_formed_release, turns)) / len(turns)


def accuracy_release(turns: Sequence[str] | None, gold: str) -> float:
    """1 if the last turn, or the answer of its first action, is the reference.

    Raises:
        TypeError: no list of turns, on which the release stops.
    """
    if turns is None:
        raise TypeError("no list of turns")
    last = turns[-1]
    if _verified_release(last, gold):
        return 1.0
    inside = re.search(r"<answer>(.*?)</answer>", gold)
    wanted = inside.group(1).strip() if inside else gold.strip()
    try:
        answer = _first_answer_release(last)
        return float(answer == wanted or _verified_release(answer, wanted))
    except Exception:  # the release's own: whatever goes wrong is a wrong answer
        return 0.0


def _well_formed_release(turn: str) -> bool:
    found = _OBJECT.search(turn)
    try:
        return found is not None and any(key in json.loads(found.group()) for key in _WORDED)
    except ValueError:
        return False


def _first_answer_release(turn: str) -> Any:
    """The argument `ans` of the first action of a list that stands under "actions", object or not; the turn where there
    is no such list, or an action in it has no name or no arguments, or the first one's have no `ans`."""
    found = _ACTIONS.search(turn)
    try:
        actions = [(action["name"], action["arguments"]) for action in json.loads(found.group(1))] if found else []
    except Exception:  # as there: a list that cannot be read is none
        actions = []
    return actions[0][1].get("ans", turn) if actions else turn


def _verified_release(answer: Any, gold: str) -> bool:
    mine, theirs = parsed(answer), parsed(gold)
    return bool(mine is not None and theirs is not None and verified(mine, theirs))  # in its order: answer as gold


# ---- the reward ------------------------------------------------------------------------------------------------------


def openthinkimg(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    log_metric: Any = None,
    log_extra: Any = None,
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    accuracy: float = 1.0,
    format: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """Accuracy in {0, 1} plus, if switched on, the share of well-formed turns; None without a reference.

    A turn is what the policy wrote between two answers of the environment.

    Args:
        variant: repaired or release (at the top of this file).
        gold: the record's column with the reference, or a list of them; answer tags around it are taken off.
        accuracy, format: weights; format is 0 in the release's default.
    """
    one_of("openthinkimg", "variant", variant, get_args(Variant))
    if min(accuracy, format) < 0:
        raise UserError(f"openthinkimg: the weights are {accuracy} and {format}; none may be negative")
    rows: list[dict[str, float] | None] = []
    for t in trajectories:
        golds = references(t.record, gold)
        turns = [without_chat_marks(turn) for turn in policy_turns(t)] or [""]
        right = _right(turns, golds, variant) if golds else None
        if right is None:
            rows.append(None)
            continue
        formed = format_release(turns) if variant == "release" else sum(map(well_formed, turns)) / len(turns)
        rows.append({"total": accuracy * right + format * formed, "accuracy": right, "format": formed})
    log_parts(rows, log_metric, log_extra)
    return totals(rows)


def _right(turns: Sequence[str], golds: Sequence[str], variant: Variant) -> float | None:
    if variant == "release":
        return max(accuracy_release(turns, gold) for gold in golds)
    answer = answer_in(turns[-1])
    compare: Callable[[str, str], bool | None] = same
    return 0.0 if answer is None else best(compare, answer, [_untagged(gold) for gold in golds])


def _untagged(gold: str) -> str:
    inside = re.search(r"<answer>(.*?)</answer>", gold, re.DOTALL)
    return (inside.group(1) if inside else gold).strip()
