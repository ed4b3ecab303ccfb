"""Reward workers on fractions of a GPU. Ray only counts GPUs, so a cluster that is told of one needs none."""

from __future__ import annotations

import time
from functools import partial

import pytest
from rewards_helpers import text, trajectory_of

from rewards.config import RewardsConfig
from rewards.contract import TrainerState
from rewards.manager import RewardManager
from rewards.runtime.ray_worker import RayWorker
from rewards.runtime.serving import CallFailed, ComponentSpec
from runtime.ray_cluster import start_ray

CODE = """
def devices(completions):
    import ray
    return [float(",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"]))] * len(completions)
"""


@pytest.fixture(scope="module")
def one_gpu():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_gpus=1))
        cluster = start_ray(4, object_store_bytes=100 * 2**20)
    assert cluster.ours
    yield
    cluster.stop()


@pytest.fixture
def function(tmp_path):
    (tmp_path / "parts.py").write_text(CODE)
    return f"{tmp_path / 'parts.py'}:devices"


def free(expected):
    """GPUs that nobody holds, once they are as expected or ten seconds are over: Ray's books lag a moment."""
    import ray

    until = time.monotonic() + 10
    while (left := ray.available_resources().get("GPU", 0.0)) != expected and time.monotonic() < until:
        time.sleep(0.1)
    return left


def rows(count=2):
    return [trajectory_of({}, text("answer", "x"), member=member) for member in range(count)]


def test_two_halves_share_the_gpu_and_leave_nothing(one_gpu, function):
    config = RewardsConfig.model_validate(
        {
            "parts": {
                "a": {"function": function, "workers": {"kind": "ray", "count": 2, "num_gpus": 0.5, "num_cpus": 0.5}}
            }
        }
    )
    assert free(1) == 1
    with RewardManager(config) as manager:
        assert free(0) == 0
        pids = {worker.pid for worker in manager.parts["a"].workers}
        assert len(pids) == 2
        for worker in manager.parts["a"].workers:  # each was given the one GPU's index
            assert worker(rows(), TrainerState())[0] == [0, 0]
    assert free(1) == 1


def test_a_quarter_leaves_three_and_a_whole_one_waits_for_them(one_gpu, function):
    def worker(gpus, **more):
        return RayWorker(ComponentSpec("mine", function), num_cpus=0.5, num_gpus=gpus, **more)

    quarter, whole = worker(0.25), worker(1.0, load_timeout_s=3.0)
    quarter.start()
    assert free(0.75) == 0.75
    with pytest.raises(CallFailed, match=r"waiting for 0.5 CPU and 1 GPU of the Ray cluster took longer than 3 s"):
        whole.start()
    quarter.close()
    assert free(1) == 1
    whole.load_timeout_s = 60.0
    assert whole(rows(), TrainerState())[0] == [0, 0]
    assert free(0) == 0
    whole.close()
