"""GenEval's rules against a second, slower reading of them, on records whose clauses often name one class several
times; and such records by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_helpers import image_segment, trajectory_of

from rewards.contract import RewardContext
from rewards.detectors.base import CachedDetector, Detection
from rewards.functions.geneval import (
    MAX_OBJECTS,
    MODES,
    RecordColumnError,
    check_clauses,
    check_record,
    classes_of,
    colored_of,
    evaluate,
    geneval,
    kept,
    relations,
)
from runtime.errors import UserError

BOX, RIGHT, BELOW = (0.0, 0.0, 10.0, 10.0), (30.0, 0.0, 40.0, 10.0), (0.0, 30.0, 10.0, 40.0)


def seen(*boxes, color="red", score=0.95):
    """The first is the most certain."""
    return [{"box": box, "score": score - at / 1000, "color": color} for at, box in enumerate(boxes)]


# ---- the second reading -----------------------------------------------------------------------------------------


class Reading:
    """The rules, clause by clause, each as the sentence that says it. Shares no code with the other but `relations`."""

    def __init__(self, record, found):
        self.include, self.exclude = record["include"], record.get("exclude") or []
        least = 0.9 if record.get("tag") == "counting" else 0.3
        self.found = {}
        for name, items in found.items():
            sure = [item for item in items if item["score"] > least]
            order = sorted(range(len(sure)), key=lambda at: (-sure[at]["score"], at))
            self.found[name] = [sure[at] for at in order[:MAX_OBJECTS]]

    def number(self, clause):
        return len(self.found.get(clause["class"], []))

    def best(self, clause):
        return self.found.get(clause["class"], [])[: clause["count"]]

    def right_color(self, clause):
        return clause.get("color") is None or all(item["color"] == clause["color"] for item in self.best(clause))

    def pairs(self, clause, among):
        """Of the pairs (one of the best, one of the target's best) whether the relation holds."""
        relation, target = clause["position"]
        return [relation in relations(a["box"], b["box"]) for a in among(clause) for b in among(self.include[target])]

    def satisfied(self, index, strict):
        clause = self.include[index]
        enough = self.number(clause) == clause["count"] if strict else self.number(clause) >= clause["count"]
        if not enough or not self.right_color(clause):
            return False
        if clause.get("position") is None:
            return True
        return self.satisfied(clause["position"][1], strict) and all(self.pairs(clause, self.best))

    def right(self, strict):
        included = all(self.satisfied(index, strict) for index in range(len(self.include)))
        return included and (strict or all(self.number(clause) < clause["count"] for clause in self.exclude))

    def share(self, strict):
        asked = []
        for clause in self.include:
            n, f = clause["count"], self.number(clause)
            limits = [c["count"] for c in self.exclude if c["class"] == clause["class"]]
            too_many = [f - k + 1 for k in ([n + 1] if strict else limits) if f >= k]
            asked.append(
                max(Fraction(0), 1 - Fraction(max(too_many), n)) if too_many else min(Fraction(1), Fraction(f, n))
            )
            if clause.get("color") is not None:
                asked.append(Fraction(sum(item["color"] == clause["color"] for item in self.best(clause)), n))
            if clause.get("position") is not None:
                target = self.include[clause["position"][1]]
                asked.append(Fraction(sum(self.pairs(clause, self.best)), n * target["count"]))
        if not strict:
            included = [clause["class"] for clause in self.include]
            asked += [Fraction(self.number(c) < c["count"]) for c in self.exclude if c["class"] not in included]
        return sum(asked, Fraction(0)) / len(asked)

    def flow_grpo(self):
        entries, whole = [], []
        for clause in self.include:
            n, every = clause["count"], self.found.get(clause["class"], [])
            entries.append(1 - Fraction(abs(n - len(every)), n))
            ok = len(every) == n
            if clause.get("color") is not None:
                hits = sum(item["color"] == clause["color"] for item in every)
                if ok:
                    entries.append(1 - Fraction(abs(n - hits), n))
                    ok = hits == n
                else:
                    entries.append(Fraction(0))
            elif clause.get("position") is not None and not ok:
                entries.append(Fraction(0))
            if clause.get("position") is not None and ok:
                if not whole[clause["position"][1]]:
                    entries.append(Fraction(0))
                    ok = False
                elif all(self.pairs(clause, lambda c: self.found.get(c["class"], []))):
                    entries.append(Fraction(1))
                else:
                    entries += [Fraction(0), Fraction(1)]
                    ok = False
            whole.append(ok)
        return sum(entries, Fraction(0)) / len(entries)


@st.composite
def records(draw):
    """Up to four include clauses of two classes, so that most records repeat one; half of them ask for counts alone,
    which an image meets more often."""
    include, dressed = [], draw(st.booleans())
    for index in range(draw(st.integers(1, 4))):
        clause = {"class": draw(st.sampled_from(["cat", "dog"])), "count": draw(st.integers(1, 3))}
        if dressed and draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(["red", "blue"]))
        if dressed and index and draw(st.booleans()):
            relation = draw(st.sampled_from(["left of", "right of", "above", "below"]))
            clause["position"] = [relation, draw(st.integers(0, index - 1))]
        include.append(clause)
    exclude = draw(
        st.lists(
            st.fixed_dictionaries({"class": st.sampled_from(["cat", "dog", "cow"]), "count": st.integers(1, 4)}),
            max_size=3,
        )
    )
    return {"tag": draw(st.sampled_from(["counting", "other"])), "include": include, "exclude": exclude}


