"""Every step and rollout of the released samplers, and where the repaired forms part from them."""

from __future__ import annotations

import math

import pytest
import torch
from flow_helpers import differs, every, tensors

from policy.scoring.dpm import History, multistep_order
from policy.scoring.flow import Cps, Dance, Dpm, Ode, Sde, clean_estimate, replay, step
from policy.scoring.schedule import Window, compressed_times, model_times, uniform_times
from runtime.errors import UserError

pytestmark = pytest.mark.parity

FLOW_GRPO = [  # file, kind, what is given to the sampler, whether rows are the tokens of one image
    ("rewards/flow_steps.pt", "sde", {}, False),
    ("rewards/flow_steps.pt", "cps", {}, False),
    ("rewards/flow_steps.pt", "dance", {}, False),
    ("evals/flow/steps_sde.pt", "sde", {}, False),
    ("evals/flow/steps_cps.pt", "cps", {}, False),
    ("evals/flow/steps_dance.pt", "dance", {}, False),
    ("evals/flow/steps_dance.pt", "dance_no_constants", {"constants": False}, False),
    ("evals/flow/steps_dance.pt", "sde_no_constants", {"constants": False}, False),
    ("evals/flow/steps_bagel.pt", "bagel_sde", {"constants": False}, True),
    ("evals/flow/steps_bagel.pt", "bagel_cps", {}, True),
]


def sampler_for(kind, case, **options):
    options = {"noise_level": float(case["noise_level"]), **options}
    if "sde" in kind or kind == "mix_flow":
        return Sde(sigma_at_one=float(case["sigma_at_one"]), **options)
    return Cps(**options) if "cps" in kind else Dance(**options)


def taken(sampler, case, packed=False):
    """The record's step, and what the record says of it."""

    def of(name):
        return case[name][None] if packed else case[name]

    at, to = (torch.as_tensor(case[name], dtype=torch.float32) for name in ("sigma", "sigma_next"))
    mark = None if "deterministic" not in case else torch.full((len(of("x_t")),), not case["deterministic"])
    if case["replayed"]:
        got = replay(sampler, of("x_t"), of("velocity"), at, to, of("prev_sample"), stochastic_B=mark)
    else:
        got = step(sampler, of("x_t"), of("velocity"), at, to, of("noise"), stochastic_B=mark)
    return got, at, to, of


def one_a_row(value, rows):
    """A record's number for each row, or one for all."""
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1).expand(rows)


@pytest.mark.parametrize("file, kind, options, packed", FLOW_GRPO)
def test_the_release_is_reproduced(file, kind, options, packed):
    def run(case):
        got, at, to, of = taken(sampler_for(kind, case, variant="release", **options), case, packed)
        rows, root = len(got.noise_std_B), (at - to).sqrt()
        wrong = {
            "prev_sample": differs(got.x_next_B, of("prev_sample")),
            "mean": differs(got.mean_B, of("mean")),
            "noise_std": differs(got.noise_std_B, one_a_row(case["noise_std"], rows)),
            "log_prob": differs(got.log_prob_B, case["log_prob"]),
        }
        if "sde" in kind:
            wrong["coefficient"] = differs(got.noise_std_B / root, one_a_row(case["coefficient"], rows))
        if "sqrt_dt" in case:
            wrong["sqrt_dt"] = differs(root, case["sqrt_dt"])
        return wrong

    every(tensors(file, kind), run)


@pytest.mark.parametrize("file, kind, options, packed", FLOW_GRPO)
def test_the_repaired_form_differs_in_the_density_alone(file, kind, options, packed):
    """It leads where the release leads, with its mean and deviation. SDE and Dance: the very log-prob. CPS: the
    release's -(x' - mean)^2 divided by twice the variance, with the constants; and where there is no noise, none."""

    def run(case):
        if "cps" in kind and case["noise_level"] > 1:
            with pytest.raises(UserError, match="between 0 and 1"):
                sampler_for(kind, case)
            return {}
        got, _, _, of = taken(sampler_for(kind, case, **options), case, packed)
        std, expected = one_a_row(case["noise_std"], len(got.noise_std_B)), case["log_prob"]
        if "cps" in kind:
            expected = torch.as_tensor(expected) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
            expected = torch.where(std > 0, expected, torch.nan)
        return {
            "prev_sample": differs(got.x_next_B, of("prev_sample")),
            "mean": differs(got.mean_B, of("mean")),
            "noise_std": differs(got.noise_std_B, std),
            "log_prob": differs(got.log_prob_B, expected, relative=1e-3 if "cps" in kind else 1e-4),
        }

    every(tensors(file, kind), run)


