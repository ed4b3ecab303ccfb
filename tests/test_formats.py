"""The grammar of thoughts: what a cursor lets through, what the reader accepts and what it names."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from formats.base import Part, Span
from formats.grammar import END, START
from formats.registry import get_format, names
from formats.render import encode, render, tags_of
from formats.segments import prompt_segments
from record.trajectory import Author, Modality, RecordError, Segment, StopReason, Trajectory, mask_of
from tests.vocabularies import CODES_PER_IMAGE, PieceVocabulary, WordVocabulary

FORMATS = {name: get_format(name) for name in names()}
TEXT, IMAGE = Modality.TEXT, Modality.IMAGE_TOKENS
VOCABULARIES = {
    "word": WordVocabulary([tag for fmt in FORMATS.values() for tag in tags_of(fmt)]),
    "piece": PieceVocabulary(),
}
PIXELS = np.zeros((4, 4, 3), np.uint8)


def written(fmt, vocabulary, ids, spans, stop=StopReason.END):
    """The trajectory that an engine records for the policy's ids."""
    segments = [prompt_segments(fmt, "red circle", (), vocabulary)[0]]
    for span in spans:
        part = np.asarray(ids[span.start : span.stop], np.int32)
        text = vocabulary.decode(part) if span.modality is TEXT else ""
        segments.append(Segment(span.role, Author.POLICY, span.modality, fmt.trained(span.role), part, text))
    return Trajectory("red circle", {}, fmt.name, segments, stop=stop)


def walk(fmt, vocabulary, constrain, data, limit=200, lean=True):
    """Sample until the turn ends or the limit is met. Returns ids, cursor, stop reason."""
    cursor, ids = fmt.cursor(vocabulary, constrain), []
    while not cursor.stopped and len(ids) < limit:
        if cursor.awaits:
            cursor.observe(data.draw(st.sampled_from(fmt.answers(cursor.spans[-1].role))))
            continue
        id = cursor.forced()
        if id is None:
            allowed = np.flatnonzero(mask_of(cursor.allowed().ranges, vocabulary.size))
            assert len(allowed), "a dead end"
            markers = [i for i in allowed if i in (vocabulary.boi, vocabulary.eos) or "<" in vocabulary.piece(int(i))]
            # Lean towards what changes the state, or walks would seldom leave the first body.
            pool = markers if lean and markers and data.draw(st.booleans()) else allowed
            id = int(pool[data.draw(st.integers(0, len(pool) - 1))])
        cursor.advance(id)
        ids.append(id)
    stop = StopReason.END if cursor.stopped else StopReason.MAX_TOKENS
    cursor.stop()
    return ids, cursor, stop


