"""Every registered format keeps the promises of formats/contract.py; so does one that a user declares."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from pydantic import ValidationError

from formats.base import ContextSpec, Part, PieceSpec
from formats.config import FormatConfig
from formats.contract import check_format, spans_to_trajectory
from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from formats.registry import get_format, names, register
from formats.render import encode, tags_of
from formats.segments import prompt_segments
from record.trajectory import Author, Guidance, Modality, Segment, Trajectory
from runtime.errors import UserError
from tests.vocabularies import PieceVocabulary, WordVocabulary

TEXT, IMAGE = Modality.TEXT, Modality.IMAGE_TOKENS
PIXELS = np.zeros((4, 4, 3), np.uint8)


def draw(role):
    return Part(role, image=PIXELS)


DEMONSTRATIONS = {
    "strokes": [
        [
            Part("plan", "<ins> red </ins><des> red circle </des>"),
            draw("sketch"),
            Part("inspect", "<inspect> wrong </inspect>"),
            Part("refine", "<refine> add red </refine>"),
            draw("redraw"),
            Part("inspect", "<inspect> fine </inspect>"),
        ]
    ],
    "subgoals": [[Part("plan", "red circle"), draw("subgoal"), Part("reflect", "fine"), draw("final")]],
    "self_critique": [
        [draw("sketch"), Part("critique", "fine"), draw("redraw")],
        [draw("sketch"), Part("critique", "wrong"), draw("redraw"), Part("critique", "fine"), draw("redraw")],
    ],
    "look": [
        [
            Part("plan", "<ins> red </ins>"),
            draw("sketch"),
            Part("look", "<look> red </look>"),
            *answer,
            Part("inspect", "<inspect> fine </inspect>"),
        ]
        for answer in ([draw("crop")], [Part("error", "wrong")], [draw("crop"), draw("crop"), Part("error", "wrong")])
    ],
    "direct": [[draw("final")]],
}


def vocabulary_of(kind, fmt):
    return WordVocabulary(tags_of(fmt)) if kind == "word" else PieceVocabulary()


@pytest.mark.parametrize("kind", ["word", "piece"])
@pytest.mark.parametrize("name", names())
def test_every_registered_format_keeps_the_contract(name, kind):
    fmt = get_format(name)
    check_format(fmt, vocabulary_of(kind, fmt), DEMONSTRATIONS[name])


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE of the released kind: tags are several tokens, `><` is one, characters are cut into bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from policy.chameleon.vocabulary import ChameleonVocabulary, code_name

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<racm3:break>", "<eoss>", "<reserved08706>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special + [code_name(code) for code in range(8)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "<ins> a red circle </ins><des> red </des><inspect> fine </inspect><refine> \u00e9 \u65e5\u672c </refine>"
    tokenizer.train_from_iterator([text] * 20, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return ChameleonVocabulary(wrapped, codes_per_image=4)


@pytest.mark.parametrize("name", names())
def test_the_contract_holds_over_a_byte_level_tokenizer(name, byte_level):
    assert "><" in [byte_level.piece(id) for id in byte_level.encode("</inspect><refine>")]
    check_format(get_format(name), byte_level, DEMONSTRATIONS[name], walks=15, limit=2000)


def test_formats_and_the_store_import_no_model():
    program = (
        "import sys, formats.contract, formats.config, record.store; print("
        "[m for m in ('torch', 'ray', 'transformers', 'trl', 'policy', 'rl', 'tasks') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


THINK = Grammar(
    "think",
    (Role("think", tags=(("<think>", "</think>"),)), Role("answer"), Role("image", IMAGE)),
    {START: ("think", "answer"), "think": ("answer", "image"), "answer": (END,), "image": (END,)},
    max_images=1,
)


def think(*, max_tokens=None):
    return DeclaredFormat(THINK, max_tokens=max_tokens)


@pytest.mark.parametrize("kind", ["word", "piece"])
def test_a_declared_format_mixes_tagged_and_free_text(kind):
    fmt = get_format("tests.test_formats_contract.think", max_tokens={"answer": 5})
    vocabulary = vocabulary_of(kind, fmt)
    check_format(
        fmt,
        vocabulary,
        [
            [Part("think", "<think>red</think>"), Part("answer", " blue circle")],
            [Part("answer", "red")],
            [Part("think", "<think>red</think>"), draw("image")],
        ],
    )


class Leaky(DeclaredFormat):
    """Lets an image follow anything under full constraint."""

    def cursor(self, vocabulary, constrain="images"):
        return super().cursor(vocabulary, "images")


def test_the_contract_catches_a_format_that_breaks_it():
    fmt = Leaky(get_format("strokes").grammar)
    with pytest.raises(AssertionError, match="the full constraint let this through"):
        check_format(fmt, vocabulary_of("word", fmt), [])


def test_registering_and_misspelling():
    register("think", think)
    assert get_format("think").name == "think"
    register("think", think)  # the same again is no conflict
    for call, message in (
        (lambda: get_format("stroke"), "no 'stroke'; did you mean 'strokes'"),
        (lambda: get_format("strokes", max_image=2), "no 'max_image'; did you mean 'max_images'"),
        (lambda: get_format("formats.nowhere.f"), "no module 'formats.nowhere'"),
        (lambda: get_format("formats.strokes.stroke"), "did you mean 'strokes'"),
        (lambda: get_format("builtins.dict"), "no Format"),
        (lambda: get_format("think", images=2), "has no 'images'; did you mean 'max_tokens'"),
        (lambda: register("strokes", think), "registered already"),
        (lambda: get_format("strokes", max_tokens={"pln": 3}), "did you mean 'plan'"),
        (lambda: get_format("strokes", max_tokens={"plan": 0}), "at least one token"),
        (lambda: get_format("strokes", max_images=0), "at least 1 images"),
        (lambda: get_format("subgoals", max_images=1), "needs at least 2 images, max_images is 1"),
        (lambda: get_format("subgoals", guidance=["objj"]), "did you mean 'obj'"),
        (lambda: get_format("subgoals", scales={"ful": 1}), "did you mean 'full'"),
        (lambda: get_format("subgoals", scales={"negative": 1}), "negative_prompt is empty"),
        (lambda: get_format("strokes").cursor(PieceVocabulary(), "imges"), "did you mean 'images'"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("roles", "follow", "message"),
    [
        ((Role("a"), Role("b")), {START: ("a",), "a": ("b",), "b": (END,)}, "may not follow the untagged text 'a'"),
        ((Role("a"),), {START: ("a",), "a": ("c",)}, "no role 'c'"),
        ((Role("a", IMAGE),), {START: ("a",), "a": ("a",)}, "no way leads"),
        ((Role("a", IMAGE),), {START: ("a",)}, "nothing may follow 'a'"),
        ((Role("end"),), {START: ("end",)}, "reserved"),
        ((Role("a", tags=(("<a>", "<a>"),)),), {START: ("a",), "a": (END,)}, "used twice"),
        ((Role("a", tags=(("<a<", "</a>"),)),), {START: ("a",), "a": (END,)}, "cannot be told apart"),
        ((Role("a"), Role("b")), {START: ("a", "b"), "a": (END,), "b": (END,)}, "two untagged text roles"),
        ((Role("a"),), {START: ("a", END), "a": (END,)}, "cannot end before"),
    ],
)
def test_a_declaration_that_cannot_be_decoded_is_refused(roles, follow, message):
    with pytest.raises(UserError, match=message):
        Grammar("mine", roles, follow, max_images=1)


def test_a_vocabulary_that_cannot_spell_a_tag_is_named():
    class Deaf(PieceVocabulary):
        def encode(self, text):
            return super().encode(text.replace("/", ""))

    with pytest.raises(UserError, match="spells the tag '</ins>' as '<ins>'; add the tag to the tokenizer"):
        get_format("strokes").cursor(Deaf(), "full")


def test_config_builds_and_refuses():
    config = FormatConfig(name="strokes", max_images=2, options={"max_tokens": {"plan": 12}})
    fmt = config.build()
    assert fmt.max_images == 2 and fmt.grammar.by_name["plan"].max_tokens == 12
    assert not config.form_is_constant and FormatConfig(constrain="full").form_is_constant
    with pytest.raises(ValidationError):
        FormatConfig(max_image=2)
    with pytest.raises(UserError, match="both set"):
        FormatConfig(max_images=2, options={"max_images": 3}).build()


def test_a_format_travels_between_processes():
    fmt = get_format("subgoals", max_images=3)
    vocabulary = vocabulary_of("word", fmt)
    fmt.cursor(vocabulary)
    other = pickle.loads(pickle.dumps(fmt))
    assert other.grammar == fmt.grammar and other.guidance_kinds == fmt.guidance_kinds
    check_format(other, vocabulary, DEMONSTRATIONS["subgoals"], walks=2)


# ---- authors, loss and layout ----


def test_authors_and_training():
    fmt = get_format("strokes")
    assert (fmt.author("prompt"), fmt.trained("prompt")) == (Author.USER, False)
    for role in ("plan", "sketch", "inspect", "refine", "redraw", "other", "end"):
        assert (fmt.author(role), fmt.trained(role)) == (Author.POLICY, True)


def test_layout_shows_every_role_once():
    shown = [d.role for d in get_format("strokes").layout()]
    assert shown == ["prompt", "negative", "plan", "sketch", "inspect", "refine", "redraw", "other", "end"]
    assert get_format("strokes").display("redraw").label == "redrawn"
    assert get_format("strokes").display("unheard of").color == "fault"


# ---- guidance ----


def subgoal_thought(fmt, vocabulary):
    words = vocabulary.encode("red circle")
    image = [vocabulary.boi, *vocabulary.code_ids[:3].tolist(), vocabulary.eoi]
    ids = [*words, *image, *words, *image, *words, *image, vocabulary.eos]
    trajectory = spans_to_trajectory(fmt, vocabulary, ids, fmt.parse(ids, vocabulary))
    trajectory.segments[0] = prompt_segments(fmt, "red", (), vocabulary)[0]
    trajectory.segments[1:1] = fmt.beside_prompt(vocabulary)
    return trajectory


def test_branches_of_thinking_with_generated_images():
    fmt = get_format("subgoals")
    vocabulary = vocabulary_of("word", fmt)
    thought = subgoal_thought(fmt, vocabulary)  # prompt 3, plan 2, subgoal 5, reflect 2, subgoal 5, reflect 2, final 5
    assert [len(s.ids) for s in thought.segments] == [3, 2, 5, 2, 5, 2, 5, 1]
    assert [c.branch for c in fmt.contexts(thought, 1)] == ["full"]  # words are never guided
    assert fmt.guidance(thought, 1) is None
    assert fmt.guidance(thought, 2) == Guidance("obj", {"full": 2.0, "negative": 0.0})
    assert fmt.contexts(thought, 2) == (
        ContextSpec("full", (PieceSpec(0), PieceSpec(1))),
        ContextSpec("unconditional", ()),
    )
    assert fmt.guidance(thought, 4).kind == "obj" and fmt.guidance(thought, 6).kind == "full"
    assert fmt.guidance(thought, 6).scales == {"full": 2.0, "image": 1.2, "negative": 0.0, "original": 5.0}
    branches = {c.branch: [p.segment for p in c.pieces] for c in fmt.contexts(thought, 6)}
    assert branches == {"full": [0, 1, 2, 3, 4, 5], "unconditional": [], "image": [2, 4], "original": [0]}


def test_a_negative_prompt_is_a_segment_that_only_its_branch_sees():
    fmt = get_format("subgoals", negative_prompt="wrong", scales={"negative": 3.0})
    vocabulary = vocabulary_of("word", fmt)
    thought = subgoal_thought(fmt, vocabulary)
    assert (thought.segments[1].role, thought.segments[1].trained) == ("negative", False)
    assert fmt.violations(thought) == []
    contexts = {c.branch: [p.segment for p in c.pieces] for c in fmt.contexts(thought, 7)}
    assert contexts == {
        "full": [0, 2, 3, 4, 5, 6],
        "unconditional": [],
        "image": [3, 5],
        "negative": [1],
        "original": [0],
    }


def test_guidance_names_are_those_that_the_policy_combines():
    from formats.declared import BRANCHES
    from policy.guidance import BRANCHES as COMBINED
    from policy.guidance import KINDS, branch_weights

    assert set(BRANCHES) == set(KINDS) and {b for names in BRANCHES.values() for b in names} <= set(COMBINED)
    for name in ("subgoals", "self_critique"):
        fmt = get_format(name)
        vocabulary = vocabulary_of("word", fmt)
        thought = subgoal_thought(fmt, vocabulary)
        for index, segment in enumerate(thought.segments):
            if segment.modality is IMAGE:
                have = {c.branch for c in fmt.contexts(thought, index)}
                assert set(branch_weights(fmt.guidance(thought, index))) <= have


# ---- cost ----


def test_a_cursor_costs_microseconds_a_token():
    fmt = get_format("strokes")
    vocabulary = vocabulary_of("piece", fmt)
    image = [vocabulary.boi, *vocabulary.code_ids[:3].tolist(), vocabulary.eoi]
    turn = [
        *encode(fmt, "<ins>red circle</ins><des>red circle</des>", vocabulary),
        *image,
        *encode(fmt, "<inspect>fine</inspect>", vocabulary),
        vocabulary.eos,
    ]
    for constrain in ("images", "full"):
        best = float("inf")
        for _ in range(30):
            cursor = fmt.cursor(vocabulary, constrain)
            began = time.perf_counter()
            for id in turn:
                if cursor.forced() is None:
                    cursor.allowed()
                cursor.advance(id)
            best = min(best, (time.perf_counter() - began) / len(turn))
        assert best < 20e-6, f"{constrain}: {best * 1e6:.1f} microseconds a token"


def test_segments_of_other_roles_have_no_bodies():
    assert get_format("strokes").bodies(Segment("other", Author.POLICY, TEXT, True, text="x")) == {}
    assert Trajectory("p", {}, "strokes", []).images() == []