# Two columns and two rows of places, so that relations hold often; scores on both sides of both thresholds.
objects = st.lists(
    st.builds(
        lambda x, y, side, score, color: {"box": (x, y, x + side, y + side), "score": score, "color": color},
        st.sampled_from([0, 2, 30]),
        st.sampled_from([0, 2, 30]),
        st.sampled_from([8, 10]),
        st.sampled_from([0.3, 0.5, 0.9, 0.95, 0.99]),
        st.sampled_from(["red", "red", "blue", None]),
    ),
    max_size=4,
)
scenes = st.fixed_dictionaries({"cat": objects, "dog": objects}, optional={"cow": objects})


@st.composite
def cases(draw):
    """A record, and a scene: any, or of each class as many as some clause of it names, in a color that one asks for,
    so that images that are right or nearly right come up."""
    record = draw(records())
    if draw(st.booleans()):
        return record, draw(scenes)
    found = {}
    for name in ("cat", "dog"):
        clauses = [clause for clause in record["include"] if clause["class"] == name]
        if clauses:
            color = draw(st.sampled_from([clause.get("color", "red") for clause in clauses]))
            place = draw(st.sampled_from([BOX, RIGHT, BELOW]))
            found[name] = seen(*[place] * draw(st.sampled_from([clause["count"] for clause in clauses])), color=color)
    return record, found


@given(cases())
def test_every_mode_is_what_a_second_reading_of_the_rules_says(case):
    record, found = case
    reading = Reading(record, found)
    assert evaluate(record, found, "standard")[0] == reading.right(strict=False)
    assert evaluate(record, found, "strict")[0] == reading.right(strict=True)
    assert evaluate(record, found, "graded")[0] == pytest.approx(float(reading.share(strict=False)), abs=1e-12)
    assert evaluate(record, found, "graded_strict")[0] == pytest.approx(float(reading.share(strict=True)), abs=1e-12)
    assert evaluate(record, found, "flow_grpo")[0] == pytest.approx(float(reading.flow_grpo()), abs=1e-12)


@given(cases())
def test_graded_is_bounded_and_one_exactly_where_correct(case):
    record, found = case
    for graded_mode, mode in (("graded", "standard"), ("graded_strict", "strict"), ("flow_grpo", "strict")):
        graded, correct = evaluate(record, found, graded_mode)[0], evaluate(record, found, mode)[0]
        assert graded <= 1 and (graded >= 0 or mode == "flow_grpo" or graded_mode == "flow_grpo")
        assert (graded == 1) == correct


