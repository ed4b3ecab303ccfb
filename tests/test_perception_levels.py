"""Rows that teach seeing, at the shapes world's levels middle and hard: with a tiny Chameleon and the grid's own visual
tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from formats.registry import get_format
from policy.chameleon.config import ChameleonPolicyConfig
from policy.registry import load_policy
from record.store import save_trajectories
from record.trajectory import Author, Modality, StopReason
from runtime.errors import UserError
from sft.config import CorruptionConfig, CritiquesConfig, PerceptionConfig
from sft.critiques import corrupted_rows, self_sampled_rows
from sft.demonstrations import WRONG_IMAGES, demonstrate
from sft.perception import perception_rows
from sft.teacher_forcing import examples
from tasks.registry import get_task
from tests.test_perception import RECIPE, SMALL, TINY, section, trained
from training.tracking import read_metrics
from underdrawing.cli import main

TASK = get_task("shapes", level="middle")
FMT = get_format("strokes", max_images=4)
KINDS = ["inspection", *TASK.question_kinds]


@pytest.fixture(scope="module")
def policy():
    """It knows the words of both levels, which are the same ones."""
    assert TASK.words == get_task("shapes", level="hard").words
    return load_policy(ChameleonPolicyConfig(tiny=TINY.model_copy(update={"vq": "shapes_grid"})), TASK.words)


def says(row) -> str:
    """The verdict on the first image."""
    return TASK.claims(row.segments[3].text).verdict


@pytest.mark.parametrize("level", ["middle", "hard"])
def test_every_kind_of_row_is_written_and_fits(policy, level):
    task = get_task("shapes", level=level)
    rows = perception_rows(task, FMT, policy, PerceptionConfig(share=0.5, kinds=KINDS), 24, seed=0)
    assert Counter(row.record.get("kind", "inspection") for row in rows) == dict.fromkeys(KINDS, 4)
    found, _ = examples(rows, FMT, policy, policy.max_length)
    assert len(found) == 24
    shown_in = [next(s for s in row.segments if s.image is not None) for row in rows]
    for row, shown, drawn in zip(
        rows, shown_in, policy.decode_images([shown.ids[1:-1] for shown in shown_in]), strict=True
    ):
        # What is learned is true of the image as the policy's tokenizer draws it.
        assert Counter(map(str, task.seen_in(task.detect(drawn)))) == Counter(
            map(str, task.seen_in(task.detect(shown.image)))
        )
        if row.format == "strokes":
            assert says(row) == ("wrong" if row.info[WRONG_IMAGES] else "fine") and trained(row) == ["inspect"]


def test_a_first_image_that_lacks_what_comes_next_is_called_wrong_as_its_words_say(policy):
    fmt = get_format("self_critique")
    with pytest.raises(UserError, match="no demonstration with words on a right first image; set .*wrong: 1"):
        perception_rows(TASK, fmt, policy, PerceptionConfig(share=0.5), 4, seed=0)
    for row in perception_rows(TASK, fmt, policy, PerceptionConfig(share=0.5, wrong=1), 4, seed=0):
        assert TASK.claims(row.segments[-1].text).verdict == "wrong" and row.info[WRONG_IMAGES]


def test_corrupted_images_are_named_and_redrawn_or_passed_over(policy):
    rows = corrupted_rows(TASK, FMT, policy, CorruptionConfig(share=0.5, ignore=0.5), 12, 0, False)
    assert Counter(bool(row.info[WRONG_IMAGES]) for row in rows) == {True: 6, False: 6}
    for row in rows:
        assert not any(segment.trained for segment in row.segments[:3]) and row.segments[3].trained
        assert says(row) == ("wrong" if row.info[WRONG_IMAGES] else "fine")
        redrawn = [segment for segment in row.segments[3:] if segment.modality is not Modality.TEXT]
        assert all(len(segment.ids) == 18 for segment in redrawn) and len(redrawn) <= 3
        assert bool(row.info[WRONG_IMAGES]) or not redrawn
    assert sum(len(row.segments) > 4 for row in rows) >= 4
    assert len(examples(rows, FMT, policy, policy.max_length)[0]) == 12


def test_critiques_of_what_the_policy_drew(policy, tmp_path):
    """Half of the images are demonstrations', half of random codes, as an untrained policy draws."""
    shown = demonstrate(TASK, FMT, policy, section(demonstrations=12), seed=2)
    rng, thoughts = np.random.default_rng(0), []
    for number, one in enumerate(shown):
        segments = [replace(segment) for segment in one.segments[:4]]
        if number % 2:
            codes = rng.choice(policy.vocabulary.code_ids, 16).astype(np.int32)
            segments[2].ids = np.array([policy.vocabulary.boi, *codes, policy.vocabulary.eoi], np.int32)
            segments[2].image = policy.decode_images([codes])[0]
        for segment in segments:
            if segment.author is Author.POLICY and segment.modality is Modality.TEXT:
                segment.text = policy.vocabulary.decode(segment.ids)
        thoughts.append(replace(one, segments=segments, stop=StopReason.END, info={}, group=number))
    save_trajectories(thoughts, tmp_path)
    config = CritiquesConfig(path=str(tmp_path), share=0.3, wrong=0.5)
    rows = self_sampled_rows(TASK, FMT, policy, config, 12, 0, False)
    assert Counter(2 in row.info[WRONG_IMAGES] for row in rows) == {True: 6, False: 6}
    stored = {tuple(one.segments[2].ids) for one in thoughts}
    for row in rows:
        assert tuple(row.segments[2].ids) in stored and row.segments[3].trained
        assert says(row) == ("wrong" if 2 in row.info[WRONG_IMAGES] else "fine")
        drawn = [n for n, s in enumerate(row.segments) if s.modality is not Modality.TEXT and n > 2]
        assert [row.segments[n].trained for n in drawn] == [n not in row.info[WRONG_IMAGES] for n in drawn]
    assert len(examples(rows, FMT, policy, policy.max_length)[0]) == 12


GIVEN = ["task.level=middle", "sft.perception.kinds=[inspection, count, object, presence, relation, size]"]


@pytest.mark.slow
def test_the_recipe_learns_at_a_level(tmp_path):
    assert main(["sft", RECIPE, *SMALL, *GIVEN, "sft.demonstrations=16", f"run_dir={tmp_path}"]) == 0
    rows = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert rows[-1]["step"] == 2 and any("sft/loss/inspect/wrong" in row for row in rows)
    assert (tmp_path / "sft/model/config.json").is_file()


def test_the_recipe_takes_a_level(capsys, tmp_path):
    assert main(["sft", RECIPE, "--dry-run", *SMALL, *GIVEN, f"run_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "shapes_grid" in said and "size" in said
    assert main(["sft", RECIPE, "--dry-run", "sft.perception.kinds=[size]", f"run_dir={tmp_path / 'easy'}"]) == 2
    assert "no questions of the kind 'size'" in capsys.readouterr().err
