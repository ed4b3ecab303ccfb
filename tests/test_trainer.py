"""rl/trainer.py and rl/batches.py on a policy of 400 parameters, in one process."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from policy.base import score_trajectories
from policy.chameleon.family import load
from policy.config import LoraSection
from record.trajectory import StopReason
from rl.advantages import compute_advantages
from rl.batches import plan, trainable
from rl.config import GrpoConfig
from rl.trainer import Trainer, TrainingError
from tests.bigram import BigramPolicy, reward, sampled_groups
from tests.chameleon_helpers import WORDS, sampled, small_config
from training.random_state import random_state, set_random_state


def make(seed=0, **config):
    policy = BigramPolicy(seed)
    config = GrpoConfig(**{"learning_rate": 0.01, **config})
    return policy, config, Trainer(policy, config, Accelerator(cpu=True))


def credited(policy, config, **kwargs):
    groups = sampled_groups(policy, **kwargs)
    for group in groups:
        for trajectory in group:
            trajectory.reward = reward(trajectory)
    return compute_advantages(groups, config).trained


def weights(policy):
    return {name: value.detach().clone() for name, value in policy.model.state_dict().items()}


def test_the_first_rollouts_score_as_they_were_sampled():
    policy, _, trainer = make()
    trajectories = [t for group in sampled_groups(policy) for t in group]
    assert trainer.on_policy_gap(trajectories) < 1e-5


@pytest.mark.parametrize("breach", ["temperature", "allowed set", "log-prob", "nan"])
def test_a_law_that_is_not_the_samplings_stops_the_run(breach):
    policy, _, trainer = make()
    trajectories = [t for group in sampled_groups(policy) for t in group]
    decisions = trajectories[5].segments[2].decisions
    if breach == "temperature":
        decisions.sampling.temperature_N[:] = 1.0
    elif breach == "allowed set":
        decisions.sampling.sets = (np.array([[4, 12]], np.int32),)
    else:
        decisions.logprob_N[1] = np.nan if breach == "nan" else decisions.logprob_N[1] - 0.01
    with pytest.raises(TrainingError, match=r"over the tolerance of 0.0001.*trajectory 1-1, segment 2 \(sketch\)"):
        trainer.on_policy_gap(trajectories)


def test_dropout_is_off():
    policy, config, trainer = make()
    metrics = trainer.update(credited(policy, config))
    assert metrics["on_policy_gap"] < 1e-5 and metrics["log_ratio/max"] < 1e-5


def test_one_step_is_adamw_on_the_gradient_of_the_formula():
    """An independent computation: the on-policy gradient is -A * weight * d log-prob, clipped, through AdamW."""
    policy, config, trainer = make(max_grad_norm=0.05)
    groups = credited(policy, config)
    twin = copy.deepcopy(policy.model)
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    other = BigramPolicy()
    other._active = twin
    trajectories = [t for group in groups for t in group]
    scored = score_trajectories(other, trajectories)
    loss = torch.zeros(())
    for n in range(len(scored.logprob_N)):
        trajectory = trajectories[scored.pass_N[n]]
        segment = trajectory.segments[scored.segment_N[n]]
        loss = loss - float(trajectory.advantage_S[scored.segment_N[n]]) * scored.logprob_N[n] / (
            len(segment.decisions) * len(trajectories)
        )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0).step()

    metrics = trainer.update(groups)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4) and norm > 0.05
    for name, value in policy.model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["segment", "modality", "token", "grpo", "dr_grpo"])
def test_how_the_batch_is_cut_into_passes_changes_nothing(loss_type):
    results = []
    for budget in (10_000, 40, 1):
        policy, config, trainer = make(loss_type=loss_type, tokens_per_micro_batch=budget, beta=0.1)
        metrics = trainer.update(credited(policy, config))
        results.append((policy.forwards, metrics["loss/total"], metrics["grad_norm"], weights(policy)))
    assert results[0][0] < results[1][0] < results[2][0]
    for _, loss, norm, state in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-7) and norm == pytest.approx(results[0][2], rel=1e-5)
        for name in state:
            torch.testing.assert_close(state[name], results[0][3][name], atol=2e-6, rtol=1e-5)


def test_it_learns():
    policy, config, trainer = make(learning_rate=0.03, num_iterations=2)
    before = np.mean([reward(t) for g in sampled_groups(policy, 8, 8, seed=9) for t in g])
    for step in range(15):
        trainer.update(credited(policy, config, groups=6, members=8, first=6 * step, version=trainer.version))
    after = np.mean([reward(t) for g in sampled_groups(policy, 8, 8, seed=9) for t in g])
    assert after > before + 0.4


def test_several_steps_on_one_batch_compare_with_the_weights_at_its_start():
    policy, config, trainer = make(num_iterations=3, num_minibatches=2, learning_rate=0.1)
    metrics = trainer.update(credited(policy, config))
    assert metrics["optimizer_steps"] == 6 and metrics["on_policy_gap"] < 1e-5
    assert metrics["log_ratio/max"] > 0.05 and metrics["clip/low"] + metrics["clip/high"] > 0
    assert trainer.version == 1


def test_older_trajectories_are_weighted_by_their_ratio():
    policy, config, trainer = make(learning_rate=0.1)
    groups = credited(policy, config)
    trainer.update(groups)
    metrics = trainer.update(groups)  # of version 0, and the weights are version 1
    assert "on_policy_gap" not in metrics and metrics["log_ratio/max"] < 1e-5
    assert metrics["importance/mean"] != pytest.approx(1.0, abs=1e-3)


def test_kl_is_to_the_reference_and_starts_at_zero():
    policy, config, trainer = make(beta=0.1, loss_type="token", use_bias_correction_kl=False)
    metrics = trainer.update(credited(policy, config))
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)
    metrics = trainer.update(credited(policy, config, first=4, version=1))
    assert metrics["kl"] > 1e-6 and metrics["loss/kl"] == pytest.approx(0.1 * metrics["kl"], rel=1e-4)


def test_metrics_tell_words_from_codes():
    policy, config, trainer = make()
    groups = credited(policy, config)
    metrics = trainer.update(groups)
    assert metrics["trained/code_decisions"] == 3 * metrics["trained/trajectories"]
    words = sum(len(t.segments[1].ids) + 1 for g in groups for t in g)
    assert metrics["trained/word_decisions"] == words
    assert 0 < metrics["entropy/code"] <= np.log(4) + 1e-6 and 0 < metrics["entropy/word"] <= np.log(4) + 1e-6
    assert metrics["entropy"] == pytest.approx(
        (metrics["entropy/code"] * metrics["trained/code_decisions"] + metrics["entropy/word"] * words)
        / (words + metrics["trained/code_decisions"])
    )


def test_nothing_to_train_on_moves_nothing():
    policy, _, trainer = make()
    before = weights(policy)
    assert trainer.update([])["optimizer_steps"] == 0
    assert trainer.version == 0 and all(torch.equal(before[n], v) for n, v in policy.model.state_dict().items())


def test_who_is_trained():
    policy, _, _ = make()
    [group] = sampled_groups(policy, groups=1, members=4)
    for trajectory in group:
        trajectory.reward = 1.0
    group[0].reward = None
    group[1].stop = StopReason.MAX_TOKENS
    for segment in group[2].segments[1:]:
        segment.decisions.sampling.temperature_N[:] = 0  # greedy
    assert trainable([group], GrpoConfig()) == [group[1], group[3]]
    assert trainable([group], GrpoConfig(mask_truncated_completions=True)) == [group[3]]


def test_a_role_of_weight_zero_learns_nothing():
    policy, config, trainer = make(role_weights={"plan": 0.0, "inspect": 0.0}, weight_decay=0.0)
    metrics = trainer.update(credited(policy, config))
    assert "trained/word_decisions" not in metrics and metrics["trained/code_decisions"] > 0


def test_frozen_parameters_stay():
    policy = BigramPolicy()
    policy.model.embedding.weight.requires_grad_(False)
    config = GrpoConfig(learning_rate=0.01)
    trainer = Trainer(policy, config, Accelerator(cpu=True))
    before = weights(policy)
    trainer.update(credited(policy, config))
    assert torch.equal(policy.model.embedding.weight, before["embedding.weight"])
    assert not torch.equal(policy.model.head.weight, before["head.weight"])
    policy.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        Trainer(policy, config, Accelerator(cpu=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_not_trained(dtype):
    policy = BigramPolicy()
    policy.model.head.to(getattr(torch, dtype))
    with pytest.raises(
        TrainingError, match=f"'head.weight' is to be trained in {dtype}, .*policy.dtype: float32, or train adapters"
    ):
        Trainer(policy, GrpoConfig(), Accelerator(cpu=True))
    policy.model.head.requires_grad_(False)
    Trainer(policy, GrpoConfig(), Accelerator(cpu=True))


def test_adapters_of_a_16_bit_policy_are_float32_and_move():
    config = small_config(LoraSection(r=4, alpha=8.0)).model_copy(update={"dtype": "bfloat16"})
    torch.manual_seed(0)
    policy = load(config, WORDS)
    trainer = Trainer(policy, GrpoConfig(learning_rate=1e-6), Accelerator(cpu=True))
    base = {p.dtype for name, p in policy.core.named_parameters() if "lora_" not in name and "vqmodel" not in name}
    assert base == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    before = [p.detach().clone() for p in policy.parameters()]
    group = sampled(policy, [["text", "image"]] * 2)
    for trajectory, advantage in zip(group, (1.0, -1.0), strict=True):
        trajectory.reward = advantage
        trajectory.advantage_S = np.full(len(trajectory.segments), advantage, np.float32)
    trainer.update([group])
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))


def test_deepspeed_is_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, gradient_accumulation_steps=1)
    with pytest.raises(TrainingError, match="DDP or FSDP .*, not with DeepSpeed.*`underdrawing sft`"):
        Trainer(BigramPolicy(), GrpoConfig(), accelerator)


def test_an_infinite_gradient_stops_the_run_and_leaves_the_weights():
    policy, config, trainer = make()
    groups = credited(policy, config)
    groups[0][0].advantage_S[:] = np.inf
    before = weights(policy)
    with pytest.raises(TrainingError, match="gradient's norm is"):
        trainer.update(groups)
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())


def test_a_policy_that_leaves_decisions_out_is_found_out():
    policy, config, trainer = make()
    groups = credited(policy, config)
    whole = policy.score
    trainer.scorer._score = lambda trajectories, **kwargs: whole(trajectories[:-1], **kwargs)
    with pytest.raises(TrainingError, match="decisions where the record holds"):
        trainer.update(groups)


def test_the_schedule_warms_up_and_state_continues_it():
    policy, config, trainer = make(warmup_steps=4, lr_scheduler_type="linear", steps=10)
    rates = [
        trainer.update(credited(policy, config, first=4 * s, version=trainer.version))["learning_rate"]
        for s in range(3)
    ]
    assert rates == pytest.approx([0.0, 0.0025, 0.005])

    other = BigramPolicy(seed=5)
    second = Trainer(other, config, Accelerator(cpu=True))
    torch.save(trainer.state(), buffer := io.BytesIO())
    buffer.seek(0)
    second.load(torch.load(buffer, weights_only=True))
    assert second.version == trainer.version == 3
    for one, p in ((trainer, policy), (second, other)):
        one.update(credited(p, config, first=12, version=3))
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, policy.model.state_dict()[name])


def test_a_state_goes_on_with_the_optimiser_that_the_config_asks_for():
    policy, config, trainer = make(warmup_steps=4, lr_scheduler_type="linear", steps=10)
    for step in range(6):
        trainer.update(credited(policy, config, first=4 * step, version=trainer.version))
    state = copy.deepcopy(trainer.state())

    policy, config, changed = make(
        learning_rate=0.001,
        warmup_steps=2,
        lr_scheduler_type="linear",
        steps=14,
        adam_beta1=0.5,
        adam_beta2=0.9,
        adam_epsilon=1e-5,
        weight_decay=0.1,
    )
    changed.load(state)
    # six steps are done: 8 of the 12 after the warm-up are left
    assert changed.scheduler.get_last_lr() == pytest.approx([0.001 * 8 / 12] * 2)
    matrices, vectors = changed.optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    for group in (matrices, vectors):
        assert (group["betas"], group["eps"]) == ((0.5, 0.9), 1e-5)
        assert group["lr"] == pytest.approx(0.001 * 8 / 12)
    metrics = changed.update(credited(policy, config, first=24, version=6))
    assert metrics["learning_rate"] == pytest.approx(0.001 * 8 / 12)
    assert changed.scheduler.get_last_lr() == pytest.approx([0.001 * 7 / 12] * 2)


def test_a_state_of_another_policy_is_refused_by_the_parameters_name():
    policy, config, trainer = make()
    state = trainer.state()
    lacking = {**state, "parameters": {k: v for k, v in state["parameters"].items() if k != "mix.bias"}}
    with pytest.raises(TrainingError, match="'mix.bias' is not in the checkpoint"):
        trainer.load(lacking)
    wider = {**state, "parameters": {**state["parameters"], "mix.bias": torch.zeros(3)}}
    with pytest.raises(TrainingError, match=r"'mix.bias' is \[3\] in the checkpoint and \[16\] here"):
        trainer.load(wider)


def test_a_run_that_started_from_other_weights_is_not_gone_on_with():
    policy, config, _ = make(beta=0.1)
    trainer = Trainer(policy, config, Accelerator(cpu=True), "runs/warm")
    trainer.update(credited(policy, config))
    torch.save(trainer.state(), buffer := io.BytesIO())
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = Trainer(BigramPolicy(seed=5), config, Accelerator(cpu=True), "runs/other")
    before = weights(other.policy)
    with pytest.raises(
        TrainingError,
        match=r"KL term .*: it started from runs/warm \(fingerprint [0-9a-f]{8}\), this "
        r"one from runs/other \([0-9a-f]{8}\)\. .*: --weights runs/warm$",
    ):
        other.load(state)
    assert all(torch.equal(before[name], value) for name, value in weights(other.policy).items())
    with pytest.raises(TrainingError, match="it started from runs/warm .*this one from runs/warm .*a folder that"):
        Trainer(BigramPolicy(seed=5), config, Accelerator(cpu=True), "runs/warm").load(state)
    Trainer(BigramPolicy(), config, Accelerator(cpu=True), "moved/warm").load(state)  # the place is not what counts
    other.load({name: value for name, value in state.items() if name != "start"})  # as checkpoints were before


def test_without_a_kl_term_only_frozen_weights_must_be_those_of_the_start():
    policy, config, trainer = make()
    trainer.update(credited(policy, config))
    other = make(seed=5)[2]
    other.load(trainer.state())
    assert other.state()["start"] == trainer.state()["start"]  # not those that it was built from: they are gone
    with pytest.raises(TrainingError, match="KL term"):
        make(seed=5, beta=0.1)[2].load(other.state())

    def frozen(seed):
        policy = BigramPolicy(seed)
        policy.model.embedding.weight.requires_grad_(False)
        return Trainer(policy, config, Accelerator(cpu=True))

    frozen(0).load(frozen(0).state())
    with pytest.raises(TrainingError, match="the weights that are not trained are not those of the checkpoint's run"):
        frozen(5).load(frozen(0).state())


def test_the_reference_is_the_weights_before_anything_is_loaded():
    policy, config, trainer = make(beta=0.1, learning_rate=0.1)
    trainer.update(credited(policy, config))
    fresh = make(beta=0.1)
    fresh[2].load(trainer.state())
    group = sampled_groups(BigramPolicy(), groups=1)[0]
    start_N = score_trajectories(BigramPolicy(), group).behaviour_N
    assert not torch.allclose(score_trajectories(fresh[0], group).logprob_N, start_N, atol=1e-3)
    with fresh[0].reference():
        torch.testing.assert_close(score_trajectories(fresh[0], group).logprob_N, start_N, atol=1e-5, rtol=0)


def test_random_state_round_trips():
    import random

    state = random_state()
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_process_makes_equally_many_passes_and_weights_add_up(processes):
    policy, config, _ = make(tokens_per_micro_batch=40)
    trajectories = [t for group in credited(policy, config) for t in group]
    plans = [plan(policy, trajectories, config, processes, rank) for rank in range(processes)]
    assert len({len(batches) for batches in plans}) == 1
    real = [b for batches in plans for b in batches if b.weight_PS.any()]
    assert sorted(one.trajectory.key for b in real for one in b.passes) == sorted(t.key for t in trajectories)
    # three segments of weight one each, averaged over trajectories
    total = sum(
        float(b.weight_PS[row, s]) * len(segment.decisions)
        for b in real
        for row, one in enumerate(b.passes)
        for s, segment in enumerate(one.trajectory.segments)
        if segment.decisions
    )
    assert total == pytest.approx(3.0, rel=1e-5)
