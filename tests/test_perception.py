"""Rows that teach seeing: inspections, questions, critiques of sampled and of corrupted images, and how they are logged
and weighed. Tiny policies throughout; the shapes world's own visual tokenizer where images are looked at."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from formats.base import Codes, Part
from formats.registry import get_format
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.registry import load_policy
from policy.scoring.changed import changed_codes, changed_weights
from record.store import save_trajectories
from record.trajectory import Author, Modality, StopReason, Trajectory
from rl.advantages import compute_advantages
from rl.batches import plan
from rl.config import GrpoConfig
from rl.trainer import Trainer
from runtime.errors import UserError
from sft.config import CorruptionConfig, CritiquesConfig, PerceptionConfig, SftConfig
from sft.critiques import Row, balanced, corrupted_rows, self_sampled_rows, with_rectangle
from sft.demonstrations import WRONG_IMAGES, check_demonstrations, demonstrate, render_all
from sft.losses import learned, verdict_names, verdicts_of
from sft.mixture import counts, rows_beside
from sft.perception import first_words, perception_rows
from sft.teacher_forcing import examples
from sft.train import warm_start
from tasks.base import Critique, Demonstration
from tasks.registry import get_task
from tasks.shapes.language import claims
from tests.bigram import BigramPolicy, sampled_groups
from tests.fakes import FakeFormat, FakePolicy
from tests.families.bagel import Bagel, BagelFormat
from tests.families.transformer import WORDS as FAMILY_WORDS
from tests.properties import examples as tried
from tests.test_sft import image, prompt_segment, text
from tests.test_sft import policy as small  # noqa: F401
from tests.test_warm_start import told
from training.tracking import Tracker, read_metrics
from underdrawing.cli import main
from underdrawing.report.page import report_data, write_report

TASK = get_task("shapes")
FMT = get_format("strokes", max_images=4)
TINY = TinySection(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


@pytest.fixture(scope="module")
def policy():
    return load_policy(ChameleonPolicyConfig(tiny=TINY), TASK.words)


def section(**changes) -> SftConfig:
    fast = {"demonstrations": 8, "batch_size": 8, "warmup_steps": 0, "logging_steps": 1, "save_steps": 100}
    return SftConfig(**(fast | {"max_steps": 2, "learning_rate": 3e-3} | changes))


def trained(row: Trajectory) -> list[str]:
    return [segment.role for segment in row.segments if segment.trained]


# ---- how many ----


@pytest.mark.parametrize(
    "shares, made",
    [
        ({"perception": 0.5}, {"perception": 100}),
        ({"perception": 0.25, "critiques": 0.25}, {"perception": 50, "critiques": 50}),
        ({"corruption": 0.001}, {"corruption": 1}),
        ({}, {}),
    ],
)
def test_shares_are_of_all_rows(shares, made):
    assert counts(100, shares) == made


def test_shares_that_leave_no_demonstrations_and_labels_that_know_no_rows_are_refused():
    with pytest.raises(ValueError, match="perception.share 0.6 . corruption.share 0.4 leave less than 0.05"):
        section(perception={"share": 0.6}, corruption={"share": 0.4})
    for changes, key in (
        ({"perception": {"share": 0.1}}, "perception.share"),
        ({"changed_weight": 2}, "changed_weight"),
    ):
        with pytest.raises(ValueError, match=f"labels=release learns all .*{key} is for labels=default"):
            section(labels="release", **changes)
    with pytest.raises(ValueError, match="named twice"):
        section(perception={"kinds": ["count", "count"]})
    assert section(critiques={"share": 0.9}).shares() == {}  # no path: none


# ---- perception rows ----


@pytest.mark.parametrize("name", ["strokes", "self_critique", "subgoals"])
def test_an_inspection_is_learned_in_the_context_of_sampling_and_nothing_else_is(policy, name):
    fmt = get_format(name)
    rows = perception_rows(TASK, fmt, policy, PerceptionConfig(share=0.5, wrong=0.25), 12, seed=5)
    verdicts = Counter(bool(row.info[WRONG_IMAGES]) for row in rows)
    assert verdicts == {True: 3, False: 9}
    for row in rows:
        *before, words = row.segments
        assert not any(s.trained for s in before) and words.trained and words.modality is Modality.TEXT
        assert before[-1].modality is Modality.IMAGE_TOKENS and len(before[-1].ids) == 18
        assert sum(s.modality is not Modality.TEXT for s in before) == 1  # the first image: a short row
        said = claims(words.text).verdict
        assert said == ("wrong" if row.info[WRONG_IMAGES] else "fine")
        if said == "wrong":  # more has to follow, so the turn is not ended
            assert words.ids[-1] != policy.vocabulary.eos and row.info[WRONG_IMAGES] == [len(before) - 1]
    (example, *_), _ = examples(rows, fmt, policy, policy.max_length)
    learned_segment = example.trajectory.segments[-1]
    assert len(learned_segment.decisions) == len(learned_segment.ids)
    assert [p.segment for p in learned_segment.contexts[0].pieces] == list(range(len(example.trajectory.segments) - 1))
    assert sum(one.decisions for one in example.passes) == len(learned_segment.ids)
    again = perception_rows(TASK, fmt, policy, PerceptionConfig(share=0.5, wrong=0.25), 12, seed=5)
    assert [[s.ids.tolist() for s in a.segments] for a in again] == [[s.ids.tolist() for s in a.segments] for a in rows]


def test_words_on_an_image_come_after_what_is_called():
    shown = TASK.demonstrations("look", 1, 0)[0]
    image_at, words = first_words(shown.parts, get_format("look"))
    roles = [part.role for part in shown.parts]
    assert roles[image_at : words + 1] == ["sketch", "look", "crop", "inspect"]


def test_questions_show_the_image_in_the_prompt_and_learn_the_answer(policy):
    kinds = ["count", "inspection", "relation"]
    rows = perception_rows(TASK, FMT, policy, PerceptionConfig(share=0.5, kinds=kinds), 10, seed=1)
    assert Counter(row.format for row in rows) == {"questions": 7, "strokes": 3}
    asked = next(row for row in rows if row.record.get("kind") == "relation")
    opening, shown, said, answer = asked.segments
    assert shown.author is Author.USER and len(shown.ids) == 18 and answer.role == "answer"
    assert said.ids[:-1].tolist() == policy.vocabulary.encode(asked.prompt) and said.ids[-1] == policy.vocabulary.sep
    assert answer.ids.tolist() == [*policy.vocabulary.encode(answer.text), policy.vocabulary.eos]
    assert trained(asked) == ["answer"] and answer.text in ("yes", "no")
    found, _ = examples(rows, FMT, policy, policy.max_length)
    assert len(found) == 10
    questions = [e for e in found if e.trajectory.format == "questions"]
    assert all(len(e.trajectory.segments[-1].contexts[0].pieces) == 3 for e in questions)


def test_a_task_without_questions_and_kinds_that_are_none_are_named(policy):
    with pytest.raises(
        UserError, match="perception.kinds: the task 'shapes' asks no .* 'counts'; did you mean 'count'"
    ):
        rows_beside(TASK, FMT, policy, section(perception={"share": 0.5, "kinds": ["counts"]}), 8, 0)
    never_wrong = get_task("shapes", mistake_rate=0)
    with pytest.raises(UserError, match="no demonstration with words on a wrong first image; set .*wrong: 0"):
        rows_beside(never_wrong, FMT, policy, section(perception={"share": 0.5}), 8, 0)

    class Bare:
        name, words = "bare", TASK.words

    for changes in ({"corruption": {"share": 0.2}}, {"critiques": {"path": "somewhere", "share": 0.2}}):
        key = next(iter(changes))
        with pytest.raises(UserError, match=f"sft.{key}: the task 'bare' cannot say what is true of an image"):
            rows_beside(Bare(), FMT, policy, section(**changes), 8, 0)


# ---- self-sampled critiques ----


def sampled(policy, folder, count=6, format=FMT) -> list[Trajectory]:
    """Train prompts, the plan of a demonstration, and an image of the policy's own codes or one that was rendered."""
    shown = demonstrate(TASK, format, policy, section(demonstrations=count), seed=2)
    rng = np.random.default_rng(0)
    thoughts = []
    for number, one in enumerate(shown):
        segments = [replace(s) for s in one.segments[:4]]
        if number % 2:  # as an untrained policy draws
            v = policy.vocabulary
            codes = rng.choice(v.code_ids, v.codes_per_image).astype(np.int32)
            segments[2].ids = np.array([v.boi, *codes, v.eoi], np.int32)
            segments[2].image = policy.decode_images([codes])[0]
        for segment in segments:
            if segment.author is Author.POLICY and segment.modality is Modality.TEXT:
                segment.text = policy.vocabulary.decode(segment.ids)
        thoughts.append(replace(one, segments=segments, stop=StopReason.END, info={}, group=number))
    save_trajectories(thoughts, folder)
    return thoughts


