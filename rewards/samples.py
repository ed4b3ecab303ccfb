"""Eight thoughts to try a reward on, as unlike each other as those of a run are. check.py calls rewards with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from record.trajectory import Author, Modality, Segment, StopReason, Trajectory


def sample_thoughts(columns: Mapping[str, Any] | None = None) -> list[Trajectory]:
    """Eight thoughts in two groups: words, an image, both, neither, an observation, a limit, several images, long
    words in several scripts. Their records have GenEval's columns, `question`, `ground_truth`, `solution`, `answer`."""
    records: list[dict[str, Any]] = [
        {
            "prompt": "a red circle left of a blue square",
            "tag": "position",
            "question": "Which is on the left?",
            "ground_truth": "the circle",
            "solution": "the circle",
            "answer": "the circle",
            "include": [
                {"class": "circle", "count": 1, "color": "red"},
                {"class": "square", "count": 1, "color": "blue", "position": ["right of", 0]},
            ],
        },
        {
            "prompt": "two green stars",
            "tag": "counting",
            "question": "How many stars?",
            "ground_truth": "2",
            "solution": "2",
            "answer": "2",
            "include": [{"class": "star", "count": 2, "color": "green"}],
            "exclude": [{"class": "star", "count": 3}],
        },
    ]
    said, seen = _words, _seen
    stories: list[list[tuple[str, StopReason, list[Segment]]]] = [
        [
            (
                "words alone",
                StopReason.END,
                [said("plan", "I draw a red circle on the left."), said("answer", "<answer>the circle</answer>")],
            ),
            ("an image alone", StopReason.END, [_drawn(0)]),
            (
                "words and an image",
                StopReason.END,
                [said("plan", "Circle left, square right."), _drawn(1), said("inspect", "It is fine.")],
            ),
            ("neither words nor images", StopReason.END, []),
        ],
        [
            (
                "words around an observation",
                StopReason.END,
                [
                    said("tool_call", '<tool_call>{"name": "zoom", "box": [0, 0, 9, 9]}</tool_call>'),
                    seen("observation", "two stars, both green", _pixels(2)),
                    said("answer", "<answer>2</answer>"),
                ],
            ),
            ("a thought cut at a limit", StopReason.MAX_TOKENS, [said("plan", "First the star on the")]),
            (
                "several images of different sizes",
                StopReason.END,
                [_drawn(3, 24), said("inspect", "One is missing."), _drawn(4, 40), _drawn(5, 17)],
            ),
            (
                "long words in several scripts",
                StopReason.END,
                [said("think", "zwei grüne Sterne, 两颗绿星 ★★ \n" * 60), said("answer", "<answer>3</answer>")],
            ),
        ],
    ]
    made = []
    for group, (record, members) in enumerate(zip(records, stories, strict=True)):
        for member, (kind, stop, segments) in enumerate(members):
            prompt = Segment("prompt", Author.USER, Modality.TEXT, False, text=record["prompt"])
            made.append(
                Trajectory(
                    record["prompt"],
                    {**record, **(columns or {})},
                    "strokes",
                    [prompt, *segments],
                    group,
                    member,
                    stop=stop,
                    info={"kind": kind},
                )
            )
    return made


def _words(role: str, text: str) -> Segment:
    return Segment(role, Author.POLICY, Modality.TEXT, True, np.arange(1, 1 + len(text) // 4, dtype=np.int32), text)


def _seen(role: str, text: str, image: np.ndarray) -> Segment:
    return Segment(role, Author.ENVIRONMENT, Modality.TEXT, False, text=text, image=image)


def _drawn(seed: int, side: int = 32) -> Segment:
    return Segment(
        "sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, np.arange(16, dtype=np.int32), image=_pixels(seed, side)
    )


def _pixels(seed: int, side: int = 32) -> np.ndarray:
    """A colored square on white: neither blank nor noise."""
    image = np.full((side, side, 3), 255, np.uint8)
    image[side // 4 : side // 2 + seed, side // 4 : side // 2 + seed] = np.random.default_rng(seed).integers(0, 200, 3)
    return image
