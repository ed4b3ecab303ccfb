"""Dynamic sampling: groups without variance are replaced by those of the next prompts, within a bound."""

from __future__ import annotations

import numpy as np
import pytest

import rl.grpo
from record.trajectory import Trajectory
from rl.ledger import Ledger, LedgerError
from rl.prompts import PromptCursor
from rl.rounds import merged, rollout_and_score
from runtime.errors import UserError
from tests.test_grpo import CodeJudge, Judged, lines, make
from training import checkpoint


class FlatFor(CodeJudge):
    """Pays every member of some groups the same, and the members of the others by their number."""

    def __init__(self, flat, **at):
        super().__init__(**at)
        self.flat, self.rounds = flat, []

    def begin(self, step, sizes, counted=True):
        self.rounds.append((step, counted, len(sizes)))
        return super().begin(step, sizes, counted)

    def score(self, groups, step=0):
        if step in self.at:
            self.at[step]()
        for group in groups:
            for trajectory in group:
                trajectory.reward = 1.0 if trajectory.group in self.flat else float(trajectory.member)
        rewards = [t.reward for group in groups for t in group]
        return Judged({"reward/mean": float(np.mean(rewards))} if rewards else {})


def rolled(tmp_path, flat, fail=(), **config):
    run = make(tmp_path, FlatFor(flat), fail, prompts_per_step=4, num_generations=2, **config)
    cursor = PromptCursor(run.prompts, run.seed)
    return run, cursor, *rollout_and_score(run, cursor, 1)


def test_groups_without_variance_are_replaced_until_enough_can_be_trained_on(tmp_path):
    # Round 0 asks for groups 0 to 3, of which 1 and 2 are flat; round 1 for 4 and 5, of which 4 is; round 2 for 6.
    run, cursor, ledger, metrics = rolled(tmp_path, {1, 2, 4}, max_rollout_rounds=5)
    assert run.reward_manager.rounds == [(1, True, 4), (1, False, 2), (1, False, 1)]
    assert [group[0].group for group in ledger.trained] == [0, 3, 5, 6]
    assert (ledger.groups_in, ledger.dropped, ledger.replaced) == (7, {"zero_variance": 3}, {"zero_variance": 3})
    assert cursor.taken == 7
    assert metrics["groups/in"] == 7 and metrics["groups/replaced/zero_variance"] == 3
    assert metrics["rollout/rounds"] == 3


def test_the_bound_holds_and_what_is_left_is_dropped(tmp_path):
    run, cursor, ledger, metrics = rolled(tmp_path, set(range(100)), max_rollout_rounds=3)
    assert run.reward_manager.rounds == [(1, True, 4), (1, False, 4), (1, False, 4)]
    assert ledger.trained == [] and ledger.dropped == {"zero_variance": 12}
    assert ledger.replaced == {"zero_variance": 8}  # the last four in vain: nothing came in their place
    assert cursor.taken == 12


def test_groups_that_failed_are_replaced_too(tmp_path):
    _, _, ledger, metrics = rolled(tmp_path, {0}, fail={1}, max_rollout_rounds=2)
    assert ledger.replaced == {"failed": 1, "zero_variance": 1} == ledger.dropped
    assert len(ledger.trained) == 4 and metrics["groups/dropped/failed"] == 1


def test_one_round_replaces_nothing_and_says_nothing_of_it(tmp_path):
    _, cursor, ledger, metrics = rolled(tmp_path, {0, 1})
    assert len(ledger.trained) == 2 and cursor.taken == 4
    assert not [name for name in metrics if "replaced" in name or "rounds" in name]


def test_more_replaced_than_dropped_is_a_bug():
    with pytest.raises(LedgerError, match="2 groups replaced for zero_variance, but 1 dropped"):
        Ledger(1, [], {"zero_variance": 1}, {"zero_variance": 2}).check()


def test_metrics_of_rounds_add_up_or_are_means_by_trajectories():
    first = {"reward/mean": 1.0, "time/rollout": 2.0, "rollout/tokens": 100.0, "rollout/tokens_per_s": 50.0, "a": 3.0}
    second = {"reward/mean": 0.0, "time/rollout": 1.0, "rollout/tokens": 20.0, "rollout/tokens_per_s": 20.0}
    together = merged([(6, first), (2, second)])
    assert together["reward/mean"] == 0.75  # (6 * 1 + 2 * 0) / 8
    assert together["time/rollout"] == 3.0 and together["rollout/tokens"] == 120.0
    assert together["rollout/tokens_per_s"] == 40.0 and together["a"] == 3.0
    assert merged([(6, first)]) == first
    assert "reward/mean" not in merged([(0, {"reward/mean": 1.0}), (0, {})])


def test_a_run_that_replaces_and_is_resumed_is_the_same_run(tmp_path):
    flat, config = set(range(0, 200, 3)), {"prompts_per_step": 4, "max_rollout_rounds": 3, "steps": 6, "save_every": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rl.grpo.train(make(whole, FlatFor(flat), **config))

    def crash():
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        rl.grpo.train(make(broken, FlatFor(flat, s6=crash), **config))
    rl.grpo.train(make(broken, FlatFor(flat), **config), checkpoint.latest(broken / "checkpoints"))
    assert lines(broken) == lines(whole)
    assert sum(row.get("groups/replaced/zero_variance", 0) for row in lines(whole)) > 0


# ---- the order of prompts ----


def test_prompts_come_in_their_own_order_where_they_are_not_shuffled():
    records = [{"prompt": str(n)} for n in range(3)]
    cursor = PromptCursor(records, seed=0, shuffle=False)
    assert [r["prompt"] for _, r in cursor.take(7)] == ["0", "1", "2", "0", "1", "2", "0"]
    again = PromptCursor(records, seed=0, shuffle=False)
    again.load(cursor.state())
    assert again.take(1) == [(7, {"prompt": "1"})]


def test_a_changed_set_of_prompts_is_gone_on_with_by_name_alone():
    cursor = PromptCursor([{"prompt": str(n)} for n in range(4)], seed=0)
    cursor.take(6)
    mended = PromptCursor([{"prompt": str(n)} for n in range(1, 4)], seed=0)
    with pytest.raises(UserError, match="or go on with the new prompts by --changed-prompts"):
        mended.load(cursor.state())
    mended.load(cursor.state(), changed=True)
    groups = [group for group, _ in mended.take(3)]
    assert groups == [6, 7, 8]  # numbered on: no noise is drawn twice
    with pytest.raises(UserError, match="has seed 0, not 1"):
        PromptCursor(mended.records, seed=1).load(cursor.state(), changed=True)


def test_a_ledger_says_what_was_not_trained_on():
    ledger = Ledger(3, [[Trajectory("", {}, "f", [])]], {"failed": 2}, {"failed": 1})
    assert ledger.metrics()["groups/replaced/failed"] == 1
