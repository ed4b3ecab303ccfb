"""Every record that the releases of VRAG-RL, Visual-ARFT, OpenThinkIMG and VisTA computed, through our release form.

Records with a known bug are run like the others, and those on which a release stops must stop ours with the same error.
"""

from __future__ import annotations

import pytest
from rewards_helpers import text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardContext
from rewards.functions.overlap import ndcg
from rewards.functions.text import transcript
from rewards.judge.base import Reply
from rewards.published import openthinkimg, vista, visual_arft, vrag

SYSTEMS = ("vrag", "visual_arft", "openthinkimg", "vista")

pytestmark = pytest.mark.parity


def vrag_outputs(function, inputs):
    if function == "ndcg":
        return {"total": ndcg(inputs["retrieved"], inputs["relevant"], repeats=True)}
    rows = {"total": [], "format": [], "ndcg": [], "judge_called": [], "answer_text": []}
    for sample in inputs["samples"]:
        reading = vrag.read_release(sample["response_text"])
        names = vrag.reference_names(sample["file_name"], sample["reference_pages"])
        ranking = (
            ndcg([vrag.page_name(path) for path in sample["retrieved"]], names, repeats=True)
            if reading.well_formed and function == "train"
            else None
        )
        score = vrag.score(reading, bool(sample["judge_verdict"]), ranking, function)
        for key, value in {
            "total": score["total"],
            "format": score["format"],
            "ndcg": ranking,
            "judge_called": reading.well_formed,
            "answer_text": reading.answer,
        }.items():
            rows[key].append(value)
    return rows


def visual_arft_outputs(function, inputs, variant):
    if function == "f1":
        return {"total": visual_arft.f1_release(inputs["prediction"], inputs["ground_truth"])}
    asked = []

    def similarity(said, wanted):
        asked.append((said, wanted))
        return inputs["similarity"]

    task = variant.removeprefix("release_")
    return {
        **visual_arft.score_release(inputs["response_text"], inputs["ground_truth"], task, similarity),
        "similarity_asked": bool(asked),
    }


def openthinkimg_outputs(function, inputs):
    if function == "single_turn":
        found = {"format": openthinkimg.format_release(None, inputs["response_text"])}
        try:
            openthinkimg.accuracy_release(None, "")
        except TypeError:
            found["raises"] = "TypeError"
        return found
    accuracy = openthinkimg.accuracy_release(inputs["turns"], inputs["ground_truth"])
    return {"total": accuracy, "accuracy": accuracy, "format": openthinkimg.format_release(inputs["turns"])}


def vista_outputs(function, inputs):
    if function == "relaxed_match":
        return {"total": float(vista.relaxed_match_release(inputs["prediction"], inputs["ground_truth"]))}
    tools = vista.read_tools_release(inputs["response_text"])
    if function == "tool_ids":
        return {"tools": tools, "format": 0.0}
    try:
        found = vista.score_release(
            inputs["answer_without_tools"],
            inputs["answer_with_tools"],
            inputs["ground_truth"],
            inputs["question_matches"],
        )
    except KeyError:
        return {"raises": "KeyError"}
    return {"tools": tools, **found}


def outputs(record):
    function, inputs = record["function"], record["inputs"]
    if record["system"] == "visual_arft":
        return visual_arft_outputs(function, inputs, record["variant"])
    return {"vrag": vrag_outputs, "openthinkimg": openthinkimg_outputs, "vista": vista_outputs}[record["system"]](
        function, inputs
    )


def close(found, expected):
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, float) and not isinstance(found, str | None):
        return found == pytest.approx(expected, abs=1e-4)
    return found == expected


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_record_of_the_release(system, reference_records):
    rows = reference_records(f"rewards/{system}.jsonl")
    wrong = []
    for number, record in enumerate(rows):
        found = outputs(record)
        # every output that the record states, and none of ours on which it stops
        bad = [key for key, value in record["outputs"].items() if key not in found or not close(found[key], value)]
        if bad or ("raises" in record["outputs"]) != ("raises" in found):
            wrong.append((number, record["function"], bad, record["outputs"], found))
    assert not wrong, f"{len(wrong)} of {len(rows)}: {wrong[:3]}"


# ---- the same records as thoughts, through the reward functions -----------------------------------------------------


