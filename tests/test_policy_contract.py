"""Every family keeps the promises of policy/contract.py; a fault in any of them is named."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from formats.registry import get_format
from policy.base import Extent, FlowStep
from policy.chameleon.family import load as load_chameleon
from policy.contract import check_policy
from record.trajectory import Modality
from rollout.config import RolloutConfig
from rollout.contract import check_family
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from tests.chameleon_helpers import small_config, small_policy
from tests.fakes import FakeFormat, FakePolicy
from tests.families.bagel import LATENT_SLOTS, PATCHES, Bagel
from tests.families.lvm import Lvm
from tests.families.qwen import Qwen
from tests.families.thinker import Thinker
from tests.test_families import CASES, engine, requests


def written(name: str, policy=None, members: int = 2):
    rollouts = engine(CASES[name], 4, policy)
    return rollouts.policy, rollouts.run(requests(CASES[name], members))


@pytest.mark.parametrize("name", ["bagel", "qwen", "lvm", "thinker"])
def test_every_fake_family_keeps_the_contract(name):
    policy, trajectories = written(name)
    check_policy(policy, trajectories, load=type(policy).load)


@pytest.mark.parametrize("view, guidance", [("plain", None), ("plain", 2.0), ("window", None), ("flow", 1.5)])
def test_the_engines_fake_keeps_the_contract(view, guidance):
    policy = FakePolicy(flow=view == "flow")
    flow = {"steps": 4, "window": 2, "window_range": (0, 2)}
    config = RolloutConfig(flow=flow, rows=6, max_tokens=40, branches=1, guidance=guidance is not None, temperature=0.8)
    asked = [RolloutRequest(0, "a red dot", members=(0, 1, 2)), RolloutRequest(1, "blue", members=(0, 1))]
    check_policy(policy, Engine(policy, FakeFormat(view, 3, guidance), config).run(asked))


@pytest.mark.parametrize("guided", [False, True])
def test_chameleon_keeps_the_contract(guided):
    policy = small_policy()
    fmt = get_format("strokes", max_images=2, guidance=["normal"] if guided else [], max_tokens=4)
    config = RolloutConfig(max_tokens=80, branches=2, guidance=guided, temperature=0.9)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    asked = [RolloutRequest(0, "a red circle", members=(0, 1)), RolloutRequest(1, "blue", media=(picture,))]
    trajectories = check_family(policy, fmt, asked, config, constrain="full", load=load_saved)
    assert any(t.images() for t in trajectories)


def load_saved(folder):
    return load_chameleon(small_config().model_copy(update={"path": str(folder)}))


# ---- planted faults ----


class SlotsPositionsAndIdsAreOne(Bagel):
    """As if an image took what its ids take, and positions counted slots."""

    def extent(self, segment, form, keep=None):
        found = super().extent(segment, form, keep)
        return found and Extent(len(segment.ids), len(segment.ids))


class PositionsCountSlots(Qwen):
    def extent(self, segment, form, keep=None):
        found = super().extent(segment, form, keep)
        return found and Extent(found.slots, found.slots)


class FramesTakeMore(Thinker):
    def extent(self, segment, form, keep=None):
        found = super().extent(segment, form, keep)
        return found if found is None or form == "ids" else Extent(found.slots + 1, found.positions)


class WindowIsIgnored(Thinker):
    def extent(self, segment, form, keep=None):
        return super().extent(segment, form, None if form == "frames" else keep)


class AppendsAtThePositionItIsAt(Qwen):
    def append(self, cache, row_B, pieces):
        moved = [(t, replace(p, start=p.start + (p.form == "vit"))) for t, p in pieces]
        logits = super().append(cache, row_B, moved)
        for row, (_, piece) in zip(row_B, pieces, strict=True):
            cache.position[row] -= piece.form == "vit"
        return logits


class StepsStandStill(Bagel):
    def step(self, cache, row_B, inputs):
        position = list(cache.position)
        answer = super().step(cache, row_B, inputs)
        if len(row_B) == 1 and not isinstance(inputs, FlowStep):
            cache.position[:] = position
        return answer


class CopiesLackTheLastSlot(Lvm):
    def copy(self, cache, source, row_B):
        super().copy(cache, source, row_B)
        for row in row_B:
            cache.keys[row, :, cache.used[row] - 1] = 0


class CopiesShareTheirRow(Lvm):
    def step(self, cache, row_B, inputs):
        answer = super().step(cache, row_B, inputs)
        for row in row_B[1:]:
            cache.keys[row_B[0]] = cache.keys[row]
        return answer


class RowsStandWhereTheFirstDoes(Qwen):
    def step(self, cache, row_B, inputs):
        position = list(cache.position)
        for row in row_B:
            cache.position[row] = position[row_B[0]]
        answer = super().step(cache, row_B, inputs)
        for row in row_B:
            cache.position[row] = position[row] + 1
        return answer


class FlowEntersTheCache(Bagel):
    def step(self, cache, row_B, inputs):
        answer = super().step(cache, row_B, inputs)
        if isinstance(inputs, FlowStep):
            for row in row_B:
                cache.position[row] += 1
        return answer


class DrawsAnew(Bagel):
    def decode_images(self, contents):
        return [255 - image for image in super().decode_images(contents)]


class DrawsGrey(Lvm):
    def decode_images(self, contents):
        return [image[:, :, 0] for image in super().decode_images(contents)]


class EncodesOneCodeMore(Lvm):
    def encode_images(self, images):
        return [np.append(ids, ids[:1]) for ids in super().encode_images(images)]


class EncodesFlat(Bagel):
    def encode_images(self, images):
        return [latent.ravel() for latent in super().encode_images(images)]


class CountsOneFormOfTwo(Bagel):
    image_slots = LATENT_SLOTS


class DrawsNothingAndCountsIt(Qwen):
    image_slots = PATCHES


class PerceivesOtherwise(Lvm):
    def perceive(self, segments):
        super().perceive(segments)
        for segment in segments:
            segment.ids = segment.ids[::-1].copy()


class ForgetsTheTemperature(Lvm):
    def _score_segment(self, trajectory, s):
        sampling = trajectory.segments[s].decisions.sampling
        temperature, sampling.temperature_N = sampling.temperature_N, np.ones_like(sampling.temperature_N)
        found = super()._score_segment(trajectory, s)
        sampling.temperature_N = temperature
        return found


class HasNoGradient(Lvm):
    def score(self, *args, **kwargs):
        with torch.no_grad():
            return super().score(*args, **kwargs)


class DropsAPass(Lvm):
    def passes(self, trajectories, budget=None):
        return super().passes(trajectories, budget)[: None if budget is None else -1]


class RepeatsAPass(Lvm):
    def passes(self, trajectories, budget=None):
        found = super().passes(trajectories, budget)
        return found if budget is None else [*found, found[0]]


class NeverDivides(Bagel):
    def passes(self, trajectories, budget=None):
        return super().passes(trajectories)


class NeverDividesWindows(Thinker):
    """Its segments have rows of their own: passes could be smaller."""

    def passes(self, trajectories, budget=None):
        return super().passes(trajectories)


class ScoresOtherwiseInParts(Bagel):
    def score(self, passes, *args, **kwargs):
        scored = super().score(passes, *args, **kwargs)
        whole = len({id(one.trajectory) for one in passes}) == len(passes) > 1
        return scored if whole else replace(scored, logprob_N=scored.logprob_N + 0.01)


class KeepsTheReference(Lvm):
    @contextmanager
    def reference(self):
        with torch.no_grad():
            self.model.word.mul_(0.5)
        yield


class SavesHalf(Lvm):
    def save(self, folder):
        super().save(folder)
        state = torch.load(folder / "model.pt", weights_only=True)
        torch.save(state | {"head": state["head"] * 0.9}, folder / "model.pt")


class MaySampleAnything(Lvm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.vocabulary.never = self.vocabulary.code_ids


FAULTS = {
    SlotsPositionsAndIdsAreOne: ("bagel", "extent: .* but a cache of one more does not hold it"),
    PositionsCountSlots: ("qwen", "extent: .* the next id does not stand at its start 1 plus the 1. positions"),
    FramesTakeMore: ("thinker", "extent: .* but it takes fewer"),
    WindowIsIgnored: ("thinker", "extent: .* but it takes fewer"),
    AppendsAtThePositionItIsAt: ("qwen", "append: .*, piece . .segment . as 'vit'.: appending is not prefilling"),
    StepsStandStill: ("bagel", "step: .* feeding id 2 is not prefilling with it"),
    CopiesLackTheLastSlot: ("lvm", "copy: "),
    CopiesShareTheirRow: ("lvm", "fork: .* two rows copied from one do not go apart"),
    RowsStandWhereTheFirstDoes: ("qwen", "rows: .* a row's step depends on its neighbours"),
    FlowEntersTheCache: ("bagel", "denoising: .*"),
    DrawsAnew: ("bagel", "decode_images: .* drawn otherwise than it was recorded"),
    DrawsGrey: ("lvm", r"decode_images: .* uint8 \[4, 4\] is no uint8 \[height, width, 3\]"),
    EncodesOneCodeMore: ("lvm", r"encode_images: int32 \[5\] is no 4 ids of codes"),
    EncodesFlat: ("bagel", r"encode_images: float32 \[15\] is no float32 \[5, 3\]"),
    CountsOneFormOfTwo: ("bagel", "image_slots: .* it takes 9 slots, and image_slots is 5"),
    DrawsNothingAndCountsIt: ("qwen", "image_slots: they are 0 where nothing is drawn"),
    PerceivesOtherwise: ("lvm", r"perceive: trajectory 0-0, segment 0 \('prompt'\)"),
    ForgetsTheTemperature: ("lvm", r"score: .* decision 0 \(CODE\) was sampled at a log-prob of"),
    HasNoGradient: ("lvm", "score: log-probs carry no gradient"),
    DropsAPass: ("lvm", "passes: of a budget of .* are in none"),
    RepeatsAPass: ("lvm", "passes: of a budget of .* are in several"),
    NeverDivides: ("bagel", "passes: of a budget of .* and could be divided"),
    NeverDividesWindows: ("thinker", "passes: of a budget of .* and could be divided"),
    ScoresOtherwiseInParts: ("bagel", "passes: .* is not scored as it is in whole trajectories"),
    KeepsTheReference: ("lvm", "reference: within it the weights changed"),
    SavesHalf: ("lvm", "save: what is loaded scores otherwise"),
    MaySampleAnything: ("lvm", "vocabulary: .* an id that may never be sampled"),
}


class TakesNoMoreThanItsDearest(Bagel):
    """As if all segments stood in one causal row, whose end takes all of it however it is divided."""

    def passes(self, trajectories, budget=None):
        def row(one):
            return sum(len(segment.ids) for segment in one.trajectory.segments[: one.segments[-1] + 1])

        return [replace(one, cost=row(one)) for one in super().passes(trajectories)]


def test_a_pass_that_no_division_makes_smaller_is_sound():
    check_policy(TakesNoMoreThanItsDearest(), sound("bagel"))


@cache
def sound(name: str):
    return written(name, members=1)[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named(fault):
    name, words = FAULTS[fault]
    policy = fault()  # the same weights as those that sampled
    with pytest.raises(AssertionError, match=f"{policy.family}: {words}"):
        check_policy(policy, sound(name), load=CASES[name].policy.load)


class NeighboursCount(Lvm):
    def step(self, cache, row_B, inputs):
        answer = super().step(cache, row_B, inputs)
        return replace(answer, logits_BV=answer.logits_BV + 0.1 * len(row_B) * torch.arange(self.vocabulary.size))


class NeighboursCountInTheRecordToo(NeighboursCount):
    """Scoring that says what the record says, so that only the layouts tell."""

    def score(self, passes, *args, **kwargs):
        scored = super().score(passes, *args, **kwargs)
        return replace(scored, log_ratio_N=scored.log_ratio_N * 0)


@pytest.mark.parametrize(
    "fault, words",
    [
        (
            NeighboursCount,
            "layout: sampled all at once, segment . .'state'. of trajectory .* nats from what was sampled",
        ),
        (NeighboursCountInTheRecordToo, "layout: sampled in 1 row.*, trajectory .*, segment .* another than all at"),
    ],
)
def test_a_family_whose_rows_are_not_their_own_is_named(fault, words):
    case = CASES["lvm"]
    with pytest.raises(AssertionError, match=f"lvm_like: {words}"):
        check_family(fault(), case.fmt, requests(case), RolloutConfig(max_tokens=60))


def test_the_layouts_of_a_sound_family_agree():
    case = CASES["qwen"]
    found = check_family(case.policy(), case.fmt, requests(case, 2)[1:2], constrain=case.constrain, tools=case.tools)
    assert [(t.group, t.member) for t in found] == [(1, 0), (1, 1)]


@pytest.mark.parametrize("fault", [PositionsCountSlots])
def test_a_lying_extent_is_found_in_what_it_sampled_itself(fault):
    """The engine trusts extents: it samples under them without a word, and only the contract tells."""
    name, words = FAULTS[fault]
    policy, trajectories = written(name, fault())
    with pytest.raises(AssertionError, match=words):
        check_policy(policy, trajectories)


def test_what_was_not_written_is_no_check():
    _, trajectories = written("lvm")
    asked = [replace(trajectory, segments=trajectory.segments[:1]) for trajectory in trajectories]
    assert asked[0].segments[0].modality is Modality.IMAGE_TOKENS
    with pytest.raises(AssertionError, match="lvm_like: trajectories: they hold no segment that the policy wrote"):
        check_policy(Lvm(), asked)


def test_a_lie_of_a_real_family_is_named(monkeypatch):
    policy = small_policy()
    config = RolloutConfig(rows=2, max_tokens=60)
    trajectories = Engine(policy, get_format("strokes", max_images=1), config).run([RolloutRequest(0, "a red circle")])
    truth = policy.extent
    monkeypatch.setattr(
        policy, "extent", lambda segment, form, keep=None: Extent(truth(segment, form, keep).slots + 1, 1)
    )
    with pytest.raises(AssertionError, match="chameleon: extent: .* but it takes fewer"):
        check_policy(policy, trajectories)
