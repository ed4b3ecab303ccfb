"""Each family owns its section of a recipe: its keys, their types, and the nearest one where a key is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policy.chameleon.config import ChameleonPolicyConfig
from policy.registry import FamilyError, check_policy, load_policy, load_vocabulary, policy_section
from rollout.config import RolloutConfig
from rollout.spec import engine_spec
from runtime.errors import UserError
from tests.fake_family import OWN, FakeConfig
from tests.fakes import FakePolicy
from underdrawing.recipe import RecipeError, as_now, check_recipe, load_recipe

QUICKSTART = Path(__file__).parent.parent / "configs/shapes/quickstart.yaml"
REST = {"name": "mine", "task": {}, "format": {}, "rewards": {"parts": {"r": {"function": "format"}}}}


def recipe(**policy):
    return check_recipe({**REST, "policy": policy}, "mine.yaml")


def test_a_family_of_ones_own_has_keys_of_its_own():
    read = recipe(family=OWN, layers=3, tower={"a": 1}, device="cpu")
    assert isinstance(read.policy, FakeConfig) and read.policy.layers == 3
    dumped = read.model_dump(mode="json")
    assert dumped["policy"]["layers"] == 3 and "tiny" not in dumped["policy"]
    again = check_recipe(json.loads(json.dumps(dumped)), "again")
    assert again.policy == read.policy and as_now(dumped) == dumped
    policy = load_policy(read.policy, ["a"])
    assert isinstance(policy, FakePolicy) and policy.words == ["a"]
    assert policy_section(dumped["policy"]) == read.policy  # as a worker in another process reads it
    assert engine_spec(read.policy, read.format, RolloutConfig()).options["policy"] == dumped["policy"]
    assert isinstance(load_policy(recipe(family="tests.fake_family.LAZY").policy), FakePolicy)
    assert load_vocabulary(read.policy) is None and read.policy.fresh_tags == []
    with pytest.raises(UserError, match="policy.layers: 12 do not fit"):
        check_policy(recipe(family=OWN, layers=12).policy, trains=True)
    check_policy(recipe(family=OWN, layers=12).policy)


@pytest.mark.parametrize(
    "policy, sentence",
    [
        ({"family": OWN, "layrs": 3}, "mine.yaml: policy.layrs: unknown key; did you mean 'layers'?"),
        ({"family": OWN, "tiny": {}}, "mine.yaml: policy.tiny: unknown key; "),
        (
            {"family": OWN, "layers": 0},
            "mine.yaml: policy.layers: Input should be greater than or equal to 1 (given: 0)",
        ),
        ({"layers": 3}, "mine.yaml: policy.layers: unknown key; "),
        ({"tiny": {"hiden_size": 3}}, "mine.yaml: policy.tiny.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ({"tiny": {"hidden_size": 30}}, "mine.yaml: policy.tiny: hidden_size 30 is no multiple of"),
        ({"dtype": "float8"}, "mine.yaml: policy.dtype: Input should be"),
    ],
)
def test_what_is_wrong_in_a_family_s_section_is_named_by_its_own_keys(policy, sentence):
    with pytest.raises(RecipeError) as error:
        recipe(**policy)
    assert sentence in str(error.value) and error.value.exit_code == 2


def test_a_section_that_is_none_is_named():
    for value in (3, [1], None):
        with pytest.raises(RecipeError, match=r"policy: Input should be a mapping of keys to values"):
            check_recipe({**REST, "policy": value}, "mine.yaml")
    with pytest.raises(RecipeError, match=r"policy: missing"):
        check_recipe(REST, "mine.yaml")


def test_recipes_of_the_first_family_stay_as_they_were():
    read = load_recipe(QUICKSTART)
    assert isinstance(read.policy, ChameleonPolicyConfig) and read.policy.tiny.num_hidden_layers == 5
    assert read.policy.fresh_tags == read.policy.tiny.tags
    old = json.loads(json.dumps(read.model_dump(mode="json")))  # every key that release 0.1 wrote into recipe.yaml
    assert set(old["policy"]) >= {
        *("family", "path", "tiny", "dtype", "device", "attn_implementation"),
        *("lora", "gradient_checkpointing", "score_chunk"),
    }
    assert check_recipe(old, "old").policy == read.policy


def test_a_function_s_family_has_the_section_of_the_first_one_and_one_that_is_not_there_is_told_when_it_is_loaded():
    read = recipe(family="tests.fake_family.load", tiny={"seed": 4})
    assert isinstance(read.policy, ChameleonPolicyConfig) and read.policy.tiny.seed == 4
    for family, words in (("anolle", "no 'anolle'; .*chameleon"), ("nowhere.load", "nowhere")):
        with pytest.raises(FamilyError, match=words):
            check_policy(recipe(family=family).policy)
    with pytest.raises(FamilyError, match="is str, and neither a Family nor a function"):
        load_policy(recipe(family="tests.fake_family.OWN").policy)
