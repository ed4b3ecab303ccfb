"""A thought that goes on with another picture in the place of one that it drew, under the noise that it went on with.

What follows an image is a function of what stands before and of the noise, which (seed, group, member, decision) names.
So the arms of one image differ by the image alone:

    own       the picture as it was drawn
    sibling   what another member of the group drew in the same role and occurrence
    blank     a picture of one colour, as the family encodes it
    other     what a member of another prompt's group drew there

An arm's record has the picture in the place of the parent's, as one that nobody sampled, and names the arm in
`Trajectory.info`. It is judged as any thought is, and never trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from formats.base import Codes
from formats.segments import image_content
from policy.base import Policy
from record.trajectory import Author, Segment, Trajectory
from rollout.forks import fork
from rollout.requests import RolloutRequest

OWN, SIBLING, BLANK, OTHER = "own", "sibling", "blank", "other"
ARMS = (SIBLING, BLANK, OTHER)
WHITE = 255  # of the blank picture's channels

Group = Sequence[Trajectory]


@dataclass(frozen=True)
class Counterfactual:
    """One arm of one image: what it is asked for by. The members of the request are its draws of the noise."""

    trajectory: Trajectory
    segment: int  # the image
    arm: str
    request: RolloutRequest


@dataclass(frozen=True)
class Asked:
    """The arms of some groups' images, and how many images had nothing to put in their place, by arm."""

    arms: list[Counterfactual]
    lacking: Counter[str]


def images_gone_on_from(trajectory: Trajectory) -> list[int]:
    """The segments of the images that the policy drew itself and wrote something after. What ends a thought is not
    thought with; an image that the environment answers is left out too, for the answer is not the policy's."""
    first, segments = trajectory.parent[1] if trajectory.parent else 0, trajectory.segments
    return [
        index
        for index in range(first, len(segments) - 1)
        if segments[index].author is Author.POLICY
        and segments[index].image is not None
        and segments[index + 1].author is Author.POLICY
    ]


def counterfactuals(
    groups: Sequence[Group], arms: Sequence[str], draws: int, policy: Policy, members: int | None = None
) -> Asked:
    """The requests for every image of the groups' members that was gone on from, `draws` continuations each.

    The first draw has the member's own noise, so that the own arm's is the member itself and is not asked for; the
    further ones have the noise of numbers that no member has.

    Args:
        arms: of ARMS.
        policy: encodes the blank picture.
        members: of each group, the first ones; None: all.
    """
    requests: list[Counterfactual] = []
    lacking = Counter[str]()
    blanks: dict[tuple[int, ...], Segment] = {}
    for place, group in enumerate(groups):
        size = 1 + max(trajectory.member for trajectory in group)
        for trajectory in sorted(group, key=lambda t: t.member)[:members]:
            numbers = [trajectory.member + draw * size for draw in range(draws)]
            for segment in images_gone_on_from(trajectory):
                asked = []
                for arm in arms:
                    picture: Segment | None
                    if arm == BLANK:
                        picture = _blank(trajectory.segments[segment], policy, blanks)
                    else:
                        donors = [group] if arm == SIBLING else [*groups[place + 1 :], *groups[:place]]
                        picture = _donated(trajectory, segment, donors, arm)
                    if picture is None:
                        lacking[arm] += 1
                    else:
                        asked.append(_request(trajectory, segment, arm, numbers, picture))
                if asked and draws > 1:
                    requests.append(_request(trajectory, segment, OWN, numbers[1:], None))
                requests += asked
    return Asked(requests, lacking)


def _request(
    trajectory: Trajectory, segment: int, arm: str, numbers: Sequence[int], picture: Segment | None
) -> Counterfactual:
    request = fork(trajectory, segment + 1, numbers)
    decided = sum(len(s.decisions) for s in request.prefix if s.decisions is not None and s.author is Author.POLICY)
    if picture is not None:
        request = replace(request, prefix=(*request.prefix[:-1], _in_place(trajectory.segments[segment], picture)))
    return Counterfactual(trajectory, segment, arm, replace(request, arm=arm, decided=decided))


def _in_place(own: Segment, picture: Segment) -> Segment:
    """The segment with another's picture, which nobody sampled there."""
    return replace(
        own,
        trained=False,
        ids=picture.ids,
        latent=picture.latent,
        image=picture.image,
        decisions=None,
        flow=None,
        contexts=(),
    )


def _donated(trajectory: Trajectory, segment: int, groups: Sequence[Group], arm: str) -> Segment | None:
    """The picture of the same role and occurrence that the next member (of the next group with another prompt) drew."""
    role, occurrence = trajectory.segments[segment].role, trajectory.occurrence(segment)
    for group in groups:
        ordered = sorted(group, key=lambda t: (t.member <= trajectory.member, t.member))
        for other in ordered:
            if other is trajectory or (arm == OTHER and other.prompt == trajectory.prompt):
                continue
            for index, one in enumerate(other.segments):
                if one.role == role and one.author is Author.POLICY and one.image is not None:
                    if other.occurrence(index) == occurrence:
                        return one
    return None


def _blank(own: Segment, policy: Policy, known: dict[tuple[int, ...], Segment]) -> Segment:
    """A white picture in the place of an image, by the family's own encoder and decoder."""
    assert own.image is not None
    shape = own.image.shape
    if shape not in known:
        (content,) = policy.encode_images([np.full(shape, WHITE, np.uint8)])
        (image,) = policy.decode_images([content])
        imaging, ids = policy.vocabulary.imaging, own.ids
        if isinstance(imaging, Codes):
            first = int(imaging.open is not None)
            ids = own.ids.copy()
            ids[first : first + imaging.count] = content
            known[shape] = replace(own, ids=ids, image=image)
        else:
            known[shape] = replace(own, latent=np.asarray(content, np.float32), image=image)
            assert image_content(known[shape], policy.vocabulary).shape == image_content(own, policy.vocabulary).shape
    return known[shape]
