"""Sizes in GenEval's rule: judged as colors are, refused by name where nothing tells them."""

from __future__ import annotations

import numpy as np
import pytest
from rewards_helpers import image_segment, text, trajectory_of

from rewards.contract import RewardContext
from rewards.detectors.base import CachedDetector, Detection
from rewards.detectors.contract import check_detector
from rewards.detectors.registry import DetectorConfig, build_detector
from rewards.detectors.shapes import TaskDetector, shapes_detector
from rewards.functions.critique_consistency import critique_consistency
from rewards.functions.geneval import RecordColumnError, check_record, evaluate, geneval
from rewards.functions.improvement import improvement
from rewards.runtime.serving import LoadedDetector
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.grid import CELLS, Sized, render
from tasks.shapes.world import Scene

RECORD = {"tag": "size", "prompt": "two large dogs", "include": [{"class": "dog", "count": 2, "size": "large"}]}


def dogs(*sizes):
    return {"dog": [Detection((10.0 * i, 0.0, 10.0 * i + 8, 8.0), 1.0, size=size) for i, size in enumerate(sizes)]}


def test_a_size_is_judged_by_hand():
    assert evaluate(RECORD, dogs("large", "large")) == (True, "")
    assert evaluate(RECORD, dogs("large", "small")) == (
        False,
        "expected large dog>=2, found 1 large; and 1 large, 1 small",
    )
    assert evaluate(RECORD, {"dog": [{"box": (0, 0, 8, 8), "score": 1.0, "size": "large"}] * 2})[0]
    # graded: the count is right (1), half of the sizes are (0.5); strict: one too many is 0.5 of the count
    assert evaluate(RECORD, dogs("large", "small"), "graded")[0] == pytest.approx(0.75)
    assert evaluate(RECORD, dogs("large"), "graded")[0] == pytest.approx(0.5)  # (1/2 + 1/2) / 2
    assert evaluate(RECORD, dogs("large", "large", "large"), "graded_strict")[0] == pytest.approx(0.75)
    assert evaluate(RECORD, dogs(None, None), "graded")[0] == pytest.approx(0.5)  # a size that is not told is wrong


def test_a_group_of_the_wrong_size_is_no_target_of_a_relation():
    include = [
        {"class": "cat", "count": 1, "size": "small"},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ]
    seen = {
        "cat": [Detection((0.0, 0.0, 8.0, 8.0), 1.0, size="large")],
        "dog": [Detection((20.0, 0.0, 28.0, 8.0), 1.0)],
    }
    correct, reason = evaluate({"tag": "position", "include": include}, seen)
    assert not correct and reason.endswith("no target for dog to be right of")


def test_the_published_mode_refuses_sizes_by_name():
    with pytest.raises(RecordColumnError, match="'two large dogs' asks for the size 'large'.*flow_grpo does not"):
        evaluate(RECORD, dogs("large"), "flow_grpo")


def test_a_size_that_nothing_tells_is_refused_by_name():
    one = {"include": [{"class": "circle", "count": 1, "size": "large"}]}
    with pytest.raises(RecordColumnError, match="here asks for the size 'large', which the detector does not tell; it"):
        check_record(CachedDetector(shapes_detector()), one, "here")
    grid = CachedDetector(TaskDetector(get_task("shapes", level="middle")))
    check_record(grid, one, "here")
    with pytest.raises(RecordColumnError, match="asks for the size 'larg'.*did you mean 'large'"):
        check_record(grid, {"include": [{"class": "circle", "count": 1, "size": "larg"}]}, "here")
    with pytest.raises(RecordColumnError, match=r"size\?"):
        check_record(grid, {"include": [{"class": "circle", "count": 1, "size": 3}]}, "here")


def test_a_detector_in_a_worker_says_its_sizes():
    assert LoadedDetector(TaskDetector(get_task("shapes", level="hard")))("about")["sizes"] == ("small", "large")
    assert LoadedDetector(shapes_detector())("about")["sizes"] == ()
    assert build_detector(DetectorConfig(backend="shapes_grid")).sizes == ("small", "large")


def test_the_grids_detector_keeps_its_contract():
    task = get_task("shapes", level="hard")
    images = [p.image for one in task.demonstrations("strokes", 3, 0) for p in one.parts if p.image is not None]
    check_detector(TaskDetector(task), images)

    class Silent(TaskDetector):
        def __init__(self, task):
            super().__init__(task)
            self.sizes = ()

    with pytest.raises(AssertionError, match="sizes: .*is none that it tells"):
        check_detector(Silent(task), images)


def test_the_rewards_judge_a_thought_of_the_grid():
    """Two images; the first lacks the large square, and the inspection after it says so."""
    task = get_task("shapes", level="middle")
    context = RewardContext(detector=CachedDetector(TaskDetector(task)), task=task)
    circle, square = (
        Sized("circle", "red", CELLS.index("a1")),
        Sized("square", "blue", CELLS.index("c2"), size="large"),
    )
    record = {
        "tag": "size",
        "prompt": "a small circle and a large square",
        "include": [
            {"class": "circle", "count": 1, "size": "small"},
            {"class": "square", "count": 1, "size": "large"},
        ],
    }
    thought = trajectory_of(
        record,
        image_segment("sketch", render(Scene((circle,)))),
        text("inspect", "<inspect> large square = nothing no : wrong missing large square </inspect>"),
        image_segment("sketch", render(Scene((circle, square)))),
        text("inspect", "<inspect> large square = large blue square c2 yes : fine </inspect>"),
    )
    assert geneval([thought], context) == [1.0]
    assert geneval([thought], context, image="first", mode="graded_strict") == [0.5]  # 2 of 4 demands
    assert improvement([thought], context, mode="graded_strict") == [0.5]
    assert critique_consistency([thought], context) == [1.0]  # both verdicts and the mistake are right
    assert np.isclose(critique_consistency([thought], context, named=1.0)[0], 1.0)


def test_an_unknown_size_in_metadata_files_is_refused(tmp_path):
    from evals.geneval_folder import checked_record

    with pytest.raises(UserError, match=r"size\?"):
        checked_record({"tag": "size", "prompt": "", "include": [{"class": "dog", "count": 1, "size": 2}]}, "line 1")
