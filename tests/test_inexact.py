"""Writers whose log-probs are not the scorer's: measured, rescored, corrected, and learned from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import rl.grpo
from policy.base import score_trajectories
from record.store import load_trajectories, save_trajectories
from record.trajectory import DecisionKind
from rl.advantages import compute_advantages
from rl.batches import drop_untrainable
from rl.config import GrpoConfig
from rl.inexact import SamplingGapError
from rl.ledger import Ledger, LedgerError
from rl.losses import SUMS, LossSettings, ScoredDecisions, importance_ratio, policy_loss
from rl.trainer import Trainer, TrainingError
from rollout.config import RolloutConfig
from rollout.conformance.record import ConformanceError
from rollout.pool.local import LocalRollouts
from rollout.pool.ray_rollouts import RayRollouts
from rollout.spec import EngineSpec
from rollout.weights.probe import Probe
from rollout.weights.wire import WeightSyncError
from runtime.ray_cluster import start_ray
from tests.bigram import BigramPolicy, reward, sampled_groups
from tests.writer_runs import ROLLOUT, fake_engine, fake_run, rounded
from training.tracking import read_metrics

# ---- the factor on the loss, by hand ----

# Two trajectories of two decisions: ratios 2 and 4, product 8; 0.5 and 1, product 0.5. The cap is 3.
LOG_RATIO_N = torch.tensor([2.0, 4.0, 0.5, 1.0], dtype=torch.float64).log()
TRAJECTORY_N = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    "mode, factors, cut",
    [
        ("token_truncate", [2, 3, 0.5, 1], [0, 1, 0, 0]),
        ("token_mask", [2, 0, 0.5, 1], [0, 1, 0, 0]),
        ("sequence_truncate", [3, 3, 0.5, 0.5], [1, 1, 0, 0]),
        ("sequence_mask", [0, 0, 0.5, 0.5], [1, 1, 0, 0]),
    ],
)
def test_the_factor_of_every_mode(mode, factors, cut):
    settings = LossSettings(importance_sampling_cap=3.0, importance_sampling_mode=mode)
    ratio_N, cut_N = importance_ratio(LOG_RATIO_N, TRAJECTORY_N, torch.ones(4, dtype=torch.bool), settings)
    assert ratio_N.tolist() == pytest.approx(factors) and cut_N.int().tolist() == cut
    scored = ScoredDecisions(
        torch.zeros(4, dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        torch.ones(4, dtype=torch.float64),
        TRAJECTORY_N,
        behaviour_log_ratio_N=LOG_RATIO_N,
    )
    loss = policy_loss(scored, settings)
    assert loss.loss.item() == pytest.approx(-sum(factors))
    assert loss.sums_KM[DecisionKind.WORD, SUMS.index("importance_capped")] == sum(cut)


def test_a_decision_that_counts_for_nothing_is_in_no_product():
    settings = LossSettings(importance_sampling_cap=3.0, importance_sampling_mode="sequence_truncate")
    counts_N = torch.tensor([True, False, True, True])
    ratio_N, _ = importance_ratio(LOG_RATIO_N, TRAJECTORY_N, counts_N, settings)
    assert ratio_N.tolist() == pytest.approx([2, 2, 0.5, 0.5])


def test_another_mode_is_no_mode():
    with pytest.raises(ValueError, match="no importance sampling of mode 'word'"):
        importance_ratio(LOG_RATIO_N, TRAJECTORY_N, torch.ones(4) > 0, LossSettings(importance_sampling_mode="word"))


# ---- the update ----

OFFSETS = {"plan": 0.3, "sketch": -2.0, "inspect": 0.0}  # recorded log-probs are lower by this than the trainer's


def credited(policy, config, offsets, exact):
    """Groups of the policy's own, whose recorded log-probs are then made another engine's."""
    groups = sampled_groups(policy)
    for group in groups:
        for trajectory in group:
            trajectory.reward = reward(trajectory)
            trajectory.exact = exact
            for segment in trajectory.segments[1:]:
                segment.decisions.logprob_N -= np.float32(offsets.get(segment.role, 0.0))
    return compute_advantages(groups, config).trained


def updated(offsets=None, exact=True, **config):
    policy = BigramPolicy()
    config = GrpoConfig(learning_rate=0.01, **config)
    trainer = Trainer(policy, config, Accelerator(cpu=True))
    groups = credited(policy, config, offsets or {}, exact)
    metrics = trainer.update(groups)
    return metrics, {name: p.detach().clone() for name, p in policy.model.named_parameters()}, groups


def test_what_lies_between_is_measured_in_trls_names():
    metrics, _, groups = updated(OFFSETS, exact=False)
    count = {
        role: sum(len(s.decisions) for g in groups for t in g for s in t.segments if s.role == role) for role in OFFSETS
    }
    total = sum(count.values())
    differences = 0.3 * count["plan"] + 2.0 * count["sketch"]
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(differences / total, abs=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(2.0, abs=1e-5)
    ratios = np.exp(0.3) * count["plan"] + np.exp(-2.0) * count["sketch"] + count["inspect"]
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(ratios / total, abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(np.exp(-2.0), abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(np.exp(0.3), abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/truncated"] == 0
    assert "on_policy_gap" not in metrics  # it is no rounding here
    capped, _, _ = updated(OFFSETS, exact=False, importance_sampling_cap=1.2)
    assert capped["sampling/importance_sampling_ratio/truncated"] == pytest.approx(count["plan"] / total)
    assert capped["sampling/importance_sampling_ratio/max"] == pytest.approx(1.2)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_what_counts_for_nothing_is_not_measured(mode):
    """Words weigh 0: what is said of the factor is said of the codes."""
    kinds, cap = {"word": 0.0}, 10.0
    settings = {"exact": False, "importance_sampling_mode": mode, "importance_sampling_cap": cap}
    metrics, _, _ = updated({"plan": 5.0, "sketch": 0.0}, kind_weights=kinds, **settings)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["importance/mean"] == pytest.approx(metrics["sampling/importance_sampling_ratio/mean"], abs=1e-4)


def test_ratios_are_of_the_trainers_own_weights():
    """Without the factor, another engine's log-probs change nothing at all: they are scored anew."""
    _, whole, _ = updated()
    metrics, rescored, groups = updated(OFFSETS, exact=False, importance_sampling_cap=None)
    assert metrics["log_ratio/max"] < 1e-6
    for name, value in whole.items():
        torch.testing.assert_close(rescored[name], value, atol=1e-6, rtol=1e-5)
    # the recorded ones stay what they were
    plan = groups[0][0].segments[1]
    with torch.no_grad():
        scored = score_trajectories(BigramPolicy(), [groups[0][0]])
    first = float(scored.logprob_N[0])
    assert float(plan.decisions.logprob_N[0]) == pytest.approx(first - 0.3, abs=1e-5)
    assert "sampling/importance_sampling_ratio/mean" not in metrics


