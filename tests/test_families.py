"""Fake families as unlike as those to come, through the engine: sampled and scored log-probs agree, and rows,
neighbours, refills and prefills change nothing that was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from formats.contract import check_format
from policy.base import score_trajectories
from record.trajectory import Author, DecisionKind, Frames, Modality, StopReason
from rollout.config import RolloutConfig
from rollout.engine.active import ActiveSequence, Need
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from tests.families.bagel import LATENT_SLOTS, PATCHES, Bagel, BagelFormat
from tests.families.lvm import Lvm, Planner
from tests.families.qwen import Qwen, crop, look
from tests.families.thinker import Thinker, Watch, more_frames
from tests.tool_helpers import answering


def picture(seed: int, height: int = 8, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def video(seed: int, count: int) -> Frames:
    frames = np.stack([picture(seed * 100 + n, 4, 4) for n in range(count)])
    return Frames(frames, np.arange(count, dtype=np.float32) / 2)


@dataclass(frozen=True)
class Case:
    policy: Any
    fmt: Any
    prompts: tuple[tuple[str, tuple], ...]  # what the user says, and shows
    tools: Any = None
    constrain: str = "full"
    max_tokens: int = 60
    guidance: bool = False
    rows: int = 1  # of the cache, that a trajectory takes


CASES = {
    "bagel": Case(
        Bagel,
        BagelFormat(max_images=2, max_tokens=3),
        (("red dot", ()), ("left", (picture(1),)), ("big blue dot right", (picture(2), picture(3, 4, 4)))),
        guidance=True,
        rows=3,
    ),
    "bagel unguided": Case(Bagel, BagelFormat(False, max_images=2, max_tokens=3), (("red dot", ()), ("left", ()))),
    "qwen": Case(
        Qwen,
        look(),
        (("red dot", (picture(4),)), ("left", (picture(5, 4, 10), picture(6, 12, 2))), ("big", (picture(7, 2, 2),))),
        answering(crop),
    ),
    "lvm": Case(Lvm, Planner(), (("", (picture(8),)), ("", (picture(9, 5, 5),))), constrain="images"),
    "thinker": Case(Thinker, Watch(), (("red", (video(1, 5),)), ("left dot", (video(2, 2),))), answering(more_frames)),
}


def requests(case: Case, members: int = 3, seed: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(g, prompt, {}, tuple(range(members)), seed, media)
        for g, (prompt, media) in enumerate(case.prompts)
    ]


def engine(case: Case, rows: int = 3, policy=None, **config) -> Engine:
    settings = {
        "rows": rows * case.rows,
        "branches": max(1, case.rows - 1),
        "guidance": case.guidance,
        "max_tokens": case.max_tokens,
        "flow": {"steps": 3, "window": 2, "window_range": (0, 3), "sampler": "dance"},
        "temperature": {"default": 0.9},
    } | config
    policy = policy or case.policy()
    return Engine(policy, case.fmt, RolloutConfig(**settings), case.constrain, case.tools)


def contents(trajectory) -> list:
    return [(s.role, s.ids.tolist()) for s in trajectory.segments]


def latents(trajectory) -> np.ndarray:
    return np.array([s.latent for s in trajectory.segments if s.latent is not None])


def gap(policy, trajectories) -> float:
    with torch.no_grad():
        return float(score_trajectories(policy, trajectories).log_ratio_N.abs().max())


def in_order(trajectories) -> list:
    return sorted(trajectories, key=lambda trajectory: (trajectory.group, trajectory.member))


def anew(need: Need) -> Need:
    return Need.REPREFILL if need is Need.MORE else need


@pytest.mark.parametrize("name", CASES)
def test_every_layout_samples_the_same_and_scores_what_it_sampled(name, monkeypatch):
    case = CASES[name]
    asked = requests(case)
    count = sum(len(request.members) for request in asked)
    policy = case.policy()
    layouts = {
        "refilled": engine(case, 2, policy).run(asked),
        "seven rows": engine(case, 7, policy).run(asked),
        "all at once": engine(case, count, policy).run(asked),
        "alone": [
            engine(case, 1, policy).run([RolloutRequest(r.group, r.prompt, r.record, (m,), r.seed, r.media)])[0]
            for r in asked
            for m in r.members
        ],
        "other neighbours": in_order(engine(case, 3, policy).run(asked[::-1])),
    }
    append = ActiveSequence._need
    monkeypatch.setattr(ActiveSequence, "_need", lambda self: anew(append(self)))
    layouts["prefilled anew"] = engine(case, 3, policy).run(asked)
    for layout, trajectories in layouts.items():
        assert gap(policy, trajectories) < 1e-5, layout
        for ours, theirs in zip(trajectories, layouts["alone"], strict=True):
            assert contents(ours) == contents(theirs), layout
            assert ours.stop is theirs.stop, layout
            np.testing.assert_allclose(latents(ours), latents(theirs), atol=2e-4, err_msg=layout)
    assert len({str(contents(t)) for t in layouts["alone"]}) > count // 2, "members differ"
    other = case.policy(seed=1)  # the check can fail: other weights, other log-probs
    assert gap(other, layouts["alone"]) > 0.01


@pytest.mark.parametrize("name", ["bagel", "lvm"])
def test_every_format_keeps_its_contract_with_its_family(name):
    case = CASES[name]
    check_format(case.fmt, case.policy().vocabulary, [], walks=8)


# ---- what each family is told apart by ----


def written(name: str, **config):
    rollouts = engine(CASES[name], 4, **config)
    return rollouts, rollouts.run(requests(CASES[name], 4))


def test_an_image_of_many_slots_has_one_position_in_each_form():
    rollouts, trajectories = written("bagel")
    after = 0
    for trajectory in trajectories:
        for index, segment in enumerate(trajectory.segments):
            if segment.modality is not Modality.IMAGE_LATENT:
                continue
            assert [c.branch for c in segment.contexts] == ["full", "no_text", "no_image"]
            assert set(segment.decisions.kind_N.tolist()) >= {DecisionKind.FLOW}
            texts = {i for i, s in enumerate(trajectory.segments[:index]) if s.modality is Modality.TEXT}
            assert not texts & {piece.segment for piece in segment.contexts[1].pieces}
            follower = trajectory.segments[index + 1].contexts[0]
            seen = [(piece.form, piece.start) for piece in follower.pieces if piece.segment == index]
            assert seen == [("vae", segment.contexts[0].start), ("vit", segment.contexts[0].start + 1)]
            assert follower.start == segment.contexts[0].start + 2
            after += 1
    assert after > 8
    assert rollouts.policy.image_slots == LATENT_SLOTS + PATCHES == 9


def test_a_picture_advances_positions_by_the_longer_side_of_its_grid():
    _, trajectories = written("qwen")
    # a frame's id, then a picture of 2 x 5 patches between markers: 12 slots and 7 positions
    trajectory = next(t for t in trajectories if t.prompt == "left")
    pieces = trajectory.segments[4].contexts[0].pieces
    assert [(p.form, p.start) for p in pieces] == [("ids", 0), ("vit", 1), ("vit", 8), ("ids", 16)]
    assert len(trajectory.segments[1].ids) == 12 and len(trajectory.segments[2].ids) == 8
    never = set(Qwen().vocabulary.never.tolist())
    own = [s for t in trajectories for s in t.segments if s.author is Author.POLICY]
    assert not never & {int(id) for s in own for id in s.ids}
    answers = [s for t in trajectories for s in t.segments if s.role == "crop"]
    assert answers and all(s.image is not None and not s.trained and s.decisions is None for s in answers)


def test_pictures_without_words_or_markers_follow_one_another():
    rollouts, trajectories = written("lvm")
    assert rollouts.stats.reprefills == 3 * len(trajectories)
    for trajectory in trajectories:
        assert trajectory.stop is StopReason.END and len(trajectory.images()) == 4
        for index, segment in enumerate(trajectory.segments[1:], 1):
            assert [(p.segment, p.start) for p in segment.contexts[0].pieces] == [(index - 1, 0)]
            assert segment.decisions.position_N.tolist() == [0, 1, 2, 3]
            assert set(segment.decisions.kind_N.tolist()) == {DecisionKind.CODE}
            (codes,) = rollouts.policy.encode_images([segment.image])
            np.testing.assert_array_equal(codes, segment.ids)


def test_older_frames_leave_the_context():
    rollouts, trajectories = written("thinker")
    assert rollouts.stats.reprefills > 0
    dropped = 0
    for trajectory in trajectories:
        for index, segment in enumerate(trajectory.segments):
            if segment.author is not Author.POLICY:
                continue
            shown = [p for p in segment.contexts[0].pieces if p.form == "frames"]
            video_before = [i for i in range(index) if trajectory.segments[i].frames is not None]
            assert [p.segment for p in shown] == video_before[-1:]
            count = len(trajectory.segments[shown[0].segment].frames.time_F)
            assert shown[0].keep == (0, min(3, count))
            dropped += len(video_before) > 1
    assert dropped


@pytest.mark.parametrize("name, max_length", [("bagel", 42), ("qwen", 34), ("qwen", 26), ("thinker", 24), ("lvm", 8)])
def test_slots_are_never_passed(name, max_length):
    """Neither an image that is drawn nor one that the environment shows is begun where it does not fit."""
    case = CASES[name]
    policy = case.policy(max_length=max_length)  # its cache refuses more
    asked = [r for r in requests(case, 6) if r.prompt != "big blue dot right"]
    trajectories = engine(case, 3, policy).run(asked)
    assert gap(policy, trajectories) < 1e-5
    if name != "lvm":  # whose contexts never grow
        assert any(t.stop is StopReason.MAX_CONTEXT for t in trajectories)
    for trajectory in trajectories:
        assert trajectory.segments[-1].author is not Author.ENVIRONMENT
