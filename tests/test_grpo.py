"""The driver (rl/grpo.py) whole, on a policy of 400 parameters: what it logs, saves, resumes and says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import rl.grpo
from policy.base import score_trajectories
from rl.config import GrpoConfig
from rl.run import Run
from rl.state import RunState
from rl.trainer import Trainer, TrainingError
from rollout.pool.contract import FailedGroup, GenerateResult
from runtime import interrupt
from runtime.errors import UserError
from runtime.interrupt import Interrupted
from tests.bigram import BigramPolicy, reward
from tests.test_trainer_processes import launch
from training import checkpoint
from training.ranks import BrokenOffError, rank_local
from training.tracking import Tracker, read_metrics

PROMPTS = [{"prompt": f"prompt {number}"} for number in range(7)]
CONFIG = dict(
    steps=8,
    prompts_per_step=3,
    num_generations=4,
    learning_rate=0.02,
    save_every=3,
    evaluate_every=4,
    beta=0.01,
    num_iterations=2,
    lr_scheduler_type="linear",
    warmup_steps=3,
)


class BigramRollouts:
    """In-process rollouts of a bigram policy, which is the trainer's own."""

    def __init__(self, policy, fail=()):
        self.policy, self.version, self.fail = policy, -1, fail

    def generate(self, requests, timeout_s=None, each=None):
        groups = []
        for index, r in enumerate(requests):
            if r.group not in self.fail:
                groups.append(
                    [
                        self.policy.sample(r.prompt, r.record, r.group, member, r.seed, self.version)
                        for member in r.members
                    ]
                )
                if each is not None:
                    each(index, groups[-1])
        failed = [FailedGroup(i, r.group, "timeout", "") for i, r in enumerate(requests) if r.group in self.fail]
        return GenerateResult(groups, failed, {"time/rollout": 0.1})

    def shares_weights(self, policy):
        return policy is self.policy

    def set_version(self, version):
        self.version = version

    def probe(self, trajectories):
        return [score_trajectories(self.policy, trajectories).logprob_N.detach().numpy()]


@dataclass
class Judged:
    metrics: dict[str, float]


@dataclass
class AtOnce:
    """A judgement that waits for all groups."""

    judge: object
    step: int

    def add(self, index, group):
        pass

    def finish(self, groups):
        return self.judge.score(groups, self.step)


class CodeJudge:
    """Pays for code 5; `at` maps a step to something that happens while it judges."""

    def begin(self, step, sizes, counted=True):
        return AtOnce(self, step)

    def __init__(self, **at):
        self.at = {int(step[1:]): happens for step, happens in at.items()}

    def score(self, groups, step=0):
        if step in self.at:
            self.at[step]()
        for group in groups:
            for trajectory in group:
                trajectory.reward = reward(trajectory)
        rewards = [t.reward for group in groups for t in group]
        return Judged({"reward/mean": float(np.mean(rewards))} if rewards else {})


def make(folder: Path, judge=None, fail=(), accelerator=None, **config) -> Run:
    policy = BigramPolicy()
    accelerator = accelerator or Accelerator(cpu=True)
    first = accelerator.is_main_process
    return Run(
        policy,
        GrpoConfig(**{**CONFIG, **config}),
        accelerator,
        PROMPTS,
        rollouts=BigramRollouts(policy, fail) if first else None,
        reward_manager=judge or CodeJudge() if first else None,
        tracker=Tracker(folder) if first else None,
        folder=folder,
        seed=5,
        recipe={"name": "bigram"},
        evaluate=lambda step: {"heldout/score": step / 10},
        show_every=1000,
    )


