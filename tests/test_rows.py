"""Which causal rows score a trajectory: worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from policy.scoring.rows import context_ids, rows_of
from record.trajectory import Author, Context, Modality, Piece, RecordError, Segment, Trajectory, full_history


def trajectory(*lengths: int) -> Trajectory:
    """Segments of given lengths; segment s holds ids 10 s, 10 s + 1, ..., in its full history."""
    segments = [
        Segment("text", Author.POLICY, Modality.TEXT, True, np.arange(10 * s, 10 * s + n, dtype=np.int32))
        for s, n in enumerate(lengths)
    ]
    made = Trajectory("", {}, "strokes", segments, group=3, member=1)
    for index, segment in enumerate(segments):
        segment.contexts = (full_history(made, index),)
    return made


def test_plain_trajectory_is_one_row():
    (row,) = rows_of(trajectory(2, 3, 1), 5, [(1, "full"), (2, "full")])
    assert row.ids_T.tolist() == [0, 1, 10, 11, 12, 20]
    assert row.position_T.tolist() == [0, 1, 2, 3, 4, 5]
    assert row.offsets == {1: 2, 2: 5} and row.trajectory == 5


def test_segments_between_that_nobody_scores_are_context():
    (row,) = rows_of(trajectory(2, 3, 1, 2), 0, [(1, "full"), (3, "full")])
    assert row.ids_T.tolist() == [0, 1, 10, 11, 12, 20, 30, 31]
    assert row.offsets == {1: 2, 3: 6}


def test_window_begins_a_row_and_keeps_its_positions():
    made = trajectory(2, 3, 2, 2)
    # Segments 2 and 3 see the prompt and the last two ids of segment 1; 3 sees 2 as well.
    window = (Piece(0, "ids", 0), Piece(1, "ids", 3, (1, 3)))
    made.segments[2].contexts = (Context("full", window, 5),)
    made.segments[3].contexts = (Context("full", (*window, Piece(2, "ids", 5)), 7),)
    first, second = rows_of(made, 0, [(1, "full"), (2, "full"), (3, "full")])
    assert first.ids_T.tolist() == [0, 1, 10, 11, 12] and first.offsets == {1: 2}
    assert second.ids_T.tolist() == [0, 1, 11, 12, 20, 21, 30, 31] and second.offsets == {2: 4, 3: 6}
    assert second.position_T.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]


def test_markov_planner_gets_a_row_a_segment():
    made = trajectory(2, 2, 2, 2)
    for index in (1, 2, 3):
        made.segments[index].contexts = (Context("full", (Piece(index - 1, "ids", 0),), 2),)
    rows = rows_of(made, 0, [(index, "full") for index in (1, 2, 3)])
    # The row [0, 1] is what segment 2 sees of segment 1 only at other positions, so nothing is shared.
    assert [row.ids_T.tolist() for row in rows] == [[0, 1, 10, 11], [10, 11, 20, 21], [20, 21, 30, 31]]


def test_the_same_ids_at_other_positions_are_another_row():
    made = trajectory(2, 2, 2)
    made.segments[2].contexts = (Context("full", (Piece(0, "ids", 0), Piece(1, "ids", 7)), 9),)
    assert len(rows_of(made, 0, [(1, "full"), (2, "full")])) == 2


def test_branches_have_rows_of_their_own():
    made = trajectory(2, 3, 3)
    for index in (1, 2):
        made.segments[index].contexts += (Context("unconditional", (), 0),)
    rows = rows_of(made, 0, [(1, "full"), (1, "unconditional"), (2, "full"), (2, "unconditional")])
    assert [(row.branch, row.ids_T.tolist()) for row in rows] == [
        ("full", [0, 1, 10, 11, 12, 20, 21, 22]),
        ("unconditional", [10, 11, 12]),
        ("unconditional", [20, 21, 22]),
    ]


def test_context_ids():
    made = trajectory(2, 4)
    ids, positions = context_ids(made, Context("full", (Piece(0, "ids", 0), Piece(1, "ids", 8, (2, 4))), 10))
    assert ids.tolist() == [0, 1, 12, 13] and positions.tolist() == [0, 1, 8, 9]
    ids, positions = context_ids(made, Context("unconditional", (), 0))
    assert len(ids) == len(positions) == 0


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece(1, "vit", 0), "segment 1 was seen as 'vit'"),
        (Piece(4, "ids", 0), "names segment 4 of 2"),
        (Piece(1, "ids", 0, (2, 9)), "keeps ids 2 to 9 of segment 1, which has 3"),
    ],
)
def test_wrong_pieces_are_named(piece, message):
    with pytest.raises(RecordError, match=f"trajectory 3-1: .*{message}"):
        context_ids(trajectory(2, 3), Context("full", (piece,), 0))


def test_missing_context_is_named():
    made = trajectory(2, 3)
    made.segments[1].contexts = ()
    with pytest.raises(
        RecordError,
        match=r"segment 1 \('text'\) has no recorded context for the branch 'full'; "
        "it has: none",
    ):
        rows_of(made, 0, [(1, "full")])
