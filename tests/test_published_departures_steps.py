"""Where the repaired forms of VRAG-RL, Visual-ARFT, OpenThinkIMG and VisTA depart from their releases: why, as a
predicate of the thought; without a reason both pay the same."""

from __future__ import annotations

import json
import re

import pytest
from departures import without_replies
from rewards_helpers import text, trajectory_of
from test_published_parity_b import Judge, vrag_thought

from record.trajectory import Author
from rewards.contract import RewardContext
from rewards.functions.answers import parsed, verified
from rewards.functions.comparisons import squad_normalised
from rewards.functions.text import transcript
from rewards.published import openthinkimg, vista, visual_arft, vrag
from rewards.registry import REWARDS

THINK = "<think>ok</think>"


class Encoder:
    def __init__(self, cosine):
        self.cosine = cosine

    def similarities(self, pairs):
        return [self.cosine for _ in pairs]


def agrees(answer, gold):
    """By math-verify, the answer's place first, as the releases call it."""
    mine, theirs = parsed(answer), parsed(gold)
    return bool(mine is not None and theirs is not None and verified(mine, theirs))


# ---- VRAG-RL --------------------------------------------------------------------------------------------------------


def vrag_departs(t, judged):
    why, said, own = [], transcript(t), transcript(without_replies(t))
    if vrag.read_release(said) != vrag.read_release(own):
        why.append("tools' replies")
    block = re.findall(r"<answer>(.*?)</answer>", own, re.DOTALL)
    searched = re.search(r"<search>.*?</search>", own, re.DOTALL) is not None
    if not (block and searched):
        return why
    if "<answer>" in block[-1] or "<|im_start|>user" in own:
        why.append("where the answer begins")
    if not block[-1].strip():
        why.append("blank answer")
    elif judged is None:
        why.append("unjudged")
    names = [vrag.page_name(path) for path in t.info.get("retrieved", [])]
    if len(set(names)) < len(names):
        why.append("page twice")
    return why


def vrag_pays(t, judged, mode, variant):
    return vrag.vrag([t], RewardContext(judge=Judge(judged)), mode=mode, variant=variant)[0]


# ---- Visual-ARFT ----------------------------------------------------------------------------------------------------


def arft_departs(said, gold, task):
    kind = next(kind for kind in visual_arft.KINDS[task] if f"<{kind}>" in gold)
    why = []
    inside = re.search(rf"<{kind}>(.*?)</{kind}>", said, re.DOTALL)
    if said != said.strip():
        why.append("outer white space")
    if task == "search" and agrees(said, gold):
        why.append("math-verify over whole texts")
    if task == "search" and kind == "search" and "</answer>" in said or kind == "answer" and "<search>" in said:
        why.append("form of another step")
    if inside is None:
        return [*why, "tags"]
    if "\n" in inside[1] and kind != "code":
        why.append("block over lines")
    if kind == "code":
        why.append("code that nobody ran")
    if kind == "answer":
        for words in (inside[1], re.search(r"<answer>(.*?)</answer>", gold, re.DOTALL)[1]):
            once = squad_normalised(words).split()
            why += ["words twice"] * (len(set(once)) < len(once))
    if kind == "search" and not inside[1].strip():
        why.append("blank search")
    if kind == "problem":
        quoted = re.findall(r"'([^']+)'", inside[1])
        wanted = set(re.findall(r"'([^']+)'", gold))
        plain = re.fullmatch(r"\s*\{[^{}\"]*\}\s*", inside[1]) is not None and len(set(quoted)) == len(quoted)
        why += ["other quotes, or a fault twice"] * (not plain)
        why += ["either rotation"] * (wanted == set(visual_arft.ROTATIONS) and quoted == ["rotation180"])
    return why


def arft_pays(said, gold, task, variant, ran=None):
    call = [text("observation", "done", Author.ENVIRONMENT)] if ran else []
    row = trajectory_of({"ground_truth": gold}, text("answer", said), *call)
    return visual_arft.visual_arft([row], task=task, variant=variant)[0]


# ---- OpenThinkIMG ---------------------------------------------------------------------------------------------------


