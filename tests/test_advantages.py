"""rl/advantages.py and rl/ledger.py against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from record.trajectory import Author, Modality, Segment, StopReason, Trajectory
from rl.advantages import compute_advantages
from rl.config import GrpoConfig
from rl.ledger import Ledger, LedgerError

NONE = GrpoConfig(scale_rewards="none")
SEGMENT = GrpoConfig(scale_rewards="none", advantage_level="segment")


def thought(reward, roles=("plan", "sketch"), group=0, member=0, **segment_rewards):
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False)]
    for role in roles:
        modality = Modality.IMAGE_TOKENS if role in ("sketch", "redraw") else Modality.TEXT
        segments.append(Segment(role, Author.POLICY, modality, True))
    return Trajectory(
        "", {}, "strokes", segments, group=group, member=member, reward=reward, segment_rewards=segment_rewards
    )


def group_of(*rewards, **kwargs):
    return [thought(reward, member=member, **kwargs) for member, reward in enumerate(rewards)]


def advantages(group):
    return [trajectory.advantage_S[1:].tolist() for trajectory in group]


def test_reward_less_the_groups_mean_on_every_trained_segment():
    group = group_of(1.0, 0.0, 0.0, 0.0)
    ledger = compute_advantages([group], NONE)
    assert advantages(group) == [[0.75, 0.75], [-0.25, -0.25], [-0.25, -0.25], [-0.25, -0.25]]
    assert all(trajectory.advantage_S[0] == 0 for trajectory in group)  # the prompt
    assert ledger.trained == [group] and ledger.dropped == {}


def test_scaled_by_the_groups_sample_deviation():
    group = group_of(1.0, 0.0)  # mean 0.5, deviation sqrt(0.5)
    compute_advantages([group], GrpoConfig())
    assert advantages(group)[0][0] == pytest.approx(0.5 / (0.5**0.5 + 1e-4))


def test_scaled_by_the_batchs_deviation_dropped_groups_included():
    one, two = group_of(1.0, 0.0), group_of(0.5, 0.5)
    compute_advantages([one, two], GrpoConfig(scale_rewards="batch"))
    # rewards 1, 0, .5, .5: mean .5, squares .25 + .25 over 3
    assert advantages(one)[0][0] == pytest.approx(0.5 / ((0.5 / 3) ** 0.5 + 1e-4))


def test_unjudged_member_leaves_the_baseline_and_gets_zero():
    group = group_of(1.0, None, 0.0)
    compute_advantages([group], NONE)
    assert advantages(group) == [[0.5, 0.5], [0.0, 0.0], [-0.5, -0.5]]


def test_fewer_than_two_judged_drops_the_group():
    lone, none, good = group_of(1.0, None), group_of(None, None), group_of(0.0, 1.0)
    ledger = compute_advantages([lone, none, good], NONE)
    assert ledger.dropped == {"unjudged": 2} and ledger.trained == [good]
    assert advantages(lone) == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("config", [GrpoConfig(), NONE, SEGMENT, GrpoConfig(scale_rewards="batch")])
def test_a_group_without_variance_is_skipped_and_counted(config):
    # 0.1 has no exact binary form: the mean of equal rewards must still leave nothing behind
    flat, good = group_of(0.1, 0.1, 0.1), group_of(0.0, 1.0)
    ledger = compute_advantages([flat, good], config)
    assert ledger.dropped == {"zero_variance": 1} and ledger.trained == [good]
    assert not any(trajectory.advantage_S.any() for trajectory in flat)


def test_by_segment_the_baseline_is_over_the_same_role_and_occurrence():
    # Three members; the third writes a second sketch, which nobody else has: no baseline, so zero.
    group = [thought(1.0), thought(0.0), thought(0.5, roles=("plan", "sketch", "sketch"))]
    compute_advantages([group], SEGMENT)
    assert advantages(group) == [[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0, 0.0]]

    pair = [thought(1.0, roles=("sketch", "redraw")), thought(0.0, roles=("sketch", "redraw")), thought(0.8)]
    compute_advantages([pair], SEGMENT)
    assert advantages(pair)[0] == pytest.approx([1.0 - 0.6, 0.5])  # sketch: of three; redraw: of two
    assert advantages(pair)[2] == pytest.approx([0.0, 0.8 - 0.6])  # nobody else plans


def test_rewards_by_segment_are_added_each_over_its_own_baseline():
    # sketch is segment 2. Total: 1, 0, 0.5 -> +.5, -.5, 0. Part: 1, 0, missing -> +.5, -.5, nothing.
    group = [thought(1.0, boxes={2: 1.0}), thought(0.0, boxes={2: 0.0}), thought(0.5, boxes={2: None})]
    compute_advantages([group], SEGMENT)
    assert advantages(group) == [[0.5, 1.0], [-0.5, -1.0], [0.0, 0.0]]
    compute_advantages(
        [group], GrpoConfig(scale_rewards="none", advantage_level="segment", segment_reward_weights={"boxes": 2})
    )
    assert advantages(group)[0] == [0.5, 1.5]


def test_rewards_by_segment_can_save_a_group_whose_totals_are_equal():
    group = [thought(0.5, boxes={2: 1.0}), thought(0.5, boxes={2: 0.0})]
    assert compute_advantages([group], SEGMENT).trained == [group]
    assert advantages(group) == [[0.0, 0.5], [0.0, -0.5]]


def test_by_segment_scaled_over_the_same_place():
    group = [thought(1.0, boxes={2: 1.0}), thought(0.0, boxes={2: 0.0})]
    compute_advantages([group], GrpoConfig(advantage_level="segment"))
    plan, sketch = advantages(group)[0]
    assert plan == pytest.approx(0.5 / (0.5**0.5 + 1e-4))  # scores +-0.5
    assert sketch == pytest.approx(1.0 / (2**0.5 + 1e-4))  # scores +-1


def test_by_segment_scaled_over_the_batch_dropped_groups_included():
    one = [thought(1.0, boxes={2: 1.0}), thought(0.0, boxes={2: 0.0})]
    flat = group_of(0.5, 0.5)
    ledger = compute_advantages([one, flat], GrpoConfig(scale_rewards="batch", advantage_level="segment"))
    # plans +-.5, sketches +-1, and four zeros: squares .25 + .25 + 1 + 1 over 7
    scale = (2.5 / 7) ** 0.5 + 1e-4
    assert advantages(one)[0] == pytest.approx([0.5 / scale, 1.0 / scale])
    assert advantages(one)[1] == pytest.approx([-0.5 / scale, -1.0 / scale])
    assert ledger.trained == [one] and ledger.dropped == {"zero_variance": 1}


def test_by_trajectory_every_segment_has_the_groups_baseline_and_scale():
    # The last writes a second sketch, which nobody else has.
    group = [thought(1.0), thought(0.0), thought(0.5), thought(1.5, roles=("plan", "sketch", "sketch"))]
    compute_advantages([group], NONE)  # mean .75
    assert advantages(group) == [[0.25] * 2, [-0.75] * 2, [-0.25] * 2, [0.75] * 3]
    compute_advantages([group], GrpoConfig())  # squares .0625 + .5625 + .0625 + .5625 over 3
    scale = (1.25 / 3) ** 0.5 + 1e-4
    assert advantages(group)[3] == pytest.approx([0.75 / scale] * 3)
    assert advantages(group)[0] == pytest.approx([0.25 / scale] * 2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_segment_that_nobody_else_has_gets_zero_under_any_scale(scale):
    group = [thought(1.0), thought(0.0), thought(0.5, roles=("plan", "sketch", "sketch"))]
    compute_advantages([group], GrpoConfig(scale_rewards=scale, advantage_level="segment"))
    assert advantages(group)[2] == [0.0, 0.0, 0.0] and advantages(group)[0][0] > 0


def test_an_unjudged_member_leaves_the_baseline_of_every_part_too():
    group = [thought(1.0, boxes={2: 1.0}), thought(0.0, boxes={2: 0.0}), thought(None, boxes={2: 5.0})]
    compute_advantages([group], SEGMENT)
    assert advantages(group) == [[0.5, 1.0], [-0.5, -1.0], [0.0, 0.0]]


def test_groups_that_never_came_back_are_in_the_ledger():
    ledger = compute_advantages([group_of(1.0, 0.0), group_of(0.5, 0.5)], NONE, failed=3)
    assert (ledger.groups_in, len(ledger.trained)) == (5, 1)
    assert ledger.dropped == {"failed": 3, "zero_variance": 1}


rewards = st.one_of(st.none(), st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3)))


@given(
    st.lists(st.lists(rewards, min_size=2, max_size=6), max_size=5),
    st.sampled_from(["group", "batch", "none"]),
    st.sampled_from(["trajectory", "segment", "reward_to_go"]),
)
def test_every_group_is_accounted_for_and_advantages_sum_to_nothing(groups, scale, level):
    made = [group_of(*group) for group in groups]
    ledger = compute_advantages(made, GrpoConfig(scale_rewards=scale, advantage_level=level))
    assert len(ledger.trained) + sum(ledger.dropped.values()) == len(made)
    for group in made:
        total = np.sum([trajectory.advantage_S for trajectory in group], axis=0)
        assert np.abs(total).max() < 1e-4
        assert all(not t.advantage_S.any() for t in group if t.reward is None)


def test_the_ledger_does_not_let_a_group_vanish():
    ledger = Ledger(groups_in=3, trained=[group_of(1.0, 0.0)])
    ledger.drop("failed")
    with pytest.raises(LedgerError, match="3 groups in, but 1 trained and dropped: 1 failed"):
        ledger.check()
    ledger.drop("unjudged")
    ledger.check()
    assert ledger.metrics() == {
        "groups/in": 3,
        "groups/trained": 1,
        "groups/cut_off": 0,
        "groups/dropped/failed": 1,
        "groups/dropped/unjudged": 1,
        "groups/dropped/zero_variance": 0,
    }


def test_the_ledger_says_what_share_of_the_members_hit_a_limit():
    groups = [group_of(1.0, 0.0), group_of(0.5, None)]
    groups[0][1].stop, groups[1][0].stop = StopReason.MAX_TOKENS, StopReason.END
    groups[1][1].stop = StopReason.MAX_IMAGES
    assert compute_advantages(groups, NONE).metrics()["groups/cut_off"] == 0.5  # two of four, the unjudged one too
