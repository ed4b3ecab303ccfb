"""Rollout speed: our engine against transformers' `generate`, the same model, constraint, work and threads.

    python -m benchmarks.rollout                        # fresh weights, lengths scripted by demonstrations
    python -m benchmarks.rollout --policy runs/x/sft/model    # warm-started weights, lengths as they come

16 prompts x 8 members, one to four images each. With fresh weights a model would write no image and never end, so
each row follows the outline of a demonstration: where its tags, images and end stand is given, words and codes are
sampled. Both sides follow the same outlines and write the same number of tokens. With `--policy` both sample freely
under the default constraint, and each counts the tokens that it wrote.

Only tokens of real trajectories count (until each row's own end, prompts left out). generate runs with the better of
its DynamicCache and StaticCache, in one batch and in half batches, its constraint a few tensor operations. The engine
also records log-probs, laws and segments, which generate does not. Drawing the images is left out on both sides and
printed by itself. Arms alternate; each is judged by its fastest round, the least disturbed one. The last line is one
JSON object: tokens/s of ours and of the peer, and their ratio.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from formats.base import AllowedSet
from formats.cursor import ImagesCursor
from formats.declared import DeclaredFormat
from formats.registry import get_format
from formats.render import render
from formats.strokes import GRAMMAR
from policy.chameleon.config import ChameleonPolicyConfig
from policy.chameleon.grammar import ImageGrammar, ImageLogitsProcessor
from policy.registry import load_policy
from record.trajectory import Trajectory, mask_of, ranges_of
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from tasks.registry import get_task
from underdrawing.options import Whole

MAX_IMAGES = 4


class Outlines:
    """What each row's ids may be, position by position, after the demonstrations of a task.

    Letters: W rows, T ids of the longest, K kinds of positions.
    """

    def __init__(self, policy: Any, demonstrations: list[Any]):
        vocabulary = policy.vocabulary
        fmt = get_format("strokes", max_images=MAX_IMAGES)
        blank = np.full(vocabulary.codes_per_image, vocabulary.code_ids[0])
        tags = [vocabulary.encode(tag)[0] for tag in GRAMMAR.tags]
        special = {vocabulary.boi, vocabulary.eoi, vocabulary.eos, vocabulary.pad, vocabulary.bos, *tags}
        words = [
            id
            for id in range(vocabulary.size)
            if id not in special and id not in set(vocabulary.code_ids.tolist()) and vocabulary.piece(id).strip()
        ]
        self.sets = [AllowedSet("words", ranges_of(words)), AllowedSet("codes", ranges_of(vocabulary.code_ids))]
        alone = {id: len(self.sets) + k for k, id in enumerate([vocabulary.boi, vocabulary.eoi, vocabulary.eos, *tags])}
        self.sets += [AllowedSet(vocabulary.piece(id), ranges_of([id])) for id in alone]
        self.kinds: list[list[int]] = []
        codes = set(vocabulary.code_ids.tolist())
        for demonstration in demonstrations:
            images = sum(part.image is not None for part in demonstration.parts)
            trajectory = render(fmt, demonstration.prompt, {}, demonstration.parts, vocabulary, [blank] * images)
            ids = np.concatenate([segment.ids for segment in trajectory.segments[1:]]).tolist()
            self.kinds.append([1 if id in codes else alone.get(id, 0) for id in ids])
        self.masks_KV = torch.from_numpy(np.stack([mask_of(s.ranges, vocabulary.size) for s in self.sets]))
        longest = max(map(len, self.kinds))
        self.kinds_WT = torch.tensor([kinds + [alone[vocabulary.eos]] * (longest - len(kinds)) for kinds in self.kinds])

    @property
    def tokens(self) -> int:
        return sum(map(len, self.kinds))


class OutlinedFormat(DeclaredFormat):
    """Strokes with the outlines of demonstrations, one a trajectory in the order of the queue."""

    def __init__(self, outlines: Outlines):
        super().__init__(GRAMMAR, max_images=MAX_IMAGES)
        self.outlines = outlines
        self.restart()

    def restart(self) -> None:
        self.rows = iter(self.outlines.kinds)

    def cursor(self, vocabulary: Any, constrain: str = "images") -> OutlinedCursor:
        return OutlinedCursor(self._tables(vocabulary)[0], self.outlines.sets, next(self.rows))


class OutlinedCursor(ImagesCursor):
    def __init__(self, lexicon: Any, sets: list[AllowedSet], kinds: list[int]):
        super().__init__(lexicon)
        self.sets, self.kinds = sets, kinds

    def allowed(self) -> AllowedSet:
        return self.sets[self.kinds[self._length]]


class OutlineProcessor(LogitsProcessor):
    """The same for `generate`: one gather and one fill a step."""

    def __init__(self, outlines: Outlines, rows: slice, prompt: int):
        self.masks_KV, self.kinds_WT, self.prompt = ~outlines.masks_KV, outlines.kinds_WT[rows], prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.masks_KV[self.kinds_WT[:, input_ids.shape[1] - self.prompt]], -torch.inf)


class AtMostImages(LogitsProcessor):
    """No begin marker after so many images."""

    def __init__(self, boi: int, images: int):
        self.boi, self.images = boi, images

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        full_B = (input_ids == self.boi).sum(1) >= self.images
        scores[:, self.boi].masked_fill_(full_B, -torch.inf)
        return scores


class Work:
    """The same rollouts, for either side."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        task = get_task("shapes")
        self.policy: Any = load_policy(ChameleonPolicyConfig(family="chameleon", path=options.policy), task.words)
        rows = options.prompts * options.members
        self.outlines = None if options.policy else Outlines(self.policy, task.demonstrations("strokes", rows, 0))
        records = task.prompts("train")[: options.prompts]
        self.requests = [
            RolloutRequest(g, record["prompt"], record, tuple(range(options.members)), 0)
            for g, record in enumerate(records)
        ]
        self.format: Any = (
            get_format("strokes", max_images=MAX_IMAGES) if self.outlines is None else OutlinedFormat(self.outlines)
        )
        self.max_tokens = options.max_tokens if self.outlines is None else self.outlines.kinds_WT.shape[1]

    def ours(self, rows: int) -> tuple[int, float, list[Trajectory]]:
        """Tokens, seconds without drawing, and the trajectories."""
        if self.outlines is not None:
            self.format.restart()
        engine = Engine(self.policy, self.format, RolloutConfig(rows=rows, max_tokens=self.max_tokens))
        began = time.perf_counter()
        trajectories = engine.run(self.requests)
        seconds = time.perf_counter() - began - engine.stats.draw_seconds
        return engine.stats.tokens, seconds, trajectories

    def peer(self, rows: int, cache: str) -> tuple[int, float, list[Tensor]]:
        vocabulary, sequences, tokens = self.policy.vocabulary, [], 0
        prompts = [
            self.format.prompt_ids(request.prompt, vocabulary) for request in self.requests for _ in request.members
        ]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), vocabulary.pad)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        shown = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        began = time.perf_counter()
        for start in range(0, len(prompts), rows):
            part = slice(start, min(start + rows, len(prompts)))
            if self.outlines is not None:
                processors = [OutlineProcessor(self.outlines, part, longest)]
            else:
                # An image is not begun where it would pass max_tokens: the same limit as ours.
                grammar = ImageGrammar.of(vocabulary, longest + self.max_tokens)
                processors = [ImageLogitsProcessor(grammar), AtMostImages(vocabulary.boi, MAX_IMAGES)]
            sequences.append(
                self.policy.core.generate(
                    input_ids=ids[part],
                    attention_mask=shown[part],
                    logits_processor=LogitsProcessorList(processors),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=self.max_tokens,
                    eos_token_id=vocabulary.eos,
                    pad_token_id=vocabulary.pad,
                    cache_implementation=cache,
                )[:, longest:]
            )
        seconds = time.perf_counter() - began
        for batch in sequences:
            ended = (batch == vocabulary.eos).cumsum(1)
            tokens += int(((ended - (batch == vocabulary.eos).int()) == 0).sum())
        return tokens, seconds, sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="folder of warm-started weights")
    parser.add_argument("--prompts", type=Whole(1), default=16)
    parser.add_argument("--members", type=Whole(1), default=8)
    parser.add_argument(
        "--rows", type=Whole(1), default=128, help="rows of our cache: all at once, as two workers of 64"
    )
    parser.add_argument("--max-tokens", type=Whole(1), default=240)
    parser.add_argument("--threads", type=Whole(1), default=2)
    parser.add_argument("--rounds", type=Whole(1), default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options)
    total = options.prompts * options.members
    arms: dict[str, Callable[[], tuple[int, float, Any]]] = {"ours": lambda: work.ours(options.rows)}
    for cache in ("dynamic", "static"):
        for rows in (total, (total + 1) // 2):
            arms[f"generate, {cache} cache, {rows} rows"] = lambda rows=rows, cache=cache: work.peer(rows, cache)
    best: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name, arm in list(arms.items()):
            gc.collect()
            busy = time.process_time()
            with torch.inference_mode():
                tokens, seconds, written = arm()
            busy = time.process_time() - busy
            if number == 0:  # warms caches, and checks that both sides do the same work
                if work.outlines is not None:
                    assert tokens == work.outlines.tokens, f"{name} wrote {tokens} of {work.outlines.tokens} tokens"
                continue
            best[name] = max(best.get(name, 0.0), tokens / seconds)
            print(
                f"round {number}: {name}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s "
                f"({busy:.2f} s of processor time)",
                flush=True,
            )
            if name == "ours" and number == options.rounds:
                images = np.bincount([len(t.images()) for t in written], minlength=MAX_IMAGES + 1)
                lengths = sorted(t.num_tokens() - len(t.segments[0].ids) for t in written)
                print(
                    f"{total} trajectories of {lengths[0]} to {lengths[-1]} tokens (median {lengths[total // 2]}); "
                    f"with 0 to {MAX_IMAGES} images: {images.tolist()}"
                )
    ours = best.pop("ours")
    peer = max(best, key=lambda name: best[name])
    print(
        json.dumps(
            {
                "ours": round(ours),
                "peer": round(best[peer]),
                "ratio": round(ours / best[peer], 2),
                "unit": "tokens/s",
                "peer_arm": peer,
                "threads": options.threads,
            }
        )
    )


if __name__ == "__main__":
    main()