def test_the_factor_reaches_the_gradient():
    """Ratios all alike scale the gradient: e^0.5 against 1, and 2 where 2 is the cap."""
    norms = {}
    for offset, cap in ((0.0, 3.0), (0.5, 3.0), (1.5, 2.0)):
        metrics, _, _ = updated(dict.fromkeys(OFFSETS, offset), exact=False, importance_sampling_cap=cap)
        norms[offset] = metrics["grad_norm"]
    assert norms[0.5] == pytest.approx(norms[0.0] * np.exp(0.5), rel=1e-4)
    assert norms[1.5] == pytest.approx(norms[0.0] * 2.0, rel=1e-4)


@pytest.mark.parametrize("mode", ["token_mask", "sequence_truncate", "sequence_mask"])
def test_how_the_batch_is_cut_changes_nothing(mode):
    results = [
        updated(OFFSETS, False, importance_sampling_mode=mode, tokens_per_micro_batch=budget) for budget in (10_000, 1)
    ]
    for key in ("grad_norm", "sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/mean"):
        assert results[0][0][key] == pytest.approx(results[1][0][key], rel=1e-4)


def test_exact_trajectories_are_trained_as_ever_to_the_bit():
    """One step: the recorded log-probs are taken for the trainer's, and nothing is scored twice."""
    policies = []
    for mode in ("token_truncate", "token_mask"):
        policy, config = BigramPolicy(), GrpoConfig(learning_rate=0.01, importance_sampling_mode=mode)
        trainer = Trainer(policy, config, Accelerator(cpu=True))
        metrics = trainer.update(credited(policy, config, {}, exact=True))
        assert policy.forwards == 1
        assert not any(name.startswith("sampling/") for name in metrics) and metrics["on_policy_gap"] < 1e-5
        policies.append(policy)
    one, two = (policy.model.state_dict() for policy in policies)
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- checks at the start ----


def test_the_known_gap_of_an_inexact_writer_does_not_stop_a_run():
    policy, config = BigramPolicy(), GrpoConfig()
    trainer = Trainer(policy, config, Accelerator(cpu=True))
    trajectories = [t for g in credited(policy, config, {"plan": 0.05}, exact=False) for t in g]
    trainer.check_on_policy(trajectories)
    assert trainer.sampling_gap(trajectories) == pytest.approx(0.05, abs=1e-5)
    for trajectory in trajectories:
        trajectory.exact = True
    with pytest.raises(TrainingError, match="sampling and scoring disagree"):
        trainer.on_policy_gap(trajectories)


def test_more_than_rounding_in_one_role_stops_it():
    policy, config = BigramPolicy(), GrpoConfig()
    trainer = Trainer(policy, config, Accelerator(cpu=True))
    trajectories = [t for g in credited(policy, config, {"inspect": 0.4}, exact=False) for t in g]
    message = r"by 0.4 on average in the role 'inspect', over the tolerance of 0.1 \(grpo.sampling_tolerance\)"
    with pytest.raises(SamplingGapError, match=message):
        trainer.check_on_policy(trajectories)
    trajectories[0].segments[1].decisions.logprob_N[0] = np.nan
    with pytest.raises(SamplingGapError, match="by inf on average in the role 'plan'"):
        trainer.check_on_policy(trajectories)


