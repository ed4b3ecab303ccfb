"""Another picture in the place of one that was drawn: which, under which noise, and nothing else is changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from formats.registry import get_format
from formats.segments import image_content
from record.store import load_trajectories, save_trajectories
from record.trajectory import Author, Modality, Segment, Trajectory
from rollout.config import RolloutConfig
from rollout.counterfactuals import ARMS, OWN, _request, counterfactuals, images_gone_on_from
from rollout.engine.engine import Engine
from rollout.pool.local import LocalRollouts
from rollout.requests import RolloutError, RolloutRequest
from tests.fakes import FakePolicy
from tests.families.bagel import Bagel, BagelFormat
from tests.test_engine import CASES, engine, requests
from tests.test_engine_chameleon import policy, rollouts  # noqa: F401
from tests.test_forks import contents

LAYOUTS = ["plain", "flow", "guided codes", "guided flow", "closed by what follows", "nucleus",
           "greedy words"]  # fmt: skip


def alike(a: Trajectory, b: Trajectory) -> bool:
    """The same roles and ids, and the same latents but for their last bits."""
    if [(s.role, s.ids.tolist()) for s in a.segments] != [(s.role, s.ids.tolist()) for s in b.segments]:
        return False
    pairs = [(x.latent, y.latent) for x, y in zip(a.segments, b.segments, strict=True) if x.latent is not None]
    return all(np.allclose(x, y, atol=1e-4) for x, y in pairs)


def bagel() -> tuple[Engine, list[RolloutRequest]]:
    flow = {"steps": 4, "window": 2, "window_range": (0, 2)}
    config = RolloutConfig(rows=9, max_tokens=60, guidance=True, branches=2, flow=flow)
    asked = [RolloutRequest(g, prompt, {}, (0, 1), 4) for g, prompt in enumerate(("red dot", "left"))]
    return Engine(Bagel(), BagelFormat(max_images=3, max_tokens=3), config, "full"), asked


def of_each_family(policy, layout: str) -> tuple[Engine, list[RolloutRequest]]:  # noqa: F811
    if layout == "bagel":
        return bagel()
    if layout == "chameleon":
        asked = [RolloutRequest(g, f"a {word} circle", {}, (0, 1), 5) for g, word in enumerate(("red", "blue"))]
        return rollouts(policy, get_format("strokes", max_tokens=4), "full"), asked
    return engine(**CASES[layout]), requests(4, 2)


@pytest.mark.parametrize("layout", [*LAYOUTS, "bagel", "chameleon"])
def test_the_same_picture_sampled_by_nobody_is_gone_on_from_as_it_was(policy, layout):  # noqa: F811
    """The noise goes on where the member's own went on, though no decision stands for the picture any more."""
    writer, asked = of_each_family(policy, layout)
    trunk = writer.run(asked)
    again = [
        _request(t, segment, "sibling", [t.member], t.segments[segment])
        for t in trunk
        for segment in images_gone_on_from(t)
    ]
    again = again[:6]
    assert len(again) > 2
    same = []
    for one in again:
        (child,) = writer.run([one.request])
        same.append(alike(child, one.trajectory))
        assert child.segments[one.segment].decisions is None and not child.segments[one.segment].trained
        assert child.member == one.trajectory.member and child.info["arm"] == "sibling"
    assert sum(same) >= len(same) - 1  # batched products of other shapes differ in the last bit


@pytest.mark.parametrize("layout", ["plain", "flow", "bagel", "chameleon"])
def test_the_arms_differ_by_the_picture_alone(policy, layout, tmp_path):  # noqa: F811
    writer, asked = of_each_family(policy, layout)
    trunk = writer.run(asked)
    groups = [[t for t in trunk if t.group == g] for g in range(len(asked))]
    found = counterfactuals(groups, ARMS, 2, writer.policy, members=1 if layout in ("bagel", "chameleon") else None)
    by_arm = {arm: [one for one in found.arms if one.arm == arm] for arm in (OWN, *ARMS)}
    assert len(by_arm["blank"]) == len(by_arm[OWN]) > 1 and by_arm["sibling"] and by_arm["other"]
    written = LocalRollouts(writer).generate([one.request for one in found.arms])
    assert len(written.groups) == len(found.arms) and not written.failed
    changed = 0
    for one, group in zip(found.arms, written.groups, strict=True):
        own, size = one.trajectory, len(groups[0])
        numbers = [own.member + size] if one.arm == OWN else [own.member, own.member + size]
        assert [t.member for t in group] == numbers
        for child in group:
            for index, (a, b) in enumerate(zip(child.segments[: one.segment], own.segments, strict=False)):
                assert a.ids.tolist() == b.ids.tolist(), index
            content = image_content(child.segments[one.segment], writer.policy.vocabulary)
            drawn = image_content(own.segments[one.segment], writer.policy.vocabulary)
            assert (np.array_equal(content, drawn)) == (one.arm == OWN) or one.arm in ("sibling", "other")
            (shown,) = writer.policy.decode_images([content])
            off = child.segments[one.segment].image.astype(int) - shown  # convolutions of other batches
            assert np.abs(off).max() <= 1
            assert child.continues.endswith(f"after segment {one.segment}, the image there: {one.arm}")
        changed += one.arm != OWN and contents(group[0])[one.segment + 1 :] != contents(own)[one.segment + 1 :]
    assert changed
    # The record holds the arms, beside the members whose names they share.
    save_trajectories([*trunk, *(t for group in written.groups for t in group)], tmp_path / "kept")
    kept = load_trajectories(tmp_path / "kept")[len(trunk) :]
    assert [t.info.get("arm") for t in kept] == [t.info["arm"] for group in written.groups for t in group]
    assert all(np.array_equal(a.segments[-1].ids, b.segments[-1].ids)
               for a, b in zip(kept, (t for group in written.groups for t in group), strict=True))  # fmt: skip


