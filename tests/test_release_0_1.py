"""What release 0.1 left is read: trajectories, a recipe, a checkpoint between its update and its line, metrics."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from test_store import assert_same

from record.store import load_trajectories, save_trajectories
from tests.test_cli import QUICKSTART, SMALL
from training import checkpoint
from training.tracking import OLD_NAMES, read_metrics
from underdrawing.cli import main
from underdrawing.recipe import as_now, load_recipe
from underdrawing.report.page import report_data, write_report

STEPS = ["grpo.prompts_per_step=1", "grpo.num_generations=2", "grpo.save_every=1", "rollout.max_tokens=60"]
PARTS = {
    "result": {"function": "geneval"},
    "seen": {"function": "geneval", "options": {"picture": "first"}, "watch": True},
}


def as_release_0_1(stored: Path) -> None:
    """Rewrite stored trajectories by the layout of version 1: the column `picture`, and images in pictures/."""
    if (stored / "images").is_dir():
        (stored / "images").rename(stored / "pictures")
    for name in ("trajectories.parquet", "segments.parquet"):
        table = pq.read_table(stored / name)
        if "image" in table.column_names:
            at = table.column_names.index("image")
            files = [file and file.replace("images/", "pictures/") for file in table.column("image").to_pylist()]
            table = table.set_column(at, "picture", pa.array(files, pa.string()))
        pq.write_table(table.replace_schema_metadata({b"underdrawing.record": b"1"}), stored / name)


def test_its_runs_are_resumed_and_read(capsys, caplog, tmp_path):
    run = tmp_path / "run"
    small = [*SMALL, *STEPS, f"run_dir={run}", f"rewards.parts={json.dumps(PARTS)}", "rewards.total=result"]
    small += ["grpo.segment_reward_weights={}"]
    assert main(["sft", QUICKSTART, *small]) == 0
    assert main(["grpo", QUICKSTART, *small, "grpo.steps=1", "track.trajectories_every=1"]) == 0
    (stored,) = run.glob("trajectories/*")
    kept = load_trajectories(stored)

    # As release 0.1 would have left it: killed between the update of step 2 and its line.
    assert main(["grpo", QUICKSTART, *small, "grpo.steps=2", "--resume"]) == 0
    lines = read_metrics(run / "metrics.jsonl")
    folder = checkpoint.chosen(run / "checkpoints", "2")
    (folder / "owed.json").write_text(json.dumps({key: lines[1][key] for key in lines[1] if key != "step"}))
    names = {new: old for new, old in OLD_NAMES.items()}
    first = {names.get(key, key): value for key, value in lines[0].items()}
    (run / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    as_release_0_1(stored)
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    for part in saved["rewards"]["parts"].values():
        part["watch"] = part.pop("log_only")
    saved["rewards"]["parts"]["seen"]["options"] = {"picture": "first"}
    for key in ("shuffle_dataset", "max_rollout_rounds", "idle_limit"):
        del saved["grpo"][key]
    (run / "recipe.yaml").write_text(yaml.safe_dump(saved))

    assert load_recipe(run / "recipe.yaml").rewards.parts["seen"].options == {"image": "first"}
    for before, after in zip(kept, load_trajectories(stored), strict=True):
        assert_same(before, after)
    capsys.readouterr()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert main(["grpo", str(run / "recipe.yaml"), "grpo.steps=3", "--resume"]) == 0
    assert "the run goes on with what it says now: grpo.steps: 2 -> 3" in caplog.messages[0]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert write_report(report_data(run), run / "report.html").stat().st_size > 1000
    assert main(["rewards", "try", str(run / "recipe.yaml"), "--trajectories", str(stored)]) == 0
    save_trajectories(kept, stored)  # in its place: nothing of the old layout is in the way
    assert not (stored / "pictures").exists()


def test_its_recipe_differs_by_what_a_person_changed_alone():
    recipe = load_recipe(QUICKSTART).model_dump(mode="json")
    old = json.loads(json.dumps(recipe))
    for part in old["rewards"]["parts"].values():
        part["watch"] = part.pop("log_only")
    del old["grpo"]["idle_limit"]
    assert old != recipe and as_now(old) == recipe
    assert as_now({"name": "x", "grpo": {"nonsense": 1}}) == {"name": "x", "grpo": {"nonsense": 1}}
