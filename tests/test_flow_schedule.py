"""policy/scoring/schedule.py: times by hand, windows by hand and as the releases draw them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest
import torch
from flow_helpers import differs, every, lines
from hypothesis import given
from hypothesis import strategies as st

from policy.scoring.flow import Sde
from policy.scoring.schedule import (
    SlidingWindow,
    Window,
    WindowState,
    compressed_times,
    draw_window,
    model_times,
    pick_window,
    sd3_times,
    trainable_steps,
    uniform_times,
    window_draws,
    window_of_step,
    windows_of_batch,
)
from runtime.errors import UserError

FILE = "evals/flow/windows.jsonl"


class Offset:
    """Draws the lower bound plus an offset, modulo the number of choices, and remembers between what."""

    def __init__(self, offset):
        self.offset, self.between = offset, None

    def randint(self, a, b):
        self.between = [a, b]
        return a + self.offset % (b - a + 1)


def other(got, expected):
    return None if got == expected else f"{got} in place of {expected}"


def refused(outputs, error):
    return {"raises": None if "raises" in outputs else str(error)}


# ---- times -------------------------------------------------------------------------------------------------------


def test_times_by_hand():
    torch.testing.assert_close(uniform_times(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    # 3 t / (1 + 2 t): 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5
    torch.testing.assert_close(uniform_times(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    # the lowest training time 0.003 / 1.002; the point between it and 1; both shifted
    lowest = 0.003 / 1.002
    middle = (1 + lowest) / 2
    expected = [1, 3 * middle / (1 + 2 * middle), 3 * lowest / (1 + 2 * lowest), 0]
    torch.testing.assert_close(sd3_times(3), torch.tensor(expected))
    assert uniform_times(4).dtype == sd3_times(4).dtype == torch.float32


@given(st.integers(1, 60), st.floats(0.2, 8))
def test_times_fall_from_one_to_nothing(steps, shift):
    for times in (uniform_times(steps, shift), sd3_times(steps, shift)):
        assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


def test_the_end_of_a_schedule_is_shortened_but_comes_to_nothing():
    # 10 steps, window up to step 3: of the 7 points after it (time 0.6 and below) 40 % are 2
    torch.testing.assert_close(compressed_times(10, 1.0, 3, 0.4), torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 0]))
    torch.testing.assert_close(compressed_times(10, 3.0, 3, 1.0), uniform_times(10, 3.0))
    # of 2 points 40 % are none: the release keeps one and stops at 0.1, with its noise
    torch.testing.assert_close(compressed_times(10, 1.0, 8, 0.4)[-3:], torch.tensor([0.2, 0.1, 0]))
    assert compressed_times(10, 1.0, 8, 0.4, "release")[-1].item() == pytest.approx(0.1)
    # after the last step there is one point, and it is 0
    torch.testing.assert_close(compressed_times(10, 1.0, 9, 0.4), uniform_times(10))


@given(st.integers(1, 40), st.floats(0.5, 5), st.floats(0.01, 1), st.data())
def test_a_shortened_schedule_keeps_the_window_and_ends_at_nothing(steps, shift, ratio, data):
    last = data.draw(st.integers(0, steps - 1))
    times = compressed_times(steps, shift, last, ratio)
    torch.testing.assert_close(times[: last + 2], uniform_times(steps, shift)[: last + 2])
    assert times[-1] == 0 and (times.diff() < 0).all() and len(times) <= steps + 1


def test_the_release_tells_the_model_times_cut_off_to_thousandths():
    times = torch.tensor([1.0, 0.9375, 0.8571429, 0.0])
    torch.testing.assert_close(model_times(times, "release"), torch.tensor([1.0, 0.937, 0.857, 0.0]))
    assert model_times(times) is times


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: uniform_times(0), "a schedule of 0 steps"),
        (lambda: sd3_times(10, 0.0), "shifted by 0.0"),
        (lambda: compressed_times(10, 1.0, None, 0.4), "after step None of 10: no step is stochastic"),
        (lambda: compressed_times(10, 1.0, 10, 0.4), "after step 10 of 10"),
        (lambda: compressed_times(10, 1.0, 3, 0.0), "is 0.0; it is above 0 and at most 1"),
        # one step has no second time to stand for 1 in the SDE's coefficient
        (lambda: Sde(sigma_at_one=float(uniform_times(1)[1])), "sigma_at_one is 0.0"),
    ],
)
def test_what_is_no_schedule_is_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


# ---- windows -----------------------------------------------------------------------------------------------------


def test_a_window_by_hand():
    window = Window(2, 4)
    assert window.trained(6) == [2, 3] and window.noised(6) == [False, False, True, True, False, False]
    # the upper bound is where a window ends: of 2 steps in [0, 5) it begins at 0, 1, 2 or 3
    starts = {draw_window(10, 2, (0, 5), random.Random(seed)).start for seed in range(200)}
    assert starts == {0, 1, 2, 3}
    assert draw_window(10, None, (0, 5), random.Random(0)) == Window(0, 9)


def test_a_window_moves_from_iteration_to_iteration_and_is_the_same_everywhere():
    def window(seed, iteration):
        return draw_window(25, 3, (0, 20), window_draws(seed, iteration))

    assert [window(7, i) for i in range(5)] == [window(7, i) for i in range(5)]
    assert len({window(7, i) for i in range(40)}) > 10
    # BAGEL's release, seeded with the process at every call, has one window for good
    assert len({draw_window(25, 3, (0, 20), random.Random(7), "release") for _ in range(5)}) == 1


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda v: draw_window(10, 0, (0, 5), random.Random(0), v), "a window of 0 steps"),
        (lambda v: draw_window(10, -1, (0, 5), random.Random(0), v), "a window of -1 steps"),
        (lambda v: draw_window(4, 2, (0, 10), random.Random(0), v), "0 and 10, but the schedule has steps 0 to 4"),
        (lambda v: draw_window(1, None, (0, 5), random.Random(0), v), "a schedule of 1 step has none to train"),
        (lambda v: windows_of_batch(None, (0, 5), 1, 2, [], v), "a schedule of 1 step has none to train"),
        (lambda v: pick_window(4, (3, 3), 0, v), "a window of 4 steps does not fit between steps 3 and 3"),
        (lambda v: windows_of_batch(2, (0, 9), 5, 1, torch.Generator(), v), "steps 0 to 5"),
        (
            lambda v: SlidingWindow(steps=4, size=9, iterations=1, variant=v),
            "a window of 9 steps does not slide over 4",
        ),
    ],
)
def test_a_window_that_does_not_fit_is_refused_where_the_release_goes_on(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call("repaired")
    call("release")


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: draw_window(10, 7, (0, 6), random.Random(0)), "7 steps does not fit between steps 0 and 6"),
        (lambda: draw_window(10, 2, (-1, 6), random.Random(0)), "between steps -1 and 6"),
        (lambda: windows_of_batch(1, (0, 4), 9, 2, [torch.Generator()]), "1 generators for the windows of 2 rows"),
        (lambda: window_of_step("progressive", 4, (0, 3)), "4 steps does not fit"),
        (lambda: window_of_step("progresive", 2, (0, 3)), "no strategy 'progresive'.*did you mean 'progressive'"),
        (lambda: draw_window(10, 2, (0, 3, 6), random.Random(0)), r"between two steps, not \[0, 3, 6\]"),
        (lambda: draw_window(9, 2, (0, 5), random.Random(0), "relase"), "no variant 'relase'; did you mean 'release'"),
        (lambda: SlidingWindow(steps=4, size=2, iterations=1, variant="old"), "no variant 'old'"),
        (lambda: SlidingWindow(steps=4, size=2, iterations=1, strategy="backwards"), "no strategy 'backwards'"),
        (lambda: SlidingWindow(steps=4, size=2, iterations=1, start=4), "start at step 4 of 4"),
        (lambda: SlidingWindow(steps=4, size=2, iterations=0), "stays for 0 iterations"),
        (lambda: SlidingWindow(steps=4, size=2, iterations=1, stride=0), "moves by 0 steps"),
    ],
)
def test_a_window_that_is_none_is_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


# ---- MixGRPO's sliding window ------------------------------------------------------------------------------------


def runs(sliding, iterations, seeds=None):
    """[steps, how many iterations in a row], and the first iteration that is complete."""
    state, found, complete = sliding.first(), [], None
    for number in range(iterations):
        steps = sliding.window(state).trained(sliding.steps)
        if complete is None and state.complete:
            complete = number
        if found and found[-1][0] == steps:
            found[-1][1] += 1
        else:
            found.append([steps, 1])
        # as a checkpoint would carry it
        state = WindowState(**json.loads(json.dumps(asdict(sliding.advance(state, seeds and seeds[number])))))
    return found, complete


def test_a_sliding_window_by_hand():
    forward = dict(steps=5, size=2, iterations=3)
    assert runs(SlidingWindow(**forward, roll_back=True), 13) == (
        [[[0, 1], 3], [[2, 3], 3], [[4], 3], [[0, 1], 3], [[2, 3], 1]],
        None,
    )
    # the release has an empty window at the upper end where the last one ends there
    even = dict(steps=4, size=2, iterations=2, roll_back=True)
    assert runs(SlidingWindow(**even), 6)[0] == [[[0, 1], 2], [[2, 3], 2], [[0, 1], 2]]
    assert runs(SlidingWindow(**even, variant="release"), 8)[0] == [[[0, 1], 2], [[2, 3], 2], [[], 2], [[0, 1], 2]]
    # without going back ours stays at the last place and says so; the release trains nothing from then on
    still = dict(steps=4, size=2, iterations=2)
    assert runs(SlidingWindow(**still), 9) == ([[[0, 1], 2], [[2, 3], 7]], 4)
    assert runs(SlidingWindow(**still, variant="release"), 9) == ([[[0, 1], 2], [[2, 3], 2], [[], 5]], 4)
    # 6 (1 - 2/4) + 2 2/4 = 4 iterations at the second place; ceil(4 e^-1) = 2
    decay = SlidingWindow(steps=4, size=2, iterations=6, strategy="decay", least_iterations=2)
    assert runs(decay, 10)[0] == [[[0, 1], 6], [[2, 3], 4]]
    fading = SlidingWindow(steps=4, size=2, iterations=4, strategy="exp_decay", decay_after=1, decay_rate=1.0)
    assert runs(fading, 9) == ([[[0, 1], 4], [[2, 3], 5]], 6)


@given(
    st.integers(1, 12),
    st.sampled_from(["progressive", "decay", "exp_decay", "random"]),
    st.booleans(),
    st.data(),
)
def test_a_sliding_window_always_has_steps_and_reaches_all_of_them(steps, strategy, roll_back, data):
    size, iterations = data.draw(st.integers(1, steps)), data.draw(st.integers(1, 4))
    stride = data.draw(st.none() | st.integers(1, size))
    sliding = SlidingWindow(steps, size, iterations, strategy, stride, roll_back)
    state, reached = sliding.first(), set()
    for number in range(4 * steps * iterations + 200 * (strategy == "random")):
        trained = sliding.window(state).trained(steps)
        assert trained
        reached |= set(trained)
        state = sliding.advance(state, number)
    assert reached == set(range(steps))
    assert state.complete is (strategy != "random" and not roll_back)


def test_a_random_window_needs_a_seed_and_the_release_leaves_out_two_steps():
    with pytest.raises(ValueError, match="needs a seed"):
        sliding = SlidingWindow(steps=4, size=2, iterations=1, strategy="random")
        sliding.advance(sliding.first())
    assert trainable_steps(25) == 24 and trainable_steps(25, "release") == 23


# ---- the releases ------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_flow_grpo_fast_is_reproduced():
    def run(record):
        inputs, outputs, draws = record["inputs"], record["outputs"], Offset(record["inputs"]["draw_offset"])
        steps = inputs["steps"]
        try:
            window = draw_window(steps, inputs["window_size"], inputs["window_range"], draws, "release")
        except UserError as error:
            return refused(outputs, error)
        begun, trained = window.start < steps, window.trained(steps)
        got = {
            "drawn_between": draws.between,
            "noise_on": window.noised(steps, "release"),
            "trained_steps": trained,
            "latents_kept": begun + len(trained),
            "first_latent_of_step": window.start if begun else None,
        }
        return {name: other(value, outputs.get(name, "an error")) for name, value in got.items()}

    every([r for r in lines(FILE, "rollout", "flow_grpo") if r["variant"] == "fast"], run)


@pytest.mark.parity
def test_repaired_fast_windows_are_whole_or_refused():
    """Of the released windows ours are those that lie within the schedule; all else is a sentence."""

    def run(record):
        inputs, outputs, draws = record["inputs"], record["outputs"], Offset(record["inputs"]["draw_offset"])
        size, steps = inputs["window_size"] or None, inputs["steps"]  # 0 is the release's word for none
        try:
            window = draw_window(steps, size, inputs["window_range"], draws)
        except UserError as error:
            outside = size is not None and inputs["window_range"][1] > steps
            return {"refused": None if record["known_bug"] or outside else str(error)}
        return {
            "noise_on": other(window.noised(steps), outputs["noise_on"]),
            "trained_steps": other(window.trained(steps), outputs["trained_steps"]),
            "known_bug": "a window that is wrong" if record["known_bug"] else None,
        }

    every([r for r in lines(FILE, "rollout", "flow_grpo") if r["variant"] == "fast"], run)


@pytest.mark.parity
def test_bagel_is_reproduced():
    def run(record):
        inputs, outputs = record["inputs"], record["outputs"]
        steps = inputs["schedule_points"] - 1
        try:
            times = uniform_times(steps, inputs["shift"])
            Sde(sigma_at_one=float(times[1]))
            draws = random.Random(inputs["process_index"])
            window = draw_window(steps, inputs["window_size"], inputs["window_range"], draws, "release")
        except UserError as error:
            return refused(outputs, error)
        if "raises" in outputs:
            return {"raises": f"nothing in place of {outputs['raises']}"}
        trained = window.trained(steps)
        return {
            "noise_on": other(window.noised(steps, "release"), outputs["noise_on"]),
            "trained_steps": other(trained, outputs["trained_steps"]),
            "latents_kept": other((window.start < steps) + len(trained), outputs["latents_kept"]),
            "times": differs(times[:-1], outputs["times"]),
            "next_times": differs(times[1:], outputs["next_times"]),
        }

    every([r for r in lines(FILE, "rollout", "flow_grpo") if r["variant"] == "bagel"], run)


@pytest.mark.parity
def test_verl_omni_is_reproduced():
    def pick(record):
        inputs, outputs = record["inputs"], record["outputs"]
        window = pick_window(inputs["window_size"], inputs["window_range"], inputs["seed"], "release")
        return {"window": other(window and [window.start, window.stop], outputs["window"])}

    def batch(record):
        inputs, outputs = record["inputs"], record["outputs"]
        generators = [torch.Generator().manual_seed(seed) for seed in inputs["torch_seeds"]]
        drawn = generators[0] if inputs["one_generator"] else generators
        size, bounds, steps, rows = (inputs[key] for key in ("window_size", "window_range", "steps", "batch"))
        try:
            windows = windows_of_batch(size, bounds, steps, rows, drawn, "release")
        except UserError as error:
            return refused(outputs, error)
        return {"windows": other([[w.start, w.stop] for w in windows], outputs.get("windows", "an error"))}

    def of_step(record):
        inputs, outputs = record["inputs"], record["outputs"]
        try:
            window = window_of_step(
                inputs.get("sample_strategy", "random"),
                inputs.get("sde_window_size"),
                inputs.get("sde_window_range"),
                inputs.get("global_steps", 0),
                inputs.get("iters_per_group", 1),
                inputs.get("sde_window_seed"),
                "release",
            )
        except UserError as error:
            return refused(outputs, error)
        return {"window_range": other(window and list(window), outputs.get("window_range", "an error"))}

    every(lines(FILE, "pick_window"), pick)
    every(lines(FILE, "windows_of_batch"), batch)
    every(lines(FILE, "window_of_step"), of_step)


def mix_grpo(record, variant):
    given = record["inputs"]["parameters"]
    iterations, least = given["iters_per_group"], None
    if given["sample_strategy"] == "decay":
        iterations, least = given.get("max_iters_per_group", iterations), given.get("min_iters_per_group")
    sliding = SlidingWindow(
        steps=given["max_timesteps"],
        size=given["group_size"],
        iterations=iterations,
        strategy=given["sample_strategy"],
        stride=given["prog_overlap_step"] if given["prog_overlap"] else None,
        roll_back=given["roll_back"],
        start=given["cur_timestep"],
        least_iterations=least,
        decay_after=given.get("exp_decay_thre_timestep", 13),
        decay_rate=given.get("exp_decay_k", 0.1),
        variant=variant,
    )
    return runs(sliding, record["inputs"]["iterations"], record["inputs"]["update_seeds"])


@pytest.mark.parity
def test_mix_grpo_is_reproduced():
    def run(record):
        outputs = record["outputs"]
        try:
            groups, complete = mix_grpo(record, "release")
        except UserError as error:
            return refused(outputs, error)
        return {
            "groups": other(groups, outputs.get("groups", "an error")),
            "complete_first_at": other(complete, outputs["complete_first_at"]),
        }

    every(lines(FILE, "training_states"), run)


@pytest.mark.parity
def test_the_repaired_sliding_window_leaves_out_the_empty_groups():
    """It is the released one without them, for as long as both go on; what is not known to be wrong is the same."""

    def run(record):
        outputs = record["outputs"]
        try:
            groups, complete = mix_grpo(record, "repaired")
        except UserError as error:
            return refused(outputs, error)
        if not record["known_bug"]:
            return {
                "groups": other(groups, outputs["groups"]),
                "complete": other(complete, outputs["complete_first_at"]),
            }
        told = [steps for steps, _ in outputs["groups"] if steps]
        told = [steps for number, steps in enumerate(told) if number == 0 or steps != told[number - 1]]
        return {
            "empty": None if all(steps for steps, _ in groups) else "an empty group",
            "groups": other([steps for steps, _ in groups][: len(told)], told),
        }

    every(lines(FILE, "training_states"), run)
