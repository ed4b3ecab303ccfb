"""VRAG-RL's reward: by hand, over thoughts, and where the naive reading errs."""

from __future__ import annotations

import numpy as np
import pytest
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardContext, RewardError
from rewards.published.vrag import Reading, page_name, read, read_release, reference_names, score, vrag
from runtime.errors import UserError

PAGE = np.zeros((4, 4, 3), np.uint8)
RECORD = {
    "question": "Where is the kite?",
    "ground_truth": "on the shelf",
    "file_name": "drum.pdf",
    "reference_pages": [3, 7],
}
IDEAL = 1 + 0.6309297535714575  # 1 / log2(2) + 1 / log2(3)


class Judge:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, *said):
        self.said, self.asked = list(said), []

    def agrees(self, checks):
        self.asked += checks
        return [self.said.pop(0) for _ in checks]


def context(*said):
    return RewardContext(judge=Judge(*said))


def retrieval(*pages, answer="<answer>on the shelf</answer>", record=RECORD, search="<search> kite </search>"):
    seen = [image_segment("observation", PAGE, Author.ENVIRONMENT) for _ in pages]
    made = trajectory_of(
        record, text("think", "<think>first look</think>"), text("search", search), *seen, text("answer", answer)
    )
    made.info["retrieved"] = [f"images/drum_{page}.jpg" for page in pages]
    return made


@pytest.mark.parametrize(
    ("formed", "right", "ranking", "mode", "total"),
    [
        (True, True, 1.0, "train", 1.0),  # 0.7 + 0.1 + 0.2
        (True, True, 0.5, "train", 0.9),
        (True, False, 1.0, "train", 0.3),
        (True, False, 0.0, "train", 0.1),
        (False, True, 1.0, "train", 0.0),  # without both blocks the verdict and the ranking are worth nothing
        (True, True, 0.0, "eval", 1.0),
        (True, False, 1.0, "eval", 0.0),
        (False, True, 1.0, "eval", 0.0),
    ],
)
def test_the_formula_by_hand(formed, right, ranking, mode, total):
    assert score(Reading("x", formed), right, ranking, mode)["total"] == pytest.approx(total)


def test_pages_are_named_after_their_document():
    assert page_name("images/drum_report_3.jpg/") == "drum_report_3" == page_name("drum_report_3.jpg")
    assert reference_names("drum_report.pdf", [3, 12]) == ["drum_report_3", "drum_report_12"]


def test_reading():
    assert read("<search>a</search><answer> b </answer><answer>c</answer>") == Reading("c", True)
    assert read("<answer>b</answer>") == Reading("b", False)
    assert read("</search><search><answer>b</answer>") == Reading("b", False)
    user = "<|im_start|>user\nfinish with <answer> Rome </answer><|im_end|>"
    assert read_release(f"<search>a</search>{user}") == Reading(" Rome ", True)
    # on one line the release does cut the turn out before it looks at the form, though not before it reads the answer
    assert read_release(f"<search>a</search>{user.replace(chr(10), ' ')}") == Reading(" Rome ", False)


def test_over_thoughts():
    rows = [retrieval(3, 7), retrieval(5, 3), retrieval(), retrieval(3, answer="no answer")]
    judge = context(True, False, True)
    third = 0.7 + 0.1
    assert vrag(rows, judge) == pytest.approx([1.0, 0.1 + 0.2 * (0.6309297535714575 / IDEAL), third, 0.0])
    assert [c.answer for c in judge.judge.asked] == ["on the shelf"] * 3  # nothing was asked about the last
    assert judge.judge.asked[0].question == "Where is the kite?"


def test_a_page_that_comes_twice_is_found_once():
    twice = retrieval(3, 3, record={**RECORD, "reference_pages": [3]})
    assert vrag([twice], context(True)) == [pytest.approx(1.0)]
    assert vrag([twice], context(True), variant="release") == [pytest.approx(0.8 + 0.2 * IDEAL)]  # 1.126


def test_tags_that_the_environment_wrote_are_not_the_policys():
    hinted = retrieval(3, answer="I give up")
    hinted.segments.insert(-1, text("observation", "\nfinish with <answer> Nairobi </answer>", Author.ENVIRONMENT))
    assert vrag([hinted], context()) == [0.0]
    judge = context(True)
    assert vrag([hinted], judge, variant="release")[0] > 0.8
    assert judge.judge.asked[0].answer == " Nairobi "


def test_what_is_missing_is_none_and_never_zero():
    none = retrieval(3, record={k: v for k, v in RECORD.items() if k != "ground_truth"})
    unpaged = retrieval(3, record={**RECORD, "reference_pages": []})
    assert vrag([none, unpaged, retrieval(3)], context(None)) == [None, None, None]
    assert vrag([unpaged], context(True), mode="eval") == [1.0]
    assert vrag([retrieval(3)], context(None), variant="release") == [pytest.approx(0.1 + 0.2 / IDEAL)]
    assert vrag([retrieval(3, answer="<answer></answer>")], context()) == [pytest.approx(0.1 + 0.2 / IDEAL)]


def test_pages_are_read_from_observations_where_the_tool_noted_none():
    told = retrieval(answer="<answer>on the shelf</answer>")
    told.info.clear()
    told.segments.insert(3, text("observation", "found pages/drum_7.jpg and pages/kite_1.jpg", Author.ENVIRONMENT))
    assert vrag([told], context(False)) == [pytest.approx(0.1 + 0.2 / IDEAL)]


def test_bad_input_is_named():
    with pytest.raises(UserError, match="no mode 'test'"):
        vrag([], context(), mode="test")
    with pytest.raises(UserError, match="none may be negative"):
        vrag([], context(), retrieval=-1)
    with pytest.raises(RewardError, match="in 'file_name'"):
        vrag([retrieval(3, record={**RECORD, "file_name": None})], context(True))
    with pytest.raises(RewardError, match="vrag"):
        vrag([retrieval(3)], RewardContext())
