"""Workers that die, hang, raise or never start: groups come back whole, the same, or dropped with the reason."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.base import score_trajectories
from rl.config import ForkConfig
from rl.forks import fork_requests
from rl.weight_sync import WeightSynchronizer
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.forks import fork
from rollout.open import open_rollouts
from rollout.pool.assignment import Assignment, Call
from rollout.pool.contract import FailedGroup, FinishedGroup, WorkersError
from rollout.pool.local import LocalRollouts
from rollout.pool.ray_rollouts import RayRollouts
from rollout.requests import RolloutError, RolloutRequest, key_of
from rollout.spec import EngineSpec, engine_spec
from rollout.weights.wire import WeightSyncError
from runtime import ray_cluster
from runtime.errors import UserError
from runtime.processes import bearing
from runtime.ray_cluster import ClusterError, start_ray
from tests.worker_factories import engine, nudge

ROLLOUT = {"rows": 4, "max_tokens": 24}
pytestmark = pytest.mark.timeout(900)  # starting processes takes minutes on a busy machine


def requests(groups: int, members: int = 3, records: dict[int, dict] | None = None) -> list[RolloutRequest]:
    return [
        RolloutRequest(10 + group, "a red dot", (records or {}).get(group, {}), tuple(range(members)), seed=5)
        for group in range(groups)
    ]


def decided(groups) -> list[tuple]:
    """All that was sampled, to the last bit."""
    return [
        (t.group, t.member, s.role, s.ids.tobytes(), s.decisions.logprob_N.tobytes())
        for group in groups
        for t in group
        for s in t.segments
        if s.decisions
    ]


def ids(groups) -> list[list[int]]:
    return [np.concatenate([s.ids for s in t.segments]).tolist() for group in groups for t in group]


# ---- who writes what: no process is started ----


def test_reproducible_slots_have_groups_of_their_own():
    assignment = Assignment(5, slots=2, fill=1, retries=2, reproducible=True)
    assert assignment.next(1) == Call((1, 3)) and assignment.next(1) is None
    assert assignment.next(0) == Call((0, 2, 4))


def test_a_reproducible_call_is_repeated_whole_then_alone():
    assignment = Assignment(3, slots=1, fill=1, retries=2, reproducible=True)
    call = assignment.next(0)
    assert assignment.finished(1) and not assignment.finished(1)
    assert assignment.failed(0, call) == ()
    again = assignment.next(0)
    assert again == Call((0, 1, 2), 1)  # the finished group too: its rows are the others' neighbours
    assert assignment.failed(0, again) == ()
    assert [assignment.next(0), assignment.next(0)] == [Call((0,), 2), Call((2,), 2)]
    assert assignment.finished(0)
    assert assignment.failed(0, Call((2,), 2)) == (2,) and not assignment.left


def test_free_slots_take_what_fills_their_rows_and_less_towards_the_end():
    assignment = Assignment(40, slots=2, fill=3, retries=1, reproducible=False)
    sizes = []
    while (call := assignment.next(len(sizes) % 2)) is not None:
        sizes.append(len(call.groups))
    # a quarter of what is left (two slots, half a share each), never under 3: 40, 30, 22, 16, 12, 9, 6, 3
    assert sizes == [10, 8, 6, 4, 3, 3, 3, 3]


@given(st.integers(0, 12), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.randoms())
def test_every_group_is_finished_or_dropped_once(groups, slots, fill, retries, reproducible, random):
    assignment = Assignment(groups, slots, fill, retries, reproducible)
    finished, dropped, calls = [], [], 0
    while assignment.left:
        for slot in range(slots):
            call = assignment.next(slot)
            if call is None:
                continue
            calls += 1
            assert call.attempt <= retries
            done = random.randrange(len(call.groups) + 1)
            finished += [group for group in call.groups[:done] if assignment.finished(group)]
            if done < len(call.groups):
                dropped += assignment.failed(slot, call)
        assert calls <= (retries + 2) * (groups + slots)
    assert sorted(finished + dropped) == list(range(groups))


# ---- in this process ----


def test_local_groups_come_in_the_order_of_requests_and_members():
    asked = [RolloutRequest(7, "a dot", {}, (2, 0), 1), RolloutRequest(3, "red", {}, (0, 1, 2), 1)]
    result = LocalRollouts(engine(ROLLOUT)).generate(asked)
    written = [[(t.group, t.member) for t in group] for group in result.groups]
    assert written == [[(7, 2), (7, 0)], [(3, 0), (3, 1), (3, 2)]]
    assert result.metrics["rollout/groups"] == 2 and result.metrics["rollout/trajectories"] == 5
    assert result.metrics["rollout/tokens"] == sum(
        t.num_tokens() - len(t.segments[0].ids) for group in result.groups for t in group
    )


def test_groups_are_told_apart():
    rollouts = LocalRollouts(engine(ROLLOUT))
    with pytest.raises(WorkersError, match="group 10 is asked for twice"):
        rollouts.generate(requests(1) + requests(1))
    with pytest.raises(WorkersError, match=r"group 1: its members are \[0, 0\]"):
        rollouts.generate([RolloutRequest(1, "a", {}, (0, 0))])
    assert rollouts.generate([]).groups == []


def test_without_workers_the_trainers_policy_samples():
    from formats.config import FormatConfig

    policy = engine(ROLLOUT).policy
    rollouts = open_rollouts(policy, None, FormatConfig(), RolloutConfig(workers=0))
    assert isinstance(rollouts, LocalRollouts) and rollouts.shares_weights(policy)


def threads_while_writing(
    rollouts: LocalRollouts, asked: list[RolloutRequest], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], int]:
    """CPU threads of torch while its engine writes, and those between groups and afterwards, which must be the same."""
    seen: list[int] = []
    between: set[int] = set()
    stream = Engine.stream

    def watched(self, requests):
        for trajectory in stream(self, requests):
            seen.append(torch.get_num_threads())
            yield trajectory

    monkeypatch.setattr(Engine, "stream", watched)
    for _ in rollouts.stream(asked):
        between.add(torch.get_num_threads())
    (outside,) = between | {torch.get_num_threads()}
    return seen, outside


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("asked, inside", [(None, 3), (1, 1), (2, 2), (3, 3)])
def test_rollouts_in_this_process_have_their_own_threads_and_the_trainer_has_its_own_after(monkeypatch, asked, inside):
    rollouts = LocalRollouts(engine(ROLLOUT), asked)
    seen, outside = threads_while_writing(rollouts, requests(3), monkeypatch)
    assert seen == [inside] * 9 and outside == 3


@pytest.mark.usefixtures("three_threads")
def test_threads_are_the_trainers_again_when_rollouts_fail_or_their_reader_leaves():
    rollouts = LocalRollouts(engine(ROLLOUT), 1)
    assert isinstance(next(reading := rollouts.stream(requests(2))), FinishedGroup)
    assert torch.get_num_threads() == 3
    reading.close()
    with pytest.raises(ValueError, match="poison"):
        list(rollouts.stream(requests(1, records={0: {"trouble": "raise"}})))
    assert torch.get_num_threads() == 3
    trajectories = rollouts.generate(requests(1)).groups[0]
    rollouts.probe(trajectories)
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_the_recipes_threads_reach_the_pool(monkeypatch):
    from formats.config import FormatConfig
    from tests.chameleon_helpers import WORDS, small_config

    config = RolloutConfig(workers=0, threads=2, rows=4, max_tokens=20)
    policy_config = small_config()
    policy = engine_spec(policy_config, FormatConfig(max_images=2), config, WORDS).build().policy
    rollouts = open_rollouts(policy, policy_config, FormatConfig(max_images=2), config, WORDS)
    assert isinstance(rollouts, LocalRollouts)
    asked = [RolloutRequest(0, "a red circle", {"tag": "single_object"}, (0, 1), 7)]
    seen, outside = threads_while_writing(rollouts, asked, monkeypatch)
    assert set(seen) == {2} and outside == 3
    assert RolloutConfig().actor_threads == 1 and RolloutConfig(threads=2).actor_threads == 2


def test_a_start_sweeps_the_folders_of_killed_runs(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="u", dir="/tmp") as parent:  # short, for Ray's sockets
        monkeypatch.setattr(tempfile, "tempdir", parent)
        dead = subprocess.Popen(["true"])
        dead.wait()
        orphan, alive = Path(parent, f"ud-ray-{dead.pid}-abcdefgh"), Path(parent, f"ud-ray-{os.getpid()}-abcdefgh")
        orphan.mkdir()
        alive.mkdir()
        stack, recent, other = (Path(parent, name) for name in ("ud-stack-old", "ud-stack-new", "mine"))
        for file in (stack, recent, other):
            file.touch()
        two_days_ago = time.time() - 2 * 86_400
        os.utime(stack, (two_days_ago, two_days_ago))
        os.utime(other, (two_days_ago, two_days_ago))
        made = ray_cluster._folder()
        assert set(Path(parent).iterdir()) == {alive, recent, other, made}
        assert made.name.startswith(f"ud-ray-{os.getpid()}-")


def test_no_free_port_is_said_at_once(monkeypatch):
    def none_left(self, address):
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(socket.socket, "bind", none_left)
    with pytest.raises(ClusterError, match=r"no free port on 127.0.0.1 .*rollout.workers: 0"):
        start_ray(1)


# ---- with Ray: one cluster for the module ----


@pytest.fixture(scope="module")
def cluster():
    os.environ.pop("RAY_ADDRESS", None)
    cluster = start_ray(3, object_store_bytes=100 * 2**20)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def pool(cluster):
    pool = RayRollouts(
        EngineSpec({"rollout": ROLLOUT}, "tests.worker_factories.engine"),
        RolloutConfig(workers=2, retries=2, timeout_s=60, **ROLLOUT),
    )
    yield pool
    pool.close()


def lone_worker(factory: str = "engine", **config) -> RayRollouts:
    return RayRollouts(
        EngineSpec({"rollout": ROLLOUT}, f"tests.worker_factories.{factory}"),
        RolloutConfig(**{"workers": 1, "retries": 1, **ROLLOUT, **config}),
    )


def test_ray_listens_on_the_loopback_alone(cluster):
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


def test_actors_write_what_this_process_writes(pool):
    here = LocalRollouts(engine(ROLLOUT)).generate(requests(5))
    there = pool.generate(requests(5))
    assert ids(there.groups) == ids(here.groups) and not there.failed
    assert there.metrics["rollout/tokens"] == here.metrics["rollout/tokens"]
    assert decided(pool.generate(requests(5)).groups) == decided(there.groups)
    assert there.groups[0][0].segments[1].ids.flags.writeable


def test_a_killed_actors_groups_come_back_the_same(pool):
    undisturbed = pool.generate(requests(6))
    slow = {group: {"slow": 0.15} for group in range(6)}
    came: dict[int, list] = {}
    for done in pool.stream(requests(6, records=slow)):
        assert isinstance(done, FinishedGroup)
        if not came:
            victim = pool.health()[done.index % 2]  # it writes groups index, index + 2, ...
            assert victim.state == "writing"
            os.kill(victim.pid, signal.SIGKILL)
        came[done.index] = done.group
    assert decided(came[index] for index in range(6)) == decided(undisturbed.groups)
    now = pool.health()[int(victim.name[-1])]
    assert now.restarts == victim.restarts + 1 and now.pid != victim.pid


def test_forks_are_written_by_actors_as_here_and_again_after_a_crash(pool, tmp_path):
    trunk = pool.generate(requests(2)).groups
    asked = fork_requests(trunk, ForkConfig(roles=["say", "image"], candidates=2, members=2))
    assert len(asked) > 4 and {request.group for request in asked} == {10, 11}
    here = LocalRollouts(engine(ROLLOUT)).generate(asked)
    there = pool.generate(asked)
    assert ids(there.groups) == ids(here.groups) and not there.failed
    assert [key_of(g[0]) for g in there.groups] == [r.key for r in asked]
    assert there.metrics["rollout/tokens"] == here.metrics["rollout/tokens"]
    dying = {"trouble": "die", "once": str(tmp_path / "died")}
    again = pool.generate([replace(request, record=dying) for request in asked])
    assert again.metrics["rollout/restarts/crash"] == 1 and not again.failed
    assert decided(again.groups) == decided(there.groups)
    with pytest.raises(RolloutError, match=f"fork of trajectory {trunk[0][0].key} after segment .*has ended there"):
        pool.generate([fork(trunk[0][0], len(trunk[0][0].segments), (9,))])


@pytest.mark.slow
def test_a_group_that_always_raises_is_dropped_alone(pool):
    result = pool.generate(requests(5, records={2: {"trouble": "raise"}}))
    assert [(f.index, f.group, f.reason) for f in result.failed] == [(2, 12, "error")]
    assert "ValueError: group 12 is poison" in result.failed[0].detail
    assert [group[0].group for group in result.groups] == [10, 11, 13, 14]
    assert result.metrics["rollout/groups_failed"] == 1 and result.metrics["rollout/restarts/error"] == 3


def test_a_hanging_actor_is_replaced_and_its_stack_told(pool, tmp_path, caplog):
    records = {1: {"trouble": "hang", "once": str(tmp_path / "hung")}}
    began = time.monotonic()
    result = pool.generate(requests(2, records=records), timeout_s=3)
    assert time.monotonic() - began < 60
    assert not result.failed and result.metrics["rollout/restarts/timeout"] == 1
    assert ids(result.groups) == ids(LocalRollouts(engine(ROLLOUT)).generate(requests(2)).groups)
    assert "worker 1 was silent for 3 s while writing. Its stack:" in caplog.text and "in hang_here" in caplog.text


def test_a_mistake_of_the_users_is_not_tried_again(pool):
    before = pool.health()
    with pytest.raises(UserError, match="group 13: the prompt is too long"):
        pool.generate(requests(4, records={3: {"trouble": "refuse"}}))
    after = pool.generate(requests(2))  # a caller that goes on finds a working pool
    assert len(after.groups) == 2 and not after.failed
    assert sum(w.restarts for w in pool.health()) <= sum(w.restarts for w in before) + 2


@pytest.mark.slow
def test_a_reader_that_leaves_leaves_no_worker_writing(pool):
    stream = pool.stream(requests(6, records={group: {"slow": 0.2} for group in range(6)}))
    next(stream)
    stream.close()
    assert "writing" not in {worker.state for worker in pool.health()}


def test_weights_reach_actors_and_their_successors(pool):
    trainer = engine(ROLLOUT).policy
    weight_sync = WeightSynchronizer(trainer, pool, chunk_bytes=2048)
    weight_sync.sync_weights(0)
    probe = pool.generate(requests(2)).groups[0]
    nudge(trainer)
    published = weight_sync.sync_weights(1, probe)
    assert published.probed > 0 and published.gap < 1e-4
    mine = engine(ROLLOUT)
    mine.policy.model.load_state_dict(trainer.model.state_dict())
    wanted = LocalRollouts(mine).generate(requests(3)).groups
    os.kill(pool.health()[0].pid, signal.SIGKILL)
    successors = pool.generate(requests(3)).groups
    assert ids(successors) == ids(wanted)
    assert {s.version for group in successors for t in group for s in t.segments if s.decisions} == {1}
    assert all(np.abs(answer - trainer_says(trainer, probe)).max() < 1e-4 for answer in pool.probe(probe))
    with pytest.raises(WeightSyncError, match="version 1 comes after version 1"):
        WeightSynchronizer(trainer, pool).sync_weights(1)


def trainer_says(policy, trajectories) -> np.ndarray:
    return score_trajectories(policy, trajectories).logprob_N.detach().numpy()


def test_an_actor_that_ignores_new_weights_is_found_out(cluster):
    trainer, pool = engine(ROLLOUT).policy, lone_worker("deaf_engine")
    try:
        weight_sync = WeightSynchronizer(trainer, pool)
        weight_sync.sync_weights(0, pool.generate(requests(1)).groups[0])
        nudge(trainer)
        with pytest.raises(WeightSyncError, match="version 1 on worker 0: its log-probs differ from the trainer's"):
            weight_sync.sync_weights(1)
    finally:
        pool.close()


def test_if_all_die_the_first_crash_is_quoted(cluster):
    pool = lone_worker(retries=0)
    try:
        with pytest.raises(WorkersError, match=r"not one of 2 groups.* worker 0 \(process \d+\) died"):
            pool.generate(requests(2, records={0: {"trouble": "die"}, 1: {"trouble": "die"}}))
        late = {"trouble": "die", "slow": 0.5}  # when the other group is on its way
        mixed = list(pool.stream(requests(2, members=1, records={1: late})))
        assert [type(done) for done in mixed] == [FinishedGroup, FailedGroup] and mixed[1].reason == "crash"
    finally:
        pool.close()


def test_a_closed_worker_is_no_crash_and_leaves_nothing(cluster, capfd):
    """Ray writes to the terminal of processes that are gone without its doing."""
    pool = lone_worker()
    pool.generate(requests(1))
    (worker,) = pool.health()
    mark = pool._slots[0].process.mark
    pool.close()
    assert not psutil.pid_exists(worker.pid) or psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE
    assert not bearing(mark)
    time.sleep(1.0)  # it would be said by now
    said = "".join(capfd.readouterr())
    assert "died" not in said and str(worker.pid) not in said


def test_an_engine_that_cannot_be_built_stops_the_run(cluster):
    with pytest.raises(UserError, match="policy.path: no such folder"):
        lone_worker("wrong_engine")
    with pytest.raises(WorkersError, match="keep dying: 2 in a row.*RuntimeError: this engine has no cylinders"):
        lone_worker("broken_engine", retries=0)


def test_a_cluster_that_is_too_small_is_named(cluster):
    with pytest.raises(WorkersError, match="each asks for 1 GPU, and the whole cluster has 0"):
        lone_worker(gpus=1)


def test_an_actor_without_a_place_is_waited_for_aloud_and_not_for_ever(cluster, pool, monkeypatch, caplog):
    import ray

    import rollout.pool.ray_rollouts

    monkeypatch.setattr(rollout.pool.ray_rollouts, "LOG_AFTER_S", 1.0)
    spec = EngineSpec({"rollout": ROLLOUT}, "tests.worker_factories.engine")
    cpus = int(ray.cluster_resources()["CPU"])  # the pool holds two of them
    with pytest.raises(WorkersError, match="silent for 4 s while starting: Ray gave it no process"):
        RayRollouts(spec, RolloutConfig(workers=1, threads=cpus, **ROLLOUT), start_timeout_s=4)
    assert "to start; it asks for" in caplog.text


@pytest.mark.slow
def test_a_real_policy_writes_the_same_in_an_actor(cluster):
    from formats.config import FormatConfig
    from tests.chameleon_helpers import WORDS, small_config

    config = RolloutConfig(workers=1, rows=8, max_tokens=80)
    spec = engine_spec(small_config(), FormatConfig(max_images=2), config, WORDS)
    asked = [RolloutRequest(group, "a red circle", {"tag": "single_object"}, tuple(range(4)), 7) for group in range(4)]
    pool = RayRollouts(spec, config)
    try:
        there = pool.generate(asked).groups
        assert ids(there) == ids(LocalRollouts(spec.build()).generate(asked).groups)
        assert any(t.images() for group in there for t in group)
    finally:
        pool.close()
