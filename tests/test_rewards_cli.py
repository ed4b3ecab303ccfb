"""`underdrawing rewards list | explain | check | try`, and what each says of bad input."""

from __future__ import annotations

import json
import re
import socket
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from judge_server import Answer, JudgeServer
from PIL import Image
from rewards_helpers import from_parts, text, trajectory_of

from record.store import load_trajectories, save_trajectories
from rewards.manager import RewardManager
from rewards.registry import REWARDS
from tasks.registry import get_task
from training.tracking import Tracker
from underdrawing import build
from underdrawing.cli import main
from underdrawing.recipe import load_recipe
from underdrawing.report.trial import BINS, histogram, row_of, seen_of
from underdrawing.trial import spread

ROOT = Path(__file__).parent.parent
PARTS = {
    "right": {"function": "geneval"},
    "share": {"function": "geneval", "options": {"mode": "graded"}},
    "exact": {"function": "geneval", "options": {"mode": "strict"}, "log_only": True},
}


def recipe(folder, total="right + 0.5 * share", parts=None, **rewards):
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "mine",
                "policy": {},
                "task": {"name": "shapes"},
                "format": {"name": "strokes"},
                "rewards": {"parts": PARTS if parts is None else parts, "total": total, **rewards},
            }
        )
    )
    return str(path)


