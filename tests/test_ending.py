"""A program that has finished ends with 0: no thread, process or file of ours outlives its run."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
from rewards_helpers import text, trajectory_of

from rewards.config import RewardsConfig
from rewards.judge.config import JudgeConfig
from rewards.manager import RewardManager
from rewards.runtime import workers
from rewards.runtime.workers import Executor
from runtime import ending
from tests.judge_server import Answer, JudgeServer
from tests.test_cli import QUICKSTART, ROOT, SMALL
from underdrawing.cli import main

# What a step leaves behind: each lane's last job holds arrays that rest on tensors, which are slow to free.
JUDGES = """
import os, sys
import torch
from rewards.runtime.workers import Executor

def main():
    for lane in [Executor("driver") for _ in range(6)]:
        rows = [torch.zeros(4).numpy() for _ in range(20_000)]
        assert lane.submit(lambda worker, rows=rows: len(rows)).result() == 20_000
        lane.close()

# Programs that are forked off end as this one does, and need not import everything again.
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        children = []
        break
    children.append(child)
main()
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
if any(codes):
    sys.exit(f"exit codes of the others: {codes}")
"""


def finished(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )


def test_a_program_that_judged_ends_with_0_every_time():
    end = finished("-W", "ignore::DeprecationWarning", "-c", JUDGES)  # Python's own, of forks beside threads
    assert (end.returncode, end.stderr) == (0, "")


def ours(before: set[threading.Thread]) -> list[str]:
    """Names of threads that were not there before, torch's and others' included."""
    return [thread.name for thread in threading.enumerate() if thread not in before and thread.is_alive()]


def test_a_closed_executor_has_no_thread_and_no_job():
    before = set(threading.enumerate())
    lane = Executor("mine", (1, 2, 3))
    held = np.zeros(3)
    gone = weakref.ref(held)
    assert lane.submit(lambda worker, held=held: len(held)).result() == 3
    del held
    gc.collect()
    assert gone() is None  # while the thread waits for its next job
    waiting = [lane.submit(lambda worker: time.sleep(0.2)) for _ in range(9)]
    lane.close()
    lane.close()
    assert ours(before) == []
    assert [future.done() for future in waiting] == [True] * 9
    assert sum(future.cancelled() for future in waiting) >= 6  # three had begun


def test_a_function_that_never_returns_is_left_behind_and_the_program_still_ends(monkeypatch, caplog):
    """It runs in the driver, where nothing can end it."""
    monkeypatch.setattr(workers, "JOIN_S", 0.2)
    monkeypatch.setattr(ending, "_left", [])
    stop = threading.Event()
    lane = Executor("stuck")
    lane.submit(lambda worker: stop.wait(60))
    time.sleep(0.1)
    with caplog.at_level(logging.WARNING):
        lane.close()
    assert "reward-stuck-0 did not end within 0.2 s" in caplog.text
    assert [thread.name for thread in ending._left] == ["reward-stuck-0"]
    stop.set()


STUCK = """
import sys, time
from rewards.runtime import workers
from runtime.ending import leave
workers.JOIN_S = 0.1
lane = workers.Executor("stuck")
lane.submit(lambda worker: time.sleep(600))
time.sleep(0.1)
lane.close()
print("said", flush=False)
leave(7)
"""


def test_the_exit_code_is_the_programs_own_though_a_thread_is_stuck():
    began = time.monotonic()
    end = finished("-c", STUCK)
    assert (end.returncode, end.stdout) == (7, "said\n") and time.monotonic() - began < 60


def rewards(file: Path, url: str) -> RewardsConfig:
    file.write_text("def asks(completions, judge):\n    return [float(len(judge.ask([]))) for _ in completions]\n")
    own = f"{file}:asks"
    parts = {
        "driver": {"function": own, "isolate": False},
        "process": {"function": own},
        "two": {"function": own, "workers": {"count": 2}},
        "form": {"function": "format"},
    }
    judge = JudgeConfig(base_url=url, model="judge")
    return RewardsConfig.model_validate({"parts": parts, "total": "driver", "judge": judge.model_dump()})


def test_a_closed_manager_leaves_no_thread_no_process_and_no_descriptor(tmp_path):
    from formats.registry import get_format
    from tasks.registry import get_task

    group = [trajectory_of({}, text("answer", "x"), member=member) for member in range(2)]
    with JudgeServer(lambda body, number: "yes", models=["judge"]) as server:
        config, task, fmt = rewards(tmp_path / "asks.py", server.url), get_task("shapes"), get_format("strokes")
        me, counts = psutil.Process(), []
        before, children = set(threading.enumerate()), set(me.children(recursive=True))
        for _ in range(2):  # what is imported at the first time stays
            with RewardManager(config, task, fmt) as manager:
                manager.score([group])
                assert {name.partition(" ")[0] for name in ours(before)} >= {"judge", "output", "reward-driver-0"}
            while any("process_request_thread" in thread.name for thread in threading.enumerate()):
                time.sleep(0.01)  # the server above closes its side of the connections
            counts.append(me.num_fds())
            assert ours(before) == [] and set(me.children(recursive=True)) <= children
        assert counts[0] == counts[1]


def test_closing_ends_a_call_that_waits_for_the_judge(tmp_path):
    """The function runs in the driver's thread and asks an endpoint that does not answer."""
    file = tmp_path / "asks.py"
    file.write_text(
        "from rewards.judge.base import Question\n"
        "def asks(completions, judge):\n"
        "    return [float(bool(r.text)) for r in judge.ask([Question.of('?')] * len(completions))]\n"
    )
    started, asked = threading.Event(), threading.Event()

    def hang(body, number):
        if not started.is_set():  # the questions before the run
            return "yes"
        asked.set()
        return Answer(stall_s=60)

    before = set(threading.enumerate())
    with JudgeServer(hang, models=["judge"]) as server:
        served = set(threading.enumerate())
        config = RewardsConfig.model_validate(
            {
                "parts": {"mine": {"function": f"{file}:asks", "isolate": False, "retries": 3, "retry_wait_s": 60}},
                "judge": {"base_url": server.url, "model": "judge", "timeout_s": 60},
            }
        )
        manager = RewardManager(config)
        started.set()
        pending = manager.begin(1, (1,))
        pending.add(0, [trajectory_of({}, text("answer", "x"))])
        assert asked.wait(20)
        began = time.monotonic()
        manager.close()
        assert time.monotonic() - began < 5
        assert [name for name in ours(before | served) if name.startswith(("reward", "judge"))] == []


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={run}"]) == 0
    return run / "sft" / "model"


