"""Conversations, and a judge that says what it is told to, for the tests of published rewards."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np

from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.judge.base import Reply

IMAGE = np.zeros((4, 4, 3), np.uint8)


class ScriptedJudge:
    """Answers checks by `verdict` (a value for all, or a function of the check) and questions by `reply`."""

    def __init__(self, verdict=None, reply=None):
        self.verdict, self.reply, self.checks, self.questions = verdict, reply, [], []

    def agrees(self, checks):
        self.checks += checks
        return [self.verdict(check) if callable(self.verdict) else self.verdict for check in checks]

    def ask(self, questions):
        self.questions += questions
        return [Reply(self.reply, None if self.reply is not None else "timeout") for _ in questions]


def judged_by(judge):
    """A RewardContext's stand-in, as far as published rewards read it."""

    def judge_for(reward):
        assert judge is not None, f"{reward} asked for a judge"
        return judge

    return SimpleNamespace(judge=judge, judge_for=judge_for, detector=None, fmt=None, task=None)


def say(text, role="think"):
    return Segment(role, Author.POLICY, Modality.TEXT, True, text=text)


def tool(text="", image=None, role="observation"):
    modality = Modality.TEXT if image is None else Modality.IMAGE_TOKENS
    return Segment(role, Author.ENVIRONMENT, modality, False, text=text, image=image)


def conversation(record, *segments, group=0, member=0):
    prompt = record.get("question", "a question")
    user = Segment("prompt", Author.USER, Modality.TEXT, False, text=prompt)
    return Trajectory(prompt, record, "zoom", [user, *segments], group, member)


def from_record(inputs, group=0, member=0, record=None):
    """A record's conversation: the policy's turns and, between them, everything else of the text that was scored. A
    image's marks become an image, so that the transcript is the text again."""
    text, segments = inputs["response_text"], []
    for turn in inputs.get("turns") or [{"role": "assistant", "text": text}]:
        if turn["role"] != "assistant":
            continue
        if not turn["text"]:
            continue
        before, found, text = text.partition(turn["text"])
        assert found, "a turn that the scored text does not hold"
        segments += environment(before) + [say(turn["text"])]
    segments += environment(text)
    known = {"question": inputs.get("question", "?"), "ground_truth": inputs.get("ground_truth"), **(record or {})}
    return conversation(known, *segments, group=group, member=member)


def environment(text):
    """Segments of the environment: a stretch of image marks is an image, the rest are words."""
    parts = re.split(r"(<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>)", text)
    return [tool(part, IMAGE if part.startswith("<|vision_start|>") else None) for part in parts if part]


def verdict(value):
    """A record's verdict as a judge's: None where it could not be read."""
    return None if value is None else value == 1


def differences(got, expected, tolerance=1e-4):
    """What differs, by key; lists may be nested. Only the keys of `expected` count."""
    return {
        key: (got.get(key), value)
        for key, value in expected.items()
        if key not in got or not _same(got[key], value, tolerance)
    }


def _same(a, b, tolerance):
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return a == b
    return abs(float(a) - float(b)) <= tolerance
