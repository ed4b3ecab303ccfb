"""Rewards to go (rl/advantages.py, advantage_level: reward_to_go) against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantages import EPSILON, compute_advantages
from rl.config import GrpoConfig
from tests.test_advantages import advantages, thought

ROLES = ("plan", "sketch", "inspect", "redraw")  # segments 1 to 4


def config(**settings) -> GrpoConfig:
    return GrpoConfig(**{"scale_rewards": "none", "advantage_level": "reward_to_go", **settings})


def pair():
    """Totals 1, 0: +-.5. Images: sketch 1, 0: +-.5; redraw 0, .4: -+.2."""
    return [thought(1.0, ROLES, images={2: 1.0, 4: 0.0}), thought(0.0, ROLES, images={2: 0.0, 4: 0.4})]


def test_a_segment_has_what_is_given_at_its_end_or_later():
    group = pair()
    compute_advantages([group], config())
    assert advantages(group)[0] == pytest.approx([0.8, 0.8, 0.3, 0.3])  # .5 + .5 - .2, and .5 - .2 after the sketch
    assert advantages(group)[1] == pytest.approx([-0.8, -0.8, -0.3, -0.3])
    compute_advantages([group], config(segment_reward_weights={"images": 2.0}))
    assert advantages(group)[0] == pytest.approx([1.1, 1.1, 0.1, 0.1])  # .5 + 1 - .4, and .5 - .4


def test_without_rewards_by_segment_it_is_the_trajectorys_advantage():
    group = [thought(reward, ROLES) for reward in (1.0, 0.0, 0.5)]
    for scale in ("group", "batch", "none"):
        compute_advantages([group], config(scale_rewards=scale))
        here = advantages(group)
        compute_advantages([group], GrpoConfig(scale_rewards=scale))
        assert here == advantages(group)


def test_each_reward_is_divided_by_its_own_deviation():
    group = pair()
    compute_advantages([group], config(scale_rewards="group"))
    # Of two values at +-d the deviation (divisor 1) is d * 2 ** .5, so that each counts about 1 / 2 ** .5.
    total, sketch, redraw = (d / (d * 2**0.5 + EPSILON) for d in (0.5, 0.5, 0.2))
    assert advantages(group)[0] == pytest.approx([total + sketch - redraw] * 2 + [total - redraw] * 2)


def test_of_the_batch_each_parts_deviation_is_of_all_its_values():
    one, other = pair(), [thought(0.5, ROLES, images={2: 0.6}), thought(0.5, ROLES, images={2: 0.6})]
    ledger = compute_advantages([one, other], config(scale_rewards="batch"))
    total = 0.5 / (np.std([1, 0, 0.5, 0.5], ddof=1) + EPSILON)
    image = 1 / (np.std([1, 0, 0, 0.4, 0.6, 0.6], ddof=1) + EPSILON)
    assert advantages(one)[0] == pytest.approx([total + (0.5 - 0.2) * image] * 2 + [total - 0.2 * image] * 2)
    assert ledger.dropped == {"zero_variance": 1}


def test_what_is_not_judged_is_no_zero():
    # The third one's sketch has no value, and its redraw is alone: both add nothing. The fourth is unjudged.
    group = [
        thought(1.0, ROLES, images={2: 1.0}),
        thought(0.0, ROLES, images={2: 0.0}),
        thought(0.5, ROLES, images={2: None, 4: 9.0}),
        thought(None, ROLES, images={2: 7.0, 4: 7.0}),
    ]
    compute_advantages([group], config())
    assert advantages(group) == [[1, 1, 0.5, 0.5], [-1, -1, -0.5, -0.5], [0] * 4, [0] * 4]
    ledger = compute_advantages([[group[0], group[3]]], config())
    assert ledger.dropped == {"unjudged": 1} and advantages([group[0]]) == [[0] * 4]


def test_what_the_environment_says_is_credited_to_what_led_there():
    group = pair()
    for trajectory in group:
        trajectory.segments[2].trained = False
    compute_advantages([group], config())
    assert advantages(group)[0] == pytest.approx([0.8, 0.0, 0.3, 0.3])


def test_a_candidate_has_nothing_of_what_its_prefix_was_given():
    """They go on after the sketch: its values are the parent's, the same in all, and end before what they wrote."""
    group = [thought(1.0, ROLES, images={2: 0.3, 4: 1.0}), thought(0.0, ROLES, images={2: 0.3, 4: 0.0})]
    for member, trajectory in enumerate(group):
        trajectory.parent, trajectory.member = (0, 3), 5 + member
        for segment in trajectory.segments[:3]:
            segment.trained = False
    compute_advantages([group], config())
    assert advantages(group) == [[0, 0, 1, 1], [0, 0, -1, -1]]


values = st.one_of(st.none(), st.floats(-5, 5).map(lambda x: round(x, 3)))


@given(st.lists(st.tuples(values, values, values), min_size=2, max_size=6), st.sampled_from(["group", "batch", "none"]))
def test_differences_between_segments_are_what_is_given_between_them(rows, scale):
    group = [thought(total, ROLES, images={2: sketch, 4: redraw}) for total, sketch, redraw in rows]
    compute_advantages([group], config(scale_rewards=scale))
    found = np.array(advantages(group))
    assert np.abs(found.sum(0)).max() < 1e-3
    assert (found[:, 0] == found[:, 1]).all() and (found[:, 2] == found[:, 3]).all()
    assert not any(row.any() for row, (total, *_) in zip(found, rows, strict=True) if total is None)
    compute_advantages([group], config(scale_rewards=scale, segment_reward_weights={"images": 0.0}))
    assert np.array(advantages(group)) == pytest.approx(np.repeat(np.array(advantages(group))[:, :1], 4, 1))
