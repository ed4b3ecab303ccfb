"""What a picture was worth: by hand, and on policies that are known to look at what they drew, or not to."""

from __future__ import annotations

import numpy as np
import pytest

from evals.image_worth import Swap, summarise, swaps_of, worth_by_image
from rollout.counterfactuals import ARMS, counterfactuals
from rollout.requests import RolloutRequest
from tests.planted import PROMPTS, engine, reward


def swap(group: int, own: float | None, swapped: float | None, **fields) -> Swap:
    given = {"member": 0, "segment": 2, "role": "sketch", "occurrence": 0, "arm": "blank", "draw": 0}
    return Swap(
        group=group, own=own, swapped=swapped, **{**given, "words_changed": False, "image_changed": None, **fields}
    )


def test_worths_are_means_of_the_prompts_means():
    swaps = [
        swap(0, 1.0, 0.0, words_changed=True, image_changed=True),
        swap(0, 1.0, 0.5, draw=1, image_changed=False),
        swap(1, 0.25, 0.25),
        swap(2, None, 0.5, words_changed=True),
    ]
    (row,) = summarise(swaps)
    # Prompt 0: (1 + .5) / 2; prompt 1: 0; the third has none.
    assert (row.images, row.prompts, row.worth, row.unjudged) == (3, 2, 0.375, 1)
    assert row.reward_changed == pytest.approx(2 / 3) and row.words_changed == 0.5 and row.image_changed == 0.5
    assert row.interval is not None and (row.interval.low, row.interval.high) == (0.0, 0.75)  # of two prompts' means
    assert worth_by_image(swaps) == {(0, 0): {2: 0.75}, (1, 0): {2: 0.0}}


def test_places_stand_in_the_order_in_which_they_are_drawn():
    swaps = [
        swap(0, 1.0, 0.0, role="redraw", segment=5, arm="sibling"),
        swap(0, 1.0, 0.0, role="redraw", segment=8, occurrence=1),
        swap(0, 1.0, 1.0),
        swap(1, None, 1.0, role="redraw", segment=5),
    ]
    rows = summarise(swaps)
    assert [(row.role, row.occurrence, row.arm) for row in rows] == [
        ("sketch", 0, "blank"),
        ("redraw", 0, "sibling"),
        ("redraw", 0, "blank"),
        ("redraw", 1, "blank"),
    ]
    assert rows[2].worth is None and rows[2].reward_changed is None and rows[0].interval is None


@pytest.mark.parametrize("copies", [False, True])
def test_a_picture_is_worth_what_the_policy_makes_of_it(copies):
    writer = engine(copies)
    asked = [RolloutRequest(g, PROMPTS[g % 2], {}, (0, 1), 3) for g in range(12)]
    trunk = writer.run(asked)
    groups = [trunk[at : at + 2] for at in range(0, len(trunk), 2)]
    assert all([s.role for s in t.segments[1:]] == ["image", "say", "image", "say"] for t in trunk)
    found = counterfactuals(groups, ARMS, 1 + copies, writer.policy, members=1)
    written = iter(writer.run([one.request for one in found.arms]))
    sets = [[next(written) for _ in one.request.members] for one in found.arms]
    for trajectory in [*trunk, *(t for members in sets for t in members)]:
        trajectory.reward = reward(trajectory)
    swaps = swaps_of(found.arms, sets)
    rows = {(row.arm, row.occurrence): row for row in summarise(swaps)}
    # Draws, arms, thoughts, images: the last one is followed by the turn's end.
    assert len(swaps) == (1 + copies) * 3 * 12 * 2
    first = {arm: rows[arm, 0] for arm in ARMS}
    if copies:
        # Own halves nearly always, the other prompt's half the other way; white is of the upper half.
        assert first["other"].worth > 0.5 and first["other"].interval.low > 0.3
        assert first["blank"].worth > 0.2 and first["blank"].interval.low > 0
        assert first["sibling"].reward_changed > 0.2 and abs(first["sibling"].worth) < 0.2  # as good as each other
        assert all(row.image_changed > 0.6 and row.words_changed > 0.2 for row in first.values())
        good = [w[1] for key, w in worth_by_image([s for s in swaps if s.arm == "other"]).items()]
        assert np.mean([value > 0 for value in good]) > 0.9
    else:
        for row in first.values():
            assert row.worth == 0 and row.interval.low <= 0 <= row.interval.high
            assert row.reward_changed == row.words_changed == row.image_changed == 0
    # What nothing is drawn after stands as the last image, and is judged itself.
    assert rows["other", 1].image_changed is None and rows["other", 1].words_changed == 0