def assert_tiled(spans, ids, vocabulary):
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])][: len(spans)]
    assert (spans[-1].stop if spans else 0) == len(ids)
    for span in spans:
        assert span.stop > span.start
        part = ids[span.start : span.stop]
        if span.modality is IMAGE and span.stop < len(ids):
            assert (part[0], part[-1]) == (vocabulary.boi, vocabulary.eoi)
            assert len(part) == CODES_PER_IMAGE + 2 and set(part[1:-1]) <= set(vocabulary.code_ids.tolist())
        if span.modality is TEXT:
            assert not set(part) & {vocabulary.boi, vocabulary.eoi, *vocabulary.code_ids.tolist()}


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("name", names())
@examples(0.4)
@given(data=st.data(), images=st.integers(2, 4), tokens=st.integers(1, 6))
def test_what_the_full_constraint_emits_is_well_formed(name, vocabulary, data, images, tokens):
    texts = {role.name: tokens for role in get_format(name).grammar.written}
    fmt = get_format(name, max_images=images, max_tokens=texts)
    ids, cursor, stop = walk(fmt, vocabulary, "full", data, limit=400)
    assert stop is StopReason.END  # there was always a way to the end, and the limits lead to it
    assert ids[-1] == vocabulary.eos and cursor.images <= images
    assert_tiled(cursor.spans, ids, vocabulary)
    assert fmt.violations(written(fmt, vocabulary, ids, cursor.spans)) == []
    assert fmt.parse(ids, vocabulary) == cursor.spans


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("name", names())
@examples(0.6)
@given(data=st.data(), limit=st.integers(0, 90))
def test_random_walks_never_crash_and_their_spans_tile_the_ids(name, vocabulary, data, limit):
    fmt = get_format(name, max_images=2)
    ids, cursor, stop = walk(fmt, vocabulary, "images", data, limit)
    assert cursor.images == ids.count(vocabulary.boi) <= 2
    assert_tiled(cursor.spans, ids, vocabulary)
    trajectory = written(fmt, vocabulary, ids, cursor.spans, stop)
    found = fmt.violations(trajectory)
    if stop is not StopReason.END:
        assert any("stopped by max_tokens" in v.message for v in found)
    for violation in found:
        assert violation.segment is None or 0 < violation.segment < len(trajectory.segments)
        assert violation.message
    if not found:  # what is accepted is a sentence of the declaration, role by role
        places = [START, *(s.role for s in trajectory.segments[1:] if s.role != END), END]
        assert all(
            after in after_answers(fmt.grammar, before) for before, after in zip(places, places[1:], strict=False)
        )


def after_answers(grammar, role):
    """What the policy may write after a role, whatever the environment says in between."""
    names = grammar.follow[role]
    return grammar.followers(names) if role in grammar.calls else names


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@examples(0.8)
@given(data=st.data())
def test_one_wrong_token_in_a_well_formed_thought_is_named_or_harmless(vocabulary, data):
    """Drop, double or replace one word of a well-formed thought: it is accepted only if it still reads as one."""
    fmt = get_format("strokes", max_images=2, max_tokens={"plan": 3, "inspect": 3, "refine": 3})
    ids, _, _ = walk(fmt, vocabulary, "full", data, limit=400)
    images = {vocabulary.boi, vocabulary.eoi, *vocabulary.code_ids.tolist(), vocabulary.eos}
    at = data.draw(st.sampled_from([i for i, id in enumerate(ids) if id not in images]))
    how = data.draw(st.sampled_from(["drop", "double", "replace"]))
    words = [i for i in range(vocabulary.size) if vocabulary.piece(i)]
    new = {"drop": [], "double": [ids[at]] * 2, "replace": [data.draw(st.sampled_from(words))]}[how]
    changed = [*ids[:at], *new, *ids[at + 1 :]]
    trajectory = written(fmt, vocabulary, changed, fmt.parse(changed, vocabulary))
    text = "".join("#" if s.modality is IMAGE else s.text for s in trajectory.segments[1:])
    assert (fmt.violations(trajectory) == []) == reads_as_strokes(text)


def reads_as_strokes(text: str) -> bool:
    """An independent reading of `strokes` by a regular expression over text, with # for an image."""
    no_tag = r"(?:(?!</?(?:ins|des|inspect|refine)>)[^#])*"

    def tagged(tag):
        return rf"\s*<{tag}>(?!\s*</{tag}>){no_tag}</{tag}>\s*"

    turn = f"{tagged('ins')}{tagged('des')}#{tagged('inspect')}(?:{tagged('refine')}#{tagged('inspect')})*"
    return re.fullmatch(f"(?:{turn})+", text) is not None


# ---- the images constraint, by hand ----


def follow(cursor, ids):
    for id in ids:
        cursor.advance(id)
    return cursor