def test_what_the_policy_drew_is_seen_as_it_was_sampled_and_the_true_words_are_learned(policy, tmp_path):
    stored = sampled(policy, tmp_path / "rollout")
    config = CritiquesConfig(path=str(tmp_path / "rollout"), share=0.3, wrong=0.5)
    rows = self_sampled_rows(TASK, FMT, policy, config, 8, 0, False)
    assert Counter(2 in row.info[WRONG_IMAGES] for row in rows) == {True: 4, False: 4}
    by_ids = {tuple(t.segments[2].ids): t for t in stored}
    for row in rows:
        mine = by_ids[tuple(row.segments[2].ids)]  # the very codes
        assert [s.ids.tolist() for s in row.segments[:3]] == [s.ids.tolist() for s in mine.segments[:3]]
        assert not any(s.trained for s in row.segments[:3])
        wrong = 2 in row.info[WRONG_IMAGES]
        assert claims(row.segments[3].text).verdict == ("wrong" if wrong else "fine")
        assert row.segments[3].trained
        drawn = [n for n, s in enumerate(row.segments) if s.modality is not Modality.TEXT and n > 2]
        assert all(len(row.segments[n].ids) == 18 for n in drawn)
        assert [row.segments[n].trained for n in drawn] == [n not in row.info[WRONG_IMAGES] for n in drawn]
    found, _ = examples(rows, FMT, policy, policy.max_length)
    assert len(found) == 8
    short = self_sampled_rows(TASK, FMT, policy, config.model_copy(update={"learn": "inspection"}), 8, 0, False)
    assert all(trained(row) == ["inspect"] and len(row.segments) == 4 for row in short)


