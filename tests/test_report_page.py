"""The report: what a run's folder holds, on one page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rollout.errors import UserError
from rollout.store import save_trajectories
from rollout.trajectory import Author, Modality, Segment, StopReason, Trajectory
from underdrawing.report.page import ReportData, _pairs, _tagged, render, report_data, write_report


def thought(member: int, tag: str, word: str) -> Trajectory:
    picture = np.full((8, 8, 3), 200, np.uint8)
    segments = [
        Segment("prompt", Author.USER, Modality.TEXT, False, text="a red circle"),
        Segment("plan", Author.POLICY, Modality.TEXT, True, ids=np.arange(3, dtype=np.int32),
                text=f"<ins>draw {word}</ins><des>red circle</des>"),
        Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, ids=np.arange(4, dtype=np.int32),
                picture=picture),
    ]
    return Trajectory("a red circle", {"tag": tag}, "strokes", segments, group=member, member=0,
                      stop=StopReason.MAX_TOKENS, rewards={"detect": 1.0, "critique": None}, reward=0.75,
                      segment_rewards={"pictures": {2: 1.0}}, advantage_S=np.array([0.0, 0.5, -1.25], np.float32))


def test_a_filmstrip_shows_every_segment_with_its_advantage_and_credit() -> None:
    page = render(ReportData("run", "", sampled=[(10, [thought(0, "colors", "boldly")])]))
    assert "draw boldly" in page and "&lt;ins&gt;" not in page  # tags are labels, not text
    assert "+0.50" in page and "-1.25" in page  # advantages by segment
    assert "pictures +1.00" in page  # what was credited to the picture
    assert "stopped: max tokens" in page
    assert "data:image/png;base64," in page
    assert page.count('class="frame ') == 2  # the prompt is the heading, not a frame
    assert "critique <b>–</b>" in page  # not judged is not 0


def test_words_from_a_policy_cannot_write_html() -> None:
    page = render(ReportData("run", "", sampled=[(1, [thought(0, "colors", "<script>alert(1)</script>")])]))
    assert "<script>" not in page


def test_text_by_its_tags() -> None:
    assert _tagged("<ins>a</ins><des>b c</des>") == [("ins", "a"), ("des", "b c")]
    assert _tagged("stray <ins>a</ins> left <des>open") == [("", "stray"), ("ins", "a"), ("", "left <des>open")]


def test_before_and_after_show_the_same_prompts_with_the_tags_in_turn(tmp_path: Path) -> None:
    tags = ["colors", "colors", "counting", "position"]
    write_run(tmp_path, tags)
    data = report_data(tmp_path)
    assert data.before is not None and data.after is not None
    assert (data.before.label, data.after.label) == ("warm_start", "grpo")
    pairs = _pairs(data.before, data.after, most=3)
    assert [after.record["tag"] for _, after in pairs] == ["colors", "counting", "position"]
    assert all(before.key == after.key for before, after in pairs)
    assert data.interval == (0.1, 0.3)
    page = write_report(data, tmp_path / "report.html").read_text()
    assert "0.250" in page and "0.500" in page and "+0.250" in page and "95% interval +0.100 to +0.300" in page
    assert page.count("<svg") >= 2  # bars by tag, and the reward's curve


def test_alarms_that_were_raised_are_told(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward/mean": 0.1}, {"step": 2, "alarm/diversity": 0.0, "alarm/diversity/value": 0.9},
            {"step": 3, "alarm/diversity": 1.0, "alarm/diversity/value": 0.2, "alarm/unjudged": 0.0},
            {"step": 4, "alarm/diversity": 1.0, "alarm/diversity/value": 0.1, "alarm/unjudged": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = report_data(tmp_path)
    assert data.notes == ["The alarm 'diversity' was first raised at step 3 at 0.2, and stood in 2 of 4 steps."]
    assert "was first raised at step 3" in render(data) and "<h2>Alarms</h2>" in render(data)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        report_data(tmp_path)


def write_run(folder: Path, tags: list[str]) -> None:
    for label, score in (("warm_start", 0.25), ("grpo", 0.5)):
        evaluation = folder / "evaluations" / label
        evaluation.mkdir(parents=True)
        (evaluation / "summary.json").write_text(json.dumps({
            "score": score, "by_tag": {"colors": score}, "first_sketch": 0.2, "final_image": score, "prompts": 4}))
        save_trajectories([thought(i, tag, "well") for i, tag in enumerate(tags)], evaluation / "trajectories")
    (folder / "evaluations" / "comparison.json").write_text(json.dumps({"interval": [0.1, 0.3]}))
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "reward/mean": step / 10}) + "\n" for step in range(1, 6)))
