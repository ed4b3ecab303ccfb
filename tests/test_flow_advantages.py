"""rl/flow_advantages.py by hand, and against the released trackers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flow_helpers import differs, every, lines, number
from hypothesis import given
from hypothesis import strategies as st

from record.trajectory import Author, Modality, Segment, Trajectory
from rl.advantages import compute_advantages
from rl.config import GrpoConfig
from rl.flow_advantages import PromptStatistics, group_advantages, mix_advantages, prompt_advantages
from runtime.errors import UserError

FILE = "evals/flow/advantages.jsonl"


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_a_prompts_mean_and_deviation_are_over_all_calls():
    first, known = prompt_advantages(["a", "a", "b"], [0.0, 2.0, 5.0])
    # a: mean 1, population deviation 1; b alone
    assert first.tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001, 0])
    second, known = prompt_advantages(["a", "a"], [1.0, 5.0], known)
    # 0, 2, 1, 5: mean 2, variance (4 + 0 + 1 + 9) / 4
    assert second.tolist() == pytest.approx([-1 / (math.sqrt(3.5) + 1e-4), 3 / (math.sqrt(3.5) + 1e-4)])
    assert known.mean_group_size == 2.5 and known.prompts_seen == 2
    # the release stops there; cleared, both begin anew and remember what they have seen
    with pytest.raises(UserError, match="prompt 'a' returns before the statistics are cleared"):
        prompt_advantages(["a"], [1.0], known, variant="release")
    third, known = prompt_advantages(["c", "c"], [0.0, 2.0], known.cleared(), variant="release")
    assert third.tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001])
    assert known.mean_group_size == 2 and known.prompts_seen == 3
    assert PromptStatistics().mean_group_size == 0


def test_the_deviation_may_be_the_batchs_and_rewards_may_be_by_step():
    rewards = [[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 5.0]]
    got, _ = prompt_advantages(["a", "a", "b", "b"], rewards, std_of_whole_batch=True)
    # first step: means 1 and 5, deviation root 5; second: 1 and 3, deviation root 3
    expected = np.array([[-1, 0], [1, 0], [-1, -2], [1, 2]]) / (np.sqrt([5, 3]) + 1e-4)
    assert got == pytest.approx(expected)


def test_other_kinds():
    prompts, rewards = ["a", "a", "a", "b", "b"], [1.0, 3.0, 3.0, 0.5, 0.25]
    assert prompt_advantages(prompts, rewards, kind="rwr")[0].tolist() == rewards
    assert prompt_advantages(prompts, rewards, kind="sft")[0].tolist() == [0, 1, 1, 1, 0]
    assert prompt_advantages(prompts, rewards, kind="dpo")[0].tolist() == [-1, 1, 0, 1, -1]


def test_nothing_is_preferred_among_equals():
    def dpo(prompts, rewards, variant):
        return prompt_advantages(prompts, rewards, kind="dpo", variant=variant)[0].tolist()

    assert dpo(["a", "a", "b"], [1.0, 1.0, 4.0], "repaired") == [0, 0, 0]
    # the release prefers the second of them, and has no word for a lone one
    assert dpo(["a", "a"], [1.0, 1.0], "release") == [-1, 1]
    with pytest.raises(UserError, match="a lone sample has no pair"):
        dpo(["a"], [1.0], "release")


def test_a_group_by_hand():
    # g: 0, 1, 2 (mean 1, sample deviation 1); h alone; the batch's deviation is that of 0, 1, 2, 5
    rewards, groups = [0.0, 5.0, 1.0, 2.0], ["g", "h", "g", "g"]
    assert group_advantages(rewards, groups, std_of_whole_batch=False) == pytest.approx(
        np.array([-1, 0, 0, 1]) / 1.0001
    )
    batch = math.sqrt((4 + 1 + 0 + 9) / 3) + 1e-4
    assert group_advantages(rewards, groups) == pytest.approx(np.array([-1, 0, 0, 1]) / batch)
    assert group_advantages(rewards, groups, normalise=False).tolist() == [-1, 0, 0, 1]
    # one sample has no deviation
    assert group_advantages([3.0], ["g"]).tolist() == [0]
    assert np.isnan(group_advantages([3.0], ["g"], variant="release")).all()


def test_trimming_leaves_the_lowest_out_of_the_baseline():
    # of 0, 1, 3, 5 a quarter is one: mean 3 and sample deviation 2 of 1, 3, 5
    assert mix_advantages([1.0, 0.0, 5.0, 3.0], 4, 0.25) == pytest.approx([-1, -1.5, 1, 0])
    # all but two are trimmed at most, where the release keeps one and knows no deviation
    assert mix_advantages([1.0, 0.0, 5.0, 3.0], 4, 1.0) == pytest.approx(np.array([-3, -4, 1, -1]) / math.sqrt(2))
    assert np.isnan(mix_advantages([1.0, 0.0, 5.0, 3.0], 4, 1.0, variant="release")).all()


def test_left_over_samples_are_refused_where_the_release_gives_them_nothing():
    with pytest.raises(UserError, match="5 samples do not make groups of 2"):
        mix_advantages([0.0, 1.0, 2.0, 3.0, 9.0], 2)
    got = mix_advantages([0.0, 1.0, 2.0, 3.0, 9.0], 2, variant="release")
    assert got == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)] * 2 + [0])
    # over the whole batch there are none: mean 3, squares 9 + 4 + 1 + 0 + 36
    whole = mix_advantages([0.0, 1.0, 2.0, 3.0, 9.0], 2, by_group=False)
    assert whole == pytest.approx(np.array([-3, -2, -1, 0, 6]) / math.sqrt(50 / 4))


def test_advantages_of_several_models_are_added_by_weight():
    rewards = {"hps": [0.0, 2.0], "clip": [3.0, 1.0]}
    got = mix_advantages(rewards, 2, weights={"hps": 1.0, "clip": 0.25})
    assert got == pytest.approx([-0.75 * math.sqrt(0.5), 0.75 * math.sqrt(0.5)])


# ---- missing is not zero -----------------------------------------------------------------------------------------


def test_what_nobody_judged_leaves_the_baseline_and_trains_nothing():
    rewards = [0.0, None, 2.0, None]
    assert prompt_advantages(["a", "a", "a", "b"], rewards)[0].tolist() == pytest.approx(
        [-1 / 1.0001, 0, 1 / 1.0001, 0]
    )
    root = math.sqrt(2) + 1e-4
    assert group_advantages(rewards, "aaab") == pytest.approx(np.array([-1, 0, 1, 0]) / root)
    assert mix_advantages([*rewards, 1.0, 7.0, 4.0, 4.0], 4)[:4] == pytest.approx(
        np.array([-1, 0, 1, 0]) / math.sqrt(2)
    )
    # a sample that one model could not judge is in no model's baseline
    both = {"hps": [0.0, 8.0, 2.0], "clip": [1.0, None, 1.0]}
    got = mix_advantages(both, 3, weights={"hps": 1.0, "clip": 1.0})
    assert got == pytest.approx(np.array([-1, 0, 1]) / math.sqrt(2))
    # kinds that read one call
    assert prompt_advantages(["a", "a", "a"], [None, 1.0, 2.0], kind="dpo")[0].tolist() == [0, -1, 1]
    assert prompt_advantages(["a", "a"], [None, None], kind="sft")[0].tolist() == [0, 0]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.none() | st.integers(0, 3)), min_size=1, max_size=12))
def test_unjudged_samples_might_as_well_not_be_there(samples):
    groups, rewards = [g for g, _ in samples], [None if r is None else r / 10 for _, r in samples]
    judged = [i for i, r in enumerate(rewards) if r is not None]
    for advantages in (lambda r, g: group_advantages(r, g), lambda r, g: prompt_advantages(g, r)[0]):
        got = advantages(rewards, groups)
        alone = advantages([rewards[i] for i in judged], [groups[i] for i in judged])
        assert got[judged].tolist() == alone.tolist()
        assert all(got[i] == 0 for i in range(len(samples)) if i not in judged)


@given(st.floats(-1e3, 1e3), st.integers(1, 7))
def test_equal_rewards_have_advantages_of_exactly_nothing(reward, count):
    # A float mean of equal numbers may be off by its last bit, which MixGRPO's 1e-8 would make an advantage of.
    assert mix_advantages([reward] * count, count).tolist() == [0] * count
    assert group_advantages([reward] * count, ["g"] * count).tolist() == [0] * count
    assert prompt_advantages(["p"] * count, [reward] * count)[0].tolist() == [0] * count


@given(st.lists(st.lists(st.none() | st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_by_group_it_is_our_own_advantage(groups):
    """Where a group is one that we train on; rl/advantages.py drops the others and counts them."""
    trajectories = [
        [
            Trajectory(
                "",
                {},
                "",
                [Segment("draw", Author.POLICY, Modality.IMAGE_LATENT, True)],
                group=g,
                member=m,
                reward=None if reward is None else reward / 4,
            )
            for m, reward in enumerate(rewards)
        ]
        for g, rewards in enumerate(groups)
    ]
    compute_advantages(trajectories, GrpoConfig(scale_rewards="group"))
    ours = [float(t.advantage_S[0]) for group in trajectories for t in group]
    flat = [None if r is None else r / 4 for rewards in groups for r in rewards]
    names = [g for g, rewards in enumerate(groups) for _ in rewards]
    assert group_advantages(flat, names, std_of_whole_batch=False) == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: prompt_advantages(["a"], [1.0], kind="ppo"), "no kind of advantage 'ppo'"),
        (lambda: prompt_advantages(["a"], [1.0, 2.0]), "1 prompts, but 2 rewards"),
        (lambda: prompt_advantages(["a", "a"], [[1.0], [1.0, 2.0]]), "equally many for every sample"),
        (lambda: prompt_advantages(["a"], [[1.0, 2.0]], kind="dpo"), "one reward a sample"),
        (lambda: prompt_advantages(["a"], [math.nan]), "reward 0 is .nan.; a reward is a finite number, or None"),
        (lambda: group_advantages([1.0, math.inf], "aa"), "reward 1 is .inf."),
        (lambda: group_advantages([1.0], "aa"), "2 groups named for 1 rewards"),
        (lambda: mix_advantages({"hps": [1.0]}, 1, weights={"clip": 1.0}), "no weight for the rewards of 'hps'"),
        (lambda: mix_advantages({"a": [1.0], "b": []}, 1, weights={"a": 1, "b": 1}), "unequal lengths: a 1, b 0"),
        (lambda: mix_advantages([1.0], 1, variant="relaese"), "no variant 'relaese'; did you mean 'release'"),
        (lambda: group_advantages([1.0], "a", variant=""), "no variant ''"),
        (lambda: prompt_advantages(["a"], [1.0], variant="new"), "no variant 'new'"),
        (lambda: mix_advantages([1.0], 0), "groups of 0"),
        (lambda: mix_advantages([1.0], 1, 1.5), "is 1.5; it is between 0 and 1"),
    ],
)
def test_what_is_wrong_is_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


# ---- the releases ------------------------------------------------------------------------------------------------


def numbers(values):
    return [numbers(value) if isinstance(value, list) else number(value) for value in values]


def by_prompt(record, variant):
    inputs, statistics, found = record["inputs"], PromptStatistics(), []
    for index, call in enumerate(inputs["calls"]):
        if index and inputs["cleared_between"]:
            statistics = statistics.cleared()
        advantages, statistics = prompt_advantages(
            call["prompts"], call["rewards"], statistics, inputs["kind"], inputs["std_of_whole_batch"], variant
        )
        found.append(advantages)
    return found, statistics


@pytest.mark.parity
def test_flow_grpos_tracker_is_reproduced():
    def run(record):
        outputs = record["outputs"]
        try:
            found, statistics = by_prompt(record, "release")
        except UserError as error:
            return {"raises": None if "raises" in outputs else str(error)}
        if "raises" in outputs:
            return {"raises": f"nothing in place of {outputs['raises']}"}
        pairs = zip(found, outputs["advantages"], strict=True)
        return {
            **{f"call {index}": differs(got, expected) for index, (got, expected) in enumerate(pairs)},
            "mean_group_size": differs(statistics.mean_group_size, outputs["mean_group_size"]),
            "prompts_seen": differs(statistics.prompts_seen, outputs["prompts_seen"]),
        }

    every(lines(FILE, "per_prompt"), run)


@pytest.mark.parity
def test_the_repaired_tracker_parts_from_it_where_it_stops_and_among_equals():
    """A prompt that returns is added to what is known of it, a lone sample is preferred to nobody, and dpo prefers none
    of a prompt's samples where all are equal."""

    def run(record):
        outputs, inputs = record["outputs"], record["inputs"]
        found, statistics = by_prompt(record, "repaired")
        if "raises" in outputs:
            return {"finite": None if all(np.isfinite(a).all() for a in found) else "no number"}
        wrong = {"prompts_seen": differs(statistics.prompts_seen, outputs["prompts_seen"])}
        for index, (call, got, expected) in enumerate(zip(inputs["calls"], found, outputs["advantages"], strict=True)):
            expected = np.array(expected)
            if inputs["kind"] == "dpo":
                for prompt in set(call["prompts"]):
                    rows = [i for i, p in enumerate(call["prompts"]) if p == prompt]
                    if len({call["rewards"][i] for i in rows}) == 1:
                        expected[rows] = 0
            wrong[f"call {index}"] = differs(got, expected)
        return wrong

    every(lines(FILE, "per_prompt"), run)