@given(cases(), st.randoms(use_true_random=False))
def test_a_reason_is_given_exactly_where_something_is_wrong_and_the_order_of_detections_is_nothing(case, random):
    record, found = case
    shuffled = {name: random.sample(items, len(items)) for name, items in reversed(found.items())}
    distinct = all(len({item["score"] for item in items}) == len(items) for items in found.values())
    for mode in MODES:
        value, reason = evaluate(record, found, mode)
        assert (reason == "") == (evaluate(record, found, "standard" if mode == "graded" else mode)[0] == 1)
        if distinct:
            assert evaluate(record, shuffled, mode) == (value, reason)


@given(cases())
def test_a_clause_that_is_said_twice_counts_twice_and_changes_no_verdict(case):
    record, found = case
    twice = {**record, "include": [*record["include"], *record["include"]], "exclude": record["exclude"] * 2}
    for mode in ("standard", "strict"):
        assert evaluate(twice, found, mode)[0] == evaluate(record, found, mode)[0]
    for mode in ("graded", "graded_strict", "flow_grpo"):
        assert evaluate(twice, found, mode)[0] == pytest.approx(evaluate(record, found, mode)[0])


@given(cases())
def test_the_colors_that_are_asked_for_suffice_for_every_mode(case):
    """Colors that a clause does not ask about change nothing, so that nobody need name them."""
    record, found = case
    asked = colored_of(record)
    sure = kept(record, found)
    for mode in ("standard", "strict", "graded", "graded_strict", "flow_grpo"):
        blind = {
            name: [
                Detection(o.box, o.score, o.color if at < asked.get(name, 0) else None) for at, o in enumerate(items)
            ]
            for name, items in sure.items()
        }
        assert evaluate(record, blind, mode)[0] == evaluate(record, found, mode)[0]


# ---- by hand ------------------------------------------------------------------------------------------------------


def test_two_include_clauses_of_a_class_each_count():
    record = {"include": [{"class": "cat", "count": 1}, {"class": "cat", "count": 3}]}
    three, one = {"cat": seen(BOX, RIGHT, BELOW)}, {"cat": seen(BOX)}
    assert evaluate(record, three) == (True, "")  # at least 1 and at least 3
    assert evaluate(record, three, "graded")[0] == 1
    assert evaluate(record, three, "strict") == (False, "expected cat=1, found 3")
    # the first clause: two too many for one, 0; the second: 1
    assert evaluate(record, three, "graded_strict")[0] == 0.5
    assert evaluate(record, one, "strict") == (False, "expected cat=3, found 1")
    assert evaluate(record, one, "graded_strict")[0] == pytest.approx((1 + 1 / 3) / 2)
    assert evaluate(record, one) == (False, "expected cat>=3, found 1")
    assert evaluate(record, one, "graded")[0] == pytest.approx((1 + 1 / 3) / 2)
    # flow_grpo: 1 - |1 - 3| / 1 = -1, and 1
    assert evaluate(record, three, "flow_grpo")[0] == 0
    turned = {"include": record["include"][::-1]}
    for mode in MODES:
        assert evaluate(turned, three, mode)[0] == evaluate(record, three, mode)[0]


def test_two_exclude_clauses_of_a_class_each_count():
    record = {
        "include": [{"class": "dog", "count": 1}],
        "exclude": [{"class": "cat", "count": 1}, {"class": "cat", "count": 3}],
    }
    two = {"dog": seen(BOX), "cat": seen(BOX, RIGHT)}
    assert evaluate(record, two) == (False, "expected cat<1, found 2")
    # the dog 1, fewer than one cat 0, fewer than three cats 1
    assert evaluate(record, two, "graded")[0] == pytest.approx(2 / 3)
    assert evaluate(record, two, "strict")[0] is True and evaluate(record, two, "graded_strict")[0] == 1

    # Of an included class the smallest count refuses, wherever it stands.
    for counts in ((2, 3), (3, 2)):
        exclude = [{"class": "dog", "count": count} for count in counts]
        only_one = {"include": [{"class": "dog", "count": 1}], "exclude": exclude}
        found = {"dog": seen(BOX, RIGHT)}
        assert evaluate(only_one, found) == (False, "expected dog<2, found 2")
        assert evaluate(only_one, found, "graded")[0] == 0  # 1 - (2 - 2 + 1) / 1