# ---- MixGRPO's steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, constants", [("mix_flow", True), ("mix_dance", False)])
def test_mix_grpo_is_reproduced(kind, constants):
    def run(case):
        got, at, _, of = taken(sampler_for(kind, case, constants=constants, variant="release"), case)
        column = at.reshape(-1, *[1] * (case["x_t"].ndim - 1))
        wrong = {
            "prev_sample": differs(got.x_next_B, case["prev_sample"]),
            "log_prob": differs(got.log_prob_B, case["log_prob"]),
            "clean_estimate": differs(
                clean_estimate(case["x_t"].float(), case["velocity"].float(), column), case["clean_estimate"]
            ),
        }
        if "mean" in case:
            wrong["mean"] = differs(got.mean_B, case["mean"])
            wrong["noise_std"] = differs(got.noise_std_B, one_a_row(case["noise_std"], len(got.noise_std_B)))
        return wrong

    every(tensors("evals/flow/steps_mix.pt", kind), run)


@pytest.mark.parametrize("kind, log_prob", [("mix_flow", "log_prob"), ("mix_dance", "log_prob_repaired")])
def test_repaired_a_step_outside_the_window_is_no_decision_and_constants_are_kept(kind, log_prob):
    """The release scores an Euler step by a Gaussian that it is no sample of, and loses Dance's constants."""

    def run(case):
        got, *_ = taken(sampler_for(kind, case), case)
        expected = torch.full_like(case[log_prob], torch.nan) if case["deterministic"] else case[log_prob]
        return {
            "prev_sample": differs(got.x_next_B, case["prev_sample"]),
            "log_prob": differs(got.log_prob_B, expected),
            "decision": None if bool((got.noise_std_B > 0).all()) != case["deterministic"] else "marked wrongly",
        }

    every(tensors("evals/flow/steps_mix.pt", kind), run)


# ---- MixGRPO's DPM steps -----------------------------------------------------------------------------------------


def dpm_step(case, variant, noise="noise"):
    sampler = Dpm(algorithm=case["algorithm"], order=case["order"], solver=case["solver_type"], variant=variant)
    number, sigmas, known = case["step"], case["sigmas"], case["earlier_clean_estimates"]
    rows, order = len(case["x_t"]), multistep_order(number, len(sigmas) - 1, len(known), case["order"])
    times = [sigmas[number - 1 - back] for back in range(order - 1)]
    history = None
    if order > 1:
        earlier = torch.stack([time.expand(rows) for time in times])
        history = History(earlier, torch.stack(known[::-1][: order - 1]), torch.full((rows,), order))
    mark = torch.full((rows,), bool(case["sde"]))
    at, to = sigmas[number], sigmas[number + 1]
    got = step(sampler, case["x_t"], case["velocity"], at, to, case[noise], stochastic_B=mark, history=history)
    return got, sampler, order, at, to


def test_the_dpm_release_is_reproduced():
    def run(case):
        try:
            got, sampler, _, at, _ = dpm_step(case, "release")
        except UserError as error:
            return {"raises": None if "raises" in case else str(error)}
        if "raises" in case:
            return {"raises": f"nothing in place of {case['raises']}"}
        return {
            "prev_sample": differs(got.x_next_B, case["prev_sample"]),
            "log_prob": differs(got.log_prob_B, case["log_prob"]),
            "clean_estimate": differs(sampler.estimate(case["x_t"], case["velocity"], at), case["clean_estimate"]),
        }

    every(tensors("evals/flow/steps_dpm.pt", "mix_dpm"), run)


