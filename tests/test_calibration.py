"""How far a policy's verdicts can be trusted: numbers worked by hand, and P("fine") under the policy's own law."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from chameleon_helpers import sampled, small_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from rewards_helpers import image_segment, text, trajectory_of

from evals.bootstrap import compare_calibration
from evals.calibration import BINS, CELLS, MEASURES, Calibration, Critique, measures_of_sums, table_of
from evals.critiques import CalibrationError, Critics, Place, chances, open_critics, place_of, recorded, rewritten
from evals.heldout import Heldout, PromptScore
from evals.kept import CRITIQUES, Evaluated, EvaluationsError, keep, read
from formats.registry import get_format
from record.trajectory import Decisions, SamplingParams, ranges_of
from rewards.contract import RewardContext
from rewards.detectors.shapes import TaskDetector
from tasks.base import VerdictSpan
from tasks.registry import get_task
from tasks.shapes import language
from tasks.shapes.render import render
from tasks.shapes.world import Object, Scene
from tests.test_cli import QUICKSTART, SMALL, refused
from training.tracking import read_metrics
from underdrawing.cli import main
from underdrawing.report.page import render as render_page
from underdrawing.report.page import report_data

# said, right, P("fine")
BY_HAND = [
    ("fine", True, 0.92),
    ("fine", True, 0.98),
    ("fine", False, 0.94),
    ("wrong", True, 0.25),
    ("wrong", False, 0.2),
    ("wrong", False, None),
    (None, False, None),
]


def critiques(*rows, prompt=0):
    return [Critique(prompt, 0, number, said, right, p) for number, (said, right, p) in enumerate(rows)]


def test_every_measure_by_hand():
    found = Calibration.of(critiques(*BY_HAND))
    assert [found.counts[cell] for cell in CELLS] == [2, 1, 1, 2, 0, 1]
    assert (found.critiques, found.scored, found.unreadable) == (7, 5, 1)
    # Three are approved, of which one is wrong; four images are wrong, three right; five of seven say what is so, and
    # one gives no verdict. Squares: 0.08, 0.02, 0.94, 0.75 and 0.2, each squared, over five.
    # Bins: 0.9 to 1 holds three, with mean P 2.84 / 3 and 2 / 3 right; 0.2 to 0.3 holds two, 0.45 / 2 and 1 / 2.
    assert found.measures == pytest.approx(
        {
            "approved_but_wrong_of_approved": 1 / 3,
            "approved_but_wrong_of_wrong": 1 / 4,
            "disturbed_but_right_of_disturbed": 1 / 3,
            "disturbed_but_right_of_right": 1 / 3,
            "agreement": 4 / 7,
            "unreadable": 1 / 7,
            "brier": (0.08**2 + 0.02**2 + 0.94**2 + 0.75**2 + 0.2**2) / 5,
            "expected_calibration_error": (abs(2.84 - 2) + abs(0.45 - 1)) / 5,
        }
    )
    high, low = found.bins[9], found.bins[2]
    assert (high.critiques, high.p_fine, high.right) == (3, pytest.approx(2.84 / 3), pytest.approx(2 / 3))
    assert (low.critiques, low.p_fine, low.right) == (2, pytest.approx(0.225), 0.5)
    metrics = found.as_metrics()
    assert metrics["calibration/said_fine/is_wrong"] == 1 and metrics["calibration/brier"] == found.measures["brier"]


def test_what_would_divide_by_zero_is_left_out():
    found = Calibration.of(critiques(("fine", True, None)))
    assert found.measures == {
        "approved_but_wrong_of_approved": 0.0,
        "disturbed_but_right_of_right": 0.0,
        "agreement": 1.0,
        "unreadable": 0.0,
    }
    assert Calibration.of([]).as_metrics() == {} and Calibration.of([]).measures == {}


ROWS = st.lists(
    st.tuples(st.sampled_from(["fine", "wrong", None]), st.booleans(), st.none() | st.floats(0, 1)), max_size=12
)


@settings(max_examples=25)
@given(ROWS)
def test_the_error_is_the_textbooks_loop_over_bins(rows):
    found = Calibration.of(critiques(*rows))
    scored = [(p, right) for _, right, p in rows if p is not None]
    assert sum(each.critiques for each in found.bins) == len(scored) == found.scored
    if not scored:
        assert "brier" not in found.measures
        return
    assert found.measures["brier"] == pytest.approx(sum((p - right) ** 2 for p, right in scored) / len(scored))
    error = 0.0
    for low in range(BINS):
        inside = [(p, y) for p, y in scored if low <= p * BINS < low + 1 or (p == 1 and low == BINS - 1)]
        if inside:
            p, y = np.mean(inside, 0)
            error += len(inside) / len(scored) * abs(p - y)
    assert found.measures["expected_calibration_error"] == pytest.approx(error)


def test_saying_one_half_of_a_fair_coin_is_calibrated_and_a_sure_critic_is_not():
    coin = critiques(*[("fine", right, 0.55) for right in (True, False)] * 10)
    assert Calibration.of(coin).measures["expected_calibration_error"] == pytest.approx(0.05)
    sure = critiques(*[("fine", right, 1.0) for right in (True, False)] * 10)
    assert Calibration.of(sure).measures["expected_calibration_error"] == pytest.approx(0.5)
    assert Calibration.of(sure).measures["brier"] == pytest.approx(0.5)


# ---- two evaluations ----------------------------------------------------------------------------------------------


def test_a_difference_that_every_prompt_shares_is_certain():
    tags = ["a", "a", "b"]
    before = [c for n in range(3) for c in critiques(("fine", False, 1.0), ("wrong", False, 0.5), prompt=n)]
    after = [c for n in range(3) for c in critiques(("wrong", False, 0.5), ("wrong", False, 0.5), prompt=n)]
    pair = compare_calibration(before, after, tags, resamples=200)["approved_but_wrong_of_wrong"]
    assert (pair.a, pair.b) == (0.5, 0.0)
    assert (pair.interval.difference, pair.interval.low, pair.interval.high) == (-0.5, -0.5, -0.5)
    # Nothing is approved afterwards, so its share of wrong ones cannot be compared.
    assert "approved_but_wrong_of_approved" not in compare_calibration(before, after, tags, resamples=200)


def test_the_interval_is_over_prompts_with_all_their_critiques():
    # One prompt of two gains 1 in all of its four critiques: a resample's gain is 0, 0.5 or 1.
    before = critiques(*[("fine", False, None)] * 4) + critiques(*[("fine", False, None)] * 4, prompt=1)
    after = critiques(*[("wrong", False, None)] * 4) + critiques(*[("fine", False, None)] * 4, prompt=1)
    interval = compare_calibration(before, after, ["a", "a"])["agreement"].interval
    assert (interval.difference, interval.low, interval.high) == (0.5, 0.0, 1.0)


@settings(max_examples=25)
@given(ROWS, st.integers(0, 3))
def test_a_resample_that_takes_every_prompt_once_is_the_whole(rows, seed):
    found = [replace(c, prompt=number % 4) for number, c in enumerate(critiques(*rows))]
    drawn = measures_of_sums(np.ones((1, 4)) @ table_of(found, 4))
    whole = Calibration.of(found).measures
    assert {name: float(drawn[name][0]) for name in MEASURES if math.isfinite(drawn[name][0])} == pytest.approx(whole)


# ---- where the verdict stands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said", "otherwise"),
    [
        ("<inspect>circle = red circle top yes : fine</inspect>", "fine", "wrong"),
        ("<inspect> nothing = red circle top no : wrong extra red circle top </inspect>", "wrong", "fine"),
        (
            "<critique>circle = nothing no : wrong missing circle ; <refine>add red circle top</critique>",
            "wrong",
            "fine",
        ),
        ("fine", "fine", "wrong"),
    ],
)
def test_the_shapes_language_says_where_its_verdict_stands(words, said, otherwise):
    span = language.verdict(words)
    assert words[span.start : span.stop] == said == span.says and span.otherwise == otherwise


@pytest.mark.parametrize("words", ["", ": fine wrong", "fine : circle", "<inspect>circle ; : fine</inspect>"])
def test_no_verdict_has_no_place(words):
    assert language.claims(words).verdict is None and language.verdict(words) is None


@settings(max_examples=25)
@given(st.text("<>i: ;finewrog\n", max_size=40))
def test_a_verdict_that_has_a_place_is_the_one_that_is_read(words):
    span = language.verdict(words)
    if span is not None:
        assert words[span.start : span.stop] == span.says == language.claims(words).verdict


class Letters:
    """A vocabulary whose ids are characters: every word takes several."""

    def encode(self, words):
        return [ord(letter) for letter in words]

    def decode(self, ids):
        return "".join(chr(int(id)) for id in ids)

    def piece(self, id):
        return chr(id)


def test_a_verdict_of_many_ids_is_found_among_them():
    segment = text("inspect", "a : wrong b", ids=Letters().encode("a : wrong b"))
    place = place_of(segment, VerdictSpan("wrong", 4, 9, "fine"), Letters())
    spelt = {word: tuple(map(ord, word)) for word in (" wrong", " fine")}
    assert (place.start, place.stop) in ((3, 9), (4, 9))
    assert place.wrong in (spelt[" wrong"], spelt[" wrong"][1:])
    assert place.fine == (spelt[" fine"] if place.start == 3 else spelt[" fine"][1:])


# ---- P("fine") ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return small_policy()


@pytest.fixture(scope="module")
def written(policy):
    """A prompt, words, an image and words: sampled at temperature 0.7 from recorded sets."""
    [trajectory] = sampled(policy, [["text", "image", "text"]])
    return trajectory


def test_the_chances_of_all_words_add_up_to_one_and_are_the_recorded_ones(policy, written):
    """A true probability: of every id of the recorded set in the verdict's place, under the recorded temperature."""
    decisions = written.segments[3].decisions
    held = decisions.sampling.sets[decisions.sampling.allowed_N[2]]
    ids = [id for low, high in held.tolist() for id in range(low, high)]
    copies = [rewritten(written, 3, Place(2, 3, (id,), ())) for id in ids]
    found = chances(policy, copies, slots=200)  # a few forwards, of some trajectories each
    assert sum(found) == pytest.approx(1, abs=1e-5)
    sampled_id = int(written.segments[3].ids[2])
    assert found[ids.index(sampled_id)] == pytest.approx(math.exp(decisions.logprob_N[2]), abs=1e-5)
    assert recorded(written, 3, Place(2, 3, (sampled_id,), ()), "fine") == pytest.approx(
        found[ids.index(sampled_id)], abs=1e-5
    )


