"""The release variants of six systems against what their released code gave, record by record, known bugs included."""

from __future__ import annotations

import pytest
from published_helpers import ScriptedJudge, differences, from_record, judged_by, say, tool, verdict

from rewards.functions.answers import same_reading
from rewards.functions.text import transcript
from rewards.published import chain_of_focus, deepeyes, deepeyes_v2, pixel_reasoner, thyme, vtool_r1
from runtime.errors import UserError

pytestmark = pytest.mark.parity


def every(records, run):
    """Run every record; none may be of an unknown kind, and none may differ."""
    failures = []
    for index, record in enumerate(records):
        wrong = run(record)
        if wrong:
            failures.append((index, record["function"], record["note"], wrong))
    assert not failures, f"{len(failures)} records differ; the first: {failures[0]}"


# ---- DeepEyes -------------------------------------------------------------------------------------------------------


def deepeyes_by_formula(record):
    inputs, kind = record["inputs"], record["function"]
    reading = deepeyes.read_release(inputs["response_text"], kind)
    asked = reading.asks and not (kind == "math" and same_reading(reading.answer, inputs["ground_truth"]))
    right = reading.asks and (verdict(inputs["judge_verdict"]) is True if asked else True)
    got = deepeyes.score(reading, right, deepeyes.MATH_WEIGHTS if kind == "math" else deepeyes.Weights())
    return differences({**got, "answer_text": reading.answer, "judge_called": asked}, record["outputs"])


def deepeyes_by_trajectory(record):
    return by_trajectory(deepeyes.deepeyes, record, kind=record["function"], variant="release")


def by_trajectory(reward, record, **options):
    inputs = record["inputs"]
    trajectory = from_record(inputs)
    assert transcript(trajectory) == inputs["response_text"]
    value = reward([trajectory], judged_by(ScriptedJudge(verdict(inputs["judge_verdict"]))), **options)[0]
    return differences({"total": value}, {"total": record["outputs"]["total"]})


@pytest.mark.parametrize("run", [deepeyes_by_formula, deepeyes_by_trajectory])
def test_deepeyes(run, reference_records):
    every(reference_records("rewards/deepeyes.jsonl"), run)


# ---- DeepEyesV2 -----------------------------------------------------------------------------------------------------


def deepeyes_v2_by_formula(record):
    inputs, kind = record["inputs"], record["function"]
    reading = deepeyes_v2.read(inputs["response_text"], inputs["response_text"], kind, release=True)
    got = deepeyes_v2.score(reading, verdict(inputs["judge_verdict"]) is True, kind)
    return differences({**got, "answer_text": reading.answer, "judge_called": reading.asks}, record["outputs"])


def deepeyes_v2_by_trajectory(record):
    return by_trajectory(deepeyes_v2.deepeyes_v2, record, kind=record["function"], variant="release")


@pytest.mark.parametrize("run", [deepeyes_v2_by_formula, deepeyes_v2_by_trajectory])
def test_deepeyes_v2(run, reference_records):
    every(reference_records("rewards/deepeyes_v2.jsonl"), run)


# ---- Thyme ----------------------------------------------------------------------------------------------------------


def thyme_by_formula(record):
    inputs = record["inputs"]
    reading = thyme.read(inputs["response_text"])
    ruled = bool(reading.answer) and thyme.by_rule(reading.answer, inputs["ground_truth"])
    right = True if ruled else verdict(inputs["result_judge_verdict"])
    got = thyme.score_release(reading, right, verdict(inputs["consistency_judge_verdict"]))
    answered = bool(reading.answer)
    return differences(
        {
            **got,
            "answer_text": reading.answer,
            "result_judge_called": answered and not ruled,
            "consistency_judge_called": answered,
        },
        record["outputs"],
    )


def thyme_by_trajectory(record):
    inputs = record["inputs"]
    judge = ScriptedJudge(verdict(inputs["result_judge_verdict"]), inputs["consistency_reply"][-1])
    value = thyme.thyme([from_record(inputs)], judged_by(judge), variant="release")[0]
    return differences({"total": value}, {"total": record["outputs"]["total"]})


@pytest.mark.parametrize("run", [thyme_by_formula, thyme_by_trajectory])
def test_thyme(run, reference_records):
    every(reference_records("rewards/thyme.jsonl"), run)


# ---- Chain-of-Focus -------------------------------------------------------------------------------------------------


def chain_of_focus_by_formula(record):
    return _focus_group(record) if record["function"] == "group_aware" else _focus_base(record)


