"""Members that go on from a prefix: the same noise writes the same, another's differs, and each decision is the loss's
once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from formats.base import Codes, ContextSpec, Latent, whole_history
from formats.contract import _sample, spans_to_trajectory
from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from formats.registry import get_format
from policy.base import score_trajectories
from record.store import load_trajectories, save_trajectories
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory
from rl.batches import scored_decisions
from rl.forks import outside_calls
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.engine.flow import behaviour_mean
from rollout.forks import follow, fork, stands_in_call
from rollout.pool.contract import WorkersError, check_requests
from rollout.requests import RolloutError, RolloutRequest
from rollout.tools.config import ToolConfig
from rollout.tools.registry import Tools, build_tools
from tests.fakes import FakeCursor, FakeFormat, FakePolicy
from tests.test_engine import CASES, engine, requests
from tests.test_engine_chameleon import CASES as CHAMELEON
from tests.test_engine_chameleon import policy, rollouts  # noqa: F401
from tests.test_formats_contract import vocabulary_of
from tests.test_look import numerate_policy
from tests.tool_helpers import Counting, Replies

LAYOUTS = [
    "plain",
    "window",
    "flow",
    "guided codes",
    "guided flow",
    "closed by what follows",
    "nucleus",
    "window, first id forced",
]


def contents(trajectory) -> list:
    return [
        (s.role, s.author, s.ids.tolist(), None if s.latent is None else s.latent.round(4).tolist(), s.text)
        for s in trajectory.segments
    ]


def states(trajectory) -> range:
    """After how many segments it can be continued: what followed was written."""
    return range(1, len(trajectory.segments))


def forks_of(trunk, members) -> list[RolloutRequest]:
    """Every state of every trajectory, one request each: the engine itself asks nothing of their numbers."""
    return [fork(t, n, members) for t in trunk for n in states(t) if awaits_nothing(t, n)]


def awaits_nothing(trajectory, n: int) -> bool:
    return trajectory.segments[n].author is Author.POLICY


def in_order(rollouts: Engine, asked: list[RolloutRequest]) -> list[list]:
    written = iter(rollouts.run(asked))
    return [[next(written) for _ in request.members] for request in asked]


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_member_continued_from_its_own_prefix_is_itself(case):
    rollouts = engine(**CASES[case])
    trunk = rollouts.run(requests(4, 2))
    asked = [replace(r, members=(r.parent[0],)) for r in forks_of(trunk, (0,))]
    assert len(asked) > 10
    by_key = {t.key: t for t in trunk}
    for request, (child,) in zip(asked, in_order(engine(**CASES[case]), asked), strict=True):
        parent = by_key[child.key]
        assert contents(child) == contents(parent) and child.stop is parent.stop
        assert child.parent == request.parent and parent.parent is None
        for a, b in zip(child.segments, parent.segments, strict=True):
            assert a.contexts == b.contexts
            if a.decisions is not None:
                np.testing.assert_array_equal(a.decisions.position_N, b.decisions.position_N)
                np.testing.assert_allclose(a.decisions.logprob_N, b.decisions.logprob_N, atol=1e-5)
                assert [s.tolist() for s in a.decisions.sampling.sets] == [
                    s.tolist() for s in b.decisions.sampling.sets
                ]


@pytest.mark.parametrize("case", LAYOUTS)
def test_forked_members_share_the_prefix_alone_and_are_scored_as_they_were_sampled(case):
    rollouts = engine(**CASES[case])
    trunk = rollouts.run(requests(3, 2))
    asked = forks_of(trunk, (7, 8, 9))
    rollouts = engine(**CASES[case])
    sets = in_order(rollouts, asked)
    assert rollouts.stats.prompts == len(asked)  # each prefix is computed once, and copied
    if "window" not in case and "guided" not in case:
        (cache,) = rollouts.policy.caches
        assert sum(len(rows) for name, rows in cache.calls if name == "prefill") == len(asked)
    differing = 0
    for request, children in zip(asked, sets, strict=True):
        parent = next(t for t in trunk if (t.group, t.member) == (request.group, request.parent[0]))
        for child in children:
            assert [s.ids.tolist() for s in child.segments[: request.parent[1]]] == [
                s.ids.tolist() for s in parent.segments[: request.parent[1]]
            ]
            differing += contents(child) != contents(parent)
    assert differing > 2 * len(asked)  # of 3 each; a last word may well come twice
    children = [child for group in sets for child in group]
    with torch.no_grad():
        scored = score_trajectories(rollouts.policy, children)
    assert float(scored.log_ratio_N.abs().max()) < 1e-5 and len(scored.logprob_N) > 100


def test_a_decision_is_the_loss_s_once():
    rollouts = engine()
    trunk = rollouts.run(requests(2, 2))
    for request, children in zip(forks_of(trunk, (4, 5)), in_order(rollouts, forks_of(trunk, (4, 5))), strict=True):
        parent = next(t for t in trunk if (t.group, t.member) == (request.group, request.parent[0]))
        n = request.parent[1]
        for child in children:
            kept = [len(s.decisions) for s in child.segments[1:n]]
            assert kept == [len(s.decisions) for s in parent.segments[1:n]]  # they are kept in the record
            assert not scored_decisions(child)[:n].any()  # and scored for the parent alone
            assert scored_decisions(child).sum() == child.num_decisions() - sum(kept) > 0
            with torch.no_grad():
                scored = score_trajectories(rollouts.policy, [parent, child])
            of_child = scored.segment_N[scored.pass_N == 1]
            assert len(of_child) == child.num_decisions() - sum(kept) and of_child.min() >= n
    assert all(s.trained for t in trunk for s in t.segments[1:])  # forking left the parents as they were


def test_stats_count_what_was_written_here():
    rollouts = engine()
    trunk = rollouts.run(requests(1, 1))
    n = len(trunk[0].segments) - 1
    children = rollouts.run([fork(trunk[0], n, (3, 4))])
    assert rollouts.stats.tokens == sum(len(s.ids) for t in children for s in t.segments[n:])
    assert rollouts.stats.decisions == sum(len(s.decisions) for t in children for s in t.segments[n:])
    assert rollouts.stats.images == sum(s.image is not None for t in children for s in t.segments[n:])


def test_the_means_of_a_forked_image_are_found_by_its_noise():
    """behaviour_mean counts the prefix's decisions, as sampling did."""
    rollouts = engine("flow")
    trunk = rollouts.run(requests(4, 2))
    found = 0
    sigma_N = torch.tensor(0.7 * np.sqrt(np.array([1 / 0.1, 0.9 / 0.1]) * np.array([0.1, 0.15]))).float()
    for child in rollouts.run(forks_of(trunk, (7,))):
        for index in range(child.parent[1], len(child.segments)):
            image = child.segments[index]
            if image.flow is None:
                continue
            z_N = (image.flow.x_next_N - behaviour_mean(child, index, sigma_N).numpy()) / sigma_N.numpy()[:, None, None]
            by_hand = (-0.5 * z_N**2 - np.log(sigma_N.numpy())[:, None, None] - 0.5 * np.log(2 * np.pi)).mean((1, 2))
            np.testing.assert_allclose(image.decisions.logprob_N[1:], by_hand, atol=1e-5)
            found += 1
    assert found > 3


