"""The full constraint: only well-formed sentences can be written, and there is always a way to the end.

Tags are tries over their canonical ids; bodies are free of anything that could begin a tag; a body that has reached
its limit can only be closed; a branch that needs more images than are left is not offered. Where there is only one
way the id is forced, and so no decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from formats.base import AllowedSet
from formats.cursor import ImagesCursor
from formats.grammar import END, Role
from formats.lexicon import Lexicon


@dataclass(eq=False)
class Node:
    """A state between two ids. `children` name the ids of tags and markers; any other allowed id leads to `body`."""

    children: dict[int, Node] = field(default_factory=dict)
    body: Node | None = None
    free: tuple[str, list[int]] = ("", [])  # name and ids of what leads to `body`
    limit: int = 0  # ids that a body may have, where this state is inside one
    closing: Node | None = None  # the state once the limit is reached
    next: bool = False  # a segment ends here: the cursor looks up what may follow
    allowed: AllowedSet | None = None
    forced: int | None = None


NEXT = Node(next=True)


class Automaton:
    """The states of one grammar over one vocabulary, built as they are reached."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.grammar = lexicon.grammar
        self._between: dict[tuple[tuple[str, ...], int], Node] = {}
        self._bodies: dict[tuple[str, int, int], Node] = {}

    def between(self, positions: tuple[str, ...], images: int) -> Node:
        """The state after a segment of one of the roles `places`, `images` images having been begun."""
        node = self._between.get((positions, images))
        if node is None:
            node = Node()
            free = self._offer(node, positions, images)
            if free is not None:
                node.body, node.free = self._plain_body(free, images), ("visible", self.lexicon.visible)
            self._between[positions, images] = self._seal(node)
        return node

    def _offer(self, node: Node, positions: Iterable[str], images: int) -> Role | None:
        """Add the ways on from `places` to the node; returns the untagged text role among them."""
        free = None
        vocabulary = self.lexicon.vocabulary
        for name in self.grammar.affordable(self.grammar.followers(positions), images):
            if name == END:
                assert vocabulary.eos is not None
                self._path(node, (vocabulary.eos,), NEXT)
                continue
            role = self.grammar.by_name[name]
            if not role.by_policy:
                continue
            if role.is_image:
                assert self.lexicon.open is not None, "images without a marker begin by themselves"
                node.children[self.lexicon.open] = NEXT  # several image roles share the marker
            elif role.tags:
                self._path(node, self.lexicon.spell(role.tags[0][0]), self._tagged_body(role, 0))
            else:
                free = role
        return free

    def _tagged_body(self, role: Role, block: int) -> Node:
        key = (role.name, block, 0)
        if key not in self._bodies:
            closing = self.lexicon.spell(role.tags[block][1])
            if block + 1 < len(role.tags):
                closing += self.lexicon.spell(role.tags[block + 1][0])
                after = self._tagged_body(role, block + 1)
            else:
                after = NEXT
                if role.ends_turn:
                    assert self.lexicon.vocabulary.eos is not None
                    closing += (self.lexicon.vocabulary.eos,)
            rest, close = Node(limit=role.max_tokens), Node()
            self._path(rest, closing, after)
            self._path(close, closing, after)
            rest.body, rest.free, rest.closing = rest, ("body", self.lexicon.body), self._seal(close)
            self._seal(rest)
            first = Node(body=rest, free=("visible", self.lexicon.visible), limit=role.max_tokens, closing=rest.closing)
            self._bodies[key] = self._seal(first)
        return self._bodies[key]

    def _plain_body(self, role: Role, images: int) -> Node:
        key = (role.name, -1, images)
        if key not in self._bodies:
            rest, close = Node(limit=role.max_tokens), Node()
            self._offer(rest, (role.name,), images)
            self._offer(close, (role.name,), images)
            rest.body, rest.free, rest.closing = rest, ("body", self.lexicon.body), self._seal(close)
            self._bodies[key] = self._seal(rest)
        return self._bodies[key]

    def _path(self, node: Node, ids: tuple[int, ...], target: Node) -> None:
        for id in ids[:-1]:
            node = node.children.setdefault(id, Node())
        node.children[ids[-1]] = target

    def _seal(self, node: Node) -> Node:
        """Fix the allowed sets of a finished node and of the tag tries below it."""
        if node.allowed is None and not node.next:
            name = "+".join(filter(None, [node.free[0], *map(str, sorted(node.children))]))
            node.allowed = self.lexicon.intern(name, [*node.free[1], *node.children])
            if node.body is None and len(node.children) == 1:
                node.forced = next(iter(node.children))
            for child in node.children.values():
                self._seal(child)
        return node


class FullCursor(ImagesCursor):
    """A cursor under which every turn that ends by itself is well formed."""

    def __init__(self, automaton: Automaton) -> None:
        super().__init__(automaton.lexicon)
        self._automaton = automaton
        self._count = 0  # ids in the open body
        self._look_on()

    def _look_on(self) -> None:
        """Between two segments: what may follow. Nothing is looked up where no id decides it."""
        if not (self.in_image or self.stopped or self.awaits):
            self._node, self._count = self._automaton.between(self._positions, self.images), 0

    def observe(self, role: str) -> None:
        super().observe(role)
        self._look_on()

    def end_image(self) -> None:
        super().end_image()
        self._look_on()

    def forced(self) -> int | None:
        if self.in_image:
            return self._eoi if self._left == 0 else None
        return self._node.forced

    def allowed(self) -> AllowedSet:
        if self.in_image:
            return self._lexicon.codes
        assert self._node.allowed is not None, "the turn has ended"
        return self._node.allowed

    def advance(self, id: int) -> None:
        if self.in_image:
            super().advance(id)
            self._look_on()
            return
        node = self._node
        following = node.children.get(id)
        in_body = following is None
        if following is None:
            following = node.body
        if following is None:
            raise ValueError(f"id {id} was not allowed here")
        super().advance(id)
        if in_body:
            self._count += 1
            if self._count >= following.limit and following.closing is not None:
                following = following.closing
        else:
            self._count = 0
        self._node = following
        if following.next:
            self._look_on()
