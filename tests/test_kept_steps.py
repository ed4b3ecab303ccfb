"""Whole steps kept by real runs of a tiny policy: computed again to the last bit, and refused if altered."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import rl.grpo
from formats.registry import get_format
from record.digests import altered_parts, digests_of
from record.trajectory import DecisionKind
from rewards.config import RewardsConfig
from rewards.replayed import ReplayManager, asking, on_this_machine, said
from rl.config import GrpoConfig
from rl.kept_forwards import KeptForward, KeptUpdate, first_difference, from_bytes, to_bytes
from rl.kept_steps import FINGERPRINT, KeptRound, KeptStep, KeptStepError, keeps, kept_steps, read_step
from rl.ledger import Ledger
from rl.replay import (
    Judged,
    Replay,
    advantage_differences,
    credit_again,
    judge_again,
    loss_again,
    needing_weights,
    reward_differences,
    update_again,
)
from rl.trainer import Trainer
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.pool.contract import FailedGroup
from rollout.pool.local import LocalRollouts
from runtime.errors import UserError
from tests.bigram import BigramPolicy, sampled_groups
from tests.fakes import FakePolicy
from tests.test_flow_training import credited, trainer_of
from tests.test_forks_grpo import FORK
from tests.test_grpo import CodeJudge, lines, make
from tests.test_grpo_chameleon import CodeJudge as OddCodes
from tests.test_grpo_chameleon import make as make_chameleon
from tests.test_trainer_processes import launch
from training import checkpoint
from training.tracking import read_metrics

KEPT = dict(steps=3, save_every=1, keep_checkpoints=9, evaluate_every=None, keep_rollouts="all", num_minibatches=2)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A run of three steps, each of two passes of two optimiser steps, with a KL term; a group is lost in each."""
    folder = tmp_path_factory.mktemp("kept")
    run = make(folder, fail={1, 4, 7}, **KEPT)
    rl.grpo.train(run)
    return folder


@pytest.fixture
def copied(kept, tmp_path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "run"))


def replayed(folder: Path, step: int, policy, judge, weights: bool = True, **config) -> Replay:
    """A step of a run, computed again by its parts."""
    kept, config = read_step(folder, step), GrpoConfig(**config)
    judged = {t.key: Judged.of(t) for group in kept.groups for t in group}
    replay = Replay()
    metrics = judge_again(kept, judge)
    replay.values["rewards"] = reward_differences(kept.groups, judged)
    replay.compare("rewards", kept, metrics)
    ledger, metrics = credit_again(kept, config)
    replay.values["advantages"] = advantage_differences(kept.groups, judged)
    replay.compare("advantages", kept, metrics)
    replay.compare("loss", kept, loss_again(kept, ledger, config))
    if weights:
        trainer = Trainer(policy, config, Accelerator(cpu=True))
        if step > 1:
            trainer.load(checkpoint.load(folder / "checkpoints" / f"step-{step - 1:06d}").trainer)
        assert trainer.trained_fingerprint() == kept.weights
        metrics, replay.values["update"] = update_again(kept, ledger, trainer)
        replay.compare("update", kept, metrics)
    return replay


def config_of(**config) -> dict:
    """The configuration that tests.test_grpo.make gives a run."""
    from tests.test_grpo import CONFIG

    return {**CONFIG, **KEPT, **config}


# ---- equal to the last bit ----


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_stage_of_a_step_comes_out_as_the_run_had_it(kept, step):
    found = replayed(kept, step, BigramPolicy(), CodeJudge(), **config_of())
    assert found.equal and found.first is None, found.first
    by_stage = {stage: {m.name for m in found.metrics if m.stage == stage} for stage in ("loss", "update")}
    assert {"loss/total", "loss/kl", "kl/code", "clip/high", "entropy/word", "log_ratio/max"} <= by_stage["loss"]
    assert by_stage["update"] == by_stage["loss"] | {"grad_norm", "learning_rate", "optimizer_steps"}
    row = read_metrics(kept / "metrics.jsonl")[step - 1]
    assert row["groups/dropped/failed"] == 1 and row["optimizer_steps"] == 4
    assert {m.name: m.stored for m in found.metrics}["grad_norm"] == row["grad_norm"]
    if step > 1:
        assert row["loss/kl"] > 0 and row["log_ratio/max"] > 0