def test_forks_depend_on_their_names_only():
    rollouts = engine(rows=24)
    trunk = rollouts.run(requests(3, 2))
    asked = forks_of(trunk, (7, 8))
    wide = in_order(rollouts, asked)
    narrow = in_order(engine(rows=2), asked)
    mixed = in_order(engine(rows=5), [*requests(2, 3), *asked])[2:]  # beside groups that begin at a prompt
    alone = [[engine().run([replace(r, members=(m,))])[0] for m in r.members] for r in asked[::3]]
    assert [[contents(t) for t in g] for g in wide] == [[contents(t) for t in g] for g in narrow]
    assert [[contents(t) for t in g] for g in wide] == [[contents(t) for t in g] for g in mixed]
    assert [[contents(t) for t in g] for g in wide[::3]] == [[contents(t) for t in g] for g in alone]


def test_the_environment_s_words_are_part_of_a_prefix():
    rollouts = engine("plain", asks=2)
    rollouts = Engine(rollouts.policy, rollouts.fmt, rollouts.config, tools=Tools([Counting()]))
    trunk = rollouts.run(requests(4, 2))
    asked = [r for r in forks_of(trunk, (0,)) if any(s.author is Author.ENVIRONMENT for s in r.prefix)]
    assert len(asked) > 5
    by_key = {t.key: t for t in trunk}
    own = [replace(r, members=(r.parent[0],)) for r in asked]
    assert [contents(c) for (c,) in in_order(rollouts, own)] == [
        contents(by_key[f"{r.group}-{r.parent[0]}"]) for r in own
    ]
    children = rollouts.run([replace(r, members=(8, 9)) for r in asked])
    assert float(score_trajectories(rollouts.policy, children).log_ratio_N.detach().abs().max()) < 1e-5
    # Where the environment is to speak, nobody can be asked to write.
    called = next(t for t in trunk if any(s.author is Author.ENVIRONMENT for s in t.segments))
    n = next(n for n, s in enumerate(called.segments) if s.author is Author.ENVIRONMENT)
    with pytest.raises(RolloutError, match=r"fork of trajectory .* after segment \d+: the environment is to speak"):
        rollouts.run([fork(called, n, (5,))])