def test_a_word_of_two_ids_has_the_product_of_their_chances(policy, written):
    ids = tuple(int(id) for id in written.segments[3].ids[1:3])
    [found] = chances(policy, [rewritten(written, 3, Place(1, 3, ids, ()))])
    assert found == pytest.approx(math.exp(written.segments[3].decisions.logprob_N[1:3].sum()), abs=1e-5)


def test_what_the_record_does_not_tell_is_not_known(policy, written):
    place = Place(2, 3, (7,), (int(written.segments[3].ids[2]),))
    assert recorded(written, 3, place, "wrong") is None  # more than the two words could have come
    assert recorded(replace(written, exact=False), 3, place, "fine") is None  # another engine's log-probs
    code = int(policy.vocabulary.code_ids[0])
    assert rewritten(written, 3, Place(2, 3, (code,), ())) == 0.0  # it could not have come
    assert rewritten(written, 3, Place(2, 3, (place.wrong[0], code), ())) is None
    segment = written.segments[3]
    params = segment.decisions.sampling
    cold = replace(params, temperature_N=np.zeros_like(params.temperature_N))
    frozen = replace(segment, decisions=replace(segment.decisions, sampling=cold))
    greedy = replace(written, segments=[*written.segments[:3], frozen])
    assert recorded(greedy, 3, place, "fine") is None and rewritten(greedy, 3, place) is None


