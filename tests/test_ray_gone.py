"""A local Ray whose servers die is noticed at once: the run saves and stops with the true cause, and leaves nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rewards_helpers import text, trajectory_of

from rewards.contract import TrainerState
from rewards.runtime.ray_worker import RayWorker
from rewards.runtime.serving import ComponentSpec
from rollout.config import RolloutConfig
from rollout.pool.ray_rollouts import RayRollouts
from rollout.spec import EngineSpec
from runtime.ray_cluster import ClusterError, check_alive, start_ray, stop_ray
from tests.test_cli import QUICKSTART, SMALL
from tests.test_signals import Command, grpo, steps_logged
from tests.test_workers import ROLLOUT, requests
from training import checkpoint
from training.tracking import read_metrics
from underdrawing.cli import main

pytestmark = pytest.mark.timeout(600)
AT_ONCE_S = 30.0  # of the 600 that a silent worker is given


def kill(root: int, name: str) -> None:
    (found,) = [p for p in psutil.Process(root).children(recursive=True) if p.name() == name or name in p.cmdline()]
    found.kill()


@pytest.fixture
def ray() -> Iterator[int]:
    """This program's pid, which started a Ray of its own."""
    cluster = start_ray(2, object_store_bytes=100 * 2**20)
    yield psutil.Process().pid
    cluster.stop()


def pool(record: dict) -> Iterator[object]:
    """Of one worker, writing."""
    rollouts = RayRollouts(
        EngineSpec({"rollout": ROLLOUT}, "tests.worker_factories.engine"), RolloutConfig(workers=1, **ROLLOUT)
    )
    try:
        yield from rollouts.stream(requests(2, members=1, records={1: record}))
    finally:
        rollouts.close()


def test_rollouts_notice_a_dead_node_and_ray_can_be_started_anew(ray):
    groups = pool({"trouble": "hang"})
    next(groups)
    kill(ray, "raylet")
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"Ray is gone: its raylet \(process \d+\) has ended, signal 9. Set rollout"):
        next(groups)
    assert time.monotonic() - began < AT_ONCE_S
    with pytest.raises(ClusterError, match="Ray is gone"):
        start_ray(1)  # the same program's next ask
    stop_ray()
    fresh = start_ray(2, object_store_bytes=100 * 2**20)
    assert fresh.ours
    check_alive()
    assert len(list(pool({}))) == 2
    fresh.stop()


def test_a_reward_in_an_actor_notices_it_too(ray, tmp_path):
    (tmp_path / "own.py").write_text("import time\ndef hang(completions): time.sleep(600)\n")
    worker = RayWorker(ComponentSpec("mine", f"{tmp_path / 'own.py'}:hang"), timeout_s=600, num_cpus=0.5)
    worker.start()
    kill(ray, "raylet")
    began = time.monotonic()
    with pytest.raises(ClusterError, match="Ray is gone: its raylet"):
        worker([trajectory_of({}, text("answer", "x"))], TrainerState())
    worker.close()
    assert time.monotonic() - began < AT_ONCE_S


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={run}"]) == 0
    return run / "sft" / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, told",
    [
        ("raylet", r"its raylet \(process \d+\) has ended, signal 9"),
        # It then ends itself: it is found while it does so, or after.
        ("ray::DashboardAgent", r"(its raylet \(process|this machine's node of it is dead)"),
        ("gcs_server", r"its gcs_server \(process \d+\) has ended, signal 9"),
    ],
    ids=["raylet", "agent", "gcs"],
)
def test_a_run_saves_its_steps_and_says_why_it_stopped(warm, tmp_path, victim, told):
    with Command(*grpo(warm, tmp_path, "rollout.workers=2"), RAY_ADDRESS="local") as command:
        command.wait_until(steps_logged(tmp_path))
        command.descendants()
        kill(command.process.pid, victim)
        began = time.monotonic()
        ended, said = command.send()
        assert ended == 2 and time.monotonic() - began < AT_ONCE_S, said
        assert re.search(f"Ray is gone: {told}", said) and "Traceback" not in said, said
        step = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
        assert f"The {step} finished step(s) are saved; once it is mended, give the same command with --resume" in said
        assert checkpoint.steps(tmp_path / "checkpoints") == [step]
        assert command.left() == ([], [])
