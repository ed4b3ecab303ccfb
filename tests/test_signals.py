"""Signals to whole commands, as Slurm, Kubernetes and a closed terminal send them: saved, said, a code of its own, and
nothing left running, on Ray as well, whatever comes while the first is obeyed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import rl.grpo
from record.store import load_trajectories
from rollout.pool.local import LocalRollouts
from runtime import interrupt
from sft.trainer import InterleavedSftTrainer
from tests.test_cli import QUICKSTART, ROOT, SMALL
from tests.test_quickstart import SMALL as SMALL_QUICKSTART
from tests.test_trainer_processes import free_port
from training import checkpoint
from training.tracking import read_metrics
from underdrawing import quickstart
from underdrawing.cli import main

WAIT_S = 300


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={run}"]) == 0
    return run / "sft" / "model"


class Command:
    """A command in a process of its own, with a temp folder of its own."""

    def __init__(self, *arguments: object, module: str = "underdrawing", **environment: str) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="u-sig-", dir="/tmp"))  # short, for Ray's sockets
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), **environment},
        )
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.descendants(), self.process]:
            process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def descendants(self) -> set[psutil.Process]:
        """All that has been seen of it, which may have lost it as their parent."""
        if self.process.poll() is None:
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return {p for p in self.seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE}

    def wait_until(self, happens: Callable[[], Any]) -> None:
        until = time.monotonic() + WAIT_S
        while not happens():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until, "it did not come so far"
            self.descendants()
            time.sleep(0.05)

    def send(self, *numbers: int, pause: float = 1.0) -> tuple[int, str]:
        """Send signals, with a pause after each; the exit code and what was said on stderr."""
        for number in numbers:
            self.descendants()
            if self.process.poll() is None:
                self.process.send_signal(number)
                time.sleep(pause if number is not numbers[-1] else 0)
        said = self.process.communicate(timeout=WAIT_S)[1]
        return self.process.returncode, said

    def left(self) -> tuple[list[str], list[str]]:
        """Names of processes and of files in the temp folder that outlive it."""
        files = [path.name for path in self.temporary.iterdir() if path.name.startswith("ud-")]
        return [process.name() for process in self.descendants()], files


def steps_logged(folder: Path) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and len(path.read_text().splitlines()) > 1


def grpo(warm: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "grpo",
        QUICKSTART,
        *SMALL,
        f"run_dir={run_dir}",
        "grpo.prompts_per_step=2",
        "grpo.num_generations=2",
        "rollout.max_tokens=60",
        "grpo.steps=100000",
        "grpo.save_every=100000",
        "grpo.warmup_steps=0",
        *more,
        "--weights",
        str(warm),
    ]


# ---- in a process of its own -----------------------------------------------------------------------------------------


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129), (signal.SIGINT, 130)]


@pytest.mark.parametrize(
    "number, code", [pytest.param(*case, marks=() if case[1] == 143 else pytest.mark.slow) for case in SIGNALS]
)
def test_grpo_saves_the_step_and_leaves_nothing(warm, tmp_path, number, code):
    with Command(*grpo(warm, tmp_path)) as command:
        command.wait_until(steps_logged(tmp_path))
        ended, said = command.send(number)
        assert_saved(tmp_path, ended, said, number, code)
        assert "Stopping after this step" in said
        assert command.left() == ([], [])


def assert_saved(folder: Path, ended: int, said: str, number: int, code: int) -> None:
    """A run of GRPO obeyed a signal after its step."""
    assert ended == code and "Traceback" not in said, said
    step = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert f"{interrupt.name_of(number)}: stopped after step {step} of 100000; saved in" in said
    assert "To go on, give the same command with --resume" in said
    assert checkpoint.steps(folder / "checkpoints") == [step]
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_sft_saves_the_step_and_ends_with_a_code_of_its_own(tmp_path):
    arguments = ["sft", QUICKSTART, *SMALL, f"run_dir={tmp_path}", "sft.logging_steps=1", "sft.max_steps=100000"]
    with Command(*arguments) as command:
        command.wait_until(steps_logged(tmp_path / "sft"))
        ended, said = command.send(signal.SIGTERM)
        assert ended == 143 and "SIGTERM: stopped after step" in said and "saved in" in said, said
        assert len(list(tmp_path.glob("sft/checkpoint-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_quickstart_stops_in_any_stage(tmp_path, stage):
    arguments = ["--run-dir", tmp_path / "run", *SMALL_QUICKSTART, "evaluate.samples=1"]
    endless = {"sft": "sft.max_steps=100000", "grpo": "grpo.steps=100000"}[stage]
    folder = tmp_path / "run" / ("sft" if stage == "sft" else "")
    with Command(*arguments, endless, module="underdrawing.quickstart") as command:
        command.wait_until(steps_logged(folder))
        ended, said = command.send(signal.SIGTERM)
        assert ended == 143 and "SIGTERM: stopped after step" in said, said
        assert "To go on, give the same command again" in said
        assert command.left() == ([], [])


# ---- in this process, at a given moment ------------------------------------------------------------------------------


@pytest.fixture
def heeding():
    """A test run in the background of a script ignores Ctrl-C, and one under nohup the end of its terminal."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signalled(monkeypatch):
    """(owner, name of its function, signal, which of its calls) -> that call sends this process the signal first."""

    def when(owner: Any, name: str, number: int, call: int = 2) -> None:
        function, calls = getattr(owner, name), itertools.count(1)

        def signals(*arguments, **more):
            if next(calls) == call:
                signal.raise_signal(number)
            return function(*arguments, **more)

        monkeypatch.setattr(owner, name, signals)

    return when


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("number, code", SIGNALS)
def test_grpo_saves_the_step_and_ends_with_a_code_of_its_own(capsys, caplog, warm, tmp_path, signalled, number, code):
    signalled(rl.grpo, "rollout_and_score", number)
    ended = main(grpo(warm, tmp_path, "grpo.evaluate_every=null"))
    assert_saved(tmp_path, ended, capsys.readouterr().err, number, code)
    assert "Stopping after this step" in caplog.text


