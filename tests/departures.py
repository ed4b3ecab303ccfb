"""Conversations by which a repaired reward is compared with the release: what random ones hold, and the steps that take
out of one what the repaired form does not read.

A reward's departures are stated as code in test_published_departures*.py: each is a step that changes what the release
reads, or a predicate of the conversation, with what the repaired form pays there. Where none applies the two must
agree.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from published_helpers import IMAGE, conversation, say, tool

from record.trajectory import Author
from rewards.functions.text import CHAT_MARKS
from rewards.functions.tool_use import tool_calls

CALL = "<tool_call>{}</tool_call>"
IMAGE_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def conversations(pieces, replies=("reply",), record=None):
    """One to three turns of the policy, each a few of `pieces`, with an image or one of `replies` behind some."""
    turn = st.lists(st.sampled_from(pieces), min_size=0, max_size=4).map("".join)
    answer = st.one_of(st.none(), st.just(IMAGE), st.sampled_from(replies))
    return st.lists(st.tuples(turn, answer), min_size=1, max_size=3).map(lambda turns: talk(turns, record))


def talk(turns, record=None):
    """(the policy's words, what the tool answers: None, words or an image) for each turn."""
    segments = []
    for words, answer in turns:
        segments.append(say(words))
        if answer is not None:
            segments.append(tool(answer) if isinstance(answer, str) else tool("", answer))
    return conversation(record or {"question": "?", "ground_truth": "7"}, *segments)


def mended(trajectory, change):
    """A copy in which `change` (segment, its place) gives each segment of the turn anew, or None to leave it out."""
    kept = [change(segment, at) for at, segment in enumerate(trajectory.segments)]
    return replace(trajectory, segments=[segment for segment in kept if segment is not None])


def without_replies(trajectory):
    """Without the words of tools; their images stay where a call asked for one."""
    looked = any(call.returned_image for call in tool_calls(trajectory))

    def change(segment, at):
        if segment.author is not Author.ENVIRONMENT:
            return segment
        return tool("", IMAGE) if segment.image is not None and looked else tool("")

    return mended(trajectory, change)


def without_marks(trajectory):
    """Without the end-of-turn tokens and the image marks that the policy wrote."""

    def change(segment, at):
        if segment.author is not Author.POLICY:
            return segment
        text = segment.text
        for mark in CHAT_MARKS:
            text = text.replace(mark, "")
        for mark in IMAGE_MARKS:  # words like others
            text = text.replace(mark, mark.replace("_", "-"))
        return replace(segment, text=text)

    return mended(trajectory, change)


def without_earlier(trajectory, *tags):
    """With these tags as other words in the policy's turns before the last observation."""
    observed = [at for at, s in enumerate(trajectory.segments) if s.author is Author.ENVIRONMENT]
    spoken = [at for at, s in enumerate(trajectory.segments) if s.author is Author.POLICY and s.text]
    border = max((at for at in observed if spoken and at < spoken[-1]), default=0)

    def change(segment, at):
        if segment.author is not Author.POLICY or at > border:
            return segment
        text = segment.text
        for tag in tags:
            text = text.replace(tag, tag.translate(str.maketrans("<>\\", "()/")))
        return replace(segment, text=text)

    return mended(trajectory, change)
