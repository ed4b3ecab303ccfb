"""Writers: the native one asleep and awake, others by name, and what each can do against what a recipe asks for."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from formats.config import FormatConfig
from formats.registry import get_format
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from rollout.capabilities import Capabilities, WriterError, check_capabilities
from rollout.config import RolloutConfig
from rollout.forks import fork
from rollout.native import NativeWriter
from rollout.pool.local import LocalRollouts
from rollout.registry import check_writer_config, make_writer
from rollout.requests import RolloutRequest
from rollout.spec import engine_spec
from rollout.weights.receive import UNPUBLISHED
from rollout.weights.wire import WeightSyncError, pack
from rollout.writer import take_up, write_groups
from tests.worker_factories import engine

ROLLOUT = {"rows": 4, "max_tokens": 24}
TINY = TinySection(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def requests(groups: int = 2) -> list[RolloutRequest]:
    return [RolloutRequest(group, "a red dot", {}, (0, 1, 2), seed=5) for group in range(groups)]


def sampled(writer) -> list[tuple]:
    return [
        (t.group, t.member, s.ids.tobytes(), s.decisions.logprob_N.tobytes())
        for _, group in write_groups(writer, requests())
        for t in group
        for s in t.segments
        if s.decisions
    ]


# ---- sleep ----


def cache_bytes(cache) -> int:
    return cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()


def test_sleep_frees_the_cache_and_waking_changes_no_result():
    writer = NativeWriter(engine(ROLLOUT))
    before = sampled(writer)
    policy = writer.policy
    held, size = weakref.ref(policy.caches[-1].keys), cache_bytes(policy.caches[-1])
    policy.caches.clear()  # the fakes remember theirs for other tests
    writer.sleep()
    gc.collect()
    assert held() is None and size > 10_000
    with pytest.raises(RuntimeError, match=r"sleeps: wake\(\) comes before stream\(\)"):
        next(writer.stream(requests()))
    writer.wake()
    assert cache_bytes(policy.caches[-1]) == size  # there before anything is written
    assert sampled(writer) == before and len(policy.caches) == 1


def test_a_writer_that_never_wrote_has_nothing_to_free():
    writer = NativeWriter(engine(ROLLOUT))
    writer.sleep()
    writer.wake()
    assert not writer.policy.caches and sampled(writer) == sampled(NativeWriter(engine(ROLLOUT)))


def test_a_writer_does_not_sleep_while_it_writes():
    writer = NativeWriter(engine(ROLLOUT))
    stream = writer.stream(requests())
    next(stream)
    with pytest.raises(RuntimeError, match="is writing: its stream is read to the end or closed"):
        writer.sleep()
    stream.close()
    writer.sleep()


def test_a_pool_that_is_told_to_puts_its_writer_to_sleep_between_generations():
    awake, asleep = LocalRollouts(engine(ROLLOUT)), LocalRollouts(engine(ROLLOUT), sleeps=True)
    for _ in range(2):
        one, other = awake.generate(requests()).groups, asleep.generate(requests()).groups
        assert [s.ids.tolist() for g in one for t in g for s in t.segments] == [
            s.ids.tolist() for g in other for t in g for s in t.segments
        ]
        policy = asleep._writer.policy
        held = weakref.ref(policy.caches[-1].keys)
        policy.caches.clear()
        gc.collect()
        assert held() is None
    assert asleep.probe(one[0])[0].shape == awake.probe(one[0])[0].shape  # scoring needs no cache


# ---- groups are accounted for ----


class Careless(NativeWriter):
    """What it writes is not what it was asked for, as `change` has it."""

    def __init__(self, change) -> None:
        super().__init__(engine(ROLLOUT), "worker 3")
        self.change = change

    def stream(self, requests):
        yield from self.change(list(super().stream(requests)))


def without_parent(trajectories):
    for trajectory in trajectories:
        trajectory.parent = None
    return trajectories


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda written: written[:-1],
            "the worker in this process ended its stream, and the trajectory 1-2 was never written",
        ),
        (lambda written: [*written, written[0]], "wrote the trajectory 0-0, which was not asked for, or has been"),
        (lambda written: [replace(written[0], member=7), *written], "wrote the trajectory 0-7, which was not asked"),
        (lambda written: [replace(written[0], group=9), *written], "wrote the trajectory 9-0, which was not asked"),
    ],
)
def test_what_was_not_asked_for_or_never_came_is_said(change, message):
    with pytest.raises(WriterError, match=message):
        LocalRollouts(Careless(lambda written: change(sorted(written, key=lambda t: t.key)))).generate(requests())


def test_a_writer_that_knows_no_forks_is_named():
    (parent,) = NativeWriter(engine(ROLLOUT)).stream([RolloutRequest(0, "a red dot", seed=5)])
    asked = [fork(parent, 1, (4, 5))]
    assert len(LocalRollouts(Careless(list)).generate(asked).groups) == 1
    with pytest.raises(WriterError, match="0-[45], which was not asked for.* with the request's group and parent"):
        LocalRollouts(Careless(without_parent)).generate(asked)


# ---- weights ----


def test_a_writer_that_does_not_count_its_version_is_refused():
    class Forgetful(NativeWriter):
        def take(self, manifest, tensors):
            self.policy.model.load_state_dict(dict(tensors))

    writer = Forgetful(engine(ROLLOUT), "worker 3")
    update = pack(engine(ROLLOUT, seed=1).policy.model.state_dict(), 4)
    with pytest.raises(WeightSyncError, match=f"version 4 was given to worker 3, which says .* version {UNPUBLISHED}"):
        take_up(writer, update.manifest, (), update.chunks)


def test_tensors_are_made_one_at_a_time_by_name():
    state = engine(ROLLOUT, seed=1).policy.model.state_dict()
    seen = {}

    class Named(NativeWriter):
        def take(self, manifest, tensors):
            seen.update(tensors)
            super().take(manifest, tensors)

    update = pack(state, 0, chunk_bytes=200)
    take_up(Named(engine(ROLLOUT)), update.manifest, (), update.chunks)
    assert seen.keys() == state.keys() and all(torch.equal(seen[name], state[name]) for name in state)


# ---- by name ----


def twin(policy, fmt, rollout, words):
    """A writer of one's own."""
    return NativeWriter(engine({"rows": rollout.rows, "max_tokens": rollout.max_tokens}))


