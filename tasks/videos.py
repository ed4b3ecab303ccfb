"""Video in a data set's columns: files, bytes, or the frames as images, checked as they are read, and kept as files.

Animated images (GIF, WebP, APNG) are read by Pillow; every other kind by PyAV, which is not among the dependencies.

Letters: F frames.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from record.trajectory import Frames
from runtime.errors import UserError, first_line
from tasks.images import image_file, kept, not_kept, read_image


class VideoColumnError(UserError):
    """A video that cannot be read; the sentence names row and column, or the file."""


def video_file(value: Any, folder: Path, where: str) -> str | list[str]:
    """The path of a video that can be read, or the paths of its frames.

    Args:
        value: a path (relative ones are sought in `folder`), bytes, the datasets library's
            {"bytes": ..., "path": ...}, or a list of images: its frames, one a second.
        where: row and column, for messages.

    Raises:
        VideoColumnError: no such file, or no video in it, or PyAV is wanted and is not there.
        ImageColumnError: one of the frames is no image.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise VideoColumnError(f"{where}: a video of no frames")
        return [image_file(item, folder, f"{where}, frame {number}") for number, item in enumerate(value, 1)]
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        value = _cached(content, Path(str(path or "")).suffix or ".mp4", where) if content is not None else path
    elif isinstance(value, bytes):
        value = _cached(value, ".mp4", where)
    if not isinstance(value, str) or not value:
        raise VideoColumnError(f"{where}: {type(value).__name__} is no video; give a path, bytes or a list of frames")
    file = (folder / Path(value).expanduser()).resolve()
    if not file.is_file():
        raise VideoColumnError(f"{where}: there is no video {file}")
    _times(file, where)
    return str(file)


def read_video(video: str | list[str], count: int) -> Frames:
    """`count` frames at equal distances, the first one among them; all of them where there are fewer.

    Raises:
        VideoColumnError: it cannot be read (any more).
    """
    if isinstance(video, list):
        chosen = _spread(len(video), count)
        frames = [read_image(video[index]) for index in chosen]
        sizes = {frame.shape for frame in frames}
        if len(sizes) > 1:
            raise VideoColumnError(f"{video[0]}: the frames of one video have several sizes")
        return Frames(np.stack(frames), np.array(chosen, np.float32))
    file = Path(video)
    time_F = _times(file, video)
    chosen = _spread(len(time_F), count)
    frames = _frames(file, chosen)
    return Frames(np.stack(frames), np.array(time_F, np.float32)[chosen])


def _spread(total: int, count: int) -> list[int]:
    if total <= count:
        return list(range(total))
    return [total * n // count for n in range(count)]


def _times(file: Path, where: str) -> list[float]:
    """When each frame is shown, in seconds. Raises VideoColumnError where nothing can be read."""
    try:
        with Image.open(file) as image:
            durations = []
            for frame in ImageSequence.Iterator(image):
                frame.load()
                durations.append(float(frame.info.get("duration") or 100) / 1000)
            return [sum(durations[:n]) for n in range(len(durations))]
    except UnidentifiedImageError:
        pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoColumnError(f"{where}: {file} cannot be read ({first_line(error)})") from None
    av = _pyav(file, where)
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            times = [float(frame.time or 0.0) for frame in container.decode(stream)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise VideoColumnError(f"{where}: {file} is no video that can be read ({first_line(error)})") from None
    if not times:
        raise VideoColumnError(f"{where}: {file} holds no frame")
    return times


def _frames(file: Path, chosen: list[int]) -> list[np.ndarray]:
    """The chosen frames, ascending; uint8 [height, width, 3] each."""
    wanted = set(chosen)
    try:
        with Image.open(file) as image:
            found = ImageSequence.Iterator(image)
            return [np.asarray(frame.convert("RGB")) for n, frame in enumerate(found) if n in wanted]
    except UnidentifiedImageError:
        av = _pyav(file, str(file))
        with av.open(str(file)) as container:
            decoded = container.decode(container.streams.video[0])
            return [frame.to_ndarray(format="rgb24") for n, frame in enumerate(decoded) if n in wanted]


def _pyav(file: Path, where: str) -> Any:
    if importlib.util.find_spec("av") is None:
        raise VideoColumnError(
            f"{where}: {file} is read by PyAV, which is not installed; `pip install av`, or give the frames as a list "
            "of images"
        )
    import av

    return av


def _cached(content: bytes, suffix: str, where: str) -> str:
    try:
        return str(kept(content, suffix))
    except OSError as error:
        raise VideoColumnError(f"{where}: {not_kept('videos', error)}") from error
