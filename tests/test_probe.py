"""The command `probe`: its table and its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.registry import load_policy
from record.store import load_trajectories
from runtime.errors import UserError
from tasks.registry import get_task
from underdrawing.build import build_format
from underdrawing.cli import main
from underdrawing.probe import ProbeOptions, check_reward
from underdrawing.recipe import load_recipe

RECIPE = """
name: p
run_dir: {folder}/run
policy: {{family: chameleon}}
task: {{name: shapes}}
format: {{name: strokes, max_images: {images}, constrain: full, options: {{max_tokens: 2}}}}
rollout: {{workers: 0, rows: 16, max_tokens: {tokens}}}
rewards: {{parts: {{graded: {{function: geneval, options: {{mode: graded}}}}}}}}
track: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny = TinySection(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    load_policy(ChameleonPolicyConfig(tiny=tiny), get_task("shapes").words).save(folder)
    return folder


def words(folder: Path, weights: Path, *more: str, images: int = 2, tokens: int = 120) -> list[str]:
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, images=images, tokens=tokens))
    return ["probe", str(folder / "recipe.yaml"), "--weights", str(weights), *more]


def test_the_command_prints_a_table_and_keeps_every_pair(weights, tmp_path, capsys):
    asked = words(tmp_path, weights, "--prompts", "2", "--samples", "2", "--arms", "blank,sibling", "--draws", "2")
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("sketch", "blank", "sibling", "4 thoughts; kept in"))
    assert max(map(len, said.splitlines()[:8])) <= 80
    told = json.loads(said.splitlines()[-1])
    kept = json.loads((tmp_path / "run/probe/probe.json").read_text())
    assert told["rows"] == kept["rows"] and kept["lost"] == 0 and kept["draws"] == 2
    first = next(row for row in kept["rows"] if (row["role"], row["occurrence"], row["arm"]) == ("sketch", 0, "blank"))
    assert first["images"] == 4 and first["prompts"] == 2 and first["interval"] is not None
    mine = [s for s in kept["swaps"] if (s["role"], s["occurrence"], s["arm"]) == ("sketch", 0, "blank")]
    assert len(mine) == 8 and all(s["worth"] == s["own"] - s["swapped"] for s in mine)
    means = [[s["worth"] for s in mine if s["group"] == g] for g in range(2)]
    assert first["worth"] == pytest.approx(sum(sum(m) / len(m) for m in means) / 2)
    stored = load_trajectories(tmp_path / "run/probe/trajectories")
    assert sum("arm" not in t.info for t in stored) == 4
    at = [n for n, t in enumerate(stored) if "arm" not in t.info]
    assert all((stored[n + 1].group, stored[n + 1].parent[0]) == (stored[n].group, stored[n].member) for n in at)
    assert {t.info["arm"] for t in stored if "arm" in t.info} == {"own", "blank", "sibling"}
    assert main(asked) == 0  # again: what it kept before is replaced
    assert json.loads((tmp_path / "run/probe/probe.json").read_text()) == kept


@pytest.mark.parametrize(
    "more, limits, said",
    [
        (["--arms", "sibling", "--samples", "1"], {}, "--arms sibling: a group of one has no sibling; give --samples"),
        (["--arms", "other", "--prompts", "1"], {}, "--arms other: there is no other prompt; give --prompts 2"),
        (["--arms", "blnk"], {}, "--arms: no arm 'blnk'; did you mean 'blank'?"),
        (["--draws", "0"], {}, "--draws: 0 is too small"),
        (["--prompts", "100000"], {}, "--prompts 100000: the split 'heldout' has"),
        (["--prompts", "2", "rollout.max_tokens=12"], {}, "no thought drew an image and went on from it"),
    ],
)
def test_what_cannot_be_probed_is_told(weights, tmp_path, capsys, more, limits, said):
    assert main(words(tmp_path, weights, *more, **limits)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run/probe/probe.json").exists()


def test_a_reward_that_compares_thoughts_is_refused(weights, tmp_path):
    file = words(tmp_path, weights)[1]
    (tmp_path / "own.py").write_text("def own(completions, **columns):\n    return [1.0 for _ in completions]\n")
    part = f'rewards.parts={{graded: {{function: geneval}}, mine: {{function: "{tmp_path}/own.py:own"}}}}'
    for overrides, words_ in (
        (["rewards.total=graded - group_mean(graded)"], "rewards.total .* compares thoughts"),
        ([part, "rewards.total=graded + mine"], "rewards.parts.mine sees the batch.*say scope: row"),
    ):
        with pytest.raises(UserError, match=f"probe: {words_}"):
            check_reward(load_recipe(file, overrides))
        with pytest.raises(UserError, match=f"grpo.image_credit: {words_}"):
            load_recipe(file, [*overrides, "grpo.image_credit={}"])
        with pytest.raises(UserError, match=f"grpo.restart: {words_}"):
            load_recipe(file, [*overrides, "grpo.restart={roles: [sketch]}"])
    check_reward(load_recipe(file, [part, "rewards.total=graded"]))  # what is not paid may compare
    with pytest.raises(UserError, match="grpo.restart.part: no reward part 'grade'; did you mean 'graded'"):
        load_recipe(file, ["grpo.restart={roles: [sketch], part: grade}"])
    with pytest.raises(
        UserError, match="in the role 'plan' the format 'strokes' draws no image; its images are sketch"
    ):
        build_format(load_recipe(file, ["grpo.restart={roles: [plan], part: graded}"]))
    with pytest.raises(UserError, match="--arms sibling"):
        ProbeOptions(4, 1, ("blank", "sibling"), 1)
