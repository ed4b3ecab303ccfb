"""The warm start of any family: demonstrations condition and are decided as the engine conditions and decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from formats.base import ContextSpec, Part, SeenOnly, whole_history
from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from formats.registry import get_format
from formats.render import render_parts
from policy.base import score_trajectories
from policy.extra_losses import FlowLossConfig
from policy.guidance import branch_weights
from policy.scoring.flow_matching import draw_times, interpolate
from record.trajectory import (
    Author,
    DecisionKind,
    Frames,
    Modality,
    RecordError,
    Segment,
    StopReason,
    Trajectory,
)
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from runtime.errors import UserError
from sft.config import SftConfig
from sft.demonstrations import render_all, see
from sft.sources import load_demonstrations
from sft.teacher_forcing import examples, teacher_forced
from sft.train import warm_start
from tasks.base import Demonstration
from tests.chameleon_helpers import prompt_segment, small_policy
from tests.fakes import LATENT_SHAPE, FakeFormat, FakePolicy, FakeVocabulary
from training.tracking import Tracker, read_metrics

FLOW = {"steps": 4, "window": 2, "window_range": (0, 2), "shift": 1.0}


def section(**changes) -> SftConfig:
    fast = {"batch_size": 8, "warmup_steps": 0, "learning_rate": 2e-2, "logging_steps": 5, "save_steps": 1000}
    return SftConfig(**(fast | {"lr_scheduler_type": "constant", "max_steps": 40} | changes))


def wrote(policy, fmt, count=2, **config) -> list[Trajectory]:
    engine = Engine(policy, fmt, RolloutConfig(rows=6, max_tokens=40, flow=FLOW, **config))
    prompts = ["a red dot", "blue", "big dot left small dot"]
    return engine.run([RolloutRequest(g, prompts[g], {}, tuple(range(count)), 0) for g in range(len(prompts))])


# ---- conditioned and decided as sampled ----


@pytest.mark.parametrize("view", ["plain", "window", "flow"])
def test_what_is_learned_is_what_the_engine_decided_under_the_contexts_that_it_sampled_from(view):
    """Of what the policy itself wrote, taken as demonstrations: same contexts, same decisions."""
    policy, fmt = FakePolicy(flow=view == "flow"), FakeFormat(view)
    drawn = 0
    for trajectory in wrote(policy, fmt, 16):
        forced = teacher_forced(trajectory, fmt, policy, policy.max_length)
        assert len(forced.segments) == len(trajectory.segments)
        for sampled, learned in zip(trajectory.segments[1:], forced.segments[1:], strict=True):
            assert learned.contexts == sampled.contexts[:1]
            words = sampled.decisions.kind_N != DecisionKind.FLOW  # a latent has no decisions until it is denoised
            assert learned.decisions.position_N.tolist() == sampled.decisions.position_N[words].tolist()
            assert learned.decisions.kind_N.tolist() == sampled.decisions.kind_N[words].tolist()
            drawn += sampled.modality is not Modality.TEXT
    assert drawn >= 4


def test_cross_entropy_is_minus_the_log_prob_at_temperature_1_over_all_ids():
    """Against the sampler: at temperature 1 a decision among some ids has its log-prob over all, less their total."""
    policy, fmt = FakePolicy(), FakeFormat("window")
    (trajectory, *_) = wrote(policy, fmt)
    (example, *_), _ = examples([trajectory], fmt, policy, policy.max_length)
    scored = policy.score(example.passes)
    with torch.no_grad():
        sampled = score_trajectories(policy, [trajectory])
    assert len(scored.logprob_N) == len(sampled.logprob_N)
    assert (scored.logprob_N < sampled.logprob_N + 1e-6).all() and torch.isfinite(scored.logprob_N).all()
    segment = trajectory.segments[1]
    cache = policy.allocate(1, 32)
    with torch.inference_mode():
        logits_V = policy.prefill(cache, [0], [(trajectory, segment.contexts[0])])[0]
    assert float(scored.logprob_N[0]) == pytest.approx(float(logits_V.log_softmax(-1)[int(segment.ids[0])]), abs=1e-5)


# ---- families that learn ----


def told(vocabulary: FakeVocabulary, count: int, seed: int = 0) -> list[Trajectory]:
    """ "left" or "right"; an image; then the word that stood first, and a color that the image says."""
    rng = np.random.default_rng(seed)
    words = {word: vocabulary.encode(word)[0] for word in ("left", "right", "red", "blue")}
    trajectories = []
    for group in range(count):
        side, color = ("left", "right")[rng.integers(2)], rng.integers(2)
        codes = [int(vocabulary.code_ids[color]), *(int(i) for i in rng.choice(vocabulary.code_ids, 3))]
        image = [vocabulary.boi, *codes, vocabulary.eoi]
        after = [words[side], words[("red", "blue")[color]], vocabulary.eos]
        segments = [
            Segment("prompt", Author.USER, Modality.TEXT, False, np.array([vocabulary.bos], np.int32)),
            Segment("say", Author.POLICY, Modality.TEXT, True, np.array([words[side], vocabulary.stop], np.int32)),
            Segment("image", Author.POLICY, Modality.IMAGE_TOKENS, True, np.array(image, np.int32)),
            Segment("say", Author.POLICY, Modality.TEXT, True, np.array(after, np.int32)),
        ]
        trajectories.append(Trajectory("a", {}, "fake", segments, group=group, stop=StopReason.DEMONSTRATION))
    return trajectories


class SeesAll(FakeFormat):
    """The fault: it samples in a window and would warm-start on the full history."""

    def contexts(self, trajectory, segment):
        return (whole_history(segment),)


def logprob_of_last_words(policy, fmt, trajectories) -> np.ndarray:
    """Mean log-probs of the last segment's three ids, under the contexts that `fmt` samples from: float [3]."""
    found, _ = examples(trajectories, fmt, policy, policy.max_length)
    with torch.no_grad():
        scored = policy.score([one for example in found for one in example.passes])
    return scored.logprob_N[scored.segment_N == 3].reshape(-1, 3).mean(0).numpy()


