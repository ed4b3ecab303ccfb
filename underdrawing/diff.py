"""The command `underdrawing diff`: the same prompts and noise by two sets of weights, and where their thoughts part."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.bootstrap import ScorePair, compare_scores
from evals.heldout import Heldout
from evals.heldout import evaluate as evaluate_heldout
from evals.trajectory_diff import DiffSummary, ThoughtPair, first_difference, scored_by, summarise
from formats.base import Vocabulary
from policy.base import Policy
from policy.registry import load_vocabulary
from record.store import check_beside
from rollout.open import open_rollouts
from rollout.weights.wire import fingerprint
from runtime.errors import UserError
from tasks.base import Record
from training import checkpoint
from underdrawing import build
from underdrawing.evaluations import heldout_records, open_evaluations
from underdrawing.jobs import local
from underdrawing.preflight import preflight
from underdrawing.progress import StepProgress
from underdrawing.recipe import Recipe, read_recipe
from underdrawing.report.diff import DiffPage, write_diff

logger = logging.getLogger(__name__)


class DiffError(UserError):
    """Two sets of weights that cannot be laid side by side."""


@dataclass(frozen=True)
class Side:
    """One of the two."""

    label: str
    weights: Path


@dataclass(frozen=True)
class _Answers:
    heldout: Heldout
    vocabulary: Vocabulary
    fingerprint: str


def run_diff(recipe: Recipe, a: str, b: str, prompts: int, out: Path | None = None) -> int:
    """Print the summary and write the page; the last line is one JSON object. Returns 0.

    Raises:
        DiffError: a side without weights, or two of other families, vocabularies or formats; or `out` is a folder.
        UserError: as evaluations do.
    """
    path = out or recipe.run_dir / "diff.html"
    check_beside(path)
    if path.is_dir():
        raise DiffError(f"--out {path}: a folder; give the page's file, such as {path / 'diff.html'}")
    sides = side_of(a), side_of(b)
    check_comparable(recipe, *sides)
    section = recipe.evaluate.model_copy(update={"prompts": prompts})
    recipe = local(recipe.model_copy(update={"evaluate": section}))
    answers, pairs = _answer(recipe, sides)
    found = summarise(pairs)
    compared = compare_scores(answers[0].heldout.prompts, answers[1].heldout.prompts, answers[0].heldout.score_name)
    page = DiffPage(recipe.name, sides[0].label, sides[1].label, pairs, found, compared.score, compared.score_name)
    write_diff(page, path)
    same = answers[0].fingerprint == answers[1].fingerprint
    tags = Counter(prompt.tag for prompt in answers[0].heldout.prompts)
    alone = sum(count == 1 for count in tags.values())
    _print(Console(), sides, found, compared.score, compared.score_name, same, alone)
    print(f"report: {path}")
    print(
        json.dumps(
            {
                "a": str(sides[0].weights),
                "b": str(sides[1].weights),
                "prompts": found.pairs,
                "equal": found.equal,
                "gained": found.gained,
                "lost": found.lost,
                "score_of": compared.score_name,
                "score": compared.score.as_json(),
                "roles": {
                    role.role: {"pairs": role.pairs, "median_decision": role.median_decision} for role in found.roles
                },
                "report": str(path),
            }
        )
    )
    return 0


def side_of(given: str) -> Side:
    """What a person means by a folder of weights, a run (its newest weights), or RUN@STEP.

    Raises DiffError where there are no such weights.
    """
    place, at, step = given.rpartition("@")
    if at and step.isdigit() and not Path(given).exists():
        folder = checkpoint.chosen(Path(place) / "checkpoints", step)
        return Side(f"{Path(place).name}, step {int(step)}", folder / "weights")
    folder = Path(given)
    if not folder.is_dir():
        raise DiffError(f"{given}: no such folder; give weights, a run, or a run and a step as RUN@40")
    if (folder / "config.json").is_file():
        return Side(_label(folder), folder)
    if (folder / "weights" / "config.json").is_file():
        return Side(_label(folder / "weights"), folder / "weights")
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is not None:
        return Side(_label(newest / "weights"), newest / "weights")
    warm_start = folder / "sft" / "model"
    if (warm_start / "config.json").is_file():
        return Side(_label(warm_start), warm_start)
    raise DiffError(f"{given}: holds neither weights (config.json), nor checkpoints/, nor a warm start (sft/model)")


def _label(weights: Path) -> str:
    weights = weights.resolve()
    if checkpoint.is_checkpoint(weights.parent):
        return f"{weights.parents[2].name}, step {int(weights.parent.name.rpartition('-')[2])}"
    if weights.parts[-2:] == ("sft", "model"):
        return f"{weights.parents[1].name}, warm start"
    return weights.name


def _run_of(weights: Path) -> Path | None:
    """The run that made some weights, where they lie in one."""
    weights = weights.resolve()
    run = weights.parents[2] if checkpoint.is_checkpoint(weights.parent) else weights.parents[1]
    return run if (run / "recipe.yaml").is_file() else None


def check_comparable(recipe: Recipe, a: Side, b: Side) -> None:
    """Whether both can answer the recipe's prompts decision by decision alike, as far as can be told without weights.

    Raises:
        DiffError: they are of other families, or have other vocabularies; or one was trained in another format.
    """
    kinds = [_model_type(side) for side in (a, b)]
    if kinds[0] != kinds[1]:
        raise DiffError(
            f"{a.weights} is of the family '{kinds[0]}' and {b.weights} of '{kinds[1]}': decisions are not of the "
            "same kind"
        )
    for side in (a, b):
        run = _run_of(side.weights)
        theirs = _format(run / "recipe.yaml") if run is not None else None
        if run is not None and theirs is not None and theirs != recipe.format.name:
            raise DiffError(
                f"{side.weights} was trained in the format '{theirs}' ({run / 'recipe.yaml'}), and the recipe's is "
                f"'{recipe.format.name}'; give a recipe of its format"
            )
    known = [load_vocabulary(recipe.policy.model_copy(update={"path": str(side.weights)})) for side in (a, b)]
    if known[0] is not None and known[1] is not None:
        one, other = known[0][0], known[1][0]
        if one.size != other.size:
            raise DiffError(
                f"{a.weights} and {b.weights} have other tokenizers: {one.size} ids and {other.size}; compare weights "
                "that were trained from the same ones"
            )
        differing = next((id for id in range(one.size) if one.piece(id) != other.piece(id)), None)
        if differing is not None:
            raise DiffError(
                f"{a.weights} and {b.weights} have other tokenizers: id {differing} is '{one.piece(differing)}' in the "
                f"first and '{other.piece(differing)}' in the second"
            )


def _model_type(side: Side) -> str:
    path = side.weights / "config.json"
    try:
        return str(json.loads(path.read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffError(f"{path}: says no model_type, it may be cut or altered ({error})") from None


def _format(path: Path) -> str | None:
    try:
        section = read_recipe(path).get("format")
    except UserError:  # a run's own recipe that cannot be read is no reason not to compare its weights
        return None
    return section.get("name") if isinstance(section, dict) else None


def _answer(recipe: Recipe, sides: tuple[Side, Side]) -> tuple[list[_Answers], list[ThoughtPair]]:
    """Both sides' answers, and the pairs with all log-probs. One model at a time is in memory: A's is loaded twice."""
    task, fmt = preflight(recipe)
    budget = recipe.grpo.tokens_per_micro_batch
    with ExitStack() as opened:
        evaluations = open_evaluations(recipe, task, fmt, opened)
        for evaluation in evaluations:
            evaluation.check(heldout_records(recipe, task))
        answers: list[_Answers] = []
        pairs: list[ThoughtPair] = []
        for side in sides:
            policy = build.build_policy(recipe, task, side.weights)
            records = heldout_records(recipe, task, policy)
            heldout = _write(recipe, side, policy, evaluations, records, build.words(recipe, task, side.weights))
            answers.append(_Answers(heldout, policy.vocabulary, fingerprint(policy.model.state_dict())))
        pairs = scored_by(policy, _pairs(*answers), "b", budget)
        del policy
        return answers, scored_by(build.build_policy(recipe, task, sides[0].weights), pairs, "a", budget)


def _write(
    recipe: Recipe, side: Side, policy: Policy, evaluations: Sequence[Any], records: list[Record], words: list[str]
) -> Heldout:
    config = recipe.rollout.model_copy(update={"temperature": {"default": recipe.evaluate.temperature}})
    policy_config = recipe.policy.model_copy(update={"path": str(side.weights)})
    with ExitStack() as closing:
        rollouts = open_rollouts(policy, policy_config, recipe.format, config, words, recipe.tools)
        closing.callback(rollouts.close)
        progress = StepProgress(side.label, len(records))
        closing.callback(progress.close)
        done: list[int] = []

        def each(index: int, group: Any) -> None:
            done.append(index)
            progress.on_metrics(len(done), {})

        section = recipe.evaluate
        return evaluate_heldout(rollouts, evaluations, records, section.seed, 1, each, section.flow)


def _pairs(a: _Answers, b: _Answers) -> list[ThoughtPair]:
    return [
        ThoughtPair(one, other, a.heldout.score_name, x[0], y[0], first_difference(x[0], y[0], a.vocabulary))
        for one, other, x, y in zip(
            a.heldout.prompts, b.heldout.prompts, a.heldout.trajectories, b.heldout.trajectories, strict=True
        )
    ]


# ---- what a person reads ------------------------------------------------------------------------------------------


def _print(
    console: Console,
    sides: tuple[Side, Side],
    found: DiffSummary,
    score: ScorePair,
    name: str,
    same_weights: bool,
    alone: int,
) -> None:
    """`alone`: kinds of prompt with one prompt each."""
    for letter, side in zip("AB", sides, strict=True):
        console.print(Text(f"{letter}: {side.label} ({side.weights})", "italic"), soft_wrap=True)
    if found.equal == found.pairs:
        why = "they are the same weights" if same_weights else "though the weights differ, no decision does"
        console.print(
            Text(f"All {found.pairs} answers are the same, decision by decision: {why}.", "green"), soft_wrap=True
        )
        return
    table = Table()
    table.add_column("parts first in", no_wrap=True)
    for column in ("answers", "share", "decisions in common", "gained", "lost"):
        table.add_column(column, justify="right")
    for role in found.roles:
        share = f"{role.pairs / found.pairs:.0%}"
        table.add_row(role.role, str(role.pairs), share, f"{role.median_decision:g}", str(role.gained), str(role.lost))
    table.add_section()
    table.add_row("nowhere", str(found.equal), f"{found.share_equal:.0%}", "all", "0", "0")
    table.add_row(Text("together", "bold"), str(found.pairs), "100%", "", str(found.gained), str(found.lost))
    console.print(table)
    interval = score.interval
    console.print(
        Text(
            f"{name.replace('_', ' ')}: A {score.a:.3f}, B {score.b:.3f}, B - A {interval.difference:+.3f} "
            f"({interval.level:.0%} interval {interval.low:+.3f} to {interval.high:+.3f})"
        ),
        soft_wrap=True,
    )
    if alone:
        console.print(
            f"{alone} of the kinds of prompt have one prompt each, whose spread the interval does not hold; give more "
            "--prompts",
            soft_wrap=True,
        )
    console.print(
        "Decisions in common: the median number before the first that differs. Gained: prompts that B answers better.",
        soft_wrap=True,
    )