def test_of_two_words_the_one_that_was_sampled_tells_the_others_chance():
    pair = (ranges_of([3, 9]),)
    decisions = Decisions(
        np.zeros(1, np.int8),
        np.zeros(1, np.int32),
        np.array([math.log(0.8)], np.float32),
        SamplingParams(np.ones(1, np.float32), np.zeros(1, np.int32), pair),
    )
    thought = trajectory_of({}, replace(text("inspect", "wrong", ids=[9]), decisions=decisions))
    assert recorded(thought, 1, Place(0, 1, (3,), (9,)), "wrong") == pytest.approx(0.2)
    assert recorded(thought, 1, Place(0, 1, (4,), (9,)), "wrong") is None  # the set is of other words


# ---- judged -------------------------------------------------------------------------------------------------------

RED_CIRCLE = {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}


@pytest.fixture(scope="module")
def context():
    task = get_task("shapes")
    return RewardContext.of(task, None, TaskDetector.of(task))


def drawn(color, *words):
    """A thought that draws one circle and says something of it, once for each of `words`."""
    image = render(Scene((Object("circle", color, 0),)))
    said = [text("inspect", f"<inspect> circle = red circle top-left yes : {word} </inspect>") for word in words]
    return trajectory_of(RED_CIRCLE, text("plan", "<des> red circle </des>"), image_segment("sketch", image), *said)


