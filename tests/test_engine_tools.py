"""Tools in the engine: rows are parked while their tool works, answers are context that nobody sampled, and neither the
order of answers nor anything that goes wrong with a tool changes what was chosen elsewhere."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from policy.base import score_trajectories
from record.trajectory import Author, Modality, Segment, StopReason
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import RolloutError, RolloutRequest
from rollout.tools import runner
from rollout.tools.base import ToolError
from rollout.tools.config import ToolConfig
from rollout.tools.registry import Tools
from tests.fakes import FakeFormat, FakePolicy, FakeVocabulary
from tests.test_engine import contents, requests
from tests.tool_helpers import Blocking, Counting, Delayed, Hanging, Raising, Replies


class Wordy(FakeVocabulary):
    """Has an id for every word: that of "wrong" where it has no better one."""

    def encode(self, text):
        return super().encode(" ".join(w if f" {w}" in self.pieces else "wrong" for w in text.split()))


def engine(tool=None, view="plain", asks=2, max_length=96, limits=None, policy=None, **config) -> Engine:
    flow = view == "flow"
    policy = policy or FakePolicy(Wordy(codes_per_image=0 if flow else 4), max_length=max_length, flow=flow)
    settings = {"flow": {"steps": 4, "window": 2, "window_range": (0, 2)}, "rows": 5, "max_tokens": 40} | config
    tools = None if tool is None else Tools([tool], {tool.name: ToolConfig(**(limits or {}))})
    return Engine(policy, FakeFormat(view, asks=asks), RolloutConfig(**settings), tools=tools)


def said(trajectories) -> list[str]:
    return [s.text for t in trajectories for s in t.segments if s.author is Author.ENVIRONMENT]


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize("view", ["plain", "flow", "window"])
def test_tools_answer_between_segments(view, reproducible):
    tool = Counting()
    rollouts = engine(tool, view, reproducible=reproducible)
    trajectories = rollouts.run(requests(5, 4))
    found = [(t, i) for t in trajectories for i, s in enumerate(t.segments) if s.author is Author.ENVIRONMENT]
    assert len(found) > 5
    for trajectory, index in found:
        segment, call = trajectory.segments[index], trajectory.segments[index - 1]
        assert segment.decisions is None and not segment.trained and segment.role == "observation"
        assert segment.text == ("big right" if len(call.ids) > 3 else "small right")
        assert segment.ids.tolist() == rollouts.policy.vocabulary.encode(segment.text)
        if index + 1 < len(trajectory.segments) and view != "window":
            assert index in [p.segment for p in trajectory.segments[index + 1].contexts[0].pieces]
    with torch.no_grad():
        scored = score_trajectories(rollouts.policy, trajectories)
    assert float(scored.log_ratio_N.abs().max()) < 1e-5
    assert rollouts.stats.tool_calls == {"counting": sum(tool.calls.values())} and rollouts.stats.tool_errors == {
        "counting": 0
    }
    assert len(found) == sum(tool.calls.values())


@pytest.mark.parametrize("view", ["plain", "flow"])
def test_what_is_chosen_depends_neither_on_the_order_of_answers_nor_on_rows(view):
    quick = engine(Counting(), view).run(requests(5, 4))
    for rows, reproducible in ((5, False), (20, False), (2, False), (5, True)):
        tool = Delayed(0.03)
        rollouts = engine(tool, view, rows=rows, reproducible=reproducible)
        slow = rollouts.run(requests(5, 4))
        assert [contents(t) for t in slow] == [contents(t) for t in quick]
        assert [t.stop for t in slow] == [t.stop for t in quick]
        assert rows == 2 or tool.at_once > 1, "calls are at work together"


def test_under_reproducible_even_the_last_bits_are_the_same():
    def logprobs(tool):
        rollouts = engine(tool, rows=7, reproducible=True)
        return [
            s.decisions.logprob_N.tobytes() for t in rollouts.run(requests(5, 4)) for s in t.segments if s.decisions
        ], [calls for calls in rollouts.policy.caches[0].calls]

    assert logprobs(Counting()) == logprobs(Delayed(0.02)), "the policy computes the same batches"


def test_a_parked_row_takes_no_tick_while_others_decode():
    tool = Delayed(0.1)
    rollouts = engine(tool, rows=20, reproducible=False)
    stepped = []
    inner = rollouts.policy.step

    def step(cache, rows, inputs):
        stepped.append((sum(s.parked is not None for s in batch.sequences), len(rows)))
        return inner(cache, rows, inputs)

    rollouts.policy.step = step
    batch = rollouts._batch(requests(5, 4))
    list(batch.ticks())
    calls = rollouts.policy.caches[0].calls
    assert any(parked and rows for parked, rows in stepped), "others decode while tools work"
    # One step for each id but the last of each trajectory: a row that waits is fed nothing.
    assert sum(len(rows) for name, rows in calls if name == "TokenStep") == rollouts.stats.tokens - 20
    assert rollouts.stats.tools_parked_seconds > rollouts.stats.tools_waited_seconds > 0 and tool.at_once > 1


def test_several_segments_answer_one_call():
    image = np.array([[[3, 3, 3], [1, 1, 1], [8, 8, 8], [2, 2, 2]]], np.uint8)
    rollouts = engine(Replies("big dot", image, "right"), max_length=200, max_tokens=60)
    trajectories = rollouts.run(requests(3, 3))
    answered = 0
    for trajectory in trajectories:
        environment = [i for i, s in enumerate(trajectory.segments) if s.author is Author.ENVIRONMENT]
        assert len(environment) % 3 == 0
        for first in environment[::3]:
            words, seen, more = trajectory.segments[first : first + 3]
            assert (words.text, more.text) == ("big dot", "right")
            assert seen.modality is Modality.IMAGE_TOKENS and seen.ids.tolist() == [3, 18, 16, 23, 17, 4]
            assert seen.image is image and seen.decisions is None and not seen.trained
            answered += 1
    assert answered > 3
    with torch.no_grad():
        assert float(score_trajectories(rollouts.policy, trajectories).log_ratio_N.abs().max()) < 1e-5


def test_a_call_may_be_answered_by_nothing():
    nothing = engine(Replies())
    trajectories = nothing.run(requests(5, 4))
    assert not said(trajectories) and sum(nothing.stats.tool_calls.values()) > 5
    # So it is the thought that a format without tools would have written.
    assert [contents(t) for t in trajectories] == [contents(t) for t in engine(asks=0).run(requests(5, 4))]


def test_an_answer_that_does_not_fit_is_dropped_whole():
    tool = Replies("big big big big", "right right right right")
    rollouts = engine(tool, max_length=12, max_tokens=90)
    trajectories = rollouts.run(requests(5, 4))
    assert not said(trajectories) and any(t.stop is StopReason.MAX_CONTEXT for t in trajectories)
    assert len(tool.closed) == len(tool.opened) > 0


def test_nothing_is_called_where_nothing_could_follow():
    tool = Counting()
    trajectories = engine(tool, max_tokens=4, max_length=200).run(requests(5, 4))
    stop = FakeVocabulary().stop
    last = [t for t in trajectories if sum(len(s.ids) for s in t.segments if s.author is Author.POLICY) == 4]
    calls = [t for t in last if t.segments[-1].ids[-1] == stop]
    assert calls and all(t.stop is StopReason.MAX_TOKENS for t in calls)
    for trajectory in calls:
        assert tool.calls[trajectory.key] == min(2, sum(s.ids[-1] == stop for s in trajectory.segments[:-1]))


# ---- what goes wrong ----


@pytest.mark.parametrize(
    "tool, limits, message",
    [
        (Raising(ToolError("the page has no such line")), {}, "error: the page has no such line"),
        (Raising(ZeroDivisionError("division")), {}, "error: counting failed: ZeroDivisionError: division"),
        (Raising(SystemExit(3)), {}, "error: counting failed: RuntimeError: SystemExit: 3"),
        (Hanging(), {"timeout_s": 0.05}, "error: counting did not answer within 0.05 s"),
        (Blocking(0.5), {"timeout_s": 0.05}, "error: blocking did not answer within 0.05 s"),
        (
            Replies("a", "b", "c"),
            {"max_segments": 2},
            "error: counting answered with 3 segments; at most 2 are let through (max_segments)",
        ),  # fmt: skip
        (
            Replies("a red dot"),
            {"max_characters": 8},
            "error: counting answered with 9 characters; at most 8 are let through (max_characters)",
        ),  # fmt: skip
        (
            Replies(np.zeros((4, 5, 3), np.uint8)),
            {"max_pixels": 19},
            "error: counting answered with 20 pixels; at most 19 are let through (max_pixels)",
        ),  # fmt: skip
        (
            Replies(np.zeros((4, 5, 4), np.uint8)),
            {},
            "error: counting answered with an array of uint8 [4, 5, 4], no image",
        ),  # fmt: skip
        (
            Replies(Segment("observation", Author.ENVIRONMENT, Modality.IMAGE, False)),
            {},
            "error: counting answered with a segment that is to show something and holds no image",
        ),  # fmt: skip
        (Replies(7), {}, "error: counting answered with int, neither words nor an image"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str | dict) else None,
)
def test_what_goes_wrong_is_words_that_the_model_reads(tool, limits, message):
    rollouts = engine(tool, limits=limits, asks=1, rows=20)
    trajectories = rollouts.run(requests(2, 3))
    heard = said(trajectories)
    assert heard and (set(heard) == {message} or isinstance(tool, Blocking) and message in heard)
    assert rollouts.stats.tool_errors == rollouts.stats.tool_calls == {tool.name: len(heard)}
    counts = rollouts.stats.counts()
    assert counts[f"tools/errors/{tool.name}"] == counts["tools/errors"] == counts["tools/calls"] == len(heard)
    with torch.no_grad():
        assert float(score_trajectories(rollouts.policy, trajectories).log_ratio_N.abs().max()) < 1e-5


def test_an_answer_in_bare_words_is_refused():
    class Bare(Counting):
        async def answer(self, call, trajectory):
            return "big"

    assert set(said(engine(Bare(), asks=1).run(requests(2, 3)))) == {
        "error: counting answered with str; a tool answers with a list"
    }


def test_words_that_the_policy_cannot_say_are_left_out():
    tool = Replies("the big unspeakable dot")
    rollouts = engine(tool, asks=1, policy=FakePolicy(FakeVocabulary()))
    assert set(said(rollouts.run(requests(2, 3)))) == {"big dot"}


def test_words_that_are_left_out_are_told_once_however_many_answers_there_are(caplog, monkeypatch):
    monkeypatch.setattr("rollout.tools.answers._told", set())

    class Various(Counting):
        async def answer(self, call, trajectory):
            return [f"unspeakable{sum(self.calls.values())} dot"]

    tool = Various()
    engine(tool, asks=2, policy=FakePolicy(FakeVocabulary())).run(requests(2, 3))
    assert sum(tool.calls.values()) > 3
    assert sum("are shortened to those that the policy knows" in line for line in caplog.messages) == 1


def test_a_tool_that_blocks_the_loop_is_named(monkeypatch):
    monkeypatch.setattr(runner, "BLOCKED_S", 0.3)
    monkeypatch.setattr("rollout.engine.parking.POLL_S", 0.05)

    class Selfish(Counting):
        async def answer(self, call, trajectory):
            time.sleep(2)
            return []

    with pytest.raises(RolloutError, match="counting has blocked all others .* write blocking work as a plain `def`"):
        engine(Selfish(), limits={"timeout_s": 0.1}).run(requests(2, 3))


def test_a_plain_function_runs_in_a_thread_of_its_own_and_is_not_waited_for():
    tool = Blocking(0.02)
    engine(tool).run(requests(3, 3))
    assert tool.threads == {"tool"} and tool.closed == tool.opened > 1


def test_a_tool_that_is_still_at_work_is_not_called_again():
    heard = said(engine(Blocking(0.6), limits={"timeout_s": 0.02}, asks=2, rows=20).run(requests(5, 4)))
    assert "error: blocking is still at work on the call before" in heard


def test_calls_at_once_are_limited():
    tool = Delayed(0.02)
    engine(tool, limits={"concurrency": 2}, rows=20, reproducible=False).run(requests(5, 4))
    assert tool.at_once == 2


def test_a_format_that_calls_needs_a_tool():
    with pytest.raises(RolloutError, match="'say' calls a tool, and none answers it"):
        engine(None).run(requests(2, 3))


def test_a_tool_may_choose_the_role_but_only_one_that_there_is():
    role = Segment("result", Author.ENVIRONMENT, Modality.TEXT, False, text="big dot")
    with pytest.raises(RolloutError, match="no role 'result' after 'say'"):
        engine(Replies(role)).run(requests(2, 3))
    role = Segment("observation", Author.USER, Modality.TEXT, True, text="big dot")
    trajectories = engine(Replies(role), asks=1).run(requests(2, 3))
    assert set(said(trajectories)) == {"big dot"}
    assert not any(s.trained for t in trajectories for s in t.segments if s.author is not Author.POLICY)


def test_ids_that_the_policy_does_not_have_are_named():
    foreign = Segment("observation", Author.ENVIRONMENT, Modality.TEXT, False, np.array([7, 400], np.int32))
    with pytest.raises(RolloutError, match="counting answered 'say' with the id 400, and .* vocabulary has 24"):
        engine(Replies(foreign), asks=1).run(requests(2, 3))


# ---- sessions ----


def test_a_session_a_trajectory_opened_at_its_first_call_and_closed_once():
    tool = Counting()
    rollouts = engine(tool)
    trajectories = rollouts.run(requests(5, 4))
    assert sorted(tool.opened) == sorted(tool.closed) == sorted(set(tool.calls))
    assert len(tool.opened) == len(set(tool.opened)) < len(trajectories)
    assert max(tool.calls.values()) == 2
    rollouts.run(requests(1, 1))  # the loop serves the engine's next call
    rollouts.close()
    assert sorted(tool.opened) == sorted(tool.closed)


def test_sessions_are_closed_while_others_are_still_written():
    tool = Counting()
    rollouts = engine(tool, rows=3, reproducible=False)
    closed = [len(tool.closed) for _ in rollouts.stream(requests(5, 4))]
    assert closed[len(closed) // 2] > 0


@pytest.mark.parametrize("tool", [Counting(), Hanging(), Hanging(stubborn=True)], ids=["quick", "hanging", "stubborn"])
def test_sessions_are_closed_where_a_stream_is_given_up(tool, monkeypatch):
    monkeypatch.setattr(runner, "CLOSE_S", 1.0)
    rollouts = engine(tool, rows=20, limits={"timeout_s": 60}, reproducible=False)
    stream = rollouts.stream(requests(5, 4))
    next(stream)
    stream.close()
    assert tool.opened
    assert sorted(tool.opened) == sorted(tool.closed)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_sessions_are_closed_where_the_engine_is_broken_off(error):
    tool = Counting()
    rollouts = engine(tool, rows=12)
    inner, steps = rollouts.policy.step, []

    def step(cache, rows, inputs):
        steps.append(len(rows))
        if tool.opened and len(steps) > 25:
            raise error
        return inner(cache, rows, inputs)

    rollouts.policy.step = step
    with pytest.raises(error):
        rollouts.run(requests(8, 4))
    assert tool.opened and sorted(tool.opened) == sorted(tool.closed)


def test_a_session_that_opens_too_late_is_closed_too():
    tool = Blocking(0.0, opening=0.3)
    rollouts = engine(tool, limits={"timeout_s": 0.02}, asks=1, rows=20)
    heard = said(rollouts.run(requests(2, 3)))
    assert set(heard) == {"error: blocking did not answer within 0.02 s"}
    deadline = time.monotonic() + 5
    while (tool.opened < len(heard) or tool.closed < tool.opened) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tool.closed == tool.opened == len(heard)


def test_a_tool_cannot_change_the_record():
    class Vandal(Counting):
        async def answer(self, call, trajectory):
            trajectory.segments.clear()
            return ["big"]

    trajectories = engine(Vandal()).run(requests(3, 3))
    assert said(trajectories) and all(t.segments[0].role == "prompt" for t in trajectories)


def test_requests_need_not_be_finished_in_order():
    tool = Delayed(0.02)
    rollouts = engine(tool, rows=6, reproducible=False)
    streamed = list(rollouts.stream([RolloutRequest(g, "a red dot", {}, (0, 1), 3) for g in range(6)]))
    assert sorted(t.key for t in streamed) == sorted(f"{g}-{m}" for g in range(6) for m in (0, 1))
