"""Where the repaired forms of DeepEyes, DeepEyesV2 and Chain-of-Focus depart from their releases, and in which way."""

from __future__ import annotations

import pytest
from departures import CALL, IMAGE, conversations, talk, without_earlier, without_marks, without_replies
from hypothesis import given
from hypothesis import strategies as st
from published_helpers import ScriptedJudge, conversation, from_record, judged_by, say, verdict

from rewards.contract import policy_text
from rewards.functions.answers import math_agrees, same_reading
from rewards.functions.text import boxed, transcript
from rewards.published import chain_of_focus as cof
from rewards.published import deepeyes as de
from rewards.published import deepeyes_v2 as v2
from rewards.registry import REWARDS

MISSING = "missing or blank answer"
THINK, ANSWER = "<think>ok</think>", "<answer>7</answer>"
PIECES = [
    THINK, THINK, ANSWER, ANSWER, "<answer>8</answer>", "<answer> </answer>", "<answer>", "</answer>", "<think>",
    "</think>", "<code>1</code>", "<code>", CALL, "<tool_call>", "so", " ", "<|im_end|>", "\\boxed{7}",
    "\\boxed{x_{2}}", "\\boxed{ }", "\\boxed{", "<|vision_start|><|image_pad|>", "a" * 299, "a" * 999,
    *(f"<answer>{'a' * length}</answer>" for length in (299, 300, 999, 1000)),
    *(f"<answer>{'a ' * words}</answer>" for words in (1000, 1001)),
]  # fmt: skip
REPLIES = ("reply", "close with <answer>", "</think>", "<tool_call>", "\\boxed{7}", "<|vision_start|><|image_pad|>")
talks = conversations(PIECES, REPLIES)
verdicts = st.sampled_from([True, True, False, None])


def value(reward, trajectory, judged, **options):
    return reward([trajectory], judged_by(ScriptedJudge(judged)), **options)[0]


class Departures:
    """A reward's: steps that take out what the repaired form does not read, and what it pays where the release, after
    these, still differs."""

    def __init__(self, names, reward, steps, reading, kind_option):
        self.names, self.reward, self.steps, self.reading, self.kind_option = names, reward, steps, reading, kind_option

    def stripped(self, trajectory, kind):
        """(the conversation that the repaired form reads, the steps that changed what the release reads in it)."""
        changed = []
        for why, step in self.steps(kind):
            before = self.reading(transcript(trajectory), kind)
            trajectory = step(trajectory)
            if self.reading(transcript(trajectory), kind) != before:
                changed.append(why)
        return trajectory, changed

    def release(self, trajectory, judged, kind):
        return value(self.reward, trajectory, judged, variant="release", **{self.kind_option: kind})

    def repaired(self, trajectory, judged, kind):
        return value(self.reward, trajectory, judged, **{self.kind_option: kind})


# ---- DeepEyes -------------------------------------------------------------------------------------------------------

DEEPEYES = Departures(
    ("deepeyes",),
    de.deepeyes,
    lambda kind: (
        ("tools' replies", without_replies),
        ("before the last observation", lambda t: without_earlier(t, "<answer>", "</answer>", "\\boxed")),
        ("chat marks", without_marks),
    ),
    de.read_release,
    "kind",
)


def deepeyes(trajectory, judged, kind):
    """(what the repaired form pays, why it departs from the release); the reasons are none where the two agree."""
    trajectory, why = DEEPEYES.stripped(trajectory, kind)
    text = transcript(trajectory)
    reading = de.read_release(text, kind)
    if kind == "math":
        tail = text.rpartition("</think>")[2]
        boxes = [box for box in boxed(tail) if box]
        if [reading.answer] * bool(reading.asks) != boxes[-1:] or reading.well_formed != (
            text.count("<think>") == text.count("</think>") and len(boxes) == 1
        ):
            why.append("matches braces")  # a box ends at the brace that closes it, and a blank one is none
        if not boxes:
            return -0.4, why
        gold = trajectory.record["ground_truth"]
        rule, released = math_agrees(boxes[-1], gold), same_reading(boxes[-1], gold)
        if bool(rule) != released:
            why.append("math-verify")
        formed = text.count("<think>") == text.count("</think>") and len(boxes) == 1
        if not rule and judged is None:
            return None, [*why, "unjudged"]
        return 1.2 * (bool(rule) or judged) - 0.4 * (not formed), why
    if kind == "vstar_chart" and ("<answer>" not in text or not reading.answer):
        return -0.2, [*why, "missing answer"]
    if reading.asks and not reading.void and judged is None:
        return None, [*why, "unjudged"]
    if reading.asks and reading.void and judged is None:
        return -0.2, why  # too long: nobody need be asked
    return DEEPEYES.release(trajectory, judged, kind), why


# ---- DeepEyesV2 -----------------------------------------------------------------------------------------------------

