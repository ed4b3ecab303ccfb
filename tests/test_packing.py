"""What a forward holds and who makes it (rl/packing.py); rows end to end score as padded ones do
(policy/scoring/row_attention.py)."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from policy.base import Pass, forwarded, score_trajectories
from policy.chameleon.family import load
from policy.scoring.row_attention import ROWS
from record.trajectory import Author, Context, Guidance, Modality, Piece, Segment, Trajectory, full_history
from rl.batches import plan
from rl.config import GrpoConfig
from rl.packing import deal, pack
from rl.trainer import Trainer
from tests.bigram import BigramPolicy, sampled_groups
from tests.chameleon_helpers import WORDS, prompt_segment, sample, sampled, small_config, small_policy, windowed

# ---- what a forward holds --------------------------------------------------------------------------------------------


def one(cost: int = 0, rows: tuple[int, ...] = (), modules: str = "decoder", owner: Trajectory | None = None) -> Pass:
    trajectory = owner or Trajectory("", {}, "f", [])
    return Pass(trajectory, (), cost or sum(rows), frozenset(modules.split()), 1, rows=rows)


def test_a_forward_pads_by_its_rows_and_not_by_its_trajectories():
    assert forwarded([one(7), one(5)]) == 12
    assert forwarded([one(rows=(7, 2)), one(rows=(5,))]) == 3 * 7
    assert forwarded([one(7), one(rows=(5, 1))]) == 7 + 2 * 5  # a pass that is padded beside one that is not
    assert forwarded([]) == 0


def test_packs_by_hand():
    # packed: 6 + 4 and 5 + 3 + 2 fill ten each; padded, 6 x 1 has no second row of 6 that would fit
    assert pack([[one(cost)] for cost in (3, 6, 2, 5, 4)], 10) == [[1, 4], [3, 0, 2]]
    assert pack([[one(rows=(row,))] for row in (3, 6, 2, 5, 4)], 10) == [[3, 4], [1], [0, 2]]
    # two processes: no more than half of the twelve each, though all of it would fit into one
    assert pack([[one(cost)] for cost in (3, 3, 3, 3)], 100, 2) == [[0, 1], [2, 3]]
    # an unequal batch: the long one by itself
    assert pack([[one(cost)] for cost in (1, 10, 1, 1)], 100, 2) == [[1], [0, 2, 3]]
    assert pack([], 10, 2) == []


costs = st.lists(st.integers(1, 60), min_size=1, max_size=30)
row_lists = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5).map(tuple), min_size=1, max_size=20)


@given(st.one_of(costs, row_lists), st.integers(1, 200), st.integers(1, 4))
def test_packs_hold_every_pass_once_and_keep_the_budget_as_forwarded(sizes, budget, processes):
    units = [[one(size)] if isinstance(size, int) else [one(rows=size)] for size in sizes]
    packs = pack(units, budget, processes)
    assert sorted(row for rows in packs for row in rows) == list(range(len(sizes)))
    assert len(packs) >= min(processes, len(sizes))
    for rows in packs:
        assert len(rows) == 1 or forwarded([p for row in rows for p in units[row]]) <= budget


towers = st.sampled_from(["decoder", "decoder vit", "decoder vae", "decoder vit vae"])


@given(st.lists(st.tuples(st.integers(1, 60), towers), min_size=1, max_size=30), st.integers(1, 150), st.integers(1, 5))
def test_every_rank_makes_equally_many_forwards_over_the_same_modules(sizes, budget, processes):
    passes = [one(cost, modules=modules) for cost, modules in sizes]
    dealt = deal(passes, budget, processes)
    assert len({len(mine) for mine in dealt}) == 1
    for together in zip(*dealt, strict=True):  # the n-th forward of each
        assert len({forward.modules for forward in together}) == 1
        for forward in together:
            assert {passes[number].modules for number in forward.passes} == {forward.modules}
    real = [number for mine in dealt for forward in mine if not forward.padding for number in forward.passes]
    assert sorted(real) == list(range(len(passes)))


def test_a_trajectory_that_is_not_parted_counts_all_the_modules_of_its_passes():
    first, second = (Trajectory("", {}, "f", []) for _ in range(2))
    passes = [one(5, modules="decoder", owner=first), one(4, modules="decoder vit", owner=first), one(3, owner=second)]
    dealt = deal(passes, 100, 2, together=True)
    assert [[(f.passes, sorted(f.modules), f.padding) for f in mine] for mine in dealt] == [
        [((2,), ["decoder"], False), ((0, 1), ["decoder", "vit"], False)],
        [((2,), ["decoder"], True), ((0, 1), ["decoder", "vit"], True)],
    ]


class Towers(BigramPolicy):
    """Every third trajectory shows something to a vision tower."""

    def passes(self, trajectories, budget=None):
        return [
            Pass(
                p.trajectory, p.segments, p.cost, frozenset({"model", "vit"} if i % 3 == 0 else {"model"}), p.decisions
            )
            for i, p in enumerate(super().passes(trajectories, budget))
        ]


@pytest.mark.parametrize("processes", [2, 3])
def test_micro_batches_of_all_ranks_touch_the_same_towers_in_turn(processes):
    policy = Towers()
    trajectories = [t for group in sampled_groups(policy, groups=3, members=3) for t in group]
    for trajectory in trajectories:
        trajectory.advantage_S = np.ones(len(trajectory.segments), np.float32)
    config = GrpoConfig(tokens_per_micro_batch=30)
    plans = [plan(policy, trajectories, config, processes, rank) for rank in range(processes)]
    turns = [[sorted({m for p in batch.passes for m in p.modules}) for batch in batches] for batches in plans]
    assert turns[0].count(["model", "vit"]) >= 1 and turns[0].count(["model"]) >= 1
    assert all(turn == turns[0] for turn in turns)
    weighed = [p.trajectory.key for batches in plans for b in batches if b.weight_PS.any() for p in b.passes]
    assert sorted(weighed) == sorted(t.key for t in trajectories)


def test_a_pass_over_the_budget_is_told_once_by_name(caplog):
    policy, config = BigramPolicy(), GrpoConfig(tokens_per_micro_batch=5)
    [group] = sampled_groups(policy, groups=1, members=3)
    for trajectory in group:
        trajectory.reward, trajectory.advantage_S = 1.0, np.ones(4, np.float32)
    trainer = Trainer(policy, config, Accelerator(cpu=True))
    with caplog.at_level(logging.WARNING, logger="rl.packing"):
        trainer.update([group])
        trainer.update([group])
    [said] = [record.getMessage() for record in caplog.records]
    size = max(group, key=lambda t: t.num_tokens())
    assert said.startswith(
        f"trajectory {size.key}: segments 1 ('plan'), 2 ('sketch'), 3 ('inspect') cannot be divided and take "
        f"{size.num_tokens()} slots in one forward, over grpo.tokens_per_micro_batch (5)"
    )


# ---- rows end to end -------------------------------------------------------------------------------------------------


def padded(policy):
    """The same weights, with an attention that takes no rows end to end."""
    config = small_config().model_copy(update={"attn_implementation": "eager"})
    twin = load(config, WORDS)
    twin.core.load_state_dict(policy.core.state_dict())
    return twin


def four_conditions(trajectory: Trajectory, number: int) -> list[Context]:
    """Thinking with Generated Images' branches; segment 1 is the negative prompt."""
    images = [i for i in range(number) if trajectory.segments[i].role == "sketch"]
    pieces, at = [], 0
    for index in images:
        pieces.append(Piece(index, "ids", at))
        at += len(trajectory.segments[index].ids)
    prompt, negative = (len(trajectory.segments[i].ids) for i in (0, 1))
    return [
        Context("unconditional", (), 0),
        Context("image", tuple(pieces), at),
        Context("negative", (Piece(1, "ids", 0),), negative),
        Context("original", (Piece(0, "ids", 0),), prompt),
    ]