def lines(folder: Path) -> list[dict]:
    """Everything but what the clock says."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("time/", "perf/")) and not name.endswith("_per_s")
        }
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = rl.grpo.train(make(folder))
    return folder, lines(folder), {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def test_every_step_is_logged_whole(undisturbed):
    folder, rows, _ = undisturbed
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert row["groups/in"] == 3 == row["groups/trained"] + row["groups/dropped/zero_variance"]
        assert {"reward/mean", "loss/total", "kl", "entropy/code", "publish/version"} <= row.keys()
        assert row["on_policy_gap"] < 1e-5
    assert [row["step"] for row in rows if "heldout/score" in row] == [4, 8]
    assert [row["publish/version"] for row in rows] == list(range(1, 9))
    assert checkpoint.steps(folder / "checkpoints") == [6, 8]
    assert {"time/step", "time/update", "time/rollout"} <= read_metrics(folder / "metrics.jsonl")[0].keys()


def test_it_improves(tmp_path):
    rl.grpo.train(make(tmp_path, steps=25, prompts_per_step=6, num_generations=8, evaluate_every=None, save_every=100))
    rewards = [row["reward/mean"] for row in lines(tmp_path)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3


def crash():
    raise RuntimeError("power cut")


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_run_that_broke_off_and_is_resumed_is_the_same_run(tmp_path, undisturbed, step):
    with pytest.raises(RuntimeError, match="power cut"):
        rl.grpo.train(make(tmp_path, CodeJudge(**{f"s{step}": crash})))
    np.random.seed(99)
    torch.manual_seed(99)
    trainer = rl.grpo.train(make(tmp_path), checkpoint.latest(tmp_path / "checkpoints"))
    _, rows, weights = undisturbed
    assert lines(tmp_path) == rows
    assert all(torch.equal(p, weights[name]) for name, p in trainer.policy.model.named_parameters())


def test_going_back_to_an_earlier_checkpoint_forgets_the_later_one(tmp_path, undisturbed):
    rl.grpo.train(make(tmp_path))
    with pytest.raises(RuntimeError):
        rl.grpo.train(make(tmp_path, CodeJudge(s7=crash)), tmp_path / "checkpoints" / "step-000006")
    assert checkpoint.steps(tmp_path / "checkpoints") == [6]
    assert lines(tmp_path) == undisturbed[1][:6]


def test_a_resumed_run_says_which_keys_changed_and_goes_on_with_the_new_ones(tmp_path, caplog):
    def recipe(**grpo):
        return {
            "name": "a",
            "run_dir": "there",
            "track": {"wandb": "auto"},
            "policy": {"lora": None},
            "rewards": {"parts": {"detect": {"weight": 1}}},
            "grpo": {"save_every": 1, **grpo},
        }

    run = make(tmp_path, steps=2, lr_scheduler_type="constant")
    run.recipe = recipe(learning_rate=0.02, beta=0.01)
    rl.grpo.train(run)
    assert "recipe" not in caplog.text
    run = make(tmp_path, steps=3, lr_scheduler_type="constant", learning_rate=1e-5)
    run.recipe = {
        **recipe(learning_rate=1e-5, beta=0.01, save_every=9),
        "name": "b",
        "run_dir": "here",
        "track": {"wandb": "disabled"},
        "policy": {"lora": {"r": 4}},
        "rewards": {"parts": {"detect": {"weight": 1}, "length": {"weight": 2}}},
    }
    rl.grpo.train(run, checkpoint.latest(tmp_path / "checkpoints"))
    [record] = [record for record in caplog.records if "recipe" in record.message]
    assert record.levelname == "WARNING"
    assert record.message.endswith(
        "not that of step-000002, and the run goes on with what it says now: policy.lora: None -> {'r': 4}; "
        "rewards.parts.length: unset -> {'weight': 2}; grpo.learning_rate: 0.02 -> 1e-05"
    )
    assert [row["learning_rate"] for row in lines(tmp_path)] == [0.02, 0.02, 1e-5]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_lets_the_step_be_finished_and_saved_and_says_how_to_go_on(tmp_path, undisturbed, number, code):
    run = make(tmp_path, CodeJudge(s4=lambda: os.kill(os.getpid(), number)))
    before = signal.getsignal(number)  # a job in the background inherits one that ignores it
    with pytest.raises(Interrupted, match="stopped after step 4 of 8; saved in .*step-000004. To go on") as raised:
        rl.grpo.train(run)
    assert raised.value.exit_code == code
    assert signal.getsignal(number) is before
    rl.grpo.train(make(tmp_path), checkpoint.latest(tmp_path / "checkpoints"))
    assert lines(tmp_path) == undisturbed[1]


def terminated_and_slow(seconds: float = 30.0):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_step_that_outlasts_the_grace_time_is_broken_off_and_made_again(tmp_path, undisturbed, monkeypatch, step):
    """Step 4 is broken off in its evaluation: it is trained, and logged by the run that goes on."""
    monkeypatch.setattr(interrupt, "GRACE_S", 0.3)
    run = make(tmp_path, None if step == 4 else CodeJudge(**{f"s{step}": terminated_and_slow}))
    if step == 4:
        run.evaluate = lambda step: terminated_and_slow()
    finished = step if step == 4 else step - 1
    told = f"The {finished} finished step.s. are saved. To go on, give" if finished else "Nothing was saved: no step"
    began = time.monotonic()
    with pytest.raises(Interrupted, match=f"SIGTERM: broken off 0.3 s after it. {told}") as raised:
        rl.grpo.train(run)
    assert raised.value.exit_code == 143 and time.monotonic() - began < 20
    assert checkpoint.steps(tmp_path / "checkpoints")[-1:] == [finished] * bool(finished)
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, step))
    rl.grpo.train(make(tmp_path), checkpoint.latest(tmp_path / "checkpoints"))
    assert lines(tmp_path) == undisturbed[1]


def test_groups_that_failed_are_in_the_ledger(tmp_path):
    rl.grpo.train(make(tmp_path, fail={1, 2}, steps=1))
    [row] = lines(tmp_path)
    assert row["groups/in"] == 3 and row["groups/dropped/failed"] == 2
    assert row["groups/trained"] + row["groups/dropped/zero_variance"] == 1


def test_a_step_with_nothing_to_learn_goes_by(tmp_path):
    rl.grpo.train(make(tmp_path, fail=set(range(3)), steps=2))
    first, second = lines(tmp_path)
    assert first["optimizer_steps"] == 0 and first["publish/version"] == 0 and second["publish/version"] == 1


def test_another_run_is_not_written_over(tmp_path):
    rl.grpo.train(make(tmp_path, steps=1))
    before = lines(tmp_path)
    with pytest.raises(UserError, match="already holds a run \\(step-000001\\). Resume it"):
        rl.grpo.train(make(tmp_path, steps=1))
    assert lines(tmp_path) == before


def test_a_checkpoint_of_other_prompts_or_another_policy_is_refused(tmp_path):
    rl.grpo.train(make(tmp_path, steps=1))
    last = checkpoint.latest(tmp_path / "checkpoints")
    run = make(tmp_path)
    run.prompts = PROMPTS[:-1]
    with pytest.raises(UserError, match="training prompts are not these"):
        rl.grpo.train(run, last)
    run = make(tmp_path)
    run.policy.model.embedding.weight.requires_grad_(False)
    with pytest.raises(UserError, match="'embedding.weight' is in the checkpoint but not trained here"):
        rl.grpo.train(run, last)


def test_the_driver_stays_short():
    assert len(Path(rl.grpo.__file__).read_text().splitlines()) < 120


KILLED = """
import sys
from pathlib import Path
import rl.grpo
from training import checkpoint
from tests.test_grpo import make
folder = Path(sys.argv[1])
rl.grpo.train(make(folder), checkpoint.latest(folder / "checkpoints"))
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_is_the_same_run(tmp_path, undisturbed):
    noise, kills = np.random.default_rng(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    while True:
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
        # Wait for a sign of life, so that every try gets somewhere, and kill it a random moment later.
        path, size = tmp_path / "metrics.jsonl", -1
        size = path.stat().st_size if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_size == size):
            time.sleep(0.005)
        time.sleep(float(noise.uniform(0, 0.2)))
        if kills < 6 and process.poll() is None:
            process.kill()
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 2
    assert lines(tmp_path) == undisturbed[1]


