"""How many slots of a policy's context the images and frames of a prompt take."""

from __future__ import annotations

from typing import Any

from PIL import Image

from formats.grammar import PROMPT
from formats.segments import media_segment
from policy.base import Policy
from record.trajectory import Author
from tasks.base import Record
from tasks.media import items_of, media_of


class ShownSlots:
    """Asks the family once for each size of image: an extent is a matter of sizes."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._known: dict[Any, int] = {}

    def __call__(self, record: Record) -> int:
        """Slots of all that a record's prompt shows, in all forms in which the family sees it.

        Raises UserError for what cannot be read, or what the family cannot see.
        """
        return sum(self._of(item) for item in items_of(record))

    def _of(self, item: dict[str, Any]) -> int:
        key = self._size(item)
        if key not in self._known:
            (media,) = media_of({"media": [item]})
            segment = media_segment(PROMPT, media, Author.USER)
            self.policy.perceive([segment])
            extents = [self.policy.extent(segment, form) for form in self.policy.forms(segment)]
            self._known[key] = sum(extent.slots for extent in extents if extent is not None)
        return self._known[key]

    def _size(self, item: dict[str, Any]) -> Any:
        path = item.get("image")
        if isinstance(path, str) and not path.startswith("data:"):
            try:
                with Image.open(path) as image:
                    return image.size
            except OSError:
                pass  # media_of says what is wrong with it
        return repr(item)
