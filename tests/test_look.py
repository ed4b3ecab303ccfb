"""`look` whole: the tiny Chameleon draws, asks for a part of its picture, and reads the crop as codes. The crop is in
the record, in the report and in W&B's table, and no reward is shown it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats.config import FormatConfig
from formats.registry import get_format
from policy.base import score_trajectories
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.registry import load_policy
from record.store import load_trajectories, save_trajectories
from record.trajectory import Author, Modality, StopReason
from rewards.contract import completion, policy_images, policy_text
from rewards.functions.tool_use import tool_calls
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.pool.local import LocalRollouts
from rollout.requests import RolloutRequest
from rollout.tools.config import ToolConfig
from rollout.tools.registry import Tools, build_tools, words_of
from tasks.crop import crop
from tests.tool_helpers import Replies
from training.wandb_mirror import WandbMirror
from underdrawing.report.page import film_of

TOOLS = {"look": ToolConfig()}
TINY = TinySection(
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=2,
    max_position_embeddings=256,
    tags=["<ins>", "</ins>", "<look>", "</look>", "<inspect>", "</inspect>"],
)
WORDS = ["a", "red", "circle", *words_of(build_tools(TOOLS))]
REQUESTS = [RolloutRequest(g, "a red circle", {}, (0, 1, 2, 3), 5) for g in range(4)]


def numerate_policy(*often: str):
    """Fresh weights that write numbers, and whatever else is named: a box in seven calls is one of the picture."""
    policy = load_policy(ChameleonPolicyConfig(tiny=TINY), WORDS)
    vocabulary = policy.vocabulary
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, parameter in policy.core.named_parameters():
            if "vqmodel" not in name and "norm" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        policy.core.model.embed_tokens.weight[:, 0] += 6  # what all hidden states have in common
        head = policy.model.lm_head.weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        head[:, 0] = 0
        for word in ("0", "4", "28", "32", *often):
            head[vocabulary.encode(word)[0], 0] = 1.0
    return policy


def look_engine(policy=None, tools=None, **config) -> Engine:
    fmt = get_format("look", max_tokens={"plan": 3, "inspect": 3, "look": 4}, max_images=2)
    settings = RolloutConfig(**{"rows": 8, "max_tokens": 120} | config)
    return Engine(policy or numerate_policy(), fmt, settings, "full", tools or build_tools(TOOLS))


@pytest.fixture(scope="module")
def thoughts():
    engine = look_engine()
    written = engine.run(REQUESTS)
    return engine, written


def test_the_crop_is_what_the_policy_asked_for_and_reads(thoughts):
    engine, written = thoughts
    crops = errors = 0
    for trajectory in written:
        if trajectory.stop is StopReason.END:
            assert engine.fmt.violations(trajectory) == []
        for index, segment in enumerate(trajectory.segments):
            if segment.author is not Author.ENVIRONMENT:
                continue
            call = trajectory.segments[index - 1]
            assert call.role == "look" and segment.decisions is None and not segment.trained
            if segment.role == "error":
                errors += 1
                assert segment.text.startswith("error:")
                continue
            crops += 1
            x0, y0, x1, y1 = (int(word) for word in call.text.removeprefix("<look>").removesuffix("</look>").split())
            drawn = [s.image for s in trajectory.segments[:index] if s.author is Author.POLICY and s.image is not None]
            np.testing.assert_array_equal(segment.image, crop(drawn[-1], (x0, y0, x1, y1)))
            # It re-enters as the family's codes between its markers.
            (codes,) = engine.policy.encode_images([segment.image])
            vocabulary = engine.policy.vocabulary
            assert segment.modality is Modality.IMAGE_TOKENS
            assert segment.ids.tolist() == [vocabulary.boi, *codes.tolist(), vocabulary.eoi]
            if index + 1 < len(trajectory.segments):
                assert index in [piece.segment for piece in trajectory.segments[index + 1].contexts[0].pieces]
    assert crops > 3 and errors > 3
    assert engine.stats.tool_calls == {"look": crops + errors} and engine.stats.tool_errors == {"look": errors}


def test_the_scorer_finds_the_engines_logprobs(thoughts):
    engine, written = thoughts
    with torch.no_grad():
        scored = score_trajectories(engine.policy, written)
    assert float(scored.log_ratio_N.abs().max()) < 1e-5
    assert len(scored.logprob_N) == sum(t.num_decisions() for t in written)
    # and the crop matters: another one in its place changes what follows it
    other = [t for t in written if any(s.role == "crop" for s in t.segments)][0]
    seen = next(s for s in other.segments if s.role == "crop")
    before = seen.ids
    seen.ids = np.concatenate([before[:1], engine.policy.vocabulary.code_ids[: len(before) - 2], before[-1:]])
    with torch.no_grad():
        assert float(score_trajectories(engine.policy, [other]).log_ratio_N.abs().max()) > 1e-3
    seen.ids = before


def test_the_crop_is_kept_shown_and_counted_as_the_environments(thoughts, tmp_path):
    _, written = thoughts
    save_trajectories(written, tmp_path / "kept")
    for trajectory, again in zip(written, load_trajectories(tmp_path / "kept"), strict=True):
        crops = [i for i, s in enumerate(trajectory.segments) if s.role == "crop"]
        frames = film_of(again).frames
        assert [f.role for f in frames] == [s.role for s in trajectory.segments[1:]]
        for index in crops:
            np.testing.assert_array_equal(again.segments[index].image, trajectory.segments[index].image)
            shown = frames[index - 1]
            assert shown.author == "environment" and shown.image.startswith("data:image/png")
            assert frames[index - 2].role == "look"
        calls = tool_calls(again)
        assert [call.returned_image for call in calls if call.ok] == [True] * len(crops)


def test_the_crop_is_in_the_table_of_the_tracker(thoughts, tmp_path):
    _, written = thoughts
    mirror = WandbMirror(tmp_path, mode="offline", project="x", entity=None, name="x", recipe={})
    some = [t for t in written if any(s.role == "crop" for s in t.segments)][:2]
    mirror._add(1, some)
    for row, trajectory in zip(mirror._table.data, some, strict=True):
        told, image = row[mirror._table.columns.index("thought")], row[mirror._table.columns.index("images")]
        roles = [s.role for s in trajectory.segments if s.image is not None]
        assert image._caption == ", ".join(roles) and "crop" in roles and "[crop] " in told


def test_rewards_are_shown_nothing_of_the_environments(thoughts):
    _, written = thoughts
    some = 0
    for trajectory in written:
        answers = [s for s in trajectory.segments if s.author is Author.ENVIRONMENT]
        own = [s for s in trajectory.segments if s.author is Author.POLICY]
        some += len(answers)
        assert policy_text(trajectory) == "".join(s.text for s in own)
        assert [id(image) for _, image in policy_images(trajectory)] == [
            id(s.image) for s in own if s.image is not None
        ]
        told = [m["content"] for m in completion(trajectory)]
        parts = [p for c in told for p in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]
        assert sum(p["type"] == "image" for p in parts) == sum(s.image is not None for s in own)
        assert "".join(p["text"] for p in parts if p["type"] == "text") == policy_text(trajectory)
    assert some > 6


def test_a_picture_of_another_size_and_frames():
    wide = np.zeros((20, 64, 3), np.uint8)
    wide[:, 32:] = 255
    engine = look_engine(tools=Tools({"look": Replies(wide)}))
    seen = [s for t in engine.run(REQUESTS[:1]) for s in t.segments if s.role == "crop"]
    assert seen and all(s.image.shape == (20, 64, 3) and len(s.ids) == 18 for s in seen)


def test_the_pool_counts_calls_and_errors():
    rollouts = LocalRollouts(look_engine())
    metrics = rollouts.generate(REQUESTS[:2]).metrics
    rollouts.close()
    assert metrics["rollout/tools/calls/look"] == metrics["rollout/tools/calls"] > 0
    assert metrics["rollout/tools/errors/look"] == metrics["rollout/tools/errors"] > 0
    assert metrics["rollout/tools/parked_s"] > 0 and metrics["rollout/tools/waited_s"] >= 0


def test_the_images_constraint_calls_tools_too():
    """Words are free there, and the call closes on its own last id."""
    policy = numerate_policy("<ins>", "</ins>", "<look>", "</look>")
    fmt = FormatConfig(name="look").build()
    engine = Engine(policy, fmt, RolloutConfig(rows=8, max_tokens=100), "images", build_tools(TOOLS))
    written = engine.run(REQUESTS)
    assert sum(engine.stats.tool_calls.values()) > 3
    with torch.no_grad():
        assert float(score_trajectories(policy, written).log_ratio_N.abs().max()) < 1e-5
