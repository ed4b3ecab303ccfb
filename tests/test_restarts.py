"""Groups that begin from stored pictures: which these are, what is paid, whose account, the same run on resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import rl.grpo
from formats.registry import get_format
from formats.roles import check_roles
from record.store import load_trajectories
from record.trajectory import Author, Modality, Segment, Trajectory
from rl.config import GrpoConfig, RestartConfig
from rl.restart_buffer import RestartBuffer
from rl.restarts import first_picture, measured, pay, restart_requests, restarts_in, worth
from rollout.pool.contract import FailedGroup, check_requests
from runtime.errors import UserError
from tests.test_grpo import lines
from tests.test_grpo_chameleon import CodeJudge, make
from training import checkpoint

SKETCH = RestartConfig(roles=["sketch"])


# ---- what a restarted thought is paid, by hand ----


@pytest.mark.parametrize(
    "picture, result, left, paid",
    [
        (0.4, 0.9, False, 0.5),  # redrawn and better
        (0.4, 0.1, False, -0.3),  # redrawn and worse
        (0.4, 0.4, False, 0.0),  # redrawn, no better
        (0.4, 0.4, True, -0.6),  # left though it lacks .6: worse than to try, and not the safe 0
        (0.9, 0.9, True, -0.1),
        (1.0, 1.0, True, 1.0),  # rightly left
        (1.0, 1.0, False, 1.0),  # rightly left by redrawing it as well
        (1.0, 0.25, False, 0.25),  # spoilt
        (None, 0.5, False, None),  # what nobody judged is no 0
        (0.5, None, False, None),
        (1.0, None, True, None),
    ],
)
def test_pay_by_hand(picture, result, left, paid):
    found = worth(picture, result, left, 1.0)
    assert found is None if paid is None else found == pytest.approx(paid)


unit = st.floats(0, 1).map(lambda x: round(x, 3))


@given(unit, unit)
def test_leaving_is_never_better_than_redrawing_as_well_and_a_better_result_never_worse(picture, result):
    assert worth(picture, picture, True, 1.0) <= worth(picture, picture, False, 1.0)
    assert worth(picture, result, False, 1.0) <= worth(picture, min(1.0, result + 0.1), False, 1.0)
    if picture < 1:
        assert worth(picture, picture, True, 1.0) < 0


def thought(member: int, *roles: str, group: int = 0, reward: float | None = None, parent=None) -> Trajectory:
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False, np.arange(2, dtype=np.int32))]
    for role in roles:
        image = np.zeros((2, 2, 3), np.uint8) if role in ("sketch", "redraw") else None
        modality = Modality.TEXT if image is None else Modality.IMAGE_TOKENS
        segments.append(Segment(role, Author.POLICY, modality, True, np.arange(3, dtype=np.int32), image=image))
    return Trajectory(f"p{group}", {}, "strokes", segments, group, member, reward=reward, parent=parent)


def test_a_thought_is_paid_by_what_it_drew_itself():
    prefix = ("plan", "sketch")
    left = thought(0, *prefix, "inspect", parent=(3, 3), reward=0.5)
    redrawn = thought(1, *prefix, "inspect", "refine", "redraw", "inspect", parent=(3, 3), reward=0.75)
    unjudged = thought(2, *prefix, "inspect", parent=(3, 3))
    for trajectory in (left, redrawn, unjudged):
        pay(trajectory, 0.5, SKETCH)
    assert [t.reward for t in (left, redrawn, unjudged)] == [-0.5, 0.25, None]
    assert redrawn.info["restart"] == {"picture": 0.5, "result": 0.75, "left": False}
    found = measured([[left, redrawn, unjudged]])
    assert found["restart/trajectories"] == 3 and found["restart/left"] == 0.5 and found["restart/better"] == 0.5
    assert found["restart/reward"] == -0.125 and found["restart/result"] == 0.625 and found["restart/worse"] == 0
    by_part = thought(0, *prefix, "inspect", "redraw", "inspect", parent=(3, 3), reward=1.1)
    by_part.rewards = {"graded": 0.75}
    pay(by_part, 0.5, RestartConfig(roles=["sketch"], part="graded"))
    assert by_part.reward == 0.25 and by_part.info["restart"]["result"] == 0.75
    by_part.reward = None  # the total could not be judged
    pay(by_part, 0.5, RestartConfig(roles=["sketch"], part="graded"))
    assert by_part.reward is None
    as_it_is = thought(0, *prefix, "inspect", parent=(3, 3), reward=0.5)
    pay(as_it_is, 0.5, RestartConfig(roles=["sketch"], reward="result"))
    assert as_it_is.reward == 0.5


# ---- pictures ----


def test_a_picture_is_the_thought_up_to_its_first_image_of_a_role():
    whole = thought(2, "plan", "sketch", "inspect", "refine", "redraw", "inspect", group=7)
    picture = first_picture(whole, SKETCH)
    assert [s.role for s in picture.segments] == ["prompt", "plan", "sketch"] and picture.key == "7-2"
    again = first_picture(whole, RestartConfig(roles=["redraw", "refine"]))
    assert [s.role for s in again.segments][-1] == "redraw"
    assert (
        first_picture(thought(0, "plan", "sketch"), SKETCH) is None
    )  # nothing followed: the turn may have ended there
    assert first_picture(thought(0, "plan"), SKETCH) is None


def pictures(step: int, *rewards: float | None) -> list[Trajectory]:
    return [thought(m, "plan", "sketch", group=step, reward=reward) for m, reward in enumerate(rewards)]


def test_the_latest_steps_pictures_are_kept_and_unjudged_ones_are_not():
    buffer = RestartBuffer()
    buffer.add(1, pictures(1, 0.5, None), 2)
    buffer.add(2, pictures(2, 1.0), 2)
    assert [p.key for p in buffer.pictures] == ["1-0", "2-0"]
    buffer.add(3, pictures(3, None), 2)  # a step that leaves none takes no place
    buffer.add(5, pictures(5, 0.1, 0.2), 2)
    assert [p.key for p in buffer.pictures] == ["2-0", "5-0", "5-1"]


def test_perfect_pictures_are_drawn_with_their_share_and_alone_where_there_are_no_others():
    buffer = RestartBuffer()
    buffer.add(1, pictures(1, 1.0, 0.5, 0.2), 1)
    drawn = buffer.draw(4000, SKETCH, 0, 3)
    assert np.mean([p.reward == 1 for p in drawn]) == pytest.approx(0.15, abs=0.02)
    assert np.mean([p.reward == 0.5 for p in drawn]) == pytest.approx(0.425, abs=0.03)
    assert [p.key for p in drawn[:50]] == [p.key for p in buffer.draw(50, SKETCH, 0, 3)]
    assert [p.key for p in drawn[:50]] != [p.key for p in buffer.draw(50, SKETCH, 0, 4)]
    for reward in (1.0, 0.3):
        alone = RestartBuffer()
        alone.add(1, pictures(1, reward), 1)
        assert all(p.reward == reward for p in alone.draw(20, SKETCH, 0, 1))


def test_restarted_groups_have_numbers_of_their_own():
    buffer = RestartBuffer()
    buffer.add(1, pictures(1, 0.5), 1)
    config = GrpoConfig(prompts_per_step=4, num_generations=3, restart=SKETCH)
    asked = [restart_requests(buffer, 2, config, 9, step) for step in (2, 3)]
    assert [[r.group for r in requests] for requests in asked] == [[-5, -6], [-9, -10]]
    one = asked[0][0]
    assert (one.members, one.parent, one.parent_group, one.seed, len(one.prefix)) == ((0, 1, 2), (0, 3), 1, 9, 3)
    check_requests(asked[0])
    # Half of four; never all of a step; only in every second step; none without pictures.
    assert restarts_in(1, config, buffer) == 2 and restarts_in(1, config, RestartBuffer()) == 0
    every = config.model_copy(update={"restart": RestartConfig(roles=["sketch"], share=1.0, every=2)})
    assert [restarts_in(step, every, buffer) for step in (1, 2, 3, 4)] == [0, 3, 0, 3]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="a step of one prompt"):
        GrpoConfig(prompts_per_step=1, restart={"roles": ["sketch"]})
    for wrong in ({}, {"roles": []}, {"roles": ["sketch"], "share": 0}, {"roles": ["sketch"], "perfect_share": 1.5}):
        with pytest.raises(ValidationError):
            RestartConfig(**wrong)
    with pytest.raises(UserError, match="grpo.restart.roles: the format 'strokes' has no role 'sketsh'.*sketch"):
        check_roles(GrpoConfig(restart={"roles": ["sketsh"]}), get_format("strokes"), "grpo.")


# ---- a run ----

RESTART = {"roles": ["sketch"], "share": 0.5, "perfect_share": 0.3, "perfect": 0.6}


class PowerCut(Exception):
    pass


class Stops(CodeJudge):
    """Its third step's pictures are never judged by themselves."""

    def score(self, groups, step=0, counted=True):
        last = groups[0][0].segments[-1]
        if step == 3 and last.image is not None and groups[0][0].group >= 0:
            raise PowerCut
        return super().score(groups, step)


