"""Stepping, scoring, adapters and references of the chameleon family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policy.base import FlowStep, TokenStep, score_trajectories
from policy.chameleon.family import ContextOverflow, ReferenceLost
from policy.config import LoraSection
from policy.guidance import GuidanceError
from record.trajectory import Context, Guidance, Piece, RecordError, Trajectory, full_history, mask_of
from runtime.errors import UserError
from tests.chameleon_helpers import prompt_segment, sample, sampled, small_policy, windowed

PLANS = [["text", "image", "text"], ["text"], ["image", "text", "image", "text"]]


def full_logits(policy, ids, positions=None):
    """transformers' own forward over one row."""
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.long)[None]
    positions = None if positions is None else torch.as_tensor(np.asarray(positions), dtype=torch.long)[None]
    with torch.inference_mode():
        return policy.core(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0]


def one_piece(ids) -> tuple[Trajectory, Context]:
    """A context of given ids."""
    from record.trajectory import Author, Modality, Segment

    segment = Segment("prompt", Author.USER, Modality.TEXT, False, np.asarray(ids, np.int32))
    return Trajectory("", {}, "strokes", [segment]), Context("full", (Piece(0, "ids", 0),), len(ids))


@pytest.mark.parametrize("swin_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_steps_equal_the_full_forward(swin_norm, kv_heads):
    policy = small_policy(swin_norm=swin_norm, num_key_value_heads=kv_heads)
    rng = np.random.default_rng(0)
    rows = {row: list(rng.integers(4, policy.vocabulary.size, length)) for row, length in enumerate([3, 9, 1, 6, 4])}
    with torch.inference_mode():
        cache = policy.allocate(5, 64)
        got = policy.prefill(cache, range(5), [one_piece(rows[row]) for row in range(5)])
        for row in range(5):
            torch.testing.assert_close(got[row], full_logits(policy, rows[row])[-1], atol=1e-5, rtol=1e-5)
        # Subsets in any order: all, neighbours, two far apart, one, unsorted.
        for subset in ([0, 1, 2, 3, 4], [1, 2], [0, 4], [3], [4, 2, 0, 1], [0, 1, 2, 3, 4]):
            ids = rng.integers(4, policy.vocabulary.size, len(subset))
            got = policy.step(cache, subset, TokenStep(torch.from_numpy(ids))).logits_BV
            for place, row in enumerate(subset):
                rows[row].append(int(ids[place]))
                torch.testing.assert_close(got[place], full_logits(policy, rows[row])[-1], atol=1e-5, rtol=1e-5)


def test_rows_are_refilled_and_copied():
    policy = small_policy()
    rng = np.random.default_rng(1)
    long, short, fresh = (list(rng.integers(4, policy.vocabulary.size, n)) for n in (20, 5, 7))
    with torch.inference_mode():
        cache = policy.allocate(4, 64)
        policy.prefill(cache, [0, 2], [one_piece(long), one_piece(short)])
        policy.prefill(cache, [0], [one_piece(fresh)])  # a finished row's place, shorter than before
        policy.copy(cache, 2, [1, 3])
        rows = [fresh, list(short), list(short), list(short)]
        for _ in range(3):
            ids = rng.integers(4, policy.vocabulary.size, 4)
            got = policy.step(cache, range(4), TokenStep(torch.from_numpy(ids))).logits_BV
            for row in range(4):
                rows[row].append(int(ids[row]))
                torch.testing.assert_close(got[row], full_logits(policy, rows[row])[-1], atol=1e-5, rtol=1e-5)


def test_windowed_context_keeps_its_positions():
    policy = small_policy()
    trajectory = sampled(policy, [["text", "image"]])[0]
    context = windowed(trajectory, 2)
    first, second = trajectory.segments[0].ids, trajectory.segments[1].ids
    half = len(second) // 2
    ids = [*first, *second[half:]]
    start = len(first) + len(second)
    positions = [*range(len(first)), *range(len(first) + half, start)]
    with torch.inference_mode():
        cache = policy.allocate(1, 64)
        got = policy.prefill(cache, [0], [(trajectory, context)])
        torch.testing.assert_close(got[0], full_logits(policy, ids, positions)[-1], atol=1e-5, rtol=1e-5)
        got = policy.step(cache, [0], TokenStep(torch.tensor([7]))).logits_BV
        expected = full_logits(policy, [*ids, 7], [*positions, start])[-1]
        torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-5)


def test_append_equals_stepping():
    policy = small_policy()
    trajectories = sampled(policy, [["text", "image"], ["text", "image"]])
    with torch.inference_mode():
        cache = policy.allocate(2, 64)
        contexts = [(each, full_history(each, 1)) for each in trajectories]
        policy.prefill(cache, [0, 1], contexts)
        appended = policy.append(
            cache, [0, 1], [(each, Piece(1, "ids", len(each.segments[0].ids))) for each in trajectories]
        )
        policy.prefill(cache, [0, 1], contexts)
        for place in range(len(trajectories[0].segments[1].ids)):
            ids = torch.tensor([int(each.segments[1].ids[place]) for each in trajectories])
            stepped = policy.step(cache, [0, 1], TokenStep(ids)).logits_BV
    torch.testing.assert_close(appended, stepped, atol=1e-5, rtol=1e-5)