def of_verl_omni(record, variant):
    inputs = record["inputs"]
    rewards = [score for (score,) in inputs["scores"]]
    return group_advantages(rewards, inputs["groups"], inputs["normalise"], inputs["std_of_whole_batch"], variant)


@pytest.mark.parity
def test_verl_omnis_advantages_are_reproduced_and_a_lone_batch_has_a_number():
    def release(record):
        return {"advantages": differs(of_verl_omni(record, "release"), numbers(record["outputs"]["advantages"]))}

    def repaired(record):
        expected = np.nan_to_num(np.array(numbers(record["outputs"]["advantages"])), nan=0.0)
        return {"advantages": differs(of_verl_omni(record, "repaired"), expected)}

    every(lines(FILE, "per_group", "verl_omni"), release)
    every(lines(FILE, "per_group", "verl_omni"), repaired)


@pytest.mark.parity
def test_mix_grpos_advantages_are_reproduced_and_parted_from_where_they_are_none():
    def release(record):
        got = mix_advantages(**record["inputs"], variant="release")
        return {"advantages": differs(got, numbers(record["outputs"]["advantages"]))}

    def repaired(record):
        inputs, expected = record["inputs"], numbers(record["outputs"]["advantages"])
        try:
            got = mix_advantages(**inputs)
        except UserError:
            left_over = inputs["by_group"] and len(expected) % inputs["group_size"]
            return {"refused": None if left_over else "whole groups"}
        if np.isnan(expected).any():
            return {"finite": None if np.isfinite(got).all() else "no number"}
        return {"advantages": differs(got, expected)}

    every(lines(FILE, "per_group", "mix_grpo"), release)
    every(lines(FILE, "per_group", "mix_grpo"), repaired)
