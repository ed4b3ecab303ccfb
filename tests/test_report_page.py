"""The report: what a run's folder holds, on one page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from evals.heldout import Heldout, PromptScore
from evals.kept import Evaluated, keep
from record.store import save_trajectories
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory
from runtime.errors import UserError
from runtime.files import write_whole
from underdrawing.evaluations import compare_evaluations
from underdrawing.report.page import ReportData, _pairs, _tagged, render, report_data, write_page, write_report


def measured(prompt: str, final: float, first: float) -> PromptScore:
    return PromptScore(prompt, "colors", {"final_image": final, "first_sketch": first})


def thought(member: int, tag: str, word: str) -> Trajectory:
    image = np.full((8, 8, 3), 200, np.uint8)
    segments = [
        Segment("prompt", Author.USER, Modality.TEXT, False, text="a red circle"),
        Segment(
            "plan",
            Author.POLICY,
            Modality.TEXT,
            True,
            ids=np.arange(3, dtype=np.int32),
            text=f"<ins>draw {word}</ins><des>red circle</des>",
        ),
        Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, ids=np.arange(4, dtype=np.int32), image=image),
    ]
    return Trajectory(
        "a red circle",
        {"tag": tag},
        "strokes",
        segments,
        group=member,
        member=0,
        stop=StopReason.MAX_TOKENS,
        rewards={"detect": 1.0, "critique": None},
        reward=0.75,
        segment_rewards={"images": {2: 1.0}},
        advantage_S=np.array([0.0, 0.5, -1.25], np.float32),
    )


def test_a_filmstrip_shows_every_segment_with_its_advantage_and_credit() -> None:
    page = render(ReportData("run", "", sampled=[(10, [thought(0, "colors", "boldly")])]))
    assert "draw boldly" in page and "&lt;ins&gt;" not in page  # tags are labels, not text
    assert "+0.50" in page and "-1.25" in page  # advantages by segment
    assert "images +1.00" in page  # what was credited to the image
    assert "stopped: max tokens" in page
    assert "data:image/png;base64," in page
    assert page.count('class="frame ') == 2  # the prompt is the heading, not a frame
    assert "critique <b>–</b>" in page  # not judged is not 0


def test_a_fork_is_shown_as_a_branch_of_its_parent() -> None:
    parent, child = thought(0, "colors", "boldly"), thought(0, "colors", "boldly")
    child.member, child.parent, child.segments[1].trained = 5, (2, 2), False
    page = render(ReportData("run", "", sampled=[(10, [parent, child])]))
    assert page.count("continues member 2 after segment 1") == 1
    assert page.count('policy inherited"') == 1 and page.count('class="frame ') == 4  # the plan is the parent's
    assert page.count("+0.50") == 1 and page.count("-1.25") == 2  # and so is its advantage
    child.info["parent_group"] = 7
    assert "continues member 2 of group 7 after segment 1" in render(ReportData("run", "", sampled=[(10, [child])]))


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
    rows = [
        {"step": 1, "reward/mean": 0.1},
        {"step": 2, "alarm/diversity": 0.0, "alarm/diversity/value": 0.9},
        {"step": 3, "alarm/diversity": 1.0, "alarm/diversity/value": 0.2, "alarm/unjudged": 0.0},
        {"step": 4, "alarm/diversity": 1.0, "alarm/diversity/value": 0.1, "alarm/unjudged": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = report_data(tmp_path)
    assert data.notes == ["The alarm 'diversity' was first raised at step 3 at 0.2, and stood in 2 of 4 steps."]
    assert "was first raised at step 3" in render(data) and "<h2>Alarms</h2>" in render(data)


def test_tool_calls_and_candidates_have_curves() -> None:
    rows = [
        {"step": n, "rollout/tools/calls": 8.0, "rollout/tools/errors": 2.0, "forks/reward/mean": 0.5} for n in (1, 2)
    ]
    page = render(ReportData("run", "", metrics=rows))
    assert "Tool calls a step" in page and "rollout/tools/errors" in page and "Reward of candidates" in page


def test_a_warm_start_alone_shows_its_loss(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    rows = [{"step": step, "sft/loss_text": 4.0 / step, "sft/loss_image": 2.0} for step in (5, 10)]
    (tmp_path / "sft/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = report_data(tmp_path)
    assert data.subtitle == "a warm start of 10 steps, and no GRPO yet" and list(data.metrics) == rows
    page = render(data)
    assert "Warm-start loss, nats" in page and "sft/loss_text" in page and data.subtitle in page


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        report_data(tmp_path)


@pytest.mark.parametrize(
    "name, advice",
    [
        ("grpo/summary.json", "evaluate those weights again with --label grpo"),
        ("comparison.json", "remove it, and the report does without"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"score": 0.5, "by_',
        "[]",
        "null",
        "{}",
        '{"interval": 3}',
        '{"interval": [1]}',
        '{"score": "high", "by_tag": {}, "prompts": 3, "interval": ["low", "high"]}',
        '{"score": 0.5, "by_tag": [], "prompts": 3}',
        '{"score": 0.5, "by_tag": {}, "prompts": Infinity}',
        "\xff",
    ],
)
def test_a_damaged_evaluation_is_named_with_what_to_do(tmp_path: Path, name: str, advice: str, text: str) -> None:
    write_run(tmp_path, ["colors"])
    path = tmp_path / "evaluations" / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as raised:
        report_data(tmp_path)
    assert str(raised.value).startswith(f"{path}: cannot be read, it may be cut or altered (")
    assert advice in str(raised.value) and raised.value.exit_code == 2


@pytest.mark.parametrize(
    "samples, words",
    [(None, "4 held-out prompts."), (1, "4 held-out prompts."), (3, "4 held-out prompts, 3 answers each.")],
)
def test_the_report_says_how_many_answers_a_score_is_of(tmp_path: Path, samples: int | None, words: str) -> None:
    write_run(tmp_path, ["colors"])
    path = tmp_path / "evaluations/grpo/summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary if samples is None else summary | {"samples": samples}))
    assert words in render(report_data(tmp_path))


def test_an_evaluation_is_kept_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "evaluations"
    for label, score in (("warm_start", 0.0), ("grpo", 1.0)):
        scores = [measured(f"prompt {i}", score, score) for i in range(3)]
        heldout = Heldout(scores, [[thought(i, "colors", "well")] * 2 for i in range(3)], {}, "final_image")
        keep(heldout, folder / label, Evaluated({"samples": 2}))
    compare_evaluations(tmp_path, "warm_start", "grpo")
    data = report_data(tmp_path)
    assert data.after is not None and (data.after.score, data.after.samples) == (1.0, 2)
    assert data.interval == (1.0, 1.0)

    def breaks(descriptor: int) -> None:  # the text is written by then
        raise OSError(28, "No space left on device")

    files = [folder / "grpo/summary.json", folder / "comparison.json"]
    before = [file.read_text() for file in files]
    monkeypatch.setattr("runtime.files.flush", lambda folder: None)
    monkeypatch.setattr("runtime.files.flush_one", lambda path: None)
    monkeypatch.setattr(os, "fsync", breaks)
    nothing = Heldout([measured("a prompt", 0.0, 0.0)], [[thought(0, "colors", "well")]], {}, "final_image")
    for write in (
        lambda: keep(nothing, folder / "grpo", Evaluated({})),
        lambda: compare_evaluations(tmp_path, "grpo", "grpo"),
    ):
        with pytest.raises(UserError, match=r"\(No space left on device\); free some space, or choose another folder$"):
            write()
    assert [file.read_text() for file in files] == before


def test_a_page_that_cannot_be_written_says_what_mends_it(tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.mkdir()
    with pytest.raises(UserError, match=f"^{page}: a folder; give the page's file, such as {page}/report.html$"):
        write_page("<html>", page)
    with pytest.raises(UserError, match=r"^/proc/x.html: cannot be written \([\w ]+\); choose another folder$"):
        write_page("<html>", Path("/proc/x.html"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page.html: cannot be written \(File exists\); choose another folder$"):
        write_page("<html>", tmp_path / "file/page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "page"]


def test_text_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "page", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_the_report_lists_all_evaluations_and_compares_those_that_compare(tmp_path: Path) -> None:
    heldout = Heldout([measured("a prompt", 0.5, 0.25)], [[thought(0, "colors", "well")]], {}, "final_image")
    sampled = {"samples": 1, "temperature": 1.0, "prompts": "abc"}
    for label, step, settings in (
        ("warm_start", 0, sampled),
        ("warm_start-temperature-0", 0, {**sampled, "temperature": 0.0}),
        ("training-000020", 20, sampled),
        ("step-000040", 40, sampled),
        ("step-000040-temperature-0", 40, {**sampled, "temperature": 0.0}),
    ):
        keep(heldout, tmp_path / "evaluations" / label, Evaluated(settings, step=step), answers=1)
    compare_evaluations(tmp_path, "warm_start", "step-000040")
    data = report_data(tmp_path)
    assert [e.label for e in data.evaluations] == [
        "warm_start",
        "warm_start-temperature-0",
        "training-000020",
        "step-000040",
        "step-000040-temperature-0",
    ]
    # The last one and the first that was sampled as it was; the interval that is there is that of two others.
    assert data.before is not None and data.after is not None
    assert (data.before.label, data.after.label) == ("warm_start-temperature-0", "step-000040-temperature-0")
    assert data.interval is None
    page = render(data)
    assert page.count("<tr>") == 6 and "<td>step-000040-temperature-0</td><td>40</td><td>0.500</td>" in page


def write_run(folder: Path, tags: list[str]) -> None:
    for label, score in (("warm_start", 0.25), ("grpo", 0.5)):
        evaluation = folder / "evaluations" / label
        evaluation.mkdir(parents=True)
        (evaluation / "summary.json").write_text(
            json.dumps(
                {"score": score, "by_tag": {"colors": score}, "first_sketch": 0.2, "final_image": score, "prompts": 4}
            )
        )
        save_trajectories([thought(i, tag, "well") for i, tag in enumerate(tags)], evaluation / "trajectories")
    (folder / "evaluations" / "comparison.json").write_text(json.dumps({"interval": [0.1, 0.3]}))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "reward/mean": step / 10}) + "\n" for step in range(1, 6))
    )
