"""Detection alone against all parts: the same warm start, prompts and noise, equal sampled or equal trained tokens.

    python -m experiments.reward_parts --warm-start runs/quickstart-seed0/sft/model --out runs/reward-parts

Detection alone stops at the first step after `--tokens` sampled tokens. More of its groups are without variance, hence
skipped, so at equal sampled tokens it trains on fewer. All parts are therefore evaluated twice: at the first step after
as many trained tokens (fewer are sampled by then), and at the first step after as many sampled ones.

Each arm is a GRPO run of its own folder that resumes. Writes <out>/results.json: held-out scores, tokens, and the
paired bootstrap intervals over prompts.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json

from evals.bootstrap import compare
from evals.heldout import PromptScore
from evals.kept import read_prompt_scores
from runtime.errors import UserError
from training import checkpoint
from training.tracking import read_metrics
from underdrawing.cli import quieten
from underdrawing.evaluations import run_evaluate
from underdrawing.jobs import local, run_grpo
from underdrawing.options import LARGEST_SEED, Number, Parser, Whole, expanded_path
from underdrawing.recipe import Recipe, load_recipe

# Overrides of the recipe. Parts that credit segments act through them too, so detection alone has one advantage for the
# whole thought.
ARMS: dict[str, list[str]] = {
    "detection": ["rewards.total=detect", "grpo.advantage_level=trajectory", "grpo.segment_reward_weights={}"],
    "all_parts": [],
}

# An arm ends by its tokens, so its steps are not known ahead, and a rate that falls with them would fall differently.
CONSTANT = "grpo.lr_scheduler_type=constant_with_warmup"


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=expanded_path, default=Path("configs/shapes/quickstart.yaml"))
    parser.add_argument("--warm-start", type=expanded_path, required=True)
    parser.add_argument("--out", type=expanded_path, default=Path("runs/reward-parts"))
    parser.add_argument("--tokens", type=Number(), default=0.8e6, help="sampled tokens of an arm")
    parser.add_argument("--seed", type=Whole(0, LARGEST_SEED), default=0)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    quieten()
    try:
        options = parser.parse_args()
        results = compare_arms(options)
    except UserError as error:
        print(f"reward_parts: {error}", file=sys.stderr)
        return error.exit_code
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results))
    return 0


def compare_arms(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores of detection alone, and of all parts at equal trained and at equal sampled tokens."""
    results = {"detection": run_arm(options, "detection", "sampled", options.tokens)}
    for kind in ("trained", "sampled"):  # trained comes first: all parts train on more of what they sample
        results[f"all_parts_equal_{kind}"] = run_arm(options, "all_parts", kind, results["detection"][kind])
        gain = compare(scores(options, "detection", "sampled"), scores(options, "all_parts", kind))
        results[f"difference_equal_{kind}"] = {
            "all_parts_minus_detection": gain.difference,
            "low": gain.low,
            "high": gain.high,
        }
    return results


def run_arm(options: argparse.Namespace, arm: str, kind: str, tokens: float) -> dict[str, float]:
    """Train until so many sampled or trained tokens are spent, then evaluate."""
    folder = options.out / arm
    kept = folder / f"equal_{kind}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    recipe = load_recipe(
        options.recipe, [CONSTANT, *options.overrides, f"seed={options.seed}", f"run_dir={folder}", *ARMS[arm]]
    )
    while spent(folder)[kind] < tokens:
        done = checkpoint.steps(folder / "checkpoints")
        per_step = spent(folder)[kind] / done[-1] if done else None
        left = 10 if per_step is None else max(1, round((tokens - spent(folder)[kind]) / per_step))
        run_grpo(with_steps(recipe, (done[-1] if done else 0) + left), options.warm_start, resume=True)
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    heldout = run_evaluate(local(recipe), newest / "weights", f"equal_{kind}", replace=True)
    result = {"score": heldout.score, "first_sketch": heldout.means["first_sketch"], **spent(folder)}
    kept.write_text(json.dumps(result))
    return result


def scores(options: argparse.Namespace, arm: str, kind: str) -> list[PromptScore]:
    return read_prompt_scores(options.out / arm / "evaluations" / f"equal_{kind}" / "prompts.jsonl")


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    return recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": steps})})


def spent(folder: Path) -> dict[str, float]:
    """Tokens that the arm's logged steps sampled and trained on."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "sampled": sum(row.get("rollout/tokens") or 0.0 for row in rows),
        "trained": sum(row.get("trained/tokens") or 0.0 for row in rows),
    }


if __name__ == "__main__":
    sys.exit(main())
