"""VRAG-RL: search pages, look, answer; paid for the answer, the form, and how early the right pages came.

    0                                     without a search block and an answer block
    0.7 judge + 0.1 form + 0.2 NDCG       otherwise; in evaluation the judge's verdict alone

with NDCG over the retrieved pages, binary relevance, and the ideal over all reference pages. Wang et al.,
arXiv:2505.22019; Alibaba-NLP/VRAG, VRAG-RL/verl/workers/reward_manager/rm.py (which has this form as 1).

The release means to cut user turns out before it looks for the blocks, and does not, so that tags in the environment's
words count; a page that is retrieved twice counts twice, so NDCG can pass 1; and a judge that fails pays 0. `repaired`,
the default, reads the policy's words alone, finds each page once, and leaves the unjudged unjudged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from record.trajectory import Author, Trajectory
from rewards.contract import RewardContext, RewardError, policy_text
from rewards.functions.overlap import ndcg
from rewards.functions.text import blocks, transcript
from rewards.published.judge_helpers import check, gold_of, log_parts, one_of, totals, verdicts
from runtime.errors import UserError

Variant = Literal["repaired", "release"]
Mode = Literal["train", "eval"]

_PAGE = re.compile(r"[\w./-]+\.(?:jpe?g|png|webp)\b", re.I)
_USER_TURN = re.compile(r"<\|im_start\|>user.*?<\|im_end\|>")  # the release's: one that runs over lines stays


@dataclass(frozen=True)
class Reading:
    answer: str | None  # None: no answer block
    well_formed: bool  # a search block and an answer block


def read(own: str) -> Reading:
    """The policy's own words: its last answer block, and whether there is a search block too."""
    found = blocks(own, "answer")
    return Reading(found[-1] if found else None, bool(found) and bool(blocks(own, "search")))


def read_release(text: str) -> Reading:
    """The conversation as one string. The answer stands between the last closing tag and the opening one before it."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    left = _USER_TURN.sub("", text)
    formed = all(f"</{tag}>" in left.partition(f"<{tag}>")[2] for tag in ("search", "answer"))
    return Reading(text[start + len("<answer>") : end] if start >= 0 else None, formed)


def page_name(path: str) -> str:
    """ "images/report_3.jpg" -> "report_3"."""
    return PurePosixPath(path.rstrip("/")).name.split(".jpg")[0]


def reference_names(file_name: str, pages: Sequence[int]) -> list[str]:
    """Page images are named after their document: ("report.pdf", [3]) -> ["report_3"]."""
    return [f"{file_name.split('.pdf')[0]}_{page}" for page in pages]


def score(
    reading: Reading,
    right: bool,
    ranking: float | None,
    mode: Mode = "train",
    accuracy: float = 0.7,
    format: float = 0.1,
    retrieval: float = 0.2,
) -> dict[str, float]:
    """The formula at the top of this file; `ranking` is read in training only."""
    if not reading.well_formed:
        return {"total": 0.0, "accuracy": 0.0, "format": 0.0, "ndcg": 0.0}
    found = ranking or 0.0
    total = float(right) if mode == "eval" else accuracy * right + format + retrieval * found
    return {"total": total, "accuracy": float(right), "format": 1.0, "ndcg": found}


def vrag(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    mode: Mode = "train",
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    file: str = "file_name",
    pages: str = "reference_pages",
    accuracy: float = 0.7,
    format: float = 0.1,
    retrieval: float = 0.2,
    **columns: Any,
) -> list[float | None]:
    """0.7 judge + 0.1 form + 0.2 NDCG, 0 without a search and an answer block; None without a reference, in training
    without reference pages, or where the judge gave no verdict.

    The retrieved pages are those that the search tool noted in `info["retrieved"]`, in order; without it the names of
    images in what the environment answered.

    Args:
        mode: train or eval (the verdict alone).
        variant: repaired or release (at the top of this file).
        file, pages: columns with the document's file name and the numbers of its pages that hold the answer.
        accuracy, format, retrieval: weights.
    """
    one_of("vrag", "variant", variant, get_args(Variant))
    one_of("vrag", "mode", mode, get_args(Mode))
    if min(accuracy, format, retrieval) < 0:
        raise UserError(f"vrag: the weights are {accuracy}, {format} and {retrieval}; none may be negative")
    readings = [read(policy_text(t)) if variant == "repaired" else read_release(transcript(t)) for t in trajectories]
    applies = [gold_of(t, gold) is not None and (mode == "eval" or bool(t.record.get(pages))) for t in trajectories]
    asked = [
        applied and r.well_formed and (bool(r.answer) or variant == "release")
        for applied, r in zip(applies, readings, strict=True)
    ]
    said = verdicts(
        context,
        "vrag",
        [
            check(t, r.answer or "", gold) if ask else None
            for t, r, ask in zip(trajectories, readings, asked, strict=True)
        ],
    )
    rows: list[dict[str, float] | None] = []
    for t, reading, applied, ask, verdict in zip(trajectories, readings, applies, asked, said, strict=True):
        if not applied or (ask and verdict is None and variant == "repaired"):
            rows.append(None)
            continue
        ranking = None
        if mode == "train" and reading.well_formed:
            ranking = ndcg(
                [page_name(path) for path in retrieved(t)], _references(t, file, pages), repeats=variant == "release"
            )
        rows.append(score(reading, bool(verdict), ranking, mode, accuracy, format, retrieval))
    log_parts(rows, log_metric, log_extra)
    return totals(rows)


def retrieved(trajectory: Trajectory) -> list[str]:
    """The pages that the environment returned, in order."""
    noted = trajectory.info.get("retrieved")
    if noted is not None:
        return [str(path) for path in noted]
    return [path for s in trajectory.segments if s.author is Author.ENVIRONMENT for path in _PAGE.findall(s.text)]


def _references(t: Trajectory, file: str, pages: str) -> list[str]:
    name, numbers = t.record.get(file), t.record[pages]
    if not isinstance(name, str) or not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise RewardError(
            f"vrag: the record of '{t.prompt}' has {name!r} in '{file}' and {numbers!r} in '{pages}'; "
            f"they must be a file name and a list of page numbers"
        )
    return reference_names(name, numbers)