def test_on_policy_ratio_is_one():
    policy = small_policy()
    scored = score_trajectories(policy, sampled(policy, PLANS), entropy=True)
    assert len(scored.logprob_N) == (5 + 17 + 5) + 5 + (17 + 5 + 17 + 5)
    assert scored.log_ratio_N.abs().max() < 1e-5
    assert (scored.behaviour_N < -0.5).any()  # far from a distribution where everything agrees
    assert scored.pass_N.tolist() == sorted(scored.pass_N.tolist())
    scored.logprob_N.sum().backward()
    assert policy.core.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_score_is_the_log_softmax_under_the_recorded_law():
    policy = small_policy()
    trajectory = sampled(policy, [["text", "image"]])[0]
    image, decisions = trajectory.segments[2], trajectory.segments[2].decisions
    ids = np.concatenate([segment.ids for segment in trajectory.segments])
    logits = full_logits(policy, ids)
    offset = len(ids) - len(image.ids)
    expected, entropies = [], []
    for n, position in enumerate(decisions.position_N):
        allowed = torch.from_numpy(
            mask_of(decisions.sampling.sets[decisions.sampling.allowed_N[n]], policy.vocabulary.size)
        )
        row = logits[offset + position - 1][allowed] / float(decisions.sampling.temperature_N[n])
        place = int(allowed[: image.ids[position]].sum())
        expected.append(row.log_softmax(-1)[place])
        entropies.append(torch.distributions.Categorical(logits=row).entropy())
    scored = score_trajectories(policy, [trajectory], entropy=True)
    mine = scored.segment_N == 2
    torch.testing.assert_close(scored.logprob_N[mine].detach(), torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.entropy_N[mine], torch.stack(entropies), atol=1e-5, rtol=0)


def test_windowed_segments_are_scored_in_rows_of_their_own():
    policy = small_policy()
    scored = score_trajectories(policy, sampled(policy, PLANS, context=windowed))
    assert scored.log_ratio_N.abs().max() < 1e-5


def guided_branches(trajectory, number):
    images = [index for index in range(number) if trajectory.segments[index].role == "sketch"]
    pieces, at = [], 0
    for index in images:
        pieces.append(Piece(index, "ids", at))
        at += len(trajectory.segments[index].ids)
    return [Context("unconditional", (), 0), Context("image", tuple(pieces), at)]


def test_guidance_is_replayed_for_codes_and_not_for_words():
    policy = small_policy()
    guidance = Guidance("normal", {"full": 2.0, "image": 1.2})
    trajectories = sampled(policy, PLANS, guidance=guidance, branches=guided_branches)
    assert score_trajectories(policy, trajectories).log_ratio_N.abs().max() < 2e-5
    for trajectory in trajectories:
        for segment in trajectory.segments:
            if segment.decisions is not None:
                segment.decisions.sampling.guidance = None
    assert score_trajectories(policy, trajectories).log_ratio_N.abs().max() > 0.1  # and it had mattered


def test_missing_branch_is_named():
    policy = small_policy()
    guidance = Guidance("normal", {"full": 2.0, "image": 1.2})
    trajectory = sampled(policy, [["image"]], guidance=guidance, branches=guided_branches)[0]
    segment = trajectory.segments[1]
    segment.contexts = tuple(context for context in segment.contexts if context.branch != "image")
    with pytest.raises(RecordError, match="segment 1 .*'image'.*full, unconditional"):
        score_trajectories(policy, [trajectory])
    with pytest.raises(GuidanceError, match="needs the branch 'image'"):
        policy.guide({"full": torch.zeros(2), "unconditional": torch.zeros(2)}, guidance)


def test_greedy_and_untrained_decisions_are_left_out():
    policy = small_policy()
    trajectory = sampled(policy, [["text", "image"]])[0]
    trajectory.segments[1].decisions.sampling.temperature_N[:2] = 0
    trajectory.segments[1].decisions.logprob_N[:2] = np.nan
    assert (score_trajectories(policy, [trajectory]).segment_N == 1).sum() == 3
    trajectory.segments[2].trained = False
    scored = score_trajectories(policy, [trajectory])
    assert scored.segment_N.tolist() == [1, 1, 1]
    trajectory.segments[1].trained = False
    assert len(score_trajectories(policy, [trajectory]).logprob_N) == 0


