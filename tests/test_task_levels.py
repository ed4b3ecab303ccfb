"""`task.level` in a recipe: what it builds, what it leaves as it was, and the visual tokenizer that comes with it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from policy.chameleon.check import check
from policy.chameleon.tiny import tiny_vq
from policy.registry import load_policy
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from tasks.registry import get_task
from underdrawing import build
from underdrawing.recipe import RecipeError, check_recipe, dump_recipe, load_recipe

SHAPES = Path(__file__).parent.parent / "configs/shapes"
QUICKSTART, MIDDLE = SHAPES / "quickstart.yaml", SHAPES / "middle.yaml"
TINY = ["policy.tiny.hidden_size=32", "policy.tiny.num_hidden_layers=1", "policy.tiny.intermediate_size=32"]


def test_a_recipe_without_a_level_is_resolved_as_it_was():
    recipe = load_recipe(QUICKSTART)
    assert "level" not in recipe.model_dump(mode="json")["task"] and recipe.policy.tiny.vq == "shapes"
    assert build.build_task(recipe).sizes == ()


@pytest.mark.parametrize("level", ["middle", "hard"])
def test_a_level_brings_its_tokenizer(level):
    recipe = load_recipe(QUICKSTART, [f"task.level={level}"])
    assert build.build_task(recipe).options.level == level and recipe.policy.tiny.vq == "shapes_grid"
    check(recipe.policy, build.build_task(recipe).words, True)
    again = check_recipe(recipe.model_dump(mode="json"), "resolved")
    assert dump_recipe(again) == dump_recipe(recipe) and again.task.level == level
    assert load_recipe(QUICKSTART, [f"task.options={{level: {level}}}"]).policy.tiny.vq == "shapes_grid"
    vq = tiny_vq(recipe.policy.tiny)
    assert (vq.codes_per_image, vq.config.num_embeddings) == (16, 256)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.level=middle", "policy.tiny.vq=shapes"], "policy.tiny.vq: 'shapes' does not draw the objects of this"),
        (["policy.tiny.vq=shapes_grid"], "leave it out, or give 'shapes'"),
        (["task.level=middle", "task.options={level: hard}"], "task.*level: options.level is given too"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(QUICKSTART, overrides)


def test_a_tokenizer_of_ones_own_stands():
    given = ["task.level=middle", "policy.tiny.vq={embed_dim: 8, num_embeddings: 64, resolution: 32}"]
    assert load_recipe(QUICKSTART, given).policy.tiny.vq["num_embeddings"] == 64
    assert load_recipe(QUICKSTART, ["task.level=middle", "policy.path=some/model"]).policy.tiny.vq == "shapes"


def test_a_direct_thought_is_one_image_and_the_end():
    recipe = load_recipe(MIDDLE, [*TINY, "format={name: direct}", "grpo.role_weights={}", "sft.role_weights={}"])
    task, fmt = build.build_task(recipe), build.build_format(recipe)
    policy = load_policy(recipe.policy, build.words(recipe, task))
    engine = Engine(policy, fmt, RolloutConfig(rows=2, max_tokens=30), "full")
    prompt = task.prompts("train")[0]["prompt"]
    for trajectory in engine.run([RolloutRequest(0, prompt, members=(0, 1))]):
        _, image, *rest = trajectory.segments
        assert image.role == "final" and len(image.ids) == 18 and image.image.shape == (32, 32, 3)
        assert [segment.role for segment in rest] in ([], ["end"]) and fmt.violations(trajectory) == []


@pytest.mark.parametrize("level", ["easy", "middle", "hard"])
def test_the_task_travels_to_other_processes(level):
    again = pickle.loads(pickle.dumps(get_task("shapes", level=level)))
    text = again.demonstrations("strokes", 1, 0)[0].parts[2].text
    assert again.options.level == level and again.verdict(text) is not None
