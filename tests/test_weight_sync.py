"""Weights arrive whole and proven, or not at all."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.base import score_trajectories
from rl.weight_sync import WeightSynchronizer, smallest
from rollout.pool.local import LocalRollouts
from rollout.requests import RolloutRequest
from rollout.weights.probe import Probe
from rollout.weights.receive import UNPUBLISHED, WeightReceiver
from rollout.weights.wire import WeightSyncError, WeightUpdate, fingerprint, pack, unpack
from tests.properties import examples
from tests.worker_factories import deaf_engine, engine, frozen_engine, nudge

ROLLOUT = {"rows": 8, "max_tokens": 24}


def requests(groups: int = 2, members: int = 2, **record) -> list[RolloutRequest]:
    return [RolloutRequest(group, "a red dot", record, tuple(range(members)), seed=5) for group in range(groups)]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def take(receiver: WeightReceiver, manifest, chunks) -> None:
    receiver.receive(manifest, unpack(manifest, chunks, receiver.name))


class Mixed(torch.nn.Module):
    """Every kind of tensor that a state dict may hold."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.wide = torch.nn.Parameter(torch.randn(7, 11, generator=generator))
        self.short = torch.nn.Parameter(torch.randn(5, generator=generator).bfloat16())
        self.scalar = torch.nn.Parameter(torch.randn((), generator=generator))
        self.empty = torch.nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor([seed]))


@given(chunk_bytes=st.integers(1, 700), seed=st.integers(1, 5))
@examples(0.25)
def test_any_chunking_carries_any_tensor(chunk_bytes, seed):
    sent, received = Mixed(seed), Mixed(0)
    update = pack(sent.state_dict(), 0, chunk_bytes=chunk_bytes)
    take(WeightReceiver(received, "worker 0"), update.manifest, update.chunks)
    assert same(sent.state_dict(), received.state_dict())
    assert update.manifest.fingerprint == fingerprint(received.state_dict())


def test_chunks_have_the_size_asked_for():
    # 1000 float32 are 4000 bytes, 4032 when aligned to 64: chunks of 1024 leave 960 for the last
    update = pack({"a": torch.arange(1000.0)}, 3, chunk_bytes=1000)
    assert update.manifest.chunk_sizes == (1024, 1024, 1024, 960)
    assert update.manifest.num_bytes == 4032 and update.version == 3


def test_a_corrupt_chunk_is_refused_whole():
    sent, received = Mixed(1), Mixed(2)
    before = weights_of(received)
    update = pack(sent.state_dict(), 4, chunk_bytes=128)
    chunks = [chunk.copy() for chunk in update.chunks]
    chunks[-1][3] ^= 1
    receiver = WeightReceiver(received, "worker 1")
    message = r"version 4 was refused by worker 1: the checksum of chunk \d+ differs .* 'wide'"
    with pytest.raises(WeightSyncError, match=message):
        take(receiver, update.manifest, chunks)
    assert same(before, received.state_dict()) and receiver.version == UNPUBLISHED


def test_a_tensor_that_lies_elsewhere_than_the_manifest_says_is_refused():
    update = pack({"a": torch.arange(4.0), "b": torch.arange(4.0) + 1}, 0)
    a, b = update.manifest.tensors
    swapped = dataclasses.replace(update.manifest, tensors=(dataclasses.replace(a, start=b.start), b))
    model = torch.nn.Module()
    model.a, model.b = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    with pytest.raises(WeightSyncError, match="checksum of tensor 'a' differs"):
        take(WeightReceiver(model, "worker 0"), swapped, update.chunks)
    assert not model.b.any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state | {"new": torch.zeros(2)}, "its model has no tensor 'new'"),
        (lambda state: {k: v for k, v in state.items() if k != "short"}, "tensor 'short' of its model is missing"),
        (lambda state: state | {"wide": torch.zeros(11, 7)}, r"tensor 'wide' is \[11, 7\], but \[7, 11\] in its model"),
    ],
)
def test_other_names_and_shapes_are_refused(change, message):
    received = Mixed(2)
    before = weights_of(received)
    update = pack(change(Mixed(1).state_dict()), 0)
    with pytest.raises(WeightSyncError, match=message):
        take(WeightReceiver(received, "worker 0"), update.manifest, update.chunks)
    assert same(before, received.state_dict())


def test_a_lost_chunk_is_refused():
    update = pack(Mixed(1).state_dict(), 0, chunk_bytes=64)
    count = len(update.chunks)
    with pytest.raises(WeightSyncError, match=f"{count - 1} chunks arrived of {count}"):
        take(WeightReceiver(Mixed(2), "worker 0"), update.manifest, update.chunks[1:])


