"""`make quickstart`: warm start, GRPO, held-out scores before and after, and the report, from one recipe.

Its last line is one JSON object: warm_start, grpo, first_sketch, final_image (held-out scores), on_policy_gap,
minutes, report, run_dir, and 95% intervals of the gain and of what refining adds. A finished stage is kept: the same
command after an interruption goes on where it stopped; minutes are those of all attempts, null after a kill.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from underdrawing import search_path

search_path.settle()
# isort: split
from runtime.errors import UserError, writing  # noqa: E402
from runtime.files import write_whole  # noqa: E402
from runtime.interrupt import heed_signals, name_of, number_of, raise_late  # noqa: E402
from runtime.ray_cluster import ClusterError  # noqa: E402
from underdrawing.cli import leave_clean, quieten  # noqa: E402
from underdrawing.options import LARGEST_SEED, Parser, Whole, expanded_path  # noqa: E402

if TYPE_CHECKING:
    from underdrawing.recipe import Recipe

STATE = "quickstart.json"
AGAIN = "give the same command again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are not done yet."""
    parser = Parser(description=__doc__)
    parser.add_argument("--recipe", type=expanded_path, default=Path("configs/shapes/quickstart.yaml"))
    parser.add_argument("--seed", type=Whole(0, LARGEST_SEED), default=0)
    parser.add_argument("--run-dir", type=expanded_path, help="default: the recipe's, with the seed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with heed_signals():
        try:
            options = parser.parse_args(arguments)
            quieten()
            return run(options.recipe, options.seed, options.run_dir, options.overrides)
        except UserError as error:
            broken = getattr(error, "broken", None)
            way_back = "" if broken is None else f". Remove {broken} and {AGAIN}"
            print(f"underdrawing: {error}{way_back}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt as error:
            number = number_of(error)
            print(f"stopped by {name_of(number)}; the same command goes on from what was saved", file=sys.stderr)
            return 128 + number


def run(path: Path, seed: int, run_dir: Path | None, overrides: Sequence[str] = ()) -> int:
    """All stages; prints the scores and the JSON line."""
    from underdrawing.jobs import training_lock
    from underdrawing.recipe import load_recipe

    recipe = load_recipe(path, [*overrides, f"seed={seed}", f"policy.tiny.seed={seed}"])
    recipe = recipe.model_copy(update={"run_dir": run_dir or Path(f"{recipe.run_dir}-seed{seed}")})
    with training_lock(recipe.run_dir):  # over all stages
        return _run_stages(recipe, seed)


def _run_stages(recipe: Recipe, seed: int) -> int:
    from evals.bootstrap import refinement
    from evals.kept import read
    from evals.measures import FINAL_IMAGE, FIRST_SKETCH
    from training.tracking import read_metrics
    from underdrawing.evaluations import compare_evaluations, run_evaluate
    from underdrawing.jobs import local, run_grpo, run_sft
    from underdrawing.recipe import dump_recipe
    from underdrawing.report.page import report_data, write_report

    console = Console(stderr=True)
    clock = _Clock(recipe.run_dir / STATE, dump_recipe(recipe))

    def say(sentence: str) -> None:
        console.print(f"[bold]{sentence}[/]", highlight=False, soft_wrap=True)

    if not clock.has("sft"):
        say(
            f"1/5  Warm start: {recipe.sft.max_steps} steps on {recipe.sft.demonstrations} demonstrations that plan, "
            "sketch, inspect and refine"
        )
        with clock.stage("sft"):
            run_sft(recipe, resume=True, resume_command=AGAIN)
    warm = recipe.run_dir / "sft" / "model"

    if not clock.has("before"):
        say(f"2/5  Held-out score of the warm start ({recipe.evaluate.prompts} prompts)")
        with clock.stage("before"):
            run_evaluate(local(recipe), warm, "warm_start", replace=True)

    if not clock.has("grpo"):
        say(
            f"3/5  GRPO: {recipe.grpo.steps} steps of {recipe.grpo.prompts_per_step} prompts x "
            f"{recipe.grpo.num_generations}, reward = {recipe.rewards.formula()}"
        )
        with clock.stage("grpo"):
            without_ray = False
            try:
                run_grpo(recipe, warm, resume=True, resume_command=AGAIN)
            except ClusterError as error:
                say(f"Ray cannot be had ({error}); rolling out in this process instead")
                without_ray = True
            if without_ray:
                run_grpo(local(recipe), warm, resume=True, resume_command=AGAIN)
    from training import checkpoint

    newest = checkpoint.latest(recipe.run_dir / "checkpoints")
    if newest is None:
        raise UserError(
            f"{recipe.run_dir}: GRPO is marked as done, but checkpoints/ is empty; delete "
            f"{recipe.run_dir / STATE} and run again"
        )
    if not clock.has("after"):
        say("4/5  Held-out score after GRPO")
        with clock.stage("after"):
            run_evaluate(local(recipe), newest / "weights", "grpo", replace=True)

    say("5/5  Report")
    with clock.stage("report"):
        gain = compare_evaluations(recipe.run_dir, "warm_start", "grpo")
        trained = read(recipe.run_dir / "evaluations" / "grpo")
        refined = refinement(trained.prompts)
        report = write_report(
            report_data(recipe.run_dir, title=f"{recipe.name}, seed {seed}"), recipe.run_dir / "report.html"
        )
    before, after = read(recipe.run_dir / "evaluations" / "warm_start"), trained
    first, final = after.means[FIRST_SKETCH], after.means[FINAL_IMAGE]
    gaps = [
        row["on_policy_gap"]
        for row in read_metrics(recipe.run_dir / "metrics.jsonl")
        if row.get("on_policy_gap") is not None
    ]
    say(f"held-out score: {before.score:.3f} after the warm start, {after.score:.3f} after GRPO: {gain}")
    say(f"its first sketches score {first:.3f}, its final images {final:.3f}: {refined}")
    say(f"report: {report}")
    print(
        json.dumps(
            {
                "warm_start": round(before.score, 4),
                "grpo": round(after.score, 4),
                "first_sketch": round(first, 4),
                "final_image": round(final, 4),
                "gain_interval": [round(gain.low, 4), round(gain.high, 4)],
                "refinement_interval": [round(refined.low, 4), round(refined.high, 4)],
                "on_policy_gap": gaps[0] if gaps else None,
                "minutes": clock.minutes(),
                "report": str(report),
                "run_dir": str(recipe.run_dir),
                "seed": seed,
                "stages": clock.rounded(),
            }
        )
    )
    return 0


class _Clock:
    """Seconds of each finished stage, kept in the run's folder: it says what is done after an interruption too.

    An interrupted stage's seconds count towards it. Those of a killed process are not known: then there is no total.

    Raises:
        UserError: the folder's stages were run by another recipe, whose figures would be passed off as this one's.
    """

    def __init__(self, path: Path, recipe: str) -> None:
        self.path = path
        self.recipe = hashlib.sha256(recipe.encode()).hexdigest()[:16]
        self.seconds: dict[str, float] = {}  # of finished stages
        self.begun: dict[str, float] = {}  # of the unfinished one's earlier attempts
        self.running: str | None = None
        self.killed = False  # at some time a process ended without a word
        if path.exists():
            try:
                state = json.loads(path.read_text())
                self.seconds, made_by = dict(state["seconds"]), state["recipe"]
                self.begun = dict(state["begun"])
                self.killed = bool(state["killed"]) or state["running"] is not None
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it to run all stages again") from None
            if made_by != self.recipe:
                raise UserError(
                    f"{path.parent} holds stages of another recipe or other overrides; choose another "
                    f"--run-dir, or remove that folder"
                )

    def save(self) -> None:
        with writing(self.path, "choose another --run-dir", "free some space and give the same command again"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(
                self.path,
                json.dumps(
                    {
                        "recipe": self.recipe,
                        "seconds": self.seconds,
                        "begun": self.begun,
                        "running": self.running,
                        "killed": self.killed,
                    }
                ),
            )

    def has(self, stage: str) -> bool:
        return stage in self.seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.running = name
        self.save()
        started = time.monotonic()
        finished = False
        try:
            yield
            finished = True
            raise_late()  # a signal in its last step: the next stage is not begun
        finally:
            self.running = None
            seconds = self.begun.pop(name, 0.0) + time.monotonic() - started
            (self.seconds if finished else self.begun)[name] = seconds
            self.save()

    def minutes(self) -> float | None:
        return None if self.killed else round(sum(self.seconds.values()) / 60, 2)

    def rounded(self) -> dict[str, float]:
        return {name: round(seconds, 1) for name, seconds in self.seconds.items()}


if __name__ == "__main__":
    leave_clean(main)
