"""Whether what a writer hands over holds all that scoring needs: prompt, media, decisions, sampling, denoising steps.

What it holds may still be wrong; gate.py compares it with the trainer's own log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from formats.base import Codes, Format
from formats.segments import prompt_segments
from policy.base import Policy
from policy.scoring.flow import sampler_of
from record.trajectory import Author, DecisionKind, Modality, Segment, Trajectory, mask_of
from rollout.requests import RolloutRequest
from runtime.errors import UserError

IMAGES = (Modality.IMAGE, Modality.IMAGE_TOKENS, Modality.IMAGE_LATENT)


class ConformanceError(UserError):
    """A writer whose trajectories cannot be trained on: what it samples is not what the trainer would score."""


def check_record(
    trajectories: Sequence[Trajectory],
    requests: Sequence[RolloutRequest],
    policy: Policy,
    fmt: Format | None = None,
    version: int | None = None,
) -> None:
    """Hold trajectories to the requests that they answer and to what the record asks for.

    Args:
        fmt: None: the prompt is not compared with what the trainer would feed.
        version: of the weights that sampled; None: not compared.

    Raises:
        ConformanceError: it names the trajectory, the segment, what is missing, and what would be right.
    """
    by_group = {request.group: request for request in requests}
    wanted = {(request.group, member) for request in requests for member in request.members}
    found = [(t.group, t.member) for t in trajectories]
    if sorted(found) != sorted(wanted):
        raise ConformanceError(
            f"the writer was asked for the trajectories (group, member) {sorted(wanted)} and wrote {sorted(found)}; "
            "each is written once"
        )
    prompts: dict[int, list[Segment]] = {}
    for trajectory in trajectories:
        if fmt is not None:
            if trajectory.group not in prompts:
                prompts[trajectory.group] = _prompt(by_group[trajectory.group], policy, fmt)
            _check_prompt(trajectory, prompts[trajectory.group])
        check_segments(trajectory, policy, version)


def check_segments(trajectory: Trajectory, policy: Policy, version: int | None = None) -> None:
    """Hold one trajectory's segments to what the record asks for. See check_record."""
    for number, segment in enumerate(trajectory.segments):
        where = f"trajectory {trajectory.key}, segment {number} ('{segment.role}')"
        _check_media(segment, policy, where)
        if segment.author is Author.POLICY and segment.trained:
            _check_decisions(segment, number, policy, where)
            if version is not None and segment.version != version:
                raise ConformanceError(
                    f"{where}: it is stamped with version {segment.version} of the weights, and version {version} "
                    "was published"
                )


def _prompt(request: RolloutRequest, policy: Policy, fmt: Format) -> list[Segment]:
    """What the trainer's side would feed."""
    segments = prompt_segments(fmt, request.prompt, request.media, policy.vocabulary)
    shown = [segment for segment in segments if segment.modality is not Modality.TEXT]
    if shown:
        policy.perceive(shown)
    return segments


def _check_prompt(trajectory: Trajectory, expected: Sequence[Segment]) -> None:
    for number, right in enumerate(expected):
        where = f"trajectory {trajectory.key}, segment {number} ('{right.role}')"
        if number >= len(trajectory.segments):
            raise ConformanceError(f"{where}: it is missing from the prompt")
        given = trajectory.segments[number]
        for name, one, other in (
            ("an image", right.image, given.image),
            ("frames", None if right.frames is None else right.frames.frames_F,
             None if given.frames is None else given.frames.frames_F),
        ):  # fmt: skip
            if one is None:
                continue
            if other is None:
                raise ConformanceError(
                    f"{where}: the request shows {name} that the record has not: the trainer would score words about "
                    "what it is not shown. The writer must hand on all media of the request"
                )
            if not np.array_equal(one, other):
                raise ConformanceError(f"{where}: the request shows {name} that is another than the record's")
        if not np.array_equal(right.ids, given.ids):
            raise ConformanceError(
                f"{where}: the prompt's ids are {_some(given.ids)} and the trainer would feed {_some(right.ids)}: the "
                "writer must feed the ids of `prompt_segments`, and neither encode nor expand them again"
            )


def _check_media(segment: Segment, policy: Policy, where: str) -> None:
    if segment.modality in IMAGES and segment.image is None:
        raise ConformanceError(
            f"{where}: its image is missing from the record; neither reward nor trainer would see what was there"
        )
    if segment.modality is Modality.VIDEO_FRAMES and segment.frames is None:
        raise ConformanceError(f"{where}: its frames are missing from the record")
    if segment.modality is Modality.IMAGE_LATENT and segment.latent is None:
        raise ConformanceError(f"{where}: its latent is missing from the record; later segments are conditioned on it")
    imaging = policy.vocabulary.imaging
    if segment.modality is Modality.IMAGE_TOKENS and isinstance(imaging, Codes):
        count = int(np.isin(segment.ids, imaging.ids).sum())
        if count != imaging.count:
            raise ConformanceError(f"{where}: it has {count} visual codes; an image has {imaging.count}")