def open_departs(turns, gold):
    why, last = [], turns[-1].strip()
    gold = re.sub(r"^\s*<answer>(.*)</answer>\s*$", r"\1", gold, flags=re.DOTALL).strip()
    if agrees(last, gold):
        why.append("the whole turn by math-verify")
    try:
        actions = json.loads(last)["actions"]
        first, ended = actions[0], [a["arguments"]["ans"] for a in actions if a["name"] == "Terminate"]
    except (ValueError, KeyError, TypeError, IndexError):
        return [*why, "no plain object with an answer"]
    if first["name"] != "Terminate":
        why.append("the first action is no Terminate")
    if any(not isinstance(answer, str) for answer in ended):
        why.append("an answer that is no text")
    elif any(answer != gold and answer.strip().lower() == gold.lower() for answer in ended):
        why.append("case and white space")
    elif any(agrees(answer, gold) != bool(openthinkimg.same(answer, gold)) for answer in ended if answer != gold):
        why.append("other words for the same")
    return why


def open_pays(turns, gold, variant):
    glue = text("observation", "OBSERVATION", Author.ENVIRONMENT)
    parts = [part for turn in turns for part in (text("answer", turn), glue)]
    return openthinkimg.openthinkimg([trajectory_of({"ground_truth": gold}, *parts[:-1])], variant=variant)[0]


# ---- VisTA ----------------------------------------------------------------------------------------------------------

PLAIN_NUMBER = r"\d+(\.\d+)?"


def vista_departs(said, without, helped, gold):
    why = []
    block = re.fullmatch(r"[^<>]*<answer>([\d, ]*)</answer>[^<>]*", said)
    if block is None or "assistant" in said or any(int(n) > 8 for n in re.findall(r"\d+", block[1])):
        why.append("another pick")
    elif not block[1].strip(", "):
        why.append("no tool")
    for reply in (without, helped):
        inside = re.fullmatch(r"[^<>]*(?:<answer>([^<>\n]*)</answer>)?[^<>]*", reply)
        if inside is None or "assistant" in reply:
            why.append("another answer of the frozen model")
            continue
        answer, wanted = (inside[1] if inside[1] is not None else reply).strip(), gold.strip()
        if re.fullmatch(PLAIN_NUMBER, wanted) and float(wanted):  # a release drops signs and runs digits together
            if re.search(r"\d", answer) and not re.fullmatch(PLAIN_NUMBER, answer):
                why.append("numbers as numbers")
        elif wanted.startswith("["):
            if re.fullmatch(r"[a-z]+(( and |, )[a-z]+)*", answer) is None:
                why.append("items of a list")
        elif re.search(r"\d", wanted):
            why.append("numbers as numbers")  # zero, a sign, a share
        elif re.search(r"[^a-z ]|\b(a|an|the)\b", f"{answer} {wanted}".lower()):
            why.append("words but for articles and marks")
    return why


def vista_pays(said, without, helped, gold, variant):
    picks = {
        ",".join(map(str, sorted(pick))) for pick in (vista.read_tools(said)[0], vista.read_tools_release(said) or [])
    }
    record = {"ground_truth": gold, "answer_without_tools": without, "answers_with_tools": dict.fromkeys(picks, helped)}
    return vista.vista([trajectory_of(record, text("answer", said))], RewardContext(judge=Judge()), variant=variant)[0]


# ---- on the reference records ---------------------------------------------------------------------------------------


@pytest.mark.parity
def test_vista_pays_the_same_without_a_reason(reference_records):
    alike = 0
    for record in reference_records("rewards/vista.jsonl"):
        inputs = record["inputs"]
        replies = [inputs.get(key) for key in ("answer_without_tools", "answer_with_tools")]
        if record["function"] != "tool_gain" or inputs["question_matches"] != 1 or None in replies:
            continue  # no whole reward, an error, or an unjudged one: test_published_vista.py
        given = inputs["response_text"], *replies, inputs["ground_truth"]
        assert vista_pays(*given, "release") == pytest.approx(record["outputs"]["total"])
        if not vista_departs(*given):
            alike += 1
            assert vista_pays(*given, "repaired") == pytest.approx(record["outputs"]["total"]), given
    assert alike


