"""What breaks the grammar in a finished trajectory, and what would have been right.

It reads the text of segments, not ids, so that a tag which shares a token with its neighbour is still read whole:
neighbouring text segments are joined, read afresh, and compared with the roles they were recorded in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from formats.base import Violation
from formats.grammar import END, OTHER, START, Grammar, Role
from record.trajectory import Author, Modality, Segment, Trajectory


def bodies(role: Role, text: str) -> dict[str, str]:
    """What a text segment says, by tag name ("ins" for "<ins>"); an untagged role's whole text under its own name.

    Lenient, for rewards that judge malformed thoughts too: an unclosed body runs to the end of the text, a missing one
    is left out.
    """
    if not role.tags:
        return {role.name: text.strip()}
    found, position = {}, 0
    for opening, closing in role.tags:
        start = text.find(opening, position)
        if start < 0:
            continue
        start += len(opening)
        stop = text.find(closing, start)
        position = len(text) if stop < 0 else stop + len(closing)
        found[opening.strip("<>")] = text[start : stop if stop >= 0 else None].strip()
    return found


def violations(grammar: Grammar, trajectory: Trajectory) -> list[Violation]:
    """Empty if and only if what was written after the prompt is a whole sentence of the grammar.

    A trajectory that a limit stopped is not whole: it has one violation, at its last segment, that says so, and
    whatever was wrong before.
    """
    check = _Check(grammar, trajectory)
    check.read()
    return check.found


@dataclass(frozen=True)
class _Run:
    """Neighbouring text segments as one text."""

    indices: tuple[int, ...]
    segments: tuple[Segment, ...]
    text: str

    def segment_at(self, position: int) -> int:
        """Index in the trajectory of the segment that holds a character."""
        start = 0
        for index, segment in zip(self.indices, self.segments, strict=True):
            start += len(segment.text)
            if position < start:
                return index
        return self.indices[-1]


class _Check:
    def __init__(self, grammar: Grammar, trajectory: Trajectory) -> None:
        self.grammar, self.trajectory = grammar, trajectory
        self.found: list[Violation] = []
        self.position = START  # the last role that was read
        self.answerable = START  # the last role of the policy's
        self.tag = re.compile("|".join(map(re.escape, grammar.tags)) or r"(?!)")

    def add(self, segment: int | None, message: str) -> None:
        self.found.append(Violation(segment, message))

    def read(self) -> None:
        last: int | None = None
        images = 0
        sizes: dict[int, int] = {}
        for item in self._items():
            if isinstance(item, _Run):
                last = item.indices[-1]
                self._read_run(item)
            elif self.trajectory.segments[item].author is Author.ENVIRONMENT:
                last = item
                self._read_answer(item, self.trajectory.segments[item].role)
            else:
                last, images = item, images + 1
                segment = self.trajectory.segments[item]
                if segment.modality is Modality.IMAGE_TOKENS and len(segment.ids):  # else its codes come later
                    sizes[item] = len(segment.ids)
                self._read_image(item, segment, images)
        for index, size in sizes.items():
            if size != max(sizes.values()):
                self.add(
                    index,
                    f"the image of '{self.trajectory.segments[index].role}' has {size} ids; "
                    f"the others have {max(sizes.values())}",
                )
        self._read_end(last, images)

    def _items(self) -> Iterator[_Run | int]:
        """Runs of the policy's text, and the indices of its images and of what the environment said, in order."""
        indices: list[int] = []
        segments = self.trajectory.segments
        for index, segment in enumerate([*segments, None]):
            own = segment is not None and segment.author is Author.POLICY
            text = own and segment is not None and segment.modality is Modality.TEXT
            if text:
                indices.append(index)
            elif indices:
                of = tuple(segments[i] for i in indices)
                yield _Run(tuple(indices), of, "".join(s.text for s in of))
                indices = []
            if segment is not None and not text and segment.author is not Author.USER:
                yield index

    def _may_follow(self) -> list[str]:
        """What may come here. A call that was answered with nothing is followed as if it had been answered."""
        names = list(self.grammar.follow[self.position])
        return [*names, *self.grammar.followers(names)] if self.position in self.grammar.calls else names

    def _expected(self) -> str:
        return self.grammar.describe(self.grammar.follow[self.position])

    def _read_answer(self, index: int, role: str) -> None:
        """What the environment said is not read: it may say anything. Only its role has a place in the grammar."""
        declared = self.grammar.by_name.get(role)
        if declared is None or declared.by_policy:
            self.add(index, f"the environment speaks in the role '{role}', which is none of its; {self._expected()}")
        elif role not in (*self.grammar.follow[self.position], *self._answers()):
            self.add(index, f"the environment ({role}) follows '{self.position}'; expected {self._expected()}")
        else:
            self.position = role

    def _answers(self) -> list[str]:
        """The roles in which the last call may still be answered: by several segments, where it was by one."""
        by_name = self.grammar.by_name
        if self.position not in by_name or by_name[self.position].by_policy:
            return []
        return [name for name in self.grammar.follow[self.answerable] if name != END and not by_name[name].by_policy]

    def _read_image(self, index: int, segment: Segment, images: int) -> None:
        role = self.grammar.by_name.get(segment.role)
        if role is None or not role.is_image or not role.by_policy:
            self.add(
                index,
                f"an image in the role '{segment.role}', which is none of an image; expected {self._expected()}",
            )
            return
        if segment.role not in self._may_follow():
            self.add(index, f"an image ({segment.role}) follows '{self.position}'; expected {self._expected()}")
        if images > self.grammar.max_images:
            self.add(index, f"image {images} ({segment.role}); at most {self.grammar.max_images} are allowed")
        if not len(segment.ids) and segment.image is None and segment.latent is None:
            self.add(index, f"'{segment.role}' holds no image")
        self.position = self.answerable = segment.role

    # ---- text ----

    def _read_run(self, run: _Run) -> None:
        before = len(self.found)
        read = self._read_text(run)
        named = [
            (i, s.role)
            for n, (i, s) in enumerate(zip(run.indices, run.segments, strict=True))
            if s.role != END and not self._goes_on(run, n)
        ]
        for n, (index, segment) in enumerate(zip(run.indices, run.segments, strict=True)):
            if segment.role == END and index != len(self.trajectory.segments) - 1:
                self.add(index, "the turn ended here, but more follows; expected nothing")
            elif segment.role != END and not segment.text.strip() and not self._goes_on(run, n):
                self.add(index, f"'{segment.role}' is empty; expected {self._expected()}")
        if len(self.found) == before and [role for _, role in named] != read:
            self.add(
                run.indices[0],
                f"recorded as {', '.join(role for _, role in named) or 'nothing'}; the text reads "
                f"{', '.join(read) or 'nothing'}",
            )

    def _goes_on(self, run: _Run, n: int) -> bool:
        """Whether a segment goes on with the one before it: untagged words that a fork took up after its parent's."""
        role = self.grammar.by_name.get(run.segments[n].role)
        return n > 0 and role is not None and role.is_free and run.segments[n - 1].role == role.name

    def _read_text(self, run: _Run) -> list[str]:
        """Read a run from its start; returns the roles that it holds."""
        text, position = run.text, 0
        read: list[str] = []
        while True:
            position += len(text) - position - len(text[position:].lstrip())
            if position >= len(text):
                return read
            opening = next((tag for tag in self.grammar.openings if text.startswith(tag, position)), None)
            free = next(
                (name for name in self._may_follow() if name != END and self.grammar.by_name[name].is_free),
                None,
            )
            if opening is not None:
                role = self.grammar.openings[opening]
                here = run.segment_at(position + len(opening) - 1)
                if role.name not in self._may_follow():
                    self.add(here, f"{opening} ({role.name}) follows '{self.position}'; expected {self._expected()}")
                self.position = self.answerable = role.name
                read.append(role.name)
                position = self._read_bodies(run, role, here, position)
            elif free is not None:
                self.position = self.answerable = free
                read.append(free)
                stray = self.tag.search(text, position)
                if stray:
                    self.add(run.segment_at(stray.start()), f"stray {stray[0]} inside '{free}', which has no tags")
                return read
            else:
                rest = next(
                    (m.start() for m in self.tag.finditer(text, position + 1) if m[0] in self.grammar.openings),
                    len(text),
                )
                excerpt = text[position:rest].strip()
                excerpt = excerpt if len(excerpt) <= 40 else excerpt[:37] + "..."
                self.add(
                    run.segment_at(position),
                    f"'{excerpt}' stands outside any role ({OTHER}); expected {self._expected()}",
                )
                position = rest

    def _read_bodies(self, run: _Run, role: Role, here: int, position: int) -> int:
        """Read a tagged role whose opening tag stands at `position`; returns where reading goes on."""
        text = run.text
        for opening, closing in role.tags:
            position += len(text) - position - len(text[position:].lstrip())
            if not text.startswith(opening, position):
                self.add(here, f"'{role.name}' lacks {opening}, which is expected after {self._before(role, opening)}")
                return self._next_opening(text, position)
            position += len(opening)
            body = position
            while True:
                tag = self.tag.search(text, position)
                if tag is None:
                    self.add(here, f"'{role.name}' lacks {closing}, which closes {opening}")
                    return len(text)
                if tag[0] == closing:
                    break
                self.add(run.segment_at(tag.start()), f"stray {tag[0]} inside '{role.name}'; expected {closing}")
                position = tag.end()
            if not text[body : tag.start()].strip():
                self.add(here, f"'{role.name}': nothing stands between {opening} and {closing}")
            position = tag.end()
        return position

    @staticmethod
    def _before(role: Role, opening: str) -> str:
        tags = [tag for pair in role.tags for tag in pair]
        return tags[tags.index(opening) - 1]

    def _next_opening(self, text: str, position: int) -> int:
        return next((m.start() for m in self.tag.finditer(text, position) if m[0] in self.grammar.openings), len(text))

    # ---- the end ----

    def _read_end(self, last: int | None, images: int) -> None:
        stop = self.trajectory.stop
        broken = [v for v in self.found if v.segment == last]
        if stop.cut_off:
            self.found = [v for v in self.found if v.segment != last]
            if last is None:
                self.add(None, f"stopped by {stop} before anything was written; expected {self._expected()}")
            elif broken:
                role = self.trajectory.segments[last].role
                self.add(last, f"stopped by {stop} inside {role}: {broken[-1].message}")
            else:
                self.add(last, f"stopped by {stop} after {self.position}; expected {self._expected()}")
        elif last is None:
            self.add(None, f"nothing was written; expected {self._expected()}")
        elif END not in self._may_follow() and not broken:
            self.add(last, f"the turn ends after '{self.position}'; expected {self._expected()}")
        elif images < self.grammar.min_images:
            self.add(last, f"the turn ends with {images} images; at least {self.grammar.min_images} are asked for")
