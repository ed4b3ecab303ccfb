"""Candidates at states in a whole run: which states, whose baseline, whose account, and the same run on resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import rl.grpo
from formats.registry import get_format
from formats.roles import check_roles
from record.store import load_trajectories
from record.trajectory import Author, Modality, Segment, Trajectory
from rl.advantages import compute_advantages
from rl.config import ForkConfig, GrpoConfig
from rl.forks import fork_requests, shown_first, states
from rl.rounds import with_added
from rollout.pool.contract import FailedGroup
from runtime.errors import UserError
from tests.test_grpo import lines
from tests.test_grpo_chameleon import CodeJudge, make
from training import checkpoint

PLAIN = GrpoConfig(scale_rewards="none")
BY_SEGMENT = GrpoConfig(scale_rewards="none", advantage_level="segment")


def thought(member: int, reward: float | None, roles=("plan", "sketch"), parent=None, group: int = 0) -> Trajectory:
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False, np.arange(2, dtype=np.int32))]
    for role in roles:
        trained = parent is None or len(segments) >= parent[1]
        modality = Modality.IMAGE_TOKENS if role == "sketch" else Modality.TEXT
        segments.append(Segment(role, Author.POLICY, modality, trained, np.arange(3, dtype=np.int32)))
    return Trajectory("p", {}, "strokes", segments, group, member, reward=reward, parent=parent)


def advantages(group) -> list[list[float]]:
    return [[round(float(a), 6) for a in t.advantage_S] for t in group]


# ---- baselines, by hand ----


@pytest.mark.parametrize("config", [PLAIN, BY_SEGMENT], ids=["by trajectory", "by segment"])
def test_a_baseline_is_over_the_members_of_one_state(config):
    """Trunk 1, 0: mean 0.5. Two states of member 0, after the plan (segment 1) and after the sketch (segment 2)."""
    plan, sketch = (0, 2), (0, 3)
    group = [
        thought(0, 1.0, ("plan", "sketch", "inspect")),
        thought(1, 0.0, ("plan", "sketch", "inspect")),
        thought(2, 0.9, parent=plan),  # of 0.9, 0.3, 0.0: mean 0.4
        thought(3, 0.3, parent=plan),
        thought(4, 0.0, parent=plan),
        thought(5, 0.2, ("plan", "sketch", "inspect"), sketch),  # of 0.2, 0.8: mean 0.5
        thought(6, 0.8, ("plan", "sketch", "inspect"), sketch),
    ]
    ledger = compute_advantages([group], config)
    assert advantages(group) == [
        [0, 0.5, 0.5, 0.5],
        [0, -0.5, -0.5, -0.5],
        [0, 0, 0.5],
        [0, 0, -0.1],
        [0, 0, -0.4],
        [0, 0, 0, -0.3],
        [0, 0, 0, 0.3],
    ]
    assert (ledger.groups_in, len(ledger.trained)) == (1, 1)
    # The same sets as groups of their own, as a run has them, give the same, and each is accounted for.
    ledger = compute_advantages([group[:2], group[2:5], group[5:]], config)
    assert advantages(group)[3] == [0, 0, -0.1] and advantages(group)[6] == [0, 0, 0, 0.3]
    assert (ledger.groups_in, len(ledger.trained)) == (3, 3)


@pytest.mark.parametrize("config", [PLAIN, BY_SEGMENT], ids=["by trajectory", "by segment"])
def test_a_state_with_fewer_than_two_judged_members_teaches_nothing(config):
    group = [
        thought(0, 1.0),
        thought(1, 0.0),
        thought(2, 0.9, parent=(0, 2)),  # alone: its only sibling is unjudged
        thought(3, None, parent=(0, 2)),
        thought(4, 0.4, parent=(1, 2)),  # of 0.4, 0.8 (the unjudged one leaves the baseline): mean 0.6
        thought(5, 0.8, parent=(1, 2)),
        thought(6, None, parent=(1, 2)),
    ]
    compute_advantages([group], config)
    assert advantages(group)[2:] == [[0, 0, 0], [0, 0, 0], [0, 0, -0.2], [0, 0, 0.2], [0, 0, 0]]
    # Two judged members of different states are no group: there is nothing that they could be compared with.
    ledger = compute_advantages([[thought(0, 1.0), thought(1, 0.0, parent=(0, 2))]], config)
    assert ledger.dropped == {"unjudged": 1}


@pytest.mark.parametrize("level", ["trajectory", "segment"])
def test_a_state_has_its_own_standard_deviation(level):
    group = [thought(0, 1.0), thought(1, 0.0), thought(2, 0.2, parent=(0, 2)), thought(3, 0.1, parent=(0, 2))]
    compute_advantages([group], GrpoConfig(advantage_level=level))
    # 0.5 and 0.05 each side of the mean; deviations (divisor 1) 0.5 * 2 ** 0.5 and 0.05 * 2 ** 0.5
    assert advantages(group)[0][1] == pytest.approx(0.5 / (0.5 * 2**0.5 + 1e-4), abs=1e-5)
    assert advantages(group)[2][2] == pytest.approx(0.05 / (0.05 * 2**0.5 + 1e-4), abs=1e-5)


def test_a_credited_segment_is_compared_within_its_state():
    """The parts that credit segments too: 3 and 1 on the candidates' sketches, mean 2; 9 on the parent's."""
    group = [thought(0, 0.0), thought(1, 0.0), thought(2, 0.0, parent=(0, 2)), thought(3, 0.0, parent=(0, 2))]
    for trajectory, value in zip(group, (9.0, 9.0, 3.0, 1.0), strict=True):
        trajectory.segment_rewards = {"step": {2: value}}
    compute_advantages([group], BY_SEGMENT)
    assert advantages(group) == [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, -1]]


# ---- which states ----


def test_states_are_where_the_policy_began_a_role():
    trajectory = thought(0, 1.0, ("plan", "sketch", "inspect", "sketch"))
    assert states(trajectory, ForkConfig(roles=["sketch"])) == [2, 4]
    assert states(trajectory, ForkConfig(roles=["sketch", "plan"], occurrences=2)) == [1, 2]
    assert states(trajectory, ForkConfig(roles=["refine"])) == []


def test_candidates_are_numbered_on_from_the_group():
    groups = [[thought(m, 1.0, ("plan", "sketch", "sketch"), group=g) for m in range(3)] for g in (4, 5)]
    asked = fork_requests(groups, ForkConfig(roles=["sketch"], candidates=2, members=2))
    assert [(r.group, r.parent, r.members) for r in asked[:4]] == [
        (4, (0, 2), (3, 4)),
        (4, (0, 3), (5, 6)),
        (4, (1, 2), (7, 8)),
        (4, (1, 3), (9, 10)),
    ]
    assert [r.group for r in asked[4:]] == [5] * 4 and len(asked[1].prefix) == 3


def test_a_candidate_is_shown_after_its_parent():
    groups = [[thought(m, 1.0, group=g) for m in range(2)] for g in range(2)]
    sets = [[thought(m, 1.0, parent=(0, 2), group=g) for m in (2, 3)] for g in range(2)]
    assert [t.key for t in shown_first(groups, sets)] == ["0-0", "0-2", "1-0", "1-2", "0-1", "0-3", "1-1", "1-3"]
    assert groups[0][0].continues == "" and sets[0][0].continues == "continues member 0 after segment 1"


def test_counts_are_added_up_and_means_are_of_what_began_at_a_prompt():
    trunk = {"rollout/tokens": 10.0, "time/rollout": 2.0, "reward/mean": 0.5, "rollout/mean_rows": 3.0}
    forks = {"rollout/tokens": 20.0, "time/rollout": 1.0, "reward/mean": 0.9, "forks/in": 2.0, "rollout/mean_rows": 9.0}
    assert with_added(trunk, forks) == {
        "rollout/tokens": 30.0,
        "time/rollout": 3.0,
        "reward/mean": 0.5,
        "rollout/mean_rows": 3.0,
        "forks/in": 2.0,
        "rollout/tokens_per_s": 10.0,
    }
    assert with_added(trunk, {}) == trunk


def test_a_role_that_is_none_is_named_and_one_candidate_is_none():
    with pytest.raises(UserError, match="grpo.fork.roles: the format 'strokes' has no role 'sketsh'.*sketch"):
        check_roles(GrpoConfig(fork={"roles": ["sketsh"]}), get_format("strokes"), "grpo.")
    check_roles(GrpoConfig(fork={"roles": ["sketch", "plan"]}), get_format("strokes"), "grpo.")
    with pytest.raises(
        UserError, match="fork.roles: in the role 'crop' .* the environment speaks.* plan, sketch, look"
    ):
        check_roles(GrpoConfig(fork={"roles": ["inspect", "crop"]}), get_format("look"), "grpo.")
    for wrong in ({"roles": ["sketch"], "candidates": 1}, {"roles": []}, {}):
        with pytest.raises(ValidationError):
            ForkConfig(**wrong)


# ---- a run ----

FORK = {"roles": ["sketch", "refine"], "candidates": 3, "members": 2}


class PowerCut(Exception):
    pass


class Stops(CodeJudge):
    """Its third step's candidates are never judged."""

    def __init__(self):
        self.calls = 0

    def score(self, groups, step=0):
        self.calls += 1
        if step == 3 and groups[0][0].parent is not None:
            raise PowerCut
        return super().score(groups, step)