def test_a_call_that_was_answered_by_nothing_is_no_border():
    """A tool may say nothing: then no segment stands between the call and what the policy wrote next."""
    rollouts = engine("plain", asks=2)
    rollouts = Engine(rollouts.policy, rollouts.fmt, rollouts.config, tools=Tools([Replies()]))
    trunk = rollouts.run(requests(4, 2))
    assert sum(rollouts.stats.tool_calls.values()) > 5
    own = [replace(r, members=(r.parent[0],)) for r in forks_of(trunk, (0,))]
    by_key = {t.key: t for t in trunk}
    assert [contents(c) for (c,) in in_order(rollouts, own)] == [
        contents(by_key[f"{r.group}-{r.parent[0]}"]) for r in own
    ]


def test_a_restart_from_a_buffer_is_a_group_of_its_own(tmp_path):
    """R3: a stored prefix begins a new group; the parent's is named in the record."""
    rollouts = engine()
    trunk = next(t for t in rollouts.run(requests(3, 2)) if len(t.segments) > 2)
    save_trajectories([trunk], tmp_path / "buffer")
    (stored,) = load_trajectories(tmp_path / "buffer")
    children = rollouts.run([fork(stored, 2, (0, 1, 2), group=40)])
    assert [(t.group, t.member, t.parent) for t in children] == [(40, m, (trunk.member, 2)) for m in range(3)]
    assert all(t.info == {"parent_group": trunk.group} for t in children)
    assert children[trunk.member].segments[2].ids.tolist() != trunk.segments[2].ids.tolist() or (
        contents(children[0]) != contents(children[1])
    )
    save_trajectories(children, tmp_path / "children")
    again = load_trajectories(tmp_path / "children")
    assert [(t.parent, t.info, contents(t)) for t in again] == [(t.parent, t.info, contents(t)) for t in children]
    assert not any(s.trained for t in again for s in t.segments[:2])
    # A child has children.
    (grandchild,) = rollouts.run([fork(again[1], 2, (9,))])
    assert grandchild.parent == (1, 2) and grandchild.group == 40 and "parent_group" not in grandchild.info


