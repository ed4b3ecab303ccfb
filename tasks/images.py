"""Images in a data set's columns: files, bytes or data URLs, checked as they are read, and kept as files.

A record holds JSON values, so an image stands in it as the path of a file. One that has no file of its own (bytes in a
parquet file) is written once into a cache, under the hash of its bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.errors import UserError, first_line, remedy


class ImageColumnError(UserError):
    """An image that cannot be read; the sentence names row and column."""


def cache_folder() -> Path:
    """Where images without a file of their own are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "underdrawing" / "images"


def image_file(value: Any, folder: Path, where: str) -> str:
    """The path of a readable image file for what stands in a column.

    Args:
        value: a path (relative ones are sought in `folder`), a data URL, bytes, or the datasets library's
            {"bytes": ..., "path": ...}.
        where: row and column, for messages.

    Raises:
        ImageColumnError: no such file, or no image that can be decoded.
    """
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        value = content if content is not None else path
    if isinstance(value, str) and value.startswith("data:"):
        try:
            value = base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ImageColumnError(f"{where}: a data URL that is not base64 ({error})") from None
    if isinstance(value, bytes):
        _check(value, where)
        return str(_cached(value))
    if not isinstance(value, str) or not value:
        raise ImageColumnError(f"{where}: {type(value).__name__} is no image; give a path, a data URL or bytes")
    file = folder / Path(value).expanduser()
    try:
        _check(file.read_bytes(), f"{where}: {file}")
    except OSError as error:
        raise ImageColumnError(f"{where}: the image {file} cannot be read ({error.strerror or error})") from None
    return str(file.resolve())


def read_image(path: str | Path) -> np.ndarray:
    """uint8 [height, width, 3]; transparent ground is white."""
    with Image.open(path) as file:
        if file.mode not in ("RGBA", "LA", "PA") and "transparency" not in file.info:
            return np.asarray(file.convert("RGB"))
        seen = file.convert("RGBA")
        ground = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(ground, seen).convert("RGB"))


def data_url(image: np.ndarray) -> str:
    """uint8 [height, width, 3] as text that a record can hold: a task that draws its pictures shows them so."""
    content = BytesIO()
    Image.fromarray(image).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _check(content: bytes, where: str) -> None:
    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:  # its words hold no more than the address of the buffer
        reason = "empty" if not content else f"{len(content)} bytes, cut, altered or of no known kind"
        raise ImageColumnError(
            f"{where}: not an image that can be read ({reason}); PNG, JPEG, WebP, GIF, BMP, TIFF and the other kinds "
            "that Pillow opens are"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
        raise ImageColumnError(
            f"{where}: not an image that can be read ({first_line(error)}); it may be cut or altered"
        ) from None


def _cached(content: bytes) -> Path:
    with Image.open(BytesIO(content)) as image:
        suffix = f".{(image.format or 'img').lower()}"
    try:
        return kept(content, suffix)
    except OSError as error:
        raise ImageColumnError(not_kept("images", error)) from error


def kept(content: bytes, suffix: str) -> Path:
    """A file of the cache with these bytes, named by their hash, so that equal ones are kept once. Raises OSError."""
    folder = cache_folder()
    file = folder / f"{hashlib.sha256(content).hexdigest()}{suffix}"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_bytes(content)
        os.replace(temporary, file)
    return file


def not_kept(what: str, error: OSError) -> str:
    return f"{cache_folder()}: {what} of the data set cannot be kept there ({error.strerror or error}); " + remedy(
        error, "set XDG_CACHE_HOME to another folder"
    )
