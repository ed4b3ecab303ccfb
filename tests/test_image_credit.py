"""Credit for pictures in a whole run: what advantages gain, which account has the arms, the same run on resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import rl.grpo
from record.store import load_trajectories
from rl.advantages import compute_advantages
from rl.config import GrpoConfig, ImageCreditConfig
from rl.image_credit import ImageCredit, added_by_images, credit_images
from rl.ledger import Ledger, LedgerError
from rollout.pool.contract import FailedGroup
from tests.test_advantages import advantages, thought
from tests.test_grpo import lines
from tests.test_grpo_chameleon import CodeJudge, make
from training import checkpoint
from underdrawing.report.page import film_of

WORTH = {(0, 0): {2: 0.6, 4: -0.8}, (0, 1): {2: 0.0}}  # sketch and redraw of the first member, sketch of the second
ROLES = ("plan", "sketch", "inspect", "redraw")


def credited(**config) -> GrpoConfig:
    return GrpoConfig(**{"scale_rewards": "none", "image_credit": {"weight": 2.0}, **config})


# ---- advantages, by hand ----


def test_an_images_segment_gains_weight_times_its_worth():
    group = [thought(1.0, ROLES), thought(0.0, ROLES, member=1)]
    config = credited()
    compute_advantages([group], config, added=added_by_images(ImageCredit(WORTH), config))
    assert advantages(group)[0] == pytest.approx([0.5, 0.5 + 1.2, 0.5, 0.5 - 1.6])
    assert advantages(group)[1] == pytest.approx([-0.5] * 4)
    rms = ((0.36 + 0.64 + 0) / 3) ** 0.5 + 1e-4  # of the step's three worths
    for scale in ("group", "batch"):
        found = added_by_images(ImageCredit(WORTH), credited(scale_rewards=scale))
        assert found[0, 0] == pytest.approx({2: 1.2 / rms, 4: -1.6 / rms}) and found[0, 1] == {2: 0}


@pytest.mark.parametrize("level", ["trajectory", "segment", "reward_to_go"])
def test_what_pictures_were_worth_saves_a_group_that_earned_the_same(level):
    group = [thought(0.7, ROLES), thought(0.7, ROLES, member=1), thought(None, ROLES, member=2)]
    config = credited(advantage_level=level, image_credit={"weight": 1.0})
    added = {**added_by_images(ImageCredit(WORTH), config), (0, 2): {2: 5.0}}
    ledger = compute_advantages([group], config, added=added)
    assert ledger.trained == [group] and advantages(group)[0] == pytest.approx([0, 0.6, 0, -0.8])
    assert advantages(group)[2] == [0] * 4  # nobody judged it
    group[0].segments[2].trained = False
    compute_advantages([group], config, added=added)
    assert advantages(group)[0] == pytest.approx([0, 0, 0, -0.8])
    ledger = compute_advantages([[group[0], group[2]]], config, added=added)
    assert ledger.dropped == {"unjudged": 1} and advantages([group[0]]) == [[0] * 4]


def test_the_report_shows_it_beside_what_parts_credit():
    shown = thought(1.0, ROLES, images={2: 0.5})
    shown.info["image_worth"] = {"2": 0.6, "4": -0.8}
    assert [frame.credit for frame in film_of(shown).frames] == ["", "images +0.50  worth +0.60", "", "worth -0.80"]


def test_every_arm_is_accounted_for():
    Ledger(0, arms={"measured": 2, "failed": 1}, arms_in=3).check()
    with pytest.raises(LedgerError, match="4 arms of images asked for"):
        Ledger(0, arms={"measured": 2, "failed": 1}, arms_in=4).check()


def test_a_step_without_pictures_has_an_empty_account():
    run = SimpleNamespace(rollouts=object(), reward_manager=object(), policy=None)
    found = credit_images(run, [[thought(1.0, ("plan",)), thought(0.0, ("plan",), member=1)]], ImageCreditConfig(), 1)
    ledger = Ledger(0, arms=dict(found.account), arms_in=found.asked)
    ledger.check()
    assert found.worth == {} and ledger.metrics()["image_credit/arms_in"] == 0


def test_what_cannot_be_is_refused():
    for wrong, words in (
        ({"arms": []}, "at least 1 item"),
        ({"arms": ["blank", "blank"]}, "'blank' stands there twice"),
        ({"arms": ["white"]}, "'sibling', 'blank' or 'other'"),
        ({"draws": 0}, "greater than or equal to 1"),
        ({"weight": 0}, "greater than 0"),
        ({"members": 9}, "a group has only 8"),
    ):
        with pytest.raises(ValidationError, match=words):
            GrpoConfig(image_credit=wrong)
    with pytest.raises(ValidationError, match="no other prompt's pictures"):
        GrpoConfig(image_credit={"arms": ["other"]}, prompts_per_step=1)


# ---- a run ----

CREDIT = {"arms": ["sibling", "blank"], "draws": 2, "members": 2, "weight": 0.5}


class PowerCut(Exception):
    pass


class Stops(CodeJudge):
    """Its second step's arms are never judged."""

    def score(self, groups, step=0):
        if step == 2 and groups and groups[0][0].info.get("arm"):
            raise PowerCut
        return super().score(groups, step)


