"""Reading a thought's words: tag blocks, boxes, turns, and the whole conversation as one string.

The rules in rewards/published/ are written over strings; this is where a trajectory becomes one. What the policy wrote
is `rewards.contract.policy_text` or, turn by turn, `policy_turns`; `transcript` also holds what the environment
answered, which only a `release` variant whose release read it may use.
"""

from __future__ import annotations

import re

from record.trajectory import Author, Trajectory

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # how Qwen2.5-VL's template writes an image
WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|md|normal|rm|sc|sf|sl|tt|up)?|math(?:bf|it|rm|sf|tt)|mbox|hbox|emph)"
    r"\s*\{([^{}]*)\}"
)
CHAT_MARKS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "</s>")


def blocks(text: str, tag: str) -> list[str]:
    """What stands inside each closed <tag> ... </tag>, outer white space cut off; an inner opening tag is content."""
    return [found.strip() for found in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]


def count(text: str, tag: str) -> tuple[int, int]:
    """(opening tags, closing tags)."""
    return text.count(f"<{tag}>"), text.count(f"</{tag}>")


def balanced(text: str, tag: str, needed: bool = False) -> bool:
    """As many opening as closing tags; with `needed` at least one."""
    opened, closed = count(text, tag)
    return opened == closed and (opened > 0 or not needed)


def after_last(text: str, mark: str) -> str:
    """What follows the last `mark`, or the whole text without one; outer white space cut off."""
    return text.rpartition(mark)[2].strip()


def last_opened(text: str, tag: str) -> str | None:
    """From the last opening tag to its closing tag, or to the end where it is never closed; None without one."""
    if f"<{tag}>" not in text:
        return None
    return text.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0].strip()


def boxed(text: str) -> list[str]:
    r"""The content of every \boxed{...} with its braces matched; one that is never closed is left out."""
    found = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for position in range(start.end(), len(text)):
            if text[position] in "{}" and text[position - 1] != "\\":
                depth += 1 if text[position] == "{" else -1
            if depth == 0:
                found.append(text[start.end() : position].strip())
                break
    return found


def unwrapped(text: str) -> str:
    r"""Without LaTeX's wrappers of words, nested ones too: \text{New \textbf{York}} is New York."""
    while (bare := WRAPPER.sub(r"\1", text)) != text:
        text = bare
    return text


def without_chat_marks(text: str, strip: bool = True) -> str:
    """Without the end-of-turn tokens that a policy samples; `strip` cuts off outer white space, too."""
    for mark in CHAT_MARKS:
        text = text.replace(mark, "")
    return text.strip() if strip else text


def policy_turns(trajectory: Trajectory) -> list[str]:
    """The policy's own words, one string for each stretch that no environment or user interrupts."""
    turns: list[str] = []
    interrupted = True
    for segment in trajectory.segments:
        if segment.author is not Author.POLICY:
            interrupted = True
        elif segment.image is None and segment.text:
            if interrupted:
                turns.append("")
            turns[-1] += segment.text
            interrupted = False
    return turns


def last_turn(trajectory: Trajectory) -> str:
    """The policy's words after the last observation, without chat marks; empty where it never spoke."""
    turns = policy_turns(trajectory)
    return without_chat_marks(turns[-1]) if turns else ""


def transcript(trajectory: Trajectory, image: str = IMAGE) -> str:
    """Everything from the policy's first segment on, observations included, with a mark for each of their images."""
    first = next((i for i, s in enumerate(trajectory.segments) if s.author is Author.POLICY), None)
    if first is None:
        return ""
    return "".join(
        segment.text if segment.image is None else segment.text or image for segment in trajectory.segments[first:]
    )
