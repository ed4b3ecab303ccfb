"""Tools in Ray workers and in whole runs: the recipe's section reaches every engine, a lost worker repeats no call that
may not be repeated, and a GRPO run trains on what was written around the answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from policy.chameleon.config import ChameleonPolicyConfig
from record.store import load_trajectories
from record.trajectory import Author, Trajectory
from rl.advantages import compute_advantages
from rl.config import GrpoConfig
from rollout.config import RolloutConfig
from rollout.pool.assignment import Assignment, Call
from rollout.pool.contract import NOT_REPEATABLE
from rollout.pool.local import LocalRollouts
from rollout.pool.ray_rollouts import RayRollouts
from rollout.spec import EngineSpec, engine_spec
from rollout.tools.config import ToolConfig
from runtime.ray_cluster import start_ray
from tests.test_engine import contents, requests
from tests.test_look import REQUESTS, TINY, TOOLS, WORDS, numerate_policy
from tests.worker_factories import calling_engine
from training.tracking import read_metrics
from underdrawing.build import build_task
from underdrawing.evaluations import run_evaluate, settings_of
from underdrawing.jobs import run_grpo, run_rollout
from underdrawing.recipe import check_recipe

ROLLOUT = {"rows": 6, "max_tokens": 40}


@pytest.fixture(scope="module")
def cluster():
    os.environ.pop("RAY_ADDRESS", None)
    cluster = start_ray(2, object_store_bytes=100 * 2**20)
    yield cluster
    cluster.stop()


def pool(tool: dict, repeatable: bool = True, workers: int = 1) -> RayRollouts:
    spec = EngineSpec({"rollout": ROLLOUT, "tool": tool}, "tests.worker_factories.calling_engine", repeatable)
    return RayRollouts(spec, RolloutConfig(workers=workers, retries=2, **ROLLOUT))


def test_a_lost_workers_calls_are_made_again_where_they_may_be(cluster, tmp_path):
    calls, died = tmp_path / "calls", tmp_path / "died"
    rollouts = pool({"path": str(calls), "die": str(died)})
    there = rollouts.generate(requests(4, 2))
    rollouts.close()
    assert died.exists() and not there.failed and there.metrics["rollout/restarts/crash"] == 1
    undisturbed = LocalRollouts(calling_engine(ROLLOUT, {"path": str(tmp_path / "others")}))
    here = undisturbed.generate(requests(4, 2))
    undisturbed.close()
    assert [[contents(t) for t in g] for g in there.groups] == [[contents(t) for t in g] for g in here.groups]
    assert there.metrics["rollout/tools/calls/file"] == here.metrics["rollout/tools/calls/file"]
    assert len(calls.read_text().split()) > len((tmp_path / "others").read_text().split())


@pytest.mark.slow
def test_calls_that_may_not_be_repeated_drop_their_groups(cluster, tmp_path):
    calls, died = tmp_path / "calls", tmp_path / "died"
    rollouts = pool({"path": str(calls), "die": str(died), "repeatable": False}, repeatable=False, workers=2)
    result = rollouts.generate(requests(4, 2))  # worker 0 writes the groups 0 and 2, worker 1 the others
    rollouts.close()
    assert died.exists() and result.failed and result.groups
    assert {f.reason for f in result.failed} == {NOT_REPEATABLE}
    assert len(result.groups) + len(result.failed) == 4
    lost = {f.group for f in result.failed}
    assert lost in ({0, 2}, {1, 3}) or lost < {0, 2} or lost < {1, 3}
    made = calls.read_text().split()
    for key in set(made):
        assert made.count(key) <= 2, "no trajectory was written twice: a format asks twice at most"
    again = pool({"path": str(calls), "repeatable": False}, repeatable=False)
    assert not again.generate(requests(1, 1)).failed
    again.close()


@pytest.mark.slow
def test_a_recipes_tools_reach_the_workers(cluster):
    from formats.config import FormatConfig

    config = RolloutConfig(workers=1, rows=8, max_tokens=80)
    fmt = FormatConfig(name="look", constrain="full", options={"max_tokens": 4})
    spec = engine_spec(ChameleonPolicyConfig(tiny=TINY), fmt, config, WORDS, TOOLS)
    assert spec.repeatable
    rollouts = RayRollouts(spec, config)
    there = rollouts.generate(REQUESTS[:1])
    rollouts.close()
    here = LocalRollouts(spec.build())
    assert [contents(t) for t in there.groups[0]] == [contents(t) for t in here.generate(REQUESTS[:1]).groups[0]]
    assert there.metrics["rollout/tools/calls/look"] > 0
    assert any(s.author is Author.ENVIRONMENT for t in there.groups[0] for s in t.segments)


def test_a_spec_asks_the_tools_whether_they_may_be_repeated(tmp_path):
    from formats.config import FormatConfig

    for repeatable in (True, False):
        config = ToolConfig(
            tool="tests.tool_helpers.FileTool", options={"path": str(tmp_path / "x"), "repeatable": repeatable}
        )
        spec = engine_spec(ChameleonPolicyConfig(), FormatConfig(), RolloutConfig(), (), {"file": config})
        assert spec.repeatable is repeatable


def test_what_is_given_up_is_not_tried_again():
    assignment = Assignment(4, slots=2, fill=1, retries=2, reproducible=True)
    call = assignment.next(0)
    assert call == Call((0, 2)) and assignment.finished(2)
    assert assignment.given_up(call) == (0,) and assignment.left == {1, 3} and assignment.next(0) is None


def test_the_ledger_counts_them_by_their_reason():
    ledger = compute_advantages([], GrpoConfig(), {"failed": 1, NOT_REPEATABLE: 2})
    assert ledger.groups_in == 3 and ledger.dropped == {"failed": 1, NOT_REPEATABLE: 2}
    assert ledger.metrics()["groups/dropped/not_repeatable"] == 2


# ---- a run ----

REWARD = '''
def numbers(completions, **columns):
    """How many of the policy's words are numbers."""
    words = [" ".join(str(message["content"]) for message in messages).split() for messages in completions]
    return [sum(word.isdigit() for word in row) / (len(row) + 1) for row in words]