def forked(folder: Path):
    return make(folder, fork=FORK, steps=3)


def test_a_run_that_forks_accounts_for_every_set_and_resumes_as_the_same(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = forked(whole)
    run.show_every = 1
    trainer = rl.grpo.train(run)
    rows = lines(whole)
    assert all(row["on_policy_gap"] < 1e-4 for row in rows)
    assert sum(row["forks/in"] for row in rows) > 2
    for row in rows:
        dropped = sum(value for name, value in row.items() if name.startswith("groups/dropped/"))
        assert row["groups/in"] == 2 + row["forks/in"] == row["groups/trained"] + dropped
        assert row["forks/candidates"] == 3 * row["forks/in"]
        assert row["rollout/trajectories"] == 2 * 4 + row["forks/candidates"]
    assert sum(row["forks/trained"] for row in rows) > 0
    stored = [t for step in (1, 2, 3) for t in load_trajectories(whole / "trajectories" / f"{step:06d}")]
    children = [t for t in stored if t.parent is not None]
    assert children and all(t.segments[t.parent[1]].role for t in children)
    for child in children:
        parent = next((t for t in stored if t.key == f"{child.group}-{child.parent[0]}"), None)
        assert child.member >= 4 and not any(s.trained for s in child.segments[: child.parent[1]])
        if parent is not None:
            for own, theirs in zip(child.segments[: child.parent[1]], parent.segments, strict=False):
                assert own.ids.tolist() == theirs.ids.tolist()

    run = forked(broken)
    run.reward_manager = Stops()
    with pytest.raises(PowerCut):
        rl.grpo.train(run)
    resumed = rl.grpo.train(forked(broken), checkpoint.latest(broken / "checkpoints"))
    assert lines(broken) == rows
    for (name, p), (_, q) in zip(
        trainer.policy.model.named_parameters(), resumed.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def test_sets_that_never_came_back_and_replaced_groups_are_in_the_account(tmp_path):
    run = make(tmp_path, fork={**FORK, "occurrences": 1}, steps=2, max_rollout_rounds=3)
    generate = run.rollouts.generate

    def loses_one_set(requests, timeout_s=None, each=None):
        if requests[0].parent is None:
            return generate(requests, timeout_s, each)
        result = generate(requests[1:], timeout_s, each and (lambda index, group: each(index + 1, group)))
        return replace(result, failed=[FailedGroup(0, requests[0].group, "crash", "out of memory")])

    run.rollouts.generate = loses_one_set
    rl.grpo.train(run)
    for row in lines(tmp_path):
        dropped = sum(value for name, value in row.items() if name.startswith("groups/dropped/"))
        replaced = sum(value for name, value in row.items() if name.startswith("groups/replaced/"))
        assert row["groups/dropped/failed"] == 1 and row["forks/in"] > 1
        assert row["groups/in"] == 2 + replaced + row["forks/in"] == row["groups/trained"] + dropped
        assert row["forks/candidates"] == 3 * (row["forks/in"] - 1)