# ---- limits and errors ----


@pytest.mark.parametrize("max_tokens", [12, 20, 29])
def test_limits_count_the_prefix(max_tokens):
    rollouts = engine(max_tokens=max_tokens)
    trunk = rollouts.run(requests(4, 3))
    children = rollouts.run(forks_of(trunk, (7, 8)))
    for child in children:
        assert sum(len(s.ids) for s in child.segments[1:]) <= max_tokens
        assert len(child.images()) <= 3
        assert all(len(s.ids) == 6 for s in child.segments if s.modality is Modality.IMAGE_TOKENS)
    assert any(t.stop is StopReason.MAX_TOKENS for t in children)
    assert float(score_trajectories(rollouts.policy, children).log_ratio_N.detach().abs().max()) < 1e-5


def test_the_context_counts_the_prefix():
    rollouts = engine(max_length=17, max_tokens=90, max_images=9)
    trunk = rollouts.run(requests(4, 4))
    children = rollouts.run(forks_of(trunk, (7, 8)))
    assert all(t.num_tokens() <= 17 for t in children)
    assert any(t.stop is StopReason.MAX_CONTEXT for t in children)


class Peephole(FakeFormat):
    """Every other segment sees the one before it alone, the others all that there is."""

    def contexts(self, trajectory, segment):
        pieces = whole_history(segment).pieces
        return (ContextSpec("full", pieces[-1:] if segment % 2 else pieces),)


def test_a_later_context_may_hold_more_than_the_one_that_a_fork_begins_with():
    """The cache has room for the prompt, though the fork's first segment does not see it."""

    def fresh():  # an engine keeps the longest cache that it had
        return Engine(FakePolicy(), Peephole(max_images=0), RolloutConfig(rows=4, max_tokens=24))

    prompt = "a red dot big small left right fine wrong blue"
    trunk = {t.member: t for t in fresh().run([RolloutRequest(0, prompt, members=(3, 6, 13, 15))])}
    lengths = {member: [len(s.ids) for s in t.segments] for member, t in trunk.items()}
    assert lengths[3] == [11, 2, 3, 1, 3, 4, 2, 5, 1]  # a fork's first context has 3 slots, its last one 31, of 3 + 24
    assert lengths[15][:7] == [11, 3, 7, 2, 1, 8, 1]  # 7, and 32 after the sixth, of 7 + 24
    for parent in trunk.values():
        (child,) = fresh().run([fork(parent, 3, (parent.member,))])
        assert contents(child) == contents(parent) and child.stop is parent.stop


def drawn_first(**settings):
    """An engine, and a trajectory whose second segment is an image and that goes on after it."""
    rollouts = engine(begins_with_image=True, **settings)
    return rollouts, next(t for t in rollouts.run(requests(4, 3)) if len(t.segments) > 2)


def test_states_that_are_not_there():
    rollouts, trunk = drawn_first()
    last = len(trunk.segments)
    for n in (0, last + 1, -1):
        with pytest.raises(
            RolloutError, match=f"{trunk.key}: it cannot be continued after {n} segments; it has {last}"
        ):
            fork(trunk, n, (5,))
    ended = next(t for t in rollouts.run(requests(4, 3)) if t.stop is StopReason.END)
    with pytest.raises(RolloutError, match=f"trajectory {ended.key} after segment .*: the turn has ended there"):
        rollouts.run([fork(ended, len(ended.segments), (5,))])
    asked = fork(trunk, 2, (5,))
    with pytest.raises(RolloutError, match=r"the prefix has 2 segments; it has the parent's first 3"):
        rollouts.run([replace(asked, parent=(trunk.member, 3))])
    with pytest.raises(RolloutError, match="a prefix of 2 segments, but no parent"):
        rollouts.run([replace(asked, parent=None)])


