"""Demonstrations from files of messages and from stored rollouts, and a whole run on prompts of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.registry import get_format
from policy.chameleon.config import ChameleonPolicyConfig
from policy.registry import load_policy
from record.store import load_trajectories, save_trajectories
from record.trajectory import StopReason
from runtime.errors import UserError
from sft.config import SftConfig
from sft.demonstrations import demonstrate, render_all, see
from sft.sources import load_demonstrations, words_of
from tasks.registry import get_task
from training.tracking import read_metrics
from underdrawing.build import build_task
from underdrawing.cli import main
from underdrawing.recipe import load_recipe

FMT = get_format("strokes", max_images=4)
TASK = get_task("shapes")
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def policy():
    return load_policy(ChameleonPolicyConfig(tiny=TINY), TASK.words)


def as_row(demonstration, folder: Path, number: int, column: bool = False) -> dict:
    """A demonstration as a row of messages. `column`: images stand in a column of their own, as in TRL's data sets."""
    content, images = [], []
    left_out = {*demonstration.mistakes, *demonstration.needless}
    for index, part in enumerate(demonstration.parts):
        piece = {"type": "text", "text": part.text}
        if part.image is not None:
            name = f"{number}-{index}.png"
            Image.fromarray(part.image).save(folder / name)
            images.append(name)
            piece = {"type": "image"} if column else {"type": "image", "image": name}
        if index in left_out:
            piece["trained"] = False
        content.append(piece)
    row = {"prompt": demonstration.prompt, "messages": [{"role": "assistant", "content": content}]}
    more = {k: v for k, v in demonstration.record.items() if k != "prompt"}
    return {**row, **more, **({"images": images} if column else {})}


def export(folder: Path, count=6, column=False) -> str:
    folder.mkdir(exist_ok=True)
    rows = [as_row(d, folder, n, column) for n, d in enumerate(TASK.demonstrations("strokes", count, seed=0))]
    path = folder / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("column", [False, True], ids=["inline", "images-column"])
def test_messages_render_as_the_tasks_own_demonstrations(tmp_path, policy, column):
    read = load_demonstrations(SftConfig(data=export(tmp_path, column=column)), FMT, policy)
    see(read, policy)
    own = render_all(TASK.demonstrations("strokes", 6, seed=0), FMT, policy)
    assert len(read) == 6
    for one, other in zip(read, own, strict=True):
        assert (one.prompt, one.group, one.stop) == (other.prompt, other.group, StopReason.DEMONSTRATION)
        assert one.record["include"] == other.record["include"]
        ids = [np.concatenate([s.ids for s in t.segments]) for t in (one, other)]
        assert ids[0].tolist() == ids[1].tolist()
        kept = [[s.trained for s in t.segments] for t in (one, other)]
        assert kept[0] == kept[1]
        assert [s.role for s in one.segments] == [s.role for s in other.segments]
        for a, b in zip(one.segments, other.segments, strict=True):
            assert (a.image is None) == (b.image is None) and (a.image is None or np.array_equal(a.image, b.image))


def test_the_words_of_a_file_leave_out_tags_and_know_every_word(tmp_path):
    words = words_of(export(tmp_path), ["<ins>", "</ins>", "<des>", "</des>", "<inspect>", "</inspect>", "<refine>",
                                        "</refine>"])  # fmt: skip
    assert words <= set(TASK.words) and len(words) > 10


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "line 1: 'messages' is a list of messages, not None"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 1: there is no prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "a"}]}, "message 1: a message of 'user'; the first"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the assistant says nothing"),
        ({"prompt": "x", "messages": [{"role": "tool", "content": "a"}]}, "message 1: a message of 'tool'"),
        (
            {"prompt": "x", "messages": [{"role": "assistant", "content": 3}]},
            "message 1: the content is text or a list",
        ),
        (
            {"prompt": "x", "messages": [{"role": "assistant", "content": [{"type": "audio"}]}]},
            'message 1, part 1: a part is {"type": "text"',
        ),
        (
            {"prompt": "x", "messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "part 1: an image without content, and the column 'images' has none left",
        ),
        (
            {"prompt": "x", "messages": [{"role": "assistant", "content": [{"type": "image", "image": "no.png"}]}]},
            "part 1: the image .*no.png cannot be read",
        ),
        (
            {"prompt": "red", "messages": [{"role": "assistant", "content": "<inspect> red</inspect>"}]},
            r"line 1: demonstration 'red': segment 1: <inspect> \(inspect\) follows 'start'",
        ),
        (
            {"prompt": "unheard", "messages": [{"role": "assistant", "content": "<ins> unheard</ins>"}]},
            "line 1: .*unheard",
        ),
    ],
)
def test_a_row_that_is_no_demonstration_is_named(tmp_path, policy, row, words):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=words):
        load_demonstrations(SftConfig(data=str(tmp_path / "rows.jsonl")), FMT, policy)


