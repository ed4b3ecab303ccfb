"""Visual-ARFT: one step of an agent a sample: name what is wrong with an image, write code, search, or answer.

    total = accuracy + format, format in {0, 1}, accuracy by the kind of step that the reference's tag asks for:

    answer    F1 over words                              search   cosine of sentence embeddings, 0 below 0.5
    problem   1 for the set of faults, 0.5 for one of a  code     0.9
              pair in which a rotation stands

and 0 for a step of another kind. Liu et al., arXiv:2505.14246; Liuziyu77/Visual-RFT,
Visual-ARFT/src/visual_arft/src/open_r1/grpo_agent_code.py and grpo_agent_search.py.

The release pays 0.9 for any text that is meant as code and never runs it; its F1 counts a shared word once but lengths
with repeats, so that equal texts can score below 1; without tags it compares the whole completion, the thinking too;
and of two rotations only the first can be named for half. `repaired`, the default, pays code that the environment ran
without an error (and leaves unjudged what was not run), takes F1 over words as often as they stand, and needs the tags.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from record.trajectory import Author, Trajectory
from rewards.contract import RewardError
from rewards.functions.answers import parsed, verified
from rewards.functions.comparisons import squad_normalised, token_f1
from rewards.functions.sentences import MINILM, sentence_encoder
from rewards.functions.text import CHAT_MARKS, blocks, policy_turns, without_chat_marks
from rewards.functions.tool_use import tool_calls
from rewards.published.judge_helpers import log_parts, one_of, totals
from runtime.errors import UserError

Variant = Literal["repaired", "release"]
Task = Literal["code", "search"]
Similarity = Callable[[str, str], float]
KINDS: dict[str, tuple[str, ...]] = {"code": ("answer", "code", "problem"), "search": ("answer", "search")}
CODE_PAY = 0.9
LEAST_SIMILARITY = 0.5
ROTATIONS = ("rotation90", "rotation180")

_BODY = {"code": r"\s*```python(.*?)```.*?", "problem": r"\s*\{\s*'[^']+'\s*(?:,\s*'[^']+'\s*)*\}\s*"}


def kind_of(gold: str, task: Task) -> str | None:
    """The kind of step that the reference's tag asks for."""
    return next((kind for kind in KINDS[task] if f"<{kind}>" in gold), None)


def well_formed(text: str, kind: str, task: Task) -> bool:
    """One think block, then one block of the kind, and nothing else; code in a python fence, faults as {'a', 'b'}."""
    if any(text.count(f"<{tag}>") > 1 for tag in ("think", *KINDS[task])):
        return False
    return re.fullmatch(rf"<think>.*?</think>\s*<{kind}>{_BODY.get(kind, '.*?')}</{kind}>", text, re.DOTALL) is not None


def other_kind(text: str, kind: str, task: Task) -> bool:
    """Whether the step opens a block of another kind."""
    return any(f"<{other}>" in text for other in KINDS[task] if other != kind)


# ---- the repaired rule ----------------------------------------------------------------------------------------------


def faults_in(text: str) -> set[str] | None:
    """The faults in quotes inside the problem block; None without one."""
    found = blocks(text, "problem")
    return {double or single for double, single in re.findall(r"\"([^\"]+)\"|'([^']+)'", found[0])} if found else None


def fault_score(said: set[str] | None, gold: set[str]) -> float:
    """1 for all and only the faults; 0.5 for one rotation of a pair; else 0."""
    if not said:
        return 0.0
    half = len(gold) == 2 and len(said) == 1 and said <= gold & set(ROTATIONS)
    return 1.0 if said == gold else 0.5 if half else 0.0


def accuracy(
    text: str,
    gold: str,
    task: Task,
    ran: bool | None = None,
    similarity: Similarity | None = None,
    code_pay: float = CODE_PAY,
    least: float = LEAST_SIMILARITY,
) -> float | None:
    """The repaired accuracy of one step.

    Args:
        text: what the policy wrote in it.
        gold: the reference with its tag.
        ran: whether the step's code ran without an error; None: it was not run.
        similarity: of two sentences, for a search.

    Returns:
        None for code that nobody ran.
    """
    kind = kind_of(gold, task)
    said = blocks(text, kind) if kind is not None else []
    if kind is None or not said or other_kind(text, kind, task):
        return 0.0
    wanted = (blocks(gold, kind) or [gold.strip()])[0]
    if kind == "answer":
        return token_f1(said[0], wanted)
    if kind == "problem":
        return fault_score(faults_in(text), faults_in(gold) or set())
    if kind == "code":
        return None if ran is None else code_pay * ran
    if similarity is None:
        raise RewardError("visual_arft: a search is compared by a sentence model; give the option encoder")
    cosine = similarity(said[0], wanted) if said[0] else 0.0
    return cosine if cosine >= least else 0.0


# ---- the release's ---------------------------------------------------------------------------------------------------