def _focus_base(record):
    inputs, outputs = record["inputs"], record["outputs"]
    try:
        reading = chain_of_focus.read(inputs["response_text"], inputs["data_kind"], release=True)
    except UserError:
        return {} if "raises" in outputs else {"raises": ("UserError", None)}
    ruled = inputs["data_kind"] == "math" and reading.asks and same_reading(reading.answer, inputs["ground_truth"])
    asked = reading.asks and not ruled
    got = chain_of_focus.score(reading, ruled or (asked and verdict(inputs["judge_verdict"]) is True))
    return differences({**got, "answer_text": reading.answer, "judge_called": asked}, outputs)


def _focus_group(record):
    inputs = record["inputs"]
    scores, advantages = list(inputs["base_scores"]), list(inputs["base_scores"])
    for group in set(inputs["group"]):
        rows = [i for i, name in enumerate(inputs["group"]) if name == group]
        new = chain_of_focus.replaced(
            [inputs["tool_calls"][i] > 0 for i in rows], [inputs["base_scores"][i] for i in rows], alone_keeps=True
        )
        for row, score, advantage in zip(rows, new, chain_of_focus.advantages(new), strict=True):
            scores[row], advantages[row] = score, advantage
    return differences({"total": scores}, {"total": record["outputs"]["total"]}) | differences(
        {"advantage": advantages}, {"advantage": record["outputs"]["advantage"]}, 1e-3
    )


def chain_of_focus_by_trajectory(record):
    inputs, outputs = record["inputs"], record["outputs"]
    if record["function"] == "base":
        try:
            return by_trajectory(
                chain_of_focus.chain_of_focus_base, record, data_kind=inputs["data_kind"], variant="release"
            )
        except UserError:
            return {} if "raises" in outputs else {"raises": ("UserError", None)}
    if inputs["response_texts"] is None:
        return {}
    # The judge finds right what scored above one half; a stray tag spoils the format where the score has none.
    spoiled = [
        text if round(score * 10) in (1, 10) else text + "</think>"
        for text, score in zip(inputs["response_texts"], inputs["base_scores"], strict=True)
    ]
    names = sorted(set(inputs["group"]))
    trajectories = [
        from_record({"response_text": text, "ground_truth": "x"}, names.index(group), i)
        for i, (text, group) in enumerate(zip(spoiled, inputs["group"], strict=True))
    ]
    judge = ScriptedJudge()
    judge.agrees = lambda checks: [score > 0.5 for _, score in zip(checks, inputs["base_scores"], strict=True)]
    base = chain_of_focus.chain_of_focus_base(trajectories, judged_by(judge), variant="release")
    values = chain_of_focus.chain_of_focus(trajectories, judged_by(judge), variant="release")
    return differences({"base": base, "total": values}, {"base": inputs["base_scores"], "total": outputs["total"]})


@pytest.mark.parametrize("run", [chain_of_focus_by_formula, chain_of_focus_by_trajectory])
def test_chain_of_focus(run, reference_records):
    every(reference_records("rewards/chain_of_focus.jsonl"), run)


# ---- Pixel Reasoner -------------------------------------------------------------------------------------------------


def pixel_reasoner_by_formula(record):
    inputs, outputs = record["inputs"], record["outputs"]
    run = {
        "group_shaping": _official_shaping,
        "answer_check": _official_answer,
        "bonuses": _bonuses,
        "accuracy": _accuracy,
    }[record["function"]]
    return run(inputs, outputs)


def _official_shaping(inputs, outputs):
    groups = pixel_reasoner.shape_official(
        [
            [pixel_reasoner.Sample(s["correct"], s["tool_calls"], s["is_video"], s["last_call_failed"]) for s in group]
            for group in inputs["groups"]
        ]
    )
    got = {key: [[row[key] for row in group.samples] for group in groups] for key in ("total", "curiosity", "penalty")}
    got |= {
        key: [float(getattr(group, key)) for group in groups]
        for key in ("difficulty_label", "solved_without_tool", "uniform")
    }
    return differences(got, outputs)


def _official_answer(inputs, outputs):
    try:
        total = pixel_reasoner.accuracy_official(inputs["response_text"], inputs["ground_truth"])
    except ValueError:
        return {} if outputs.get("raises") == "ValueError" else {"raises": ("ValueError", None)}
    return differences({"total": total, "ended": pixel_reasoner.ended(inputs["response_text"])}, outputs)