def image(vocabulary, code=0):
    return [vocabulary.boi, *[int(vocabulary.code_ids[code])] * CODES_PER_IMAGE, vocabulary.eoi]


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_roles_laws_and_spans_of_a_stroke(vocabulary):
    fmt = FORMATS["strokes"]
    cursor = fmt.cursor(vocabulary)
    assert (cursor.role, cursor.in_image, cursor.forced()) == ("between", False, None)
    ids = encode(fmt, "<ins>", vocabulary)
    for id in ids:
        assert cursor.role == "between"
        cursor.advance(id)
    assert cursor.role == "plan"  # the first token after the tag is the first under the role's law
    ids += encode(fmt, " red circle</ins><des> red</des>", vocabulary)
    follow(cursor, ids[len(ids) - len(encode(fmt, " red circle</ins><des> red</des>", vocabulary)) :])
    assert cursor.role == "between" and cursor.spans == []
    plan = len(ids)
    cursor.advance(vocabulary.boi)
    assert cursor.spans == [Span("plan", TEXT, 0, plan)]
    assert (cursor.role, cursor.in_image, cursor.images) == ("sketch", True, 1)
    for _ in range(CODES_PER_IMAGE):
        assert cursor.forced() is None and cursor.allowed().name == "codes"
        cursor.advance(int(vocabulary.code_ids[1]))
    assert cursor.forced() == vocabulary.eoi
    cursor.advance(vocabulary.eoi)
    assert cursor.spans[-1] == Span("sketch", IMAGE, plan, plan + CODES_PER_IMAGE + 2)
    inspect = encode(fmt, "<inspect> wrong</inspect>".replace("wrong", "red"), vocabulary)
    refine = encode(fmt, "<refine> red</refine>", vocabulary)
    follow(cursor, [*inspect, *refine, *image(vocabulary), *inspect, vocabulary.eos])
    assert [s.role for s in cursor.spans] == ["plan", "sketch", "inspect", "refine", "redraw", "inspect"]
    assert cursor.stopped


def test_words_and_codes_never_mix_and_the_image_limit_forbids_the_marker():
    vocabulary, fmt = VOCABULARIES["word"], get_format("strokes", max_images=1)
    cursor = fmt.cursor(vocabulary)
    text = mask_of(cursor.allowed().ranges, vocabulary.size)
    assert not text[vocabulary.code_ids].any() and not text[vocabulary.eoi]
    assert text[vocabulary.boi] and text[vocabulary.eos]
    assert text.sum() == vocabulary.size - len(vocabulary.code_ids) - 1
    follow(cursor, image(vocabulary))
    words = mask_of(cursor.allowed().ranges, vocabulary.size)
    assert not words[vocabulary.boi] and words[vocabulary.eos] and words.sum() == text.sum() - 1


def test_sets_are_one_object_for_all_rows():
    for constrain in ("images", "full"):
        fmt, vocabulary = FORMATS["strokes"], VOCABULARIES["piece"]
        first, second = fmt.cursor(vocabulary, constrain), fmt.cursor(vocabulary, constrain)
        ids = encode(fmt, "<ins> red</ins><des> red</des>", vocabulary) + image(vocabulary)
        for id in ids:
            if first.forced() is None:
                assert first.allowed() is second.allowed()
            first.advance(id)
            second.advance(id)


def test_self_critique_begins_with_a_forced_image():
    for constrain in ("images", "full"):
        vocabulary = VOCABULARIES["word"]
        cursor = FORMATS["self_critique"].cursor(vocabulary, constrain)
        assert cursor.forced() == vocabulary.boi
        follow(cursor, [*image(vocabulary)])
        assert cursor.role == "critique"  # untagged text is under its role's law from its first token
        follow(cursor, [*vocabulary.encode("wrong"), *image(vocabulary), vocabulary.eos])
        assert [s.role for s in cursor.spans] == ["sketch", "critique", "redraw", "end"]


def test_the_last_image_of_subgoals_is_the_final_one():
    vocabulary, fmt = VOCABULARIES["word"], FORMATS["subgoals"]
    words = vocabulary.encode("red circle")
    ids = [*words, *image(vocabulary), *words, *image(vocabulary), *words, *image(vocabulary), vocabulary.eos]
    spans = fmt.parse(ids, vocabulary)
    assert [s.role for s in spans] == ["plan", "subgoal", "reflect", "subgoal", "reflect", "final", "end"]
    assert fmt.violations(written(fmt, vocabulary, ids, spans)) == []