def test_an_inexact_writers_probe_is_held_to_the_mean():
    expected_N, given_N = np.zeros(4, np.float32), np.array([0.3, 0.0, 0.0, 0.0], np.float32)
    assert Probe(1, (), expected_N, 0.1, moved=False, exact=False).check("w", None, given_N) == pytest.approx(0.075)
    with pytest.raises(WeightSyncError, match="by up to 0.3 "):
        Probe(1, (), expected_N, 0.1, moved=False).check("w", None, given_N)
    with pytest.raises(WeightSyncError, match="by 0.3 on average .* over the tolerance of 0.1"):
        Probe(1, (), expected_N, 0.1, moved=False, exact=False).check(
            "w", None, given_N + np.float32([0, 0.3, 0.3, 0.3])
        )


# ---- the account ----


def test_the_ledger_counts_what_is_rescored_and_corrected():
    policy, config = BigramPolicy(), GrpoConfig()
    groups = sampled_groups(policy, groups=3)
    for number, group in enumerate(groups):
        for trajectory in group:
            trajectory.reward = reward(trajectory) if number else 0.5  # the first group has no variance
            trajectory.exact = number == 1
    groups[2][0].reward = None
    ledger = compute_advantages(groups, config)
    drop_untrainable(ledger, config)
    assert (ledger.rescored, ledger.corrected) == (3, 3)
    assert ledger.metrics()["trajectories/rescored"] == ledger.metrics()["trajectories/corrected"] == 3
    drop_untrainable(ledger, GrpoConfig(importance_sampling_cap=None))
    assert (ledger.rescored, ledger.corrected) == (3, 0)
    with pytest.raises(LedgerError, match="2 trajectories corrected of 1 rescored"):
        Ledger(1, groups[2:], rescored=1, corrected=2).check()
    assert "trajectories/rescored" not in Ledger(0).metrics()


def test_the_record_keeps_whose_log_probs_they_are(tmp_path):
    (group,) = LocalRollouts(rounded()).generate([request()]).groups
    assert not any(t.exact for t in group)
    save_trajectories(group, tmp_path / "stored")
    assert [t.exact for t in load_trajectories(tmp_path / "stored")] == [False] * len(group)


def request():
    from rollout.requests import RolloutRequest

    return RolloutRequest(0, "a red dot", {}, (0, 1), 3)


# ---- whole runs ----


def rows_of(folder):
    return list(read_metrics(folder / "metrics.jsonl"))


def test_a_run_with_an_inexact_writer_learns_as_the_exact_one_does(tmp_path):
    rewards = {}
    for name, rollouts in (("exact", LocalRollouts(fake_engine())), ("inexact", LocalRollouts(rounded()))):
        rl.grpo.train(fake_run(tmp_path / name, rollouts, steps=7))
        rows = rows_of(tmp_path / name)
        rewards[name] = [row["reward/mean"] for row in rows]
        for row in rows:
            if name == "exact":
                assert row["on_policy_gap"] < 1e-4 and "trajectories/rescored" not in row
                assert not any(key.startswith("sampling/") for key in row)
            else:
                assert row["trajectories/rescored"] == row["trajectories/corrected"] == row["trained/trajectories"]
                assert 1e-4 < row["sampling/sampling_logp_difference/mean"] < 0.05
                assert 0.9 < row["sampling/importance_sampling_ratio/mean"] < 1.1
                assert row["weight_sync/gap"] < 0.05
    gains = {name: np.mean(values[-2:]) - np.mean(values[:2]) for name, values in rewards.items()}

    assert gains["exact"] > 0.2 and gains["inexact"] > 0.2
    assert abs(gains["exact"] - gains["inexact"]) < 0.2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_inexact_writers_in_actors_is_that_of_this_process(tmp_path):
    cluster = start_ray(1, object_store_bytes=100 * 2**20)
    try:
        config = RolloutConfig(workers=1, sleep=True, **ROLLOUT)
        there = RayRollouts(EngineSpec({}, "tests.writer_runs.rounded"), config)
        assert not there.exact
        rl.grpo.train(fake_run(tmp_path / "there", there, steps=3))
        there.close()
        rl.grpo.train(fake_run(tmp_path / "here", LocalRollouts(rounded()), steps=3))
        broken = RayRollouts(EngineSpec({}, "tests.broken_writers.deaf_fake"), config)
        with pytest.raises(ConformanceError, match="weights do not reach writer 0"):
            rl.grpo.train(fake_run(tmp_path / "broken", broken, steps=3))
        broken.close()
    finally:
        cluster.stop()
    for ours, theirs in zip(rows_of(tmp_path / "here"), rows_of(tmp_path / "there"), strict=True):
        assert ours["reward/mean"] == theirs["reward/mean"]
        for key in theirs:
            if key.startswith(("sampling/", "trajectories/", "loss/", "groups/")):
                assert ours[key] == theirs[key], key
