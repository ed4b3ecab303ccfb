"""Test-time scaling of some weights, for `underdrawing evaluate` with the recipe's section `scaling`.

Two sampling passes serve all arms (evals/scaling_arms.py): one of thoughts that end where the policy ends them, whose
first ones are also the evaluation's answers, and one of thoughts that the format holds to the largest number of rounds.
Both are under the noise of (evaluate.seed, prompt, member), so that their thoughts differ little before the first end
that the second one forbids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals import kept
from evals.critiques import ROLES
from evals.heldout import EvaluationError, answer, tag_of
from evals.scaling import Critic, SamplingPass, Scaling, compare_arms, measure_thoughts
from evals.scaling_arms import Thought
from evals.scaling_config import ScalingConfig
from formats.base import Format, Vocabulary
from formats.config import FormatConfig
from formats.roles import check_names, roles_of
from formats.shortest import least_words
from policy.base import Policy
from record.trajectory import Trajectory
from rollout.engine.prompts import image_room
from rollout.pool.contract import Rollouts
from runtime.errors import UserError
from tasks.base import Evaluation, Record, Task
from training.wandb_table import send_table
from underdrawing.recipe import Recipe
from underdrawing.report.scaling import plot


@dataclass(frozen=True)
class ScalingStudy:
    """What is kept of it, by file."""

    scaling: Scaling
    files: Mapping[str, str]
    forced: Sequence[Trajectory]  # one a prompt of the second pass, with the score of each round


def check_scaling(recipe: Recipe, task: Task, fmt: Format) -> None:
    """Hold the section to the format and the task; no weights are needed.

    Raises:
        EvaluationError: more rounds than format.max_images, a format in which nothing is drawn or that cannot be held
            to a number of images, or critiques that nobody can read.
        UserError: a role that the format does not have.
    """
    config = _config(recipe)
    most = fmt.max_images
    if not most or (hasattr(fmt, "grammar") and not fmt.grammar.drawn):
        raise EvaluationError(
            f"scaling: in the format '{fmt.name}' the policy draws nothing, so there are no rounds to count; choose a "
            "format with images (strokes, subgoals, self_critique), or leave `scaling` out"
        )
    if config.rounds[-1] > most:
        raise EvaluationError(
            f"scaling.rounds: {config.rounds[-1]} rounds, and the format '{fmt.name}' allows {most} images; give at "
            f"most {most}, or raise format.max_images to {config.rounds[-1]}"
        )
    if config.rounds[-1] > 1:
        _held_to_rounds(recipe)
    if config.roles is not None:
        check_names(config.roles, fmt, "scaling.roles")
        if config.fine is None and not hasattr(task, "claims"):
            raise EvaluationError(
                f"scaling.roles: nobody reads what critiques say: the task '{task.name}' has no function `claims`; "
                "give scaling.fine, an expression that is found in critiques which approve"
            )


def check_room(recipe: Recipe, fmt: Format, policy: Policy, records: Sequence[Record]) -> None:
    """Raises EvaluationError where the shortest thought of so many rounds passes rollout.max_tokens, or the policy's
    context with the longest prompt."""
    rounds = _config(recipe).rounds[-1]
    room = image_room(policy)
    words = least_words(fmt, policy.vocabulary, rounds)
    ids = words + rounds * room.ids
    what = f"scaling.rounds: {rounds} rounds take at least"
    if ids > recipe.rollout.max_tokens:
        fits = _most(lambda k: least_words(fmt, policy.vocabulary, k) + k * room.ids, recipe.rollout.max_tokens, rounds)
        raise EvaluationError(
            f"{what} {ids} tokens ({rounds} images of {room.ids}), and rollout.max_tokens is "
            f"{recipe.rollout.max_tokens}; {_advice(fits)}, or raise rollout.max_tokens"
        )
    prompt = max(len(fmt.prompt_ids(record["prompt"], policy.vocabulary)) for record in records)
    slots = prompt + words + rounds * room.slots
    if slots > policy.max_length:
        left = policy.max_length - prompt
        fits = _most(lambda k: least_words(fmt, policy.vocabulary, k) + k * room.slots, left, rounds)
        raise EvaluationError(
            f"{what} {slots} slots with the longest prompt ({rounds} images of {room.slots}), and the policy's context "
            f"holds {policy.max_length}; {_advice(fits)}"
        )


def _most(takes: Callable[[int], int], room: int, rounds: int) -> int:
    return max((k for k in range(1, rounds) if takes(k) <= room), default=0)


def _advice(fits: int) -> str:
    return f"give at most {fits}" if fits else "not one round fits"


def settings_of_scaling(config: ScalingConfig) -> dict[str, Any]:
    """As JSON has them."""
    return dict(json.loads(config.model_dump_json()))


def samples_of(recipe: Recipe) -> int:
    """Thoughts of each prompt in the pass that ends where the policy ends."""
    return max(recipe.evaluate.samples, *_config(recipe).samples)


def study(
    recipe: Recipe,
    task: Task,
    fmt: Format,
    policy: Policy,
    records: Sequence[Record],
    evaluation: Evaluation,
    natural: Sequence[list[Trajectory]],
    seconds: float,
    open_pool: Callable[[FormatConfig], Rollouts],
    each: Callable[[int, list[Trajectory]], None] | None = None,
) -> ScalingStudy:
    """Sample the second pass, and compare all arms.

    Args:
        evaluation: what pictures are scored by.
        natural: the first pass, by prompt.
        seconds: that its call of the engine took.
        open_pool: from a format's section to rollouts in that format, closed by the caller.
        each: is told of each prompt of the second pass that is finished.
    """
    config = _config(recipe)
    rounds = config.rounds[-1]
    critic, notes = critic_of(config, task, fmt, policy.vocabulary)
    own = SamplingPass(measure_thoughts(natural, evaluation, fmt, rounds, critic), seconds)
    forced, shown = None, list[Trajectory]()
    if rounds > 1:
        section = recipe.evaluate
        pool = open_pool(_held_to_rounds(recipe))
        written, metrics = answer(pool, records, section.seed, section.samples, each, section.flow)
        forced = SamplingPass(measure_thoughts(written, evaluation, fmt, rounds, critic), metrics["time/rollout"])
        for group, thoughts in zip(written, forced.thoughts, strict=True):
            scores = enumerate((picture.score for picture in thoughts[0].pictures[:rounds]), 1)
            group[0].rewards = {f"round {number}": score for number, score in scores}
            shown.append(group[0])
        short = forced.as_json(rounds)["short"]
        if short:
            notes = [
                *notes,
                f"{short:.1%} of the thoughts that were to go on for {rounds} rounds ran out of tokens or context "
                "before; they count with what they have",
            ]
    tags = [tag_of(record) for record in records]
    scaling = compare_arms(
        own, forced, tags, config.rounds, config.samples, critic is not None, recipe.evaluate.seed, notes=notes
    )
    content = {
        "score_of": evaluation.score,
        "prompts": scaling.prompts,
        "judged": scaling.judged,
        "thoughts_per_prompt": {"own_end": len(natural[0]), "forced": recipe.evaluate.samples if forced else 0},
        "passes": {"own_end": own.as_json(None), **({"forced": forced.as_json(rounds)} if forced else {})},
        "points": [point.as_json() for point in scaling.points],
        "equal_cost": [match.as_json() for match in scaling.matches],
        "notes": list(scaling.notes),
    }
    lines = [
        json.dumps(_row(name, thought, records[thought.prompt]["prompt"]))
        for name, written_pass in (("own_end", own), ("forced", forced))
        if written_pass is not None
        for group in written_pass.thoughts
        for thought in group
    ]
    files = {
        kept.SCALING: json.dumps(content, indent=1),
        kept.SCALING_THOUGHTS: "".join(f"{line}\n" for line in lines),
        kept.SCALING_PLOT: plot(content),
    }
    return ScalingStudy(scaling, files, shown)


def to_wandb(recipe: Recipe, made: kept.KeptEvaluation) -> None:
    """The points as a table, and the plot, as track.wandb says."""
    content = made.scaling()
    if content is None or not content["points"]:
        return
    columns = list(content["points"][0])
    send_table(
        recipe.run_dir,
        recipe.track,
        "scaling",
        columns,
        [[point[column] for column in columns] for point in content["points"]],
        name=f"{recipe.name}-scaling-{made.label}",
        recipe=recipe.model_dump(mode="json"),
        plot=(made.folder / kept.SCALING_PLOT).read_text("utf-8"),
    )


def critic_of(config: ScalingConfig, task: Any, fmt: Format, vocabulary: Vocabulary) -> tuple[Critic | None, list[str]]:
    """Who reads critiques, and what is to be said where nobody does."""
    left_out = "so the arms that go by the policy's own critique are left out"
    known = roles_of(fmt)
    roles = config.roles or [role for role in ROLES if known is None or role in known]
    if not roles:
        return None, [f"the format '{fmt.name}' has no role of critiques (scaling.roles), {left_out}"]
    if config.fine is not None:
        approves = re.compile(config.fine)

        def by_expression(text: str) -> tuple[str, bool] | None:
            found = approves.search(text)
            return ("", False) if found is None else (found[0].strip(), True)

        return Critic(roles, by_expression, vocabulary.piece), []
    if not hasattr(task, "claims"):
        return None, [f"the task '{task.name}' does not say how its critiques are read (scaling.fine), {left_out}"]

    def by_task(text: str) -> tuple[str, bool] | None:
        verdict = task.claims(text).verdict
        return None if verdict is None else (str(verdict), verdict == "fine")

    return Critic(roles, by_task, vocabulary.piece), []


def _held_to_rounds(recipe: Recipe) -> FormatConfig:
    """The format's section whose thoughts go on for the largest number of rounds."""
    config = _config(recipe)
    least = max(config.rounds[-1], recipe.format.min_images or 0)
    held = recipe.format.model_copy(update={"min_images": least})
    try:
        held.build()
    except UserError as error:
        raise EvaluationError(
            f"scaling.rounds: thoughts cannot be held to {least} rounds, so give fewer, or [1] for what the policy "
            f"does by itself: {error}"
        ) from None
    return held


def _row(written: str, thought: Thought, prompt: str) -> dict[str, Any]:
    return {
        "pass": written,
        "prompt": prompt,
        "number": thought.prompt,
        "member": thought.member,
        "score": thought.score,
        "tokens": thought.tokens,
        "stop": thought.stop,
        "pictures": [vars(picture) for picture in thought.pictures],
    }


def _config(recipe: Recipe) -> ScalingConfig:
    assert recipe.scaling is not None
    return recipe.scaling
