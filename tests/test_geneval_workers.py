"""GenEval's reference cases through every way in which a run scores: in the driver, with the detector in a process of
its own, with the part in a process, and in Ray actors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rewards_helpers import image_segment, trajectory_of

from rewards.config import RewardsConfig
from rewards.manager import RewardManager

RECORDED = '''
"""Sees what is written in cases.jsonl; an image's first pixel says which line."""
import json
from pathlib import Path
from rewards.detectors.base import Detection

class Recorded:
    def __init__(self):
        lines = (Path(__file__).parent / "cases.jsonl").read_text().splitlines()
        self.cases = [json.loads(line)["detections"] for line in lines]
        self.classes = tuple(sorted({name for case in map(json.loads, lines) for clause in
                                     [*case["metadata"]["include"], *case["metadata"].get("exclude", ())]
                                     for name in [clause["class"]]}))

    def detect(self, images):
        return [{name: [Detection(tuple(o["box"]), o["score"], o.get("color")) for o in items]
                 for name, items in self.cases[int(p[0, 0, 0]) * 256 + int(p[0, 0, 1])].items()} for p in images]
'''


def numbered(number):
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0, :2] = divmod(number, 256)
    return image


@pytest.mark.parity
@pytest.mark.parametrize(
    ("part", "more"),
    [
        ({}, {}),
        ({"isolate": True}, {}),
        ({}, {"detector_workers": {"kind": "process", "count": 1, "batch_size": 100}}),
        ({"workers": {"kind": "process", "count": 2, "batch_size": 70}}, {}),
        (
            {"workers": {"kind": "ray", "count": 1, "batch_size": 100}},
            {"detector_workers": {"kind": "ray", "count": 1}},
        ),
    ],
    ids=["driver", "process", "detector-process", "two-processes", "ray"],
)
def test_every_case_of_the_released_scorer(reference_records, tmp_path, part, more):
    cases = reference_records("geneval_cases.jsonl")
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    (tmp_path / "recorded.py").write_text(RECORDED)
    groups = [
        [
            trajectory_of(
                cases[number]["metadata"], image_segment("sketch", numbered(number)), group=start, member=number - start
            )
            for number in range(start, min(start + 8, len(cases)))
        ]
        for start in range(0, len(cases), 8)
    ]
    # `again` stays in the driver, so that it asks the detector's own workers where there are some
    config = RewardsConfig.model_validate(
        {
            "parts": {"detect": {"function": "geneval", **part}, "again": {"function": "geneval"}},
            "total": "detect",
            "detector": f"{tmp_path / 'recorded.py'}:Recorded",
            **more,
        }
    )
    with RewardManager(config) as manager:
        manager.score(groups)
    rows = [t for group in groups for t in group]
    assert len(rows) == len(cases)
    assert [t.reward for t in rows] == [float(case["correct"]) for case in cases]
    for name in ("detect", "again"):
        assert [t.rewards[name] for t in rows] == [float(case["correct"]) for case in cases]
        assert [t.info["rewards"][name]["reason"] for t in rows] == [case["reason"] for case in cases]
