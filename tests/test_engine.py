"""The engine over fake but real policies: on-policy ratios are 1 for words, codes and denoising steps; rows, refills,
neighbours and limits change nothing that was chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats.base import AllowedSet
from policy.base import score_trajectories
from record.trajectory import (
    Author,
    Context,
    DecisionKind,
    Modality,
    Piece,
    StopReason,
    mask_of,
    ranges_of,
)
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.engine.flow import behaviour_mean
from rollout.requests import RolloutError, RolloutRequest
from rollout.writing import FormatContractError
from tests.fakes import FakeFormat, FakePolicy, FakeVocabulary

PROMPTS = ["a red dot", "blue", "big dot left small dot", "a small red dot right", "wrong"]


def requests(groups: int = 4, members: int = 3, seed: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(g, PROMPTS[g % len(PROMPTS)], {"tag": g}, tuple(range(members)), seed) for g in range(groups)
    ]


def engine(
    view: str = "plain",
    guidance: float | None = None,
    max_images: int = 3,
    tools=None,
    max_length=96,
    begins_with_image: bool = False,
    lingers: bool = False,
    asks: int = 0,
    **config,
) -> Engine:
    policy = FakePolicy(max_length=max_length, flow=view == "flow")
    fmt = FakeFormat(view, max_images, guidance, begins_with_image, lingers, asks)
    flow = {"steps": 4, "window": 2, "window_range": (0, 2)}
    settings = {"flow": flow, "rows": 5, "max_tokens": 40, "branches": 1, "guidance": guidance is not None} | config
    return Engine(policy, fmt, RolloutConfig(**settings), tools=tools)


def contents(trajectory) -> list:
    return [
        (s.role, s.ids.tolist(), None if s.latent is None else s.latent.round(4).tolist()) for s in trajectory.segments
    ]


CASES = {
    "plain": {},
    "window": {"view": "window"},
    "flow": {"view": "flow"},
    "guided codes": {"guidance": 2.0, "rows": 8},
    "guided flow": {"view": "flow", "guidance": 1.5, "rows": 8},
    "closed by what follows": {"lingers": True},
    "guided, closed by what follows": {"lingers": True, "guidance": 2.0},
    "by role": {"temperature": {"default": 0.7, "image": 1.8}},
    "nucleus": {"top_p": 0.8},
    "top k": {"top_k": 3},
    "first id forced": {"begins_with_image": True},
    "window, first id forced": {"view": "window", "begins_with_image": True},
    "greedy words": {"temperature": {"say": 0.0}},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_policy_means_ratio_one(case):
    rollouts = engine(**CASES[case])
    trajectories = rollouts.run(requests())
    with torch.no_grad():
        scored = score_trajectories(rollouts.policy, trajectories, entropy=True)
    assert float(scored.log_ratio_N.detach().abs().max()) < 1e-5
    kinds = set(scored.kind_N.tolist())
    drawn = DecisionKind.FLOW if "flow" in case else DecisionKind.CODE
    assert drawn in kinds
    if case != "greedy words":
        assert DecisionKind.WORD in kinds
        assert len(scored.logprob_N) == sum(t.num_decisions() for t in trajectories)
    other = FakePolicy(flow="flow" in case, seed=1)  # the check can fail: other weights, other ratios
    assert float(score_trajectories(other, trajectories).log_ratio_N.detach().abs().max()) > 0.01


@pytest.mark.parametrize("case", ["plain", "window", "flow", "guided codes", "nucleus"])
def test_a_trajectory_depends_on_its_names_only(case):
    """Not on rows, neighbours, refills, order, or on which call wrote it."""
    settings = CASES[case]
    together = engine(**settings | {"rows": 24}).run(requests())
    narrow = engine(**settings | {"rows": 2}).run(requests())
    alone = [
        engine(**settings).run([RolloutRequest(r.group, r.prompt, r.record, (m,), r.seed)])[0]
        for r in reversed(requests())
        for m in reversed(r.members)
    ][::-1]
    for a, b, c in zip(together, narrow, alone, strict=True):
        assert contents(a) == contents(b) == contents(c)
        assert (a.group, a.member, a.stop) == (b.group, b.member, b.stop) == (c.group, c.member, c.stop)
    assert len({str(contents(t)) for t in together}) > 6, "members must differ"
    reseeded = engine(**settings).run(requests(seed=1))
    assert [contents(t) for t in reseeded] != [contents(t) for t in together]


def test_order_groups_and_records():
    trajectories = engine().run(requests(3, 2))
    assert [(t.group, t.member) for t in trajectories] == [(g, m) for g in range(3) for m in range(2)]
    assert [t.prompt for t in trajectories[::2]] == PROMPTS[:3] and trajectories[4].record == {"tag": 2}
    streamed = list(engine().stream(requests(3, 2)))
    assert sorted(t.key for t in streamed) == sorted(t.key for t in trajectories)


def test_nothing_asked_nothing_done():
    assert engine().run([]) == []
    assert engine().run([RolloutRequest(0, "red", {}, ())]) == []


def test_a_prompt_is_computed_once_a_group_and_rows_are_refilled_and_closed():
    rollouts = engine(rows=5)
    trajectories = rollouts.run(requests(4, 3))
    calls = rollouts.policy.caches[0].calls
    assert sum(len(rows) for name, rows in calls if name == "prefill") == 4
    stats = rollouts.stats
    assert stats.prompts == 4 and stats.refills == 12 - 5 and stats.trajectories == 12
    assert stats.tokens == sum(len(s.ids) for t in trajectories for s in t.segments[1:])
    assert stats.decisions == sum(t.num_decisions() for t in trajectories)
    steps = [rows for name, rows in calls if name == "TokenStep"]
    # No row is fed for a finished trajectory: one step for each id but the last of each trajectory.
    assert sum(map(len, steps)) == stats.tokens - 12
    assert max(map(len, steps)) <= 5
    # While the queue lasts, no place is empty; afterwards the rows are the first ones, without gaps.
    tail = steps[-8:]
    assert all(rows == tuple(range(len(rows))) for rows in tail)
    assert [len(rows) for rows in tail] == sorted((len(rows) for rows in tail), reverse=True)


def test_segments_are_the_grammars_and_laws_are_recorded():
    rollouts = engine(temperature={"default": 0.7, "image": 1.8})
    vocabulary = rollouts.policy.vocabulary
    seen = set()
    for trajectory in rollouts.run(requests(5, 4)):
        assert trajectory.segments[0].role == "prompt" and trajectory.segments[0].author is Author.USER
        for index, segment in enumerate(trajectory.segments[1:], 1):
            seen.add(segment.modality)
            decisions, sampling = segment.decisions, segment.decisions.sampling
            assert segment.trained and segment.contexts[0].branch == "full"
            assert [p.segment for p in segment.contexts[0].pieces] == list(range(index))
            assert segment.contexts[0].start == sum(len(s.ids) for s in trajectory.segments[:index])
            for n, position in enumerate(decisions.position_N):
                allowed = mask_of(sampling.sets[sampling.allowed_N[n]], vocabulary.size)
                assert allowed[segment.ids[position]]
            if segment.modality is Modality.IMAGE_TOKENS:
                assert segment.ids[0] == vocabulary.boi and segment.ids[-1] == vocabulary.eoi
                # the opening marker is a word's choice, the closing one nobody's
                assert decisions.position_N.tolist() == [0, 1, 2, 3, 4]
                assert decisions.kind_N.tolist() == [DecisionKind.WORD] + [DecisionKind.CODE] * 4
                np.testing.assert_allclose(sampling.temperature_N, [0.7, 1.8, 1.8, 1.8, 1.8])
                np.testing.assert_array_equal(segment.image[0, :, 0] - 1, segment.ids[1:-1] - vocabulary.code_ids[0])
            else:
                assert len(decisions) == len(segment.ids) and not decisions.kind_N.any()
                assert segment.text == vocabulary.decode(segment.ids)
    assert seen == {Modality.TEXT, Modality.IMAGE_TOKENS}


def test_a_forced_first_id_is_no_decision():
    rollouts = engine(begins_with_image=True)
    for trajectory in rollouts.run(requests(2, 2)):
        image = trajectory.segments[1]
        assert image.ids[0] == rollouts.policy.vocabulary.boi
        assert image.decisions.position_N.tolist() == [1, 2, 3, 4]


def test_top_k_is_recorded_as_the_set_that_was_sampled_from():
    trajectories = engine(top_k=3).run(requests())
    for segment in (s for t in trajectories for s in t.segments[1:]):
        sampling = segment.decisions.sampling
        assert set(sampling.allowed_N.tolist()) == set(range(len(sampling.sets)))
        for ranges in sampling.sets:
            assert (ranges[:, 1] - ranges[:, 0]).sum() <= 3


def test_greedy_decisions_have_no_logprob():
    trajectories = engine(temperature={"default": 0.0}).run(requests())
    for segment in (s for t in trajectories for s in t.segments[1:]):
        assert np.isnan(segment.decisions.logprob_N).all() and segment.decisions.sampling.greedy_N.all()
    assert contents(trajectories[0]) == contents(trajectories[1])  # members of one group cannot differ


def test_flow_steps_are_recorded():
    rollouts = engine("flow")
    written = rollouts.run(requests())
    found = [(t, s) for t in written for s in t.segments if s.modality is Modality.IMAGE_LATENT]
    images = [image for _, image in found]
    assert images
    for trajectory, image in found:
        flow, decisions = image.flow, image.decisions
        # shift 3: t becomes 3 t / (1 + 2 t)
        np.testing.assert_allclose(flow.time_M, [1, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0], atol=1e-6)
        assert flow.point_N.tolist() == [0, 1] and flow.x_P.shape == (3, 2, 3)
        assert decisions.kind_N.tolist() == [DecisionKind.WORD, DecisionKind.FLOW, DecisionKind.FLOW]
        assert decisions.position_N.tolist() == [0, 0, 1] and not decisions.sampling.greedy_N.any()
        np.testing.assert_array_equal(flow.x_next_N[0], flow.x_N[1])
        # Flow-GRPO's deviation: 0.7 sqrt(t / (1 - t)) sqrt(t - t'), where 1 - t is 0 the second time's
        sigma_N = 0.7 * np.sqrt(np.array([1 / 0.1, 0.9 / 0.1]) * np.array([0.1, 0.15]))
        index = next(i for i, s in enumerate(trajectory.segments) if s is image)
        mean_N = behaviour_mean(trajectory, index, torch.from_numpy(sigma_N).float()).numpy()
        z_N = (flow.x_next_N - mean_N) / sigma_N[:, None, None]
        by_hand = (-0.5 * z_N**2 - np.log(sigma_N)[:, None, None] - 0.5 * np.log(2 * np.pi)).mean((1, 2))
        np.testing.assert_allclose(decisions.logprob_N[1:], by_hand, atol=1e-5)
        assert image.ids.tolist() == [3, 4] and image.latent.shape == (2, 3) and image.image.shape == (1, 2, 3)
    assert len({image.flow.x_N[0].tobytes() for image in images}) == len(images)


def test_a_window_is_prefilled_anew():
    rollouts = engine("window", max_images=4)
    trajectories = rollouts.run(requests(5, 4))
    assert rollouts.stats.reprefills > 0
    for trajectory in trajectories:
        for index, segment in enumerate(trajectory.segments[1:], 1):
            images = [i for i in range(1, index) if trajectory.segments[i].modality is Modality.IMAGE_TOKENS]
            assert [p.segment for p in segment.contexts[0].pieces] == [0, *images[-1:]]


def test_guided_rows_are_stepped_with_their_branches_and_recorded():
    rollouts = engine(guidance=2.0, rows=8)
    trajectories = rollouts.run(requests())
    assert rollouts.active_rows == 4 and rollouts.stats.branch_ticks > 0
    for segment in (s for t in trajectories for s in t.segments[1:]):
        image = segment.modality is Modality.IMAGE_TOKENS
        assert [c.branch for c in segment.contexts] == (["full", "uncond"] if image else ["full"])
        assert (segment.decisions.sampling.guidance is not None) == image
    unguided = engine().run(requests())
    assert [contents(t) for t in unguided] != [contents(t) for t in trajectories]


def test_rows_must_hold_the_branches():
    with pytest.raises(RolloutError, match="rollout.rows: 3 rows .* at least 5"):
        engine(guidance=2.0, rows=3, branches=4)


def test_a_group_is_handed_over_while_others_are_still_written():
    rollouts = engine(rows=3)
    total, at, seen = 6, {}, {}
    for trajectory in rollouts.stream(requests(groups=total)):
        seen[trajectory.group] = seen.get(trajectory.group, 0) + 1
        if seen[trajectory.group] == 3:
            at[trajectory.group] = rollouts.stats.tokens
    assert sorted(at) == list(range(total)) and len(set(at.values())) > total // 2
    assert min(at.values()) < rollouts.stats.tokens / 2


def test_images_are_drawn_together():
    rollouts = engine(rows=30)
    trajectories = rollouts.run(requests(8, 4))
    drawn = sum(len(t.images()) for t in trajectories)
    assert drawn == sum(rollouts.policy.draws) == rollouts.stats.images
    assert len(rollouts.policy.draws) <= 8  # at most once a group: its last member brings what others left


# ---- limits ----


@pytest.mark.parametrize("max_tokens", range(1, 30, 3))
def test_max_tokens_never_cuts_an_image(max_tokens):
    rollouts = engine(max_tokens=max_tokens)
    trajectories = rollouts.run(requests(5, 3))
    for trajectory in trajectories:
        written = sum(len(s.ids) for s in trajectory.segments[1:])
        assert written <= max_tokens
        for segment in trajectory.segments[1:]:
            if segment.modality is Modality.IMAGE_TOKENS:
                assert len(segment.ids) == 6
        if trajectory.stop is StopReason.END:
            assert trajectory.segments[-1].ids[-1] == rollouts.policy.vocabulary.eos
    assert any(t.stop is StopReason.MAX_TOKENS for t in trajectories)
    assert float(score_trajectories(rollouts.policy, trajectories).log_ratio_N.detach().abs().max()) < 1e-5


@pytest.mark.parametrize("max_length", [8, 12, 17])
def test_the_context_is_never_passed_and_an_image_that_does_not_fit_is_not_begun(max_length):
    rollouts = engine(max_length=max_length, max_tokens=90, max_images=9)
    vocabulary = rollouts.policy.vocabulary
    trajectories = rollouts.run(requests(5, 4))
    for trajectory in trajectories:
        assert trajectory.num_tokens() <= max_length
        at = 0
        for segment in trajectory.segments:
            for n, position in enumerate(segment.decisions.position_N if segment.decisions else []):
                sampling = segment.decisions.sampling
                allowed = mask_of(sampling.sets[sampling.allowed_N[n]], vocabulary.size)
                if segment.modality is Modality.TEXT:
                    fits = at + position + 6 <= max_length
                    assert allowed[vocabulary.boi] == fits
            at += len(segment.ids)
    assert any(t.stop is StopReason.MAX_CONTEXT for t in trajectories)
    assert float(score_trajectories(rollouts.policy, trajectories).log_ratio_N.detach().abs().max()) < 1e-5


def test_a_forced_image_that_does_not_fit_is_not_begun():
    trajectory = engine(begins_with_image=True, max_tokens=5).run([RolloutRequest(0, "red")])[0]
    assert len(trajectory.segments) == 1 and trajectory.stop is StopReason.MAX_TOKENS


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(RolloutError, match=r"prompt 'big dot left small dot' \(group 2\) has 6 ids.* holds 6"):
        engine(max_length=6).run(requests())


def test_a_format_whose_context_forgets_what_was_sampled_is_refused():
    class Forgetful(FakeFormat):
        """The image forgets the words, but its opening marker was sampled from them."""

        def contexts(self, trajectory, segment):
            if trajectory.segments[segment].modality is Modality.TEXT:
                return super().contexts(trajectory, segment)
            return (Context("full", (Piece(0, "ids", 0),), len(trajectory.segments[0].ids)),)

    rollouts = engine()
    rollouts.fmt = Forgetful("plain")
    with pytest.raises(FormatContractError, match="context of the segment 'image' is not what"):
        rollouts.run(requests())


def test_weight_syncing_while_rows_are_live_is_refused():
    rollouts = engine()
    stream = rollouts.stream(requests())
    next(stream)
    rollouts.version = 7
    with pytest.raises(RuntimeError, match="publish"):
        list(stream)
    assert {s.version for t in rollouts.run(requests()) for s in t.segments[1:]} == {7}


def test_inference_mode_does_not_leak_to_the_reader():
    for trajectory in engine().stream(requests(1, 2)):
        assert not torch.is_inference_mode_enabled()
        assert trajectory.segments


def test_a_larger_vocabulary_and_an_unconstrained_set():
    class Free(FakeFormat):
        def sets(self, vocabulary):
            found = super().sets(vocabulary)
            if found["words"].name != "anything":
                found["words"] = AllowedSet("anything", np.array([[0, vocabulary.size]], np.int32))
            return found

    policy = FakePolicy(FakeVocabulary(codes=30, codes_per_image=9))
    rollouts = Engine(policy, Free("plain", max_images=1), RolloutConfig(rows=4, max_tokens=30))
    trajectories = rollouts.run(requests(4, 3))
    free = [
        s.decisions.sampling
        for t in trajectories
        for s in t.segments[1:]
        if (s.decisions.sampling.allowed_N == -1).any()
    ]
    assert free
    assert float(score_trajectories(policy, trajectories).log_ratio_N.detach().abs().max()) < 1e-5
    assert ranges_of([1, 2]).tolist() == [[1, 3]]