def test_what_cannot_be_criticised_is_counted_or_refused(policy, tmp_path, caplog):
    with pytest.raises(UserError, match="no stored trajectories in .*none; write some with `underdrawing rollout"):
        self_sampled_rows(TASK, FMT, policy, CritiquesConfig(path=str(tmp_path / "none")), 4, 0, False)
    thoughts = sampled(policy, tmp_path / "a")
    heldout = [replace(t, record=TASK.prompts("heldout")[0]) for t in thoughts]
    save_trajectories(heldout, tmp_path / "b")
    with pytest.raises(UserError, match="holds no image that can be criticised: 6 of a held-out prompt"):
        self_sampled_rows(TASK, FMT, policy, CritiquesConfig(path=str(tmp_path / "b")), 4, 0, False)
    save_trajectories([replace(t, format="subgoals") for t in thoughts[:3]] + thoughts[3:], tmp_path / "c")
    with caplog.at_level("INFO"):
        self_sampled_rows(TASK, FMT, policy, CritiquesConfig(path=str(tmp_path / "c")), 4, 0, False)
    assert "3 written in the format 'subgoals'" in caplog.text
    other = load_policy(ChameleonPolicyConfig(tiny=TINY), [*TASK.words[5:], *TASK.words[:5], "more"])
    with pytest.raises(UserError, match="sampled with another tokenizer. Give the weights that sampled it"):
        self_sampled_rows(TASK, FMT, other, CritiquesConfig(path=str(tmp_path / "a")), 4, 0, False)
    right = [t for n, t in enumerate(thoughts) if n in (0, 2, 4) and not says_wrong(t)]
    save_trajectories(right, tmp_path / "d")
    with pytest.raises(UserError, match="none of the .* images is wrong; set sft.critiques.wrong: 0"):
        self_sampled_rows(TASK, FMT, policy, CritiquesConfig(path=str(tmp_path / "d")), 4, 0, False)