def run_of(folder: Path, **config):
    return make(folder, image_credit=CREDIT, steps=2, **config)


def test_a_run_accounts_for_every_arm_and_resumes_as_the_same(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = run_of(whole)
    run.show_every = 1
    trainer = rl.grpo.train(run)
    rows = lines(whole)
    for row in rows:
        assert row["on_policy_gap"] < 1e-4
        assert row["groups/in"] == 2 == row["groups/trained"] + row["groups/dropped/zero_variance"]
        arms = {name: row[f"image_credit/arms_{name}"] for name in ("measured", "unjudged", "failed")}
        assert row["image_credit/arms_in"] == sum(arms.values()) == arms["measured"]
        assert row["rollout/trajectories"] == 2 * 4 + row["image_credit/rollouts"]
        assert 0 < row["image_credit/tokens"] < row["rollout/tokens"]
    assert sum(row["image_credit/images"] for row in rows) > 2
    stored = [t for step in (1, 2) for t in load_trajectories(whole / "trajectories" / f"{step:06d}")]
    noted = [t for t in stored if "image_worth" in t.info]
    assert noted and all(t.member < 2 for t in noted)
    for trajectory in noted:
        for segment, worth in trajectory.info["image_worth"].items():
            mine = trajectory.segments[int(segment)]
            others = [
                a
                for s, a in zip(trajectory.segments, trajectory.advantage_S, strict=True)
                if s.trained and s is not mine
            ]
            gain = trajectory.advantage_S[int(segment)] - np.median(others)
            assert mine.image is not None and np.sign(gain) == np.sign(worth)

    run = run_of(broken)
    run.reward_manager = Stops()
    with pytest.raises(PowerCut):
        rl.grpo.train(run)
    resumed = rl.grpo.train(run_of(broken), checkpoint.latest(broken / "checkpoints"))
    assert lines(broken) == rows
    for (name, p), (_, q) in zip(
        trainer.policy.model.named_parameters(), resumed.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def test_arms_that_never_came_back_and_candidates_beside_them(tmp_path):
    run = run_of(tmp_path, fork={"roles": ["sketch"], "candidates": 2})
    generate, asked = run.rollouts.generate, []

    def loses_one_arm(requests, timeout_s=None, each=None):
        asked.append(requests)
        if not requests[0].arm:
            return generate(requests, timeout_s, each)
        result = generate(requests[1:], timeout_s, each and (lambda index, group: each(index + 1, group)))
        return replace(result, failed=[FailedGroup(0, requests[0].group, "crash", "out of memory")])

    run.rollouts.generate = loses_one_arm
    rl.grpo.train(run)
    for row in lines(tmp_path):
        dropped = sum(value for name, value in row.items() if name.startswith("groups/dropped/"))
        assert row["image_credit/arms_failed"] == 1 and row["groups/dropped/failed"] == 0
        assert row["image_credit/arms_in"] == row["image_credit/arms_measured"] + 1
        assert row["groups/in"] == 2 + row["forks/in"] == row["groups/trained"] + dropped
        beside = row["forks/candidates"] + row["image_credit/rollouts"]
        assert row["rollout/trajectories"] == 2 * 4 + beside
    assert all(r.parent[0] < 2 for requests in asked for r in requests if r.arm)  # only what began at a prompt