@pytest.mark.parametrize("view", [pytest.param("plain", marks=pytest.mark.slow), "window"])
def test_it_learns_under_the_contexts_that_it_samples_from(view, tmp_path):
    policy, fmt = FakePolicy(), FakeFormat(view)
    heldout = told(policy.vocabulary, 24, seed=1)
    before = logprob_of_last_words(policy, fmt, heldout)
    tracker = Tracker(tmp_path / "sft")
    warm_start(policy, fmt, told(policy.vocabulary, 64), section(), tmp_path, tracker=tracker)
    rows = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert rows[-1]["sft/loss_text"] < 0.5 * rows[0]["sft/loss_text"]
    assert set(rows[0]) >= {"sft/loss", "sft/loss/say", "sft/loss/image", "sft/loss_image"}
    side, color, end = after = logprob_of_last_words(policy, fmt, heldout)
    assert (after > before + 0.5).all() and end > -0.2
    saved = torch.load(tmp_path / "sft" / "model" / "model.pt", weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in policy.model.state_dict().items())
    if view == "plain":
        return
    # What the window hides cannot be known: at best ln 2. With the fault it would be learned from what is hidden, and
    # the contexts that are sampled from would be others than those learned.
    assert side > -0.85
    faulty = FakePolicy()
    warm_start(faulty, SeesAll(view), told(policy.vocabulary, 64), section(), tmp_path / "faulty")
    at_sampled = logprob_of_last_words(faulty, fmt, heldout)
    assert at_sampled.mean() < after.mean() - 0.3
    assert logprob_of_last_words(faulty, SeesAll(view), heldout).mean() > at_sampled.mean() + 0.3