def test_the_repaired_dpm_parts_from_the_release_where_it_says():
    """dpmsolver++ up to second order: the same step, and for the SDE the same log-prob, for the ODE none. Of third
    order: another coefficient. dpmsolver: the noise in place of the clean latent, so that a first-order step of the
    ODE is Euler's, and finite everywhere."""

    def run(case):
        if case["algorithm"] == "dpmsolver":
            # the record's earlier estimates are clean latents, so only the first order can be told from it
            got, _, _, at, to = dpm_step({**case, "order": 1, "earlier_clean_estimates": []}, "repaired")
            euler = step(Ode(), case["x_t"], case["velocity"], at, to).x_next_B
            ends = at == 1 or to == 0
            return {
                "prev_sample": None if case["sde"] and not ends else differs(got.x_next_B, euler),
                "log_prob": differs(got.log_prob_B.isfinite(), torch.full((len(euler),), case["sde"] and not ends)),
            }
        got, _, order, _, to = dpm_step(case, "repaired")
        decided = torch.full_like(case["log_prob"], float(case["sde"] and to > 0)).bool()
        wrong = {"decision": differs(got.log_prob_B.isfinite(), decided)}
        same = differs(got.x_next_B, case["prev_sample"])
        # an earlier time of 1 is infinitely far away in lambda, and adds no third difference
        if order == 3 and case["sigmas"][case["step"] - 2] < 1:
            return {**wrong, "prev_sample": None if same else "the released third order"}
        expected = torch.where(decided, case["log_prob"], torch.nan)
        return {**wrong, "prev_sample": same, "log_prob": differs(got.log_prob_B, expected)}

    every(tensors("evals/flow/steps_dpm.pt", "mix_dpm"), run)


def test_the_released_training_draws_where_the_repaired_one_replays():
    """The release scores a sample that it draws anew, always the same noise, so its log-prob says nothing of the step
    that was taken. Ours is the density of the recorded next latent."""

    def run(case):
        at, to = case["sigmas"][case["step"]], case["sigmas"][case["step"] + 1]
        x, velocity, there = case["x_t"], case["velocity"], case["stored_next"]
        options = {"algorithm": case["algorithm"], "order": case["order"], "solver": case["solver_type"]}
        drawn = step(Dpm(**options, variant="release"), x, velocity, at, to, case["noise_of_default_seed"])
        got = replay(Dpm(**options), x, velocity, at, to, there)
        column = got.noise_std_B.reshape(-1, *[1] * (x.ndim - 1))
        density = torch.distributions.Normal(got.mean_B, column).log_prob(there).flatten(1).mean(1)
        return {
            "release": differs(drawn.log_prob_B, case["log_prob"]),
            "repaired": differs(got.log_prob_B, density),
            "apart": None if differs(got.log_prob_B, case["log_prob"]) else "the same",
        }

    every(tensors("evals/flow/steps_dpm.pt", "mix_dpm_training"), run)


# ---- MixGRPO's rollouts ------------------------------------------------------------------------------------------


