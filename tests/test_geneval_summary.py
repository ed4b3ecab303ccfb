"""GenEval's numbers from its rows: parity with the released summary, and by hand."""

from __future__ import annotations

import pytest

from evals.geneval_folder import lines_of
from evals.geneval_summary import summarise
from evals.heldout import EvaluationError


def rows_of(inputs, folder):
    """The rows that a record describes, read as a file of results is."""
    if "lines" in inputs:
        path = folder / "rows.jsonl"
        path.write_text("".join(line + "\n" for line in inputs["lines"]))
        return [row for _, row in lines_of(path)]
    return [
        {"tag": tag, "correct": correct, "metadata": metadata}
        for number, correct in inputs["rows"]
        for tag, metadata in [inputs["prompts"][number]]
    ]


@pytest.mark.parity
def test_equals_the_released_summary(reference_records, tmp_path):
    for number, record in enumerate(reference_records("evals/geneval_summary/cases.jsonl")):
        expected, where = record["outputs"], (number, record["note"])
        if "raises" in expected:
            with pytest.raises(EvaluationError):
                summarise(rows_of(record["inputs"], tmp_path))
            continue
        rows = rows_of(record["inputs"], tmp_path)
        summary = summarise(rows)
        assert (summary.num_images, summary.num_prompts) == (expected["total_images"], expected["total_prompts"]), where
        assert f"{summary.images:.2%}" == expected["correct_images"], where
        assert f"{summary.prompts:.2%}" == expected["correct_prompts"], where
        assert summary.overall == pytest.approx(expected["overall_exact"], abs=1e-12), where
        assert f"{summary.overall:.5f}" == expected["overall"], where
        assert set(summary.tags) == {task["tag"] for task in expected["tasks"]}, where
        for task, score in zip(expected["tasks"], expected["task_scores"], strict=True):
            tag = task["tag"]
            correct, judged = summary.counts[tag]
            assert summary.tags[tag] == pytest.approx(score, abs=1e-12), where
            assert f"{summary.tags[tag]:.2%}" == task["share"] and correct == pytest.approx(float(task["correct"])), (
                where
            )
            # The release counts an image without a verdict among those of its tag; it is in no mean.
            silent = sum(row["tag"] == tag and row.get("correct") is None for row in rows)
            assert judged + silent == task["images"], where
        assert summary.unjudged == sum(row.get("correct") is None for row in rows), where


def test_by_hand():
    rows = [
        {"tag": tag, "metadata": str(prompt), "correct": bool(correct)}
        for prompt, (tag, answers) in enumerate([("colors", (1, 0)), ("colors", (0, 0)), ("counting", (1, 1))])
        for correct in answers
    ]
    summary = summarise(rows)
    assert summary.tags == {"counting": 1.0, "colors": 0.25} and list(summary.tags) == ["counting", "colors"]
    assert summary.counts == {"counting": (2, 2), "colors": (1, 4)}
    assert summary.overall == 0.625  # not 3 of 6: tags weigh the same
    assert summary.images == 0.5 and summary.prompts == pytest.approx(2 / 3)
    assert not summary.incomplete and summarise(rows, 4).incomplete and not summarise(rows, 3).incomplete


def test_an_image_without_a_verdict_is_in_no_mean_and_counted():
    rows = [{"tag": "colors", "metadata": "a", "correct": correct} for correct in (True, None, None, False)]
    summary = summarise(rows)
    assert summary.tags == {"colors": 0.5} and summary.images == 0.5 and summary.counts == {"colors": (1, 2)}
    assert (summary.num_images, summary.unjudged) == (4, 2) and summary.as_json()["unjudged"] == 2
    rows.append({"tag": "position", "metadata": "b", "correct": None})
    with pytest.raises(EvaluationError, match="no image of the tag 'position' was judged"):
        summarise(rows)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"correct": "yes"}, "result row 2 has correct 'yes'; it is true, false or a share"),
        ({"correct": float("nan")}, "result row 2 has correct nan; it is true, false or a share"),
        ({"tag": 3}, "result row 2 has tag 3; it is a text"),
        ({"metadata": {"tag": "colors"}}, "result row 2 has metadata .*; it is the record as a text"),
    ],
)
def test_a_row_of_another_kind_is_named(more, message):
    good = {"tag": "colors", "correct": True, "metadata": "a"}
    with pytest.raises(EvaluationError, match=message):
        summarise([good, {**good, **more}])
    for key in good:
        with pytest.raises(EvaluationError, match=f"no result row has '{key}'"):
            summarise([{name: value for name, value in good.items() if name != key}] * 2)
    with pytest.raises(EvaluationError, match="no images"):
        summarise([])