def test_weights_of_changed_codes_are_those_of_the_run(tmp_path):
    norms = []
    for weight in (1.0, 3.0):
        run = make_chameleon(tmp_path / str(weight), steps=1, keep_rollouts=1, changed_weight=weight)
        two = get_format("strokes", max_images=2, min_images=2)  # so that there is a second image, which is weighed
        run.rollouts = LocalRollouts(Engine(run.policy, two, RolloutConfig(rows=8, max_tokens=100)))
        rl.grpo.train(run)
        found = replayed(run.folder, 1, make_chameleon(tmp_path / "x").policy, OddCodes(), **run.config.model_dump())
        assert found.equal, found.first
        norms.append(read_metrics(run.folder / "metrics.jsonl")[0]["grad_norm"])
    assert norms[0] != norms[1]


def test_without_the_weights_everything_but_new_log_probs_comes_out(kept):
    found = replayed(kept, 3, None, CodeJudge(), weights=False, **config_of())
    assert found.equal and "loss/total" in {m.name for m in found.metrics}
    assert "grad_norm" not in {m.name for m in found.metrics}


def test_other_weights_are_told_by_the_first_decision(kept):
    step = read_step(kept, 2)
    judge_again(step, CodeJudge())
    ledger, _ = credit_again(step, GrpoConfig(**config_of()))
    trainer = Trainer(BigramPolicy(seed=1), GrpoConfig(**config_of()), Accelerator(cpu=True))
    assert trainer.trained_fingerprint() != step.weights
    _, values = update_again(step, ledger, trainer)
    assert values[0].what.startswith("a log-prob in segment 1 (plan)") and values[0].stored != values[0].replayed


def test_another_reward_is_told_by_trajectory_and_moves_all_that_follows(kept):
    class Generous(CodeJudge):
        def score(self, groups, step=0):
            report = super().score(groups, step)
            groups[0][1].reward += 0.5
            return report

    found = replayed(kept, 2, None, Generous(), weights=False, **config_of())
    assert not found.equal
    (value,) = found.values["rewards"]
    assert value.what == "reward" and value.replayed == value.stored + 0.5
    assert found.values["advantages"] and any(m.name == "loss/total" and not m.equal for m in found.metrics)


def test_forks_and_replaced_groups_come_out_too(tmp_path):
    """The real engine and Chameleon: candidates at states, one set of them lost, and dynamic sampling."""
    config = dict(fork={**FORK, "occurrences": 1}, steps=2, max_rollout_rounds=3, keep_rollouts=1)
    run = make_chameleon(tmp_path, **config)
    generate = run.rollouts.generate

    def loses_one_set(requests, timeout_s=None, each=None):
        if requests[0].parent is None:
            return generate(requests, timeout_s, each)
        result = generate(requests[1:], timeout_s, each and (lambda index, group: each(index + 1, group)))
        return replace(result, failed=[FailedGroup(0, requests[0].group, "crash", "out of memory")])

    run.rollouts.generate = loses_one_set
    rl.grpo.train(run)
    assert sum(len(read_step(tmp_path, step).rounds) for step in (1, 2)) > 2
    for step in (1, 2):
        assert read_step(tmp_path, step).forks.came[0] == 1
        found = replayed(tmp_path, step, make_chameleon(tmp_path / "x").policy, OddCodes(), **run.config.model_dump())
        assert found.equal, found.first
        assert {"forks/trained", "groups/in"} <= {m.name for m in found.metrics}
    assert any(name.startswith("groups/replaced/") for row in lines(tmp_path) for name in row)

    # An image of which one pixel was altered is told by its segment, though its file is a whole image.
    path = sorted((tmp_path / "steps/000001/trajectories/images").glob("*.png"))[0]
    image = np.array(Image.open(path))
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(path)
    group, member, segment = path.stem.split("-")
    with pytest.raises(
        KeptStepError, match=rf"{path.name}: .*trajectory {group}-{member}, in its segment {segment} .*: image\."
    ):
        read_step(tmp_path, 1)
    path.write_bytes(b"no image")
    with pytest.raises(KeptStepError, match=rf"{path.name}: .*{path.name}: the image cannot be read"):
        read_step(tmp_path, 1)


def test_another_engines_log_probs_are_rescored_as_they_were(tmp_path):
    class Rounded(BigramPolicy):
        def sample(self, *arguments):
            trajectory = super().sample(*arguments)
            trajectory.exact = False
            for segment in trajectory.segments[1:]:
                segment.decisions.logprob_N = (segment.decisions.logprob_N - 0.05).astype(np.float32)
            return trajectory

    run = make(tmp_path, **{**KEPT, "num_minibatches": 1, "num_iterations": 1})
    run.policy.__class__ = Rounded
    rl.grpo.train(run)
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["sampling/sampling_logp_difference/mean"] > 0.04
    config = config_of(num_minibatches=1, num_iterations=1)
    found = replayed(tmp_path, 2, BigramPolicy(), CodeJudge(), **config)
    assert found.equal, found.first
    assert {"importance/mean", "sampling/importance_sampling_ratio/max"} <= {m.name for m in found.metrics}