def test_two_colors_of_a_class_are_asked_of_the_same_best_objects_as_in_the_release():
    record = {"include": [{"class": "cat", "count": 1, "color": c} for c in ("red", "blue")]}
    found = {"cat": seen(BOX) + seen(RIGHT, color="blue", score=0.8)}
    assert evaluate(record, found) == (False, "expected blue cat>=1, found 0 blue; and 1 red")
    assert evaluate(record, found, "graded")[0] == pytest.approx(3 / 4)


def test_a_place_is_shared_out_over_every_pair_that_was_asked_for():
    """Two cats and a dog left of them: a cat that is missing is two pairs less, and not a smaller whole."""
    record = {
        "include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["left of", 0]}],
    }
    # 2 / 2, 1 / 2, and of four pairs the one dog makes two: one holds. (1 + 1 / 2 + 1 / 4) / 3
    found = {"cat": seen(RIGHT, BOX), "dog": seen(BOX)}
    assert evaluate(record, found, "graded")[0] == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    # one cat, one dog, in the right place: 1 / 2, 1 / 2, 1 / 4
    found = {"cat": seen(RIGHT), "dog": seen(BOX)}
    assert evaluate(record, found, "graded")[0] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)


@pytest.mark.parametrize("counts", [(1, 3), (3, 1), (2, 2)])
def test_as_many_colors_are_named_as_the_clause_that_asks_for_most(counts):
    record = {
        "include": [
            *({"class": "cat", "count": count, "color": "red"} for count in counts),
            {"class": "dog", "count": 4},  # of which no color is asked
            {"class": "cat", "count": 4},
        ]
    }
    assert colored_of(record) == {"cat": max(counts)}
    assert classes_of(record) == ["cat", "cat", "dog", "cat"]


class NamesColors:
    """Sees four cats, and is asked for their colors afterwards: the third is blue."""

    open_vocabulary, classes = True, ()

    def __init__(self):
        self.phrases, self.named = [], 0

    def detect_phrases(self, images, phrases):
        self.phrases += phrases
        boxes = (BOX, RIGHT, BELOW, (30.0, 30.0, 40.0, 40.0))
        return [{"cat": [Detection(box, 0.9 - at / 100) for at, box in enumerate(boxes)]} for _ in images]

    def name_colors(self, images, objects):
        self.named += sum(map(len, objects))
        return [["blue" if item.box == BELOW else "red" for _, item in items] for items in objects]


@pytest.mark.parametrize(("counts", "paid"), [((1, 2), 1.0), ((2, 1), 1.0), ((1, 3), 0.0), ((3, 1), 0.0)])
def test_the_reward_names_those_colors_and_asks_for_each_class_once(counts, paid):
    record = {"include": [{"class": "cat", "count": count, "color": "red"} for count in counts]}
    detector = NamesColors()
    row = trajectory_of(record, image_segment("sketch", np.zeros((64, 64, 3), np.uint8)))
    assert geneval([row], RewardContext.of(None, None, detector)) == [paid]
    assert detector.phrases == [("cat",)] and detector.named == max(counts)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"include": [{"class": "cat", "count": 0}]}, "here: include has .*'count': 0.*count from 1"),
        ({"include": [{"class": "cat", "count": "2"}]}, "here: include has .*'count': '2'"),
        ({"include": [{"class": "cat", "count": True}]}, "here: include has .*'count': True"),
        ({"include": [{"count": 1}]}, "here: include has .*'count': 1"),
        ({"include": ["cat"]}, "here: include has 'cat'"),
        ({"include": [{"class": "cat", "count": 17}]}, "here asks for 17 of 'cat'.*at 16 of a class at most"),
        (
            {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "dog", "count": 0}]},
            "here: exclude has .*'count': 0",
        ),
    ],
)
def test_a_count_that_no_image_can_have_is_refused(record, message):
    for check in (check_clauses, lambda one, where: check_record(CachedDetector(NamesColors()), one, where)):
        with pytest.raises(RecordColumnError, match=message):
            check(record, "here")
    check_clauses({"include": [{"class": "cat", "count": 16}], "exclude": [{"class": "cat", "count": 17}]}, "here")