def without_negative(trajectory: Trajectory, number: int) -> Context:
    pieces, at = [], 0
    for index in (0, *range(2, number)):
        pieces.append(Piece(index, "ids", at))
        at += len(trajectory.segments[index].ids)
    return Context("full", tuple(pieces), at)


def four_condition_thought(policy, member: int = 0) -> Trajectory:
    """A prompt of 12 ids, a negative one of 3, three times 29 words and an image of 16 codes between markers."""
    prompt = prompt_segment(policy, "a red circle left of a blue square , fine")
    negative = Segment("negative", Author.USER, Modality.TEXT, False, np.array([0, 5, 6], np.int32))
    trajectory = Trajectory("", {}, "strokes", [prompt, negative], member=member)
    guidance = Guidance("full", {"full": 2.0, "image": 1.2, "negative": 0.5, "original": 1.5})
    options = {"context": without_negative, "guidance": guidance, "branches": four_conditions, "words": 29}
    with torch.inference_mode():
        return sample(policy, trajectory, ["text", "image"] * 3, member, **options)


def test_a_guided_trajectory_counts_what_it_forwards():
    policy = small_policy()
    trajectory = mixed()[6]
    assert len(trajectory.segments[0].ids) == 12 and trajectory.num_tokens() == 156
    # full: 12 + 3 (29 + 18) = 153; images: 3 x 18 in one row; by image a row without anything (18), with the negative
    # prompt (3 + 18) and with the prompt (12 + 18)
    rows = [153, 54, *[18] * 3, *[21] * 3, *[30] * 3]
    [whole] = policy.passes([trajectory])
    assert whole.cost == sum(rows) == 414 and forwarded([whole]) == 414
    [other] = padded(policy).passes([trajectory])
    assert sorted(other.rows) == sorted(rows) and forwarded([other]) == 11 * 153 == 1683
    assert whole.decisions == 3 * 29 + 3 * 17

    # Alone, the last image takes 153 + 54 + 18 + 21 + 30 = 276, and 5 x 153 = 765 where rows are padded: no pass can be
    # made to take less. The first two texts with the first image: 88 in full, 18 + 18 + 21 + 30 of its branches.
    def divided(each, budget):
        return [(p.segments, forwarded([p])) for p in each.passes([trajectory], budget)]

    assert divided(policy, 414) == [((2, 3, 4, 5, 6, 7), 414)]
    assert divided(policy, 400) == [((2, 3, 4, 5, 6), 309), ((7,), 276)]  # 135, 36, 2 x 18, 2 x 21, 2 x 30
    assert divided(policy, 276) == divided(policy, 1) == [((2, 3, 4), 175), ((5, 6), 240), ((7,), 276)]
    # padded: 5 x 88; the second image has a row of 106 and one of 36 beside 18, 21 and 30, the text after it 135
    assert divided(padded(policy), 765) == [((2, 3, 4), 5 * 88), ((5, 6), 5 * 135), ((7,), 765)]
    assert divided(padded(policy), 1) == divided(padded(policy), 765)