# ---- which images, and whose pictures, by hand ----


def thought(group: int, member: int, *roles: str, prompt: str = "", parent=None) -> Trajectory:
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False)]
    for number, role in enumerate(roles):
        if role.startswith("draw"):
            pixels = np.full((1, 4, 3), 1 + (10 * group + member + number) % 8, np.uint8)
            ids = np.array([4, *FakePolicy().encode_images([pixels])[0], 5], np.int32)
            segments.append(Segment(role, Author.POLICY, Modality.IMAGE_TOKENS, True, ids, image=pixels))
        else:
            author = Author.ENVIRONMENT if role == "answer" else Author.POLICY
            segments.append(Segment(role, author, Modality.TEXT, True, np.array([6], np.int32)))
    return Trajectory(prompt or f"p{group}", {}, "f", segments, group, member, parent=parent)


def test_an_image_that_ends_the_thought_or_is_answered_or_inherited_is_left_out():
    assert images_gone_on_from(thought(0, 0, "draw", "say", "draw", "say", "draw")) == [1, 3]
    assert images_gone_on_from(thought(0, 0, "draw", "answer", "draw", "say")) == [3]
    assert images_gone_on_from(thought(0, 4, "draw", "say", "draw", "say", parent=(0, 3))) == [3]
    assert images_gone_on_from(thought(0, 0, "say")) == []


def test_pictures_are_the_next_members_and_the_next_groups_of_the_same_place():
    words = ("draw", "say", "draw", "say")
    groups = [
        [thought(0, 0, *words), thought(0, 1, "draw", "say"), thought(0, 2, *words)],
        [thought(1, 0, "say"), thought(1, 1, "draw", "say")],
        [thought(2, 0, *words, prompt="p0"), thought(2, 1, *words, prompt="p2")],
    ]
    encoder = FakePolicy()
    found = counterfactuals(groups, ("sibling", "other"), 1, encoder)
    of = {(one.trajectory.key, one.segment, one.arm): one.request.prefix[-1].image[0, 0, 0] for one in found.arms}

    def drawn(group: int, member: int, segment: int) -> int:
        return groups[group][member].segments[segment].image[0, 0, 0]

    assert of["0-0", 1, "sibling"] == drawn(0, 1, 1) and of["0-2", 1, "sibling"] == drawn(0, 0, 1)
    assert of["0-0", 3, "sibling"] == drawn(0, 2, 3)  # 0-1 has no second one
    assert of["0-0", 1, "other"] == drawn(1, 1, 1)  # 1-0 drew nothing
    assert of["0-0", 3, "other"] == drawn(2, 1, 3)  # group 1 has no second one, and 2-0 the same prompt
    assert ("1-1", 1, "sibling") not in of and found.lacking["sibling"] == 1
    assert not any(one.arm == OWN for one in found.arms)  # the member itself is its own arm's only draw
    alone = counterfactuals([groups[1][1:]], ("sibling", "other", "blank"), 1, encoder)
    assert [one.arm for one in alone.arms] == ["blank"] and alone.lacking == {"sibling": 1, "other": 1}
    only = counterfactuals(groups, ("blank",), 3, encoder, members=1)
    assert {one.trajectory.key for one in only.arms} == {"0-0", "2-0"}
    assert [one.request.members for one in only.arms[:2]] == [(3, 6), (0, 3, 6)]


def test_a_picture_past_a_limit_is_named():
    writer = engine()
    trunk = writer.run(requests(4, 2))
    found = counterfactuals([trunk], ("blank",), 1, writer.policy)
    last = max(found.arms, key=lambda one: one.segment)
    short = engine(max_tokens=sum(len(s.ids) for s in last.request.prefix[1:]))
    with pytest.raises(RolloutError, match=rf"a fork of trajectory {last.trajectory.key} after segment {last.segment}"):
        short.run([last.request])
    fewer = engine(max_images=last.trajectory.occurrence(last.segment))
    with pytest.raises(RolloutError, match="format.max_images"):
        fewer.run([last.request])


def test_arms_are_told_apart_and_the_same_arm_twice_is_refused():
    writer = engine()
    trunk = writer.run(requests(2, 2))
    found = counterfactuals([trunk[:2], trunk[2:]], ("blank", "sibling"), 1, writer.policy).arms
    with pytest.raises(Exception, match="is asked for twice in one generation"):
        LocalRollouts(writer).generate([found[0].request, replace(found[0].request)])