DEEPEYES_V2 = Departures(
    ("deepeyes_v2",),
    v2.deepeyes_v2,
    lambda kind: (
        ("tools' replies", without_replies),
        ("before the last observation", lambda t: without_earlier(t, "<answer>", "</answer>")),
        ("chat marks", lambda t: at_the_start(without_marks(t))),
    ),
    lambda text, kind: v2.read(text, text, kind, release=True),
    "kind",
)


def at_the_start(trajectory):
    """Without white space before the policy's first word, which hides a think tag there."""
    spoken = policy_text(trajectory)
    blank = len(spoken) - len(spoken.lstrip())
    kept = list(trajectory.segments)
    for at, segment in enumerate(kept):
        if segment.author == "policy":
            cut = min(blank, len(segment.text))
            kept[at], blank = say(segment.text[cut:]), blank - cut
    return conversation(trajectory.record, *kept[1:])


def deepeyes_v2(trajectory, judged, kind):
    trajectory, why = DEEPEYES_V2.stripped(trajectory, kind)
    text = transcript(trajectory)
    reading = v2.read(text, text, kind, release=True)
    if not reading.answer:
        return 0.0, [*why, "missing answer"]
    if reading.asks and judged is None:
        return None, [*why, "unjudged"]
    return DEEPEYES_V2.release(trajectory, judged, kind), why


# ---- Chain-of-Focus -------------------------------------------------------------------------------------------------

CHAIN_OF_FOCUS = Departures(
    ("chain_of_focus_base", "chain_of_focus"),
    cof.chain_of_focus_base,
    lambda kind: (("tools' replies", without_replies), ("chat marks", without_marks)),
    lambda text, kind: cof.read(text, kind, release=True),
    "data_kind",
)


def chain_of_focus(trajectory, judged, kind):
    trajectory, why = CHAIN_OF_FOCUS.stripped(trajectory, kind)
    reading = cof.read(transcript(trajectory), kind, release=True)
    if not reading.answer:
        # Blank or not there: never asked about and badly formed; the release pays the format of a blank one.
        return 0.0, [*why, MISSING] if reading.asks or reading.well_formed else why
    gold = trajectory.record["ground_truth"]
    rule, released = (
        compare(reading.answer, gold) if kind == "math" else False for compare in (math_agrees, same_reading)
    )
    if bool(rule) != released:
        why.append("math-verify")
    if not rule and judged is None:
        return None, [*why, "unjudged"]
    return 0.9 * (bool(rule) or judged) + 0.1 * reading.well_formed, why


STATED = {
    "deepeyes": (DEEPEYES, deepeyes, ("vstar_chart", "general_reasoning", "math")),
    "deepeyes_v2": (DEEPEYES_V2, deepeyes_v2, ("perception", "search")),
    "chain_of_focus": (CHAIN_OF_FOCUS, chain_of_focus, ("perception", "math")),
}


def check(system, trajectory, judged, kind):
    """The repaired form pays what is stated, and without a reason it pays what the release pays. The reasons."""
    reward, stated, _ = STATED[system]
    expected, why = stated(trajectory, judged, kind)
    paid = reward.repaired(trajectory, judged, kind)
    assert paid == (None if expected is None else pytest.approx(expected)), (why, transcript(trajectory)[:300])
    if not why:
        assert paid == pytest.approx(reward.release(trajectory, judged, kind)), transcript(trajectory)[:300]
    return why


@pytest.mark.parametrize("system", STATED)
@given(data=st.data())
def test_the_forms_differ_where_and_as_it_is_stated(system, data):
    check(system, data.draw(talks), data.draw(verdicts), data.draw(st.sampled_from(STATED[system][2])))


LONG = "so it is " * 125  # 1,125 characters

