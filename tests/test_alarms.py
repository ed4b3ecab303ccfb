"""The alarms on hand-made histories, and in real runs of the driver: raised, told once, fatal, the same after a
resumption."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from pydantic import ValidationError

import rl.grpo
from record.trajectory import Author, Modality, Segment
from rewards.alarms import NAMES, AlarmRaised, Alarms, AlarmsConfig, diversity_of
from rewards.functions.tool_use import asked
from tests.rewards_helpers import image_segment, text, trajectory_of
from tests.test_grpo import CodeJudge, lines, make
from training import checkpoint


def after(rows, watched=(), **config):
    """The alarms over a history whose last row has just been logged."""
    alarms = Alarms(AlarmsConfig(**{"window": 4, **config}), watched)
    alarms.recall(rows[:-1])
    logged, new_alarms, fatal = alarms.check(rows[-1])
    return logged, new_alarms, fatal


def history(**columns):
    """Rows of metrics; `_` in a name stands for `/`."""
    length = max(len(values) for values in columns.values())
    rows = [{} for _ in range(length)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                row[name.replace("__", "/")] = value
    return rows


# ---- trained against watched ------------------------------------------------------------------------------------

UP, DOWN, FLAT = [0.1, 0.2, 0.1, 0.2], [0.8, 0.9, 0.8, 0.9], [0.5, 0.5, 0.5, 0.5]


def test_divergence_by_hand():
    # Means 0.15 -> 0.85 and 0.85 -> 0.15; s^2 = 0.01 / 3 each, so the error is sqrt(2 * 0.01 / 3 / 4) = 0.0408, and
    # both moved by 0.7 / 0.0408 = 17.15 standard errors.
    logged, [sentence], fatal = after(history(reward__mean=UP + DOWN, reward__clip=DOWN + UP), ["clip"])
    assert logged["alarm/divergence"] == 1
    assert logged["alarm/divergence/value"] == pytest.approx(17.146, abs=1e-3)
    assert "rose from 0.15 to 0.85 while reward/clip fell from 0.85 to 0.15" in sentence
    assert fatal is None


@pytest.mark.parametrize(
    "trained, watched",
    [
        (UP + DOWN, UP + DOWN),  # both rise
        (DOWN + UP, DOWN + UP),  # both fall: the policy is worse, but games nothing
        (FLAT + FLAT, DOWN + UP),  # the watched falls alone
        (UP + DOWN, FLAT + FLAT),  # the trained rises alone
        (UP + DOWN, [0.8, 0.9, 0.1, 0.9, 0.8, 0.1, 0.9, 0.8]),  # the watched only trembles
    ],
)
def test_no_divergence(trained, watched):
    logged, new_alarms, _ = after(history(reward__mean=trained, reward__clip=watched), ["clip"])
    assert logged["alarm/divergence"] == 0 and new_alarms == []


def test_a_slow_divergence_is_seen_though_neighbouring_windows_look_alike():
    noise = np.random.default_rng(0)
    steps = np.arange(200)
    rows = history(
        reward__mean=list(0.3 + 0.002 * steps + noise.normal(0, 0.05, 200)),
        reward__clip=list(0.7 - 0.002 * steps + noise.normal(0, 0.05, 200)),
    )
    logged, new_alarms, _ = after(rows, ["clip"], window=20)
    assert logged["alarm/divergence"] == 1 and len(new_alarms) == 1
    assert after(rows[80:120], ["clip"], window=20)[0]["alarm/divergence"] == 0  # forty steps alone say too little


def test_noise_beside_a_reward_that_rises_raises_nothing():
    raised = 0
    for seed in range(20):
        noise = np.random.default_rng(seed)
        rows = history(
            reward__mean=list(0.3 + 0.002 * np.arange(300) + noise.normal(0, 0.05, 300)),
            reward__clip=list(0.7 + noise.normal(0, 0.05, 300)),
        )
        alarms = Alarms(AlarmsConfig(), ["clip"])
        raised += any(alarms.check(row)[0].get("alarm/divergence") for row in rows)
    assert raised <= 1


def test_an_evaluation_every_few_steps_is_watched_too():
    rows = history(
        reward__mean=[0.1] * 4 + UP[:1] * 12 + [0.9] * 16,
        heldout__score=[v for x in [0.8] * 4 + [0.2] * 4 for v in (None, None, None, x)],
    )
    logged, new_alarms, _ = after(rows)
    assert logged["alarm/divergence"] == 1 and "heldout/score" in new_alarms[0]


def test_paid_parts_are_not_watched():
    logged, _, _ = after(history(reward__mean=UP + DOWN, reward__clip=DOWN + UP), [])
    assert "alarm/divergence" not in logged


# ---- one sign each ----------------------------------------------------------------------------------------------


def test_tool_rate_falls_from_its_best_window():
    rising = [0.2, 0.4, 0.4, 0.4, 0.4, 0.4]
    logged, [sentence], _ = after(history(rollout__tool_rate=[*rising, 0.1, 0.2, 0.1, 0.2]))
    # best window 0.4, now 0.15
    assert logged["alarm/tool_rate/value"] == pytest.approx(0.375)
    assert "0.4 in their best 4 steps, 0.15 in the last 4" in sentence
    assert after(history(rollout__tool_rate=[*rising, 0.3, 0.2, 0.2, 0.3]))[0]["alarm/tool_rate"] == 0


def test_a_tool_rate_that_was_never_there_has_not_fallen():
    assert "alarm/tool_rate" not in after(history(rollout__tool_rate=[0.04] * 4 + [0.0] * 4))[0]


STAMP = "reward__critic__rubber_stamp_rate"


def test_critiques_that_approve_of_wrong_images():
    rows = history(**{STAMP: [1.0, 0.9, 1.0, 1.0], "reward__critic__wrong_images": [0.5] * 4})
    logged, [sentence], _ = after(rows)
    assert logged["alarm/rubber_stamp"] == 1 and logged["alarm/rubber_stamp/value"] == pytest.approx(0.975)
    assert "98% of the critiques that 'critic' reads approve" in sentence


def test_critiques_that_approve_of_right_images_are_right():
    rows = history(**{STAMP: [1.0] * 4, "reward__critic__wrong_images": [0.0, 0.01, 0.0, 0.02]})
    assert "alarm/rubber_stamp" not in after(rows)[0]


def test_the_worst_critic_counts():
    rows = history(**{STAMP: [0.3] * 4, "reward__other__rubber_stamp_rate": [0.99] * 4})
    logged, [sentence], _ = after(rows)
    assert logged["alarm/rubber_stamp"] == 1 and "'other'" in sentence


def test_groups_without_variance():
    rows = history(groups__in=[10] * 4, groups__dropped__zero_variance=[8, 9, 7, 8])
    logged, [sentence], _ = after(rows)
    assert logged["alarm/zero_variance"] == 1 and "80% of the groups" in sentence
    rows[0]["groups/dropped/zero_variance"] = 7
    assert after(rows)[0] == {"alarm/zero_variance": 0, "alarm/zero_variance/value": 0.775}


def test_unjudged_trajectories():
    logged, [sentence], _ = after(history(reward__none=[0.0, 0.4, 0.4, 0.4]))
    assert logged["alarm/unjudged"] == 1 and "30% of the trajectories had no reward" in sentence


def test_diversity_falls_from_its_best_window():
    logged, new_alarms, _ = after(history(rollout__diversity=[0.4] * 4 + [0.09] * 4))
    assert logged["alarm/diversity"] == 1 and logged["alarm/diversity/value"] == pytest.approx(0.225)
    assert len(new_alarms) == 1


# ---- windows, repetition, configuration -------------------------------------------------------------------------

EVERYTHING = history(
    **{
        "reward__mean": UP + DOWN,
        "reward__clip": DOWN + UP,
        "rollout__tool_rate": DOWN + UP,
        "rollout__diversity": DOWN + UP,
        STAMP: [1.0] * 8,
        "groups__in": [4] * 8,
        "groups__dropped__zero_variance": [4] * 8,
        "reward__none": [0.9] * 8,
    }
)


def test_every_alarm_can_be_raised_and_every_one_turned_off():
    logged, new_alarms, _ = after(EVERYTHING, ["clip"])
    assert {name for name in NAMES if logged[f"alarm/{name}"]} == set(NAMES) and len(new_alarms) == len(NAMES)
    for name in NAMES:
        logged, new_alarms, _ = after(EVERYTHING, ["clip"], **{name: None})
        assert f"alarm/{name}" not in logged and len(new_alarms) == len(NAMES) - 1


def test_too_few_steps_say_nothing():
    assert after(EVERYTHING[:3], ["clip"])[0] == {}
    assert set(after(EVERYTHING[:7], ["clip"])[0]) == {
        f"alarm/{name}{end}" for end in ("", "/value") for name in ("rubber_stamp", "zero_variance", "unjudged")
    }


def test_an_alarm_is_told_once_and_again_never_though_it_stays():
    alarms = Alarms(AlarmsConfig(window=2))
    told = [alarms.check({"reward/none": value})[1] for value in (0.9, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9)]
    assert [len(new_alarms) for new_alarms in told] == [0, 1, 0, 0, 0, 0, 0]


def test_a_watched_metric_that_no_step_has_is_told_once_a_window_is_full():
    alarms = Alarms(AlarmsConfig(window=3, watch=["policy/entrpy", "nowhere", "heldout/other", "policy/entropy"]))
    told = [alarms.check({"reward/mean": 0.5, "policy/entropy": 1.0})[1] for _ in range(5)]
    assert told == [
        [],
        [],
        [
            "rewards.alarms.watch: 'policy/entrpy' is not among the metrics of the first 3 steps; "
            "did you mean 'policy/entropy'?",
            "rewards.alarms.watch: 'nowhere' is not among the metrics of the first 3 steps; "
            "metrics.jsonl has their names",
        ],
        [],
        [],
    ]
    usual = Alarms(AlarmsConfig(window=2))
    assert [usual.check({"reward/mean": 0.5})[1] for _ in range(3)] == [[], [], []]


def test_what_was_told_before_a_resumption_is_not_told_again():
    alarms, rows = Alarms(AlarmsConfig(window=2)), []
    for _ in range(3):
        row = {"step": len(rows) + 1, "reward/none": 0.9}
        rows.append({**row, **alarms.check(row)[0]})
    again = Alarms(AlarmsConfig(window=2))
    again.recall(rows)
    logged, new_alarms, _ = again.check({"reward/none": 0.9})
    assert logged["alarm/unjudged"] == 1 and new_alarms == []


def test_nulls_and_numbers_that_are_none_are_passed_over():
    rows = [{"reward/none": None}, {"reward/none": float("nan")}, *history(reward__none=[0.9] * 4)]
    assert after(rows)[0]["alarm/unjudged/value"] == pytest.approx(0.9)


@pytest.mark.parametrize("fatal, stops", [(False, False), (True, True), (["unjudged"], True), (["diversity"], False)])
def test_fatal_for_all_or_by_name(fatal, stops):
    _, _, sentence = after(history(reward__none=[0.9] * 4), fatal=fatal)
    assert (sentence is not None) == stops
    if stops:
        assert sentence == ("alarm 'unjudged': 90% of the trajectories had no reward, over the last 4 steps")


def test_a_misspelt_alarm_is_refused():
    with pytest.raises(ValidationError, match="divergence"):
        AlarmsConfig(fatal=["divergance"])


# ---- measures on trajectories -----------------------------------------------------------------------------------


def gray(level, side=8):
    return np.full((side, side, 3), level, np.uint8)


def test_diversity_by_hand():
    # levels 0, 0, 255: distances 0, 1, 1 -> 2/3; one of the three pairs is equal
    group = [trajectory_of({}, image_segment("sketch", gray(level))) for level in (0, 0, 255)]
    assert diversity_of(group) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_diversity_looks_at_final_images_of_any_size():
    # 0 against 51: a fifth of the way, whatever the size; the first images are alike
    group = [
        trajectory_of({}, image_segment("sketch", gray(7)), image_segment("sketch", gray(level, side)))
        for level, side in ((0, 100), (51, 17))
    ]
    assert diversity_of(group) == (pytest.approx(0.2), 0.0)
    assert diversity_of(group[:1]) is None
    assert diversity_of([trajectory_of({}, text("plan", "no image"))] * 3) is None


def test_a_thumb_is_the_mean_of_its_cells():
    checkered = gray(0, 64)
    checkered[::2] = 255  # every cell of 2 x 2 is half white
    even = gray(255, 64)
    group = [trajectory_of({}, image_segment("sketch", image)) for image in (checkered, even)]
    assert diversity_of(group)[0] == pytest.approx(0.5)


def called(role="tool_call"):
    return trajectory_of(
        {},
        text(role, "<tool_call>zoom</tool_call>"),
        Segment("observation", Author.ENVIRONMENT, Modality.TEXT, False, text="seen"),
        text("answer", "x"),
    )


def test_tool_rate_is_logged_from_the_first_call_on():
    alarms = Alarms(AlarmsConfig())
    silent = trajectory_of({}, text("answer", "x"))
    assert "rollout/tool_rate" not in alarms.measure([[silent, silent]])
    assert alarms.measure([[silent, called()], [silent, silent]])["rollout/tool_rate"] == 0.25
    assert alarms.measure([[silent, silent]])["rollout/tool_rate"] == 0
    resumed = Alarms(AlarmsConfig())
    resumed.recall([{"rollout/tool_rate": 0.25}])
    assert resumed.measure([[silent, silent]])["rollout/tool_rate"] == 0


def test_tool_rate_counts_calls_that_the_environment_was_asked():
    look, open_look = text("look", "<look> 4 4 20 20 </look>"), text("look", "<look> 4 4")
    crop = Segment("crop", Author.ENVIRONMENT, Modality.IMAGE, False, image=gray(0))
    told = Segment("error", Author.ENVIRONMENT, Modality.TEXT, False, text="error: no box")
    drawn, said = image_segment("sketch", gray(0)), text("inspect", "<inspect> done </inspect>")
    thoughts = {
        "answered": (True, look, crop, said),
        "answered by an error": (True, look, told, said),
        "answered last": (True, look, crop),
        "answered by nothing": (True, look, said),
        "a limit within the call": (False, drawn, open_look),
        "an image within the call": (False, open_look, drawn, said),
        "an answer that did not fit, or no room to ask": (False, drawn, look),
        "the second time": (True, open_look, drawn, look, crop),
        "never": (False, drawn, said),
    }
    for name, (expected, *segments) in thoughts.items():
        assert asked(trajectory_of({}, *segments)) is expected, name
    group = [trajectory_of({}, *segments) for _, *segments in thoughts.values()]
    assert Alarms(AlarmsConfig()).measure([group])["rollout/tool_rate"] == pytest.approx(5 / 9)


def test_no_trajectories_measure_nothing():
    assert Alarms(AlarmsConfig()).measure([]) == {}


# ---- in the driver ----------------------------------------------------------------------------------------------


class OneSided(CodeJudge):
    """Gives everybody the same from a step on, which ends all learning."""

    def __init__(self, start, **at):
        super().__init__(**at)
        self.start = start

    def score(self, groups, step=0):
        report = super().score(groups, step)
        for group in groups if step >= self.start else ():
            for trajectory in group:
                trajectory.reward = 1.0
        return report


def alarmed(folder, judge, fatal, **config):
    run = make(folder, judge, **config)
    run.alarms = Alarms(AlarmsConfig(window=2, fatal=fatal, diversity=None))
    return run


def test_a_run_logs_its_alarms_and_warns_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rl.grpo.train(alarmed(tmp_path, OneSided(4), False))
    rows = lines(tmp_path)
    assert [row.get("alarm/zero_variance") for row in rows][4:] == [1, 1, 1, 1]
    assert all(row.get("alarm/zero_variance") == 0 for row in rows[1:3])
    assert caplog.text.count("alarm 'zero_variance'") == 1 and "step 5: alarm" in caplog.text


def test_a_fatal_alarm_saves_and_stops_with_a_sentence(tmp_path):
    with pytest.raises(
        AlarmRaised,
        match="stopped after step 5 of 8 by alarm 'zero_variance': 100% of the groups had "
        "members that all earned the same.*step-000005; to go on regardless, set "
        "rewards.alarms.fatal: false and give the same command",
    ) as raised:
        rl.grpo.train(alarmed(tmp_path, OneSided(4), ["zero_variance"]))
    assert raised.value.exit_code == 2
    assert len(lines(tmp_path)) == 5 and checkpoint.latest(tmp_path / "checkpoints").name == "step-000005"
    rl.grpo.train(alarmed(tmp_path, OneSided(4), False), checkpoint.latest(tmp_path / "checkpoints"))
    assert len(lines(tmp_path)) == 8


def test_a_resumed_run_raises_what_it_would_have_raised(tmp_path, caplog):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rl.grpo.train(alarmed(whole, OneSided(4), False, save_every=2))

    def crash():
        raise RuntimeError("power cut")

    for step in (5, 7):  # before the alarm is first raised, and after it
        with pytest.raises(RuntimeError, match="power cut"):
            newest = checkpoint.latest(broken / "checkpoints")
            rl.grpo.train(alarmed(broken, OneSided(4, **{f"s{step}": crash}), False, save_every=2), newest)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rl.grpo.train(alarmed(broken, OneSided(4), False, save_every=2), checkpoint.latest(broken / "checkpoints"))
    assert lines(broken) == lines(whole)
    assert "alarm 'zero_variance'" not in caplog.text  # told before the second crash


def test_a_fatal_alarm_at_the_last_step_spoils_nothing(tmp_path):
    rl.grpo.train(alarmed(tmp_path, OneSided(4), True, steps=5))
    assert lines(tmp_path)[-1]["alarm/zero_variance"] == 1


def test_what_a_recipe_watches_is_what_moves_no_advantage():
    from underdrawing.build import build_alarms
    from underdrawing.recipe import check_recipe

    parts = {name: {"function": "geneval"} for name in ("paid", "logged", "credited")}
    parts["seen"] = {"function": "geneval", "log_only": True}
    data = {
        "name": "mine",
        "policy": {},
        "task": {},
        "format": {},
        "rewards": {"parts": parts, "total": "paid", "alarms": {"window": 7}},
    }
    alarms = build_alarms(check_recipe(data, "here"))
    assert alarms.config.window == 7
    assert alarms.log_only == ("reward/logged", "reward/credited", "reward/seen", "heldout/score")
    # By segment, parts outside the formula are credited, unless their weight is 0.
    data["grpo"] = {"advantage_level": "segment", "segment_reward_weights": {"logged": 0.0}}
    assert build_alarms(check_recipe(data, "here")).log_only == ("reward/logged", "reward/seen", "heldout/score")