def test_an_image_is_not_continued_in_its_midst():
    rollouts, trunk = drawn_first()
    image = trunk.segments[1]
    half = replace(image, ids=image.ids[:3], decisions=None)
    with pytest.raises(RolloutError, match="after segment 1 is in the midst of an image: 3 of its ids are there"):
        rollouts.run([replace(fork(trunk, 2, (5,)), prefix=(trunk.segments[0], half))])


def test_a_prefix_of_another_format_is_refused():
    rollouts, trunk = drawn_first()
    joined = replace(trunk.segments[1], ids=np.concatenate([trunk.segments[1].ids, [6]]).astype(np.int32))
    with pytest.raises(RolloutError, match="no beginning in format 'fake_plain': it reads"):
        rollouts.run([replace(fork(trunk, 2, (5,)), prefix=(trunk.segments[0], joined))])
    spoken = replace(trunk.segments[1], author=Author.ENVIRONMENT)
    with pytest.raises(RolloutError, match="the environment speaks .* where it is not asked"):
        rollouts.run([replace(fork(trunk, 2, (5,)), prefix=(trunk.segments[0], spoken))])


def test_a_fork_past_a_limit_is_named():
    rollouts, trunk = drawn_first()
    narrow = Engine(rollouts.policy, rollouts.fmt, rollouts.config.model_copy(update={"max_tokens": 6}))
    with pytest.raises(RolloutError, match="after segment 1: 6 ids stand before it, and rollout.max_tokens is 6"):
        narrow.run([fork(trunk, 2, (5,))])
    fewer = Engine(rollouts.policy, FakeFormat("plain", 0, begins_with_image=True), rollouts.config)
    with pytest.raises(RolloutError, match="after segment 1: 1 images stand before it, .* allows 0"):
        fewer.run([fork(trunk, 2, (5,))])
    rollouts.policy.max_length = len(trunk.segments[0].ids) + 6
    with pytest.raises(RolloutError, match=r"after segment 1: what stands before it takes \d+ slots"):
        rollouts.run([fork(trunk, 2, (5,))])


def test_requests_of_one_group_are_told_apart_by_their_state():
    _, trunk = drawn_first()
    check_requests([RolloutRequest(trunk.group, "red"), fork(trunk, 1, (4, 5)), fork(trunk, 2, (6, 7))])
    with pytest.raises(WorkersError, match=f"group {trunk.group}, continuing member .* is asked for twice"):
        check_requests([fork(trunk, 2, (4,)), fork(trunk, 2, (5,))])
    with pytest.raises(WorkersError, match="member 5 is asked for from two states"):
        check_requests([fork(trunk, 1, (4, 5)), fork(trunk, 2, (5, 6))])


def test_a_cursor_without_a_cut_is_named():
    rollouts = engine(lingers=True)
    trunk = next(t for t in rollouts.run(requests(4, 3)) if len(t.segments) > 2 and len(t.segments[1].ids) == 6)

    class Uncut(FakeCursor):
        cut = None

    rollouts.fmt.cursor = lambda vocabulary, constrain: Uncut(rollouts.fmt, vocabulary)
    with pytest.raises(RolloutError, match="'fake_plain' closes the segment before it by what follows, .* no cut"):
        rollouts.run([fork(trunk, 2, (5,))])


# ---- the shipped formats' cursors, by random walks ----


