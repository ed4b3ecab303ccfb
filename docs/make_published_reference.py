"""Writes docs/published_rewards.md from the registry and the signatures: `python docs/make_published_reference.py`.

What `underdrawing rewards explain` says of one reward the page says of all; a test holds it to the registry.
"""

from __future__ import annotations

from pathlib import Path

from rewards.registry import REWARDS, Registered
from underdrawing.rewards_cli import SCOPES, option_rows

PAGE = Path(__file__).parent / "published_rewards.md"
HEAD = """# Published rewards

<!-- Written by docs/make_published_reference.py from rewards/registry.py; edit that, then run it again. -->

Every reward that a recipe can name, with its formula, its source, and how its variants differ. Where a release is
known to depart from its paper or from its own intent, the default is the paper's or the repaired form, and `variant`
names the other; each `release` form is held to records of the released code. Where nothing is said of variants there is
one form. How a recipe combines them, and how to write one of your own, is in [rewards.md](rewards.md).
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *map(_entry, REWARDS.values())])


def _entry(reward: Registered) -> str:
    needs = " and ".join(["a detector"] * reward.needs_detector + ["a judge"] * reward.needs_judge)
    facts = [
        ("Pays", reward.formula),
        ("Source", reward.source),
        ("Reads", reward.inputs),
        ("Variants", reward.differs),
        ("Needs", needs),
        ("A value depends on", SCOPES[reward.scope]),
    ]
    lines = [f"## `{reward.name}`", "", *[f"- **{name}**: {_text(text)}" for name, text in facts if text]]
    options = option_rows(reward.load())
    if options:
        lines += ["", "| option | default | may be |", "|---|---|---|"]
        lines += [f"| `{name}` | `{_cell(default)}` | {_text(_cell(may_be))} |" for name, default, may_be in options]
    return "\n".join([*lines, ""])


def _text(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