def _bonuses(inputs, outputs):
    rows = []
    for sample in inputs["samples"]:
        if "calls" not in sample:  # nothing logged for anybody: the bonuses are off
            rows.append({"total": sample["correct"], "accuracy": sample["correct"], "curiosity": None, "penalty": None})
            continue
        group = [sum(bool(c) for c in s["calls"] or ()) for s in inputs["samples"] if s["group"] == sample["group"]]
        rows.append(
            pixel_reasoner.shaped(
                sample["correct"], sum(bool(c) for c in sample["calls"] or ()), pixel_reasoner.rate_of(group)
            )
        )
    return differences({key: [row[key] for row in rows] for key in outputs}, outputs)


def _accuracy(inputs, outputs):
    return differences(
        {"total": pixel_reasoner.accuracy_verl_tool(inputs["response_text"], inputs["ground_truth"])}, outputs
    )


def pixel_reasoner_by_trajectory(record):
    """The shaping through trajectories that call, fail and answer as the record says."""
    inputs, outputs = record["inputs"], record["outputs"]
    if record["function"] == "group_shaping":
        rows = [
            _shaped(sample["correct"], [True] * sample["tool_calls"], group, sample)
            for group, members in enumerate(inputs["groups"])
            for sample in members
        ]
        values = pixel_reasoner.pixel_reasoner(rows, variant="release_official")
        return differences({"total": values}, {"total": [v for group in outputs["total"] for v in group]})
    if record["function"] == "bonuses" and all("calls" in sample for sample in inputs["samples"]):
        rows = [_shaped(s["correct"], s["calls"] or [], s["group"], {}) for s in inputs["samples"]]
        values = pixel_reasoner.pixel_reasoner(rows, variant="release_verl_tool")
        return differences({"total": values}, {"total": outputs["total"]})
    return {}


def _shaped(correct, calls, group, sample):
    # An empty box is what the official release cannot read (-1); verl-tool has 1 and 0 only.
    text = {1: "\\boxed{7}", 0: "\\boxed{8}", -1: "\\boxed{}"}[int(correct)]
    segments = []
    for place, works in enumerate(calls):
        failed = not works or (sample.get("last_call_failed") and place == len(calls) - 1)
        segments += [say("<tool_call>{}</tool_call>"), tool("Execution error" if failed else "here it is")]
    trajectory = from_record(
        {"response_text": text, "ground_truth": "7"}, group, record={"is_video": bool(sample.get("is_video"))}
    )
    trajectory.segments[1:1] = segments
    return trajectory


@pytest.mark.parametrize("run", [pixel_reasoner_by_formula, pixel_reasoner_by_trajectory])
def test_pixel_reasoner(run, reference_records):
    every(reference_records("rewards/pixel_reasoner.jsonl"), run)


# ---- VTool-R1 -------------------------------------------------------------------------------------------------------


def vtool_r1_by_formula(record):
    inputs, outputs = record["inputs"], record["outputs"]
    if record["function"] == "rule_similarity":
        answer = vtool_r1.answer_v1(inputs["response_text"])
        return differences({"total": vtool_r1.similarity_release(answer, inputs["ground_truth"])}, outputs)
    if record["variant"] == "release_v2":
        right = verdict(inputs["judge_verdict"]) is True
        return differences({"total": right, "answer_text": vtool_r1.answer_v2(inputs["response_text"])}, outputs)
    answers = [vtool_r1.answer_v1(s["response_text"]) for s in inputs["samples"]]
    right = [
        a is not None and verdict(s["judge_verdict"]) is True for a, s in zip(answers, inputs["samples"], strict=True)
    ]
    return differences(
        {"total": right, "accuracy": right, "answer_text": answers, "judge_called": [a is not None for a in answers]},
        outputs,
    )


def vtool_r1_by_trajectory(record):
    inputs, outputs = record["inputs"], record["outputs"]
    if record["function"] == "rule_similarity":
        got = vtool_r1.vtool_r1_similarity([from_record(inputs)], variant="release_v1")
        return differences({"total": got[0]}, {"total": outputs["total"]})
    samples = inputs["samples"] if record["variant"] == "release_v1" else [{"ground_truth": "x", **inputs}]
    values = [
        vtool_r1.vtool_r1(
            [from_record(s)], judged_by(ScriptedJudge(verdict(s["judge_verdict"]))), variant=record["variant"]
        )[0]
        for s in samples
    ]
    expected = outputs["total"] if record["variant"] == "release_v1" else [outputs["total"]]
    return differences({"total": values}, {"total": expected})


@pytest.mark.parametrize("run", [vtool_r1_by_formula, vtool_r1_by_trajectory])
def test_vtool_r1(run, reference_records):
    every(reference_records("rewards/vtool_r1.jsonl"), run)
