"""A GRPO run whose judge is an endpoint on loopback where one call in ten hangs and one in ten fails."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from judge_server import Answer, JudgeServer

import rl.grpo
from rewards.config import RewardsConfig
from rewards.manager import RewardManager
from tests.test_grpo import lines, make

STEPS, PROMPTS, MEMBERS = 4, 3, 4
AT_START = 2  # questions before the run
REWARD = """
from rewards.judge.base import AnswerCheck

def right(trajectories, judge):
    said = judge.agrees([AnswerCheck(t.prompt, t.segments[-1].text, "a low word") for t in trajectories])
    return [None if verdict is None else float(verdict) for verdict in said]
"""


class Troubled:
    """Says yes to words 8 and 9. Of every ten calls the fourth hangs and the eighth gives 500; keeps what became of
    the last attempt at each question."""

    def __init__(self):
        self.last, self.hung, self.failed = {}, 0, 0

    def __call__(self, body, number):
        asked = re.search(r"said (\d+) in (\d+-\d+)", json.dumps(body))
        if asked is None:  # before the run
            return "yes"
        word, question = asked.groups()
        if number % 10 == 3:
            self.hung += 1
            self.last[question] = None
            return Answer(stall_s=60)
        if number % 10 == 7:
            self.failed += 1
            self.last[question] = None
            return Answer(status=500)
        self.last[question] = float(int(word) <= 9)
        return "yes" if int(word) <= 9 else "no"


def run_with(folder, server, retries):
    (folder / "asks.py").write_text(REWARD)
    config = RewardsConfig.model_validate(
        {
            "parts": {"right": {"function": f"{folder / 'asks.py'}:right", "scope": "row"}},
            "judge": {
                "base_url": server.url,
                "model": "judge",
                "timeout_s": 1.5,
                "retries": retries,
                "backoff_s": 0.05,
            },
        }
    )
    kept = []
    with RewardManager(config) as manager:
        run = make(
            folder / "run",
            manager,
            steps=STEPS,
            prompts_per_step=PROMPTS,
            num_generations=MEMBERS,
            evaluate_every=None,
            save_every=100,
        )
        sample, generate = run.policy.sample, run.rollouts.generate

        def talking(*arguments):
            trajectory = sample(*arguments)
            trajectory.segments[-1].text = f"said {trajectory.segments[-1].ids[0]} in {trajectory.key}"
            return trajectory

        def checkpoint_on_error(*arguments, **more):
            kept.append(generate(*arguments, **more))
            return kept[-1]

        run.policy.sample, run.rollouts.generate = talking, checkpoint_on_error
        rl.grpo.train(run)
    return [result.groups for result in kept], lines(folder / "run")


@pytest.mark.parametrize("retries", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_judge_that_hangs_and_fails_leaves_rows_unjudged_and_never_at_zero(tmp_path, retries):
    answer = Troubled()
    with JudgeServer(answer) as server:
        steps, rows = run_with(tmp_path, server, retries)
        requests = len(server.requests)
    asked = STEPS * PROMPTS * MEMBERS
    assert len(rows) == STEPS and answer.hung >= 5 and answer.failed >= 5
    assert len(answer.last) == asked == sum(row["judge/asked"] for row in rows)

    # Every trajectory has what the judge said of it; where it said nothing, no reward and no advantage.
    for groups, row in zip(steps, rows, strict=True):
        every = [t for group in groups for t in group]
        for t in every:
            assert t.rewards == {"right": answer.last[t.key]} and t.reward == answer.last[t.key]
            if t.reward is None:
                assert not t.advantage_S.any()
        unjudged = sum(t.reward is None for t in every)
        assert row["reward/none"] == row["reward/right/none"] == pytest.approx(unjudged / len(every))
        assert row["judge/unjudged"] * row["judge/asked"] == pytest.approx(unjudged)
        judged = [t.reward for t in every if t.reward is not None]
        assert row["reward/mean"] == pytest.approx(np.mean(judged))
        # The ledger: dropped are the groups with fewer than two judged members, and those that all earned the same.
        values = [[t.reward for t in group if t.reward is not None] for group in groups]
        few = [group for group in values if len(group) < 2]
        same = [group for group in values if len(group) >= 2 and len(set(group)) == 1]
        assert row["groups/dropped/unjudged"] == len(few) and row["groups/dropped/zero_variance"] == len(same)
        assert row["groups/trained"] == PROMPTS - len(few) - len(same) and row["groups/in"] == PROMPTS

    # The counts are the server's own.
    failures = answer.hung + answer.failed
    retried = sum(row["judge/retried"] for row in rows)
    assert requests == AT_START + asked + retried
    assert sum(row["judge/unjudged"] * row["judge/asked"] for row in rows) == pytest.approx(failures - retried)
    if not retries:
        assert retried == 0
        for cause, count in (("timeout", answer.hung), ("server", answer.failed)):
            shares_weights = [row.get(f"judge/unjudged/{cause}", 0) for row in rows]
            assert sum(shares_weights) * PROMPTS * MEMBERS == pytest.approx(count)
    else:
        assert retried > 0 and sum(value is not None for value in answer.last.values()) > asked - failures
    assert all(row["reward/right/failed"] == 0 for row in rows)  # the part itself did its duty
    assert any(row["groups/trained"] for row in rows)