def test_unclosed_text_is_ended_by_an_image_and_strays_stay_inside():
    vocabulary, fmt = VOCABULARIES["word"], FORMATS["strokes"]
    ids = [*encode(fmt, "<ins> red</ins><inspect> fine", vocabulary), *image(vocabulary), vocabulary.eos]
    spans = fmt.parse(ids, vocabulary)
    assert [s.role for s in spans] == ["plan", "sketch", "end"]


def test_text_outside_any_role_is_other_until_a_tag_opens_a_role():
    vocabulary, fmt = VOCABULARIES["piece"], FORMATS["strokes"]
    ids = encode(fmt, "hey <insult> <ins>a</ins><des>b</des>", vocabulary)
    spans = fmt.parse(ids, vocabulary)
    assert [(s.role, vocabulary.decode(ids[s.start : s.stop])) for s in spans] == [
        ("other", "hey <insult> "),
        ("plan", "<ins>a</ins><des>b</des>"),
    ]


def test_a_token_that_closes_one_tag_and_opens_the_next_is_still_read_whole():
    vocabulary, fmt = VOCABULARIES["piece"], FORMATS["strokes"]
    merged = vocabulary.encode("<inspect>a</inspect><refine>b</refine>")
    assert vocabulary.ids["><"] in merged  # one id ends the inspection and begins the refinement
    ids = [
        *encode(fmt, "<ins>a</ins><des>b</des>", vocabulary),
        *image(vocabulary),
        *merged,
        *image(vocabulary),
        *encode(fmt, "<inspect>a</inspect>", vocabulary),
        vocabulary.eos,
    ]
    spans = fmt.parse(ids, vocabulary)
    assert [s.role for s in spans] == ["plan", "sketch", "inspect", "refine", "redraw", "inspect"]
    texts = [vocabulary.decode(ids[s.start : s.stop]) for s in spans]
    assert texts[2:4] == ["<inspect>a</inspect><", "refine>b</refine>"]  # a role begins after what completed a tag
    assert fmt.violations(written(fmt, vocabulary, ids, spans)) == []


def test_a_mismatch_restarts_the_search_at_the_id_just_read():
    vocabulary, fmt = VOCABULARIES["piece"], FORMATS["strokes"]
    ids = [vocabulary.ids["a"], vocabulary.ids["<i"], vocabulary.ids["<"], *encode(fmt, "ins>red", vocabulary)]
    assert [(s.role, s.start, s.stop) for s in fmt.parse(ids, vocabulary)] == [("other", 0, 2), ("plan", 2, len(ids))]


def test_blanks_between_segments_belong_to_the_text_beside_them():
    vocabulary, fmt = VOCABULARIES["piece"], FORMATS["strokes"]
    plan = encode(fmt, "<ins>a</ins> <des>b</des>", vocabulary)
    inspect = encode(fmt, "<inspect>a</inspect>", vocabulary)
    blank = vocabulary.ids["\n"]
    ids = [blank, *plan, blank, *image(vocabulary), blank, *inspect, blank, vocabulary.eos]
    spans = fmt.parse(ids, vocabulary)
    assert [(s.role, s.stop - s.start) for s in spans] == [
        ("plan", len(plan) + 2),
        ("sketch", CODES_PER_IMAGE + 2),
        ("inspect", len(inspect) + 3),
    ]
    assert fmt.violations(written(fmt, vocabulary, ids, spans)) == []