def one_step(warm: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "grpo",
        QUICKSTART,
        *SMALL,
        f"run_dir={run_dir}",
        "grpo.steps=1",
        "grpo.prompts_per_step=2",
        "grpo.num_generations=2",
        "rollout.max_tokens=60",
        "--weights",
        str(warm),
        *more,
    ]


def test_after_a_run_no_thread_and_no_process_of_ours_is_alive(warm, tmp_path):
    assert main(one_step(warm, tmp_path / "first")) == 0  # libraries start threads of their own once
    before, children = set(threading.enumerate()), set(psutil.Process().children(recursive=True))
    file = tmp_path / "own.py"
    file.write_text("def own(completions):\n    return [float(len(c)) for c in completions]\n")
    part = f"rewards.parts.own={json.dumps({'function': f'{file}:own'})}"
    assert main(one_step(warm, tmp_path / "second", part)) == 0
    assert ours(before) == []
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers_", [0, 2], ids=["in-process", "ray"])
def test_twenty_runs_of_one_step_each_end_with_0(warm, tmp_path, workers_):
    """With the quickstart's batch: 16 prompts of 8 answers each."""
    batch = ["grpo.prompts_per_step=16", "grpo.num_generations=8", "rollout.rows=32", f"rollout.workers={workers_}"]
    codes, said = [], []
    for number in range(20):
        end = finished("-m", "underdrawing", *one_step(warm, tmp_path / str(number), *batch))
        codes.append(end.returncode)
        said.append(end.stderr[-500:])
    assert codes == [0] * 20, [words for code, words in zip(codes, said, strict=True) if code]
