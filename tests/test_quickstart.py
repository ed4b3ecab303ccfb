"""The quickstart as one command, on a model of a few thousand weights: every stage runs, none has to improve it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from underdrawing import quickstart
from underdrawing.report.page import report_data

SMALL = [
    "policy.tiny.hidden_size=16",
    "policy.tiny.num_hidden_layers=1",
    "policy.tiny.num_attention_heads=2",
    "policy.tiny.intermediate_size=32",
    "sft.demonstrations=24",
    "sft.max_steps=2",
    "sft.batch_size=8",
    "sft.logging_steps=1",
    "rollout.workers=0",
    "rollout.rows=8",
    "rollout.max_tokens=60",
    "grpo.steps=2",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=2",
    "evaluate.prompts=12",
    "evaluate.samples=2",
    "track.wandb=disabled",
    "track.trajectories_every=1",
]


def test_every_stage_runs_and_the_last_line_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Untrained, it draws nothing right, so groups would have no variance: a reward of the user's own has.
    own = tmp_path / "own.py"
    own.write_text(
        "def length(completions, trajectories, **columns):\n    return [float(t.num_tokens()) for t in trajectories]\n"
    )
    arguments = [
        "--seed",
        "3",
        "--run-dir",
        str(tmp_path / "run"),
        *SMALL,
        f"rewards.parts={{length: {{function: '{own}:length'}}}}",
        "rewards.total=length",
        "grpo.segment_reward_weights={}",
    ]
    assert quickstart.main(arguments) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {
        "warm_start",
        "grpo",
        "first_sketch",
        "final_image",
        "on_policy_gap",
        "minutes",
        "report",
        "run_dir",
    } <= set(said)
    assert said["grpo"] == said["final_image"]
    low, high = said["refinement_interval"]
    assert low - 1e-4 <= said["final_image"] - said["first_sketch"] <= high + 1e-4
    assert 0 <= said["on_policy_gap"] < 1e-4
    assert Path(said["report"]).read_text().count('class="film"') >= 12
    data = report_data(tmp_path / "run")
    assert data.before is not None and data.before.prompts == 12
    assert [row["step"] for row in data.metrics if "reward/mean" in row] == [1, 2]

    # The same command again finds every stage done: no step is made twice, and it says the same.
    written = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert quickstart.main(arguments) == 0
    again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == written
    assert {k: again[k] for k in ("warm_start", "grpo", "first_sketch")} == {
        k: said[k] for k in ("warm_start", "grpo", "first_sketch")
    }

    # All stages again in the same folder: its labels are evaluated anew where they are of other weights, and else kept.
    evaluations = tmp_path / "run" / "evaluations"
    (tmp_path / "run" / "quickstart.json").unlink()
    kept = json.loads((evaluations / "warm_start" / "summary.json").read_text())
    other = json.loads((evaluations / "grpo" / "summary.json").read_text())
    (evaluations / "grpo" / "summary.json").write_text(json.dumps({**other, "fingerprint": "another's", "score": 2.0}))
    assert quickstart.main(arguments) == 0
    third = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {k: third[k] for k in ("warm_start", "grpo")} == {k: said[k] for k in ("warm_start", "grpo")}
    assert json.loads((evaluations / "warm_start" / "summary.json").read_text())["time"] == kept["time"]
    replaced = json.loads((evaluations / "grpo" / "summary.json").read_text())
    assert replaced["fingerprint"] == other["fingerprint"] and replaced["time"] > other["time"]

    # Another recipe in the same folder is refused: the old figures are not its own.
    assert quickstart.main([*arguments, "grpo.steps=3"]) == 2
    assert "holds stages of another recipe" in capsys.readouterr().err
    (tmp_path / "run" / "quickstart.json").write_text("{")
    assert quickstart.main(arguments) == 2
    assert "quickstart.json: cannot be read" in capsys.readouterr().err


def test_a_wrong_override_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["grpo.step=3"]) == 2
    assert "grpo.step: unknown key; did you mean 'steps'?" in capsys.readouterr().err


def test_without_ray_it_rolls_out_in_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nothing listens there
    assert quickstart.main(["--run-dir", str(tmp_path), *SMALL, "rollout.workers=1", "grpo.steps=1"]) == 0
    said = capsys.readouterr()
    assert "Ray cannot be had (no Ray cluster answers" in said.err and "rolling out in this process" in said.err
    assert json.loads(said.out.strip().splitlines()[-1])["run_dir"] == str(tmp_path)


def test_minutes_are_those_of_every_attempt_and_none_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(quickstart.time, "monotonic", lambda: now[0])
    path = tmp_path / "quickstart.json"

    def attempt(seconds: float, error: type[BaseException] | None = None) -> quickstart._Clock:
        clock = quickstart._Clock(path, "recipe")
        with clock.stage("sft"):
            now[0] += seconds
            if error is not None:
                raise error
        return clock

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            attempt(60, KeyboardInterrupt)
        assert not quickstart._Clock(path, "recipe").has("sft")
    assert attempt(30).minutes() == 2.5
    assert quickstart._Clock(path, "recipe").minutes() == 2.5

    stage = quickstart._Clock(path, "recipe").stage("grpo")
    stage.__enter__()  # and not left, as by a process that was killed
    assert quickstart._Clock(path, "recipe").minutes() is None
    del stage