# ---- the full constraint, by hand ----


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_body_holds_no_tag_start_and_is_closed_at_its_limit(vocabulary):
    fmt = get_format("strokes", max_tokens={"plan": 2})
    cursor, opening = fmt.cursor(vocabulary, "full"), vocabulary.encode("<ins>")
    red, closing = vocabulary.encode(" red")[0], vocabulary.encode("</ins>") + vocabulary.encode("<des>")
    for id in opening:
        assert cursor.forced() == id  # there is one way to begin
        cursor.advance(id)
    first = {vocabulary.piece(int(i)) for i in np.flatnonzero(mask_of(cursor.allowed().ranges, vocabulary.size))}
    assert " red" in first and " " not in first  # a body that begins with a blank might stay blank
    assert not any("<" in piece for piece in first)
    cursor.advance(red)
    later = set(np.flatnonzero(mask_of(cursor.allowed().ranges, vocabulary.size)).tolist())
    assert {id for id in later if "<" in vocabulary.piece(id)} == {closing[0]} and vocabulary.ids[" "] in later
    assert not later & {vocabulary.boi, vocabulary.eos, vocabulary.pad, vocabulary.bos, vocabulary.sep}
    cursor.advance(red)
    for id in closing:  # two tokens are the limit
        assert cursor.forced() == id
        cursor.advance(id)
    assert cursor.forced() is None and cursor.role == "plan"


def test_at_the_image_limit_only_the_end_is_left():
    vocabulary, fmt = VOCABULARIES["word"], get_format("strokes", max_images=1)
    cursor = fmt.cursor(vocabulary, "full")
    follow(
        cursor,
        [
            *encode(fmt, "<ins> red</ins><des> red</des>", vocabulary),
            *image(vocabulary),
            *encode(fmt, "<inspect> fine</inspect>", vocabulary),
        ],
    )
    assert cursor.forced() == vocabulary.eos
    with pytest.raises(ValueError, match="was not allowed here"):
        cursor.advance(vocabulary.boi)


# ---- reading ----

GOOD = [("plan", "<ins>add red</ins><des>red circle</des>"), ("sketch", None), ("inspect", "<inspect>fine</inspect>")]


def thought(parts, stop=StopReason.END, fmt="strokes"):
    segments = [Segment("prompt", Author.USER, TEXT, False, np.array([1]), "red circle")]
    for role, text in parts:
        ids = np.arange(CODES_PER_IMAGE + 2 if text is None else 3)
        segments.append(Segment(role, Author.POLICY, IMAGE if text is None else TEXT, True, ids, text or ""))
    return Trajectory("red circle", {}, fmt, segments, stop=stop)


BROKEN = {
    "nothing written": ([], None, "expected <ins> (plan)"),
    "no closing tag": ([("plan", "<ins>add red</ins><des>red"), *GOOD[1:]], 1, "'plan' lacks </des>"),
    "no description": ([("plan", "<ins>add red</ins>"), *GOOD[1:]], 1, "'plan' lacks <des>"),
    "stray tag": (
        [("plan", "<ins>add <refine> red</ins><des>red</des>"), *GOOD[1:]],
        1,
        "stray <refine> inside 'plan'",
    ),
    "blank body": ([GOOD[0], GOOD[1], ("inspect", "<inspect> </inspect>")], 3, "nothing stands between <inspect>"),
    "words after the tag": ([GOOD[0], GOOD[1], ("inspect", "<inspect>fine</inspect> and so")], 3, "outside any role"),
    "no plan": (GOOD[1:], 1, "an image (sketch) follows 'start'; expected <ins> (plan)"),
    "wrong order": ([GOOD[0], GOOD[2]], 2, "<inspect> (inspect) follows 'plan'; expected an image (sketch)"),
    "not inspected": (GOOD[:2], 2, "the turn ends after 'sketch'; expected <inspect> (inspect)"),
    "wrong role": (
        [GOOD[0], GOOD[1], ("refine", "<inspect>fine</inspect>")],
        3,
        "recorded as refine; the text reads inspect",
    ),
    "too many images": ([*GOOD, *GOOD, *GOOD, *GOOD, *GOOD], 14, "image 5 (sketch); at most 4"),
    "a role unknown": ([GOOD[0], ("crop", None), GOOD[2]], 2, "an image in the role 'crop'"),
}


