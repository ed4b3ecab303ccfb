"""Who scores, and when: calls planned by sizes, groups in any order, processes, Ray actors, a served detector."""

from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import image_segment, text, trajectory_of

from formats.registry import get_format
from rewards.config import RewardsConfig
from rewards.contract import RewardError, RewardFailed, TrainerState
from rewards.manager import RewardManager
from rewards.runtime.isolate import ProcessWorker
from rewards.runtime.ray_worker import RayWorker
from rewards.runtime.serving import CallFailed, ComponentSpec
from rewards.runtime.workers import RowSlice, plan
from runtime.ray_cluster import start_ray
from tasks.registry import get_task

CODE = """
import os, time

def lengths(completions, log_metric, log_extra):
    log_metric("mean", sum(len(c[0]["content"]) for c in completions) / len(completions))
    log_extra("process", [os.getpid()] * len(completions))
    return [float(len(c[0]["content"])) or None for c in completions]

def calls(completions):
    return [float(len(completions))] * len(completions)

def share(trajectories):
    words = [t.segments[1].text for t in trajectories]
    return [sum(w <= v for v in words) / len(words) for w in words]

def credits(trajectories):
    return [{1: float(t.member)} if t.member else None for t in trajectories]

def dawdle(): time.sleep(600)
def stuck(completions): dawdle()
def broken(completions): raise ValueError("no server")
def slow(completions):
    time.sleep(0.3)
    return [1.0] * len(completions)
def sometimes(trajectories):
    if any(t.segments[1].text == "hang" for t in trajectories): dawdle()
    return [1.0] * len(trajectories)
def leave(completions): os._exit(3)
def short(completions): return []
def pids(completions):
    time.sleep(0.1)
    return [float(os.getpid())] * len(completions)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "parts.py"
    path.write_text(CODE)
    return lambda name, **more: {"function": f"{path}:{name}", "retry_wait_s": 0.0, **more}


@pytest.fixture(scope="module")
def ray_cluster():
    cluster = start_ray(2, object_store_bytes=100 * 2**20)
    yield cluster
    cluster.stop()


def some_groups(sizes=(3, 2, 4, 1), seed=0):
    noise = random.Random(seed)
    return [
        [
            trajectory_of({}, text("answer", "x" * noise.randrange(6)), group=number, member=member)
            for member in range(size)
        ]
        for number, size in enumerate(sizes)
    ]


def build(total=None, detector=None, **parts):
    section = {"parts": parts, "total": total}
    return RewardsConfig.model_validate(section | ({"detector": detector} if detector else {}))


# ---- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "sizes", "batch_size", "expected"),
    [
        ("batch", (2, 3), None, [[(0, 0, None), (1, 0, None)]]),
        ("row", (2, 3), None, [[(0, 0, None)], [(1, 0, None)]]),
        ("row", (2, 2, 2), 4, [[(0, 0, None), (1, 0, None)], [(2, 0, None)]]),
        ("row", (5, 1), 2, [[(0, 0, 2)], [(0, 2, 4)], [(0, 4, None)], [(1, 0, None)]]),
        ("group", (5, 1), 2, [[(0, 0, None)], [(1, 0, None)]]),  # a part that sees the group gets it whole
        ("group", (2, 2), 8, [[(0, 0, None), (1, 0, None)]]),
        ("batch", (), None, []),
        ("row", (), None, []),
    ],
)
def test_plans_by_hand(scope, sizes, batch_size, expected):
    assert plan(scope, sizes, batch_size) == [tuple(RowSlice(*s) for s in call) for call in expected]


@given(
    st.sampled_from(["row", "group", "batch"]),
    st.lists(st.integers(1, 9), max_size=6),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_every_row_is_in_one_call_and_no_call_is_larger_than_it_may_be(scope, sizes, batch_size):
    calls = plan(scope, sizes, batch_size)
    rows = [(s.group, row) for call in calls for s in call for row in range(sizes[s.group])[s.start : s.stop]]
    assert sorted(rows) == [(group, row) for group, size in enumerate(sizes) for row in range(size)]
    for call in calls:
        count = sum(len(range(sizes[s.group])[s.start : s.stop]) for s in call)
        if batch_size is not None and scope != "batch":
            assert count <= batch_size or (scope == "group" and len(call) == 1)


# ---- groups as they come in ------------------------------------------------------------------------------------------

PLACES = {"driver": {"isolate": False}, "process": {}, "two": {"workers": {"count": 2, "batch_size": 4}}}


def everything(groups):
    return [(t.rewards, t.segment_rewards, t.reward) for group in groups for t in group]


def without_time(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.mark.parametrize("place", PLACES)
def test_the_order_of_arrival_changes_nothing(file, place):
    more = PLACES[place]
    batch = {key: value for key, value in more.items() if key != "workers"}
    config = build(
        "coalesce(n, 0) + s + coalesce(c, 0) + group_mean(n) + batch_max(rows)",
        n=file("lengths", scope="row", **more),
        s=file("share", scope="group", **more),
        c=file("credits", scope="row", **more),
        rows=file("calls", **batch),
    )
    sizes = (3, 2, 4, 1)
    with RewardManager(config) as manager:
        at_once = some_groups(sizes)
        whole = manager.score(at_once, step=4)
        assert at_once[0][0].rewards["rows"] == 10  # a part that sees the batch gets it in one call
        for seed in range(3):
            groups = some_groups(sizes)
            order = list(enumerate(groups))
            random.Random(seed).shuffle(order)
            pending = manager.begin(4, sizes)
            for index, group in order[: seed + 1]:  # the others are given at the end, as by rollouts that do not stream
                pending.add(index, group)
            report = pending.finish(groups)
            assert everything(groups) == everything(at_once)
            assert without_time(report.metrics) == without_time(whole.metrics)


def test_metrics_of_several_calls_are_weighted_by_the_rows_they_judged(file):
    groups = [
        [trajectory_of({}, text("answer", w), group=n, member=m) for m, w in enumerate(words)]
        for n, words in enumerate((["aa", "aa", "aa"], ["aaaaaa", ""]))
    ]
    with RewardManager(build(n=file("lengths", scope="row", isolate=False))) as manager:
        report = manager.score(groups)
    assert report.metrics["reward/n/mean"] == pytest.approx((3 * 2 + 1 * 3) / 4)  # 3 and 1 rows had a value


def test_groups_are_scored_while_others_are_still_sampled(file):
    config = build("n + s", n=file("slow", scope="row"), s=file("slow", scope="group", isolate=False))
    with RewardManager(config) as manager:
        groups = some_groups((2, 2))
        pending, started = manager.begin(1, (2, 2)), time.monotonic()
        pending.add(1, groups[1])
        pending.add(0, groups[0])
        while not all(call.future.done() for call in pending._all()):  # rolling out
            time.sleep(0.05)
        rolled_out, finishing = time.monotonic() - started, time.monotonic()
        report = pending.finish(groups)
        finished = time.monotonic() - finishing
    # Two lanes, each busy for two calls of 0.3 s, and nothing is left to do in the end.
    assert 0.6 <= report.metrics["time/reward/hidden"] <= rolled_out
    assert report.metrics["time/reward/waited"] <= finished
    assert report.metrics["time/reward/n"] >= 0.6 and report.metrics["time/reward/s"] >= 0.6


def test_what_is_not_hidden_is_waited_for(file):
    with RewardManager(build(n=file("slow", scope="row", isolate=False))) as manager:
        report = manager.score(some_groups((1, 1)))
    assert report.metrics["time/reward/waited"] >= 0.6 and report.metrics["time/reward/hidden"] < 0.3


def test_a_group_that_never_comes_back_holds_nobody_up(file):
    more = {"workers": {"batch_size": 4}}
    with RewardManager(build("n + rows", n=file("calls", scope="row", **more), rows=file("calls"))) as manager:
        groups = some_groups((2, 2, 2))
        pending = manager.begin(1, (2, 2, 2))
        pending.add(2, groups[2])
        pending.add(0, groups[0])  # its call waits for group 1, which is lost
        report = pending.finish([groups[0], groups[2]])
        assert [t.rewards for t in groups[0] + groups[2]] == [{"n": 2, "rows": 4}] * 4
        assert report.judged == 4 and groups[1][0].rewards == {}
        with pytest.raises(ValueError, match="3 groups came back of 2"):
            manager.begin(1, (2, 2)).finish(some_groups((2, 2, 2)))


def test_a_part_that_breaks_the_contract_stops_the_rollout_too(file):
    with RewardManager(build(n=file("short", scope="row"))) as manager:
        groups = some_groups((2, 2, 2))
        pending = manager.begin(1, (2, 2, 2))
        pending.add(0, groups[0])
        with pytest.raises(RewardError, match="returned 0 values for 2 completions"):
            for _ in range(200):  # at the first group that comes in after it is known
                time.sleep(0.05)
                pending._raise_what_failed()
        with pytest.raises(RewardError):
            pending.add(1, groups[1])


# ---- what hangs ------------------------------------------------------------------------------------------------------


def test_one_stuck_group_costs_its_own_rows(file):
    words = [["a", "b"], ["a", "hang"], ["a", "b"]]
    groups = [
        [trajectory_of({}, text("answer", w), group=n, member=m) for m, w in enumerate(group)]
        for n, group in enumerate(words)
    ]
    with RewardManager(build("s", s=file("sometimes", scope="row", timeout_s=4.0, retries=0))) as manager:
        report = manager.score(groups)
    assert [[t.reward for t in group] for group in groups] == [[1, 1], [None, None], [1, 1]]
    (fault,) = report.failures
    assert (fault.kind, fault.rows) == ("timeout", 2) and "dawdle" in fault.stack
    assert report.metrics["reward/s/failed"] == pytest.approx(1 / 3)


def test_a_part_that_always_hangs_is_given_up_for_the_step_and_ends_the_run_in_time(file):
    config = build("coalesce(s, 0)", s=file("stuck", scope="row", timeout_s=0.5, retries=0))
    config = config.model_copy(update={"none_limit": 2})
    with RewardManager(config) as manager:
        report = manager.score(some_groups((2,) * 30), step=1)
        assert [f.kind for f in report.failures].count("timeout") == 3
        assert [f.kind for f in report.failures].count("given up") == 27
        assert report.metrics["reward/s/failed"] == 1
        with pytest.raises(RewardFailed, match="part 's' .* failed in 2 step.*up to step 2: a call took longer"):
            manager.score(some_groups((2,) * 5), step=2)


# ---- parts of the toolkit in workers -----------------------------------------------------------------------------


def drawn(task, count=6):
    groups = []
    for number, demo in enumerate(task.demonstrations("strokes", count, seed=3)):
        images = [part.image for part in demo.parts if part.image is not None]
        groups.append(
            [
                trajectory_of(demo.record, image_segment("sketch", each), group=number, member=member)
                for member, each in enumerate([images[-1], np.zeros_like(images[-1])])
            ]
        )
    return groups


@pytest.mark.parametrize("kind", ["process", "ray"])
def test_a_part_of_the_toolkit_gives_the_same_anywhere(kind, request):
    if kind == "ray":
        request.getfixturevalue("ray_cluster")
    task, fmt = get_task("shapes"), get_format("strokes")
    config = {
        "parts": {
            "here": {"function": "geneval", "options": {"mode": "graded"}},
            "there": {
                "function": "geneval",
                "options": {"mode": "graded"},
                "workers": {"kind": kind, "batch_size": 3, "num_cpus": 0.5},
            },
            "form": {"function": "format", "workers": {"kind": kind, "num_cpus": 0.5}},
        }
    }
    groups = drawn(task)
    with RewardManager(RewardsConfig.model_validate(config), task, fmt) as manager:
        manager.score(groups)
    values = [t.rewards for group in groups for t in group]
    assert all(v["here"] == v["there"] and v["form"] is not None for v in values)
    assert {v["here"] for v in values} > {1.0}  # the drawn image, and the empty one


@pytest.mark.parametrize("kind", ["process", "ray"])
def test_a_served_detector_sees_what_the_drivers_own_sees(kind, request):
    if kind == "ray":
        request.getfixturevalue("ray_cluster")
    task = get_task("shapes")
    parts = {"result": {"function": "geneval"}, "better": {"function": "improvement"}}
    here, there = drawn(task), drawn(task)
    with RewardManager(RewardsConfig.model_validate({"parts": parts}), task) as manager:
        manager.score(here)
    section = {"parts": parts, "detector_workers": {"kind": kind, "count": 2, "num_cpus": 0.5, "batch_size": 2}}
    with RewardManager(RewardsConfig.model_validate(section), task) as manager:
        manager.score(there)
        assert manager.context.detector.looks > 2
        assert manager.context.detector.classes == tuple(task.classes)
        for worker in manager._served.workers:  # killed: the part's next attempt finds fresh ones
            os.kill(worker.pid if kind == "ray" else worker._process.pid, 9)
        again = drawn(task)
        manager.score(again)
    assert everything(there) == everything(here) == everything(again)


def test_a_part_asks_the_judge_of_the_recipe_and_its_questions_are_counted(tmp_path):
    import judge_server

    from rewards.registry import REWARDS

    name = next(name for name, entry in REWARDS.items() if entry.needs_judge)
    with pytest.raises(ValueError, match=f"judge: missing; parts.a .{name}. asks a judge: give judge.base_url"):
        build(a={"function": name})
    with (
        judge_server.JudgeServer(lambda body, number: "yes", models=["other"]) as server,
        pytest.raises(Exception, match="has no model 'judge'"),
    ):
        RewardManager(
            RewardsConfig.model_validate(
                {"parts": {"a": {"function": name}}, "judge": {"base_url": server.url, "model": "judge"}}
            )
        )


# ---- Ray actors -----------------------------------------------------------------------------------------------------


def test_a_ray_part_scores_in_actors(file, ray_cluster):
    config = build(
        "n + s",
        n=file("lengths", scope="row", workers={"kind": "ray", "batch_size": 4, "num_cpus": 0.5}),
        s=file("share", scope="group", workers={"kind": "ray", "num_cpus": 0.5}),
    )
    same = build("n + s", n=file("lengths", scope="row", workers={"batch_size": 4}), s=file("share", scope="group"))
    there, here = some_groups(), some_groups()
    with RewardManager(config) as manager, RewardManager(same) as processes:
        metrics = manager.score(there).metrics
        assert without_time(metrics) == without_time(processes.score(here).metrics)
        pids = {t.info["rewards"]["n"]["process"] for group in there for t in group}
        assert pids == {manager.parts["n"].workers[0].pid}
    assert everything(there) == everything(here)
    assert os.getpid() not in pids


def test_whoever_comes_second_joins_the_ray_that_runs_and_leaves_it_running(ray_cluster):
    import ray

    second = start_ray(1)
    assert second.folder == ray_cluster.folder and not second.ours and ray_cluster.ours
    second.stop()
    assert ray.is_initialized()


def test_several_actors_share_the_calls(file, ray_cluster):
    config = build(p=file("pids", scope="row", workers={"kind": "ray", "count": 2, "num_cpus": 0.5}))
    groups = some_groups((1,) * 6)
    with RewardManager(config) as manager:
        manager.score(groups)
    assert len({t.reward for group in groups for t in group}) == 2


def test_an_actor_that_hangs_is_killed_says_where_it_stood_and_is_replaced(file, ray_cluster):
    words = [["a"], ["hang"], ["b"]]
    groups = [[trajectory_of({}, text("answer", w), group=n)] for n, (w,) in enumerate(words)]
    config = build(
        "s", s=file("sometimes", scope="row", timeout_s=5.0, retries=0, workers={"kind": "ray", "num_cpus": 0.5})
    )
    with RewardManager(config) as manager:
        before = manager.parts["s"].workers[0].pid
        report = manager.score(groups)
        after = manager.parts["s"].workers[0].pid
    assert [group[0].reward for group in groups] == [1, None, 1]
    (fault,) = report.failures
    assert (fault.kind, fault.rows) == ("timeout", 1) and "dawdle" in fault.stack and "parts.py" in fault.stack
    assert before != after
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_an_actor_that_dies_raises_or_breaks_the_contract(file, ray_cluster):
    def worker(name):
        return RayWorker(ComponentSpec("mine", file(name)["function"]), num_cpus=0.5)

    rows = some_groups((2,))[0]
    for name, kind, message in (("leave", "crash", "Ray actor ended during a call"), ("broken", "raised", "no server")):
        actor = worker(name)
        with pytest.raises(CallFailed, match=message) as failure:
            actor(rows, TrainerState())
        assert failure.value.kind == kind
        actor.close()
    actor = worker("short")
    with pytest.raises(RewardError, match="returned 0 values for 2"):
        actor(rows, TrainerState())
    actor.close()
    with pytest.raises(RewardError, match="has no function 'lenghts'; did you mean 'lengths'"):
        worker("lenghts").start()
    with pytest.raises(RewardError, match="asks for 99 GPU, and the whole cluster has 0"):
        RayWorker(ComponentSpec("mine", file("calls")["function"]), num_gpus=99).start()


def test_closing_ends_a_call_to_an_actor(file, ray_cluster):
    actor = RayWorker(ComponentSpec("mine", file("stuck")["function"]), num_cpus=0.5)
    actor.start()
    raised = []

    def wait():
        try:
            actor(some_groups((1,))[0], TrainerState())
        except CallFailed as failure:
            raised.append(failure.kind)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.5)
    actor.close()
    thread.join(10)
    assert raised == ["crash"] and not thread.is_alive()


def test_a_worker_that_cannot_load_is_loaded_afresh_the_next_time(tmp_path):
    path = tmp_path / "later.py"
    path.write_text("import nothing_of_that_name\n")
    worker = ProcessWorker(ComponentSpec("mine", f"{path}:score"))
    with pytest.raises(RewardError, match="nothing_of_that_name"):
        worker.start()
    path.write_text("def score(completions): return [1.0] * len(completions)\n")
    assert worker(some_groups((2,))[0], TrainerState())[0] == [1.0, 1.0]
    worker.close()


def test_what_cannot_travel_is_said(tmp_path):
    class Local:  # defined in a function: it does not pickle
        name, classes = "local", ("circle",)

        def prompts(self, split):
            return []

        def detect(self, image):
            return []

    with pytest.raises(RewardError, match="'a' runs in a process of its own.*must pickle"):
        RewardManager(build(a={"function": "geneval", "workers": {}}), Local())