@pytest.mark.parametrize(
    ("given", "why", "released", "repaired"),
    [
        (("<answer>2</answer>", "red", "<answer>blue</answer>", "blue"), [], 1.0, 1.0),
        (("<answer>2, 0</answer>", "blue", "red", "blue"), [], -0.5, -0.5),
        (("<answer>2</answer>", "100", "so <answer>104.9</answer>", "100"), [], 1.0, 1.0),
        (("<answer>2</answer>", "red", "green and red", "[red, green]"), [], 1.0, 1.0),
        (("<answer></answer>", "red", "blue", "blue"), ["no tool"], 1.0, 0.0),  # the same question twice
        (("3", "red", "blue", "blue"), ["another pick"], 1.0, 0.0),  # the release takes the whole text
        (("<answer>2</answer>", "red", "-100", "100"), ["numbers as numbers"], 1.0, 0.0),
        (("<answer>2</answer>", "0", "0.0", "0"), ["numbers as numbers"] * 2, -0.5, 1.0),
        (("<answer>2</answer>", "red", "The kite.", "kite"), ["words but for articles and marks"], 0.0, 1.0),
        (
            ("<answer>2</answer>", "red", "<answer>red</answer> or <answer>blue</answer>", "red"),
            ["another answer of the frozen model"],
            1.0,
            -0.5,
        ),
    ],
)
def test_vista_by_hand(given, why, released, repaired):
    assert vista_departs(*given) == why
    assert (vista_pays(*given, "release"), vista_pays(*given, "repaired")) == (released, repaired)


@pytest.mark.parity
@pytest.mark.parametrize("system", ["vrag", "visual_arft", "openthinkimg"])
def test_without_a_reason_both_forms_pay_the_same(system, reference_records, monkeypatch):
    """On all records, those with a known bug too; the release pays what was recorded of it."""
    alike = 0
    for record in reference_records(f"rewards/{system}.jsonl"):
        inputs, total = record["inputs"], record["outputs"].get("total")
        if record["function"] in ("ndcg", "f1", "single_turn"):  # no whole reward
            continue
        if system == "vrag":
            mode = record["function"]
            pairs = [(vrag_thought(sample), sample["judge_verdict"]) for sample in inputs["samples"]]
            whys = [vrag_departs(t, judged) for t, judged in pairs]
            paid = [[vrag_pays(*pair, mode, variant) for pair in pairs] for variant in ("release", "repaired")]
            recorded = total
        elif system == "visual_arft":
            encoder = Encoder(inputs.get("similarity"))
            monkeypatch.setattr(visual_arft, "sentence_encoder", lambda *_, found=encoder: found)
            task = record["variant"].removeprefix("release_")
            whys = [arft_departs(inputs["response_text"], inputs["ground_truth"], task)]
            paid = [
                [arft_pays(inputs["response_text"], inputs["ground_truth"], task, variant)]
                for variant in ("release", "repaired")
            ]
            recorded = [total]
        else:
            whys = [open_departs(inputs["turns"], inputs["ground_truth"])]
            paid = [
                [open_pays(inputs["turns"], inputs["ground_truth"], variant)] for variant in ("release", "repaired")
            ]
            recorded = [total]
        for released, repaired, expected, why in zip(*paid, recorded, whys, strict=True):
            assert released == pytest.approx(expected, abs=1e-4)
            if not why:
                alike += 1
                assert repaired == pytest.approx(released), inputs
    assert alike


# ---- by hand: a thought, why the forms differ on it, what the release pays and what the repaired form does -----------


PAGES = {"question": "?", "ground_truth": "7", "file_name": "report.pdf", "reference_pages": [3]}
SEARCH, ANSWER = "<search>report</search>", "<answer>7</answer>"


@pytest.mark.parametrize(
    ("turns", "retrieved", "judged", "why", "released", "repaired"),
    [
        ([SEARCH, ANSWER], ["report_3.jpg"], True, [], 1.0, 1.0),
        ([SEARCH, ANSWER], ["report_4.jpg", "report_3.jpg"], False, [], 0.1 + 0.2 * 0.63093, 0.1 + 0.2 * 0.63093),
        ([ANSWER], ["report_3.jpg"], True, [], 0.0, 0.0),
        # 1 / log2(2) + 1 / log2(3), over an ideal of 1
        ([SEARCH, ANSWER], ["report_3.jpg"] * 2, True, ["page twice"], 0.8 + 0.2 * 1.63093, 1.0),
        ([SEARCH, "<answer> </answer>"], ["report_3.jpg"], True, ["blank answer"], 1.0, 0.3),
        ([SEARCH, "<answer></answer>"], ["report_3.jpg"], True, ["blank answer"], 1.0, 0.3),
        ([SEARCH, ANSWER], ["report_3.jpg"], None, ["unjudged"], 0.3, None),
        ([ANSWER, "so"], ["report_3.jpg"], True, [], 0.0, 0.0),
    ],
)
def test_vrag_by_hand(turns, retrieved, judged, why, released, repaired):
    parts = [part for turn in turns for part in (text("answer", turn), text("seen", "pages", Author.ENVIRONMENT))]
    t = trajectory_of(PAGES, *parts[:-1])
    t.info["retrieved"] = retrieved
    assert vrag_departs(t, judged) == why
    assert vrag_pays(t, judged, "train", "release") == pytest.approx(released, abs=1e-4)
    found = vrag_pays(t, judged, "train", "repaired")
    assert found == (None if repaired is None else pytest.approx(repaired, abs=1e-4))


