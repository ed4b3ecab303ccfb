"""What a prompt shows beside its words: a record names it in the column `media`, in order, and it is read when asked.

    {"prompt": "which way is the exit?", "media": [{"image": "maze.png"}, {"video": "walk.gif", "frames": 8}]}

An image is the path of a file or a data URL, a video the path of a file or a list of its frames' paths. So a record is
JSON as ever: it is stored, compared and sent without pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from record.trajectory import Media
from runtime.errors import UserError, nearest
from tasks.base import Record
from tasks.images import image_file, read_image
from tasks.videos import read_video, video_file

MEDIA = "media"
FRAMES = 8  # of a video, where its item does not say


class MediaError(UserError):
    """A column `media` that shows nothing; the sentence names the item."""


def media_of(record: Record) -> tuple[Media, ...]:
    """Images, uint8 [height, width, 3], and frames, in the order in which the prompt shows them.

    Raises:
        MediaError: the column is no list of images and videos.
        ImageColumnError, VideoColumnError: one of them cannot be read.
    """
    return tuple(_read(item, f"{MEDIA}, item {number}") for number, item in enumerate(items_of(record), 1))


def items_of(record: Record) -> list[dict[str, Any]]:
    """The column, checked in form; nothing is read. Raises MediaError."""
    items = record.get(MEDIA)
    if items is None:
        return []
    if not isinstance(items, list):
        raise MediaError(
            f"{MEDIA}: a list of {{image: path}} and {{video: path, frames: number}} is expected, not "
            f"{type(items).__name__}"
        )
    for number, item in enumerate(items, 1):
        where = f"{MEDIA}, item {number}"
        if not isinstance(item, dict) or ("image" in item) == ("video" in item):
            raise MediaError(f"{where}: an item has the key image or the key video, and one of them")
        known = ("image",) if "image" in item else ("video", "frames")
        for key in item:
            if key not in known:
                raise MediaError(f"{where}: no key '{key}'; {nearest(key, known)}")
        frames = item.get("frames", FRAMES)
        if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
            raise MediaError(f"{where}: frames is {frames!r}; it is a number, 1 or more")
    return items


def _read(item: dict[str, Any], where: str) -> Media:
    if "image" in item:
        return read_image(image_file(item["image"], Path.cwd(), where))
    return read_video(video_file(item["video"], Path.cwd(), where), item.get("frames", FRAMES))