def f1_release(prediction: str, gold: str) -> float:
    """F1 in which shared words count once and lengths with repeats."""
    said, wanted = squad_normalised(prediction).split(), squad_normalised(gold).split()
    shared = len(set(said) & set(wanted))
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def score_release(
    text: str,
    gold: str,
    task: Task,
    similarity: Similarity | None = None,
    code_pay: float = CODE_PAY,
    least: float = LEAST_SIMILARITY,
) -> dict[str, float]:
    """total, accuracy and format as the release gives them."""
    kind = kind_of(gold, task)
    right = 0.0
    if task == "search" and _verified(text, gold):  # the search script tries mathematics first, over whole texts
        right = 1.0
    elif kind is not None and not other_kind(text, kind, task):
        said, wanted = _inside(text, kind), _inside(gold, kind)
        if kind == "answer":
            right = f1_release(said, wanted)
        elif kind == "code":
            right = code_pay
        elif kind == "problem":
            right = _fault_score_release(_faults_release(text), _faults_release(gold))
        elif similarity is not None:
            cosine = similarity(said, wanted)
            right = cosine if cosine >= least else 0.0
    # The search script asks only that the step be of either kind, not of the reference's.
    shape = ("answer" if "<answer>" in text and "</answer>" in text else "search") if task == "search" else kind
    formed = float(shape is not None and well_formed(text, shape, task))
    return {"total": right + formed, "accuracy": right, "format": formed}


def _verified(text: str, gold: str) -> bool:
    mine, theirs = parsed(text), parsed(gold)
    return bool(mine is not None and theirs is not None and verified(mine, theirs))


def _inside(text: str, tag: str) -> str:
    """The first block that stands on one line, or the whole text."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text)
    return (found.group(1) if found else text).strip()


def _faults_release(text: str) -> list[str]:
    found = re.search(r"<problem>\s*\{(.*?)\}\s*</problem>", text, re.DOTALL)
    return sorted(re.findall(r"'([^']+)'", found.group(1))) if found else []


def _fault_score_release(said: list[str], gold: list[str]) -> float:
    if len(gold) == 2:
        half = next((rotation for rotation in ROTATIONS if rotation in gold), None)
        if half is not None and said == [half]:
            return 0.5
    return float(said == gold)


# ---- the reward ------------------------------------------------------------------------------------------------------


def visual_arft(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    log_metric: Any = None,
    log_extra: Any = None,
    task: Task = "code",
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    encoder: str = MINILM,
    download: bool = False,
    device: str = "cpu",
    code_pay: float = CODE_PAY,
    least: float = LEAST_SIMILARITY,
    **columns: Any,
) -> list[float | None]:
    """Accuracy plus format of one step, in [0, 2]; None without a reference, or for code that nobody ran.

    The step is the policy's last turn that opens a block of the kind that the reference asks for, or its last turn;
    code ran if the environment answered that turn without an error.

    Args:
        task: code (problem, code, answer) or search (search, answer).
        variant: repaired or release (at the top of this file).
        gold: column with the reference, in its tag.
        encoder, download, device: the sentence model that compares searches; a folder or a hub id. Loaded when needed.
        code_pay: for code that ran.
        least: similarity below which a search earns 0.
    """
    one_of("visual_arft", "variant", variant, get_args(Variant))
    one_of("visual_arft", "task", task, get_args(Task))
    if code_pay < 0 or not -1 <= least <= 1:
        raise UserError(
            f"visual_arft: code_pay is {code_pay} and least {least}; code_pay is at least 0, least a cosine"
        )

    def similarity(said: str, wanted: str) -> float:
        return sentence_encoder(encoder, download, device, "visual_arft.encoder").similarities([(said, wanted)])[0]

    rows: list[dict[str, float] | None] = []
    for t in trajectories:
        reference = t.record.get(gold)
        if reference is None:
            rows.append(None)
            continue
        kind = kind_of(str(reference), task)
        if kind is None:
            raise RewardError(
                f"visual_arft: the reference of '{t.prompt}' in '{gold}' has none of the tags "
                f"{', '.join(KINDS[task])} of the task '{task}': {str(reference)[:80]!r}"
            )
        text = _step(t, kind, variant)
        if variant == "release":
            rows.append(score_release(text, reference, task, similarity, code_pay, least))
            continue
        right = accuracy(text, reference, task, _ran(t, kind), similarity, code_pay, least)
        formed = float(well_formed(text, kind, task))
        rows.append(None if right is None else {"total": right + formed, "accuracy": right, "format": formed})
    log_parts(rows, log_metric, log_extra)
    return totals(rows)


def _step(t: Trajectory, kind: str, variant: Variant) -> str:
    turns = policy_turns(t) or [""]
    if variant == "release":  # white space at the ends is a fault of form there
        turns = [functools.reduce(lambda turn, mark: turn.replace(mark, ""), CHAT_MARKS, turn) for turn in turns]
    else:
        turns = [without_chat_marks(turn) for turn in turns]
    return next((turn for turn in reversed(turns) if f"<{kind}>" in turn), turns[-1])


def _ran(t: Trajectory, kind: str) -> bool | None:
    """Whether the last code of the thought ran without an error; None where the environment said nothing to it."""
    calls = tool_calls(t) if kind == "code" else []
    answered = any(s.author is Author.ENVIRONMENT for s in t.segments[calls[-1].segment :]) if calls else False
    return calls[-1].ok if answered else None