def test_a_record_without_clauses_asks_for_nothing():
    for mode, value in {
        "standard": True,
        "strict": True,
        "graded": 1.0,
        "graded_strict": 1.0,
        "flow_grpo": 0.0,
    }.items():
        assert evaluate({}, {"cat": seen(BOX)}, mode) == (value, "")


def test_a_place_by_a_clause_that_is_no_earlier_one_is_named():
    for index in (-1, 1, 2):
        record = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", index]}]}
        with pytest.raises(RecordColumnError, match=rf"'dog' is placed relative to clause {index}; .* \(0 to 0\)"):
            evaluate(record, {"cat": seen(BOX), "dog": seen(BOX)})


class NoColors(NamesColors):
    sees_colors = False


def test_a_color_that_nothing_can_name_is_refused_and_no_other_record():
    detector = CachedDetector(NoColors())
    check_record(detector, {"include": [{"class": "cat", "count": 1}]}, "here")
    with pytest.raises(UserError, match=r"here asks for a color, .*give rewards\.detector\.colors"):
        check_record(detector, {"include": [{"class": "cat", "count": 1, "color": "red"}]}, "here")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "strcit"}, "geneval: no mode 'strcit'. Known: standard, strict"),
        ({"image": "last"}, "geneval: no image 'last'. Known: final, first, each"),
        ({"threshold": 1}, "geneval: thresholds are 1 and 0.9; they are scores, from 0 to below 1"),
        ({"counting_threshold": -0.1}, "geneval: thresholds are 0.3 and -0.1"),
    ],
)
def test_a_wrong_option_is_refused_where_there_is_nothing_to_judge(options, words):
    """As when a run starts, which calls every part without thoughts."""
    with pytest.raises(UserError, match=words):
        geneval([], RewardContext.of(None, None, NamesColors()), **options)


def test_reasons_are_logged_by_row():
    drawn = image_segment("sketch", np.zeros((64, 64, 3), np.uint8))
    records = [{"include": [{"class": "cat", "count": count}]} for count in (4, 5, 4)]
    rows = [trajectory_of(records[0], drawn), trajectory_of(records[1], drawn), trajectory_of(records[2])]
    logged = {}
    paid = geneval(rows, RewardContext.of(None, None, NamesColors()), logged.__setitem__)
    assert paid == [1.0, 0.0, 0.0] and logged == {"reason": ["", "expected cat>=5, found 4", "no image"]}


def test_a_relation_holds_only_past_half_of_the_distance():
    """Centres 3 and 4 apart, so 5 in all; of the 3 a tenth of both widths, 0.5, is slack: 2.5 / 5 is no side yet."""
    box, other = (0.0, 0.0, 2.0, 2.0), (2.5, 4.0, 5.5, 6.0)
    assert relations(box, other) == {"above"} and relations(other, box) == {"below"}  # (4 - 0.4) / 5
    nearer = (2.5, 4.0, 5.4, 6.0)  # 2.95 apart, and 0.49 slack, over 4.97
    assert relations(box, nearer) == {"above"}
    farther = (2.6, 4.0, 5.6, 6.0)  # 3.1 - 0.5 over 5.06
    assert relations(box, farther) == {"left of", "above"} and relations(farther, box) == {"right of", "below"}
    turned, other = (0.0, 0.0, 2.0, 2.0), (4.0, 2.5, 6.0, 5.5)
    assert relations(turned, other) == {"left of"} and relations(other, turned) == {"right of"}