TWO = """
import sys
from pathlib import Path
from accelerate import Accelerator
import rl.grpo
from training import checkpoint
from tests.test_grpo import CodeJudge, crash, faulty, make
from runtime.errors import UserError
folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
rl.grpo.train(make(folder, accelerator=accelerator))
def refuse():
    raise UserError("the judge is out")
try:
    rl.grpo.train(make(folder / "second", CodeJudge(s2=refuse), accelerator=accelerator))
except UserError as error:
    (folder / f"error{accelerator.process_index}").write_text(str(error))
third = make(folder / "third", accelerator=accelerator, save_every=100)
try:
    rl.grpo.train(faulty(third, "evaluate") if accelerator.is_main_process else third)
except UserError as error:
    (folder / f"late{accelerator.process_index}").write_text(str(error))
rl.grpo.train(make(folder / "third", accelerator=accelerator), checkpoint.latest(folder / "third" / "checkpoints"))
# A bug of the first process is no fault to save after: all of them go at once.
try:
    rl.grpo.train(make(folder / "fourth", CodeJudge(s2=crash), accelerator=accelerator))
except Exception as error:
    (folder / f"bug{accelerator.process_index}").write_text(f"{type(error).__name__}: {error}")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def test_a_fault_that_ends_the_run_loses_no_finished_step(tmp_path, undisturbed):
    def refuse():
        raise UserError("reward 'mine' returned 3 values for 8 completions")

    with pytest.raises(UserError, match=r"3 values for 8 completions. The 4 finished step\(s\) are saved; .*--resume"):
        rl.grpo.train(make(tmp_path, CodeJudge(s5=refuse), save_every=100))
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    rl.grpo.train(make(tmp_path, save_every=100), checkpoint.latest(tmp_path / "checkpoints"))
    assert lines(tmp_path) == undisturbed[1]


def faulty(run, where):
    """The run with a fault of `where` at step 4, which is evaluated."""

    def refuse(*args):
        raise UserError("a fault that can be mended")

    set_version, evaluate, log = run.rollouts.set_version, run.evaluate, run.tracker.log
    if where == "publish":
        run.rollouts.set_version = lambda version: refuse() if version == 4 else set_version(version)
    elif where == "evaluate":
        run.evaluate = lambda step: refuse() if step == 4 else evaluate(step)
    else:

        def fills_the_disk(step, metrics):
            if step == 4:
                run.tracker._write('{"step": 4, "rew')
                refuse()
            log(step, metrics)

        run.tracker.log = fills_the_disk
    return run


@pytest.mark.parametrize("where", ["publish", "evaluate", "log"])
def test_a_fault_after_the_update_loses_neither_the_step_nor_its_line(tmp_path, undisturbed, where):
    with pytest.raises(UserError, match=r"can be mended. The 4 finished step\(s\) are saved; .*--resume"):
        rl.grpo.train(faulty(make(tmp_path, save_every=100), where))
    for _ in range(2):  # and once more, where it was not mended
        assert checkpoint.steps(tmp_path / "checkpoints") == [4]
        with pytest.raises(UserError, match="mended. The 4 finished"):
            rl.grpo.train(faulty(make(tmp_path, save_every=100), where), checkpoint.latest(tmp_path / "checkpoints"))
    trainer = rl.grpo.train(make(tmp_path), checkpoint.latest(tmp_path / "checkpoints"))
    _, rows, weights = undisturbed
    assert lines(tmp_path) == rows
    assert all(torch.equal(p, weights[name]) for name, p in trainer.policy.model.named_parameters())
    assert not list((tmp_path / "checkpoints").rglob("*_metrics.json"))  # whatever was owed has been made good


def test_trajectories_of_a_step_that_is_yet_to_be_logged_are_not_forgotten(tmp_path):
    def shown(run):
        run.show_every = 2
        return run

    with pytest.raises(UserError, match="can be mended"):
        rl.grpo.train(faulty(shown(make(tmp_path, save_every=100)), "evaluate"))
    folder = tmp_path / "trajectories"
    assert sorted(path.name for path in folder.iterdir()) == ["000001", "000002", "000004"]
    with pytest.raises(UserError, match="can be mended"):  # step 4 is not sampled again
        run = shown(make(tmp_path, save_every=100))
        rl.grpo.train(faulty(run, "evaluate"), checkpoint.latest(tmp_path / "checkpoints"))
    assert sorted(path.name for path in folder.iterdir()) == ["000001", "000002", "000004"]
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert row["time/step"] >= row["time/update"] > 0


def fails_at(number):
    """Trainer._step with no finite gradient at the number-th optimiser step."""
    step, calls = Trainer._step, []

    def fails(trainer):
        calls.append(1)
        if len(calls) == number:
            raise TrainingError("the gradient's norm is nan")
        return step(trainer)

    return fails


def test_a_fault_before_the_weights_move_saves_the_step_before(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", fails_at(2 * 4 + 1))
    with pytest.raises(TrainingError, match=r"norm is nan. The 4 finished step\(s\) are saved"):
        rl.grpo.train(make(tmp_path, save_every=100))
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    rl.grpo.train(make(tmp_path), checkpoint.latest(tmp_path / "checkpoints"))
    assert lines(tmp_path) == undisturbed[1]


def test_a_step_that_is_half_trained_is_not_saved_as_one(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", fails_at(2 * 4 + 2))
    with pytest.raises(TrainingError, match="Step 5 was half trained, so nothing was saved: it goes on from step-"):
        rl.grpo.train(make(tmp_path))
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]
    rl.grpo.train(make(tmp_path), checkpoint.latest(tmp_path / "checkpoints"))
    assert lines(tmp_path) == undisturbed[1]


def test_where_the_disk_is_full_too_the_fault_is_told_first(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="^a fault that can be mended. The 4 finished .* could not be saved: .*cannot"):
        rl.grpo.train(faulty(make(tmp_path, save_every=100), "evaluate"))


def test_a_fault_of_one_process_alone_asks_the_others_for_nothing(tmp_path, monkeypatch):
    run = make(tmp_path)
    trainer = Trainer(run.policy, run.config, run.accelerator)
    state = RunState(run, trainer)
    monkeypatch.setattr("rl.state.run_on_main", lambda *args: pytest.fail("the others are not there to answer"))
    two = SimpleNamespace(num_processes=2, process_index=1)
    with pytest.raises(BrokenOffError, match="TrainingError in process 1: the policy scored 3"):
        with state.training(4), rank_local(two):
            raise TrainingError("the policy scored 3")


@pytest.mark.timeout(600)  # importing everything twice on a busy machine
def test_two_processes_run_the_same_loop(tmp_path, undisturbed):
    launch(2, TWO, str(tmp_path))
    for ours, theirs in zip(lines(tmp_path), undisturbed[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=1e-4, rel=1e-3), (ours["step"], name)
    loaded = checkpoint.load(tmp_path / "checkpoints" / "step-000008")
    assert len(loaded.trainer["random"]) == 2
    for name, value in undisturbed[2].items():
        torch.testing.assert_close(loaded.trainer["parameters"][name], value, atol=1e-4, rtol=1e-3)
    # What stops the first process stops the other, which hears why.
    for rank in (0, 1):
        said = (tmp_path / f"error{rank}").read_text()
        assert "the judge is out. The 1 finished step(s) are saved" in said
    assert checkpoint.steps(tmp_path / "second" / "checkpoints") == [1]
    assert loaded.recipe == {"name": "bigram"}
    for rank in (0, 1):
        assert "can be mended. The 4 finished step(s) are saved" in (tmp_path / f"late{rank}").read_text()
    assert lines(tmp_path / "third") == lines(tmp_path)
    assert (tmp_path / "bug0").read_text() == "RuntimeError: power cut"
    assert (tmp_path / "bug1").read_text() == "BrokenOffError: RuntimeError: power cut"