# ---- stored rollouts ----


def stored(folder: Path, policy, rewards, stop=StopReason.END) -> Path:
    """Trajectories as a rollout leaves them: two answers to each prompt."""
    trajectories = render_all(TASK.demonstrations("strokes", len(rewards), seed=1), FMT, policy)
    for number, (trajectory, reward) in enumerate(zip(trajectories, rewards, strict=True)):
        trajectory.group, trajectory.member = number // 2, number % 2
        trajectory.prompt = f"prompt {number // 2}"
        trajectory.reward, trajectory.stop = reward, stop
    save_trajectories(trajectories, folder)
    return folder


def test_the_best_stored_rollouts_are_demonstrations(tmp_path, policy, caplog):
    folder = stored(tmp_path / "a", policy, [0.9, 0.2, 0.5, 0.7, None, 0.1])
    kept = load_demonstrations(SftConfig(data=str(folder), min_reward=0.5), FMT, policy)
    assert [t.key for t in kept] == ["0-0", "1-0", "1-1"]
    assert (
        "3 of 6 stored trajectories are not learned from: 2 below sft.min_reward 0.5, 1 without a reward" in caplog.text
    )
    assert "a/0-1" in caplog.text  # by name
    best = load_demonstrations(SftConfig(data=str(folder), best=1), FMT, policy)
    assert [t.key for t in best] == ["0-0", "1-1", "2-1"]
    assert len(load_demonstrations(SftConfig(data=str(folder)), FMT, policy)) == 6


def test_bad_ones_are_skipped_by_name_and_counted(tmp_path, policy, caplog):
    folder = stored(tmp_path / "a", policy, [0.9, 0.9, 0.9, 0.9])
    trajectories = load_trajectories(folder)
    trajectories[1].stop = StopReason.MAX_TOKENS
    del trajectories[2].segments[1]  # no plan
    trajectories[3].format = "subgoals"
    save_trajectories(trajectories, folder)
    assert [t.key for t in load_demonstrations(SftConfig(data=str(folder)), FMT, policy)] == ["0-0"]
    for reason in ("cut off (max_tokens)", "not well-formed", "written in the format 'subgoals'"):
        assert f"1 {reason}" in caplog.text
    with pytest.raises(UserError, match="none of the 4 trajectories in .* can be learned from: .*1 not well-formed"):
        load_demonstrations(SftConfig(data=str(folder), min_reward=1.0), FMT, policy)


def test_several_stored_sets_in_one_folder_are_read_in_order(tmp_path, policy):
    for name, reward in (("000010", 0.1), ("000020", 0.2)):
        stored(tmp_path / name, policy, [reward, reward])
    kept = load_demonstrations(SftConfig(data=str(tmp_path)), FMT, policy)
    assert [t.reward for t in kept] == [0.1, 0.1, 0.2, 0.2]


def test_demonstrations_have_no_reward_to_be_chosen_by(tmp_path, policy):
    with pytest.raises(UserError, match="sft.min_reward: .* holds demonstrations, which have no reward"):
        load_demonstrations(SftConfig(data=export(tmp_path), min_reward=0.5), FMT, policy)


def test_sampled_trajectories_train_as_they_were_sampled(tmp_path, policy):
    folder = stored(tmp_path / "a", policy, [0.9, 0.8])
    kept = demonstrate(TASK, FMT, policy, SftConfig(data=str(folder), best=1), seed=0)
    assert [t.reward for t in kept] == [0.9] and any(s.trained for s in kept[0].segments)


# ---- a run on one's own prompts, without code ----