TWO = """
import sys
from pathlib import Path
from accelerate import Accelerator
import rl.grpo
from tests.test_grpo import make
from tests.test_kept_steps import KEPT
rl.grpo.train(make(Path(sys.argv[1]), accelerator=Accelerator(cpu=True), **KEPT, tokens_per_micro_batch=40))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_decisions_of_two_processes_are_kept_together(tmp_path):
    """The loss by what both kept is equal to the last bit; one process's own forwards are others, and rounded so."""
    launch(2, TWO, str(tmp_path))
    step = read_step(tmp_path, 2)
    assert step.setup["processes"] == 2 and {place[2] for place in step.forwards} == {0, 1}
    assert max(place[3] for place in step.forwards) > 0  # several forwards each
    config = config_of(tokens_per_micro_batch=40)
    found = replayed(tmp_path, 2, None, CodeJudge(), weights=False, **config)
    assert found.equal, found.first
    found = replayed(tmp_path, 2, BigramPolicy(), CodeJudge(), **config)
    for metric in found.metrics:
        assert metric.replayed == pytest.approx(metric.stored, abs=1e-5, rel=1e-4), metric.name


# ---- the loss by hand ----


def test_the_loss_of_kept_decisions_by_hand():
    """Rewards 1 and 0 less their mean: advantages 0.5 and -0.5. One decision each of 2 trajectories counts 1/2.

    Ratio 1.5 is clipped at 1.2: -0.6; ratio 1.1 is not: +0.55. The sum is (-0.6 + 0.55) / 2 = -0.025.
    """
    (group,) = sampled_groups(BigramPolicy(), groups=1, members=2)
    for trajectory, reward in zip(group, (1.0, 0.0), strict=True):
        for segment in trajectory.segments:
            segment.trained = segment.role == "inspect"  # of one word
        trajectory.reward = reward
    config = GrpoConfig(scale_rewards="none", num_generations=2)
    forward = KeptForward(
        group_P=torch.tensor([0, 0]),
        member_P=torch.tensor([0, 1]),
        trajectory_P=torch.tensor([0, 1]),
        padding=torch.tensor(False),
        pass_N=torch.tensor([0, 1]),
        segment_N=torch.tensor([3, 3]),
        kind_N=torch.tensor([DecisionKind.WORD, DecisionKind.WORD]),
        logprob_N=torch.zeros(2),
        log_ratio_N=torch.tensor([1.5, 1.1]).log(),
        weight_N=torch.zeros(2),  # what is kept is not believed
    )
    one = KeptRound([2], [0], [group], {})
    step = KeptStep(Path(), 1, [one], None, {(0, 0, 0, 0): forward}, {}, {}, None, {}, {"on_policy_gap": 0.0})
    ledger, metrics = credit_again(step, config)
    assert [t.advantage_S[3] for t in group] == [0.5, -0.5] and metrics["groups/trained"] == 1
    found = loss_again(step, ledger, config)
    assert found["loss/total"] == pytest.approx(-0.025, abs=1e-7) and found["loss/kl"] == 0
    assert found["clip/high"] == 0.5 and found["clip/low"] == 0
    assert found["log_ratio/max"] == found["on_policy_gap"] == pytest.approx(math.log(1.5))
    assert loss_again(replace(step, forwards={}), Ledger(0), config) == {}


@pytest.mark.parametrize("config", [{"beta": 0.1}, {"flow": {"ratio": "guard"}, "num_minibatches": 2}], ids=str)
def test_the_loss_of_denoising_steps_comes_out_of_what_is_kept(config):
    policy = FakePolicy(flow=True)
    trainer = trainer_of(policy, **config)
    groups = credited(policy, trainer.config)
    made = KeptUpdate()
    metrics = trainer.update(groups, made)
    one = KeptRound([len(group) for group in groups], range(len(groups)), groups, {})
    step = KeptStep(Path(), 1, [one], None, made.forwards, {}, {}, None, {}, metrics)
    replay = Replay()
    replay.compare("loss", step, loss_again(step, Ledger(len(groups), groups), trainer.config), needing_weights(step))
    assert replay.equal, replay.first
    assert {"loss/total", "trained/flow_decisions"} <= {m.name for m in replay.metrics}
    assert "log_ratio/max" not in {m.name for m in replay.metrics}