@pytest.mark.parametrize("kind", ["word", "piece"])
@pytest.mark.parametrize("constrain", ["images", "full"])
@pytest.mark.parametrize("name", ["strokes", "subgoals", "self_critique"])
def test_a_cursor_brought_to_a_state_goes_on_as_the_one_that_wrote_it(name, constrain, kind):
    """At every state of random walks: what is forced, allowed and recognised afterwards is the same."""
    fmt = get_format(name)
    vocabulary = vocabulary_of(kind, fmt)
    rng, tried = np.random.default_rng(0), 0
    for _ in range(40):
        ids, whole = [], fmt.cursor(vocabulary, constrain)
        while not whole.stopped and len(ids) < 50:
            forced = whole.forced()
            ids.append(_sample(whole.allowed(), vocabulary, rng) if forced is None else forced)
            whole.advance(ids[-1])
        if whole.in_image:
            continue  # a limit does not fall there
        whole.stop()
        written = spans_to_trajectory(fmt, vocabulary, ids, whole.spans, StopReason.END)
        for n in states(written):
            cursor, other = fmt.cursor(vocabulary, constrain), fmt.cursor(vocabulary, constrain)
            begun = len(follow(cursor, fmt, fork(written, n, (0,))).ids)
            assert [span.stop for span in cursor.spans][-1:] == ([begun] if begun else [])
            for at, id in enumerate(ids):
                if at >= begun:
                    assert cursor.forced() == other.forced() and cursor.in_image == other.in_image
                    if cursor.forced() is None:
                        assert cursor.allowed() is other.allowed() and cursor.role == other.role
                    cursor.advance(id)
                other.advance(id)
            cursor.stop()
            assert cursor.spans == whole.spans
            cursor = fmt.cursor(vocabulary, constrain)  # and whatever else may come is divided whole
            length = len(follow(cursor, fmt, fork(written, n, (0,))).ids)
            while not cursor.stopped and (length < begun + 12 or cursor.in_image):
                forced = cursor.forced()
                cursor.advance(_sample(cursor.allowed(), vocabulary, rng) if forced is None else forced)
                length += 1
            cursor.stop()
            edges = [0, *(span.stop for span in cursor.spans)]
            assert [span.start for span in cursor.spans] == edges[:-1] and edges[-1] == length
            tried += 1
    assert tried > 40


@pytest.mark.parametrize("imaging", [Codes(np.arange(6, dtype=np.int32), 3), Latent()], ids=["codes", "latents"])
def test_images_without_markers_begin_again_where_a_prefix_ends(imaging):
    """A planner of frames alone (VPRL's): no id tells where an image begins, and none ends the turn."""
    frame = Role("frame", Modality.IMAGE)
    fmt = DeclaredFormat(Grammar("frames", (frame,), {START: ("frame",), "frame": ("frame", END)}, max_images=3))
    nothing = np.empty(0, np.int32)
    codes = isinstance(imaging, Codes)
    made = {"size": 6 if codes else 0, "never": nothing, "imaging": imaging}
    vocabulary = SimpleNamespace(pad=None, bos=None, eos=None, sep=None, piece=str, encode=list, decode=str, **made)
    ids = np.array([3, 1, 4], np.int32) if codes else nothing
    modality = Modality.IMAGE_TOKENS if codes else Modality.IMAGE_LATENT
    segments = [Segment("prompt", Author.USER, Modality.IMAGE, False)]
    segments += [Segment("frame", Author.POLICY, modality, True, ids) for _ in range(3)]
    written = Trajectory("go to the goal", {}, "frames", segments)
    for n in (1, 2, 3):
        cursor = fmt.cursor(vocabulary)
        assert len(follow(cursor, fmt, fork(written, n, (4,))).ids) == (n - 1) * len(ids)
        assert cursor.in_image and cursor.images == n and len(cursor.spans) == n - 1
    half = replace(segments[2], ids=ids[:2])
    if codes:
        with pytest.raises(RolloutError, match="after segment 2 is in the midst of an image: 2 of its ids"):
            follow(fmt.cursor(vocabulary), fmt, replace(fork(written, 3, (4,)), prefix=(*segments[:2], half)))
    with pytest.raises(RolloutError, match="after segment 3: the turn has ended there"):
        follow(fmt.cursor(vocabulary), fmt, fork(written, 4, (4,)))


# ---- a family and the shipped formats ----