RECIPE = """
name: mine
run_dir: {run}
policy: {{tiny: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}}}
task:
  dataset:
    path: {prompts}
    columns: {{prompt: question, wanted: answer}}
format: {{name: strokes, max_images: 4}}
sft: {{data: {demonstrations}, max_steps: 2, batch_size: 4, warmup_steps: 0}}
rollout: {{workers: 0, rows: 8, max_tokens: 80}}
rewards:
  parts:
    wanted: {{function: "{reward}:says", retries: 0}}
    form: {{function: format, options: {{mode: graded}}}}
  total: wanted + form
grpo: {{steps: 2, prompts_per_step: 2, num_generations: 2, learning_rate: 1.0e-4, save_every: 1}}
track: {{wandb: disabled}}
"""

REWARD = '''
def says(completions, wanted, trajectories, **columns):
    """The share of the wanted words that stand in the answer."""
    texts = ["".join(s.text for s in t.segments[1:]) for t in trajectories]
    return [sum(w in text for w in want.split()) / len(want.split()) for text, want in zip(texts, wanted)]
'''


def test_prompts_of_ones_own_train_a_policy_without_code(tmp_path, caplog):
    demonstrations = export(tmp_path / "demos", 8)
    questions = [d.prompt for d in TASK.demonstrations("strokes", 8, seed=0)]
    rows = [{"question": q, "answer": q.split()[-1]} for q in dict.fromkeys(questions)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            run=tmp_path / "run",
            prompts=tmp_path / "prompts.jsonl",
            demonstrations=demonstrations,
            reward=tmp_path / "reward.py",
        )
    )
    for command in ("grpo", "sft"):
        assert main([command, str(recipe), "--dry-run"]) == 0
    assert main(["sft", str(recipe)]) == 0
    assert main(["grpo", str(recipe)]) == 0
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(0 <= row["reward/wanted"] <= 1 and row["groups/in"] == 2 for row in metrics)
    out = tmp_path / "out"
    asked = ["--prompts", "2", "--samples", "3", "--split", "train", "--out", str(out)]
    assert main(["rollout", str(recipe), *asked]) == 0
    written = load_trajectories(out)
    assert [(t.group, t.member) for t in written] == [(g, m) for g in (0, 1) for m in range(3)]
    assert {t.record["wanted"] for t in written} <= {row["answer"] for row in rows}
    assert all(t.rewards["wanted"] is not None for t in written)

    # The best of them are demonstrations again, once it writes well: two steps teach no format.
    policy = load_policy(ChameleonPolicyConfig(path=str(tmp_path / "run/sft/model")))
    good = load_demonstrations(SftConfig(data=demonstrations), get_format("strokes", max_images=4), policy)
    for trajectory, well in zip(written, good, strict=False):
        trajectory.segments[1:], trajectory.stop, trajectory.reward = well.segments[1:], StopReason.END, 1.0
    written[1].reward = None
    written[2].record = build_task(load_recipe(recipe)).prompts("heldout")[0]
    save_trajectories(written, out)
    caplog.clear()
    again = [f"sft.data={out}", "sft.best=2", f"run_dir={tmp_path / 'again'}", f"policy.path={tmp_path}/run/sft/model"]
    assert main(["sft", str(recipe), *again]) == 0
    assert "2 of 6 stored trajectories are not learned from: 1 without a reward, 1 of a held-out prompt" in caplog.text
    assert (tmp_path / "again/sft/model/config.json").is_file()


def test_resuming_with_mended_prompts_wants_the_flag(tmp_path, capsys):
    demonstrations = export(tmp_path / "demos", 6)
    rows = [{"question": d.prompt, "answer": "red"} for d in TASK.demonstrations("strokes", 6, seed=0)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            run=tmp_path / "run", prompts=prompts, demonstrations=demonstrations, reward=tmp_path / "reward.py"
        )
    )
    assert main(["sft", str(recipe)]) == 0
    assert main(["grpo", str(recipe), "grpo.steps=1"]) == 0
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert main(["grpo", str(recipe), "--resume"]) == 2
    assert "--changed-prompts" in capsys.readouterr().err
    assert main(["grpo", str(recipe), "--resume", "--changed-prompts"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]