def rollout(case, variant, noises=None):
    """A whole rollout as MixGRPO's loop goes, out of our steps, schedules and windows.

    `noises`: what the multistep solver's stochastic steps draw, one each; None: the release's, always the same.
    """
    solver_all = case["algorithm"] != "null" and case["strategy"] == "all"
    solver_after = case["algorithm"] != "null" and case["strategy"] == "post"
    window = Window(case["window"][0], sum(case["window"]))
    times = uniform_times(case["steps"], case["shift"])
    if solver_after:
        last = window.stop - 1 if window.stop > window.start else None
        times = compressed_times(case["steps"], case["shift"], last, case["post_compress_ratio"], variant)
    if case["flow_grpo_sampling"]:
        sampler = Sde(noise_level=case["eta"], sigma_at_one=float(times[1]), variant=variant)
    else:
        sampler = Dance(noise_level=case["eta"], constants=False, variant=variant)
    algorithm = case["algorithm"] if case["algorithm"] != "null" else "dpmsolver++"
    solver = Dpm(algorithm=algorithm, order=case["order"], solver=case["solver_type"], variant=variant)

    steps, told = len(times) - 1, model_times(times, variant)
    noised, given, known = window.noised(steps), iter(case["noises"]), []
    x, used = case["start"], 0
    latents, log_probs = [x.float()], []
    for number in range(steps):
        at, to, mark = times[number], times[number + 1], torch.full((len(x),), noised[number])
        velocity = case["velocity_of_x"] * x + case["velocity_of_time"] * told[number] + case["velocity_constant"]
        estimate = clean_estimate(x.float(), velocity, at).float()
        if solver_all or (solver_after and number >= window.stop):
            noise = case["noise_of_default_seed"].float() if noises is None else noises[number]
            order = multistep_order(number, steps, len(known), case["order"])
            history = None
            if order > 1:
                times_K, estimates_K = zip(*known[::-1][: order - 1], strict=True)
                earlier = torch.stack([time.expand(len(x)) for time in times_K])
                history = History(earlier, torch.stack(estimates_K), torch.full((len(x),), order))
            got = step(solver, x, velocity, at, to, noise, stochastic_B=mark, history=history)
            known.append((at, estimate))
        else:
            # the SDE draws noise at every step and throws it away outside the window
            draws = case["flow_grpo_sampling"] or noised[number]
            noise = next(given) if draws else torch.zeros_like(x.float())
            used += draws
            got = step(sampler, x, velocity, at, to, noise, stochastic_B=mark)
            if case["flow_grpo_sampling"]:  # the release's Dance steps leave nothing for the solver
                known.append((at, estimate))
        x = got.x_next_B
        if velocity.dtype == torch.bfloat16 and variant == "release":
            # The release multiplies this velocity by coefficients in bfloat16; each rounding is 2^-9 at most.
            recorded = case["latents"][:, number + 1]
            assert (x - recorded).abs().max() <= 8 * 2**-9 * (velocity.float() * (at - to)).abs().max()
            x = recorded
        latents.append(x)
        log_probs.append(got.log_prob_B)
    image = estimate if case["clean_estimate_as_image"] else x
    return {
        "final": x,
        "image_latent": image,
        "latents": torch.stack(latents, 1),
        "log_probs": torch.stack(log_probs, 1),
        "model_times": told[:-1],
        "noises_used": used,
    }


def test_whole_rollouts_are_reproduced():
    def run(case):
        try:
            got = rollout(case, "release")
        except UserError as error:
            return {"raises": None if "raises" in case else str(error)}
        if "raises" in case:
            return {"raises": f"nothing in place of {case['raises']}"}
        return {name: differs(value, case[name]) for name, value in got.items()}

    every(tensors("evals/flow/rollouts_mix.pt", "mix_run"), run)


def test_repaired_rollouts_end_without_noise_and_tell_the_model_the_latents_own_time():
    """Where the release's shortened schedule stops above 0, ours has one more step; and log-probs are those of the
    window's steps alone."""

    def run(case):
        if "raises" in case or case["strategy"] == "all":
            return {}
        got, stop = rollout(case, "repaired"), sum(case["window"])
        decided = got["log_probs"].isfinite().all(0).tolist()
        one_more = "never comes to 0" in case["note"]
        return {
            "decided": differs(decided, [case["window"][0] <= number < stop for number in range(len(decided))]),
            "steps": differs(len(decided), len(case["model_times"]) + one_more),
            "times": differs(got["model_times"][:stop], uniform_times(case["steps"], case["shift"])[:stop], 1e-7),
        }

    every(tensors("evals/flow/rollouts_mix.pt", "mix_run"), run)


def test_repaired_every_stochastic_step_of_a_solver_has_its_own_noise():
    cases = [
        case
        for case in tensors("evals/flow/rollouts_mix.pt", "mix_run").values()
        if case["strategy"] == "all" and case["algorithm"] != "null" and case["window"][1] > 1
    ]
    for case in cases:
        noises = torch.randn(case["steps"], *case["start"].shape, generator=torch.Generator().manual_seed(0))
        same = noises[:1].expand_as(noises)
        own, shared = (rollout(case, "repaired", n)["latents"] for n in (noises, same))
        assert not torch.allclose(own[:, sum(case["window"])], shared[:, sum(case["window"])])
