"""evals/heldout.py and evals/bootstrap.py against numbers worked by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from evals.bootstrap import compare, paired_bootstrap, refinement
from evals.heldout import EvaluationError, PromptScore, evaluate, mean_of_tags, spread_over_tags
from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.contract import policy_images
from rollout.config import FlowConfig
from rollout.pool.contract import FailedGroup, GenerateResult

RECORDS = [
    {"prompt": "a", "tag": "color", "include": []},
    {"prompt": "b", "tag": "color", "include": []},
    {"prompt": "c", "tag": "counting", "include": []},
]


def answer(request, member, shades):
    """A thought whose images are plain shades: their score is the shade, 0..255 as 0..1."""
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False)]
    for shade in shades:
        segments.append(
            Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, image=np.full((2, 2, 3), shade, np.uint8))
        )
    return Trajectory(request.prompt, request.record, "strokes", segments, request.group, member, request.seed)


class Answers:
    """Rollouts that answer as they are told to: shades by (prompt, member)."""

    def __init__(self, shades, failed=()):
        self.shades, self.failed, self.requests = shades, list(failed), []

    def generate(self, requests, each=None):
        self.requests = requests
        lost = {failed.index for failed in self.failed}
        groups = [
            [answer(r, m, self.shades[r.prompt][m]) for m in r.members]
            for index, r in enumerate(requests)
            if index not in lost
        ]
        return GenerateResult(groups, self.failed, {"time/rollout": 1.0})


class Shades:
    """The shade of the last image and of the first; 0 where there is none."""

    name, score = "shades", "final_image"

    def check(self, records):
        pass

    def __call__(self, trajectories):
        shades = [[float(image[0, 0, 0]) / 255 for _, image in policy_images(t)] or [0.0] for t in trajectories]
        for trajectory, drawn in zip(trajectories, shades, strict=True):
            trajectory.rewards = {"final image": drawn[-1]}
        images = [float(len(policy_images(t))) for t in trajectories]
        return {"final_image": [s[-1] for s in shades], "first_sketch": [s[0] for s in shades], "images": images}


score = [Shades()]


def scores(prompt, tag, final, first, images=1.0):
    return PromptScore(prompt, tag, {"final_image": final, "first_sketch": first, "images": images})


def test_tags_weigh_the_same_and_no_image_scores_nothing():
    # color: final 1 and 0 (nothing drawn) -> 0.5; counting: 1 -> overall 0.75. First: color (0 + 0) / 2, counting 1.
    rollouts = Answers({"a": [[0, 0, 255]], "b": [[]], "c": [[255]]})
    heldout = evaluate(rollouts, score, RECORDS, seed=7)
    assert heldout.score == 0.75 and heldout.means["first_sketch"] == 0.5
    assert heldout.tags == {"color": 0.5, "counting": 1.0}
    assert heldout.as_metrics()["heldout/images"] == 1.25  # color (3 + 0) / 2, counting 1
    assert [(r.group, r.seed, r.members) for r in rollouts.requests] == [(0, 7, (0,)), (1, 7, (0,)), (2, 7, (0,))]


def test_images_may_be_denoised_otherwise_than_in_training():
    rollouts = Answers({"a": [[0]], "b": [[0]], "c": [[255]]})
    evaluate(rollouts, score, RECORDS, seed=7)
    assert [request.flow for request in rollouts.requests] == [None] * 3
    heldout = FlowConfig(sampler="ode", steps=40)
    evaluate(rollouts, score, RECORDS, seed=7, flow=heldout)
    assert [request.flow for request in rollouts.requests] == [heldout] * 3


def test_samples_of_a_prompt_are_averaged(tmp_path):
    heldout = evaluate(Answers({"a": [[255], [0]], "b": [[255], [255]], "c": [[0], [0]]}), score, RECORDS, 0, samples=2)
    assert [p.measures["final_image"] for p in heldout.prompts] == [0.5, 1.0, 0.0]
    assert [t.rewards["final image"] for t in heldout.trajectories[0]] == [1.0, 0.0]  # each answer's own
    heldout.save(tmp_path / "scores.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [PromptScore.of_json(row) for row in rows] == heldout.prompts


def test_unanswered_prompts_are_not_scored_as_wrong():
    rollouts = Answers({"a": [[0]], "b": [[0]], "c": [[0]]}, [FailedGroup(1, 1, "timeout", "600 s")])
    with pytest.raises(EvaluationError, match="1 of 3 held-out prompts got no answer; the first is 'b' \\(timeout"):
        evaluate(rollouts, score, RECORDS, seed=0)
    rollouts = Answers({"a": [[0]] * 4, "c": [[0]] * 4}, [FailedGroup(1, 1, "timeout", "600 s")])
    with pytest.raises(EvaluationError, match="1 of 3 held-out prompts got no answer; the first is 'b'"):
        evaluate(rollouts, score, RECORDS, seed=0, samples=4)
    with pytest.raises(EvaluationError, match="no held-out prompts"):
        evaluate(rollouts, score, [], seed=0)


def test_prompts_are_spread_over_tags():
    records = [{"prompt": str(n), "tag": "abc"[min(n // 10, 2)]} for n in range(23)]  # 10 a, 10 b, 3 c
    chosen = spread_over_tags(records, 13)
    assert [sum(r["tag"] == tag for r in chosen) for tag in "abc"] == [5, 5, 3]
    assert len({r["prompt"] for r in chosen}) == 13 and chosen == spread_over_tags(records, 13)
    assert spread_over_tags(records, 23) == records
    with pytest.raises(EvaluationError, match="asks for 24 held-out prompts, and the task has 23"):
        spread_over_tags(records, 24)


def test_bootstrap_of_a_certain_gain_has_no_width():
    interval = paired_bootstrap([0.0] * 6, [1.0] * 6, list("aabbcc"))
    assert (interval.difference, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_bootstrap_interval_is_that_of_the_normal_for_many_prompts():
    # Gains of +1 and -1 by halves: standard error of a mean over 400 is 1 / 20, so 95% lies within 0.098.
    gains = np.tile([1.0, -1.0], 200)
    interval = paired_bootstrap(np.zeros(400).tolist(), gains.tolist(), ["a"] * 400)
    assert interval.difference == 0 and interval.high == pytest.approx(0.098, abs=0.006)
    assert interval.low == pytest.approx(-interval.high, abs=0.006)


def test_pairing_cancels_what_makes_a_prompt_hard():
    rng = np.random.default_rng(0)
    hard = rng.random(60)
    interval = paired_bootstrap(hard.tolist(), (hard + 0.1).tolist(), ["a"] * 60)
    assert interval.low == pytest.approx(0.1) and interval.high == pytest.approx(0.1)


def test_small_tags_weigh_as_much_as_large_ones():
    # tag a: 9 prompts, no gain; tag b: 1 prompt, gain 1 -> 0.5, and no resample can lose it
    interval = paired_bootstrap([0.0] * 10, [0.0] * 9 + [1.0], ["a"] * 9 + ["b"])
    assert (interval.difference, interval.low, interval.high) == (0.5, 0.5, 0.5)
    assert mean_of_tags([0.0] * 9 + [1.0], ["a"] * 9 + ["b"]) == 0.5


def test_only_the_same_prompts_compare():
    one, two = scores("x", "a", 0, 0), scores("y", "a", 1, 0)
    assert compare([one], [one]).difference == 0
    with pytest.raises(EvaluationError, match="'x' stands where the other evaluation has 'y'"):
        compare([one], [two])
    with pytest.raises(EvaluationError, match="not 1 and 0 of them"):
        compare([one], [])


def test_the_shapes_world_scores_its_own_demonstrations():
    """The scorer that evaluations use, on rendered scenes: a demonstration ends right, by GenEval's own rules."""
    pytest.importorskip("tasks.shapes")
    from evals.measures import GenevalScores
    from rewards.contract import RewardContext
    from rewards.detectors.shapes import TaskDetector
    from tasks.registry import get_task

    task = get_task("shapes")
    scorer = GenevalScores(RewardContext.of(task, None, TaskDetector.of(task))).of_images
    demonstrations = task.demonstrations("strokes", 60, 0)
    final = [[p.image for p in d.parts if p.image is not None][-1] for d in demonstrations]
    assert np.mean(scorer(final, [d.record for d in demonstrations])) > 0.95
    blank = SimpleNamespace(image=np.full_like(final[0], 255))
    assert scorer([blank.image], [demonstrations[0].record]) == [0.0]


def test_refinement_is_the_final_images_gain_over_the_first_sketches():
    found = [
        scores(str(n), tag, final, first, 2)
        for n, (tag, final, first) in enumerate([("a", 1.0, 0.5), ("a", 0.5, 0.5), ("b", 0.25, 0.75)])
    ]
    interval = refinement(found)  # tags: a (0.5 + 0) / 2 = 0.25, b -0.5
    assert interval.difference == pytest.approx(-0.125) and (interval.low, interval.high) == (-0.25, 0.0)