# system, kind, the policy's turns with what a tool answers behind each, the verdict, what the repaired form and the
# release pay, and why they differ: nothing where they agree.
BY_HAND = [
    ("deepeyes", "vstar_chart", [(THINK + ANSWER, None)], True, 0.8, 0.8, []),
    ("deepeyes", "vstar_chart", [(THINK + ANSWER, None)], None, None, 0.0, ["unjudged"]),
    ("deepeyes", "vstar_chart", [(THINK + CALL, IMAGE), (ANSWER, None)], True, 2.0, 2.0, []),
    # Both hold the release's limit: a long answer is wrong and badly formed, whatever a judge would say.
    ("deepeyes", "vstar_chart", [(f"{THINK}<answer>{LONG}</answer>", None)], True, -0.2, -0.2, []),
    ("deepeyes", "vstar_chart", [(f"{THINK}<answer>{LONG}</answer>", None)], None, -0.2, -0.2, []),
    ("deepeyes", "general_reasoning", [(f"{THINK}<answer>{LONG}</answer>", None)], True, -0.2, -0.2, []),
    # The release judges the whole text where no tag opens, and a blank answer: both are missing.
    ("deepeyes", "vstar_chart", [(THINK + "seven", None)], True, -0.2, 0.8, ["missing answer"]),
    ("deepeyes", "vstar_chart", [(THINK + LONG, None)], True, -0.2, -0.2, ["missing answer"]),
    ("deepeyes", "vstar_chart", [(THINK + "<answer> </answer>", None)], True, -0.2, 0.8, ["missing answer"]),
    ("deepeyes", "general_reasoning", [(THINK + "<answer> </answer>", None)], True, -0.2, -0.2, []),
    ("deepeyes", "vstar_chart", [(THINK + ANSWER, "<answer>")], True, 0.8, -0.2 + 0.8, ["tools' replies"]),
    ("deepeyes", "math", [(THINK + "\\boxed{7}", None)], False, 1.2, 1.2, []),
    ("deepeyes", "math", [(THINK + "\\boxed{x_{2}}", None)], False, 0.0, 0.0, ["matches braces"]),
    ("deepeyes", "math", [(THINK + "\\boxed{ }", None)], True, -0.4, 1.2, ["matches braces"]),
    ("deepeyes_v2", "perception", [(THINK + ANSWER, None)], True, 1.0, 1.0, []),
    ("deepeyes_v2", "perception", [(f"{THINK}<answer>{'x' * 299}</answer>", None)], True, 1.0, 1.0, []),
    ("deepeyes_v2", "perception", [(f"{THINK}<answer>{'x' * 300}</answer>", None)], True, 0.0, 0.0, []),
    ("deepeyes_v2", "perception", [(THINK + "seven", None)], True, 0.0, 0.8, ["missing answer"]),
    ("deepeyes_v2", "perception", [(THINK + "<answer> </answer>", None)], True, 0.0, 0.8, ["missing answer"]),
    ("deepeyes_v2", "search", [(THINK + ANSWER, None)], None, None, 0.2, ["unjudged"]),
    ("deepeyes_v2", "search", [(THINK + CALL, "found"), (ANSWER, None)], True, 0.92, 0.92, []),
    ("chain_of_focus", "perception", [(THINK + ANSWER, None)], True, 1.0, 1.0, []),
    ("chain_of_focus", "perception", [(f"{THINK}<answer>{'a ' * 1000}</answer>", None)], True, 1.0, 1.0, []),
    ("chain_of_focus", "perception", [(f"{THINK}<answer>{'a ' * 1001}</answer>", None)], True, 0.9, 0.9, []),
    # A blank answer is one that is not there: the release pays its format, and asks the judge about it.
    ("chain_of_focus", "perception", [(THINK + "<answer> </answer>", None)], True, 0.0, 1.0, [MISSING]),
    ("chain_of_focus", "math", [(THINK + "<answer> </answer>", None)], True, 0.0, 0.1, [MISSING]),
    ("chain_of_focus", "perception", [(THINK + "seven", None)], True, 0.0, 0.9, [MISSING]),
    ("chain_of_focus", "math", [(THINK + "seven", None)], True, 0.0, 0.0, []),
    ("chain_of_focus", "perception", [(THINK + ANSWER, None)], None, None, 0.1, ["unjudged"]),
    ("chain_of_focus", "math", [(THINK + ANSWER, None)], None, 1.0, 1.0, []),
]


@pytest.mark.parametrize(("system", "kind", "turns", "judged", "repaired", "release", "why"), BY_HAND)
def test_what_is_stated_tells_the_two_kinds_apart(system, kind, turns, judged, repaired, release, why):
    trajectory = talk(turns)
    assert check(system, trajectory, judged, kind) == why
    reward = STATED[system][0]
    assert reward.repaired(trajectory, judged, kind) == (None if repaired is None else pytest.approx(repaired))
    assert reward.release(trajectory, judged, kind) == pytest.approx(release)


@pytest.mark.parity
@pytest.mark.parametrize("system", STATED)
def test_the_forms_differ_where_it_is_stated_on_every_reference_record(system, reference_records):
    """All records of a thought by itself, those with a known bug too: the release as recorded, the repaired form as
    stated, and both alike where nothing is stated."""
    reward, _, _ = STATED[system]
    alike = 0
    for record in reference_records(f"rewards/{system}.jsonl"):
        # Whole groups are in test_published_chain_of_focus.py; an unknown kind of data stops either form.
        if record["function"] == "group_aware" or "raises" in record["outputs"]:
            continue
        inputs, outputs = record["inputs"], record["outputs"]
        kind = inputs.get("data_kind", record["function"])
        trajectory, judged = from_record(inputs), verdict(inputs["judge_verdict"])
        assert reward.release(trajectory, judged, kind) == pytest.approx(outputs["total"], abs=1e-4)
        alike += not check(system, trajectory, judged, kind)
    assert alike


@pytest.mark.parametrize(("system", "words"), [
    ("deepeyes", ["missing", "1,000 characters", "before the last observation", "chat marks", "braces", "math-verify"]),
    ("deepeyes_v2", ["missing", "300 characters", "before the last observation", "chat marks"]),
    ("chain_of_focus", ["missing or blank", "1,000 words", "chat marks", "math-verify"]),
])  # fmt: skip
def test_the_registry_says_where_they_differ(system, words):
    for name in STATED[system][0].names:
        assert [word for word in (*words, "tools' replies", "unjudged") if word not in REWARDS[name].differs] == []
