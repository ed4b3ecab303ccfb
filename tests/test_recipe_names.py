"""Names inside a recipe's maps: each is a role of the format or a part of the recipe, or the recipe is refused."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from formats.roles import ByRole, check_roles, marker_of, roles_of
from formats.strokes import strokes
from runtime.errors import UserError
from tests.fakes import FakeFormat
from underdrawing import build
from underdrawing.cli import main
from underdrawing.recipe import Recipe, RecipeError, load_recipe

PARTS = {"images": {"function": "geneval", "options": {"image": "each"}}, "steps": {"function": "steps"}}
RECIPE: dict[str, Any] = {"name": "mine", "policy": {}, "task": {}, "format": {}, "rewards": {"parts": PARTS}}


@pytest.fixture
def path(tmp_path) -> Path:
    written = tmp_path / "mine.yaml"
    written.write_text(yaml.safe_dump(RECIPE))
    return written


def refused(capsys, path: Path, override: str, command: str = "grpo") -> str:
    capsys.readouterr()
    assert main([command, str(path), "--dry-run", override, f"run_dir={path.parent}/run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "rollout.temperature={default: 1.0, skech: 0.5}",
            "rollout.temperature: the format 'strokes' has no role 'skech'",
        ),
        ("grpo.role_weights={skech: 0}", "grpo.role_weights: the format 'strokes' has no role 'skech'"),
        ("sft.role_weights={skech: 2}", "sft.role_weights: the format 'strokes' has no role 'skech'"),
        ("grpo.role_weights={default: 2}", "grpo.role_weights: the format 'strokes' has no role 'default'"),
        ("format.options.max_tokens={sketc: 9}", "max_tokens: no text role 'sketc'"),
        ("format.options.scales={imag: 1}", "no guidance scale 'imag'; did you mean 'image'?"),
        ("grpo.clip_by_kind={wrd: {epsilon: 0.1}}", "grpo.clip_by_kind.wrd: "),
        ("rewards.alarms.watch=[reward/imags]", "rewards.alarms.watch: 'reward/imags': no reward part 'imags'"),
        (
            "rewards.parts.c={function: critique_consistency, options: {roles: [inspct]}}",
            "rewards.parts.c.options.roles: the format 'strokes' has no role 'inspct'; did you mean 'inspect'?",
        ),
    ],
)
@pytest.mark.parametrize("command", ["grpo", "sft", "rollout", "evaluate"])
def test_a_name_that_is_no_role_is_refused_with_the_nearest(capsys, path, override: str, words: str, command: str):
    said = refused(capsys, path, override, command)
    assert words in said
    if "skech" in override:
        assert "did you mean 'sketch'?" in said


def test_a_weight_of_no_part_is_refused_with_the_nearest(path):
    level = "grpo.advantage_level=segment"
    with pytest.raises(
        RecipeError, match="grpo.segment_reward_weights: no reward part 'imags'; did you mean 'images'?"
    ):
        load_recipe(path, [level, "grpo.segment_reward_weights={imags: 1}"])
    assert load_recipe(path, [level, "grpo.segment_reward_weights={images: 2}"]).grpo.segment_reward_weights


def test_roles_are_those_of_the_recipes_own_format(capsys, path):
    override = "rollout.temperature={subgoal: 0.5}"
    assert "the format 'strokes' has no role 'subgoal'" in refused(capsys, path, override)
    build.build_format(load_recipe(path, [override, "format.name=subgoals"]))
    with pytest.raises(UserError, match="the format 'subgoals' has no role 'sketch'"):
        build.build_format(load_recipe(path, ["grpo.role_weights={sketch: 2}", "format.name=subgoals"]))


@pytest.mark.parametrize(
    "override",
    [
        "rollout.temperature={default: 0.9, between: 1.1, other: 1.0, plan: 0.8, redraw: 1.2}",
        "grpo.role_weights={other: 0, end: 0.5, sketch: 2}",
        "sft.role_weights={refine: 2, end: 1}",
        "format.options.max_tokens={plan: 9}",
        "rewards.alarms.watch=[reward/images, reward/images/wrong_images, reward/mean, heldout/final_image]",
        "rewards.parts.c={function: critique_consistency, options: {roles: [inspect]}}",
    ],
)
def test_what_has_an_effect_is_taken(path, override: str):
    build.build_format(load_recipe(path, [override]))


def test_every_job_checks_before_it_begins(capsys, path):
    for command in ("grpo", "sft", "rollout", "evaluate"):
        weights = path.parent / "weights"
        weights.mkdir(exist_ok=True)
        (weights / "config.json").write_text("{}")
        given = [] if command == "sft" else ["--weights", str(weights)]
        run = f"run_dir={path.parent}/run"
        assert main([command, str(path), "grpo.role_weights={skech: 0}", run, "track.wandb=disabled", *given]) == 2
        assert "no role 'skech'; did you mean 'sketch'?" in capsys.readouterr().err
    assert not (path.parent / "run/metrics.jsonl").exists() and not (path.parent / "run/sft/metrics.jsonl").exists()


def maps(model: type[BaseModel], prefix: str = "") -> dict[str, ByRole | None]:
    """Every key of a recipe that is a map from names to numbers, with its marker."""
    found: dict[str, ByRole | None] = {}
    for name, field in model.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is not None:
            found |= maps(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif typing.get_origin(field.annotation) is dict:
            found[f"{prefix}{name}"] = marker_of(field)
    return found


def test_no_map_by_name_is_unchecked():
    told = maps(Recipe)
    by_role = {key for key, marker in told.items() if marker is not None}
    assert by_role == {"rollout.temperature", "grpo.role_weights", "sft.role_weights"}
    # Keyed by what the recipe itself declares, by what pydantic checks, or handed on to what checks its own.
    declared = {"rewards.parts", "rewards.schedules", "grpo.segment_reward_weights"}
    declared |= {"grpo.clip_by_kind", "grpo.kind_weights", "tools"}
    handed_on = {"task.options", "format.options"}
    assert set(told) - by_role == declared | handed_on


def test_a_format_that_names_no_roles_is_not_second_guessed():
    recipe_ = Recipe.model_validate(RECIPE | {"grpo": {"role_weights": {"anything": 2.0}}})
    fake = FakeFormat()
    assert roles_of(fake) is None
    check_roles(recipe_, fake)
    assert roles_of(strokes()) == ("plan", "sketch", "inspect", "refine", "redraw")


def test_a_number_stands_for_a_whole_map(path):
    """What people write: one temperature, one limit, one clip range, a weight that does not change."""
    read = load_recipe(
        path,
        [
            "rollout.temperature=0.7",
            "evaluate.temperature=0.7",
            "grpo.evaluate_every=5",
            "grpo.clip_by_kind={code: 0.1}",
            "rewards.schedules={w: 5e-1}",
            "rewards.total=w * steps",
            "format.options.max_tokens=12",
        ],
    )
    assert read.rollout.temperature == {"default": 0.7}
    assert read.grpo.clip_by_kind["code"].epsilon == 0.1
    assert [read.rewards.schedules["w"].value(step) for step in (0, 1, 1000)] == [0.5, 0.5, 0.5]
    grammar = build.build_format(read).grammar  # type: ignore[attr-defined]
    assert {role.name: role.max_tokens for role in grammar.roles if not role.is_image} == {
        "plan": 12,
        "inspect": 12,
        "refine": 12,
    }
    with pytest.raises(RecipeError, match="rollout.temperature"):
        load_recipe(path, ["rollout.temperature=true"])
    with pytest.raises(RecipeError, match="rollout.temperature: Input should be greater than or equal to 0"):
        load_recipe(path, ["rollout.temperature=-1"])
    with pytest.raises(UserError, match="max_tokens.plan is 0"):
        build.build_format(load_recipe(path, ["format.options.max_tokens=0"]))
