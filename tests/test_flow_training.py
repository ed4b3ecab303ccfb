"""Denoised images through the real engine and the real trainer: what is recorded, what a step's ratio, divergence and
weight are, and that a reward of a latent is learned."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policy.base import score_trajectories
from policy.scoring.flow import sampler_of, step
from record.trajectory import DecisionKind
from rl.advantages import compute_advantages
from rl.config import FlowLossConfig, GrpoConfig
from rl.flow_decisions import with_flow_terms
from rl.losses import ClipRange, ScoredDecisions
from rl.trainer import Trainer, loss_settings
from rollout.config import FlowConfig, RolloutConfig
from rollout.engine.engine import Engine
from rollout.engine.flow import FlowPlan, behaviour_mean
from rollout.requests import RolloutRequest
from runtime.errors import UserError
from tests.fakes import FakeFormat, FakePolicy

FLOW = DecisionKind.FLOW


def engine(policy=None, guidance=None, version=0, **flow) -> Engine:
    """Thoughts that begin with an image and go on with a word or two."""
    fmt = FakeFormat("flow", 1, guidance, begins_with_image=True)
    rows = {"rows": 16, "max_tokens": 5, "branches": 1, "guidance": guidance is not None}
    config = RolloutConfig(flow=FlowConfig(**{"steps": 5, **flow}), **rows)
    return Engine(policy or FakePolicy(flow=True), fmt, config, version=version)


def asked(groups=3, members=3, first=0, seed=0, **more) -> list[RolloutRequest]:
    return [
        RolloutRequest(g, "a red dot", {}, tuple(range(members)), seed, **more) for g in range(first, first + groups)
    ]


def written(policy=None, groups=3, members=3, first=0, guidance=None, version=0, **flow):
    """By group."""
    run = engine(policy, guidance, version, **flow).run(asked(groups, members, first))
    return [run[start : start + members] for start in range(0, len(run), members)]


def image_of(trajectory):
    return trajectory.segments[1]


# ---- what the engine records -----------------------------------------------------------------------------------------

SAMPLERS = [
    {"sampler": "sde"},
    {"sampler": "sde", "schedule": "sd3", "noise_level": 1.2, "window": 3},
    {"sampler": "cps", "noise_level": 0.8},
    {"sampler": "cps", "variant": "release"},
    {"sampler": "dance"},
    {"sampler": "dance", "variant": "release", "window": 2},
]


@pytest.mark.parametrize("guidance", [None, 1.5])
@pytest.mark.parametrize("flow", SAMPLERS, ids=str)
def test_replay_gives_the_recorded_log_probs_and_means(flow, guidance):
    policy = FakePolicy(flow=True)
    thoughts = [t for group in written(policy, 2, 2, guidance=guidance, **flow) for t in group]
    with torch.no_grad():
        scored = score_trajectories(policy, thoughts)
        other = score_trajectories(FakePolicy(flow=True, seed=1), thoughts)
    flows_N = scored.kind_N == FLOW
    assert int(flows_N.sum()) == 4 * flow.get("window", 4)  # without a window all of five steps but the last
    torch.testing.assert_close(scored.logprob_N[flows_N], scored.behaviour_N[flows_N], atol=1e-6, rtol=0)
    assert (other.logprob_N - scored.logprob_N)[flows_N].abs().max() > 1e-2  # the check can fail
    assert len(scored.flows) == len(thoughts)
    for mine, trajectory in zip(scored.flows, thoughts, strict=True):
        image = image_of(trajectory)
        assert mine.place[1] == 1 and image.flow.sampler["variant"] == flow.get("variant", "repaired")
        mean_F = behaviour_mean(trajectory, 1, mine.noise_std_F)
        torch.testing.assert_close(mean_F, mine.mean_F, atol=2e-6, rtol=1e-5)
        step_F = image.decisions.position_N[image.decisions.kind_N == FLOW]
        np.testing.assert_allclose(mine.step_size_F, -np.diff(image.flow.time_M)[step_F], atol=1e-7)


def test_an_ode_decides_nothing_and_its_images_differ_by_their_first_noise_alone():
    own, shared = (written(sampler="ode", initial_noise=kind)[0] for kind in ("independent", "shared"))
    for trajectory in (*own, *shared):
        image = image_of(trajectory)
        assert not (image.decisions.kind_N == FLOW).any() and not len(image.flow.x_P)
        assert len(image.flow.time_M) == 6 and image.image is not None
    assert len({image_of(t).latent.tobytes() for t in own}) == 3
    assert len({image_of(t).latent.tobytes() for t in shared}) == 1


@given(
    st.sampled_from(["sde", "cps", "dance", "ode"]),
    st.none() | st.sampled_from([0.0, 0.5]),
    st.integers(1, 4),
    st.data(),
)
def test_a_plan_decides_where_some_groups_images_hold_a_decision(sampler, noise_level, steps, data):
    window = data.draw(st.none() | st.integers(1, steps))
    bounds = None
    if window is not None:
        low = data.draw(st.integers(0, steps - window))
        bounds = (low, data.draw(st.integers(low + window, steps)))
    flow = FlowConfig(sampler=sampler, noise_level=noise_level, steps=steps, window=window, window_range=bounds)
    plan = FlowPlan(flow)
    if steps == 1 and window is None and plan.noisy_T.any():
        assert not plan.decides  # its one step is the last, which only a window trains
        with pytest.raises(UserError, match="a schedule of 1 step has none to train"):
            plan.stochastic(0, 0)
    else:
        assert plan.decides == any(plan.stochastic(0, group).any() for group in range(60))


def test_one_deterministic_step_is_a_picture():
    (group,) = written(groups=1, sampler="ode", steps=1)
    assert all(image_of(t).image is not None and not (image_of(t).decisions.kind_N == FLOW).any() for t in group)


def test_with_shared_noise_members_begin_alike_and_go_apart():
    groups = written(initial_noise="shared", groups=2)
    for group in groups:
        x_MP = np.stack([image_of(t).flow.x_P for t in group])
        assert (x_MP[:, 0] == x_MP[0, 0]).all()
        assert all(len({x.tobytes() for x in x_MP[:, point]}) == 3 for point in range(1, x_MP.shape[1]))
    assert not np.array_equal(image_of(groups[0][0]).flow.x_P[0], image_of(groups[1][0]).flow.x_P[0])
    own = written(groups=1)[0]
    assert len({image_of(t).flow.x_P[0].tobytes() for t in own}) == 3


def test_a_groups_members_share_a_window_that_is_drawn_for_it():
    groups = written(steps=8, window=2, window_range=(1, 7), groups=8, members=2)
    starts = []
    for group in groups:
        windows = [t.segments[1].decisions.position_N[t.segments[1].decisions.kind_N == FLOW].tolist() for t in group]
        assert windows[0] == windows[1] == [windows[0][0], windows[0][0] + 1] and 1 <= windows[0][0] <= 5
        starts.append(windows[0][0])
        for t in group:
            flow = image_of(t).flow
            assert len(flow.x_P) == 3 and flow.point_N.tolist() == [0, 1]  # one latent more than there are decisions
    assert len(set(starts)) > 2
    again = written(steps=8, window=2, window_range=(1, 7), groups=3, members=2, first=5)
    assert [g[0].segments[1].flow.x_P.tobytes() for g in again] == [
        g[0].segments[1].flow.x_P.tobytes() for g in groups[5:]
    ]


def test_a_picture_comes_from_the_device_in_one_copy(monkeypatch):
    copies = Counter()
    for name in ("cpu", "item", "tolist"):  # each waits for the device
        plain = getattr(torch.Tensor, name)

        def counted(self, *arguments, plain=plain, name=name):
            copies[sys._getframe(1).f_globals["__name__"], name] += 1
            return plain(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    thoughts = engine().run(asked())
    assert sum(t.segments[1].latent is not None for t in thoughts) == 9
    mine = {name: count for (module, name), count in copies.items() if module == "rollout.engine.flow"}
    assert mine == {"cpu": 9}


def test_a_request_may_ask_for_another_sampler_than_the_recipe():
    heldout = FlowConfig(sampler="ode", steps=8)
    policy = FakePolicy(flow=True)
    usual, other = asked(2), asked(2, first=2, flow=heldout)
    together = engine(policy).run([*usual, *other])
    apart = engine(policy).run(usual) + engine(policy, **heldout.model_dump(exclude_unset=True)).run(asked(2, first=2))
    assert [len(image_of(t).flow.time_M) for t in together] == [6] * 6 + [9] * 6
    assert [(image_of(t).decisions.kind_N == FLOW).sum() for t in together] == [4] * 6 + [0] * 6
    for one, same in zip(together, apart, strict=True):
        assert image_of(one).flow.sampler == image_of(same).flow.sampler
        np.testing.assert_allclose(image_of(one).latent, image_of(same).latent, atol=1e-5)


def test_a_sampler_that_cannot_be_is_told_before_anything_is_sampled():
    with pytest.raises(UserError, match="sampler 'cps': noise_level is 1.5; it is a finite number between 0 and 1"):
        engine(sampler="cps", noise_level=1.5).run(asked())


def test_steps_between_which_no_window_lies_are_not_passed_over():
    with pytest.raises(ValidationError, match=r"window_range is \[0, 3\], and no window lies in it: give window"):
        FlowConfig(window_range=(0, 3))


# ---- a step in the loss ----------------------------------------------------------------------------------------------


def plain_decisions(scored, passes) -> ScoredDecisions:
    ones = torch.ones(len(scored.logprob_N))
    return ScoredDecisions(scored.log_ratio_N, ones, scored.kind_N, ones, scored.pass_N, scored.divergence_N)


def scored_by(policy, thoughts, **more):
    passes = policy.passes(thoughts)
    return passes, policy.score(passes, **more)


def moved(seed=3, by=0.01) -> FakePolicy:
    policy = FakePolicy(flow=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return policy


def test_the_same_weights_have_ratio_one_beyond_the_narrowest_clip_range():
    policy = FakePolicy(flow=True)
    thoughts = [t for group in written(policy) for t in group]
    passes, scored = scored_by(policy, thoughts)
    for config in (FlowLossConfig(), FlowLossConfig(ratio="guard")):
        terms = with_flow_terms(plain_decisions(scored, passes), scored, None, None, passes, config)
        flows_N = terms.kind_N == FLOW
        assert terms.log_ratio_N[flows_N].abs().max() < 2e-6
        torch.testing.assert_close(terms.log_ratio_N[~flows_N], scored.log_ratio_N[~flows_N])


@pytest.mark.parametrize("scored_old", [False, True])
def test_ratio_divergence_and_weight_are_those_of_the_formulas(scored_old):
    """Every step by itself, from means that the sampler makes of the velocities; nothing of flow_losses.py is asked."""
    before, now, reference = FakePolicy(flow=True), moved(), moved(seed=4)
    thoughts = [t for group in written(before) for t in group]
    passes, scored = scored_by(now, thoughts, reference=scored_by(reference, thoughts)[1])
    old = scored_by(before, thoughts)[1] if scored_old else None
    anchor = scored_by(reference, thoughts)[1]
    base = plain_decisions(scored, passes)
    plain = with_flow_terms(base, scored, old, anchor, passes, FlowLossConfig())
    guard = with_flow_terms(base, scored, old, anchor, passes, FlowLossConfig(ratio="guard", anchor="velocity_mse"))
    for mine, was, ref in zip(scored.flows, scored_by(before, thoughts)[1].flows, anchor.flows, strict=True):
        flow = image_of(thoughts[mine.place[0]]).flow
        for f, at in enumerate(mine.decision_F.tolist()):
            s, s_next = torch.from_numpy(flow.time_M[f : f + 1]), torch.from_numpy(flow.time_M[f + 1 : f + 2])
            x, x_next = torch.from_numpy(flow.x_N[f : f + 1]), torch.from_numpy(flow.x_next_N[f : f + 1])
            mean, old_mean, ref_mean = (
                step(sampler_of(flow.sampler), x, v.velocity_F[f : f + 1], s, s_next, torch.zeros_like(x)).mean_B
                for v in (mine, was, ref)
            )
            q = (
                0.7
                * torch.sqrt(s / (1 - (s if s < 1 else torch.from_numpy(flow.time_M[1:2]))))
                * torch.sqrt(s - s_next)
            )
            log_ratio = (((x_next - old_mean) ** 2).mean() - ((x_next - mean) ** 2).mean()) / (2 * q**2)
            torch.testing.assert_close(plain.log_ratio_N[at], log_ratio[0], atol=5e-5, rtol=1e-3)
            kl = ((mean - ref_mean) ** 2).mean() / (2 * q**2)
            torch.testing.assert_close(plain.divergence_N[at], kl[0], atol=1e-6, rtol=1e-3)
            shift = ((mean - old_mean) ** 2).mean() / (2 * q**2)
            torch.testing.assert_close(guard.log_ratio_N[at], (q * (log_ratio + shift))[0], atol=5e-5, rtol=1e-3)
            torch.testing.assert_close(guard.weight_N[at], 1 / (s - s_next)[0], atol=1e-4, rtol=1e-4)
            apart = ((mine.velocity_F[f] - ref.velocity_F[f]) ** 2).mean()
            torch.testing.assert_close(guard.divergence_N[at], apart, atol=1e-6, rtol=1e-4)
    flows_N = base.kind_N == FLOW
    assert plain.log_ratio_N[flows_N].abs().max() > 1e-3  # the weights had moved
    for terms in (plain, guard):
        for name in ("log_ratio_N", "divergence_N", "weight_N"):  # words are as they were
            torch.testing.assert_close(getattr(terms, name)[~flows_N], getattr(base, name)[~flows_N])


def test_a_releases_ratio_is_that_of_its_log_probs():
    thoughts = [t for group in written(sampler="cps", variant="release") for t in group]
    passes, scored = scored_by(moved(), thoughts)
    terms = with_flow_terms(plain_decisions(scored, passes), scored, None, None, passes, FlowLossConfig())
    torch.testing.assert_close(terms.log_ratio_N, scored.log_ratio_N)


def test_means_that_are_needed_and_not_given_are_asked_for():
    policy = FakePolicy(flow=True)
    thoughts = [t for group in written(policy, 1) for t in group]
    passes, scored = scored_by(policy, thoughts)
    bare = replace(scored, flows=())
    base = plain_decisions(scored, passes)
    assert with_flow_terms(base, bare, None, None, passes, FlowLossConfig()) is base
    with pytest.raises(UserError, match="scored 12 denoising steps and gave the means of 0"):
        with_flow_terms(base, bare, None, None, passes, FlowLossConfig(ratio="guard"))


def test_clip_ranges_by_kind():
    plain, guard = GrpoConfig(epsilon=0.3), GrpoConfig(flow={"ratio": "guard"})
    fast = GrpoConfig(clip_by_kind={"flow": 1e-5}, flow={"ratio": "guard"})
    assert loss_settings(plain).clip[FLOW] == ClipRange(1e-4, 1e-4)
    assert loss_settings(plain).clip[DecisionKind.CODE] == ClipRange(0.3, 0.3)
    assert loss_settings(guard).clip[FLOW] == ClipRange(2e-6, 2e-6)
    assert loss_settings(fast).clip[FLOW] == ClipRange(1e-5, 1e-5)


# ---- learning --------------------------------------------------------------------------------------------------------


def reward(trajectory) -> float:
    return float(image_of(trajectory).latent.mean())


def credited(policy, config, **more):
    groups = written(policy, **more)
    for group in groups:
        for trajectory in group:
            trajectory.reward = reward(trajectory)
    return compute_advantages(groups, config).trained


def trainer_of(policy, **config) -> Trainer:
    return Trainer(policy, GrpoConfig(**{"learning_rate": 0.02, **config}), Accelerator(cpu=True))


@pytest.mark.parametrize(
    "config", [{}, {"beta": 0.1}, {"num_iterations": 2}, {"flow": {"ratio": "guard"}, "num_minibatches": 2}], ids=str
)
def test_an_update_over_denoised_images(config):
    policy = FakePolicy(flow=True)
    trainer = trainer_of(policy, **config)
    groups = credited(policy, trainer.config)
    trainer.check_on_policy([t for group in groups for t in group])
    metrics = trainer.update(groups)
    assert metrics["on_policy_gap"] < 1e-5 and np.isfinite(metrics["loss/total"])
    assert metrics["trained/flow_decisions"] == 9 * 4 * config.get("num_iterations", 1)
    if "num_iterations" in config:  # the second pass has moved past Flow-GRPO's clip range
        assert metrics["clip/low/flow"] + metrics["clip/high/flow"] > 0.1
    if config == {}:
        assert metrics["log_ratio/max"] < 1e-5 and metrics["clip/low"] == metrics["clip/high"] == 0
    if "beta" in config:  # the reference is the same weights: neither an estimate nor the exact divergence is anything
        assert metrics["kl/flow"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind, still", [("flow", "velocity"), ("word", "head")])
def test_a_kind_of_weight_zero_learns_nothing(kind, still):
    policy = FakePolicy(flow=True)
    trainer = trainer_of(policy, kind_weights={kind: 0.0})
    before = {name: value.detach().clone() for name, value in policy.model.named_parameters()}
    trainer.update(credited(policy, trainer.config))
    after = dict(policy.model.named_parameters())
    assert torch.equal(after[still], before[still])
    other = {"velocity": "head", "head": "velocity"}[still]
    assert not torch.equal(after[other], before[other])


def test_updates_raise_a_reward_of_the_latent():
    policy = FakePolicy(flow=True)
    trainer = trainer_of(policy, kind_weights={"word": 0.0})
    held = {"groups": 4, "members": 8, "first": 1000}
    before = np.mean([reward(t) for group in written(policy, **held) for t in group])
    for update in range(12):
        trainer.update(credited(policy, trainer.config, groups=2, members=8, first=2 * update, version=trainer.version))
    after = np.mean([reward(t) for group in written(policy, **held) for t in group])
    assert after > before + 0.2