def test_kept_decisions_are_read_as_they_were_written(kept):
    forwards = read_step(kept, 2).forwards
    assert sorted({place[:2] for place in forwards}) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    again = from_bytes(to_bytes(forwards), "x")
    assert first_difference(forwards, again) is None and list(again) == list(forwards)
    with pytest.raises(UserError, match="x: no kept decisions"):
        from_bytes(b"nothing", "x")


# ---- which steps, and what becomes of them ----


def test_which_steps_are_kept():
    def kept_of(value) -> list[int]:
        return [step for step in range(1, 8) if keeps(GrpoConfig(keep_rollouts=value), step)]

    assert kept_of("none") == [] and kept_of("all") == [1, 2, 3, 4, 5, 6, 7] == kept_of(1)
    assert kept_of(3) == [1, 4, 7]  # after the checkpoints 0, 3 and 6
    for wrong in (0, -1, "some", 1.5):
        with pytest.raises(ValueError, match="keep_rollouts"):
            GrpoConfig(keep_rollouts=wrong)


def test_a_run_that_keeps_steps_is_the_same_run(kept, tmp_path):
    rl.grpo.train(make(tmp_path, fail={1, 4, 7}, **{**KEPT, "keep_rollouts": "none"}))
    assert lines(tmp_path) == [{k: v for k, v in row.items() if k != FINGERPRINT} for row in lines(kept)]
    assert not (tmp_path / "steps").exists()


def test_steps_after_a_checkpoint_are_forgotten_on_resuming_from_it(copied):
    before = read_step(copied, 2)
    rl.grpo.train(make(copied, fail={1, 4, 7}, **{**KEPT, "steps": 2}), copied / "checkpoints/step-000001")
    assert kept_steps(copied) == [1, 2]
    assert read_step(copied, 2).weights == before.weights  # and was made again


def test_a_disk_that_is_full_loses_no_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rl.kept_steps.kept_forwards.to_bytes", full)
    with pytest.raises(UserError, match=r"steps/000001: cannot be written .*keep_rollouts=none.*1 finished step"):
        rl.grpo.train(make(tmp_path, **KEPT))
    assert checkpoint.steps(tmp_path / "checkpoints") == [1] and kept_steps(tmp_path) == []
    assert list((tmp_path / "steps").iterdir()) == []
    monkeypatch.undo()
    rl.grpo.train(make(tmp_path, **KEPT), checkpoint.latest(tmp_path / "checkpoints"))
    assert kept_steps(tmp_path) == [2, 3] and FINGERPRINT not in read_metrics(tmp_path / "metrics.jsonl")[0]


# ---- tampering ----


def test_an_altered_reward_is_named_by_trajectory(copied):
    from record.store import load_trajectories, save_trajectories

    folder = copied / "steps/000002/trajectories"
    trajectories = load_trajectories(folder)
    trajectories[3].reward += 1.0
    save_trajectories(trajectories, folder)
    with pytest.raises(
        KeptStepError, match=rf"trajectories.parquet: .*trajectory {trajectories[3].key}, in its reward\."
    ):
        read_step(copied, 2)
    assert read_step(copied, 3).step == 3  # the others are as they were


@pytest.mark.parametrize(
    "name, words",
    [
        ("step.json", ["step.json: its SHA-256 is", "metrics.jsonl says"]),
        ("digests.json", ["digests.json: its SHA-256"]),
        ("decisions.safetensors", ["decisions.safetensors: its SHA-256"]),
        ("trajectories/segments.parquet", ["segments.parquet: its SHA-256"]),
    ],
)
def test_a_flipped_byte_is_named_by_file(copied, name, words):
    path = copied / "steps/000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(KeptStepError) as refused:
        read_step(copied, 2)
    assert all(word in str(refused.value) for word in words), refused.value