# The end-of-turn token is a segment of its own, whose text may be empty.
ENDED = ("end", "</s>")


@pytest.mark.parametrize(
    ("parts", "at"),
    [
        ([*GOOD, ENDED, ("refine", "<refine>red</refine>"), ("redraw", None), GOOD[2]], 4),  # words follow
        ([*GOOD[:2], ENDED, GOOD[2]], 3),  # the end and words in one stretch
        ([GOOD[0], ENDED, *GOOD[1:]], 2),  # an image follows
        ([*GOOD, ENDED, ENDED], 4),  # the end twice
        ([ENDED, *GOOD], 1),  # before anything was written
    ],
)
@pytest.mark.parametrize("text", ["", "</s>"])
def test_a_turn_that_goes_on_after_its_end_is_none(parts, at, text):
    parts = [(role, text if role == "end" else words) for role, words in parts]
    found = FORMATS["strokes"].violations(thought(parts))
    assert (at, "the turn ended here, but more follows; expected nothing") in [(v.segment, v.message) for v in found]
    whole = [part for number, part in enumerate(parts, 1) if part[0] != "end" or number == len(parts)]
    assert all("ended here" not in v.message for v in FORMATS["strokes"].violations(thought(whole)))


def test_an_end_at_the_end_is_no_violation_and_no_role():
    assert FORMATS["strokes"].violations(thought([*GOOD, ("end", "")])) == []


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_rejected_is_named(case):
    parts, segment, message = BROKEN[case]
    found = FORMATS["strokes"].violations(thought(parts))
    assert [(v.segment, message in v.message) for v in found[:1]] == [(segment, True)], found


def test_a_good_stroke_has_no_violation():
    assert FORMATS["strokes"].violations(thought(GOOD)) == []
    assert (
        FORMATS["strokes"].violations(
            thought([*GOOD, ("refine", " <refine>red</refine>\n"), ("redraw", None), GOOD[2]])
        )
        == []
    )


def test_a_limit_is_told_from_a_fault():
    fmt = FORMATS["strokes"]
    inside = fmt.violations(thought([("plan", "<ins>add")], StopReason.MAX_TOKENS))
    assert [(v.segment, v.message) for v in inside] == [
        (1, "stopped by max_tokens inside plan: 'plan' lacks </ins>, which closes <ins>")
    ]
    after = fmt.violations(thought(GOOD[:2], StopReason.MAX_CONTEXT))
    assert [v.message for v in after] == ["stopped by max_context after sketch; expected <inspect> (inspect)"]
    whole = fmt.violations(thought(GOOD, StopReason.MAX_IMAGES))
    assert "stopped by max_images after inspect" in whole[0].message
    assert "before anything" in fmt.violations(thought([], StopReason.MAX_TOKENS))[0].message


def test_a_limit_after_an_earlier_fault_tells_both():
    fmt = FORMATS["strokes"]
    parts = [("plan", "<ins>add red</ins>"), *GOOD[1:2]]  # no description
    found = fmt.violations(thought(parts, StopReason.MAX_CONTEXT))
    assert [(v.segment, v.message) for v in found] == [
        (1, "'plan' lacks <des>, which is expected after </ins>"),
        (2, "stopped by max_context after sketch; expected <inspect> (inspect)"),
    ]
    at_the_end = fmt.violations(thought(parts))
    assert [v.segment for v in at_the_end] == [1, 2] and "the turn ends after 'sketch'" in at_the_end[1].message