class Counted(CodeJudge):
    def score(self, groups, step=0, counted=True):
        return super().score(groups, step)


def run_of(folder: Path, judge=Counted, **config):
    run = make(folder, **{"restart": RESTART, "steps": 3, "prompts_per_step": 4, "num_generations": 3, **config})
    run.reward_manager = judge()
    return run


def test_a_run_that_restarts_accounts_for_every_group_and_resumes_as_the_same(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = run_of(whole)
    run.show_every = 1
    trainer = rl.grpo.train(run)
    rows = lines(whole)
    assert rows[0].get("restart/in", 0) == 0 and [row["restart/in"] for row in rows[1:]] == [2, 2]
    for row in rows:
        dropped = sum(value for name, value in row.items() if name.startswith("groups/dropped/"))
        assert row["groups/in"] == 4 == row["groups/trained"] + dropped
        assert row["rollout/trajectories"] == 12 and row["on_policy_gap"] < 1e-4
    assert all(0 <= row["restart/left"] <= 1 and row["restart/buffer"] > 0 for row in rows[1:])
    stored = [t for step in (1, 2, 3) for t in load_trajectories(whole / "trajectories" / f"{step:06d}")]
    restarted = [t for t in stored if t.group < 0]  # of a step the tracker keeps two members of each group
    assert len(restarted) == 8 and all(t.info["parent_group"] >= 0 and "restart" in t.info for t in restarted)
    for trajectory in restarted:
        number = trajectory.parent[1]
        assert trajectory.segments[number - 1].image is not None
        assert not any(s.trained for s in trajectory.segments[:number])
        said = trajectory.info["restart"]
        assert trajectory.reward == pytest.approx(worth(said["picture"], said["result"], said["left"], 0.6))
        parent = next((t for t in stored if t.key == f"{trajectory.info['parent_group']}-{trajectory.parent[0]}"), None)
        if parent is not None:
            assert [s.ids.tolist() for s in trajectory.segments[:number]] == [
                s.ids.tolist() for s in parent.segments[:number]
            ]

    with pytest.raises(PowerCut):
        rl.grpo.train(run_of(broken, Stops))
    newest = checkpoint.latest(broken / "checkpoints")
    kept = load_trajectories(newest / "restarts")
    assert kept and {p.info["step"] for p in kept} == {2} and all(p.reward is not None for p in kept)
    resumed = rl.grpo.train(run_of(broken), newest)
    assert lines(broken) == rows
    for (name, p), (_, q) in zip(
        trainer.policy.model.named_parameters(), resumed.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def test_restarts_beside_candidates_and_replaced_groups_and_one_that_was_lost(tmp_path):
    more = {"fork": {"roles": ["sketch"], "candidates": 2, "occurrences": 1}, "max_rollout_rounds": 2, "steps": 2}
    run = run_of(tmp_path, **more)
    generate = run.rollouts.generate

    def loses_one(requests, timeout_s=None, each=None):
        if requests[0].group >= 0:
            return generate(requests, timeout_s, each)
        result = generate(requests[1:], timeout_s, each and (lambda index, group: each(index + 1, group)))
        return replace(result, failed=[FailedGroup(0, requests[0].group, "crash", "out of memory")])

    run.rollouts.generate = loses_one
    rl.grpo.train(run)
    first, second = lines(tmp_path)
    for row in (first, second):
        dropped = sum(value for name, value in row.items() if name.startswith("groups/dropped/"))
        replaced = sum(value for name, value in row.items() if name.startswith("groups/replaced/"))
        assert row["groups/in"] == 4 + replaced + row["forks/in"] == row["groups/trained"] + dropped
    assert first["groups/dropped/failed"] == 0 and second["groups/dropped/failed"] == 1
    assert second["restart/in"] == 2 and second["restart/trajectories"] == 3