def words_only(policy, fmt, rollout, words):
    pytest.fail("it was built")


words_only.capabilities = Capabilities(images=False, guidance=False, full_constraint=False, kept_sets=False)


def prompts_only(policy, fmt, rollout, words):
    pytest.fail("it was built")


prompts_only.capabilities = Capabilities(forks=False, tools=False)


def from_the_prompt(policy, fmt, rollout, words):
    """A writer that only says what it cannot do once it is built."""
    writer = NativeWriter(engine({"rows": rollout.rows, "max_tokens": rollout.max_tokens}))
    writer.capabilities = Capabilities(forks=False, tools=False)
    return writer


def no_writer(policy, fmt, rollout, words):
    return object()


def broken(policy, fmt, rollout, words):
    raise ImportError("no module named vllm")


def made(name: str):
    section = ChameleonPolicyConfig(tiny=TINY)
    return make_writer(section, FormatConfig(), RolloutConfig(writer=name, **ROLLOUT), ["a", "dot"])


def test_writers_are_found_by_name_and_by_dotted_path():
    assert made("native").policy.family == "chameleon"
    assert made("tests.test_writer.twin").policy.family == "fake"


@pytest.mark.parametrize(
    "name, message",
    [
        ("natve", "rollout.writer: no 'natve'; did you mean 'native'"),
        (
            "tests.test_writer.twn",
            "rollout.writer: 'tests.test_writer.twn': .* has no function 'twn'; did you mean 'twin'",
        ),
        ("tests.test_writer.ROLLOUT", "is dict, and no function that builds a writer"),
        ("tests.test_writer.no_writer", "gave a value of type object, which is no Writer: it has no 'name'"),
        ("tests.test_writer.broken", "'tests.test_writer.broken' cannot be made: ImportError: no module named vllm"),
    ],
)
def test_what_is_no_writer_is_said(name, message):
    with pytest.raises(Exception, match=message) as raised:
        made(name)
    assert raised.value.exit_code == 2


def test_what_a_writer_cannot_do_is_known_before_it_is_built():
    config = RolloutConfig(writer="tests.test_writer.words_only")
    with pytest.raises(
        WriterError, match="'tests.test_writer.words_only' writes words alone, and format 'strokes' has"
    ):
        check_writer_config(config, get_format("strokes"), "images")
    check_writer_config(RolloutConfig(guidance=True, top_p=0.9), get_format("strokes"), "full")


def test_forks_and_tools_are_known_before_a_writer_is_built():
    config = RolloutConfig(writer="tests.test_writer.prompts_only")
    with pytest.raises(WriterError, match=r"^grpo.fork: the writer 'tests.test_writer.prompts_only' cannot go on"):
        check_writer_config(config, get_format("strokes"), "images", forks=True)
    with pytest.raises(WriterError, match=r"^tools: the writer .* calls none, and the recipe names 'look'; leave"):
        check_writer_config(config, get_format("strokes"), "images", tools=["look"])
    check_writer_config(config, get_format("strokes"), "images")
    check_writer_config(RolloutConfig(), get_format("strokes"), "images", True, ["look"])  # the native one can


def test_a_writer_that_says_so_when_it_is_built_is_refused_in_its_own_process():
    config = RolloutConfig(writer="tests.test_writer.from_the_prompt", **ROLLOUT)
    for forks in (False, True):
        spec = engine_spec(ChameleonPolicyConfig(tiny=TINY), FormatConfig(), config, ["a", "dot"], forks=forks)
        if forks:
            with pytest.raises(
                WriterError, match=r"^grpo.fork: .*from_the_prompt' cannot go on .* rollout.writer: nat"
            ):
                spec.build()
        else:
            assert spec.build().policy.family == "fake"


# ---- capabilities ----


@pytest.mark.parametrize(
    "lacking, asked, constrain, message",
    [
        ("images", {}, "images", r"^rollout.writer: 'vllm' writes words alone, .*'strokes' .*\('sketch'"),
        ("guidance", {"guidance": True}, "images", r"^rollout.guidance: .* set it to false"),
        ("full_constraint", {}, "full", r"^format.constrain: .* set it to 'images'"),
        ("kept_sets", {"top_p": 0.9}, "images", r"^rollout.top_p: .* set it to 1,"),
        ("kept_sets", {"top_k": 20}, "images", r"^rollout.top_k: .* set it to 0,"),
    ],
)
def test_what_a_writer_cannot_do_is_refused_by_its_key(lacking, asked, constrain, message):
    fmt, config = get_format("strokes"), RolloutConfig(**asked)
    with pytest.raises(WriterError, match=message):
        check_capabilities("vllm", Capabilities(**{lacking: False}), fmt, constrain, config)
    check_capabilities("native", Capabilities(), fmt, constrain, config)
    if asked or constrain == "full":  # what is not asked for need not be had
        check_capabilities("vllm", Capabilities(**{lacking: False}), fmt, "images", RolloutConfig())