def said(capsys, *arguments, code=0):
    """Output of a command that ends with `code`; words in one line, as tables and terminals wrap them."""
    assert main([str(a) for a in arguments]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return re.sub(r"\s+", " ", err if code else out)


# ---- list and explain -------------------------------------------------------------------------------------------


def test_list_names_every_reward(capsys):
    out = said(capsys, "rewards", "list")
    assert all(f" {name} " in out for name in REWARDS) and f"{len(REWARDS)} rewards." in out


@pytest.mark.parametrize("name", REWARDS)
def test_explain_tells_all_of_a_reward(capsys, name):
    reward, out = REWARDS[name], said(capsys, "rewards", "explain", name)
    assert reward.formula and reward.source and reward.inputs
    for words in (reward.formula, reward.source, f"reads {reward.inputs}", reward.differs):
        assert re.sub(r"\s+", " ", words)[:40] in out
    assert ("a detector" in out) >= reward.needs_detector and ("a judge (" in out) == reward.needs_judge
    import inspect

    for option, parameter in inspect.signature(reward.load()).parameters.items():
        if option not in ("trajectories", "context", "log_metric", "log_extra", "columns"):
            assert f" {option} {parameter.default!r}"[:25] in out


def test_explain_shows_what_a_literal_may_be_and_brackets_as_they_are(capsys):
    assert "variant 'repaired' repaired, release" in said(capsys, "rewards", "explain", "deepeyes")
    assert "[n > 0]" in said(capsys, "rewards", "explain", "pixel_reasoner")


def test_explain_reads_a_users_own(capsys, tmp_path):
    (tmp_path / "mine.py").write_text('def mine(completions, k=3):\n    """Counts to k."""\n')
    out = said(capsys, "rewards", "explain", f"{tmp_path}/mine.py:mine")
    assert "k 3" in out and "Counts to k." in out and "mine.py:mine" in out


def test_explain_knows_no_other(capsys):
    assert "did you mean 'geneval'?" in said(capsys, "rewards", "explain", "genval", code=2)


# ---- check ------------------------------------------------------------------------------------------------------


def test_check_prints_values_and_verdict(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        def mine(trajectories, level, factor=1, **columns):
            return [None if l is None else float(l * factor * len(t.segments)) for t, l in zip(trajectories, level)]
    """)
    )
    out = said(capsys, "rewards", "check", f"{tmp_path}/mine.py:mine", "--option", "factor=2", "--column", "level=3")
    assert "18 words alone" in out and "keeps the contract" in out


def test_check_ends_with_2_where_something_is_wrong(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(completions, **columns):\n    return [1.0]\n")
    assert main(["rewards", "check", f"{tmp_path}/mine.py:mine"]) == 2
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "problem it returned 1 values for 8 completions" in out and "has 1 problem(s)" in out


def test_check_says_that_a_reward_ends_its_process(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("import sys\ndef mine(completions, **columns):\n    sys.exit(1)\n")
    assert main(["rewards", "check", f"{tmp_path}/mine.py:mine"]) == 2
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "it raises for every thought: SystemExit: 1" in out and "problem(s)" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mine.py:mine"], "mine.py, line 2: '(' was never closed"),
        (["absent.py:mine"], "no file absent.py"),
        (["mine.py"], "name the function too, as 'mine.py:function'"),
        (["geneval"], "'geneval' is one of the toolkit's own"),
        (["good.py:good", "--option", "fast"], "--option 'fast': write it as KEY=VALUE"),
        (["good.py:good", "--option", "fast=1"], "'fast' is no argument of the function"),
        (["good.py:good", "--column", "a=[1"], "--column 'a=[1': the value is not YAML"),
        (["good.py:good", "--trajectories", "nowhere"], "nowhere: there are no trajectories here"),
    ],
)
def test_check_names_bad_input(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def mine(completions):\n    return (1\n")
    Path("good.py").write_text("def good(completions):\n    return [1.0 for _ in completions]\n")
    assert words in said(capsys, "rewards", "check", *arguments, code=2)


# ---- try --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstrations():
    task = get_task("shapes")
    return [
        from_parts(d.record, d.parts, group=n // 2, member=n % 2)
        for n, d in enumerate(task.demonstrations("strokes", 12, seed=3))
    ]


@pytest.fixture
def stored(tmp_path, demonstrations):
    save_trajectories(demonstrations, tmp_path / "stored")
    return tmp_path / "stored"


def test_try_on_thoughts_gives_the_judges_numbers_and_a_page(capsys, tmp_path, stored, demonstrations):
    path = recipe(tmp_path)
    out = said(capsys, "rewards", "try", path, "--trajectories", stored)
    loaded = load_recipe(path)
    with RewardManager(loaded.rewards, build.build_task(loaded), build.build_format(loaded)) as manager:
        metrics = manager.score([demonstrations[n : n + 2] for n in range(0, 12, 2)]).metrics
    for name in ("right", "share", "exact"):
        assert re.search(rf"{name}( \(log-only\))? {metrics[f'reward/{name}']:.3f} ", out)
    assert f"reward {metrics['reward/mean']:.3f} {metrics['reward/std']:.3f}" in out
    assert "reward = right + 0.5 * share" in out
    page = (tmp_path / "stored-rewards.html").read_text()
    images = sum(len(t.images()) for t in demonstrations)
    assert page.count('<div class="pic">') == images and page.count('class="verdict ') == images
    assert page.count('class="box"') >= 12 and "log-only" in page and "http" not in page.split("</style>")[1]
    rows = [json.loads(line) for line in (tmp_path / "stored-rewards.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [t.reward for t in demonstrations]
    assert rows[0]["rewards"] == demonstrations[0].rewards and rows[0]["key"] == "0-0"
    assert rows[0]["said"]["right"]["reason"] == demonstrations[0].info["rewards"]["right"]["reason"]


def test_boxes_stand_where_the_objects_are(demonstrations):
    """A box in percent of the image, cut at its edges."""
    from rewards.detectors.base import Detection

    image = np.zeros((50, 200, 3), np.uint8)
    seen = seen_of(
        image,
        {"cat": [Detection((20, 10, 120, 60), 0.7, "black")], "dog": [Detection((-10, 0, 50, 25), 0.9)]},
        False,
        "expected",
    )
    dog, cat = seen.boxes
    assert (dog.label, dog.left, dog.top, dog.width, dog.height) == ("dog", 0, 0, 25, 50)
    assert (cat.label, cat.left, cat.top, cat.width, cat.height) == ("black cat", 10, 20, 50, 80)
    assert cat.color != dog.color


def test_the_parts_thresholds_hold_for_the_page_too(demonstrations):
    from rewards.detectors.base import CachedDetector, Detection
    from underdrawing.trial import look

    class Dim:
        classes = tuple(get_task("shapes").classes)

        def detect(self, images):
            return [{name: [Detection((0, 0, 9, 9), 0.2, "red")] for name in self.classes} for _ in images]

    shown = [look(demonstrations[:1], CachedDetector(Dim()), limits) for limits in ((0.3, 0.9), (0.1, 0.1))]
    boxes = [sum(len(seen.boxes) for of in found.values() for seen in of.values()) for found in shown]
    assert boxes[0] == 0 and boxes[1] == len(Dim.classes) * len(demonstrations[0].images())


def test_a_detector_with_an_open_vocabulary_of_ones_own(capsys, tmp_path, images, monkeypatch):
    """Named in the recipe; it is asked for what each record names, and colors are named afterwards."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from rewards.detectors.base import Detection

        class Mine:
            classes, open_vocabulary = (), True

            def detect(self, images):
                raise AssertionError("asked without phrases")

            def detect_phrases(self, images, phrases):
                return [{phrase: [Detection((0, 0, 8, 16), 0.95)] for phrase in some} for some in phrases]

            def name_colors(self, images, objects):
                return [["red"] * len(row) for row in objects]
    """)
    )
    path = recipe(tmp_path, detector=f"{tmp_path}/mine.py:Mine")
    said(capsys, "rewards", "try", path, "--images", images)
    page = (images / "rewards.html").read_text()
    record = json.loads((images / "00000" / "metadata.jsonl").read_text())
    names = {clause["class"] for key in ("include", "exclude") for clause in record.get(key, ())}
    first = page.split('<article class="film">')[1]
    assert first.count('class="box"') == 2 * len(names) and all(name in first for name in names)
    assert "left:0.0%;top:0.0%;width:25.0%;height:50.0%" in first


@pytest.mark.parametrize(
    "body, words",
    [
        (
            "def __init__(self): raise ValueError('no weights here')",
            "Mine' cannot be made: ValueError: no weights here at",
        ),
        ("def __init__(self, path): pass", "Mine' cannot be made: TypeError: Mine.__init__() missing 1 required"),
        ("def detect(self): return []", "Mine raises TypeError: Mine.detect() takes 1 positional argument but 2 were"),
        ("def detect(self, images): return [1 / 0]", "Mine raises ZeroDivisionError: division by zero ("),
        (
            "def detect(self, images): return {}",
            "Mine gives {}; it must give a list with one {class: [Detection, ...]}",
        ),
        ("def detect(self, images): return [None for _ in images]", "Mine gives [None"),
        ("def detect(self, images): raise SystemExit(1)", "Mine raises SystemExit: 1 ("),
    ],
)
@pytest.mark.parametrize("rewards", [{}, {"detector_workers": {}}])
def test_what_a_detector_of_ones_own_raises_is_a_sentence(capsys, tmp_path, stored, body, words, rewards):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    classes = ('circle', 'square', 'triangle', 'cross')\n"
        f"    def detect(self, images): return []\n    {body}\n"
    )
    parts = {name: {**part, "retries": 0} for name, part in PARTS.items()}
    path = recipe(tmp_path, parts=parts, detector=f"{tmp_path}/mine.py:Mine", **rewards)
    out = said(capsys, "rewards", "try", path, "--trajectories", stored, code=2)
    assert words in out.split("underdrawing: ")[-1] and f"{tmp_path}/mine.py:Mine" in out
    assert "Traceback" not in out.split("underdrawing: ")[-1]


def test_the_overrides_of_a_recipe_hold(capsys, tmp_path, stored):
    path = recipe(tmp_path)
    out = said(
        capsys,
        "rewards",
        "try",
        path,
        "rewards.total=2 * right",
        "--trajectories",
        stored,
        "--out",
        tmp_path / "out" / "page.html",
        "--most",
        "3",
    )
    assert "reward = 2 * right" in out
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count('<article class="film">') == 3 and "3 of 12" in page
    assert len((tmp_path / "out" / "page.jsonl").read_text().splitlines()) == 12


def images_in(folder, demonstrations, samples=2):
    for index in range(0, len(demonstrations), samples):
        place = folder / f"{index // samples:05d}" / "samples"
        place.mkdir(parents=True)
        (place.parent / "metadata.jsonl").write_text(json.dumps(demonstrations[index].record))
        for number in range(samples):
            Image.fromarray(demonstrations[index + number].images()[-1]).save(place / f"{number:04d}.png")
    return folder


@pytest.fixture
def images(tmp_path, demonstrations):
    return images_in(tmp_path / "images", demonstrations)


def test_try_on_images_judges_each_and_shows_prompts_as_rows(capsys, tmp_path, images, demonstrations):
    out = said(capsys, "rewards", "try", recipe(tmp_path), "--images", images)
    rows = [json.loads(line) for line in (images / "rewards.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[3]["file"] == "00001/samples/0001.png"
    # The first image of each prompt is its own demonstration's, which is right; whatever else, each row adds up.
    assert all(row["rewards"]["right"] == 1 for row in rows[::2])
    assert all(row["reward"] == row["rewards"]["right"] + 0.5 * row["rewards"]["share"] for row in rows)
    right = [row["rewards"]["right"] for row in rows]
    assert f"right {sum(right) / 12:.3f}" in out
    page = (images / "rewards.html").read_text()
    assert page.count('<article class="film">') == 6 and page.count('<div class="pic">') == 12
    assert page.count("verdict right") == sum(right) and page.count("verdict wrong") == 12 - sum(right)
    assert "expected" in page or sum(right) == 12


def test_a_page_of_many_images_shows_every_tag(demonstrations):
    shown = spread(demonstrations, 6)
    assert len(shown) == 6 and {id(t) for t in shown} <= {id(t) for t in demonstrations}
    tags = {t.record["tag"] for t in demonstrations[::2]}
    assert len({t.record["tag"] for t in shown}) >= min(3, len(tags))


def test_a_part_that_judges_nothing_is_a_dash():
    row = row_of("x", [None, None])
    assert (row.mean, row.none, row.histogram) == (None, 1.0, "")
    row = row_of("x", [1.0, None, 0.0, 2.0])
    assert (row.mean, row.least, row.most, row.none) == (1.0, 0.0, 2.0, 0.25)
    assert row.std == pytest.approx(np.std([1, 0, 2]))


def test_a_histogram_counts_everybody():
    bars = re.findall(r'height="([\d.]+)"', histogram([0.0] * 5 + [1.0] * 10 + [0.5]))
    assert [float(bar) for bar in bars] == [14.0, 2.8, 28.0]
    assert histogram([0.3] * 4).count("<rect") == 1
    assert BINS * 10 == 140  # whole px


# ---- bad input --------------------------------------------------------------------------------------------------


def spoil(images, what):
    first = images / "00000"
    if what == "corrupt":
        png = first / "samples" / "0001.png"
        png.write_bytes(png.read_bytes()[:50])
    elif what == "twice":
        Image.open(first / "samples" / "0001.png").save(first / "samples" / "0001.jpg")
    elif what == "missing":
        import shutil

        shutil.rmtree(images / "00003")
    elif what == "color":
        (first / "metadata.jsonl").write_text(
            json.dumps(
                {
                    "tag": "colors",
                    "prompt": "a grey circle",
                    "include": [{"class": "circle", "count": 1, "color": "grey"}],
                }
            )
        )
    elif what == "class":
        (first / "metadata.jsonl").write_text(
            json.dumps({"tag": "single_object", "prompt": "a tirangle", "include": [{"class": "tirangle", "count": 1}]})
        )


@pytest.mark.parametrize(
    "what, words",
    [
        ("corrupt", ["00000/samples/0001.png", "no image can be read"]),
        ("twice", ["00000/samples", "0001.jpg and 0001.png"]),
        ("missing", ["1 of 6 prompts", "00003"]),
        ("class", ["'tirangle'", "did you mean 'triangle'?"]),
        ("color", ["'a grey circle'", "the color 'grey'", "did you mean 'green'?"]),
    ],
)
def test_bad_images_are_named(capsys, tmp_path, images, what, words):
    spoil(images, what)
    out = said(capsys, "rewards", "try", recipe(tmp_path), "--images", images, code=2)
    assert all(word in out for word in words), out
    assert "are kept" not in out and not list(images.glob("rewards.*"))


def test_an_unknown_name_in_the_formula(capsys, tmp_path, stored):
    out = said(capsys, "rewards", "try", recipe(tmp_path, "right + shrae"), "--trajectories", stored, code=2)
    assert "no reward part 'shrae'; did you mean 'share'?" in out


def test_a_division_by_zero_names_the_thought(capsys, tmp_path, stored):
    out = said(capsys, "rewards", "try", recipe(tmp_path, "right / (share - share)"), "--trajectories", stored, code=2)
    assert "divides by zero" in out and "0-0" in out


def test_a_reward_file_with_a_syntax_error(capsys, tmp_path, stored):
    (tmp_path / "mine.py").write_text("def mine(completions):\n    return [1.0\n")
    path = recipe(tmp_path, None, {"mine": {"function": f"{tmp_path}/mine.py:mine"}})
    out = said(capsys, "rewards", "try", path, "--trajectories", stored, code=2)
    assert "mine.py, line 2: '[' was never closed" in out


JUDGED = {"answer": {"function": "vtool_r1"}}


def test_an_endpoint_that_is_down(capsys, tmp_path, stored):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
    path = recipe(tmp_path, None, JUDGED, judge={"base_url": url, "model": "judge"})
    out = said(capsys, "rewards", "try", path, "--trajectories", stored, code=2)
    assert f"the endpoint {url} cannot be reached" in out


def test_an_endpoint_without_the_model(capsys, tmp_path, stored):
    with JudgeServer(lambda *_: "yes", models=["judge-7b"]) as server:
        path = recipe(tmp_path, None, JUDGED, judge={"base_url": server.url, "model": "judge"})
        out = said(capsys, "rewards", "try", path, "--trajectories", stored, code=2)
    assert "has no model 'judge'; did you mean 'judge-7b'" in out


def rows_of(stored):
    """What `rewards try` wrote beside stored thoughts."""
    return [json.loads(line) for line in (stored.parent / f"{stored.name}-rewards.jsonl").read_text().splitlines()]


def test_answers_that_were_paid_for_outlive_a_division_by_zero(capsys, tmp_path):
    thoughts = [
        trajectory_of(
            {"prompt": f"p{n}", "question": f"How many is {n}?", "ground_truth": "two"},
            text("answer", f"FINAL ANSWER: {n}. TERMINATE"),
            member=n,
        )
        for n in range(4)
    ]
    save_trajectories(thoughts, tmp_path / "stored")
    with JudgeServer(lambda *_: "yes") as server:
        path = recipe(tmp_path, "1 / (answer - answer)", JUDGED, judge={"base_url": server.url, "model": "judge"})
        assert main(["rewards", "try", path, "--trajectories", str(tmp_path / "stored")]) == 2
    out, err = capsys.readouterr()
    assert out.strip() == f"rows: {tmp_path / 'stored-rewards.jsonl'}" and "divides by zero" in err
    assert [(row["rewards"], row["reward"]) for row in rows_of(tmp_path / "stored")] == [({"answer": 1.0}, None)] * 4
    assert sum("How many is" in json.dumps(body) for body in server.requests) == 4
    assert not (tmp_path / "stored-rewards.html").exists()


def test_a_resumed_run_saves_where_its_thoughts_were_tried_and_viewed(capsys, tmp_path, demonstrations):
    """It writes trajectories/000003 again: no page is in the way, and the one of `try` stays."""
    run = tmp_path / "run"
    tracker = Tracker(run)
    step = tracker.trajectories(3, demonstrations)
    stored = len(load_trajectories(step))
    out = said(capsys, "rewards", "try", recipe(tmp_path), "--trajectories", step)
    assert f"report: {run / 'trajectories' / '000003-rewards.html'}" in out
    said(capsys, "view", step)
    said(capsys, "view", run)
    assert tracker.trajectories(3, demonstrations[:2]) == step and len(load_trajectories(step)) == 2
    assert len(rows_of(step)) == stored and (run / "trajectories" / "000003-rewards.html").is_file()
    said(capsys, "view", run)  # a page beside the steps is no step
    tracker.close()


def test_try_in_the_stored_folder_itself_writes_beside_it(capsys, tmp_path, stored, monkeypatch):
    path = recipe(tmp_path)
    monkeypatch.chdir(stored)
    said(capsys, "rewards", "try", path, "--trajectories", ".")
    assert len(rows_of(stored)) == 12 and not (stored / "rewards.jsonl").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("try", "mine.html"),
        ("try", "images/mine.html"),
        ("try", "report.html"),  # its rows would be report.jsonl
        ("view", "mine.html"),
        ("view", "images/report.html"),
    ],
)
def test_a_page_in_stored_trajectories_is_refused_before_anything_is_judged(capsys, tmp_path, stored, command, name):
    before = sorted(path.name for path in stored.rglob("*"))
    out = stored / name
    given = ["view", stored]
    if command == "try":
        given = ["rewards", "try", recipe(tmp_path), "--trajectories", stored]
    words = said(capsys, *given, "--out", out, code=2)
    assert "would lie in stored trajectories" in words and f"such as {tmp_path}/stored-" in words
    assert sorted(path.name for path in stored.rglob("*")) == before


def test_earlier_rewards_are_not_taken_for_what_the_parts_gave(capsys, tmp_path):
    (demonstration,) = get_task("shapes").demonstrations("strokes", 1, seed=3)
    earlier = from_parts(demonstration.record, demonstration.parts)
    earlier.rewards, earlier.reward, earlier.segment_rewards = {"earlier": 9.0}, 9.0, {"earlier": {1: 9.0}}
    save_trajectories([earlier], tmp_path / "stored")
    (tmp_path / "mine.py").write_text(
        "def none(completions):\n    return [None for _ in completions]\ndef wrong(completions):\n    return []\n"
    )
    path = recipe(tmp_path, "mine", {"mine": {"function": f"{tmp_path}/mine.py:wrong"}})
    said(capsys, "rewards", "try", path, "--trajectories", tmp_path / "stored", code=2)
    assert not (tmp_path / "stored-rewards.jsonl").exists()  # no part has judged
    path = recipe(tmp_path, "mine", {"mine": {"function": f"{tmp_path}/mine.py:none"}}, none_limit=1)
    out = said(capsys, "rewards", "try", path, "--trajectories", tmp_path / "stored", code=2)
    assert "no trajectory had a reward" in out
    (row,) = rows_of(tmp_path / "stored")
    assert (row["rewards"], row["reward"]) == ({"mine": None}, None)


def test_a_judge_that_fails_now_and_then_is_counted_and_its_thoughts_go_unjudged(capsys, tmp_path):
    """Through the whole command: recipe, process of its own, client, server, table."""
    thoughts = [
        trajectory_of(
            {"prompt": f"p{n}", "question": f"How many is {n}?", "ground_truth": "two"},
            text("answer", f"FINAL ANSWER: {n}. TERMINATE"),
            group=n // 4,
            member=n % 4,
        )
        for n in range(8)
    ]
    save_trajectories(thoughts, tmp_path / "stored")

    def answer(body, _):
        asked = re.search(r"How many is (\d)", json.dumps(body))
        number = 0 if asked is None else int(asked[1])  # none: the question at the start
        return (
            Answer(status=400)
            if number == 3
            else Answer("who knows")
            if number == 5
            else "yes"
            if number % 2 == 0
            else "no"
        )

    with JudgeServer(answer) as server:
        path = recipe(tmp_path, None, JUDGED, judge={"base_url": server.url, "model": "judge", "backoff_s": 0.01})
        out = said(capsys, "rewards", "try", path, "--trajectories", tmp_path / "stored")
    rows = [json.loads(line) for line in (tmp_path / "stored-rewards.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [1, 0, 1, None, 1, None, 1, 0]
    assert "answer 0.667 0.471 0.000 1.000 25% 0%" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--trajectories", "nowhere"], "nowhere: there are no trajectories here"),
        (["--images", "nowhere"], "nowhere: no such folder of images"),
    ],
)
def test_folders_that_are_not_there(capsys, tmp_path, arguments, words):
    assert words in said(capsys, "rewards", "try", recipe(tmp_path), *arguments, code=2)


def test_one_kind_of_input_is_needed(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["rewards", "try", recipe(tmp_path)])
    assert "one of the arguments --images/--pictures --trajectories is required" in capsys.readouterr().err