@tried(0.5)
@given(
    right=st.integers(1, 6), wrong=st.integers(1, 6), count=st.integers(1, 20), share=st.sampled_from([0.0, 0.5, 1.0])
)
def test_images_are_taken_equally_often_by_verdict(right, wrong, count, share):
    rows = [Row(Trajectory(str(n), {}, "strokes", []), 0, n < right) for n in range(right + wrong)]
    taken = balanced(rows, count, share, "sft.critiques", np.random.default_rng(count))
    times = Counter(row.trajectory.prompt for row in taken)
    by_verdict = {fine: [times[row.trajectory.prompt] for row in rows if row.fine == fine] for fine in (True, False)}
    assert len(taken) == count and sum(by_verdict[False]) == round(share * count)
    assert all(max(each) - min(each) <= 1 for each in by_verdict.values())


def says_wrong(thought: Trajectory) -> bool:
    return "wrong" in thought.segments[3].text


# ---- corrupted images ----


def test_corruption_that_does_harm_is_repaired_and_that_which_does_none_is_passed_over(policy):
    rows = corrupted_rows(TASK, FMT, policy, CorruptionConfig(share=0.5, ignore=0.5), 8, 0, False)
    assert Counter(bool(row.info[WRONG_IMAGES]) for row in rows) == {True: 4, False: 4}
    for row in rows:
        roles = [s.role for s in row.segments]
        assert roles[:4] == ["prompt", "plan", "sketch", "inspect"] and not any(s.trained for s in row.segments[:3])
        sketch = row.segments[2]
        drawn = policy.decode_images([sketch.ids[1:-1]])[
            0
        ]  # what the detector saw; of a batch, it is rounded otherwise
        np.testing.assert_allclose(drawn.astype(int), sketch.image.astype(int), atol=1)
        if row.info[WRONG_IMAGES]:
            assert "wrong" in row.segments[3].text
        else:  # it goes on as if nothing were there
            assert "fine" in row.segments[3].text and len(row.segments) == 4
    assert any("redraw" in [s.role for s in row.segments] for row in rows)
    again = corrupted_rows(TASK, FMT, policy, CorruptionConfig(share=0.5, ignore=0.5), 8, 0, False)
    assert [[s.ids.tolist() for s in a.segments] for a in again] == [[s.ids.tolist() for s in a.segments] for a in rows]


