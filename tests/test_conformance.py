"""The conformance gate: honest writers pass, and each planted fault fails by its name before the first step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import rl.grpo
from formats.config import FormatConfig
from policy.config import LoraSection
from rl.weight_sync import WeightSynchronizer
from rollout.config import RolloutConfig
from rollout.conformance.gate import check_writer
from rollout.conformance.images import scored_segments, swap_images
from rollout.conformance.record import ConformanceError, check_record
from rollout.engine.engine import Engine
from rollout.native import NativeWriter
from rollout.pool.local import LocalRollouts
from rollout.requests import RolloutRequest
from tests.broken_writers import (
    Blind,
    Changed,
    Deaf,
    FromElsewhere,
    FromElsewhereInSecret,
    HalfDeaf,
    Hot,
    Lying,
    ShownFormat,
    TrainsPrefixes,
    cut_trace,
    encoded_again,
    engine_over,
    expanded_twice,
    fake_format,
    other_times,
    other_trace,
    without_pixels,
)
from tests.chameleon_helpers import small_policy
from tests.worker_factories import calling_engine
from tests.writer_runs import TrainedFake, fake_engine, fake_run, rounded
from training import checkpoint
from training.tracking import read_metrics

IMAGE = np.repeat(np.array([[3, 1, 8, 5]], np.uint8)[:, :, None], 3, 2)  # four codes as the fakes draw them


def requests(*media) -> list[RolloutRequest]:
    return [RolloutRequest(-1 - g, prompt, {}, (0, 1, 2), 5, media) for g, prompt in enumerate(("a red dot", "left"))]


def examine(writer, view: str = "plain", fmt=None, media=(), **tolerances):
    policy = TrainedFake(flow=view == "flow")
    return check_writer(writer, policy, requests(*media), fmt or fake_format(view), **tolerances)


# ---- writers that are fit ----


@pytest.mark.parametrize("view", ["plain", "window", "flow"])
def test_the_native_writer_conforms(view):
    policy = TrainedFake(flow=view == "flow", seed=3)
    before = copy.deepcopy(policy.model.state_dict())
    writer = NativeWriter(engine_over(TrainedFake(flow=view == "flow"), view))
    found = check_writer(writer, policy, requests(), fake_format(view))
    assert found.gap < 1e-4 and found.decisions > 20 and found.moved > 1e-3 and found.swapped > 1e-3
    for name, value in before.items():  # the trainer's weights are what they were, and the writer has them
        assert torch.equal(policy.model.state_dict()[name], value)
        assert torch.equal(writer.policy.model.state_dict()[name], value)
    assert writer.version == 0


def test_images_that_a_prompt_shows_are_checked():
    fmt = ShownFormat("plain", max_images=1)
    found = examine(NativeWriter(engine_over(TrainedFake(), fmt=fmt)), fmt=fmt, media=(IMAGE,))
    assert found.swapped > 1e-3


def test_an_inexact_writer_conforms_within_its_own_tolerance():
    found = examine(rounded())
    assert 1e-4 < found.gap < 0.05
    with pytest.raises(ConformanceError, match="on average, over the tolerance of 1e-05"):
        examine(rounded(), sampling_tolerance=1e-5)
    lying = rounded()
    lying.exact = True
    with pytest.raises(ConformanceError, match="by up to .*, over the tolerance of 0.0001"):
        examine(lying)


@pytest.mark.parametrize("writer_class", [NativeWriter, Deaf])
def test_fresh_adapters_are_moved_though_they_are_zero(writer_class):
    torch.manual_seed(0)
    trainer, mine = (small_policy(LoraSection(r=2)) for _ in range(2))
    fmt = FormatConfig(max_images=1).build()
    writer = writer_class(Engine(mine, fmt, RolloutConfig(rows=4, max_tokens=40)))
    asked = [RolloutRequest(-1, "a red circle", {}, (0, 1), 5)]
    if writer_class is Deaf:
        with pytest.raises(ConformanceError, match="weights do not reach writer 0: .*adapters"):
            check_writer(writer, trainer, asked, fmt)
    else:
        assert check_writer(writer, trainer, asked, fmt).moved > 1e-3


@pytest.mark.parametrize("view", ["plain", "window", "flow"])
def test_the_native_writer_goes_on_from_prefixes(view):
    found = examine(NativeWriter(engine_over(TrainedFake(flow=view == "flow"), view)), view, forks=True)
    assert found.gap < 1e-4


# ---- planted faults ----


@pytest.mark.parametrize(
    "writer_class, message",
    [
        (
            FromElsewhere,
            r"goes on from member \d after \d segments: segment 0 \('prompt'\) is another than the parent's",
        ),
        (FromElsewhereInSecret, "as it recorded them in forks, are off the trainer's by up to .*a context that"),
        (TrainsPrefixes, r"goes on from member \d after \d segments: segment \d .* is trained: .* in the loss twice"),
    ],
)
def test_a_fork_from_another_prefix_is_found(writer_class, message):
    examine(writer_class(engine_over(TrainedFake())))  # nothing is wrong with what begins at a prompt
    with pytest.raises(ConformanceError, match=message) as raised:
        examine(writer_class(engine_over(TrainedFake())), forks=True)
    assert raised.value.exit_code == 2


def changed(change, view="plain"):
    return Changed(engine_over(TrainedFake(flow=view == "flow"), view), change)


@pytest.mark.parametrize(
    "writer, view, message",
    [
        # verl-omni#552: the adapter's sync binds no module
        (lambda: Deaf(engine_over(TrainedFake())), "plain", "weights do not reach writer 0: .*bound to no module"),
        (lambda: HalfDeaf(engine_over(TrainedFake())), "plain", "weights reach writer 0 in part: .*names .*not mapped"),
        # UniRL#397: the sampler's trace is lost in transit, one short or replaced by another of its length
        (
            lambda: changed(cut_trace, "flow"),
            "flow",
            r"latents are recorded, and \d+ lie around .*trace was cut on the way",
        ),
        (
            lambda: changed(other_trace, "flow"),
            "flow",
            "as it recorded them when it sampled, are off the trainer's by up to .*a flow: .*a sampler",
        ),
        (lambda: changed(other_times, "flow"), "flow", "10 recorded times are not those of a schedule .* down to 0"),
        # slime#1847: images are not seen in later turns
        (
            lambda: NativeWriter(engine_over(Blind(), "window")),
            "window",
            "writer 0 does not see the images: .*every turn",
        ),
        # trl#6789: a temperature on one side
        (
            lambda: Hot(fake_engine({"temperature": 0.7})),
            "plain",
            "as it recorded them when it sampled, are off the trainer's by up to .*Look for a temperature",
        ),
        (
            lambda: changed(encoded_again),
            "plain",
            r"segment 0 \('prompt'\): the prompt's ids are .* the trainer would feed",
        ),
    ],
    ids=["deaf", "half deaf", "cut trace", "other trace", "other times", "blind", "hot", "encoded again"],
)
def test_a_fault_is_found_by_name(writer, view, message):
    with pytest.raises(ConformanceError, match=message) as raised:
        examine(writer(), view)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "change, message",
    [
        # prime-rl#2786: image tensors are dropped on the wire
        (without_pixels, r"segment 0 \('shown'\): the request shows an image that the record has not"),
        # trl#6718: placeholders are expanded a second time
        (expanded_twice, r"segment 0 \('shown'\): the prompt's ids are .*\(10\) and the trainer would feed .*\(6\)"),
    ],
)
def test_what_a_prompt_shows_must_arrive(change, message):
    fmt = ShownFormat("plain", max_images=1)
    with pytest.raises(ConformanceError, match=message):
        examine(Changed(engine_over(TrainedFake(), fmt=fmt), change), fmt=fmt, media=(IMAGE,))


def test_without_a_format_lost_pixels_are_still_missed():
    fmt = ShownFormat("plain", max_images=1)
    writer = Changed(engine_over(TrainedFake(), fmt=fmt), without_pixels)
    with pytest.raises(ConformanceError, match="its image is missing from the record"):
        check_writer(writer, TrainedFake(), requests(IMAGE))


def trained(trajectory):
    return next(s for s in trajectory.segments if s.decisions is not None and len(s.decisions))


def spoilt(name):
    def change(t):
        segment = trained(t)
        decisions = segment.decisions
        if name == "decisions":
            segment.decisions = None
        elif name == "context":
            segment.contexts = ()
        elif name == "later":
            piece = segment.contexts[0].pieces[0]
            object.__setattr__(piece, "segment", 9)
        elif name == "temperatures":
            decisions.sampling.temperature_N = decisions.sampling.temperature_N[:-1]
        elif name == "nan":
            decisions.logprob_N[0] = np.nan
        elif name == "density":
            decisions.logprob_N[0] = 0.5
        elif name == "order":
            decisions.position_N = decisions.position_N[::-1].copy()
        elif name == "set":
            decisions.sampling.sets = tuple(np.array([[0, 1]], np.int32) for _ in decisions.sampling.sets)
        elif name == "which set":
            decisions.sampling.allowed_N[:] = 99
        elif name == "version":
            segment.version = 7
        elif name == "member":
            t.member = 8

    return change


@pytest.mark.parametrize(
    "name, message",
    [
        ("decisions", "the policy wrote it, and no decision is recorded"),
        ("context", "the context that it was conditioned on is not recorded"),
        ("later", "its context names segment 9, which does not come before it"),
        ("temperatures", r"\d+ decisions, but \d+ temperatures: each has its sampling parameters"),
        ("nan", "log-prob is missing or not finite"),
        ("density", "a log-prob is above 0"),
        ("order", "positions are not in order"),
        ("set", "which is not in its allowed set"),
        ("which set", "names the allowed set 99 of"),
        ("version", "stamped with version 7 of the weights, and version 3 was published"),
        ("member", r"was asked for the trajectories \(group, member\) .*each is written once"),
    ],
)
def test_what_the_record_lacks_is_said(name, message):
    asked = requests()
    trajectories = [
        t
        for g in LocalRollouts(engine_over(TrainedFake())).generate(asked).groups
        for t in g
        if len(trained(t).decisions) > 1 or True
    ]
    for trajectory in trajectories:
        for segment in trajectory.segments:
            segment.version = 3
    check_record(trajectories, asked, TrainedFake(), fake_format(), 3)
    longest = max(trajectories, key=lambda t: len(trained(t).decisions))
    spoilt(name)(longest)
    with pytest.raises(ConformanceError, match=message):
        check_record(trajectories, asked, TrainedFake(), fake_format(), 3)


# ---- other images ----


@pytest.mark.parametrize("view", ["plain", "window", "flow"])
def test_swapped_images_are_others_and_only_what_sees_them_is_compared(view):
    policy = TrainedFake(flow=view == "flow")
    trajectories = [t for g in LocalRollouts(engine_over(policy, view)).generate(requests()).groups for t in g]
    swapped, seen_N = swap_images(trajectories, policy)
    places = scored_segments(trajectories)
    assert len(seen_N) == len(places) and seen_N.any() and not seen_N.all()
    for (number, index), seen in zip(places, seen_N, strict=True):
        segments = trajectories[number].segments
        sees = any(segments[p.segment].image is not None for p in segments[index].contexts[0].pieces)
        assert seen == (sees and segments[index].image is None)
    for before, after in zip(trajectories, swapped, strict=True):
        for one, other in zip(before.segments, after.segments, strict=True):
            assert (one is other) == (one.image is None)
            if one.image is not None:
                assert not np.array_equal(one.image, other.image) and one.image.shape == other.image.shape
                assert len(one.ids) == len(other.ids)


# ---- in a run ----


def test_a_run_with_a_broken_writer_ends_before_its_first_step(tmp_path):
    run = fake_run(tmp_path, LocalRollouts(Deaf(fake_engine())))
    before = copy.deepcopy(run.policy.model.state_dict())
    with pytest.raises(ConformanceError, match="weights do not reach writer 0"):
        rl.grpo.train(run)
    assert not (tmp_path / "checkpoints").exists() and not list(read_metrics(tmp_path / "metrics.jsonl"))
    assert all(torch.equal(before[name], value) for name, value in run.policy.model.state_dict().items())


@pytest.mark.parametrize("repeatable", [True, False])
def test_the_gate_calls_no_tool_that_is_not_repeatable(tmp_path, repeatable):
    calls = tmp_path / "calls"
    engine = calling_engine({"rows": 6, "max_tokens": 40}, {"path": str(calls), "repeatable": repeatable})
    found = check_writer(NativeWriter(engine), TrainedFake(), requests(), engine.fmt)
    assert found.decisions > 20 and sum(engine.stats.tool_calls.values()) > 2  # they were asked for
    assert calls.exists() is repeatable
    engine.run(requests())  # what is no rehearsal calls
    assert calls.exists()
    engine.close()


def test_a_resumed_run_with_a_broken_writer_loses_nothing(tmp_path):
    rl.grpo.train(fake_run(tmp_path, LocalRollouts(fake_engine()), steps=2, prompts_per_step=2, save_every=1))
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    newest = checkpoint.latest(tmp_path / "checkpoints")
    with pytest.raises(ConformanceError, match="weights do not reach writer 0"):
        rl.grpo.train(
            fake_run(tmp_path, LocalRollouts(Deaf(fake_engine())), steps=3, save_every=1, prompts_per_step=2), newest
        )
    assert checkpoint.latest(tmp_path / "checkpoints") == newest
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == rows
    rl.grpo.train(fake_run(tmp_path, LocalRollouts(fake_engine()), steps=3, save_every=1, prompts_per_step=2), newest)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_the_gate_leaves_a_run_as_it_would_have_been(tmp_path, monkeypatch):
    rl.grpo.train(fake_run(tmp_path / "with", LocalRollouts(fake_engine()), steps=2, prompts_per_step=2))
    monkeypatch.setattr("rl.grpo.check_writers", lambda *arguments: None)
    rl.grpo.train(fake_run(tmp_path / "without", LocalRollouts(fake_engine()), steps=2, prompts_per_step=2))
    for one, other in zip(
        *(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without")), strict=True
    ):
        assert {k: v for k, v in one.items() if "time" not in k and "per_s" not in k} == {
            k: v for k, v in other.items() if "time" not in k and "per_s" not in k
        }


def test_a_writer_that_shares_the_trainers_weights_is_not_asked(tmp_path):
    engine = fake_engine()
    run = fake_run(tmp_path, LocalRollouts(engine), policy=engine.policy)
    assert WeightSynchronizer(run.policy, run.rollouts).shared()
    assert rl.grpo.check_writers(run, None, WeightSynchronizer(run.policy, run.rollouts)) is None


def test_a_writer_that_only_says_that_it_shares_is_found_before_anything_is_trained(tmp_path):
    engine = fake_engine()
    before = copy.deepcopy(engine.policy.model.state_dict())
    with pytest.raises(ConformanceError, match=r"the writer says that it samples with .* \(shares\), and it does not"):
        rl.grpo.train(fake_run(tmp_path, LocalRollouts(Lying(engine)), policy=engine.policy))
    assert all(torch.equal(before[name], value) for name, value in engine.policy.model.state_dict().items())
    rl.grpo.train(fake_run(tmp_path / "true", LocalRollouts(engine), policy=engine.policy, steps=1))