def denoised(policy: FakePolicy, count: int = 24) -> list[Trajectory]:
    """A word, and the image that it asks for: one of two latents."""
    v = policy.vocabulary
    latents = {"red": np.full(LATENT_SHAPE, 0.8, np.float32), "blue": np.full(LATENT_SHAPE, -0.8, np.float32)}
    trajectories = []
    for group in range(count):
        word = ("red", "blue")[group % 2]
        parts = [Part("image", image=policy.decode_images([latents[word]])[0])]
        trajectory = Trajectory(word, {}, "fake_flow", [], group=group, stop=StopReason.DEMONSTRATION)
        prompt = np.array([v.bos, *v.encode(word)], np.int32)
        trajectory.segments = [
            Segment("prompt", Author.USER, Modality.TEXT, False, prompt, word),
            Segment("image", Author.POLICY, Modality.IMAGE_LATENT, True, image=parts[0].image),
            Segment("say", Author.POLICY, Modality.TEXT, True, np.array([v.eos], np.int32)),
        ]
        trajectories.append(trajectory)
    see(trajectories, policy)
    return trajectories


@pytest.mark.slow
def test_a_family_that_denoises_learns_images_by_their_velocity(tmp_path):
    policy, fmt = FakePolicy(flow=True), FakeFormat("flow")
    trajectories = denoised(policy)
    image = trajectories[0].segments[1]
    assert image.ids.tolist() == [policy.vocabulary.boi, policy.vocabulary.eoi]
    np.testing.assert_allclose(image.latent, np.full(LATENT_SHAPE, 0.8), atol=0.02)  # 8 bits of an image

    def distances() -> list[float]:
        settings = RolloutConfig(rows=4, max_tokens=20, flow={"sampler": "ode", "steps": 8, "shift": 1.0})
        engine = Engine(policy, fmt, settings)
        asked = [RolloutRequest(g, word, {}, (0, 1, 2), 0) for g, word in enumerate(("red", "blue"))]
        wanted = {"red": 0.8, "blue": -0.8}
        found = [(t.prompt, s.latent) for t in engine.run(asked) for s in t.segments if s.latent is not None]
        return [float(np.abs(latent - wanted[prompt]).mean()) for prompt, latent in found]

    tracker = Tracker(tmp_path / "sft")
    config = section(max_steps=200, learning_rate=1e-2, logging_steps=10, flow_loss={"weight": 2.0})
    last = warm_start(policy, fmt, trajectories, config, tmp_path, tracker=tracker)
    rows = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert rows[-1]["sft/loss_flow"] < 0.5 * rows[0]["sft/loss_flow"]
    # The words are the opening marker and the end of the turn; the loss is their mean and twice the velocity's.
    assert last["loss"] == pytest.approx(last["loss_text"] + 2.0 * last["loss_flow"], rel=1e-4)
    assert np.mean(distances()) < 0.35

    for trajectory in trajectories:  # images alone, and nothing that learns them
        del trajectory.segments[2]
        trajectory.segments[1].ids = np.empty(0, np.int32)
    with pytest.raises(UserError, match="no demonstration has a trained segment"):
        warm_start(policy, fmt, trajectories, section(flow_loss={"weight": 0}), tmp_path / "none")


def test_a_denoising_warm_start_that_was_stopped_goes_on_with_the_very_same_times_and_noise(tmp_path):
    def run(folder, steps, resume=False):
        policy = FakePolicy(flow=True)
        config = section(max_steps=steps, save_steps=3, logging_steps=3)
        warm_start(policy, FakeFormat("flow"), denoised(policy), config, folder, resume=resume)
        return policy.model.state_dict()

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6, resume=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=0, rtol=0)


