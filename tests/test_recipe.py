"""Recipes: every shipped one is sound, what is wrong is named with its place, and what is resolved reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from runtime.errors import UserError
from underdrawing.recipe import Recipe, RecipeError, check_recipe, dump_recipe, load_recipe

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "accelerate" not in p.parts)
MINIMAL = {"name": "mine", "policy": {}, "task": {}, "format": {}, "rewards": {"parts": {"r": {"function": "steps"}}}}


def written(folder: Path, data: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_shipped_recipe_resolves_and_reads_back(path: Path):
    recipe = load_recipe(path)
    again = check_recipe(yaml.safe_load(dump_recipe(recipe)), "dumped")
    assert again == recipe
    # What one prompt's thoughts may write must fit a row of the model, prompt included.
    if recipe.policy.path is None:
        assert recipe.rollout.max_tokens < recipe.policy.tiny.max_position_embeddings


def test_there_are_shipped_recipes():
    assert any(path.name == "quickstart.yaml" for path in SHIPPED)


def test_a_minimal_recipe_takes_every_default(tmp_path):
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert (recipe.seed, recipe.run_dir) == (0, Path("runs/run"))
    assert recipe.rewards.formula() == "r"
    assert recipe.grpo.loss_type == "segment"


def test_overrides_are_yaml_and_reach_any_depth(tmp_path):
    recipe = load_recipe(
        written(tmp_path, MINIMAL),
        [
            "grpo.learning_rate=3e-5",
            "rollout.temperature={default: 0.9, sketch: 1.1}",
            "rewards.total=2 * r",
            "grpo.clip_by_kind.code.epsilon=0.1",
            "task.name=shapes",
            "policy.path=null",
        ],
    )
    assert recipe.grpo.learning_rate == 3e-5
    assert recipe.rollout.temperature == {"default": 0.9, "sketch": 1.1}
    assert recipe.rewards.formula() == "2 * r"
    assert recipe.grpo.clip_by_kind["code"].epsilon == 0.1
    assert recipe.policy.path is None


@pytest.mark.parametrize(
    "override, words",
    [
        ("grpo.stps=3", ["grpo.stps: unknown key", "did you mean 'steps'?"]),
        ("rolout.rows=3", ["rolout: unknown key", "did you mean 'rollout'?"]),
        ("policy.tiny.hiden_size=64", ["policy.tiny.hiden_size: unknown key", "did you mean 'hidden_size'?"]),
        ("rewards.parts.r.functon=steps", ["rewards.parts.r.functon: unknown key", "did you mean 'function'?"]),
        ("grpo.clip_by_kind.code.epsilo=1", ["grpo.clip_by_kind.code.epsilo: unknown key", "did you mean 'epsilon'?"]),
        ("grpo.steps=many", ["grpo.steps", "integer", "'many'"]),
        ("grpo.steps=0", ["grpo.steps", "greater than or equal to 1", "0"]),
        ("grpo.loss_type=ppo", ["grpo.loss_type", "'segment'", "'ppo'"]),
        ("grpo=3", ["grpo", "3"]),
        ("grpo.num_minibatches=99", ["grpo", "num_minibatches is 99", "prompts_per_step"]),
        ("rollout.temperature.sketch=-1", ["rollout.temperature.sketch", "-1"]),
        ("rewards.total=r + detcet", ["detcet"]),
        ("rewards.parts.r.function=setps", ["setps", "did you mean 'steps'?"]),
        ("rewards.parts={}", ["rewards.parts", "at least 1"]),
        ("policy.tiny.hidden_size=30", ["policy.tiny", "hidden_size 30", "num_attention_heads"]),
        ("format.constrain=everything", ["format.constrain", "'images'", "'everything'"]),
        ("name=null", ["name", "string"]),
        ("rewards.detector.backend=owl2", ["rewards.detector: backend: no 'owl2'; did you mean 'owlv2'?"]),
        ("rewards.detector={backend: owlv2, pth: x}", ["rewards.detector.pth: unknown key; did you mean 'path'?"]),
        ("rewards.detector=3", ["rewards.detector: Input should be a mapping of keys to values or Input should be a "]),
        ("rewards.parts.r.weight=[1]", ["rewards.parts.r.weight: Input should be a valid number or Input should"]),
        ("rewards.alarms.fatal=[tool_rat]", ["rewards.alarms.fatal.0: ", "did you mean 'tool_rate'?"]),
        ("rewards.schedules.w={at: {x: 1}}", ["rewards.schedules.w.at.x: Input should be a valid integer"]),
        ("grpo.clip_by_kind.wrd.epsilon=1", ["grpo.clip_by_kind.wrd: ", "did you mean 'word'?"]),
        ("sft.visual_loss.kind=mvto", ["sft.visual_loss.kind", "did you mean 'mvot'? Known: mvot, twgi"]),
        ("sft.visual_loss.variant=released", ["sft.visual_loss.variant", "did you mean 'release'?"]),
        ("sft.visual_loss.weigth=1", ["sft.visual_loss.weigth: unknown key", "did you mean 'weight'?"]),
        ("sft.visual_loss=-1", ["sft.visual_loss: ", "greater than or equal to 0"]),
        ("sft.visual_loss=.nan", ["sft.visual_loss: ", "finite number"]),
        ("sft.visual_loss=mvot", ["sft.visual_loss", "want a number", "{kind: mvot, weight: 1.0}"]),
        ("sft.visual_loss=null", ["sft.visual_loss", "want a number"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, override: str, words: list[str]):
    path = written(tmp_path, MINIMAL)
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and "function-" not in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("grpo.steps", "override 'grpo.steps': write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("name.first=Ada", "'name' is a value, not a section"),
        ("grpo.steps=[1", "the value is not YAML"),
    ],
)
def test_an_override_that_is_none_is_quoted(tmp_path, override: str, words: str):
    with pytest.raises(RecipeError, match="override") as caught:
        load_recipe(written(tmp_path, MINIMAL), [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: [one, two", "line 1: not YAML"),
        ("name: one\n  seed: 3\n", "line 2: not YAML"),
        ("- name\n", "a mapping of sections, not list"),
        ("", "a mapping of sections, not NoneType"),
        ("name: mine\npolicy: {}\ntask: {}\nformat: {}\n", "rewards: missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_its_line(tmp_path, text: str, words: str):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_every_fault_is_told_at_once(tmp_path):
    path = written(tmp_path, {**MINIMAL, "sed": 3, "grpo": {"steps": "x", "beta": -1}})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["grpo.steps", "grpo.beta", "sed"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "a YAML text file"),
        ("none.yaml", "no such recipe"),
        ("image.yaml/x", "no such recipe"),
        ("image.yaml", "a YAML text file"),
    ],
)
def test_a_path_that_leads_to_no_text_is_named(tmp_path, name: str, words: str):
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


def test_a_recipe_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuses(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    path = written(tmp_path, MINIMAL)
    monkeypatch.setattr(Path, "read_text", refuses)  # root may read every file
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: cannot be read (Permission denied)")


def test_paying_for_the_form_under_full_constraint_is_refused(tmp_path):
    data = {**MINIMAL, "format": {"constrain": "full"}, "rewards": {"parts": {"form": {"function": "format"}}}}
    with pytest.raises(RecipeError, match="rewards.parts.form pays for the format, but format.constrain is 'full'"):
        load_recipe(written(tmp_path, data))


@pytest.mark.parametrize(
    "given, words",
    [
        (
            {"grpo": {"evaluate_every": 5}, "rollout": {"temperature": {"sketch": 0.9}}},
            ["rollout.temperature is 0.9 (sketch)", "evaluate.temperature 1,", "make them equal"],
        ),
        (
            {"policy": {"device": "cuda"}, "rollout": {"workers": 2}},
            ["rollout.gpus is 0", "its 2 workers no GPU", "policy.device is cuda"],
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(tmp_path, given, words):
    with pytest.raises(RecipeError) as raised:
        load_recipe(written(tmp_path, MINIMAL | given))
    for word in words:
        assert word in str(raised.value)


def test_sections_that_agree_are_taken(tmp_path):
    for given in (
        {"grpo": {"evaluate_every": 5}, "rollout": {"temperature": {"default": 0.9}}, "evaluate": {"temperature": 0.9}},
        {"rollout": {"temperature": {"sketch": 0.9}}},
        {"policy": {"device": "cuda"}, "rollout": {"workers": 2, "gpus": 0.5}},
        {"policy": {"device": "cuda"}},
    ):
        load_recipe(written(tmp_path, MINIMAL | given))


def test_every_key_of_every_section_says_what_it_is():
    def check(model, at: str) -> None:
        assert model.model_config.get("extra") == "forbid", f"{at} lets unknown keys pass"
        for name, field in model.model_fields.items():
            inner = getattr(field.annotation, "model_fields", None)
            assert field.description or inner, f"{at}.{name} has no description"
            if inner:
                check(field.annotation, f"{at}.{name}")

    check(Recipe, "recipe")
