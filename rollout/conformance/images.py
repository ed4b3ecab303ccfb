"""Trajectories with another image in each one's context: if the image conditions what follows, log-probs change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from formats.base import Codes
from policy.base import Policy
from record.trajectory import Frames, Modality, Segment, Trajectory
from rollout.conformance.record import IMAGES

SEEN = (*IMAGES, Modality.VIDEO_FRAMES)


def scored_segments(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """int [N, 2]: trajectory and segment of every decision that `Policy.score` scores, in its order."""
    places = [
        (number, index)
        for number, trajectory in enumerate(trajectories)
        for index, segment in enumerate(trajectory.segments)
        if segment.trained and segment.decisions is not None
        for _ in range(int((~segment.decisions.sampling.greedy_N).sum()))
    ]
    return np.array(places, np.int64).reshape(-1, 2)


def swap_images(trajectories: Sequence[Trajectory], policy: Policy) -> tuple[list[Trajectory], np.ndarray]:
    """Copies whose images and frames are others, and bool [N]: the decisions that see one of them.

    Visual codes become the codes half the codebook away, latents and pixels their negatives. Decisions inside a swapped
    image are not among those that see it: what they chose has changed, too.
    """
    swapped, seen = [], []
    for trajectory in trajectories:
        changed = {i for i, segment in enumerate(trajectory.segments) if segment.modality in SEEN}
        others = [_other(s, policy) if i in changed else s for i, s in enumerate(trajectory.segments)]
        given = [s for s in others if s.modality in (Modality.IMAGE, Modality.VIDEO_FRAMES)]
        if given:
            policy.perceive(given)
        swapped.append(replace(trajectory, segments=others))
        seen.append(
            {
                i
                for i, segment in enumerate(trajectory.segments)
                if i not in changed and any(p.segment in changed for c in segment.contexts[:1] for p in c.pieces)
            }
        )
    places = scored_segments(trajectories)
    return swapped, np.array([segment in seen[trajectory] for trajectory, segment in places], bool)


def _other(segment: Segment, policy: Policy) -> Segment:
    image = None if segment.image is None else (255 - segment.image).astype(np.uint8)
    latent = None if segment.latent is None else -segment.latent
    frames = segment.frames
    if frames is not None:
        frames = Frames((255 - frames.frames_F).astype(np.uint8), frames.time_F)
    ids, imaging = segment.ids.copy(), policy.vocabulary.imaging
    if segment.modality is Modality.IMAGE_TOKENS and isinstance(imaging, Codes):
        order = np.argsort(imaging.ids)
        is_code = np.isin(ids, imaging.ids)
        code = order[np.searchsorted(imaging.ids[order], ids[is_code])]
        ids[is_code] = imaging.ids[(code + len(imaging.ids) // 2) % len(imaging.ids)]
        image = policy.decode_images([ids[is_code]])[0]
    return replace(segment, ids=ids, image=image, latent=latent, frames=frames)