def test_velocity_loss_by_hand():
    clean, noise = torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]]), torch.tensor([[[5.0, -1.0]], [[4.0, 0.0]]])
    x, velocity = interpolate(clean, noise, torch.tensor([0.25, 1.0]))
    assert x.tolist() == [[[2.0, 2.0]], [[4.0, 0.0]]]  # 0.75 * 1 + 0.25 * 5, 0.75 * 3 - 0.25; all noise
    assert velocity.tolist() == [[[4.0, -4.0]], [[4.0, -2.0]]]
    torch.manual_seed(0)
    uniform, shifted, normal = (
        draw_times(FlowLossConfig(**changes), 4000)
        for changes in ({"times": "uniform"}, {"times": "uniform", "shift": 3.0}, {"mean": 1.0, "std": 0.5})
    )
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    # the mean of 3t / (1 + 2t) over [0, 1] is 3/2 - 3/4 ln 3
    assert float(shifted.mean()) == pytest.approx(1.5 - 0.75 * math.log(3), abs=0.02)
    assert float(normal.median()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    assert all(bool(((t > 0) & (t < 1)).all()) for t in (uniform, shifted, normal))


def test_a_loss_that_the_family_does_not_have_is_refused_before_anything_is_written(tmp_path):
    policy = FakePolicy()
    for changes, key in (({"visual_loss": 1.0}, "sft.visual_loss"), ({"labels": "release"}, "sft.labels=release")):
        with pytest.raises(UserError, match=f"{key}: .*'fake'"):
            warm_start(policy, FakeFormat(), told(policy.vocabulary, 4), section(**changes), tmp_path)
    assert not (tmp_path / "sft").exists()


# ---- guidance ----


def test_branches_of_guidance_are_learned_where_conditioning_is_dropped(tmp_path):
    """Chameleon, three guided images: all of them learned in full, or under one of their branches' contexts."""
    policy = small_policy()
    fmt = get_format("strokes", max_images=2, guidance="normal")
    v = policy.vocabulary
    asked = ["a red circle", "a blue square", "left of", "wrong ."]  # each asks for an image of one code

    def demonstration(group: int) -> Trajectory:
        codes = np.full(v.codes_per_image, v.code_ids[5 * (group % 4)])
        segments = [prompt_segment(policy, asked[group % 4])]
        for role, text in (("plan", "red circle"), ("sketch", ""), ("inspect", "fine .")):
            drawn = role == "sketch"
            ids = [v.boi, *codes, v.eoi] if drawn else v.encode(text)
            modality = Modality.IMAGE_TOKENS if drawn else Modality.TEXT
            segments.append(Segment(role, Author.POLICY, modality, True, np.array(ids, np.int32), text))
        return Trajectory(asked[group % 4], {}, "strokes", segments, group=group, stop=StopReason.DEMONSTRATION)

    trajectories = [demonstration(group) for group in range(40)]
    in_full, _ = examples(trajectories, fmt, policy, 256)
    contexts = [e.trajectory.segments[2].contexts for e in in_full]
    assert {c[0].branch for c in contexts} == {"full"} and {len(c) for c in contexts} == {1}
    assert {len(c[0].pieces) for c in contexts} == {2}
    dropped, _ = examples(trajectories, fmt, policy, 256, dropout=0.5, seed=3)
    seen = [len(e.trajectory.segments[2].contexts[0].pieces) for e in dropped]
    assert 10 < seen.count(2) < 30 and set(seen) <= {0, 2}  # "unconditional" and, of a first image, "image" see nothing
    again, _ = examples(trajectories, fmt, policy, 256, dropout=0.5, seed=3)
    assert [e.trajectory.segments[2].contexts for e in again] == [e.trajectory.segments[2].contexts for e in dropped]
    for example in dropped:  # words are conditioned on everything, always
        assert len(example.trajectory.segments[3].contexts[0].pieces) == 3

    class Unconditional:
        """What guidance subtracts, as if it were the context of images."""

        def contexts(self, trajectory, segment):
            return (ContextSpec("full", ()) if segment == 2 else fmt.contexts(trajectory, segment)[0],)

    def first_code(policy) -> float:
        """Mean log-prob of an image's first code where nothing says which image it is."""
        found, _ = examples(trajectories[:4], Unconditional(), policy, 256)
        assert all(not e.trajectory.segments[2].contexts[0].pieces for e in found)
        with torch.no_grad():
            scored = policy.score([one for e in found for one in e.passes])
        codes = scored.logprob_N[(scored.segment_N == 2) & (scored.kind_N == DecisionKind.CODE)]
        return float(codes.reshape(4, -1)[:, 0].mean())

    assert branch_weights(fmt.guidance(trajectories[0], 2))["unconditional"] != 0
    after = {}
    for dropout in (0.0, 0.5):
        learner = small_policy()
        config = section(max_steps=30, learning_rate=1e-2, conditioning_dropout_prob=dropout)
        warm_start(learner, fmt, trajectories, config, tmp_path / str(dropout))
        after[dropout] = first_code(learner)
    # At best it knows that there are four images: -ln 4 = -1.39. What it never learned it cannot know.
    assert after[0.5] > -1.8 and after[0.0] < after[0.5] - 0.5, after


# ---- images and answers that are only seen ----


ASKS = Grammar(
    name="asks",
    roles=(
        Role("think", tags=(("<think>", "</think>"),)),
        Role("call", tags=(("<call>", "</call>"),)),
        Role("crop", Modality.IMAGE, author=Author.ENVIRONMENT),
        Role("note", author=Author.ENVIRONMENT),
        Role("answer", tags=(("<answer>", "</answer>"),)),
    ),
    follow={
        START: ("think",),
        "think": ("call", "answer"),
        "call": ("crop", "note"),
        "crop": ("note", "think"),
        "note": ("think",),
        "answer": (END,),
    },
    max_images=0,
)


@pytest.fixture(scope="module")
def asking():
    """The format, and a Chameleon whose tokenizer knows its tags."""
    from policy.registry import load_policy
    from tests.chameleon_helpers import WORDS, small_config

    fmt = DeclaredFormat(ASKS)
    return fmt, load_policy(small_config(tags=list(ASKS.tags)), WORDS)


def picture(policy, value) -> np.ndarray:
    size = policy.core.config.vq_config.resolution
    return np.full((size, size, 3), value, np.uint8)


def shown_and_answered(policy, value=200) -> Demonstration:
    """A prompt that shows an image, and a call that is answered by another one and a word."""
    parts = (
        Part("think", "<think> a circle </think>"),
        Part("call", "<call> left </call>"),
        Part("crop", image=picture(policy, 30)),
        Part("note", "fine"),
        Part("think", "<think> red </think>"),
        Part("answer", "<answer> red circle </answer>"),
    )
    return Demonstration("a red circle", {}, parts, media=(picture(policy, value),))


def test_images_in_prompts_and_answers_are_perceived_condition_what_follows_and_are_not_learned(asking, tmp_path):
    fmt, policy = asking
    v = policy.vocabulary
    (trajectory,) = render_all([shown_and_answered(policy)], fmt, policy)
    roles = [(s.role, s.author) for s in trajectory.segments]
    first = next(i for i, s in enumerate(trajectory.segments) if s.author is Author.POLICY)
    assert [role for role, _ in roles[first:]] == ["think", "call", "crop", "note", "think", "answer"]
    (asked,) = [s for s in trajectory.segments[:first] if s.image is not None]
    crop, note = trajectory.segments[first + 2 : first + 4]
    for s in (asked, crop):
        codes = policy.encode_images([s.image])[0].tolist()
        assert s.ids.tolist() == [v.boi, *codes, v.eoi] and not s.trained
    assert (crop.author, note.author) == (Author.ENVIRONMENT, Author.ENVIRONMENT) and not note.trained

    (example,), _ = examples([trajectory], fmt, policy, 256)
    learned = [s.role for s in example.trajectory.segments if s.decisions is not None]
    assert learned == ["think", "call", "think", "answer"]
    ids = [int(i) for s in trajectory.segments for i in s.ids]
    with torch.no_grad():
        scored = policy.score(example.passes)
        logprob_TV = policy.core(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    starts = np.cumsum([0, *(len(s.ids) for s in trajectory.segments)])
    by_hand = [
        float(logprob_TV[starts[n] + t - 1, int(i)])
        for n, s in enumerate(trajectory.segments)
        if s.author is Author.POLICY
        for t, i in enumerate(s.ids)
    ]
    assert scored.logprob_N.tolist() == pytest.approx(by_hand, abs=1e-4)

    # another image in the prompt, other log-probs of what is learned
    (other,) = render_all([shown_and_answered(policy, 90)], fmt, policy)
    (changed,), _ = examples([other], fmt, policy, 256)
    with torch.no_grad():
        assert (policy.score(changed.passes).logprob_N - scored.logprob_N).abs().max() > 1e-3
    assert math.isfinite(
        warm_start(policy, fmt, [trajectory, other], section(max_steps=1, logging_steps=1), tmp_path)["loss"]
    )


def test_a_file_of_messages_shows_images_and_has_answers_of_a_tool(asking, tmp_path):
    import json

    from PIL import Image

    fmt, policy = asking
    for name, value in (("asked", 200), ("crop", 30)):
        Image.fromarray(picture(policy, value)).save(tmp_path / f"{name}.png")

    def assistant(text):
        return {"role": "assistant", "content": text}

    asked = [{"type": "image", "image": "asked.png"}, {"type": "text", "text": "a red circle"}]
    answer = [{"type": "image", "image": "crop.png"}, {"type": "text", "text": "fine"}]
    messages = [
        {"role": "user", "content": asked},
        assistant("<think> a circle </think><call> left </call>"),
        {"role": "tool", "content": answer},
        assistant("<think> red </think><answer> red circle </answer>"),
    ]

    def load(messages):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        found = load_demonstrations(SftConfig(data=str(tmp_path / "rows.jsonl")), fmt, policy)
        see(found, policy)
        return found

    (read,) = load(messages)
    (own,) = render_all([shown_and_answered(policy)], fmt, policy)
    assert [(s.role, s.author, s.trained, s.ids.tolist()) for s in read.segments] == [
        (s.role, s.author, s.trained, s.ids.tolist()) for s in own.segments
    ]
    unasked = [messages[0], assistant("<think> a circle </think>"), messages[2], messages[3]]
    with pytest.raises(UserError, match="rows.jsonl line 1: .*speaks where nothing calls it"):
        load(unasked)
    with pytest.raises(UserError, match="'call' calls the environment, and the demonstration goes on without"):
        load([*messages[:2], messages[3]])
    with pytest.raises(UserError, match="message 2: a message of 'tool'"):
        load([messages[0], messages[2]])


def test_an_answer_of_another_kind_than_the_format_has_is_named(asking):
    fmt, policy = asking
    (call, image) = Part("", "<think> a </think><call> left </call>"), Part("", "red", author=Author.ENVIRONMENT)
    grammar = Grammar(
        name="asks",
        roles=tuple(r for r in ASKS.roles if r.name != "note"),
        follow={**{k: f for k, f in ASKS.follow.items() if k != "note"}, "call": ("crop",), "crop": ("think",)},
        max_images=0,
    )
    with pytest.raises(RecordError, match="after 'call' the environment says 'crop', and not text"):
        render_parts(DeclaredFormat(grammar), "a", {}, [call, image], [True, True], policy.vocabulary)


def test_a_policy_that_draws_nothing_cannot_be_taught_to_draw_and_frames_that_it_cannot_see_are_named():
    policy = FakePolicy()
    drawn = Segment("image", Author.POLICY, Modality.IMAGE, True, image=np.ones((1, 4, 3), np.uint8))
    trajectory = Trajectory("a", {}, "fake", [drawn])

    class Reads(FakeVocabulary):
        imaging = SeenOnly()

    policy.vocabulary = Reads()
    with pytest.raises(UserError, match=r"demonstration 0 \('a'\): segment 0 \('image'\): .*'fake' draws none"):
        see([trajectory], policy)
    frames = Frames(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2, dtype=np.float32))
    shown = Segment("prompt", Author.USER, Modality.VIDEO_FRAMES, False, frames=frames)
    with pytest.raises(UserError, match="holds 2 frames"):
        see([Trajectory("a", {}, "strokes", [shown])], small_policy())