def test_an_image_needs_ids_pixels_or_a_latent():
    for kept in ("ids", "image", "latent", None):
        trajectory = thought([GOOD[0], GOOD[1], GOOD[2]])
        sketch = trajectory.segments[2]
        sketch.ids = sketch.ids if kept == "ids" else sketch.ids[:0]
        sketch.image = np.zeros((2, 2, 3), np.uint8) if kept == "image" else None
        sketch.latent = np.zeros((1, 2, 2), np.float32) if kept == "latent" else None
        found = [(v.segment, v.message) for v in FORMATS["strokes"].violations(trajectory)]
        assert found == ([(2, "'sketch' holds no image")] if kept is None else [])


def test_an_empty_text_segment_is_named():
    found = FORMATS["strokes"].violations(thought([*GOOD[:2], ("inspect", ""), GOOD[2]]))
    assert [(v.segment, v.message) for v in found][0] == (
        3,
        "'inspect' is empty; expected <refine> (refine), <ins> (plan) or the end",
    )


@pytest.mark.parametrize(
    ("parts", "at"),
    [
        ([("inspect", "<refine"), ("refine", ">red</refine>")], 4),  # where the tag is whole
        ([("inspect", "<refine>"), ("refine", "red</refine>")], 3),
        ([("inspect", "<refine>red</refine>")], 3),
    ],
)
def test_a_tag_out_of_order_is_named_where_it_ends(parts, at):
    found = FORMATS["strokes"].violations(thought([*GOOD[:2], *parts]))
    assert (found[0].segment, "<refine> (refine) follows 'sketch'" in found[0].message) == (at, True)


@pytest.mark.parametrize(("length", "shown"), [(40, "x" * 40), (41, "x" * 37 + "...")])
def test_words_outside_of_any_role_are_shown_in_part(length, shown):
    found = FORMATS["strokes"].violations(thought([*GOOD, ("other", "x" * length)]))
    assert found[0].message.startswith(f"'{shown}' stands outside any role")


def test_stray_words_reach_to_the_next_tag_that_opens():
    """A closing tag among them is a part of the same fault, and no second one."""
    found = FORMATS["strokes"].violations(thought([*GOOD, ("other", "so </inspect> then <refine>red</refine>")]))
    told = [v.message for v in found if "outside any role" in v.message]
    assert len(told) == 1 and told[0].startswith("'so </inspect> then' stands outside any role")


def test_a_cut_image_is_a_violation():
    trajectory = thought([*GOOD, *GOOD])
    trajectory.segments[2].ids = trajectory.segments[2].ids[:-1]
    assert "4 ids; the others have 5" in FORMATS["strokes"].violations(trajectory)[0].message


def test_bodies_are_read_leniently():
    fmt = FORMATS["strokes"]
    plan = Segment("plan", Author.POLICY, TEXT, True, text="<ins> add red </ins> <des>red")
    assert fmt.bodies(plan) == {"ins": "add red", "des": "red"}
    assert FORMATS["self_critique"].bodies(Segment("critique", Author.POLICY, TEXT, True, text=" wrong ")) == {
        "critique": "wrong"
    }
    assert fmt.bodies(Segment("sketch", Author.POLICY, IMAGE, True)) == {}


def test_parse_refuses_broken_images():
    vocabulary, fmt = VOCABULARIES["word"], FORMATS["strokes"]
    whole = image(vocabulary)
    for ids, message in (
        ([*whole[:2], vocabulary.eoi], "expected a visual code"),
        (whole[:-1], "cut off"),
        ([*whole[:-1], whole[1]], "expected the end marker"),
        ([whole[1]], "belongs inside an image"),
        ([vocabulary.eos, vocabulary.eos], "follows the end"),
    ):
        with pytest.raises(RecordError, match=message):
            fmt.parse(ids, vocabulary)


# ---- demonstrations ----