def test_ratio_and_divergence_against_other_weights():
    policy = small_policy()
    trajectories = sampled(policy, PLANS)
    with torch.no_grad():
        old = score_trajectories(policy, trajectories)
        with policy.reference():
            reference = score_trajectories(policy, trajectories)
        for parameter in policy.parameters():
            parameter.add_(0.01)
        with policy.reference():
            again = score_trajectories(policy, trajectories)
    assert torch.equal(again.logprob_N, old.logprob_N)  # the copy, not the live weights
    new = score_trajectories(policy, trajectories, old=old, reference=reference)
    gap = old.logprob_N - new.logprob_N
    assert gap.abs().max() > 1e-3
    torch.testing.assert_close(new.log_ratio_N, -gap)
    torch.testing.assert_close(new.divergence_N, gap.exp() - gap - 1)
    with pytest.raises(ValueError, match="`old` holds 5 decisions"):
        score_trajectories(policy, trajectories, old=score_trajectories(policy, trajectories[1:2]))


def test_reference_asked_for_too_late_is_refused():
    policy = small_policy()
    with torch.no_grad():
        policy.parameters()[0].add_(1.0)
    with pytest.raises(ReferenceLost, match="keep_reference"), policy.reference():
        pass


def test_adapters_sample_score_and_save(tmp_path):
    policy = small_policy(lora=LoraSection(r=4, alpha=8))
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    base = sampled(policy, PLANS)
    with torch.no_grad():
        with policy.reference():
            reference = score_trajectories(policy, base)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        assert score_trajectories(policy, base).log_ratio_N.abs().max() > 1e-2
        with policy.reference():
            assert torch.equal(score_trajectories(policy, base).logprob_N, reference.logprob_N)
    tuned = sampled(policy, PLANS)
    scored = score_trajectories(policy, tuned)
    assert scored.log_ratio_N.abs().max() < 2e-5  # steps go through the adapters too
    scored.logprob_N.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())

    from policy.chameleon.family import load
    from policy.config import PolicyConfig

    policy.save(tmp_path / "merged")
    merged = load(PolicyConfig(path=str(tmp_path / "merged")))
    torch.testing.assert_close(score_trajectories(merged, tuned).logprob_N, scored.logprob_N, atol=1e-5, rtol=0)


def test_unknown_adapter_target_is_named():
    with pytest.raises(UserError, match="no linear layer 'q_prj'; did you mean 'q_proj'"):
        small_policy(lora=LoraSection(target_modules=["q_prj"]))


def test_too_long_a_prompt_is_named():
    policy = small_policy()
    trajectory = Trajectory("x", {}, "strokes", [prompt_segment(policy, "red " * 30)], group=4, member=1)
    cache = policy.allocate(1, 16)
    with pytest.raises(ContextOverflow, match="trajectory 4-1 needs 32 ids, but a row holds 16"):
        policy.prefill(cache, [0], [(trajectory, full_history(trajectory, 1))])


def test_only_tokens_are_stepped():
    policy = small_policy()
    zero = torch.zeros(1)
    with pytest.raises(TypeError, match="no flow"):
        policy.step(policy.allocate(1, 8), [0], FlowStep(zero, zero))


def test_images_there_and_back():
    policy = small_policy()
    rng = np.random.default_rng(0)
    contents = [policy.vocabulary.to_ids(rng.integers(0, 32, 16)) for _ in range(3)]
    images = policy.decode_images(contents)
    assert all(image.shape == (16, 16, 3) and image.dtype == np.uint8 for image in images)
    seen = policy.encode_images(images)
    assert all(ids.dtype == np.int32 and len(ids) == 16 for ids in seen)
    assert set(np.concatenate(seen)) <= set(policy.vocabulary.code_ids.tolist())
    # The tokenizer that the tests use is untrained: equality is of `see` with the encoder's own codes.
    from policy.chameleon.vq import to_pixels

    with torch.inference_mode():
        codes = policy.core.model.vqmodel.codes(to_pixels(images)).numpy()
    assert np.array_equal(policy.vocabulary.to_codes(np.stack(seen)), codes)
    with pytest.raises(UserError, match="is no visual code"):
        policy.decode_images([np.append(contents[0][:-1], policy.vocabulary.eoi)])
    with pytest.raises(UserError, match="15 codes"):
        policy.decode_images([contents[0][:-1]])


def test_decision_without_anything_before_it_is_refused():
    policy = small_policy()
    trajectory = sampled(policy, [["text"]])[0]
    trajectory.segments[1].contexts = (Context("full", (), 0),)
    with pytest.raises(RecordError, match="nothing precedes it"):
        score_trajectories(policy, [trajectory])


def test_sampling_is_reproducible():
    policy = small_policy()
    first, again = (sampled(policy, [["text", "image"]])[0] for _ in range(2))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first.segments, again.segments, strict=True))
    with torch.inference_mode():
        other = sample(policy, Trajectory("", {}, "strokes", [first.segments[0]]), ["text", "image"], seed=9)
    assert not np.array_equal(first.segments[2].ids, other.segments[2].ids)
