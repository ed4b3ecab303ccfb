"""Runs whose steps train nothing: what they say, when, and how they stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import rl.grpo
from record.trajectory import StopReason
from rewards.alarms import AlarmRaised
from rl.advantages import compute_advantages
from rl.batches import drop_untrainable
from rl.config import GrpoConfig
from rl.idle import IdleSteps
from tests.bigram import BigramPolicy, sampled_groups
from tests.test_grpo import CodeJudge, lines, make
from training import checkpoint


@dataclass
class Same(CodeJudge):
    """Pays every member the same but in `steps`, where it pays as CodeJudge; `stop` is how every member ended."""

    steps: tuple[int, ...] = ()
    value: float | None = 0.5
    stop: StopReason = StopReason.END
    at = {}

    def score(self, groups, step=0):
        judged = super().score(groups, step)
        for group in groups:
            for trajectory in group:
                trajectory.stop = self.stop
                if step not in self.steps:
                    trajectory.reward = self.value
        return judged


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "rl.idle"]


def test_steps_without_variance_are_told_at_3_at_6_and_at_the_end(tmp_path, caplog):
    rl.grpo.train(make(tmp_path, Same(), steps=8))
    assert said(caplog) == [
        "step 3: 3 steps in a row trained nothing: of 9 groups 9 zero_variance (every member earned the same)",
        "step 6: 6 steps in a row trained nothing: of 18 groups 18 zero_variance (every member earned the same)",
        "8 of 8 steps trained nothing, and the weights are those that the run started from: of 24 groups 24 "
        "zero_variance (every member earned the same)",
    ]


def test_the_reasons_are_counted(tmp_path, caplog):
    # 3 prompts a step: groups 1 and 5 fail, the others are unjudged.
    rl.grpo.train(make(tmp_path, Same(value=None, stop=StopReason.MAX_TOKENS), fail={1, 5}, steps=3))
    why = "of 9 groups 7 unjudged (fewer than two members have a reward), 2 failed (the rollouts never came back whole)"
    assert said(caplog) == [
        f"step 3: 3 steps in a row trained nothing: {why}; 100% of the members hit a limit (rollout.max_tokens, say)",
        f"3 of 3 steps trained nothing, and the weights are those that the run started from: {why}",
    ]


def test_a_step_that_trains_begins_the_count_anew(tmp_path, caplog):
    rl.grpo.train(make(tmp_path, Same(steps=(3, 4, 8)), steps=8))
    # Steps 1, 2 and 5, 6, 7 are idle: told once, and the account at the end has them all.
    assert said(caplog) == [
        "step 7: 3 steps in a row trained nothing: of 9 groups 9 zero_variance (every member earned the same)",
        "5 of 8 steps trained nothing: of 15 groups 15 zero_variance (every member earned the same)",
    ]


def test_a_run_that_learns_says_nothing(tmp_path, caplog):
    rl.grpo.train(make(tmp_path, Same(steps=(1, 3, 5, 7, 8)), steps=8))
    assert said(caplog) == []


def test_a_limit_saves_the_run_and_stops_it(tmp_path, caplog):
    with pytest.raises(AlarmRaised) as raised:
        rl.grpo.train(make(tmp_path, Same(steps=(1,)), idle_limit=4, save_every=100))
    assert raised.value.exit_code == 2
    sentence = str(raised.value)
    assert sentence.startswith("stopped after step 5 of 8 by grpo.idle_limit: 4 steps in a row trained nothing: of 12 ")
    assert sentence.endswith(
        f"Saved in {tmp_path}/checkpoints/step-000005; to go on regardless, raise grpo.idle_limit and give the same "
        "command with --resume"
    )
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]
    # The resumed run knows of the four: with the same limit it stops at once, with a higher one after two more.
    newest = checkpoint.latest(tmp_path / "checkpoints")
    with pytest.raises(AlarmRaised, match="after step 7 of 8 by grpo.idle_limit: 6 steps in a row trained nothing"):
        rl.grpo.train(make(tmp_path, Same(), idle_limit=6, keep_checkpoints=9), newest)
    with pytest.raises(AlarmRaised, match="after step 6 of 8 by grpo.idle_limit: 5 steps in a row"):
        rl.grpo.train(make(tmp_path, Same(), idle_limit=4), newest)


def test_groups_of_which_nothing_may_be_trained_are_no_trained_groups(tmp_path, caplog):
    config = dict(mask_truncated_completions=True, steps=3)
    trainer = rl.grpo.train(make(tmp_path, Same(steps=(1, 2, 3), stop=StopReason.MAX_TOKENS), **config))
    assert trainer.version == 0
    for row in lines(tmp_path):
        assert row["groups/trained"] == 0 and row["groups/cut_off"] == 1
        assert row["groups/dropped/cut_off"] + row["groups/dropped/zero_variance"] == 3
    assert "cut_off (all members hit a limit, and grpo.mask_truncated_completions leaves those out)" in said(caplog)[0]


def test_a_group_of_greedy_decisions_is_dropped_as_one():
    config = GrpoConfig()
    groups = sampled_groups(BigramPolicy(), groups=2, members=2)
    for group in groups:
        group[0].reward, group[1].reward = 1.0, 0.0
    for trajectory in groups[1]:
        for segment in trajectory.segments[1:]:
            segment.decisions.sampling.temperature_N[:] = 0
    ledger = compute_advantages(groups, config)
    drop_untrainable(ledger, config)
    assert ledger.trained == [groups[0]] and ledger.dropped == {"greedy": 1}
    assert groups[0][0].advantage_S.any() and not any(np.any(t.advantage_S) for t in groups[1])


def test_told_at_doublings_of_three(caplog):
    idle = IdleSteps()
    row = {"optimizer_steps": 0.0, "groups/dropped/unjudged": 2.0}
    for step in range(1, 101):
        idle.after(step, row)
    assert [int(message.split(":")[0].removeprefix("step ")) for message in said(caplog)] == [3, 6, 12, 24, 48, 96]


def test_a_group_that_was_cut_off_is_replaced_where_there_are_rounds(tmp_path):
    config = dict(mask_truncated_completions=True, steps=1, max_rollout_rounds=2)
    rl.grpo.train(make(tmp_path, Same(steps=(1,), stop=StopReason.MAX_TOKENS), **config))
    [row] = lines(tmp_path)
    assert row["groups/in"] == 6 and row["groups/trained"] == 0
    assert sum(value for name, value in row.items() if name.startswith("groups/replaced/")) == 3
    assert row["groups/replaced/cut_off"] > 0
