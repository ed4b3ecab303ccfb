"""What every registered reward keeps to; a new one in rewards/registry.py is tested by being there."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_models
from grid_world import GridWorld, draw
from rewards_helpers import from_parts, image_segment, text, trajectory_of

from formats.registry import get_format
from record.trajectory import (
    Author,
    DecisionKind,
    Decisions,
    FlowSteps,
    Modality,
    SamplingParams,
    Segment,
)
from rewards.config import RewardsConfig
from rewards.contract import RewardContext, RewardError, TrainerState, call, lightened
from rewards.detectors.shapes import TaskDetector
from rewards.judge.base import Reply
from rewards.loader import load_reward
from rewards.manager import RewardManager
from rewards.registry import REWARDS
from runtime.errors import UserError
from tasks.registry import get_task

NAMES = sorted(REWARDS)
NO_JUDGE = {"base_url": "http://127.0.0.1:9/v1", "model": "none", "check_at_start": False}


@pytest.fixture(scope="module")
def context():
    task = get_task("shapes")
    return RewardContext.of(task, get_format("strokes"), TaskDetector.of(task), AgreeingJudge())


class AgreeingJudge:
    """Finds every answer right, and says 1 to whatever it is asked about."""

    def agrees(self, checks):
        return [True for _ in checks]

    def yes_probability(self, questions):
        return [1.0 for _ in questions]

    def ask(self, questions):
        return [Reply('{"Consistency": 1}') for _ in questions]


@pytest.fixture(scope="module")
def thoughts(context):
    """Good ones, and everything short of that."""
    demos = context.task.demonstrations("strokes", 6, seed=1)
    record = demos[0].record
    image = next(p.image for p in demos[0].parts if p.image is not None)
    return [from_parts(d.record, d.parts) for d in demos] + [
        trajectory_of(record),
        trajectory_of({}),
        trajectory_of({}, image_segment("sketch", image)),
        trajectory_of(record, text("other", "< <ins> ]")),
        trajectory_of(record, image_segment("sketch", image), text("inspect", "<inspect> wrong fine wrong")),
        trajectory_of(record, image_segment("sketch", np.zeros_like(image)), text("inspect", "")),
        trajectory_of(
            {"question": "How many?", "ground_truth": "7"},
            text("think", "<think> one by one </think>"),
            text("answer", "<answer> 7 </answer>"),
        ),
        trajectory_of({"question": "How many?", "ground_truth": "7"}, text("answer", "\\boxed{8"), group=1),
    ]


# Where "7" is no reference of the kind that a reward reads, and what else its records must say.
REFERENCES = {
    "box_iou": [0, 0, 2, 2],
    "temporal_iou": [0, 1],
    "visual_arft": "<answer> 7 </answer>",
    "vr_thinker": {"OA": 1, "TA": 0},
}
COLUMNS = {
    "t2i_r1_yes": {"objects": ["a dog"]},
    "vrag": {"file_name": "report.pdf", "reference_pages": [1]},
    "vista": {"tool_outputs": {"7": "a table"}},
}
GRID = {"grid": ["S.", "#G"]}


def fitting(name, context, thoughts):
    """The setting and the thoughts with records that the reward can read."""
    if name == "vprl":
        planned = [
            trajectory_of(GRID, *[image_segment("sketch", draw(GRID["grid"], cell)) for cell in cells])
            for cells in ([], [(0, 1), (1, 1)], [(1, 1)])
        ]
        return RewardContext(GridWorld(), context.fmt), [*thoughts, *planned]
    own = [copy.deepcopy(t) for t in thoughts]
    for t in own:
        if "ground_truth" in t.record:
            t.record |= {"ground_truth": REFERENCES.get(name, t.record["ground_truth"]), **COLUMNS.get(name, {})}
    return context, own


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """By reward, the options that name its model: real classes, tiny random weights."""
    root = tmp_path_factory.mktemp("weights")
    clip, other = str(tiny_models.clip(root / "clip")), str(tiny_models.open_clip_model(root / "open_clip"))
    return {
        "clip_similarity": {"path": other},
        "hps": {"path": other, "quick_gelu": True},
        "pickscore": {"path": clip, "processor": None},
    }


@pytest.mark.parametrize("name", NAMES)
def test_one_finite_value_a_thought_whatever_it_is_and_nothing_is_changed(name, context, thoughts, weights):
    context, thoughts = fitting(name, context, thoughts)
    before = copy.deepcopy(thoughts)
    function = load_reward(name)
    options = weights.get(name, {})
    values, logs = call(function, name, thoughts, options=options, state=TrainerState(), view="auto", context=context)
    assert len(values) == len(thoughts)
    numbers = [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
    assert all(value is None or math.isfinite(value) for value in numbers)
    assert any(value is not None for value in values)
    assert all(math.isfinite(v) for metric in logs.metrics.values() for v in metric)
    assert all(len(column) == len(thoughts) for column in logs.columns.values())
    for old, new in zip(before, thoughts, strict=True):
        assert [s.text for s in old.segments] == [s.text for s in new.segments] and old.record == new.record
    again, _ = call(function, name, thoughts, options=options, state=TrainerState(), view="auto", context=context)
    assert again == values


@pytest.mark.parametrize("name", NAMES)
def test_no_thoughts_no_values(name, context, weights):
    assert (
        call(
            load_reward(name),
            name,
            [],
            options=weights.get(name, {}),
            state=TrainerState(),
            view="auto",
            context=context,
        )[0]
        == []
    )


# A format's grammar says where an observation may stand, so one elsewhere is a violation.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "format"])
def test_what_the_environment_wrote_changes_nothing(name, context, thoughts, weights):
    noise = [
        Segment("observation", Author.ENVIRONMENT, Modality.TEXT, False, text="wrong color red circle"),
        Segment("observation", Author.ENVIRONMENT, Modality.IMAGE_TOKENS, False, image=np.zeros((32, 32, 3), np.uint8)),
    ]
    context, thoughts = fitting(name, context, thoughts)
    watched = [copy.deepcopy(t) for t in thoughts]
    for t in watched:
        t.segments += noise
    function = load_reward(name)
    plain, seen = (
        call(function, name, rows, options=weights.get(name, {}), state=TrainerState(), view="auto", context=context)[0]
        for rows in (thoughts, watched)
    )
    assert seen == plain


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_is_refused_at_the_start(name, context):
    config = RewardsConfig.model_validate(
        {"parts": {"part": {"function": name, "options": {"no_such": 1}, "isolate": False}}, "judge": NO_JUDGE}
    )
    with pytest.raises(RewardError, match="rewards.parts.part.options: 'no_such' is no argument"):
        RewardManager(config, context.task)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("geneval", {"mode": "loose"}, "geneval: no mode 'loose'"),
        ("geneval", {"image": "last"}, "no image 'last'"),
        ("improvement", {"mode": "loose"}, "improvement: no mode"),
        ("improvement", {"credit": "x"}, "no credit 'x'"),
        ("critique_consistency", {"named": 3}, "named is 3"),
        ("format", {"mode": "x"}, "format: no mode 'x'"),
        ("steps", {"min_turns": 3, "max_turns": 1}, "max_turns is 1"),
    ],
)
def test_an_option_out_of_range_is_refused_at_the_start(name, options, message, context):
    config = RewardsConfig.model_validate({"parts": {"part": {"function": name, "options": options}}})
    with pytest.raises(UserError, match=message):
        RewardManager(config, context.task)


@pytest.mark.parametrize("name", NAMES)
def test_formula_and_source_are_stated(name):
    assert len(REWARDS[name].formula) > 20 and REWARDS[name].source
    assert load_reward(name).__doc__


def test_latents_stay_behind_when_a_thought_travels():
    times_M, latents_P = np.array([1, 0], np.float32), np.zeros((2, 2), np.float32)
    steps = FlowSteps({"sampler": "sde"}, times_M, np.zeros(1, np.int32), latents_P)
    sampling = SamplingParams(np.ones(1, np.float32), np.full(1, -1, np.int32), ())
    decisions = Decisions(
        np.full(1, DecisionKind.FLOW, np.int8), np.zeros(1, np.int32), np.zeros(1, np.float32), sampling
    )
    drawn = Segment(
        "sketch",
        Author.POLICY,
        Modality.IMAGE_LATENT,
        True,
        decisions=decisions,
        flow=steps,
        latent=np.zeros((1, 2), np.float32),
        image=np.zeros((2, 2, 3), np.uint8),
    )
    travels = lightened(trajectory_of({}, drawn, text("inspect", "fine")))
    assert travels.segments[1].flow is None and travels.segments[1].latent is None
    assert travels.segments[1].image is drawn.image and drawn.flow is steps


def test_a_detector_of_ones_own(tmp_path):
    (tmp_path / "dogs.py").write_text("""