def test_sft_saves_the_step(capsys, tmp_path, signalled):
    signalled(InterleavedSftTrainer, "compute_loss", signal.SIGTERM)
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={tmp_path}", "sft.logging_steps=1", "sft.max_steps=9"]) == 143
    said = capsys.readouterr().err
    assert "SIGTERM: stopped after step 2 of 9" in said and "saved in" in said, said
    assert [path.name for path in tmp_path.glob("sft/checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "stage, owner, name, kept",
    [
        ("sft", InterleavedSftTrainer, "compute_loss", "sft/checkpoint-2"),
        ("grpo", rl.grpo, "rollout_and_score", "checkpoints/step-000002"),
    ],
)
def test_the_quickstart_stops_in_any_stage_and_the_same_command_goes_on(
    capsys, tmp_path, signalled, monkeypatch, stage, owner, name, kept
):
    arguments = ["--run-dir", str(tmp_path), *SMALL_QUICKSTART, "evaluate.samples=1", "sft.max_steps=3", "grpo.steps=3"]
    signalled(owner, name, signal.SIGTERM)
    assert quickstart.main(arguments) == 143
    said = capsys.readouterr().err
    assert "SIGTERM: stopped after step 2 of 3" in said and "To go on, give the same command again" in said, said
    assert (tmp_path / kept).is_dir()
    metrics = tmp_path / ("sft" if stage == "sft" else "") / "metrics.jsonl"
    before = metrics.read_bytes()
    monkeypatch.undo()
    assert quickstart.main(arguments) == 0
    said = capsys.readouterr()
    assert ("1/5  Warm start" in said.err) == (stage == "sft"), said.err
    assert metrics.read_bytes().startswith(before) and [row["step"] for row in read_metrics(metrics)] == [1, 2, 3]
    assert json.loads(said.out.splitlines()[-1])["run_dir"] == str(tmp_path)


def test_a_rollout_keeps_what_it_has(capsys, warm, tmp_path):
    """Its rewards are slow, so it is caught with its trajectories written and none of them judged."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n"
        f"def slow(completions):\n    open('{tmp_path}/begun', 'w').close()\n    time.sleep(60)\n    return [1.0] * 2\n"
    )
    part = f"rewards.parts={json.dumps({'slow': {'function': f'{slow}:slow'}})}"
    more = [
        "rollout.max_tokens=60",
        part,
        "rewards.total=slow",
        "grpo.segment_reward_weights={}",
        "--prompts",
        "3",
        "--weights",
        str(warm),
    ]
    before = set(psutil.Process().children(recursive=True))

    def send() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    began = time.monotonic()
    assert main(["rollout", QUICKSTART, *SMALL, f"run_dir={tmp_path}", *more]) == 143
    assert time.monotonic() - began < 50  # it does not wait for the reward
    sender.join()
    said = capsys.readouterr().err
    assert "SIGTERM: stopped after 3 of 3 prompts; 3 trajectories are saved in" in said and "0 of them judged" in said
    assert len(load_trajectories(tmp_path / "rollout")) == 3
    assert set(psutil.Process().children(recursive=True)) <= before


def test_evaluate_says_that_it_kept_nothing(capsys, warm, tmp_path, monkeypatch):
    stream = LocalRollouts.stream

    def sampling(self, requests, timeout_s=None):
        for group in stream(self, requests, timeout_s):
            yield group
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(LocalRollouts, "stream", sampling)
    assert main(["evaluate", QUICKSTART, *SMALL, f"run_dir={tmp_path}", "--weights", str(warm)]) == 143
    assert "SIGTERM: no score is kept. Give the same command again" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- at once ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("step, saved", [(1, None), (2, "step-000001")])
def test_ctrl_c_twice_says_what_is_saved(capsys, warm, tmp_path, monkeypatch, step, saved):
    steps = iter(range(1, 9))
    stream = LocalRollouts.stream

    def impatient(self, requests, timeout_s=None):
        if next(steps) == step:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                time.sleep(interrupt.ECHO_S + 0.1)
        return stream(self, requests, timeout_s)

    monkeypatch.setattr(LocalRollouts, "stream", impatient)
    assert main(grpo(warm, tmp_path, "grpo.save_every=1", "grpo.evaluate_every=null")) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    if saved is None:
        assert said == "underdrawing: Ctrl-C: stopped at once; nothing was saved"
        assert not (tmp_path / "checkpoints").exists()
    else:
        assert said.startswith(
            f"underdrawing: Ctrl-C: stopped at once; {tmp_path / 'checkpoints' / saved} was the last"
        )
        assert said.endswith("To go on, give the same command with --resume")


@pytest.mark.usefixtures("heeding")
def test_ctrl_c_twice_in_a_warm_start_that_has_saved_nothing(capsys, tmp_path, monkeypatch):
    loss = InterleavedSftTrainer.compute_loss

    def impatient(self, *arguments, **more):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(interrupt.ECHO_S + 0.1)
        return loss(self, *arguments, **more)

    monkeypatch.setattr(InterleavedSftTrainer, "compute_loss", impatient)
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={tmp_path}"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "underdrawing: Ctrl-C: stopped at once; nothing was saved"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGHUP],
        [signal.SIGTERM, signal.SIGTERM],
        [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM],
    ],
    ids=["one", "two", "six"],
)
@pytest.mark.parametrize("pause", [0.5, 1.5])
def test_on_ray_nothing_outlives_the_command(warm, tmp_path, numbers, pause):
    """Which of several signals ends it depends on how far the step is: the sentence and the exit code name the same."""
    with Command(*grpo(warm, tmp_path, "rollout.workers=2"), RAY_ADDRESS="local") as command:
        command.wait_until(steps_logged(tmp_path))
        ended, said = command.send(*numbers, pause=pause)
        assert ended - 128 in numbers and "Traceback" not in said, said
        assert re.search(rf"^underdrawing: {interrupt.name_of(ended - 128)}: (stopped|broken off)", said, re.M), said
        assert command.left() == ([], []), said
        saved = checkpoint.steps(tmp_path / "checkpoints")
        assert ("nothing was saved" in said) == (not saved)
        for step in saved:
            checkpoint.verify(tmp_path / "checkpoints" / f"step-{step:06d}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("delay", [0.0, 0.7, 1.4, 2.1, 2.8])
def test_a_signal_while_ray_starts_leaves_nothing(warm, tmp_path, delay):
    with Command(*grpo(warm, tmp_path, "rollout.workers=1"), RAY_ADDRESS="local") as command:
        command.wait_until(lambda: list(command.temporary.glob("ud-ray-*")))
        time.sleep(delay)
        ended, said = command.send(signal.SIGTERM)
        assert ended == 143 and "SIGTERM: stopped at once; nothing was saved" in said, said
        assert command.left() == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_signal_to_every_process_of_a_job_is_the_drivers_to_obey(warm, tmp_path, number, code):
    """Slurm signals all processes of a step, Ray's too, which would die of it and take the step with them."""
    with Command(*grpo(warm, tmp_path, "rollout.workers=1"), RAY_ADDRESS="local") as command:
        command.wait_until(steps_logged(tmp_path))
        for process in command.descendants():
            process.send_signal(number)
        time.sleep(1)
        ended, said = command.send(number)
        assert ended == code and f"{signal.Signals(number).name}: stopped after step" in said, said
        assert "is replaced" not in said
        assert len(checkpoint.steps(tmp_path / "checkpoints")) == 1
        assert command.left() == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_ends_with_a_driver_that_is_killed(warm, tmp_path):
    with Command(*grpo(warm, tmp_path, "rollout.workers=1"), RAY_ADDRESS="local") as command:
        command.wait_until(steps_logged(tmp_path))
        command.descendants()
        command.process.kill()
        command.process.communicate()
        until = time.monotonic() + 30
        while command.left() != ([], []) and time.monotonic() < until:
            time.sleep(0.2)
        assert command.left() == ([], [])


# ---- several trainer processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("heard", [0, 1])
def test_processes_that_train_together_stop_at_the_same_step_whoever_heard_it(warm, tmp_path, heard):
    port = free_port()
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [{**more, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    arguments = grpo(warm, tmp_path, "grpo.num_generations=4")
    with Command(*arguments, **ranks[0]) as first, Command(*arguments, **ranks[1]) as second:
        both = [first, second]
        first.wait_until(steps_logged(tmp_path))
        both[heard].process.send_signal(signal.SIGTERM)
        for command in both:
            ended, said = command.send()
            assert ended == 143 and "SIGTERM: stopped after step" in said, said
        step = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
        assert checkpoint.steps(tmp_path / "checkpoints") == [step]