def test_versions_only_grow():
    receiver = WeightReceiver(Mixed(2), "worker 0")
    for version in (3, 5):
        update = pack(Mixed(version).state_dict(), version)
        take(receiver, update.manifest, update.chunks)
    with pytest.raises(WeightSyncError, match="already has version 5"):
        take(receiver, update.manifest, update.chunks)


# ---- the publisher, with a worker in this process that has a policy of its own ----


def test_a_worker_takes_up_every_version_and_stamps_it():
    trainer, rollouts = engine(ROLLOUT).policy, LocalRollouts(engine(ROLLOUT, seed=9))
    weight_sync = WeightSynchronizer(trainer, rollouts, chunk_bytes=256)
    first = weight_sync.sync_weights(0)
    assert (first.kind, first.probed) == ("full", 0)
    groups = rollouts.generate(requests()).groups
    for version in (1, 2):
        nudge(trainer, 1e-6 if version == 2 else 0.05, seed=version)  # far below the tolerance is noticed, too
        published = weight_sync.sync_weights(version, [t for group in groups for t in group])
        assert published.probed > 0 and published.gap <= 1e-6
        groups = rollouts.generate(requests()).groups
        assert {s.version for group in groups for t in group for s in t.segments if s.decisions} == {version}
    # what it writes is what the trainer would have written
    with torch.no_grad():
        scored = score_trajectories(trainer, [t for group in groups for t in group])
    assert float((scored.logprob_N - scored.behaviour_N).abs().max()) < 1e-5


def test_the_same_version_again_costs_nothing_and_an_older_one_is_refused():
    trainer, rollouts = engine(ROLLOUT).policy, LocalRollouts(engine(ROLLOUT, seed=9))
    weight_sync = WeightSynchronizer(trainer, rollouts)
    weight_sync.sync_weights(4)
    assert weight_sync.sync_weights(4).num_bytes == 0
    with pytest.raises(WeightSyncError, match="version 3 comes after version 4"):
        weight_sync.sync_weights(3)


def test_a_shared_policy_needs_no_copy():
    shared = engine(ROLLOUT)
    rollouts = LocalRollouts(shared)
    weight_sync = WeightSynchronizer(shared.policy, rollouts)
    assert weight_sync.sync_weights(7).kind == "shared" and rollouts.version == 7
    assert rollouts.generate(requests(1)).groups[0][0].segments[1].version == 7


def test_a_worker_that_ignores_new_weights_is_found_out():
    trainer, rollouts = engine(ROLLOUT).policy, LocalRollouts(deaf_engine(ROLLOUT))
    probe = rollouts.generate(requests()).groups[0]
    weight_sync = WeightSynchronizer(trainer, rollouts)
    weight_sync.sync_weights(0, probe)  # same weights from the start
    nudge(trainer)
    message = r"version 1 on the worker in this process: .* differ .* by up to \d.*tolerance"
    with pytest.raises(WeightSyncError, match=message):
        weight_sync.sync_weights(1)


def test_it_is_found_out_even_if_the_update_is_smaller_than_the_tolerance():
    trainer, rollouts = engine(ROLLOUT).policy, LocalRollouts(deaf_engine(ROLLOUT))
    weight_sync = WeightSynchronizer(trainer, rollouts)
    weight_sync.sync_weights(0, rollouts.generate(requests()).groups[0])
    nudge(trainer, 1e-6)
    with pytest.raises(WeightSyncError, match="did not take them up"):
        weight_sync.sync_weights(1)


def test_unchanged_weights_need_not_move():
    trainer, rollouts = engine(ROLLOUT).policy, LocalRollouts(engine(ROLLOUT, seed=9))
    weight_sync = WeightSynchronizer(trainer, rollouts)
    weight_sync.sync_weights(0, rollouts.generate(requests()).groups[0])
    assert weight_sync.sync_weights(1).gap <= 1e-6 and rollouts.version == 1


def test_a_nan_fails_the_probe():
    probe = Probe(2, (), np.zeros(2, np.float32), 0.1, moved=False)
    with pytest.raises(WeightSyncError, match="version 2 on worker 3"):
        probe.check("worker 3", None, np.array([0.0, np.nan], np.float32))


def test_only_trained_tensors_travel():
    trainer, worker = frozen_engine(ROLLOUT).policy, frozen_engine(ROLLOUT)
    rollouts = LocalRollouts(worker)
    sent: list[WeightUpdate] = []
    carry = rollouts.sync_weights
    rollouts.sync_weights = lambda update, probe=None: (sent.append(update), carry(update, probe))[1]
    weight_sync = WeightSynchronizer(trainer, rollouts)
    weight_sync.sync_weights(0)
    nudge(trainer)
    assert weight_sync.sync_weights(1).kind == "delta"
    assert [{entry.name for entry in p.manifest.tensors} for p in sent] == [{"head", "mix"}] * 2
    assert same(trainer.model.state_dict(), worker.policy.model.state_dict())