from rewards.detectors.base import Detection
class Dogs:
    classes = ("dog",)
    def detect(self, images):
        return [{"dog": [Detection((0, 0, 4, 4), 0.9)]} for _ in images]
""")
    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    group = [trajectory_of(record, image_segment("sketch", np.zeros((4, 4, 3), np.uint8)))]
    config = RewardsConfig.model_validate(
        {"parts": {"result": {"function": "geneval"}}, "detector": f"{tmp_path / 'dogs.py'}:Dogs"}
    )
    with RewardManager(config) as manager:
        manager.score([group])
    assert group[0].reward == 1


def test_ctrl_c_in_one_part_ends_the_others(tmp_path):
    (tmp_path / "parts.py").write_text("""
import time
def stop(completions): raise KeyboardInterrupt
def wait(completions): time.sleep(600)
""")
    config = RewardsConfig.model_validate(
        {
            "parts": {
                "stop": {"function": f"{tmp_path / 'parts.py'}:stop", "isolate": False},
                "wait": {"function": f"{tmp_path / 'parts.py'}:wait"},
            }
        }
    )
    judge, started = RewardManager(config), time.monotonic()
    process = judge.parts["wait"].workers[0]._process
    with pytest.raises(KeyboardInterrupt):
        judge.score([[trajectory_of({})]])
    assert process.poll() is not None and time.monotonic() - started < 30


def test_importing_rewards_loads_neither_ray_nor_transformers():
    modules = "rewards.manager, rewards.config, rewards.loader, rewards.runtime.ray_worker, rewards.detectors.shapes"
    code = f"import sys, {modules}; print([m for m in ('ray', 'transformers', 'torch', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