@pytest.mark.parametrize(
    "case, constrain", [("strokes", "images"), ("strokes", "full"), ("self_critique", "full"), ("guided", "full")]
)
def test_chameleon_forks_in_the_shipped_formats(policy, case, constrain):  # noqa: F811
    name, options, config = CHAMELEON[case]
    options = options | ({"max_tokens": {"plan": 6}} if name == "strokes" else {})
    writer = rollouts(policy, get_format(name, **options), constrain, **config)
    trunk = writer.run([RolloutRequest(g, "a photo of a red circle", {}, (0, 1), 5) for g in range(2)])
    asked = [r for r in forks_of(trunk, (0,)) if r.parent[1] > 1 or r.group == 0]
    own = [replace(r, members=(r.parent[0],)) for r in asked]
    by_key = {t.key: t for t in trunk}
    same = [contents(c) == contents(by_key[c.key]) for (c,) in in_order(writer, own)]
    assert sum(same) >= len(same) - 1  # batched products of other shapes differ in the last bit
    children = [t for group in in_order(writer, [replace(r, members=(7, 8)) for r in asked]) for t in group]
    with torch.no_grad():
        scored = score_trajectories(policy, children)
    assert float(scored.log_ratio_N.abs().max()) < (5e-5 if config.get("guidance") else 1e-5)
    if constrain == "full":
        for child in children:
            if child.stop is StopReason.END:
                assert writer.fmt.violations(child) == []


# ---- calls of tools ----


def test_a_call_that_stands_open_is_no_state_and_all_others_go_on_as_they_were_written():
    """Words are free under `images`, so that an image may begin inside <look>, whose call then never comes about."""
    thinker, fmt = numerate_policy("<ins>", "</ins>", "<look>", "</look>"), get_format("look")
    tools = build_tools({"look": ToolConfig()})
    writer = Engine(thinker, fmt, RolloutConfig(rows=8, max_tokens=80), "images", tools)
    trunk = writer.run([RolloutRequest(g, "a red circle", {}, (0, 1, 2, 3), 5) for g in range(2)])
    # A call that was answered, as it stood before its last id.
    request = next(r for r in forks_of(trunk, (8,)) if r.prefix[-1].author is Author.ENVIRONMENT)
    call = next(n for n, s in enumerate(request.prefix) if s.role == "look" and "</look>" in s.text)
    half = replace(request.prefix[call], ids=request.prefix[call].ids[:-1], text="<look> 4", decisions=None)
    cut = replace(request, parent=(request.parent[0], call + 1), prefix=(*request.prefix[:call], half))
    with pytest.raises(RolloutError, match=rf"after segment {call}: the call in 'look' stands open .* Fork before the"):
        writer.run([cut])

    def stands_open(request: RolloutRequest) -> bool:
        last = request.prefix[-1]
        return last.role == "look" and last.author is Author.POLICY and "</look>" not in last.text

    asked = [cut, *forks_of(trunk, (8, 9))]
    others = [r for r in asked if not stands_open(r)]
    assert [stands_in_call(r, fmt, thinker.vocabulary) for r in asked] == [stands_open(r) for r in asked]
    assert outside_calls(SimpleNamespace(fmt=fmt, policy=thinker), asked) == others and len(others) > 8
    some = [r for r in others if r.parent[1] > 1][::3]
    by_key = {t.key: t for t in trunk}
    own = [replace(r, members=(r.parent[0],)) for r in some]
    assert [contents(c) for (c,) in in_order(writer, own)] == [
        contents(by_key[f"{r.group}-{r.parent[0]}"]) for r in own
    ]
    children = [child for group in in_order(writer, some) for child in group]
    with torch.no_grad():
        assert float(score_trajectories(thinker, children).log_ratio_N.abs().max()) < 1e-5
    answered = 0
    for child in children:
        for before, answer in pairwise(child.segments):
            if answer.author is Author.ENVIRONMENT:
                assert before.text.startswith("<look>") and before.text.endswith("</look>")
                answered += 1
    assert answered