def _check_decisions(segment: Segment, number: int, policy: Policy, where: str) -> None:
    decisions = segment.decisions
    if decisions is None:
        raise ConformanceError(f"{where}: the policy wrote it, and no decision is recorded")
    if not segment.contexts or segment.contexts[0].branch != "full":
        raise ConformanceError(f"{where}: the context that it was conditioned on is not recorded")
    late = [p.segment for context in segment.contexts for p in context.pieces if not 0 <= p.segment < number]
    if late:
        raise ConformanceError(f"{where}: its context names segment {late[0]}, which does not come before it")
    sampling, count = decisions.sampling, len(decisions)
    lengths: Mapping[str, int] = {
        "positions": len(decisions.position_N),
        "log-probs": len(decisions.logprob_N),
        "temperatures": len(sampling.temperature_N),
        "allowed sets": len(sampling.allowed_N),
    }
    for name, length in lengths.items():
        if length != count:
            raise ConformanceError(f"{where}: {count} decisions, but {length} {name}: each has its sampling parameters")
    flow_N = decisions.kind_N == DecisionKind.FLOW
    if not np.isfinite(decisions.logprob_N[~sampling.greedy_N]).all():
        raise ConformanceError(f"{where}: a decision's log-prob is missing or not finite")
    if (decisions.logprob_N[~flow_N & ~sampling.greedy_N] > 1e-4).any():
        raise ConformanceError(f"{where}: a log-prob is above 0: it is not that of an id among others")
    for position in (decisions.position_N[~flow_N], decisions.position_N[flow_N]):
        if (np.diff(position) <= 0).any() or (position < 0).any():
            raise ConformanceError(f"{where}: its decisions' positions are not in order")
    _check_allowed(segment, policy, where)
    if flow_N.any() or segment.flow is not None:
        _check_flow(segment, int(flow_N.sum()), where)


def _check_allowed(segment: Segment, policy: Policy, where: str) -> None:
    decisions = segment.decisions
    assert decisions is not None
    sampling = decisions.sampling
    for n in np.flatnonzero(decisions.kind_N != DecisionKind.FLOW):
        number = int(sampling.allowed_N[n])
        if number >= len(sampling.sets):
            raise ConformanceError(f"{where}: decision {n} names the allowed set {number} of {len(sampling.sets)}")
        chosen = int(segment.ids[decisions.position_N[n]])
        if number >= 0 and not mask_of(sampling.sets[number], policy.vocabulary.size)[chosen]:
            raise ConformanceError(f"{where}: decision {n} chose id {chosen}, which is not in its allowed set")


def _check_flow(segment: Segment, decided: int, where: str) -> None:
    """The latents of a denoised image are those around its stochastic steps, and its times reach from noise to 0."""
    flow = segment.flow
    if flow is None:
        raise ConformanceError(f"{where}: {decided} denoising steps are decisions, and none is recorded")
    try:
        sampler_of(flow.sampler)
    except UserError as error:
        raise ConformanceError(f"{where}: the sampler of its denoising steps cannot be replayed: {error}") from None
    if len(flow.point_N) != decided:
        raise ConformanceError(
            f"{where}: {decided} denoising steps are decisions, and latents are recorded for {len(flow.point_N)}: the "
            "sampler's own trace was lost on the way, or another one took its place"
        )
    if decided and int(flow.point_N.max()) + 1 >= len(flow.x_P):
        raise ConformanceError(
            f"{where}: {len(flow.x_P)} latents are recorded, and {int(flow.point_N.max()) + 2} lie around its "
            f"{decided} stochastic steps: the sampler's own trace was cut on the way, or another one took its place"
        )
    steps = len(flow.time_M) - 1
    assert segment.decisions is not None
    position = segment.decisions.position_N[segment.decisions.kind_N == DecisionKind.FLOW]
    if (np.diff(flow.time_M) >= 0).any() or flow.time_M[-1] != 0 or (len(position) and int(position[-1]) >= steps):
        raise ConformanceError(
            f"{where}: the {len(flow.time_M)} recorded times are not those of a schedule from noise down to 0 that "
            f"holds step {int(position[-1]) if len(position) else 0}"
        )
    if not np.isfinite(flow.x_P).all():
        raise ConformanceError(f"{where}: a recorded latent is not finite")


def _some(ids: np.ndarray) -> str:
    shown = ", ".join(str(int(id)) for id in ids[:8])
    return f"[{shown}{', ...' if len(ids) > 8 else ''}] ({len(ids)})"