@tried(0.6)
@given(seed=st.integers(0, 999), cells=st.integers(2, 6), size=st.tuples(st.integers(6, 20), st.integers(6, 20)))
def test_a_rectangle_of_another_image(seed, cells, size):
    image_, other = np.zeros((12, 18, 3), np.uint8), np.full((*size, 3), 9, np.uint8)
    mixed = with_rectangle(image_, other, cells, np.random.default_rng(seed))
    rows, columns = np.nonzero((mixed == 9).all(2))
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    assert len(rows) == (bottom - top) * (right - left) and not image_.any()  # one rectangle, and a copy
    for edge, side in ((top, 12), (bottom, 12), (left, 18), (right, 18)):
        assert edge in np.linspace(0, side, cells + 1).round()
    assert bottom - top <= 12 * (cells // 2) / cells + 1 and right - left <= 18 * (cells // 2) / cells + 1


# ---- a family that denoises ----


class Dots:
    """One color all over, and words that say whether the top has it: "right", or "left" where it has not."""

    name, words, question_kinds = "dots", list(FAMILY_WORDS), ("color",)

    def image(self, color: str) -> np.ndarray:
        return np.full((10, 4, 3), {"red": 200, "blue": 40}[color], np.uint8)

    def prompts(self, split):
        return []

    def demonstrations(self, format, count, seed):
        rng = np.random.default_rng(seed)
        made = []
        for _ in range(count):
            color, other = rng.permutation(["red", "blue"])
            wrong = rng.random() < 0.5
            parts = [Part("plan", f"<ins> {color} </ins><des> {color} dot </des>")]
            parts.append(Part("sketch", image=self.image(other if wrong else color)))
            parts += self._words(color, wrong)
            made.append(Demonstration(color, {"color": str(color)}, tuple(parts), (1,) if wrong else ()))
        return made

    def _words(self, color, wrong) -> list[Part]:
        if not wrong:
            return [Part("inspect", "<inspect> right </inspect>")]
        said = [Part("inspect", "<inspect> left </inspect>"), Part("refine", f"<refine> {color} </refine>")]
        return [*said, Part("redraw", image=self.image(color)), *self._words(color, False)]

    def critique(self, format, record, before, images, seed):
        seen = before[-1].image[0].mean()
        fine = (seen > 150) == (record["color"] == "red")
        return Critique(bool(fine), tuple(self._words(record["color"], not fine)))

    def questions(self, kind, count, seed):
        colors = [("red", "blue")[n % 2] for n in range(count)]
        return [Demonstration("dot", {}, (Part("answer", c),), media=(self.image(c),)) for c in colors]


def test_a_family_that_denoises_learns_all_rows_and_latents_stay_as_they_were_sampled(tmp_path):
    policy, fmt, task = Bagel(), BagelFormat(False, max_images=3), Dots()
    thoughts = render_all(task.demonstrations("strokes", 6, 0), fmt, policy)
    for number, thought in enumerate(thoughts):
        thought.stop, thought.group = StopReason.END, number
        for one in thought.segments:
            one.text = policy.vocabulary.decode(one.ids) if one.modality is Modality.TEXT else ""
    save_trajectories(thoughts, tmp_path)
    config = section(
        perception={"share": 0.2, "kinds": ["inspection", "color"]},
        critiques={"path": str(tmp_path), "share": 0.2},
        corruption={"share": 0.2, "ignore": 0.5},
    )
    rows = rows_beside(task, fmt, policy, config, 24, 0)
    assert len(rows) == 36 and Counter(row.format for row in rows) == {"strokes": 30, "questions": 6}
    found, _ = examples([row for row in rows if row.format == "strokes"], fmt, policy, policy.max_length)
    assert len(found) == 30
    stored = [s.latent.tobytes() for t in thoughts for s in t.segments if s.latent is not None]
    criticised = [row for row in rows[12:24]]
    assert all(next(s for s in row.segments if s.latent is not None).latent.tobytes() in stored for row in criticised)
    for row in rows[24:]:  # corrupted: what is seen of the latent is what was judged
        sketch = next(s for s in row.segments if s.latent is not None)
        assert np.array_equal(policy.decode_images([sketch.latent])[0], sketch.image)
        wrong = bool(row.info[WRONG_IMAGES])
        assert ("left" in row.segments[3].text) == wrong == ("redraw" in [s.role for s in row.segments])
        assert not any(s.trained for s in row.segments[:3]) and row.segments[3].trained


# ---- losses by verdict ----


def test_verdicts_by_hand(small):  # noqa: F811
    def thought(wrong):
        segments = [
            prompt_segment(small, "a"),
            text(small, "plan", "red"),
            image(small, 1),
            text(small, "inspect", "."),
        ]
        segments += [text(small, "refine", "red"), image(small, 2), text(small, "inspect", "fine")]
        return Trajectory("a", {}, "strokes", segments, info={} if wrong is None else {WRONG_IMAGES: wrong})

    assert verdicts_of(thought([2])) == ["", "", "", "inspect/wrong", "refine/wrong", "", "inspect/right"]
    assert verdicts_of(thought(None)) == [""] * 7
    # A refinement only ever follows a wrong image: by verdict it would be logged twice.
    assert verdict_names([thought([2]), thought(None)]) == ["inspect/right", "inspect/wrong"]
    assert verdict_names([thought([])]) == []
    (example,), _ = examples([thought([2])], FMT, small, 256)
    scored = small.score(example.passes)
    by = learned(example.passes, scored, [], {}, ["inspect/right", "inspect/wrong"])
    assert by.verdict_N.tolist() == [{3: 1, 6: 0}.get(int(s), -1) for s in scored.segment_N]


def test_a_run_logs_losses_by_verdict_and_the_report_draws_them(policy, tmp_path):
    config = section(perception={"share": 0.5}, corruption={"share": 0.2}, max_steps=3)
    learner = load_policy(ChameleonPolicyConfig(tiny=TINY), TASK.words)
    shown = demonstrate(TASK, FMT, learner, config, 0)
    check_demonstrations(shown, FMT)
    rows = [*shown, *rows_beside(TASK, FMT, learner, config, len(shown), 0)]
    assert len(rows) == 8 + 13 + 5  # 8 / 0.3 = 26.7 rows in all
    tracker = Tracker(tmp_path / "sft")
    warm_start(learner, FMT, rows, config, tmp_path, tracker=tracker)
    tracker.close()
    metrics = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    found = {name for row in metrics for name in row}
    assert {"sft/loss/inspect", "sft/loss/inspect/right", "sft/loss/inspect/wrong"} <= found
    assert "sft/loss/refine/wrong" not in found
    page = write_report(report_data(tmp_path), tmp_path / "report.html").read_text()
    assert "Warm-start loss by verdict, nats" in page and "inspect/wrong" in page


# ---- weights that follow what changed ----


def test_weights_of_changed_codes_by_hand(small):  # noqa: F811
    v = small.vocabulary
    first = image(small, 1)
    second = image(small, 1, role="redraw")
    assert v.codes_per_image == 16
    for at in (3, 9):  # ids 0 and 17 are the markers
        second.ids[at] = v.code_ids[(list(v.code_ids).index(second.ids[at]) + 1) % len(v.code_ids)]
    segments = [
        prompt_segment(small, "a"),
        first,
        text(small, "inspect", "wrong"),
        second,
        text(small, "inspect", "fine"),
    ]
    trajectory = Trajectory("a", {}, "strokes", segments)
    (example,), _ = examples([trajectory], FMT, small, 256)
    forced = example.trajectory
    assert changed_codes(forced, 1) is None and changed_codes(forced, 2) is None
    # Its decisions are the opening marker and the codes, so decision n is id n.
    assert np.flatnonzero(changed_codes(forced, 3)).tolist() == [3, 9]
    scored = small.score([*example.passes, *example.passes])
    weight_N = changed_weights([*example.passes, *example.passes], scored, 3.0)
    at = torch.nonzero(weight_N != 1).flatten()
    assert weight_N[at].tolist() == [3.0] * 4 and scored.segment_N[at].tolist() == [3] * 4
    first_of_redraw = int(torch.nonzero(scored.segment_N == 3)[0])
    assert (at[:2] - first_of_redraw).tolist() == [3, 9]
    smaller = replace(trajectory, segments=[*segments[:1], replace(first, ids=first.ids[:9]), *segments[2:]])
    assert changed_codes(smaller, 3) is None  # of another size: nothing stands at the same place


def test_the_loss_weighs_changed_codes(small, tmp_path):  # noqa: F811
    from tests.test_sft import all_of, trainer_for

    segments = [prompt_segment(small, "a"), image(small, 1), text(small, "inspect", "wrong"), image(small, 2)]
    rows = [Trajectory("a", {}, "strokes", segments)]
    trainer = trainer_for(small, rows, tmp_path, changed_weight=5.0)
    loss = float(trainer.compute_loss(small.model, all_of(rows)).detach())
    (example,), _ = examples(rows, FMT, small, 256)
    with torch.no_grad():
        scored = small.score(example.passes)
    differs = (segments[3].ids != segments[1].ids)[:17]
    weight_N = np.ones(len(scored.logprob_N))
    weight_N[-17:] = np.where(differs, 5.0, 1.0)
    assert 5 < differs.sum() < 17
    assert loss == pytest.approx(-float((weight_N * scored.logprob_N.numpy()).sum() / weight_N.sum()), rel=1e-5)


def test_a_family_without_codes_is_refused_by_name(tmp_path):
    flow = FakePolicy(flow=True)
    with pytest.raises(
        UserError, match="sft.changed_weight: .*'fake' draws no image as codes; set sft.changed_weight: 1"
    ):
        warm_start(flow, FakeFormat("flow"), told(FakePolicy().vocabulary, 2), section(changed_weight=2.0), tmp_path)
    assert not (tmp_path / "sft").exists()


def test_changed_codes_weigh_in_grpo_as_in_the_warm_start():
    policy = BigramPolicy()
    policy.vocabulary = SimpleNamespace(imaging=Codes(np.arange(4, 8, dtype=np.int32), 3, 2, 3))
    groups = sampled_groups(policy, 2, 2)
    for group in groups:
        for number, thought in enumerate(group):
            thought.reward = float(number)
            thought.segments.append(
                replace(thought.segments[2], role="redraw", ids=np.array([2, 4, 5, 6, 3], np.int32))
            )
    weights = {}
    for factor in (1.0, 3.0):
        config = GrpoConfig(changed_weight=factor, loss_type="token")
        (batch,) = plan(policy, [t for g in compute_advantages(groups, config).trained for t in g], config, 1, 0)
        scored = policy.score(batch.passes)
        weights[factor] = Trainer(policy, config, Accelerator(cpu=True))._decisions(batch, scored, None, None).weight_N
    factors = [
        3.0 if a != b else 1.0
        for one in batch.passes  # packed in an order of their own
        for a, b in zip((4, 5, 6), one.trajectory.segments[2].ids[1:-1], strict=True)
    ]
    ratio_N = weights[3.0] / weights[1.0]
    assert ratio_N[scored.segment_N == 4].tolist() == pytest.approx(factors) and set(factors) == {1.0, 3.0}
    assert set(ratio_N[scored.segment_N != 4].tolist()) == {1.0}


# ---- the commands ----

RECIPE = str(Path(__file__).parent.parent / "configs/shapes/perception.yaml")
SMALL = [
    "policy.tiny.hidden_size=16",
    "policy.tiny.num_hidden_layers=1",
    "policy.tiny.num_attention_heads=2",
    "policy.tiny.intermediate_size=32",
    "sft.demonstrations=12",
    "sft.max_steps=2",
    "sft.batch_size=8",
    "sft.logging_steps=1",
    "rollout.workers=0",
    "rollout.rows=8",
    "rollout.max_tokens=80",
    "format.constrain=full",
    "rewards.total=0.5 * detect + 0.5 * graded",
    "format.options={max_tokens: 8}",
    "track.wandb=disabled",
]


def test_a_dry_run_finds_what_the_rows_lack(capsys, tmp_path):
    assert main(["sft", RECIPE, "--dry-run", *SMALL, f"run_dir={tmp_path}"]) == 0
    assert "perception:" in capsys.readouterr().out
    for override, words in (
        ("sft.perception.kinds=[count, shape]", "no questions of the kind 'shape'"),
        ("sft.critiques.path=none/there", "sft.critiques.path: no stored trajectories in none/there"),
        ("sft.perception.share=0.9", "leave less than 0.05 of the rows"),
        ("sft.corruption.ignored=0.9", "unknown key; did you mean 'ignore'"),
    ):
        assert main(["sft", RECIPE, "--dry-run", override]) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
    run = tmp_path / "run"
    assert main(["sft", RECIPE, *SMALL, f"run_dir={run}", "sft.critiques.path=none/there"]) == 2
    assert "no stored trajectories" in capsys.readouterr().err and not (run / "recipe.yaml").exists()


@pytest.mark.slow
def test_warm_start_sample_and_second_warm_start_are_three_commands(capsys, tmp_path):
    """Untrained, it draws nothing right: all critiques are of wrong images."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["sft", RECIPE, *SMALL, f"run_dir={first}"]) == 0
    assert main(["rollout", RECIPE, *SMALL, f"run_dir={first}", "--split", "train", "--prompts", "6"]) == 0
    again = ["sft", RECIPE, *SMALL, f"run_dir={second}", f"policy.path={first / 'sft/model'}"]
    again += [f"sft.critiques.path={first / 'rollout'}"]
    assert main(again) == 2
    assert "is right; set sft.critiques.wrong: 1, or give more of them" in capsys.readouterr().err
    assert main([*again, "sft.critiques.wrong=1"]) == 0
    rows = read_metrics(second / "sft" / "metrics.jsonl")
    assert rows[-1]["step"] == 2 and any("sft/loss/inspect/wrong" in row for row in rows)
    assert (second / "sft/model/config.json").is_file()