def test_a_delta_to_another_base_is_refused():
    trainer, worker = frozen_engine(ROLLOUT).policy, frozen_engine(ROLLOUT, seed=1)
    before = weights_of(worker.policy.model)
    with pytest.raises(WeightSyncError, match="built from another policy"):
        WeightSynchronizer(trainer, LocalRollouts(worker)).sync_weights(0)
    assert same(before, worker.policy.model.state_dict())
    WeightSynchronizer(trainer, LocalRollouts(worker), full=True).sync_weights(0)
    assert same(trainer.model.state_dict(), worker.policy.model.state_dict())


def test_of_a_policy_with_adapters_only_those_travel():
    from formats.config import FormatConfig
    from policy.config import LoraSection
    from rollout.config import RolloutConfig
    from rollout.engine.engine import Engine
    from tests.chameleon_helpers import small_policy

    torch.manual_seed(0)
    trainer, mine = (small_policy(LoraSection(r=2)) for _ in range(2))
    rollouts = LocalRollouts(Engine(mine, FormatConfig(max_images=1).build(), RolloutConfig(rows=4, max_tokens=40)))
    sent: list[WeightUpdate] = []
    carry = rollouts.sync_weights
    rollouts.sync_weights = lambda update, probe=None: (sent.append(update), carry(update, probe))[1]
    weight_sync = WeightSynchronizer(trainer, rollouts)
    weight_sync.sync_weights(0)
    probe = rollouts.generate([RolloutRequest(0, "a red circle", {}, (0, 1), 3)]).groups[0]
    weight_sync.sync_weights(1, probe)
    nudge(trainer)
    published = weight_sync.sync_weights(2)
    assert published.gap < 1e-4 and published.num_bytes < 20_000
    assert all("lora_" in entry.name for p in sent for entry in p.manifest.tensors)
    assert same(trainer.model.state_dict(), mine.model.state_dict())


def test_tied_weights_are_no_base():
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(4, 3)
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    policy = engine(ROLLOUT).policy
    policy.model = Tied()
    assert WeightSynchronizer(policy, None)._trained is None  # every name of the state dict is trained


def test_the_probe_is_of_the_shortest_that_have_something_to_score():
    groups = LocalRollouts(engine(ROLLOUT)).generate(requests(3, 3)).groups
    trajectories = [t for group in groups for t in group]
    chosen = smallest(trajectories, 2)
    assert [t.num_tokens() for t in chosen] == sorted(t.num_tokens() for t in trajectories)[:2]
    for segment in (segment for t in trajectories for segment in t.segments if segment.decisions):
        segment.decisions.sampling.temperature_N[:] = 0
    assert smallest(trajectories, 2) == ()


SCRIPT = """
import sys, torch
from accelerate import Accelerator
from rl.config import GrpoConfig
from rl.weight_sync import WeightSynchronizer
from rl.trainer import Trainer
from rollout.weights.wire import WeightSyncError
from rollout.pool.local import LocalRollouts
from tests.test_weight_sync import ROLLOUT, requests, same
from tests.worker_factories import deaf_engine, engine, nudge

accelerator = Accelerator(cpu=True)
out = []
for factory in (lambda: engine(ROLLOUT, seed=9), lambda: deaf_engine(ROLLOUT)):
    policy, worker = engine(ROLLOUT).policy, factory()
    trainer = Trainer(policy, GrpoConfig(), accelerator)
    rollouts = LocalRollouts(worker) if accelerator.is_main_process else None
    publisher = WeightSynchronizer(policy, rollouts, accelerator, trainer.scorer)
    probe = LocalRollouts(engine(ROLLOUT)).generate(requests()).groups[0]
    publisher.sync_weights(0, probe)
    nudge(policy)
    try:
        published = publisher.sync_weights(1)
        arrived = same(policy.model.state_dict(), worker.policy.model.state_dict())
        out.append((published.version, published.gap, arrived))
    except WeightSyncError as error:
        out.append(str(error))
torch.save(out, sys.argv[1] + str(accelerator.process_index))
accelerator.end_training()
"""


@pytest.mark.slow
def test_every_process_publishes_or_none_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(root),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "out")],
            cwd=root,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(150) for process in started] == [0, 0]
    main, other = (torch.load(tmp_path / f"out{rank}", weights_only=False) for rank in range(2))
    assert main[0] == (1, main[0][1], True) and other[0][:2] == main[0][:2]
    assert "over the tolerance" in main[1] and other[1] == main[1]
