import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rewards.functions.geneval import evaluate
from rewards.functions.geneval import relations as judged_relations
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.prompts import (
    HELDOUT,
    INVERSE,
    TAGS,
    compositions,
    pool,
    prompts,
    related,
    sample_scene_for,
    satisfies,
)
from tasks.shapes.world import COLORS, SHAPES, Object, Scene, sample_scene


def as_detections(scene: Scene) -> dict:
    """A scene as the judge would see it if it saw perfectly."""
    seen: dict = {}
    for item in scene.objects:
        seen.setdefault(item.shape, []).append({"box": item.box, "score": 1.0, "color": item.color})
    return seen


def every_train_record():
    return [record for tag in TAGS for record in pool("train", tag)]


def test_records_have_genevals_schema_and_wording():
    by_prompt = {
        record["prompt"]: record for split in ("train", "heldout") for tag in TAGS for record in pool(split, tag)
    }
    # "left of": clause 0 is the reference, clause 1 carries the relation
    assert by_prompt["a photo of a circle left of a square"] == {
        "tag": "position",
        "prompt": "a photo of a circle left of a square",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
    }
    assert by_prompt["a photo of three crosses"] == {
        "tag": "counting",
        "prompt": "a photo of three crosses",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
    }
    assert by_prompt["an image of an orange circle and a red square"]["include"] == [
        {"class": "circle", "count": 1, "color": "orange"},
        {"class": "square", "count": 1, "color": "red"},
    ]
    for record in by_prompt.values():
        assert set(record) <= {"tag", "prompt", "include", "exclude"}
        assert ("exclude" in record) == (record["tag"] == "counting")
        assert all(c["class"] in SHAPES and c.get("color", "red") in COLORS for c in record["include"])


def test_heldout_has_300_distinct_prompts_evenly_over_six_tags():
    heldout = prompts("heldout")
    assert len({record["prompt"] for record in heldout}) == len(heldout) >= 300
    counts = Counter(record["tag"] for record in heldout)
    assert set(counts) == set(TAGS) and min(counts.values()) >= 48 and max(counts.values()) <= 52


def test_every_kind_of_composition_is_held_out_and_trained():
    for split in ("train", "heldout"):
        kinds = {c[0] for record in prompts(split) for c in compositions(record)}
        assert kinds == {"colored", "pair", "relation", "count"}
    named = {c for record in prompts("heldout") for c in compositions(record)}
    assert HELDOUT <= named  # each of them is really asked for


def test_no_train_prompt_names_a_heldout_composition():
    for record in every_train_record():
        assert not compositions(record) & HELDOUT, record["prompt"]


def test_heldout_prompts_are_new_strings_and_name_a_heldout_composition():
    trained = {record["prompt"] for record in every_train_record()}
    for record in prompts("heldout"):
        assert record["prompt"] not in trained
        assert record["tag"] == "single_object" or compositions(record) & HELDOUT


def test_a_relation_is_held_out_in_both_wordings():
    for found in HELDOUT:
        if found[0] == "relation":
            _, a, relation, b = found
            assert ("relation", b, INVERSE[relation], a) in HELDOUT


def test_train_prompts_say_every_shape_color_count_and_relation():
    words = {word for record in prompts("train") for word in record["prompt"].split()}
    assert {*SHAPES, *COLORS, "two", "three", "four", "left", "right", "above", "below"} <= words
    heldout_words = {word for record in prompts("heldout") for word in record["prompt"].split()}
    assert heldout_words <= words


def test_prompts_are_the_same_each_time_and_safe_to_change():
    first = prompts("heldout")
    first[0]["include"][0]["class"] = "changed"
    assert prompts("heldout")[0]["include"][0]["class"] in SHAPES
    assert [r["prompt"] for r in prompts("train")] == [r["prompt"] for r in prompts("train")]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sampled_scenes_satisfy_their_prompt_under_genevals_rules(split, tag):
    rng = np.random.default_rng(0)
    records = pool(split, tag)
    for _ in range(150):
        record = records[rng.integers(len(records))]
        scene = sample_scene_for(record, rng)
        assert satisfies(record, scene, margin=0.1)
        correct, reason = evaluate(record, as_detections(scene))
        assert correct, (record["prompt"], scene, reason)
        if tag == "counting":
            assert len(scene.objects) == record["include"][0]["count"]


def test_our_reading_of_the_rules_agrees_with_the_judge_on_any_scene():
    """One object a class, where the judge's choice among equal scores cannot matter."""
    rng = np.random.default_rng(1)
    records = [record for split in ("train", "heldout") for record in prompts(split)]
    verdicts = Counter()
    for _ in range(4000):
        record = records[rng.integers(len(records))]
        scene = sample_scene(rng, int(rng.integers(1, 5)))
        if len({item.shape for item in scene.objects}) < len(scene.objects) and record["tag"] != "counting":
            continue
        ours = satisfies(record, scene)
        assert ours == evaluate(record, as_detections(scene))[0], (record, scene)
        verdicts[ours] += 1
    assert min(verdicts.values()) > 30


def test_relations_by_hand_and_like_the_judge():
    # 12 px boxes, 16 px apart horizontally: (16 - 2.4) / 16 = 0.85 to the right, nothing vertically
    left, right = Object("circle", "red", 0).box, Object("circle", "red", 2).box
    assert related(right, "right of", left) and related(left, "left of", right)
    assert not related(right, "right of", left, margin=0.36) and not related(right, "below", left)
    boxes = [Object("circle", "red", place, jitter).box for place in range(9) for jitter in range(2)]
    for a in boxes:
        for b in boxes:
            assert {r for r in INVERSE if related(a, r, b)} == judged_relations(a, b)


def test_the_task_is_built_by_name_and_refuses_what_it_does_not_know():
    task = get_task("shapes", mistake_rate=0.25)
    assert task.options.mistake_rate == 0.25 and task.classes == SHAPES
    assert type(get_task("tasks.shapes.task.ShapesTask")) is type(task)
    with pytest.raises(UserError, match="did you mean 'shapes'"):
        get_task("shape")
    with pytest.raises(UserError, match="did you mean 'mistake_rate'"):
        get_task("shapes", mistakes_rate=0.5)
    with pytest.raises(UserError, match="less than or equal to 1"):
        get_task("shapes", mistake_rate=2)
    with pytest.raises(UserError, match="has no function 'Nothing'"):
        get_task("tasks.shapes.task.Nothing")
    with pytest.raises(UserError, match="no module 'no_such_module' on the path"):
        get_task("no_such_module.Task")
    with pytest.raises(UserError, match="tasks/base.py says"):
        get_task("builtins.dict")
    with pytest.raises(UserError, match="did you mean 'heldout'"):
        task.prompts("held_out")


def test_the_task_imports_no_model():
    code = (
        "import sys; from tasks.registry import get_task; from tasks.shapes import grid_prompts;"
        "tasks = [get_task('shapes', level=level) for level in ('easy', 'middle', 'hard')];"
        "assert grid_prompts.pool.cache_info().currsize == 0;"  # prompts are made when they are asked for
        "shown = [task.demonstrations('strokes', 6, 0)[0] for task in tasks];"
        "[task.detect(one.parts[1].image) for task, one in zip(tasks, shown)];"
        "heavy = {'torch', 'transformers', 'ray', 'policy', 'rewards', 'rl', 'sft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