'''


def recipe_in(folder: Path, **changes):
    (folder / "numbers.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("a red circle", "a circle", "red", "a"))
    )
    data = {
        "name": "look",
        "run_dir": str(folder / "run"),
        "policy": {"tiny": TINY.model_dump(mode="json")},
        "task": {"dataset": {"path": str(folder / "prompts.jsonl"), "heldout_share": 0.5}},
        "format": {"name": "look", "constrain": "images", "options": {"max_tokens": 4}},
        "tools": ["look"],
        "rollout": {"rows": 8, "max_tokens": 80},
        "rewards": {
            "parts": {"numbers": {"function": f"{folder / 'numbers.py'}:numbers", "isolate": False}},
            "total": "numbers",
        },
        "grpo": {"steps": 2, "prompts_per_step": 2, "num_generations": 4, "learning_rate": 1e-3, "save_every": 2},
        "evaluate": {"prompts": 1},
        "track": {"wandb": "disabled"},
        **changes,
    }
    return check_recipe(data, "recipe")


@pytest.fixture
def weights(tmp_path) -> Path:
    numerate_policy("<ins>", "</ins>", "<look>", "</look>").save(tmp_path / "weights")
    return tmp_path / "weights"


def test_grpo_trains_around_the_answers(tmp_path, weights):
    recipe = recipe_in(tmp_path)
    run_grpo(recipe, weights)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert row["rollout/tools/calls"] == row["rollout/tools/calls/look"] > 0
        assert row["groups/in"] == 2 and row["groups/trained"] > 0
    assert rows[0]["on_policy_gap"] < 1e-4
    shown = load_trajectories(tmp_path / "run" / "trajectories" / "000001")
    answers = [(t, i) for t in shown for i, s in enumerate(t.segments) if s.author is Author.ENVIRONMENT]
    assert answers
    for trajectory, index in answers:
        assert trajectory.advantage_S[index] == 0 and not trajectory.segments[index].trained


def test_rollout_and_evaluate_have_tools_too(tmp_path, weights):
    recipe = recipe_in(tmp_path)
    written: list[Trajectory] = run_rollout(recipe, weights, 2, "train", tmp_path / "kept", samples=4)
    assert any(s.author is Author.ENVIRONMENT for t in written for s in t.segments)
    assert run_evaluate(recipe, weights).prompts
    assert list(settings_of(recipe, build_task(recipe), [])["tools"]) == ["look"]
