"""The declaration of a way of thinking: its roles, their tags, and which may follow which.

Everything else in this package reads a `Grammar`: cursor.py and constrained.py decode by it, render.py writes
demonstrations by it, check.py says what breaks it, declared.py turns it into a Format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from record.trajectory import Author, Modality
from runtime.errors import UserError, nearest

START, END = "start", "end"  # places before the first and after the last segment
PROMPT, NEGATIVE, OTHER, BETWEEN = "prompt", "negative", "other", "between"
RESERVED = {START, END, PROMPT, NEGATIVE, OTHER, BETWEEN}


@dataclass(frozen=True)
class Role:
    """One kind of segment. A text role is a run of tagged bodies, or free text where `tags` is empty."""

    name: str
    modality: Modality = Modality.TEXT
    tags: tuple[tuple[str, str], ...] = ()  # (opening, closing) of each body, in order
    author: Author = Author.POLICY
    trained: bool = True
    ends_turn: bool = False  # closes with the end-of-turn id, after which the environment speaks (a chat's tool call)
    max_tokens: int = 128  # of one body, where decoding is fully constrained
    label: str = ""  # what the report calls it; the name by default
    color: str = "grey"  # color class in the report

    @property
    def is_image(self) -> bool:
        return self.modality is not Modality.TEXT

    @property
    def is_free(self) -> bool:
        return self.by_policy and self.modality is Modality.TEXT and not self.tags

    @property
    def by_policy(self) -> bool:
        return self.author is Author.POLICY


@dataclass(frozen=True)
class RoleDisplay:
    """How the report shows a role."""

    role: str
    label: str
    color: str  # a class name, not a color value: the style sheet decides


@dataclass(frozen=True)
class Grammar:
    """Roles and their order. `follow` maps a role (or "start") to the roles (or "end") that may come next.

    Raises:
        UserError: the declaration cannot be decoded: an unknown or unreachable role, a tag used twice, a role from
            which no end can be reached, free text followed by text (nothing would mark the border), or limits that no
            turn keeps.
    """

    name: str
    roles: tuple[Role, ...]
    follow: Mapping[str, tuple[str, ...]]
    max_images: int
    min_images: int = 0  # the policy cannot end a turn before it has drawn so many

    def __post_init__(self) -> None:
        names = [role.name for role in self.roles]
        for name in names:
            if name in RESERVED or names.count(name) > 1:
                raise UserError(f"format '{self.name}': the role name '{name}' is reserved or declared twice")
        for name in [START, *names]:
            if not self.follow.get(name):
                raise UserError(f"format '{self.name}': nothing may follow '{name}'; name a role or '{END}'")
        for name, followers in self.follow.items():
            for other in (name, *followers):
                if other not in (START, END) and other not in names:
                    raise UserError(f"format '{self.name}': no role '{other}'; {nearest(other, names)}")
            if END in followers and name == START:
                raise UserError(f"format '{self.name}': a turn cannot end before it has begun")
            if (
                name != START
                and self.by_name[name].is_free
                and any(f != END and self.by_name[f].by_policy and not self.by_name[f].is_image for f in followers)
            ):
                raise UserError(
                    f"format '{self.name}': text may not follow the untagged text '{name}', "
                    "for nothing marks the border; give a role tags"
                )
            if sum(f != END and self.by_name[f].is_free for f in followers) > 1:
                raise UserError(
                    f"format '{self.name}': two untagged text roles may follow '{name}'; nothing tells them apart"
                )
            if name == START and any(not self.by_name[f].by_policy for f in followers if f != END):
                raise UserError(f"format '{self.name}': the environment cannot speak first; begin with the policy")
        self._check_calls()
        tags = self.tags
        for tag in tags:
            if len(tag) < 2 or tag != tag.strip() or tags.count(tag) > 1:
                raise UserError(
                    f"format '{self.name}': the tag '{tag}' is shorter than two characters, padded or used twice"
                )
            if any(other != tag and other.startswith(tag) for other in tags) or any(
                character in self.tag_starts for character in tag[1:]
            ):
                raise UserError(
                    f"format '{self.name}': the tag '{tag}' begins another tag, or a tag's first character "
                    "occurs inside it; such tags cannot be told apart as they are written"
                )
        for name in [START, *names]:
            if math.isinf(self.images_needed[name]):
                raise UserError(f"format '{self.name}': no way leads from '{name}' to the end")
        if self.images_needed[START] > self.max_images:
            raise UserError(
                f"format '{self.name}': needs at least {self.images_needed[START]:.0f} images, "
                f"max_images is {self.max_images}"
            )
        if not self.affordable([START], 0):
            raise UserError(
                f"format '{self.name}': no turn has {self.min_images} to {self.max_images} images (min_images, "
                f"max_images); it may have {', '.join(map(str, sorted(self.image_counts[START])))}"
            )

    def _check_calls(self) -> None:
        for role in self.roles:
            answered = [f for f in self.follow[role.name] if f != END and not self.by_name[f].by_policy]
            if role.by_policy and answered and role.name not in self.calls:
                raise UserError(
                    f"format '{self.name}': after '{role.name}' either the environment speaks ('{answered[0]}') or the "
                    "policy goes on, and nothing says which; let all that may follow be the environment's"
                )
            if role.by_policy and answered and not role.tags and not role.ends_turn:
                raise UserError(
                    f"format '{self.name}': nothing closes the untagged '{role.name}', so the environment is never "
                    "asked; give it tags, or ends_turn"
                )
            if role.by_policy and answered and role.is_image:
                raise UserError(f"format '{self.name}': an image ('{role.name}') calls no tool; put words after it")
            if role.ends_turn and not answered:
                raise UserError(
                    f"format '{self.name}': '{role.name}' ends the turn, but no role of the environment follows it"
                )

    @cached_property
    def by_name(self) -> dict[str, Role]:
        return {role.name: role for role in self.roles}

    @property
    def tags(self) -> list[str]:
        """Every tag, in the order of declaration: what a small tokenizer makes single tokens of."""
        return [tag for role in self.roles if role.by_policy for pair in role.tags for tag in pair]

    @cached_property
    def tag_starts(self) -> frozenset[str]:
        return frozenset(tag[0] for tag in self.tags)

    @cached_property
    def openings(self) -> dict[str, Role]:
        return {role.tags[0][0]: role for role in self.roles if role.tags and role.by_policy}

    @cached_property
    def images_needed(self) -> dict[str, float]:
        """By role: the fewest images of a turn from this role (its own included) to the end."""
        needed: dict[str, float] = {name: math.inf for name in (START, *self.by_name)}
        needed[END] = 0
        for _ in range(len(needed)):  # shortest paths settle within as many rounds as there are places
            for name in needed:
                if name != END:
                    own = name != START and self.by_name[name].is_image and self.by_name[name].by_policy
                    needed[name] = own + min(needed[follower] for follower in self.follow[name])
        return needed

    @cached_property
    def image_counts(self) -> dict[str, frozenset[int]]:
        """By role: how many images a turn may have from this role (its own included) to the end, up to max_images."""
        counts: dict[str, frozenset[int]] = {name: frozenset() for name in (START, *self.by_name)}
        counts[END] = frozenset({0})
        settled = False
        while not settled:
            settled = True
            for name in (START, *self.by_name):
                own = name != START and self.by_name[name].is_image and self.by_name[name].by_policy
                found = {own + count for follower in self.follow[name] for count in counts[follower]}
                reached = frozenset(count for count in found if count <= self.max_images)
                settled &= reached == counts[name]
                counts[name] = reached
        return counts

    @property
    def drawn(self) -> list[Role]:
        """The roles in which the policy draws."""
        return [role for role in self.roles if role.is_image and role.by_policy]

    @property
    def written(self) -> list[Role]:
        """The roles in which the policy writes words."""
        return [role for role in self.roles if not role.is_image and role.by_policy]

    @cached_property
    def calls(self) -> frozenset[str]:
        """The roles after which nobody but the environment can speak."""
        return frozenset(
            role.name
            for role in self.roles
            if role.by_policy and all(f != END and not self.by_name[f].by_policy for f in self.follow[role.name])
        )

    def followers(self, positions: Iterable[str]) -> list[str]:
        """What may come after any of these places, in the order of declaration, each once."""
        return list(dict.fromkeys(follower for position in positions for follower in self.follow[position]))

    def affordable(self, names: Iterable[str], images: int) -> list[str]:
        """Those from which an end with min_images to max_images can be reached when `images` have been drawn."""
        if not self.min_images:
            return [name for name in names if images + self.images_needed[name] <= self.max_images]
        return [
            name
            for name in names
            if any(self.min_images <= images + count <= self.max_images for count in self.image_counts[name])
        ]

    def describe(self, names: Iterable[str]) -> str:
        """The followers in words: "<refine> (refine), an image (sketch) or the end"."""
        words = []
        for name in names:
            if name == END:
                words.append("the end")
            elif not self.by_name[name].by_policy:
                words.append(f"the environment ({name})")
            elif self.by_name[name].is_image:
                words.append(f"an image ({name})")
            elif self.by_name[name].is_free:
                words.append(f"text ({name})")
            else:
                words.append(f"{self.by_name[name].tags[0][0]} ({name})")
        return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)

    def with_limits(
        self,
        max_images: int | None,
        max_tokens: Mapping[str, int] | int | None,
        min_images: int | None = None,
    ) -> Grammar:
        """The same grammar under a recipe's limits. One number of tokens is for every text role.

        Raises:
            UserError: a limit for a role that does not exist or holds no text, or below one.
        """
        text = [role.name for role in self.written]
        limits = dict.fromkeys(text, max_tokens) if isinstance(max_tokens, int) else dict(max_tokens or {})
        for name, limit in limits.items():
            if name not in text:
                raise UserError(f"format '{self.name}': max_tokens: no text role '{name}'; {nearest(name, text)}")
            if limit < 1:
                raise UserError(f"format '{self.name}': max_tokens.{name} is {limit}; a body has at least one token")
        roles = tuple(replace(role, max_tokens=limits.get(role.name, role.max_tokens)) for role in self.roles)
        return replace(
            self,
            roles=roles,
            max_images=self.max_images if max_images is None else max_images,
            min_images=self.min_images if min_images is None else min_images,
        )