def test_a_row_over_the_budget_is_one_pass_for_its_end_takes_all_of_it():
    """Divided at segments each pass would repeat the row before it: 45 + 50 + 55 + ... + 90 = 675 slots in ten passes,
    and the last one no smaller."""
    policy = small_policy()
    [row] = sampled(policy, [["text"] * 16])
    assert len(row.segments[0].ids) == 10 and row.num_tokens() == 10 + 16 * 5 == 90
    [one] = policy.passes([row], 45)
    assert one.segments == tuple(range(1, 17)) and one.cost == 90
    # Where its end is not scored, it is not forwarded either; and what need not be in a pass with it is not.
    row.segments[-1].trained = False
    assert [p.cost for p in policy.passes([row], 45)] == [85]
    [windows] = sampled(policy, [["text"] * 4], context=windowed)
    # 10 and 5; then 10, the last 3 of the segment before and 5
    assert [p.cost for p in policy.passes([windows], 1)] == [15, 18, 18, 18]


@cache
def mixed() -> list[Trajectory]:
    """Plain, windowed and guided thoughts of different lengths. Sampling them takes longer than all the rest here."""
    policy = small_policy()
    plans = [["text", "image", "text"], ["text"], ["image"] * 3]
    return [
        *sampled(policy, plans),
        *sampled(policy, plans, context=windowed),
        four_condition_thought(policy, 1),
        *sampled(policy, [["text"]] * 2),  # neighbours of one length, which are computed together
    ]


def gradients(policy) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in policy.core.named_parameters() if p.grad is not None}
    policy.core.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_end_to_end_score_as_padded_rows_with_the_same_gradient(checkpointing):
    policy = small_policy()
    assert policy.packs and policy.core.config._attn_implementation == ROWS
    twin = padded(policy)
    assert not twin.packs
    thoughts = mixed()
    if checkpointing:
        policy.core.gradient_checkpointing_enable({"use_reentrant": False})
        policy.core.train()
    results = []
    for each in (policy, twin):
        scored = score_trajectories(each, thoughts, entropy=True)
        weight_N = torch.linspace(-1, 1, len(scored.logprob_N))
        (scored.logprob_N * weight_N).sum().backward()
        results.append((scored, gradients(each)))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours.logprob_N, theirs.logprob_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.entropy_N, theirs.entropy_N, atol=1e-5, rtol=0)
    assert ours.log_ratio_N.abs().max() < 2e-5
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = float(their_gradients[name].abs().max())
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5 * max(scale, 1.0), rtol=1e-4)


def test_neighbours_change_nothing():
    policy = small_policy()
    thoughts = mixed()
    with torch.no_grad():
        alone = [score_trajectories(policy, [thought]).logprob_N for thought in thoughts]
        for order in ([8, 0, 6, 3], [7, 5, 2, 1, 4], [6, 1]):
            together = score_trajectories(policy, [thoughts[i] for i in order])
            torch.testing.assert_close(together.logprob_N, torch.cat([alone[i] for i in order]), atol=1e-5, rtol=0)


def test_a_row_sees_nothing_of_the_one_before_it():
    policy = small_policy()
    first, second = sampled(policy, [["text", "image"], ["text"]])
    before = score_trajectories(policy, [first, second])
    first.segments[1].ids[:] = first.segments[1].ids[::-1].copy()
    after = score_trajectories(policy, [first, second])
    mine = before.pass_N == 1
    torch.testing.assert_close(after.logprob_N[mine], before.logprob_N[mine], atol=1e-6, rtol=0)
    assert (after.logprob_N[~mine] - before.logprob_N[~mine]).abs().max() > 0.1
    assert full_history(second, 1).start == len(second.segments[0].ids)