def test_critiques_are_judged_by_the_detector(context):
    groups = [[drawn("red", "fine"), drawn("blue", "fine", "wrong")], [drawn("red", "wrong color red circle", "so")]]
    groups[0][1].member = 1
    found = Critics(context)(groups)
    assert found == [
        Critique(0, 0, 3, "fine", True),
        Critique(0, 1, 3, "fine", False),
        Critique(0, 1, 4, "wrong", False),
        Critique(1, 0, 3, "wrong", True),
        Critique(1, 0, 4, None, True),
    ]


def test_a_policy_is_asked_for_what_the_record_does_not_say(context, policy, written):
    """Another engine's thought that ends with a verdict: P("fine") is what scoring its own words gives, and of "wrong"
    what scoring the copy gives."""
    vocabulary = policy.vocabulary
    fine, wrong = (vocabulary.encode(word)[0] for word in ("fine", "wrong"))
    image = render(Scene((Object("circle", "red", 0),)))
    found = {}
    for word, id in (("fine", fine), ("wrong", wrong)):
        ids = written.segments[3].ids.copy()
        ids[2] = id
        ids[[0, 1, 3, 4]] = vocabulary.encode("circle")[0]
        critique = replace(written.segments[3], role="inspect", ids=ids, text=vocabulary.decode(ids))
        segments = [*written.segments[:2], replace(written.segments[2], image=image), critique]
        thought = replace(written, record=RED_CIRCLE, segments=segments, exact=False)
        assert language.claims(critique.text).verdict == word
        [judged] = Critics(context, vocabulary, policy)([[thought]])
        assert (judged.said, judged.right) == (word, True)
        found[word] = judged.p_fine
        [expected] = chances(policy, [rewritten(thought, 3, Place(2, 3, (fine,), (wrong,)))])
        assert judged.p_fine == pytest.approx(expected)
        assert Critics(context, vocabulary)([[thought]])[0].p_fine is None  # nobody may be asked
    assert found["fine"] == pytest.approx(found["wrong"]) and 0 < found["fine"] < 1  # the verdict itself is no matter


# ---- kept, and what cannot be measured ----------------------------------------------------------------------------


def test_critiques_are_kept_with_their_evaluation(tmp_path):
    heldout = Heldout(
        [PromptScore("a", "colors", {"final_image": 1.0})],
        [[trajectory_of({"prompt": "a"})]],
        {},
        "final_image",
        critiques(*BY_HAND),
    )
    assert heldout.as_metrics()["heldout/calibration/said_fine/is_right"] == 2
    keep(heldout, tmp_path / "one", Evaluated({}, "w", "print"), answers=0)
    again = read(tmp_path / "one")
    assert list(again.critiques) == critiques(*BY_HAND)
    summary = json.loads((tmp_path / "one/summary.json").read_text())["calibration"]
    assert summary["counts"]["said_wrong/is_wrong"] == 2 and summary["bins"][0]["right"] is None
    keep(replace(heldout, critiques=None), tmp_path / "one", Evaluated({}, "w", "print"), answers=0)
    assert read(tmp_path / "one").critiques is None


@pytest.mark.parametrize("line", ["{}", "no JSON", '{"prompt": 9, "sample": 0, "segment": 1, "said": "fine", '
                                  '"right": true, "p_fine": 0.5}', '{"prompt": 0, "sample": 0, "segment": 1, '
                                  '"said": "fine", "right": true, "p_fine": 1.5}'])  # fmt: skip