def test_missing_steps_files_and_lines_are_named(copied, tmp_path):
    with pytest.raises(KeptStepError, match="step 7 was not kept; there are: 1, 2, 3"):
        read_step(copied, 7)
    with pytest.raises(KeptStepError, match="no step is kept there.*grpo.keep_rollouts"):
        read_step(tmp_path / "nowhere", 1)
    (copied / "steps/000003/decisions.safetensors").unlink()
    with pytest.raises(KeptStepError, match="decisions.safetensors: missing"):
        read_step(copied)  # the last one
    rows = read_metrics(copied / "metrics.jsonl")

    def write(changed) -> None:
        (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))

    write([{**row, "loss/total": 0.5} for row in rows])
    with pytest.raises(KeptStepError, match="metrics.jsonl: in the line of step 2 'loss/total' is 0.5, and it was"):
        read_step(copied, 2)
    write([{k: v for k, v in row.items() if k != FINGERPRINT} for row in rows])
    with pytest.raises(KeptStepError, match="line of step 2 has no 'kept/sha256'"):
        read_step(copied, 2)
    write(rows[:1])
    with pytest.raises(KeptStepError, match="metrics.jsonl: no line of step 2"):
        read_step(copied, 2)


THOUGHT = sampled_groups(BigramPolicy(), groups=1, members=1)[0][0]


@settings(max_examples=20)
@given(st.data())
def test_any_altered_value_is_told_by_its_part(data):
    """Whatever is changed, its part and no other is named."""
    trajectory = replace(THOUGHT, segments=[replace(s) for s in THOUGHT.segments], info={})
    written = digests_of(trajectory)
    assert altered_parts(trajectory, written) == []
    what = data.draw(st.sampled_from(["reward", "rewards", "info", "ids", "text", "decisions"]))
    number = data.draw(st.integers(1, 3))
    segment = trajectory.segments[number]
    if what == "ids":
        segment.ids = segment.ids.copy()
        segment.ids[data.draw(st.integers(0, len(segment.ids) - 1))] += 1
    elif what == "decisions":
        logprob_N = segment.decisions.logprob_N.copy()
        logprob_N[-1] = np.nextafter(logprob_N[-1], np.float32(0))  # by its last bit
        segment.decisions = replace(segment.decisions, logprob_N=logprob_N)
    elif what == "text":
        segment.text += data.draw(st.text(min_size=1))
    else:
        setattr(trajectory, what, data.draw(st.floats(0.1, 1)) if what == "reward" else {"a": 0.5})
    expected = what if what in ("reward", "rewards", "info") else f"segment {number} ({segment.role}): {what}"
    assert altered_parts(trajectory, written) == [expected]


# ---- rewards that are not called again ----


def test_a_part_that_asks_a_judge_is_told_and_its_values_stand_for_it(tmp_path):
    (tmp_path / "asks.py").write_text("def right(trajectories, judge):\n    raise AssertionError('it was called')\n")
    (tmp_path / "own.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    config = RewardsConfig.model_validate(
        {
            "parts": {
                "right": {"function": f"{tmp_path / 'asks.py'}:right"},
                "one": {"function": f"{tmp_path / 'own.py'}:one", "isolate": False},
            },
            "total": "right + one",
            "judge": {"base_url": "http://127.0.0.1:9/v1", "model": "judge"},  # where nobody listens
        }
    )
    assert asking(config) == ["right"]
    (group,) = sampled_groups(BigramPolicy(), groups=1, members=3)
    for trajectory, value in zip(group, ({1: 0.25, 2: 0.75}, None, 0.5), strict=True):
        if isinstance(value, dict):
            trajectory.segment_rewards["right"] = value
        trajectory.rewards["right"] = 0.5 if isinstance(value, dict) else value
    values = {"right": said(group, "right")}
    assert values == {"right": {"0-0": {1: 0.25, 2: 0.75}, "0-1": None, "0-2": 0.5}}
    with ReplayManager(config, stored=values) as manager:
        report = manager.score([group])
    assert [t.reward for t in group] == [1.5, None, 1.5] and report.unjudged == 1
    assert group[0].segment_rewards == {"right": {1: 0.25, 2: 0.75}}


def test_rays_actors_become_processes_with_the_same_calls():
    workers = {"kind": "ray", "count": 2, "batch_size": 3}
    config = RewardsConfig.model_validate({"parts": {"format": {"function": "format", "workers": workers}}})
    here = on_this_machine(config).parts["format"].workers
    assert here is not None and (here.kind, here.count, here.batch_size) == ("process", 2, 3)
    assert on_this_machine(config).ray_cpus is None


@pytest.mark.parametrize("key, section", [("restart", {"roles": ["sketch"]}), ("image_credit", {})])
def test_steps_that_roll_out_more_than_is_kept_are_refused(key, section):
    with pytest.raises(ValueError, match=f"keep_rollouts: .* {key} rolls out more"):
        GrpoConfig.model_validate({"keep_rollouts": "all", key: section})