DEMONSTRATIONS = {
    "strokes": [
        ("plan", "<ins>add red</ins><des>red circle</des>"),
        ("sketch", None),
        ("inspect", "<inspect>wrong</inspect>"),
        ("refine", "<refine>add blue</refine>"),
        ("redraw", None),
        ("inspect", "<inspect>fine</inspect>"),
        ("plan", "<ins>add</ins><des>red</des>"),
        ("sketch", None),
        ("inspect", "<inspect>fine</inspect>"),
    ],
    "subgoals": [
        ("plan", "red circle"),
        ("subgoal", None),
        ("reflect", "fine"),
        ("subgoal", None),
        ("reflect", "add"),
        ("final", None),
    ],
    "self_critique": [("sketch", None), ("critique", "wrong add red"), ("redraw", None)],
    "look": [
        ("plan", "<ins>red circle</ins>"),
        ("sketch", None),
        ("look", "<look>red</look>"),
        ("crop", None),
        ("inspect", "<inspect>wrong</inspect>"),
        ("look", "<look>wrong</look>"),
        ("error", "wrong"),
        ("inspect", "<inspect>fine</inspect>"),
    ],
    "direct": [("final", None)],
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("name", names())
def test_a_demonstration_is_rendered_and_parsed_back(name, vocabulary):
    fmt = FORMATS[name]
    parts = [Part(role, text or "", None if text is not None else PIXELS) for role, text in DEMONSTRATIONS[name]]
    images = sum(part.image is not None for part in parts)
    codes = [vocabulary.code_ids[[k % 6, 1, 2]] for k in range(images)]
    trajectory = render(fmt, "red circle", {"tag": "x"}, parts, vocabulary, codes)
    assert fmt.violations(trajectory) == [] and trajectory.stop is StopReason.DEMONSTRATION
    prompt, *turn = trajectory.segments
    answers = [s for s in turn if s.author is Author.ENVIRONMENT]
    assert [s.role for s in answers] == (["crop", "error"] if name == "look" else [])
    assert not any(s.trained for s in answers)
    turn = [s for s in turn if s.author is Author.POLICY]
    parts = [part for part in parts if fmt.author(part.role) is Author.POLICY]
    assert (prompt.role, prompt.author, prompt.trained) == ("prompt", Author.USER, False)
    assert prompt.ids.tolist() == fmt.prompt_ids("red circle", vocabulary)
    ids = np.concatenate([s.ids for s in turn])
    assert ids[-1] == vocabulary.eos and all(s.trained and s.decisions is None for s in turn)
    spans = fmt.parse(ids, vocabulary)
    assert [(s.role, s.modality, s.stop - s.start) for s in spans] == [(s.role, s.modality, len(s.ids)) for s in turn]
    for span, part in zip(spans, parts, strict=False):
        if part.image is None:
            assert vocabulary.decode(ids[span.start : span.stop]).split() == part.text.split() or name in (
                "strokes",
                "look",
            )
            assert fmt.bodies(
                Segment(span.role, Author.POLICY, TEXT, True, text=vocabulary.decode(ids[span.start : span.stop]))
            ) == fmt.bodies(Segment(part.role, Author.POLICY, TEXT, True, text=part.text))
    assert (turn[-1].role == "end") == (parts[-1].image is not None)


def test_a_demonstration_that_is_no_sentence_is_refused():
    fmt, vocabulary = FORMATS["strokes"], VOCABULARIES["word"]
    parts = [Part("plan", "<ins>red</ins><des>red</des>"), Part("inspect", "<inspect>fine</inspect>")]
    with pytest.raises(RecordError, match=r"demonstration 'red': segment 2: <inspect> \(inspect\) follows 'plan'"):
        render(fmt, "red", {}, parts, vocabulary, [])
    with pytest.raises(RecordError, match="1 images but codes of 0"):
        render(fmt, "red", {}, [Part("sketch", image=PIXELS)], vocabulary, [])
    with pytest.raises(RecordError, match=r"part 0 \(sketch\) has 2 ids; an image is 3 ids"):
        render(fmt, "red", {}, [Part("sketch", image=PIXELS)], vocabulary, [vocabulary.code_ids[:2]])
