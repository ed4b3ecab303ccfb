"""Visual-ARFT's step rewards: by hand, over thoughts, with a real (tiny, random) sentence model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rewards_helpers import image_segment, text, trajectory_of

from record.trajectory import Author
from rewards.contract import RewardError
from rewards.detectors.weights import WeightsError
from rewards.functions.sentences import SentenceEncoder
from rewards.published.visual_arft import accuracy, f1_release, kind_of, score_release, visual_arft, well_formed
from runtime.errors import UserError

IMAGE = np.zeros((4, 4, 3), np.uint8)
CODE = "<code>\n```python\nimg = cv2.rotate(img, 1)\n```\n</code>"


@pytest.mark.parametrize(
    ("said", "gold", "ours", "release"),
    [
        ("the red kite", "red kite", 1, 1),
        ("red red", "red", 2 / 3, 2 / 3),  # precision 1/2, recall 1
        # equal texts: the release counts "red" once on top and twice below, (2/3, 2/3)
        ("red, red and blue", "red, red and blue", 1, 3 / 4),
        ("blue", "red", 0, 0),
        ("", "red", 0, 0),
    ],
)
def test_f1(said, gold, ours, release):
    assert accuracy(f"<answer>{said}</answer>", f"<answer>{gold}</answer>", "code") == pytest.approx(ours)
    assert f1_release(said, gold) == pytest.approx(release)


@pytest.mark.parametrize(
    ("said", "gold", "ours", "release"),
    [
        ("{'dark'}", "{'dark'}", 1, 1),
        ("{'dark', 'noise'}", "{'noise', 'dark'}", 1, 1),
        ("{'rotation90'}", "{'rotation90', 'dark'}", 0.5, 0.5),
        ("{'dark'}", "{'rotation90', 'dark'}", 0, 0),
        ("{'rotation180'}", "{'rotation90', 'rotation180'}", 0.5, 0),  # of two rotations the release takes one
        ("{'dark', 'noise'}", "{'dark'}", 0, 0),
        ("{}", "{'dark'}", 0, 0),
        ("{'dark', 'dark'}", "{'dark'}", 1, 0),
        ('{"dark"}', "{'dark'}", 1, 0),
    ],
)
def test_faults(said, gold, ours, release):
    text, wanted = f"<think>x</think><problem> {said} </problem>", f"<problem> {gold} </problem>"
    assert accuracy(text, wanted, "code") == ours
    assert score_release(text, wanted, "code")["accuracy"] == release


@pytest.mark.parametrize(
    ("text", "ran", "ours", "release"),
    [
        (f"<think>x</think>{CODE}", True, 0.9, 0.9),
        (f"<think>x</think>{CODE}", False, 0, 0.9),
        (f"<think>x</think>{CODE}", None, None, 0.9),  # nobody ran it: not judged
        ("", True, 0, 0.9),
        ("<think>nothing to do</think>", True, 0, 0.9),  # 0.9 for saying nothing
        (f"{CODE}<answer>red</answer>", True, 0, 0),
    ],
)
def test_code_is_paid_when_it_ran(text, ran, ours, release):
    assert accuracy(text, CODE, "code", ran) == ours
    assert score_release(text, CODE, "code")["accuracy"] == release


@pytest.mark.parametrize(("cosine", "paid"), [(0.5, 0.5), (0.4999, 0), (0.93, 0.93), (-1, 0)])
def test_searches_are_paid_from_one_half_on(cosine, paid):
    said, gold = "<think>x</think><search>red kite</search>", "<search>a red kite</search>"
    assert accuracy(said, gold, "search", similarity=lambda *_: cosine) == paid
    assert score_release(said, gold, "search", lambda *_: cosine)["total"] == 1 + paid


def test_without_tags_the_whole_completion_is_compared_by_the_release():
    gold, musing = "<answer>red kite</answer>", "<think>perhaps a red kite</think>"
    assert score_release(musing, gold, "code")["accuracy"] == 0.4  # of thinkperhaps, red, kitethink one is shared
    assert accuracy(musing, gold, "code") == 0


@pytest.mark.parametrize(
    ("text", "kind", "formed"),
    [
        ("<think>a</think>\n<answer>b</answer>", "answer", True),
        ("<answer>b</answer>", "answer", False),
        ("<think>a</think><answer>b</answer> done", "answer", False),
        (f"<think>a</think>{CODE}", "code", True),
        ("<think>a</think><code>x = 1</code>", "code", False),
        ("<think>a</think><problem>{'dark'}</problem>", "problem", True),
        ("<think>a</think><problem>{}</problem>", "problem", False),
        ("<think>a</think><think>b</think><answer>c</answer>", "answer", False),
    ],
)
def test_form(text, kind, formed):
    assert well_formed(text, kind, "code") is formed
    assert score_release(text, f"<{kind}>", "code")["format"] == formed


def test_the_search_script_does_not_ask_for_the_references_kind():
    other = "<think>a</think><search>b</search>"
    assert score_release(other, "<answer>b</answer>", "search", lambda *_: 1)["total"] == 1
    assert kind_of("<search>b</search>", "code") is None


# ---- over thoughts --------------------------------------------------------------------------------------------------


def coded(gold, *observed):
    return trajectory_of(
        {"ground_truth": gold},
        text("code", f"<think>turn it</think>{CODE}"),
        *observed,
        text("answer", "<think>now</think><answer>red kite</answer>"),
    )


def test_over_thoughts():
    came = image_segment("observation", IMAGE, Author.ENVIRONMENT)
    failed = text("observation", "Execution error: no module cv3", Author.ENVIRONMENT)
    rows = [
        coded(CODE, came),
        coded(CODE, failed),
        coded("<answer>kite</answer>", came),
        trajectory_of({}, text("answer", "x")),
        trajectory_of({"ground_truth": CODE}, text("code", f"<think>x</think>{CODE}")),
    ]
    assert visual_arft(rows) == [pytest.approx(1.9), 1.0, pytest.approx(1 + 2 / 3), None, None]
    assert visual_arft(rows, variant="release") == [pytest.approx(1.9)] * 2 + [
        pytest.approx(1 + 2 / 3),
        None,
        pytest.approx(1.9),
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The released layout, with a tiny random model."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("sentences")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "kite", "blue", "drum", "the"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    return str(folder)


def test_a_sentence_is_the_mean_of_its_tokens_without_padding(model):
    import torch

    encoder = SentenceEncoder(model)
    assert encoder.max_length == 12
    alone = encoder.embed(["red kite"])[0]
    assert np.linalg.norm(alone) == pytest.approx(1)
    # beside a longer sentence it is padded: the naive mean over all positions would move it
    assert np.allclose(encoder.embed(["red kite", "the blue drum the blue drum the red"])[0], alone, atol=1e-5)
    tokens = encoder.tokenizer(["red kite"], return_tensors="pt")
    with torch.no_grad():
        mean = encoder.model(**tokens).last_hidden_state[0].mean(0)
    assert np.allclose(alone, torch.nn.functional.normalize(mean, dim=-1).numpy(), atol=1e-5)
    assert encoder.similarities([("red kite", "red kite"), ("red kite", "blue drum")])[0] == pytest.approx(1, abs=1e-5)
    assert encoder.embed([]).shape == (0, 16) and encoder.similarities([]) == []
    assert len(encoder.embed(["red kite " * 50])) == 1  # cut at the limit, not refused


def test_searches_over_thoughts(model):
    rows = [
        trajectory_of({"ground_truth": "<search>red kite</search>"}, text("search", f"<think>x</think>{said}"))
        for said in ("<search>red kite</search>", "<search></search>", "<answer>red kite</answer>")
    ]
    assert visual_arft(rows, task="search", encoder=model) == [pytest.approx(2, abs=1e-4), 1, 0]
    asked = rows[0].record["ground_truth"]
    assert score_release("<think>x</think><search>red kite</search>", asked, "search", lambda *_: 0.7)["total"] == 1.7


def test_bad_input_is_named(tmp_path):
    row = trajectory_of({"ground_truth": "<search>red kite</search>"}, text("search", "<search>kite</search>"))
    with pytest.raises(WeightsError, match="visual_arft.encoder: no folder"):
        visual_arft([row], task="search", encoder=str(tmp_path / "none"))
    with pytest.raises(RewardError, match="none of the tags answer, code, problem"):
        visual_arft([row], task="code")
    with pytest.raises(UserError, match="no task 'both'"):
        visual_arft([], task="both")
    with pytest.raises(UserError, match="least 2"):
        visual_arft([], least=2)
    with pytest.raises(RewardError, match="give the option encoder"):
        accuracy("<search>a</search>", "<search>a</search>", "search")
