"""The options of `underdrawing probe`. What it does is probe.py, which imports torch."""

from __future__ import annotations

import argparse

from runtime.errors import nearest
from underdrawing.options import OptionError, Whole, expanded_path

HELP = "what the policy's pictures are worth to its thoughts: replace each, and write on from there"
ARMS = ("sibling", "blank", "other")  # rollout.counterfactuals.ARMS


def add_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--weights", type=expanded_path, help="folder of the weights; default: the newest of the run")
    sub.add_argument("--prompts", type=Whole(1), default=16, help="how many (default 16)")
    sub.add_argument("--samples", type=Whole(1), default=2, help="thoughts of each prompt (default 2)")
    sub.add_argument(
        "--arms",
        type=arm_names,
        default=ARMS,
        metavar="ARM,...",
        help="what stands in a picture's place: sibling (the picture of another thought of the prompt), blank, other "
        "(that of another prompt); default: all three",
    )
    sub.add_argument("--draws", type=Whole(1), default=1, help="continuations of each image and arm (default 1)")
    sub.add_argument("--split", choices=("train", "heldout"), default="heldout")
    sub.add_argument("--out", type=expanded_path, help="folder to write (default run_dir/probe)")


def arm_names(text: str) -> tuple[str, ...]:
    """Arms with commas between them."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in ARMS:
            raise OptionError(f"no arm '{name}'; {nearest(name, ARMS)}")
    return names