def test_a_line_that_is_no_critique_is_named(tmp_path, line):
    heldout = Heldout([PromptScore("a", "", {"s": 1.0})], [[trajectory_of({"prompt": "a"})]], {}, "s", [])
    keep(heldout, tmp_path / "one", Evaluated({}, "w", "print"), answers=0)
    (tmp_path / "one" / CRITIQUES).write_text(line + "\n")
    with pytest.raises(EvaluationsError, match=r"critiques.jsonl line 1: not a row of critiques"):
        read(tmp_path / "one")


def test_the_report_draws_them_and_their_rates_over_training(tmp_path):
    for number, label in enumerate(("warm_start", "grpo")):
        scored = [PromptScore("a", "colors", {"final_image": 1.0})]
        heldout = Heldout(scored, [[trajectory_of({"prompt": "a"})]], {}, "final_image", critiques(*BY_HAND))
        keep(heldout, tmp_path / "evaluations" / label, Evaluated({}, "w", label, number), answers=0)
    rows = [{"step": step, **Calibration.of(critiques(*BY_HAND)).as_metrics()} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render_page(report_data(tmp_path))
    assert "Critiques of its own images" in page and "Critiques: approved but wrong" in page
    assert page.count("0.9 to 1: 3 critiques, mean 0.947, 0.667 of the images right") == 2  # the points of two diagrams
    assert "<td>2</td><td>1</td><td>2</td><td>1</td>" in page  # of "fine", before and after


def test_what_cannot_be_judged_is_none_or_refused_by_name(context, policy):
    fmt, records = get_format("strokes"), [RED_CIRCLE]
    assert open_critics(context, fmt, records, policy, asked=True) is not None
    for lacking, where, asked, reason in (
        (RewardContext(object(), None, context.detector), fmt, records, "has no function 'claims'"),
        (replace(context, detector=None), fmt, records, "give rewards.detector"),
        (context, fmt, [{"prompt": "a cat"}], "no prompt has an `include`"),
        (context, fmt, [{"prompt": "a cat", "include": [{"class": "cat", "count": 1}]}], "cat"),
    ):
        assert open_critics(lacking, where, asked, policy, asked=False) is None
        with pytest.raises(CalibrationError, match="evaluate.calibration: .*" + reason):
            open_critics(lacking, where, asked, policy, asked=True)


def test_a_recipe_that_asks_for_what_nothing_reads_is_refused(capsys, tmp_path):
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"a cat to {name}"}) + "\n")
    said = refused(
        capsys, "evaluate", QUICKSTART, *SMALL, f"run_dir={tmp_path / 'run'}", "evaluate.calibration=true",
        "evaluate.by=[reward]", "evaluate.prompts=1", "--dry-run",
        f"task={{dataset: {{path: {tmp_path / 'train.jsonl'}, heldout_path: {tmp_path / 'heldout.jsonl'}}}}}",
        "rewards.parts={format: {function: format}}", "rewards.total=format", "grpo.segment_reward_weights={}",
    )  # fmt: skip
    assert "has no function 'claims', by which critiques are read; or leave evaluate.calibration out" in said


@pytest.mark.slow
def test_a_run_logs_its_critiques_and_an_evaluation_keeps_them(capsys, tmp_path):
    tiny = [QUICKSTART, *SMALL, f"run_dir={tmp_path}", "format.constrain=full", "rewards.total=detect",
            "rollout.max_tokens=110", "evaluate.samples=3", "evaluate.calibration=true", "grpo.steps=1",
            "grpo.prompts_per_step=2", "grpo.num_generations=4", "grpo.evaluate_every=1"]  # fmt: skip
    assert main(["sft", *tiny]) == 0 and main(["grpo", *tiny]) == 0
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    rollouts, heldout = ({cell: row[f"{place}calibration/{cell}"] for cell in CELLS} for place in ("", "heldout/"))
    assert sum(rollouts.values()) > 0 and row["calibration/unreadable"] <= 1
    during = read(tmp_path / "evaluations/training-000001")
    assert during.calibration.counts == heldout and len(during.critiques) == sum(heldout.values())
    capsys.readouterr()
    assert main(["evaluate", *tiny]) == 0  # the same weights, prompts and noise
    said = capsys.readouterr().out
    assert "give no verdict" in said and json.loads(said.splitlines()[-1])["calibration"]["counts"] == heldout
    (tmp_path / "evaluations/step-000001" / CRITIQUES).unlink()
    assert "is kept there without its critiques" in refused(capsys, "evaluate", *tiny)
