from collections import Counter

import numpy as np
import pytest

from formats.base import Codes
from formats.registry import get_format
from formats.render import render as render_thought
from formats.render import tags_of
from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.functions.geneval import evaluate
from rollout.tools.base import ToolCall
from rollout.tools.look import Look
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.demonstrations import FORMATS
from tasks.shapes.language import KINDS, claims, holds, parse_plan, requirement
from tasks.shapes.prompts import HELDOUT, TAGS, compositions
from tasks.shapes.world import PLACES, place_of

TASK = get_task("shapes")
COUNT = 600
THOUGHTS = [name for name in FORMATS if name != "direct"]  # of more than one image, so that one may be wrong


@pytest.fixture(scope="module")
def written():
    return {name: TASK.demonstrations(name, COUNT, seed=0) for name in FORMATS}


def judged(record, image):
    objects: dict = {}
    for seen in TASK.detect(image):
        objects.setdefault(seen.cls, []).append({"box": seen.box, "score": seen.score, "color": seen.color})
    return evaluate(record, objects)[0]


def images(demonstration, author=Author.POLICY):
    """What is drawn, or with another author what is shown."""
    return [(i, p.image) for i, p in enumerate(demonstration.parts) if p.image is not None and p.author is author]


class Words:
    """A vocabulary of whole words: enough to render demonstrations, with room for 512 codes."""

    def __init__(self, tags):
        self.words = ["<pad>", "<s>", "</s>", "<boi>", "<eoi>", *tags, *TASK.words, *Look(Look.Options()).words]
        self.index = {word: i for i, word in enumerate(self.words)}
        self.pad, self.bos, self.eos, self.boi, self.eoi, self.sep = 0, 1, 2, 3, 4, None
        self.code_ids = np.arange(len(self.words), len(self.words) + 512, dtype=np.int32)
        self.size, self.codes_per_image = len(self.words) + 512, 16
        self.imaging = Codes(self.code_ids, self.codes_per_image, self.boi, self.eoi)
        self.never = np.empty(0, np.int32)

    def encode(self, text):
        return [self.index[word] for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def piece(self, id):
        return f"{self.words[id]} " if id < len(self.words) else ""


@pytest.mark.parametrize("name", list(FORMATS))
def test_demonstrations_are_sentences_of_their_format(written, name):
    fmt = get_format(name)
    vocabulary = Words(tags_of(fmt))
    codes = vocabulary.code_ids[:16]
    for shown in written[name][:200]:
        # render raises when a part is no sentence of the format, and encode when a word is unknown
        count = len(images(shown)) + len(images(shown, Author.ENVIRONMENT))
        thought = render_thought(fmt, shown.prompt, shown.record, shown.parts, vocabulary, [codes] * count)
        assert fmt.violations(thought) == []


@pytest.mark.parametrize("name", THOUGHTS)
def test_two_to_four_images_and_the_last_is_right(written, name):
    counts = Counter(len(images(shown)) for shown in written[name])
    assert set(counts) == ({1, 2, 3} if name == "look" else {2, 3, 4})
    for shown in written[name]:
        assert judged(shown.record, images(shown)[-1][1]), shown.prompt


def test_only_the_plan_to_keep_a_right_sketch_is_needless(written):
    for shown in written["strokes"]:
        kept = [i for i, part in enumerate(shown.parts) if part.role == "plan" and "keep all" in part.text]
        assert list(shown.needless) == kept
        for i in kept:  # after an image that is right and was called so
            assert "fine" in shown.parts[i - 1].text and judged(shown.record, shown.parts[i - 2].image)
    assert 0.2 < np.mean([bool(shown.needless) for shown in written["strokes"]]) < 0.6
    assert not any(shown.needless for name in ("subgoals", "self_critique") for shown in written[name])


@pytest.mark.parametrize("name", THOUGHTS)
def test_half_of_them_have_a_mistake(written, name):
    share = np.mean([bool(shown.mistakes) for shown in written[name]])
    assert 0.4 < share < 0.6
    assert not any(shown.mistakes for shown in get_task("shapes", mistake_rate=0).demonstrations(name, 60, 0))


@pytest.mark.parametrize("name", list(FORMATS))
def test_tags_are_even_and_prompts_are_train_ones(written, name):
    assert Counter(shown.record["tag"] for shown in written[name]) == dict.fromkeys(TAGS, COUNT // 6)
    assert not any(compositions(shown.record) & HELDOUT for shown in written[name])


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_word_is_known(written, name):
    known = {*TASK.words, *tags_of(get_format(name)), *(Look(Look.Options()).words if name == "look" else ())}
    for shown in written[name]:
        assert {word for part in shown.parts for word in part.text.split()} <= known
        assert set(shown.prompt.split()) <= known


def inspected(name, shown):
    """(record owed, wrong on purpose, image, the words after it) of each image that is commented on."""
    stage = shown.record
    for i, part in enumerate(shown.parts):
        if name == "strokes" and part.role == "plan":
            stage = requirement(shown.record, part.text)
        if part.image is not None and part.author is Author.POLICY:
            said = i + (3 if name == "look" else 1)  # after a look and its crop
            if said < len(shown.parts):
                yield stage, i in shown.mistakes, part.image, shown.parts[said].text


@pytest.mark.parametrize("name", ["strokes", "self_critique", "look"])
def test_inspections_say_what_is_there_and_are_right(written, name):
    verdicts: Counter = Counter()
    for shown in written[name]:
        for stage, mistaken, image, text in inspected(name, shown):
            claim = claims(text)
            detections = TASK.detect(image)
            assert Counter(c.shape for c in claim.seen) == Counter(d.cls for d in detections)
            assert Counter(c.color for c in claim.seen) == Counter(d.color for d in detections)
            assert (claim.verdict == "wrong") == mistaken == (not judged(stage, image)), (shown.prompt, text)
            for mistake in claim.mistakes:
                assert holds(mistake, stage, detections), (shown.prompt, text)
                verdicts[mistake.kind] += 1
            assert len(claim.mistakes) == mistaken
            verdicts[claim.verdict] += 1
    assert all(verdicts[name] > 5 for name in (*KINDS, "fine", "wrong")), verdicts


def test_subgoal_reflections_are_right(written):
    for shown in written["subgoals"]:
        for _, mistaken, image, text in inspected("subgoals", shown):
            claim = claims(text)
            assert claim.verdict == ("wrong" if mistaken else "fine")
            assert Counter(c.shape for c in claim.seen) == Counter(d.cls for d in TASK.detect(image))


def test_a_repair_changes_one_object_and_keeps_the_rest(written):
    seen = 0
    for shown in written["strokes"]:
        for i in shown.mistakes:
            before = {(d.cls, d.color, d.box) for d in TASK.detect(shown.parts[i].image)}
            after_index = next(j for j, part in enumerate(shown.parts[i + 1 :], i + 1) if part.image is not None)
            if after_index in shown.mistakes:
                continue  # went wrong again
            after = {(d.cls, d.color, d.box) for d in TASK.detect(shown.parts[after_index].image)}
            assert 1 <= len(before ^ after) <= 2
            seen += 1
    assert seen > 100


def test_what_is_looked_at_is_what_the_tool_shows_and_what_is_wrong(written):
    tool, mistaken = Look(Look.Options()), 0
    for shown in written["look"]:
        drawn, looked = images(shown), images(shown, Author.ENVIRONMENT)
        assert len(drawn) == len(looked)
        for (i, image), (j, seen) in zip(drawn, looked, strict=True):
            call, inspected = shown.parts[i + 1], shown.parts[i + 3]
            assert (call.role, shown.parts[j].role, inspected.role) == ("look", "crop", "inspect") and j == i + 2
            body = call.text.removeprefix("<look>").removesuffix("</look>").strip()
            before = Trajectory("", {}, "look", [Segment("sketch", Author.POLICY, Modality.IMAGE, True, image=image)])
            (answer,) = tool.call(ToolCall("look", body=body), before)
            assert np.array_equal(answer, seen)
            for mistake in claims(inspected.text).mistakes:
                x0, y0, x1, y1 = map(int, body.split())
                assert PLACES[place_of((x0 + 2, y0 + 2, x1 - 2, y1 - 2))] == mistake.object.place
                mistaken += 1
    assert mistaken > 100


def test_right_images_show_what_their_plan_describes(written):
    for shown in written["strokes"]:
        planned = None
        for i, part in enumerate(shown.parts):
            if part.role == "plan":
                planned = parse_plan(part.text)
            if part.image is not None and i not in shown.mistakes:
                assert Counter((c.shape, c.color) for c in planned) == Counter(
                    (d.cls, d.color) for d in TASK.detect(part.image)
                )


def test_first_sketches_mostly_attempt_everything(written):
    whole = [
        len(parse_plan(shown.parts[0].text)) == sum(c["count"] for c in shown.record["include"])
        for shown in written["strokes"]
    ]
    assert 0.8 < np.mean(whole) < 0.95


def test_a_stroke_trajectory_is_short(written):
    fmt = get_format("strokes")
    vocabulary = Words(tags_of(fmt))
    codes = vocabulary.code_ids[:16]
    lengths = [
        render_thought(fmt, s.prompt, s.record, s.parts, vocabulary, [codes] * len(images(s))).num_tokens()
        for s in written["strokes"]
    ]
    assert np.mean(lengths) < 130 and max(lengths) < 256


def test_the_seed_decides():
    def summary(seed):
        return [
            (
                s.prompt,
                [p.text for p in s.parts],
                [p.image.tobytes() for _, p in enumerate(s.parts) if p.image is not None],
            )
            for s in TASK.demonstrations("strokes", 20, seed)
        ]

    assert summary(1) == summary(1) and summary(1) != summary(2)


def test_a_direct_one_is_one_right_image(written):
    for shown in written["direct"]:
        (part,) = shown.parts
        assert (part.role, part.text, shown.mistakes) == ("final", "", ()) and judged(shown.record, part.image)


def test_an_unknown_format_is_named():
    with pytest.raises(UserError, match="did you mean 'strokes'"):
        TASK.demonstrations("stroke", 1, 0)