def test_vrag_reads_no_tag_that_the_environment_wrote():
    t = trajectory_of(PAGES, text("answer", "so"), text("seen", SEARCH, Author.ENVIRONMENT), text("answer", ANSWER))
    t.info["retrieved"] = ["report_3.jpg"]
    assert vrag_departs(t, True) == ["tools' replies"]
    assert vrag_pays(t, True, "train", "release") == pytest.approx(1.0)
    assert vrag_pays(t, True, "train", "repaired") == 0


ROTATED = "<problem> {'rotation90', 'rotation180'} </problem>"


@pytest.mark.parametrize(
    ("said", "gold", "task", "why", "released", "repaired"),
    [
        (f"{THINK}<answer>a red kite</answer>", "<answer>red kite</answer>", "code", [], 2.0, 2.0),  # SQuAD drops "a"
        (f"{THINK}<answer>kite</answer>", "<answer>red kite</answer>", "code", [], 1 + 2 / 3, 1 + 2 / 3),
        (f"{THINK}kite", "<answer>kite</answer>", "code", ["tags"], 0.0, 0.0),  # squad: thinkokthinkkite
        (f"{THINK} kite", "<answer>kite</answer>", "code", ["tags"], 2 / 3, 0.0),
        (f"{THINK}<answer>kite kite</answer>", "<answer>kite kite</answer>", "code", ["words twice"] * 2, 1.5, 2.0),
        (f"{THINK}<answer>kite</answer>\n", "<answer>kite</answer>", "code", ["outer white space"], 1.0, 2.0),
        (f"{THINK}<code>```python\n1```</code>", "<code>x</code>", "code", ["code that nobody ran"], 1.9, None),
        (f"{THINK}<problem> {{'rotation90'}} </problem>", ROTATED, "code", [], 1.5, 1.5),
        (f"{THINK}<problem> {{'rotation180'}} </problem>", ROTATED, "code", ["either rotation"], 1.0, 1.5),
        (f"{THINK}<search>kite</search>", "<answer>7</answer>", "search", ["form of another step", "tags"], 1.0, 0.0),
        (f"{THINK}<answer>7</answer>", "<answer>7</answer>", "search", [], 2.0, 2.0),
    ],
)
def test_visual_arft_by_hand(said, gold, task, why, released, repaired):
    assert arft_departs(said, gold, task) == why
    assert arft_pays(said, gold, task, "release") == pytest.approx(released)
    found = arft_pays(said, gold, task, "repaired")
    assert found == (None if repaired is None else pytest.approx(repaired))


def ends(answer, *before):
    return json.dumps({"thought": "so", "actions": [*before, {"name": "Terminate", "arguments": {"ans": answer}}]})


POINT = {"name": "Point", "arguments": {"param": "kite"}}


@pytest.mark.parametrize(
    ("turn", "gold", "why", "released", "repaired"),
    [
        (ends("red"), "red", [], 1.0, 1.0),
        (ends("red"), "<answer> red </answer>", [], 1.0, 1.0),
        (ends("blue"), "red", [], 0.0, 0.0),
        (ends("RED "), "red", ["case and white space"], 0.0, 1.0),
        (ends("red", POINT), "red", ["the first action is no Terminate"], 0.0, 1.0),
        ('{"thought": "red"}', "red", ["no plain object with an answer"], 0.0, 0.0),
    ],
)
def test_openthinkimg_by_hand(turn, gold, why, released, repaired):
    assert open_departs([turn], gold) == why
    assert (open_pays([turn], gold, "release"), open_pays([turn], gold, "repaired")) == (released, repaired)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vrag", ["policy's words alone", "page once", "blank answer", "unjudged"]),
        (
            "visual_arft",
            ["without an error", "repeated words", "needs the tags", "white space", "two rotations", "form"],
        ),
        ("openthinkimg", ["Terminate", "math-verify", "case", "first action"]),
        ("vista", ["numbers as numbers", "last answer block", "no tool", "None"]),
    ],
)
def test_the_registry_says_where_they_differ(name, words):
    assert [word for word in words if word not in REWARDS[name].differs] == []
