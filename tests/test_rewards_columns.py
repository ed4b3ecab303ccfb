"""Columns that rewards ask for: those of the whole prompt set, looked at before the first step."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from record.store import save_trajectories
from rewards.config import RewardsConfig
from rewards.contract import ARGUMENTS, RESERVED, columns, columns_of
from rewards.manager import RewardManager
from rewards.registry import COLUMN_OPTIONS, REWARDS
from runtime.errors import UserError
from tests.rewards_helpers import text, trajectory_of
from tests.test_cli import QUICKSTART, SMALL, refused
from training.tracking import read_metrics
from underdrawing.cli import main

RECORDS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "solution": "4"},
    {"prompt": "a blue square"},
    {"prompt": "a green circle"},
    {"prompt": "a red square"},
]
OWN = """
def solved(completions, solution, **columns):
    return [None if s is None else float(i) for i, s in enumerate(solution)]

def optional(completions, difficulty=None, **columns):
    return [1.0] * len(completions)

def asks(completions, solutoin):
    return [1.0] * len(completions)

def make(step):
    def made(completions, prompt):
        return [1.0] * len(completions)
    return made
"""


class Prompts:
    """A task of these records; the last one is held out."""

    name, words, classes = "prompts", ["a"], ("circle",)

    def __init__(self, records=RECORDS):
        self.records = records

    def prompts(self, split):
        return self.records[:-1] if split == "train" else self.records[-1:]

    def detect(self, image):
        return []


def manager(task: Any, columns: Any = None, **parts: Any) -> RewardManager:
    return RewardManager(RewardsConfig.model_validate({"parts": parts}), task, columns=columns)


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def test_columns_are_those_of_the_whole_set():
    assert columns_of([{"prompt": "p", "a": 1}, {"b": 2, "a": 3}]) == ("a", "b")
    assert columns([trajectory_of({"a": 1})], ("b", "a")) == {"b": [None], "a": [1]}


def test_a_step_without_the_column_gets_none(own):
    """Each step judges one prompt; only the first record has a solution. The second's rewards are None."""
    with manager(Prompts(), r={"function": f"{own}:solved", "retries": 0}) as judge:
        for step, record in enumerate(RECORDS, 1):
            group = [trajectory_of(record, text("plan", "x"), member=m) for m in (0, 1)]
            report = judge.score([group], step)
            assert not report.failures
            assert [t.reward for t in group] == ([0.0, 1.0] if "solution" in record else [None, None])
            if step == 2:
                break


@pytest.mark.parametrize(
    "part, words",
    [
        (
            {"function": "own.py:asks"},
            "reward 'r' asks for 'solutoin', which is no column of the records; did you mean 'solution'",
        ),
        ({"function": "own.py:make", "factory": True, "options": {"step": 1}}, "reward 'r' asks for 'prompt'"),
        (
            {"function": "answer"},
            "rewards.parts.r: 'answer' reads the column 'ground_truth' (option gold), which no record",
        ),
        ({"function": "answer", "options": {"gold": "soluton"}}, "reads the column 'soluton' (option gold)"),
        ({"function": "geneval"}, "'geneval' reads the column 'include', which no record has"),
        ({"function": "answer", "options": {"gold": "solution", "kind": "exactly"}}, "answer: no kind 'exactly'"),
        (
            {"function": "box_iou", "options": {"gold": "solution", "policy_size": "seen"}},
            "'box_iou' reads the column 'seen' (option policy_size), which no record has; Known: solution",
        ),
    ],
)
def test_a_column_that_no_record_has_is_refused_at_the_start(own, monkeypatch, part, words):
    monkeypatch.chdir(Path(own).parent)
    with pytest.raises(UserError) as caught:
        manager(Prompts(), r=part)
    assert words in str(caught.value)


def test_what_can_be_given_is_taken(own):
    for part in (
        {"function": f"{own}:solved"},
        {"function": f"{own}:optional"},
        {"function": f"{own}:asks", "options": {"solutoin": 3}},
        {"function": "answer", "options": {"gold": "solution"}},
    ):
        manager(Prompts(), r=part).close()
    # A column of the held-out split alone is one too; without a task nothing is known.
    manager(Prompts([{"prompt": "p"}, {"prompt": "q", "solution": 1}]), r={"function": f"{own}:solved"}).close()
    manager(None, r={"function": f"{own}:asks"}).close()


@pytest.mark.parametrize("reward", REWARDS.values(), ids=lambda reward: reward.name)
def test_the_columns_of_our_own_are_options_or_what_they_say_they_read(reward):
    parameters = inspect.signature(reward.load()).parameters
    for column in reward.columns:
        if column in parameters:
            assert parameters[column].default in reward.inputs or reward.inputs.startswith("as vital")
        else:
            assert column == "include" and "GenEval's schema" in reward.inputs
    # Every option that names a column is known to do so.
    named = [p for p, parameter in parameters.items() if parameter.default == "ground_truth" or p.endswith("_column")]
    assert set(named) <= set(COLUMN_OPTIONS)


def test_the_contract_names_what_it_gives():
    assert set(ARGUMENTS) <= {*RESERVED, "judge"}


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={run}"]) == 0
    return run / "sft/model"


def recipe(folder: Path, function: str) -> list[str]:
    (folder / "own.py").write_text(OWN)
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return [
        QUICKSTART,
        *SMALL,
        "task={dataset: {path: rows.jsonl, heldout_share: 0.0}}",
        f"rewards={{parts: {{r: {{function: 'own.py:{function}'}}}}, none_limit: 9}}",
        "grpo.segment_reward_weights={}",
        "grpo.steps=4",
        "grpo.prompts_per_step=1",
        "grpo.num_generations=2",
        "grpo.warmup_steps=0",
        "rollout.max_tokens=40",
        f"run_dir={folder}/grpo",
    ]


def test_a_run_over_records_of_which_some_lack_the_column_ends_well(warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["grpo", *recipe(tmp_path, "solved"), "--weights", str(warm)]) == 0
    unjudged = [row["reward/none"] for row in read_metrics(tmp_path / "grpo/metrics.jsonl")]
    assert sorted(unjudged) == [0.0, 1.0, 1.0, 1.0]


def test_the_dry_run_and_the_start_refuse_alike(capsys, warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in (["--dry-run"], ["--weights", str(warm)]):
        said = refused(capsys, "grpo", *recipe(tmp_path, "asks"), *more)
        assert "asks for 'solutoin', which is no column of the records; did you mean 'solution'" in said
    assert not (tmp_path / "grpo/metrics.jsonl").exists()


def test_stored_thoughts_are_tried_with_their_own_columns(capsys, tmp_path, monkeypatch):
    """A recipe's task may have other columns than the thoughts that a reward is tried on."""
    monkeypatch.chdir(tmp_path)
    arguments = recipe(tmp_path, "asks")
    thoughts = [
        trajectory_of({"prompt": "p", "solutoin": 1}, text("plan", "x"), group=g, member=m)
        for g in (0, 1)
        for m in (0, 1)
    ]
    save_trajectories(thoughts, tmp_path / "stored")
    assert main(["rewards", "try", *arguments, "--trajectories", "stored", "--out", "page.html"]) == 0
    monkeypatch.setitem(RECORDS[0], "solutoin", 1)
    save_trajectories([trajectory_of({"prompt": "p"}, text("plan", "x"))], tmp_path / "other")
    said = refused(capsys, "rewards", "try", *recipe(tmp_path, "asks"), "--trajectories", "other")
    assert "asks for 'solutoin', which is no column of the records" in said
