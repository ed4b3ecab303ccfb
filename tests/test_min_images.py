"""A least number of images: the end is not offered before, the grammar goes on, and it is scored as it was sampled."""

from __future__ import annotations

import pytest
import torch

from formats.config import FormatConfig
from formats.contract import check_format
from formats.registry import get_format
from formats.shortest import least_words
from policy.base import score_trajectories
from record.trajectory import Modality, StopReason, mask_of
from runtime.errors import UserError
from tests.fakes import FakeFormat, FakeVocabulary
from tests.test_engine_chameleon import policy, requests, rollouts  # noqa: F401
from tests.test_formats_contract import DEMONSTRATIONS, vocabulary_of

LIMITS = {"strokes": 2, "self_critique": 3, "subgoals": 2}
TOKENS = {"strokes": {"plan": 6, "inspect": 4, "refine": 4}, "self_critique": 4, "subgoals": 4}


@pytest.mark.parametrize("kind", ["word", "piece"])
@pytest.mark.parametrize("name", LIMITS)
def test_a_format_keeps_the_contract_with_a_least_number_of_images(name, kind):
    fmt = get_format(name, min_images=LIMITS[name])
    check_format(fmt, vocabulary_of(kind, fmt), DEMONSTRATIONS[name][-1:], walks=10)


@pytest.mark.parametrize(
    "name, constrain", [("strokes", "images"), ("strokes", "full"), ("self_critique", "images"), ("subgoals", "full")]
)
def test_no_thought_ends_before_and_it_is_scored_as_it_was_sampled(policy, name, constrain):  # noqa: F811
    fmt = get_format(name, min_images=3, max_tokens=TOKENS[name])
    engine = rollouts(policy, fmt, constrain, max_tokens=200)
    thoughts = engine.run(requests())
    eos = policy.vocabulary.eos
    ended = [thought for thought in thoughts if thought.stop is StopReason.END]
    assert len(ended) > 1 and all(len(thought.images()) >= 3 for thought in ended)
    for thought in thoughts:
        drawn = 0
        for segment in thought.segments:
            drawn += segment.image is not None
            if segment.decisions is None or segment.modality is not Modality.TEXT or drawn >= 3:
                continue
            sampling = segment.decisions.sampling
            for allowed in sampling.allowed_N.tolist():  # every choice was among ids without the end
                assert allowed >= 0 and not mask_of(sampling.sets[allowed], policy.vocabulary.size)[eos]
    with torch.no_grad():
        scored = score_trajectories(policy, thoughts)
    assert len(scored.logprob_N) > 500 and float(scored.log_ratio_N.abs().max()) < 1e-4
    if constrain == "full":
        assert not any(fmt.violations(thought) for thought in ended)


def test_where_the_end_is_taken_away_only_what_the_grammar_has_follow_begins():
    fmt = get_format("strokes", min_images=2, max_images=2)
    vocabulary = vocabulary_of("word", fmt)
    ids = vocabulary.encode("<ins> red </ins><des> red </des>")
    cursor = fmt.cursor(vocabulary)
    for id in ids:
        cursor.advance(id)
    cursor.advance(vocabulary.boi)
    for id in [*vocabulary.code_ids[:3].tolist(), vocabulary.eoi]:
        cursor.advance(id)
    assert vocabulary.eos not in members(cursor, vocabulary)
    assert len(members(cursor, vocabulary)) > 5  # the turn could not end here anyway: words are free
    for id in vocabulary.encode("<inspect> fine </inspect>"):
        cursor.advance(id)
    assert {vocabulary.piece(id) for id in members(cursor, vocabulary)} == {"<ins>", "<refine>"}
    for id in vocabulary.encode("<refine> add </refine>"):
        cursor.advance(id)
    cursor.advance(vocabulary.boi)
    for id in [*vocabulary.code_ids[:3].tolist(), vocabulary.eoi]:
        cursor.advance(id)
    assert vocabulary.eos in members(cursor, vocabulary)


def members(cursor, vocabulary) -> list[int]:
    return mask_of(cursor.allowed().ranges, vocabulary.size).nonzero()[0].tolist()


def test_a_turn_that_ends_with_fewer_images_is_a_violation():
    free, held = get_format("strokes"), get_format("strokes", min_images=3)
    vocabulary = vocabulary_of("word", free)
    from formats.render import render

    image = vocabulary.code_ids[:3]
    trajectory = render(free, "", {}, DEMONSTRATIONS["strokes"][0], vocabulary, [image, image])
    assert not free.violations(trajectory)
    (found,) = held.violations(trajectory)
    assert found.message == "the turn ends with 2 images; at least 3 are asked for"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"min_images": 5}, r"no turn has 5 to 4 images \(min_images, max_images\); it may have 1, 2, 3, 4"),
        ({"name": "subgoals", "min_images": 3, "max_images": 2}, "no turn has 3 to 2 images"),
        ({"min_images": 1, "options": {"min_images": 2}}, "format.min_images and format.options.min_images are both"),
    ],
)
def test_a_least_number_that_no_turn_has_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        FormatConfig(**config).build()


def test_the_shortest_way_to_an_image_by_hand():
    strokes = get_format("strokes")
    vocabulary = vocabulary_of("word", strokes)
    # plan: four tags and two bodies; then inspect and refine of two tags and a body each.
    assert [least_words(strokes, vocabulary, k) for k in (0, 1, 2, 3)] == [0, 6, 12, 18]
    assert [least_words(get_format("self_critique"), vocabulary, k) for k in (1, 2, 3)] == [0, 1, 2]
    assert [least_words(get_format("subgoals"), vocabulary, k) for k in (1, 2, 3)] == [1, 2, 3]
    assert least_words(FakeFormat("plain"), FakeVocabulary(), 3) == 0  # a format without a grammar
