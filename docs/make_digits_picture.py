"""Draws docs/digits.png: `python docs/make_digits_picture.py`.

Three rows: what demonstrations draw, the same after the visual tokenizer's round trip, and quarters of different digits
put together, with what each detector makes of them: green where it is right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.train_digits_detector import patched
from policy.chameleon.vq import load_digits_vq
from rewards.detectors.base import Detections
from rewards.detectors.digits import DigitsLearned, digits_exact
from tasks.digits.prompts import prompts, sample_scene_for
from tasks.digits.seeing import blobs
from tasks.digits.world import render

PAGE = Path(__file__).parent / "digits.png"
COLUMNS, SCALE, GAP, LABEL, TITLE = 5, 5, 22, 38, 30
GREY, BLACK, GREEN, RED = (110, 110, 110), (30, 30, 30), (20, 130, 60), (190, 40, 40)


def page() -> Image.Image:
    """RGB; the same in every run."""
    rng = np.random.default_rng(6)
    records = [next(r for r in prompts("train") if r["tag"] == tag) for tag in _TAGS]
    images = [render(sample_scene_for(record, rng)) for record in records]
    vq = load_digits_vq()
    redrawn = vq.decode_images(vq.encode_images(images))
    learned, exact = DigitsLearned(), digits_exact()
    nothing = [image for image in patched(200, rng) if len(blobs(image)) == 1 and not exact.detect([image])[0]]
    nothing = [image for image in nothing if _seen(learned.detect([image])[0], 0.9)][:COLUMNS]
    asked = [sorted(clause["class"] for clause in r["include"] for _ in range(clause["count"])) for r in records]
    side = 32 * SCALE
    rows = [
        ("What demonstrations draw", images, asked),
        ("After the visual tokenizer's round trip", redrawn, asked),
        ("Quarters of four different digits, which are none", nothing, [[]] * COLUMNS),
    ]
    height = GAP + sum(TITLE + side + LABEL + GAP for _ in rows)
    sheet = Image.new("RGB", (GAP + COLUMNS * (side + GAP), height), "white")
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(17), ImageFont.load_default(12)
    y = GAP
    for name, shown, wanted in rows:
        draw.text((GAP, y), name, BLACK, title)
        y += TITLE
        for column, image in enumerate(shown):
            x = GAP + column * (side + GAP)
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(205, 205, 205))
            if shown is images:
                draw.text((x, y + side + 6), records[column]["prompt"].split(" ", 3)[-1], GREY, small)
                continue
            for line, (label, detector) in enumerate((("learned", learned), ("exact", exact))):
                seen = _seen(detector.detect([image])[0], 0.3)
                sure = len(seen) < 3  # there is room to say how sure it is of two
                told = "  ".join(f"{digit} ({score:.2f})" if sure else digit for digit, score in seen) or "nothing"
                color = GREEN if [digit for digit, _ in seen] == wanted[column] else RED
                draw.text((x, y + side + 6 + 16 * line), f"{label}: {told}", color, small)
        y += side + LABEL + GAP
    return sheet


_TAGS = ("single_object", "counting", "colors", "position", "color_attr")


def _seen(found: Detections, least: float) -> list[tuple[str, float]]:
    """The digits above a score, and how sure it is of each."""
    return sorted((name, item.score) for name, items in found.items() for item in items if item.score > least)


if __name__ == "__main__":
    page().save(PAGE, optimize=True)
