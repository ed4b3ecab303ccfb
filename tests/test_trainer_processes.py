"""Two processes over gloo give the losses and weights of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from rl.config import GrpoConfig
from rl.trainer import Trainer
from tests.bigram import BigramPolicy
from tests.test_trainer import credited

SCRIPT = """
import sys, torch
from accelerate import Accelerator
from tests.test_trainer_processes import three_steps

accelerator = Accelerator(cpu=True)
results = three_steps(accelerator)
if accelerator.is_main_process:
    torch.save(results, sys.argv[1])
accelerator.end_training()
"""


def three_steps(accelerator: Accelerator) -> dict:
    """Metrics, weights, passes of every process and counted random states, by loss."""
    results = {}
    # Three members in three groups make an odd number of trajectories: of two processes one gets a padding pass.
    for loss_type, members in (("segment", 3), ("dapo", 4), ("grpo", 3)):
        policy = BigramPolicy()
        config = GrpoConfig(
            learning_rate=0.01, loss_type=loss_type, tokens_per_micro_batch=50, beta=0.05, num_iterations=2
        )
        trainer = Trainer(policy, config, accelerator)
        rows = []
        for step in range(3):
            groups = credited(policy, config, groups=3, members=members, first=3 * step, version=trainer.version)
            gap = trainer.on_policy_gap([t for group in groups for t in group])
            rows.append({**trainer.update(groups), "gap": gap})
        results[loss_type] = {
            "rows": rows,
            "weights": policy.model.state_dict(),
            "passes": accelerator.gather(torch.tensor([policy.forwards])).tolist(),
            "random": len(trainer.state()["random"]),
        }
    return results


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(processes: int, script: str, *args: str) -> None:
    """Run a script in as many processes as a launcher would start, and wait for them all."""
    port = free_port()
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(root),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = []
    for rank in range(processes):
        ranks = (
            {
                "WORLD_SIZE": str(processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(processes),
            }
            if processes > 1
            else {}
        )
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *args],
                cwd=root,
                env={**environment, **ranks},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.timeout(600)  # importing everything on a busy machine
def test_two_processes_give_the_losses_and_weights_of_one(tmp_path):
    ones = three_steps(Accelerator(cpu=True))
    launch(2, SCRIPT, str(tmp_path / "twos.pt"))
    twos = torch.load(tmp_path / "twos.pt", weights_only=True)
    for loss_type, one in ones.items():
        two = twos[loss_type]
        assert len(set(two["passes"])) == 1 and two["passes"][0] < one["passes"][0] and two["random"] == 2
        for first, second in zip(one["rows"], two["rows"], strict=True):
            assert first.keys() == second.keys()
            for name in first:
                if not name.startswith(("time/", "perf/")):
                    assert second[name] == pytest.approx(first[name], abs=2e-6, rel=1e-4), (loss_type, name)
        for name, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], value, atol=2e-6, rtol=1e-5)
