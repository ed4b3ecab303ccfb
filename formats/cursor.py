"""One row's place in the grammar while it is written: segments recognised as they form, images exact.

`ImagesCursor` is the default constraint: words are free, an image is exactly N codes between its markers. Text is
read piece by piece, so that a tag may be one token or several. What fits no role becomes a segment of role "other".
constrained.py adds the full constraint on top.
"""

from __future__ import annotations

from collections.abc import Iterable

from formats.base import AllowedSet, Codes, Span
from formats.grammar import BETWEEN, END, OTHER, START, Role
from formats.lexicon import Lexicon
from record.trajectory import Modality

_SEEK, _BODY, _FREE, _PLAIN = range(4)
# _SEEK: between segments, an opening tag may come; _BODY: inside a tagged role, a certain tag is awaited;
# _FREE: text outside any role, which an opening tag ends; _PLAIN: untagged text, which only an image or the end ends


class ImagesCursor:
    """formats.base.Cursor. A text segment stays open, and takes in blanks and the end-of-turn token, until
    the next one begins; one that only the environment may follow closes with its own last id. An image closes with its
    end marker, or with its last code where the family has none; where it may have had either of two roles, its span is
    renamed in place once what follows has told them apart.
    """

    def __init__(self, lexicon: Lexicon) -> None:
        grammar, vocabulary = lexicon.grammar, lexicon.vocabulary
        self._lexicon, self._grammar = lexicon, grammar
        self._boi, self._eoi, self._eos = lexicon.open, lexicon.close, vocabulary.eos
        self._drawn = Modality.IMAGE_TOKENS if isinstance(lexicon.imaging, Codes) else Modality.IMAGE_LATENT
        self._codes_per_image = lexicon.imaging.count if isinstance(lexicon.imaging, Codes) else 0
        self._opens_with_image = all(grammar.by_name[name].is_image for name in grammar.follow[START])
        self._openings = tuple(grammar.openings)
        self.spans: list[Span] = []
        self.in_image = False
        self.stopped = False
        self.awaits = False  # the environment must speak before anything else
        self.images = 0
        self._length = 0
        self._left = 0  # codes that the open image still needs
        self._positions: tuple[str, ...] = (START,)  # the roles that the last recognised segment may have
        self._span: tuple[str, Modality, int] | None = None  # role, modality and start of the open segment
        self._unsure: Span | None = None  # the last image, while it may have any of the roles `_places`
        self._seek()
        self._go_on_without_marker()

    # ---- what may come next ----

    def forced(self) -> int | None:
        if self.in_image:
            return self._eoi if self._left == 0 else None
        if self._length == 0 and self._opens_with_image:
            return self._boi
        return None

    def allowed(self) -> AllowedSet:
        if self.in_image:
            return self._lexicon.codes
        if not self._may_end():
            return self._going_on()
        return self._lexicon.text if self.images < self._grammar.max_images else self._lexicon.words

    def _may_end(self) -> bool:
        """Whether the end-of-turn id may come: enough is drawn for the end, or it calls the environment."""
        if self.images >= self._grammar.min_images:
            return True
        role = self._grammar.by_name.get(self._span[0]) if self._span is not None else None
        stray = self._mode == _SEEK and self._pending is not None and not self._pending_blank
        return role is not None and role.ends_turn and self._mode in (_SEEK, _PLAIN) and not stray

    def _going_on(self) -> AllowedSet:
        """Too little is drawn for the end. Where the turn could end here, only what the grammar has follow instead may
        begin: what is left of a policy's choice when its end is taken away is seldom the beginning of anything."""
        followers = self._grammar.followers(self._positions)
        if self._mode == _SEEK and self._pending is None and END in followers:
            others = [name for name in followers if name != END]
            begins = self._lexicon.beginnings(tuple(self._grammar.affordable(others, self.images)))
            if begins is not None:
                return begins
        return self._lexicon.going_on

    @property
    def open_span(self) -> Span | None:
        """The segment being written, as far as it is recognised."""
        if self._span is None:
            return None
        role, modality, start = self._span
        return Span(role, modality, start, self._length)

    # ---- what came ----

    def advance(self, id: int) -> None:
        index = self._length
        self._length = index + 1
        if self.in_image:
            self._left -= 1
            if self._left < 0 or (self._left == 0 and self._eoi is None):  # its end marker, or its last code
                self._end_image(index + 1)
        elif self.stopped:
            raise ValueError("the turn has ended: nothing may follow its end")
        elif self.awaits:
            raise ValueError("the environment is to speak: observe() comes before anything else")
        elif id == self._boi:
            self._begin_image(index)
        elif id == self._eos:
            self._end_turn(index)
        else:
            self._read(id, index)

    def end_image(self) -> None:
        """The open image is done, though no id says so."""
        self._end_image(self._length)

    def observe(self, role: str) -> None:
        """The environment has spoken; `role` is that of its last segment."""
        self.awaits = False
        self._positions = (role,)
        self._seek(floor=self._length)
        self._go_on_without_marker()

    def stop(self) -> None:
        """Close the open segment, wherever it is: a limit was reached."""
        if not self.stopped:
            self._finish(self._length, ended=False)
            self.stopped = True

    # ---- segments ----

    def _seek(self, floor: int = 0) -> None:
        self._mode = _SEEK
        self._floor = floor  # the next segment may not begin before: that id completed a tag
        self._pending: int | None = None  # where text that is not yet recognised begins
        self._pending_blank = True
        self._partial, self._partial_start = "", 0  # the end of what was read, if a tag may have begun there
        free = self._free_follower()
        self.role = free if free is not None and not self._openings else BETWEEN

    def _free_follower(self) -> str | None:
        grammar = self._grammar
        return next(
            (name for name in grammar.followers(self._positions) if name != END and grammar.by_name[name].is_free), None
        )

    def _close(self, stop: int) -> None:
        if self._span is not None:
            role, modality, start = self._span
            if stop > start or modality is not Modality.TEXT:
                self.spans.append(Span(role, modality, start, stop))
            self._span = None

    def _resolve(self, following: Iterable[str]) -> None:
        """Settle which role the last image had, now that one of `following` comes after it."""
        if self._unsure is not None:
            follow = self._grammar.follow
            role = next(
                (position for position in self._positions if any(name in follow[position] for name in following)),
                self._positions[0],
            )
            self._unsure.role, self._positions, self._unsure = role, (role,), None

    def _open_text(self, role: Role | None, start: int) -> None:
        """Begin a text segment: a role's, or (None) one that its opening tag did not announce."""
        start = max(start, self._floor)
        if role is None:
            name = self._free_follower() or OTHER
        else:
            name = role.name
        self._close(start)
        self._resolve([name] if name != OTHER else [r.name for r in self._grammar.roles if not r.is_image])
        if name != OTHER:
            self._positions = (name,)
        self._span = (name, Modality.TEXT, start)
        self.role = name
        if role is not None:
            self._mode = _BODY
            self._awaited = [tag for pair in role.tags for tag in pair][:0:-1]  # all but the first, last one first
        else:
            self._mode = _FREE if self._openings and name == OTHER else _PLAIN
        self._pending = None

    def _end_turn(self, index: int) -> None:
        """The policy's end-of-turn id came: the end, or the environment's turn."""
        role = self._span[0] if self._span is not None else None
        if self._mode == _SEEK and self._pending is not None and not self._pending_blank:
            role = None  # words outside any role stand between
        declared = self._grammar.by_name.get(role or "")
        closed = self._mode in (_SEEK, _PLAIN)  # an unclosed tag calls nobody
        if declared is not None and declared.ends_turn and closed:
            self._close(index + 1)
            self._positions = (declared.name,)
            self._await()
        else:
            self._finish(index, ended=True)
            self.stopped = True

    def _await(self) -> None:
        self.awaits = True
        self._mode, self._pending = _SEEK, None
        self.role = BETWEEN

    def _end_image(self, stop: int) -> None:
        self.in_image = False
        self._close(stop)
        self._unsure = self.spans[-1] if self.spans and len(self._positions) > 1 else None
        self._seek()
        self._go_on_without_marker()

    def _go_on_without_marker(self) -> None:
        """Begin the next image, or end the turn, where no id can say either: a family of images alone."""
        if self._boi is not None or self._lexicon.words.ranges.size or not self._grammar.drawn:
            return
        followers = [name for name in self._grammar.followers(self._positions) if name != END]
        if self._grammar.affordable(followers, self.images):
            self._begin_image(self._length)
        else:
            self.stopped = True

    def _begin_image(self, index: int) -> None:
        self._settle(index)
        grammar = self._grammar
        drawn = [role.name for role in grammar.drawn]
        names = [name for name in grammar.followers(self._positions) if name in drawn]
        names = grammar.affordable(names, self.images) or names or drawn[:1] or [OTHER]
        self._close(index)
        self._resolve(names)
        self._positions = tuple(names) if names != [OTHER] else self._positions
        self._span = (names[0], self._drawn, index)
        self.role = names[0]
        self.images += 1
        self.in_image = True
        self._left = self._codes_per_image

    def _settle(self, index: int) -> None:
        """An image begins at `index`: give a role to what was not recognised before it."""
        if self._mode == _SEEK and self._pending is not None:
            lingering = self._span is not None and self._span[1] is Modality.TEXT
            if not (self._pending_blank and lingering):
                self._open_text(None, self._pending)

    def _finish(self, index: int, ended: bool) -> None:
        """The turn ends: with the end-of-turn token at `index`, or before it where a limit was met."""
        stop = index + 1 if ended else index
        if self.in_image and self._span is not None and self._span[2] == stop:
            self._span = None  # an image without a marker, of which nothing was drawn
            self.in_image = False
            return
        if self._mode == _SEEK and self._pending is not None and not self._pending_blank:
            self._open_text(None, self._pending)
        if ended and self._span is not None and self._span[1:] == (Modality.TEXT, index):
            self._span = None  # what was cut before is not gone on with
        if self._span is None:  # after an image, or at the very start
            start = index if self._pending is None else self._pending
            self._resolve([END] if ended else [])
            self._span = (END if ended else OTHER, Modality.TEXT, start)
        self._close(stop)
        self.in_image = False

    def cut(self) -> None:
        """Close the open text: another trajectory goes on from here, and what it writes is a segment of its own.

        Where the text is not complete (its closing tag is missing, or it has none), what follows has its role too.
        """
        assert not self.in_image and not self.stopped, "an image is not cut, and a turn that has ended is closed"
        if self._mode == _SEEK and self._pending is not None:
            self._cut_pending(max(self._pending, self._floor))
        if self._span is not None:
            role = self._span[0]
            self._close(self._length)
            self._floor = self._length
            if self._mode != _SEEK:
                self._span = (role, Modality.TEXT, self._length)

    def _cut_pending(self, start: int) -> None:
        """Close text that is not yet recognised, as an image would; what may come stays as it is."""
        if start >= self._length:  # the id that ended the text before it holds all of it
            return
        if self._span is not None and self._pending_blank:  # the text before it takes it in
            self._pending = None
            return
        if self._free_follower() is not None:
            self._open_text(None, start)
            return
        self._close(start)
        self._resolve([role.name for role in self._grammar.roles if not role.is_image])
        self.spans.append(Span(OTHER, Modality.TEXT, start, self._length))
        self._floor = self._length
        self._pending, self._pending_blank = None, not self._partial

    # ---- text ----

    def _read(self, id: int, index: int) -> None:
        if self._mode == _PLAIN:
            return
        piece, at, blank = self._lexicon.look(id)
        if self._partial:
            self._scan(self._partial + piece, self._partial_start, index)
        elif at < 0:
            if self._mode == _SEEK:
                self._wait(index, blank)
        else:
            if self._mode == _SEEK:
                self._wait(index, not piece[:at].strip())
            self._scan(piece[at:], index, index)

    def _wait(self, index: int, blank: bool) -> None:
        """Text between segments: a blank waits for what comes, anything else opens an unannounced segment."""
        if self._pending is None:
            self._pending = index
        if not blank:
            self._open_text(None, self._pending)

    def _scan(self, text: str, start: int, index: int) -> None:
        """Look for the tags that may come at the front of `text`, whose first character stands in id `start`."""
        tag_starts = self._grammar.tag_starts
        while text:
            tags = (self._awaited[-1],) if self._mode == _BODY else () if self._mode == _PLAIN else self._openings
            hit = next((tag for tag in tags if text.startswith(tag)), None)
            if hit is not None:
                text = text[len(hit) :]
                self._complete(hit, start, index)
                if self.awaits:  # what shares the tag's last id belongs to the call
                    break
                if self._mode == _SEEK and text.strip() and text.lstrip()[0] not in tag_starts:
                    self._wait(index, blank=False)
                skip = 0
            elif any(tag.startswith(text) for tag in tags):
                self._partial, self._partial_start = text, start
                if self._mode == _SEEK:
                    self._pending_blank = False
                    self._pending = start if self._pending is None else self._pending
                return
            else:
                if self._mode == _SEEK:
                    self._wait(index if self._pending is None else self._pending, blank=False)
                skip = 1
            at = min((i for i in (text.find(c, skip) for c in tag_starts) if i >= 0), default=-1)
            if at < 0:
                break
            # A tag's first character occurs only there, so a later one stands in the id just read.
            text, start = text[at:], index
        self._partial = ""

    def _complete(self, tag: str, start: int, index: int) -> None:
        if self._mode == _BODY:
            self._awaited.pop()
            if not self._awaited:
                called = self._span[0] if self._span is not None else ""
                self._seek(floor=index + 1)
                if called in self._grammar.calls and not self._grammar.by_name[called].ends_turn:
                    self._close(index + 1)
                    self._await()
        else:
            self._open_text(self._grammar.openings[tag], start if self._pending is None else self._pending)
