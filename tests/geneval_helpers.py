"""Images in GenEval's layout, and the command over them."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from tasks.shapes.render import render
from tasks.shapes.world import PLACES, Object, Scene
from underdrawing.cli import main


def scene(*items):
    return render(Scene(tuple(Object(shape, color, PLACES.index(place)) for shape, color, place in items)))


def record(tag, prompt, *clauses, exclude=()):
    return {"tag": tag, "prompt": prompt, "include": list(clauses), **({"exclude": list(exclude)} if exclude else {})}


ONE = record("single_object", "a circle", {"class": "circle", "count": 1})
RED = record("colors", "a red circle", {"class": "circle", "count": 1, "color": "red"})
LEFT = record(
    "position",
    "a circle left of a square",
    {"class": "square", "count": 1},
    {"class": "circle", "count": 1, "position": ["left of", 0]},
)
TWO = record("counting", "two squares", {"class": "square", "count": 2}, exclude=[{"class": "square", "count": 3}])

GOOD = {
    0: scene(("circle", "blue", "top")),
    1: scene(("circle", "red", "top")),
    2: scene(("circle", "red", "left"), ("square", "red", "right")),
    3: scene(("square", "red", "left"), ("square", "red", "right")),
}


def write(root, records=(ONE, RED, LEFT, TWO), samples=2, wrong=()):
    """GenEval's layout; the images named in `wrong` ((prompt, sample)) show nothing."""
    for number, one in enumerate(records):
        folder = root / f"{number:05}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(one) + "\n")
        for sample in range(samples):
            image = np.full((32, 32, 3), 255, np.uint8) if (number, sample) in wrong else GOOD[number]
            Image.fromarray(image).save(folder / "samples" / f"{sample:04}.png")
    return root


def run(capsys, *arguments):
    code = main(["evaluate", "geneval", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("underdrawing: ")]
    return line


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
