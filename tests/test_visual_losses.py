"""Losses that hold visual codes to their codebook: by hand, and against the released code's numbers.

The records lie in UNDERDRAWING_FIXTURES (default ../shared/fixtures), evals/losses; those with a known bug of the
release are run like the others.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from policy.scoring.visual_losses import (
    TokenDiscrepancy,
    VisualReconstruction,
    distance_table,
    expected_distances,
    own_codes,
    predicted_codes,
    reconstruction,
    token_discrepancy,
)
from runtime.errors import UserError

ROOT = Path(__file__).parent.parent
FOLDER = (ROOT / os.environ.get("UNDERDRAWING_FIXTURES", "../shared/fixtures")).resolve() / "evals" / "losses"
IGNORE = -100
BFLOAT16 = 2e-3  # relative, as the records' page says; ours on the CPU are the release's to the bit


# ---- positions, by hand ----

# ids 10..13 are codes 2, 0, 3, 1; 5 begins an image, 6 ends it
CODE_OF_V = torch.full((20,), -1, dtype=torch.int64)
CODE_OF_V[10:14] = torch.tensor([2, 0, 3, 1])


def test_a_code_is_held_to_the_position_before_it_where_it_is_learned():
    labels = torch.tensor([[IGNORE, 7, 5, 10, 13, IGNORE, IGNORE], [12, 5, 11, IGNORE, 11, 9, IGNORE]])
    found = predicted_codes(labels, CODE_OF_V)
    # row 0: codes at 3 and 4; row 1 (from 7): codes at 2 and 4, and the one at 0 has nothing before it
    assert found.at_M.tolist() == [2, 3, 7 + 1, 7 + 3]
    assert found.code_M.tolist() == [2, 1, 0, 0]


def test_a_row_that_begins_with_a_code_stops_the_release():
    labels = torch.tensor([[IGNORE, 10], [13, 10]])
    assert predicted_codes(labels, CODE_OF_V).at_M.tolist() == [0, 2]
    with pytest.raises(UserError, match="row 1 begins with the visual code of id 13.*put a prompt before"):
        predicted_codes(labels, CODE_OF_V, release=True)


def test_the_release_holds_a_code_to_its_own_position_and_sees_begin_markers_alone():
    ids = torch.tensor([[5, 10, 11, 6, 9, 5, 12, 13, 6], [9, 5, 10, 10, 9, 9, 1, 1, 1]])
    labels = ids.clone()
    labels[0, :5] = IGNORE  # the prompt's image: its begin marker is masked
    labels[1, 2:4] = IGNORE  # codes that are not learned count all the same, and no end marker is asked for
    found = own_codes(ids, labels, CODE_OF_V, begin=5, codes_per_image=2)
    assert found.at_M.tolist() == [6, 7, 9 + 2, 9 + 3]
    assert found.code_M.tolist() == [3, 1, 2, 2]
    none = own_codes(ids, torch.full_like(ids, IGNORE), CODE_OF_V, 5, 2)
    assert len(none.at_M) == len(none.code_M) == 0


@pytest.mark.parametrize(
    "ids, sentence",
    [
        ([9, 5, 10], "begins at position 1 of row 0 is cut off after 1 of 2 codes"),
        ([9, 9, 5], "begins at position 2 of row 0 is cut off after 0 of 2 codes"),
        ([5, 10, 9, 6], "id 9 at position 2 of row 0 stands in an image and is no visual code"),
    ],
)
def test_what_stops_the_release_is_a_sentence(ids, sentence):
    ids = torch.tensor([ids])
    with pytest.raises(UserError, match=sentence) as error:
        own_codes(ids, ids, CODE_OF_V, 5, 2)
    assert error.value.exit_code == 2


# ---- visual reconstruction, by hand ----


def test_reconstruction_by_hand():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 1.0])
    hidden = torch.tensor([[1.0, 1.0, 9.0], [2.0, 0.0, 9.0]], requires_grad=True)
    # projected (1, 2) and (2, 1); codes 0 and 1: differences (0, 2) and (2, -1)
    loss = reconstruction(hidden, torch.tensor([0, 1]), weight, bias, codebook)
    assert float(loss.detach()) == (0 + 4 + 4 + 1) / 4
    loss.backward()
    # 2/4 of the differences: (0, 1) and (1, -0.5)
    assert hidden.grad.tolist() == [[0, 1, 0], [1, -0.5, 0]]
    assert weight.grad.tolist() == [[2, 0, 9], [1 - 1, 1, 9 - 4.5]]


def test_without_codes_the_losses_are_zero_with_a_gradient():
    hidden = torch.ones(0, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    module = VisualReconstruction(8, torch.randn(5, 3))
    loss = module(hidden, none)
    loss.backward()
    assert float(loss.detach()) == 0.0 and float(module.projection.weight.grad.abs().sum()) == 0.0
    hidden = torch.ones(2, 8, requires_grad=True)
    losses = [
        TokenDiscrepancy(torch.randn(5, 3), torch.arange(5))(hidden[:0], none, torch.randn(9, 8)),
        token_discrepancy(hidden[:0], none, torch.zeros(8, 8)),
    ]
    for loss in losses:
        assert float(loss.detach()) == 0.0
    sum(losses).backward()
    assert float(hidden.grad.abs().sum()) == 0.0


def test_the_projection_is_trained_unless_it_is_the_releases():
    codebook = torch.tensor([[1.0 + 2**-9], [3.0]])
    ours, releases = VisualReconstruction(2, codebook), VisualReconstruction(2, codebook, release=True)
    assert all(p.requires_grad for p in ours.parameters())
    assert not any(p.requires_grad for p in releases.parameters())
    for module in (ours, releases):
        module.projection.weight.data = torch.tensor([[1.0, 0.0]])
        module.projection.bias.data.zero_()
    hidden = torch.tensor([[2.0, 0.0]], requires_grad=True)
    code = torch.tensor([0])
    # (2 - 1.001953125)^2 in float32; bfloat16 has 1 for the code
    assert float(ours(hidden, code).detach()) == (1 - 2**-9) ** 2
    loss = releases(hidden, code)
    assert float(loss.detach()) == 1.0 and loss.dtype == torch.bfloat16
    loss.backward()
    assert hidden.grad.tolist() == [[2.0, 0.0]]


# ---- token discrepancy, by hand ----

# codes on a line at 0, 3 and 7
LINE = torch.tensor([[0.0], [3.0], [7.0]])


def test_distances_have_a_row_for_each_code_and_a_column_for_each_id_of_the_list():
    assert distance_table(LINE).tolist() == [[0, 3, 7], [3, 0, 4], [7, 4, 0]]
    # the list of ids begins with code 2's
    assert distance_table(LINE, torch.tensor([2, 0, 1])).tolist() == [[7, 0, 3], [4, 3, 0], [0, 7, 4]]
    # the plain distance, not its square: the length of (3, 4) is 5
    assert distance_table(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0, 5], [5, 0]]


def test_equal_vectors_are_exactly_no_distance_apart():
    codebook = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).repeat(20, 1) + 100
    table = distance_table(codebook)
    assert float(table[0, 3]) == 0.0 and float(table.diagonal().abs().max()) == 0.0


def test_token_discrepancy_by_hand():
    # probabilities 1/2, 1/4, 1/4 and 1/4, 1/4, 1/2
    logits = torch.log(torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])).requires_grad_()
    code = torch.tensor([1, 0])
    table = distance_table(LINE)
    # code 1: 3/2 + 0 + 4/4 = 2.5; code 0: 0 + 3/4 + 7/2 = 4.25
    torch.testing.assert_close(expected_distances(logits, code, table), torch.tensor([2.5, 4.25]))
    loss = token_discrepancy(logits, code, table)
    assert float(loss.detach()) == pytest.approx(3.375)
    loss.backward()
    # p (distance - its mean) / 2
    expected = torch.tensor([[0.5 * 0.5, 0.25 * -2.5, 0.25 * 1.5], [0.25 * -4.25, 0.25 * -1.25, 0.5 * 2.75]]) / 2
    torch.testing.assert_close(logits.grad, expected)


def test_the_default_lays_distances_out_as_the_ids_stand_and_the_release_does_not():
    # code 0 has id 7, code 1 id 4, code 2 id 5: by id the codes are 1, 2, 0
    id_of_code = torch.tensor([7, 4, 5])
    head = torch.zeros(9, 2)
    head[4, 0] = head[5, 1] = 1.0
    hidden = torch.tensor([[50.0, 0.0], [0.0, 50.0]])  # sure of id 4, which is code 1, then of id 5, which is code 2
    right = torch.tensor([1, 2])
    assert float(TokenDiscrepancy(LINE, id_of_code)(hidden, right, head)) == pytest.approx(0.0, abs=1e-6)
    # the release takes the first column, of id 4, for code 0, and the second, of id 5, for code 1
    assert float(TokenDiscrepancy(LINE, id_of_code, release=True)(hidden, right, head)) == (3 + 4) / 2
    in_order = torch.tensor([4, 5, 7])
    assert float(TokenDiscrepancy(LINE, in_order, release=True)(hidden, right - 1, head)) == pytest.approx(
        0.0, abs=1e-6
    )


def test_probabilities_are_over_visual_codes_alone():
    head = torch.zeros(9, 1)
    module = TokenDiscrepancy(LINE, torch.tensor([4, 5, 7]))
    uniform = float(module(torch.ones(1, 1), torch.tensor([0]), head))
    assert uniform == pytest.approx(10 / 3)
    head[2] = 100.0  # a word that is all but certain
    assert float(module(torch.ones(1, 1), torch.tensor([0]), head)) == pytest.approx(uniform)


@pytest.mark.parametrize("release", [False, True])
def test_a_chunk_at_a_time_is_the_whole_at_once(release):
    generator = torch.Generator().manual_seed(1)
    codebook = torch.randn(7, 3, generator=generator)
    ids = torch.randperm(20, generator=generator)[:7]
    code = torch.randint(7, (11,), generator=generator)
    hidden = torch.randn(11, 4, generator=generator)
    weight = torch.randn(20, 4, generator=generator)
    results = []
    for chunk in (1, 4, 11, 100):
        state, head = hidden.clone().requires_grad_(), nn.Parameter(weight.clone())
        loss = TokenDiscrepancy(codebook, ids, release, chunk)(state, code, head)
        loss.backward()
        results.append((loss.detach(), state.grad, head.grad))
    state, head = hidden.clone().requires_grad_(), nn.Parameter(weight.clone())
    order = ids.argsort()
    table = distance_table(codebook, None, torch.bfloat16) if release else distance_table(codebook, order)
    loss = token_discrepancy(state @ head[ids[order]].T, code, table)
    loss.backward()
    for result in results:
        for got, want in zip(result, (loss.detach(), state.grad, head.grad), strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


# ---- the release's numbers ----


@cache
def records(name: str) -> dict:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"no records of the released losses at {path}; set UNDERDRAWING_FIXTURES")
    cases = torch.load(path, weights_only=True, map_location="cpu")
    return {
        name: {key: value.detach() if torch.is_tensor(value) else value for key, value in record.items()}
        for name, record in cases.items()
    }


BEGIN, FIRST_CODE, CODES_PER_IMAGE = 8197, 4, 1024  # Anole's


def anoles_codes(count: int) -> torch.Tensor:
    code_of_V = torch.full((65536,), -1, dtype=torch.int64)
    code_of_V[FIRST_CODE : FIRST_CODE + count] = torch.arange(count)
    return code_of_V


@pytest.mark.parity
def test_reconstruction_is_the_releases():
    for name, record in records("twgi_reconstruction.pt").items():
        ids, labels = record["input_ids"].long(), record["labels"].long()
        code_of_V = anoles_codes(len(record["codes"]))
        if "raises" in record:
            why = "no visual code" if record["raises"] == "IndexError" else "cut off"
            with pytest.raises(UserError, match=why):
                own_codes(ids, labels, code_of_V, BEGIN, CODES_PER_IMAGE)
            continue
        found = own_codes(ids, labels, code_of_V, BEGIN, CODES_PER_IMAGE)
        assert len(found.at_M) == record["images"] * CODES_PER_IMAGE, name
        weight = record["weight"].clone().requires_grad_()
        hidden = record["hidden"].clone().requires_grad_()
        hidden_MD = hidden.flatten(0, 1)[found.at_M]
        loss = reconstruction(hidden_MD, found.code_M, weight, record["bias"], record["codes"])
        loss.backward()
        total = record["text_loss"] + float(loss.detach())
        assert total == pytest.approx(record["total"], rel=BFLOAT16), name
        torch.testing.assert_close(weight.grad, record["weight_grad"], atol=1e-6, rtol=BFLOAT16)
        norms = hidden.grad.float().norm(dim=-1)
        torch.testing.assert_close(norms, record["hidden_grad_norm_per_position"], atol=1e-9, rtol=BFLOAT16)


@pytest.mark.parity
def test_reconstruction_by_default_moves_the_states_that_predict_and_no_padding():
    for name, record in records("twgi_reconstruction.pt").items():
        ids, labels = record["input_ids"].long(), record["labels"].long()
        code_of_V = anoles_codes(len(record["codes"]))
        ours = predicted_codes(labels, code_of_V)
        # by the record's labels alone: each learned code, and the position before it
        places = [
            (b, t)
            for b in range(len(ids))
            for t in range(1, ids.shape[1])
            if labels[b, t] >= 0 and code_of_V[labels[b, t]] >= 0
        ]
        assert ours.at_M.tolist() == [b * ids.shape[1] + t - 1 for b, t in places], name
        assert ours.code_M.tolist() == [int(labels[b, t]) - FIRST_CODE for b, t in places], name
        weight = record["weight"].float().clone().requires_grad_()
        hidden = record["hidden"].float().clone().requires_grad_()
        loss = reconstruction(
            hidden.flatten(0, 1)[ours.at_M], ours.code_M, weight, record["bias"].float(), record["codes"]
        )
        loss.backward()
        moved = hidden.grad.norm(dim=-1) > 0
        assert moved.flatten().nonzero()[:, 0].tolist() == ours.at_M.tolist(), name
        if "raises" in record or not record["images"]:
            continue
        # The release holds a code to the position after the one that predicts it.
        releases = own_codes(ids, labels, code_of_V, BEGIN, CODES_PER_IMAGE)
        assert bool(torch.isin(releases.at_M, ours.at_M + 1).all()), name
        # On the release's positions the loss in float32 is the release's to its rounding.
        exact = reconstruction(
            record["hidden"].float().flatten(0, 1)[releases.at_M],
            releases.code_M,
            record["weight"].float(),
            record["bias"].float(),
            record["codes"],
        )
        assert float(exact) + record["text_loss"] == pytest.approx(record["total"], rel=1e-2), name


def discrepancy_case(record):
    """labels [B, T], code_of_V, ids and codes of the list."""
    logits = record["logits"]
    ids, codes = record["image_token_ids"], record["code_of_image_token"]
    code_of_V = torch.full((logits.shape[-1],), -1, dtype=torch.int64)
    code_of_V[ids] = codes
    return record["labels"].reshape(logits.shape[:2]), code_of_V, ids, codes


@pytest.mark.parity
def test_token_discrepancy_is_the_releases():
    for name, record in records("mvot_token_discrepancy.pt").items():
        labels, code_of_V, ids, codes = discrepancy_case(record)
        table = distance_table(record["codebook"], None, torch.bfloat16)
        torch.testing.assert_close(table, record["distances"], atol=1e-7, rtol=BFLOAT16)
        if "raises" in record:
            with pytest.raises(UserError, match="begins with the visual code"):
                predicted_codes(labels, code_of_V, release=True)
            continue
        found = predicted_codes(labels, code_of_V, release=True)
        logits = record["logits"].clone().requires_grad_()
        logits_MK = logits.flatten(0, 1)[found.at_M][:, ids]
        loss = token_discrepancy(logits_MK, found.code_M, table)
        loss.backward()
        total = record["other_loss"] + float(loss.detach())
        assert total == pytest.approx(record["total"], rel=BFLOAT16), name
        scale = float(record["logits_grad"].abs().max())
        torch.testing.assert_close(logits.grad.float(), record["logits_grad"], atol=BFLOAT16 * scale, rtol=BFLOAT16)
        if "total_repaired" in record:
            right = distance_table(record["codebook"], codes, torch.bfloat16)
            total = record["other_loss"] + float(token_discrepancy(logits_MK.detach(), found.code_M, right))
            assert total == pytest.approx(record["total_repaired"], rel=BFLOAT16), name


@pytest.mark.parity
def test_token_discrepancy_by_default_is_the_repaired_release_without_its_rounding():
    for name, record in records("mvot_token_discrepancy.pt").items():
        labels, code_of_V, ids, codes = discrepancy_case(record)
        found = predicted_codes(labels, code_of_V)
        inside = labels[:, 1:] >= 0
        assert len(found.at_M) == int((torch.isin(labels[:, 1:], ids) & inside).sum()), name
        logits = record["logits"].float().clone().requires_grad_()
        table = distance_table(record["codebook"], codes)
        loss = token_discrepancy(logits.flatten(0, 1)[found.at_M][:, ids], found.code_M, table)
        loss.backward()
        # in plain numpy and double precision, position by position
        book, given = record["codebook"].double().numpy(), record["logits"].double().numpy()
        values, grad = [], np.zeros_like(given)
        for b, t in (torch.isin(labels, ids)).nonzero().tolist():
            if t == 0:
                continue
            scores = given[b, t - 1][ids.numpy()]
            p = np.exp(scores - scores.max())
            p /= p.sum()
            d = np.linalg.norm(book[int(code_of_V[labels[b, t]])] - book[codes.numpy()], axis=1)
            values.append(float(p @ d))
            grad[b, t - 1][ids.numpy()] = p * (d - p @ d)
        if not values:
            assert float(loss.detach()) == 0.0 and float(logits.grad.abs().sum()) == 0.0
            continue
        assert float(loss.detach()) == pytest.approx(np.mean(values), rel=1e-5, abs=1e-7), name
        torch.testing.assert_close(
            logits.grad, torch.from_numpy(grad / len(values)).float(), atol=1e-6, rtol=1e-4, msg=name
        )
        if "raises" not in record:
            total = record["other_loss"] + float(loss.detach())
            assert total == pytest.approx(record.get("total_repaired", record["total"]), rel=1e-2), name