class Judge:
    """Gives the record's verdict; as a frozen model it fails."""

    def __init__(self, verdict=None):
        self.verdict = verdict

    def agrees(self, checks):
        return [None if self.verdict is None else bool(self.verdict) for _ in checks]

    def ask(self, questions):
        return [Reply(None, "timeout", "no reply") for _ in questions]


def vrag_thought(sample):
    """The release's string, cut into segments of the policy and of the environment."""
    parts, rest = [], sample["response_text"]
    for turn in sample["turns"]:
        before, rest = rest.split(turn["text"], 1) if turn["text"] else ("", rest)
        own = turn["role"] == "assistant"
        parts += [text("glue", before, Author.ENVIRONMENT)] if before else []
        parts.append(
            text("answer" if own else "observation", turn["text"], Author.POLICY if own else Author.ENVIRONMENT)
        )
    made = trajectory_of(
        {**{key: sample[key] for key in ("question", "ground_truth", "file_name", "reference_pages")}},
        *parts,
        *([text("glue", rest, Author.ENVIRONMENT)] if rest else []),
    )
    made.info["retrieved"] = sample["retrieved"]
    assert transcript(made) == sample["response_text"].removeprefix(
        "" if parts[0].author is Author.POLICY else parts[0].text
    )
    return made


def rewarded(record):
    """(found, expected) totals of the reward function over thoughts; None where a record is no whole reward."""
    function, inputs, expected = record["function"], record["inputs"], record["outputs"].get("total")
    system, silent = record["system"], RewardContext(judge=Judge())
    if system == "vrag" and function != "ndcg":
        found = [
            vrag.vrag(
                [vrag_thought(s)],
                RewardContext(judge=Judge(s["judge_verdict"])),
                mode=function,
                variant="release",
            )[0]
            for s in inputs["samples"]
        ]
        return found, expected
    if system == "visual_arft" and function != "f1":
        task = record["variant"].removeprefix("release_")
        row = trajectory_of({"ground_truth": inputs["ground_truth"]}, text("answer", inputs["response_text"]))
        return visual_arft.visual_arft([row], task=task, variant="release")[0], expected
    if system == "openthinkimg" and function == "trajectory":
        glue = text("observation", "OBSERVATION", Author.ENVIRONMENT)
        parts = [part for turn in inputs["turns"] for part in (text("answer", turn), glue)]
        row = trajectory_of({"ground_truth": inputs["ground_truth"]}, *parts[:-1])
        return openthinkimg.openthinkimg([row], variant="release")[0], expected
    if system == "vista" and function == "tool_gain" and expected is not None:
        picked = ",".join(map(str, sorted(record["outputs"]["tools"] or [])))
        row = trajectory_of(
            {
                "ground_truth": inputs["ground_truth"],
                "answer_without_tools": inputs["answer_without_tools"],
                "answers_with_tools": {picked: inputs["answer_with_tools"]},
            },
            text("answer", inputs["response_text"]),
        )
        return vista.vista([row], silent, variant="release")[0], expected
    return None


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_record_through_the_reward_over_thoughts(system, monkeypatch, reference_records):
    compared = wrong = 0
    for record in reference_records(f"rewards/{system}.jsonl"):
        cosine = record["inputs"].get("similarity")
        monkeypatch.setattr(visual_arft, "sentence_encoder", lambda *_, c=cosine: FixedCosine(c))
        pair = rewarded(record)
        if pair is not None:
            compared, wrong = compared + 1, wrong + (not close(*pair))
    assert compared and not wrong


class FixedCosine:
    def __init__(self, cosine):
        self.cosine = cosine

    def similarities(self, pairs):
        return [self.cosine for _ in pairs]


def test_the_repaired_forms_differ_where_the_releases_are_wrong(reference_records):
    """A guard against a repaired form that is the release under another name: on records with a known bug they part."""

    def wrong(system, function):
        rows = reference_records(f"rewards/{system}.jsonl")
        return [record["inputs"] for record in rows if record["known_bug"] and record["function"] == function]

    bugs = wrong("vrag", "ndcg")
    assert all(ndcg(i["retrieved"], i["relevant"]) < ndcg(i["retrieved"], i["relevant"], repeats=True) for i in bugs)
    bugs = wrong("visual_arft", "code")
    assert all(visual_arft.accuracy(i["response_text"], i["ground_truth"], "code") in (None, 0) for i in bugs)
    for i in wrong("openthinkimg", "trajectory"):
        said = openthinkimg.answer_in(i["turns"][-1])
        assert said is not None and f'"ans": "{said}"' in i["turns"][-1]
