"""The warm start: what is learned, how it is weighed, and what a run leaves on the disk. Tiny policies throughout."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ChameleonForConditionalGeneration
from trl import SFTTrainer

from formats.base import Part
from formats.registry import get_format
from policy.chameleon.family import load
from policy.chameleon.model import load_model
from policy.config import LoraSection
from record.store import save_trajectories
from record.trajectory import Author, DecisionKind, Modality, Segment, StopReason, Trajectory, full_history
from runtime.errors import UserError
from runtime.interrupt import Interrupted
from sft.checkpoints import finished_checkpoints, newest, write_manifest
from sft.config import SftConfig
from sft.demonstrations import check_demonstrations, demonstrate, render_all
from sft.losses import learned, weighted_cross_entropy
from sft.teacher_forcing import examples
from sft.train import _arguments, role_names, warm_start
from sft.trainer import InterleavedSftTrainer, Means, trainer_of
from tasks.base import Demonstration
from tests.chameleon_helpers import WORDS, prompt_segment, small_config, small_policy
from tests.properties import examples as tried
from tests.test_trainer_processes import launch
from training.tracking import Tracker, read_metrics

FAST = {
    "demonstrations": 1,
    "batch_size": 4,
    "warmup_steps": 0,
    "learning_rate": 3e-3,
    "logging_steps": 2,
    "save_steps": 100,
}
TIMES = {"sft/tokens_per_s"}
FMT = get_format("strokes", max_images=4)
IGNORE = -100


def section(**changes) -> SftConfig:
    return SftConfig(**(FAST | {"max_steps": 6} | changes))


def text(policy, role, words, trained=True, author=Author.POLICY):
    return Segment(role, author, Modality.TEXT, trained, np.array(policy.vocabulary.encode(words), np.int32), words)


def image(policy, seed, trained=True, role="sketch"):
    v = policy.vocabulary
    codes = np.random.default_rng(seed).choice(v.code_ids, v.codes_per_image)
    return Segment(role, Author.POLICY, Modality.IMAGE_TOKENS, trained, np.array([v.boi, *codes, v.eoi], np.int32))


def written(policy, count=12, images=(1, 2, 1), seed=0) -> list[Trajectory]:
    """Plan, image, inspection; sometimes a second image."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for group in range(count):
        prompt = " ".join(rng.choice(WORDS[:5], 2))
        segments = [prompt_segment(policy, prompt)]
        for number in range(images[group % len(images)]):
            segments += [
                text(policy, "plan", " ".join(rng.choice(WORDS[:5], 1 + group % 4))),
                image(policy, group % 3 + 10 * number),
                text(policy, "inspect", "fine ."),
            ]
        trajectories.append(Trajectory(prompt, {}, "strokes", segments, group=group, stop=StopReason.DEMONSTRATION))
    return trajectories


def trainer_for(policy, trajectories, folder, roles=(), **changes) -> InterleavedSftTrainer:
    from datasets import Dataset

    config = section(**changes)
    found, _ = examples(trajectories, FMT, policy, policy.max_length)
    trainer = trainer_of(
        policy,
        section=config,
        examples=found,
        roles=roles,
        train_dataset=Dataset.from_dict({"index": list(range(len(found)))}),
        args=_arguments(config, folder, 0, cpu=True),
    )
    assert isinstance(trainer, InterleavedSftTrainer)
    return trainer


def all_of(trajectories):
    """Them all as one batch."""
    return {"index": torch.arange(len(trajectories))}


def labelled(trajectory) -> tuple[list[int], list[int]]:
    """All ids, and the learned ones where they stand: what the policy itself would decide, so no end marker."""
    labels: list[int] = []
    for s in trajectory.segments:
        ids = s.ids.tolist()
        learned = ids if s.modality is Modality.TEXT else [*ids[:-1], IGNORE]
        labels += learned if s.trained else [IGNORE] * len(ids)
    return [int(i) for s in trajectory.segments for i in s.ids], labels


def padded(policy, trajectories):
    """A row a trajectory, as transformers' and TRL's own collators would have them."""
    rows = [labelled(trajectory) for trajectory in trajectories]
    length = max(len(ids) for ids, _ in rows)
    fill = lambda values, with_: torch.tensor([[*v, *[with_] * (length - len(v))] for v in values])  # noqa: E731
    return {
        "input_ids": fill([ids for ids, _ in rows], policy.vocabulary.pad),
        "labels": fill([labels for _, labels in rows], IGNORE),
        "attention_mask": fill([[1] * len(ids) for ids, _ in rows], 0),
    }


@pytest.fixture(scope="module")
def policy():
    return small_policy()


# ---- what is learned ----


def test_prompt_forced_markers_and_untrained_segments_are_not_learned(policy):
    v = policy.vocabulary
    trajectory = Trajectory(
        "a red circle",
        {},
        "strokes",
        [
            prompt_segment(policy, "a red circle"),
            text(policy, "plan", "red circle"),
            image(policy, 1),
            text(policy, "observation", "fine", trained=False, author=Author.ENVIRONMENT),
            image(policy, 2, trained=False),
            text(policy, "inspect", "wrong ."),
        ],
    )
    (example,), cut = examples([trajectory], FMT, policy, 256)
    prompt, plan, sketch, observation, bad, inspect = example.trajectory.segments
    assert plan.decisions.position_N.tolist() == list(range(len(plan.ids)))
    assert sketch.decisions.position_N.tolist() == list(range(len(sketch.ids) - 1)) and sketch.ids[-1] == v.eoi
    assert sketch.decisions.kind_N.tolist() == [DecisionKind.WORD] + [DecisionKind.CODE] * v.codes_per_image
    assert inspect.decisions.position_N.tolist() == list(range(len(inspect.ids)))
    assert all(s.decisions is None and s.contexts == () for s in (prompt, observation, bad))
    for s in (plan, sketch, inspect):
        sampling = s.decisions.sampling
        assert set(sampling.temperature_N) == {1} and set(sampling.allowed_N) == {-1} and sampling.guidance is None
        assert np.isnan(s.decisions.logprob_N).all()  # nobody sampled them
    # the plain history, at consecutive positions
    assert inspect.contexts == (full_history(trajectory, 5),)
    assert trajectory.segments[1].decisions is None  # what was given stays as it is
    assert [one.decisions for one in example.passes] == [len(plan.ids) + len(sketch.ids) - 1 + len(inspect.ids)]
    assert (cut.rows, cut.shortened, cut.dropped) == (1, 0, 0)


@tried(0.6)
@given(lengths=st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=8), limit=st.integers(3, 90))
def test_a_long_row_loses_whole_segments_from_its_end(policy, lengths, limit):
    segments = [prompt_segment(policy, "a")]
    for number, (is_image, words) in enumerate(lengths):
        segments.append(image(policy, number) if is_image else text(policy, "plan", " ".join(["red"] * words)))
    trajectory = Trajectory("a", {}, "strokes", segments)
    try:
        (example,), cut = examples([trajectory], FMT, policy, limit)
    except UserError as error:
        assert "sft.max_length" in str(error)
        assert len(segments[0].ids) + len(segments[1].ids) > limit
        return
    kept = example.trajectory.segments
    ends = np.cumsum([len(s.ids) for s in segments])
    assert ends[len(kept) - 1] <= limit
    assert cut.shortened == (len(kept) < len(segments))
    assert len(kept) == len(segments) or ends[len(kept)] > limit  # no segment that fits is lost
    for before, after in zip(segments, kept, strict=False):
        assert before.ids is after.ids  # whole, so no image is cut


class OneTask:
    name, words, classes = "one", WORDS, ("circle",)

    def __init__(self, demonstrations):
        self.given = demonstrations

    def prompts(self, split):
        return []

    def demonstrations(self, format, count, seed):
        return self.given[:count]


def drawn(policy, value):
    size = policy.core.config.vq_config.resolution
    return np.full((size, size, 3), value, np.uint8)


def strokes(policy, mistakes=()):
    parts = (
        Part("plan", "<ins> a red circle </ins><des> circle </des>"),
        Part("sketch", image=drawn(policy, 10)),
        Part("inspect", "<inspect> wrong </inspect>"),
        Part("refine", "<refine> red </refine>"),
        Part("redraw", image=drawn(policy, 200)),
        Part("inspect", "<inspect> fine </inspect>"),
    )
    return Demonstration("a red circle", {"tag": "single_object"}, parts, mistakes)


def test_a_needless_text_is_seen_and_what_it_leads_to_is_learned(policy):
    fine = "<inspect> fine </inspect>"
    parts = (
        Part("plan", "<ins> a red circle </ins><des> circle </des>"),
        Part("sketch", image=drawn(policy, 10)),
        Part("inspect", fine),
        Part("plan", "<ins> red </ins><des> circle </des>"),
        Part("sketch", image=drawn(policy, 10)),
        Part("inspect", fine),
    )
    shown = Demonstration("a red circle", {"tag": "single_object"}, parts, needless=(3,))
    (trajectory,) = demonstrate(OneTask([shown]), get_format("strokes"), policy, section(), seed=0)
    assert [s.trained for s in trajectory.segments] == [False, True, True, True, False, True, True]


@pytest.mark.parametrize("learn_mistakes", [False, True])
def test_a_mistake_is_seen_and_imitated_only_when_asked_for(policy, learn_mistakes):
    fmt = get_format("strokes", max_images=2)
    task = OneTask([strokes(policy, mistakes=(1,))])
    (trajectory,) = demonstrate(task, fmt, policy, section(learn_mistakes=learn_mistakes), seed=0)
    check_demonstrations([trajectory], fmt)
    roles = [s.role for s in trajectory.segments]
    assert roles[:6] == ["prompt", "plan", "sketch", "inspect", "refine", "redraw"]
    (example,), _ = examples([trajectory], fmt, policy, 256)
    learned = {s.role: s.decisions is not None for s in example.trajectory.segments}
    assert learned["sketch"] == learn_mistakes
    assert learned["redraw"] and learned["inspect"] and learned["plan"] and not learned["prompt"]


# ---- the loss ----


def by_hand(policy, trajectories, image_weight=1.0):
    """Each one by itself, through the full logits."""
    codes = set(policy.vocabulary.code_ids.tolist())
    total = weight = 0.0
    for trajectory in trajectories:
        ids, labels = labelled(trajectory)
        with torch.no_grad():
            logits_TV = policy.core(input_ids=torch.tensor([ids])).logits[0].double()
        for at, label in enumerate(labels):
            if label != IGNORE and at > 0:
                w = image_weight if label in codes else 1.0
                total -= w * float(logits_TV[at - 1].log_softmax(-1)[label])
                weight += w
    return total / weight


@pytest.mark.parametrize("image_weight", [1.0, 0.25, 0.0])
def test_loss_is_the_cross_entropy_of_full_unmasked_logits(policy, tmp_path, image_weight):
    trajectories = written(policy, 6)
    trainer = trainer_for(policy, trajectories, tmp_path, image_weight=image_weight)
    loss = trainer.compute_loss(policy.model, all_of(trajectories)).detach()
    assert float(loss) == pytest.approx(by_hand(policy, trajectories, image_weight), abs=1e-5)


def test_weighted_cross_entropy_by_hand():
    # -(1 * -1 + 0.5 * -2 + 0.5 * -4) / (1 + 0.5 + 0.5) = 4 / 2
    logprob_N, image_N = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([False, True, True])
    assert float(weighted_cross_entropy(logprob_N, torch.ones(3), image_N, 0.5)) == 2.0
    # -(3 * -1 + 0.5 * 2 * -2 + 0.5 * 2 * -4) / (3 + 1 + 1) = 9 / 5
    loss = weighted_cross_entropy(logprob_N, torch.tensor([3.0, 2.0, 2.0]), image_N, 0.5)
    assert float(loss) == pytest.approx(1.8)


def test_decisions_weigh_as_their_role_says(policy):
    trajectories = written(policy, 4)
    found, _ = examples(trajectories, FMT, policy, 256)
    passes = [one for example in found for one in example.passes]
    scored = policy.score(passes)
    by = learned(passes, scored, role_names(trajectories), {"inspect": 4.0, "sketch": 0.0})
    expected = [
        {"inspect": 4.0, "sketch": 0.0}.get(segment.role, 1.0)
        for trajectory in trajectories
        for segment in trajectory.segments
        if segment.trained
        for _ in segment.ids[: len(segment.ids) - (segment.modality is not Modality.TEXT)]
    ]
    assert by.weight_N.tolist() == expected
    assert int(by.code_N.sum()) == 16 * sum(s.modality is not Modality.TEXT for t in trajectories for s in t.segments)


def test_on_words_alone_it_is_the_loss_of_transformers_and_trl(policy, tmp_path):
    trajectories = [
        Trajectory("a", {}, "strokes", [prompt_segment(policy, "a red"), text(policy, "plan", words)])
        for words in ("red circle", "a blue square left of a red circle", ".")
    ]
    trainer = trainer_for(policy, trajectories, tmp_path)
    ours = float(trainer.compute_loss(policy.model, all_of(trajectories)).detach())
    batch = padded(policy, trajectories)
    assert ours == pytest.approx(float(policy.core(**batch).loss.detach()), abs=1e-6)
    trls = SFTTrainer.compute_loss(trainer, policy.model, batch)
    assert ours == pytest.approx(float(trls.detach()), abs=1e-6)


def test_images_are_learned_here_and_not_by_the_stock_forward(policy, tmp_path):
    trajectories = written(policy, 3)
    codes = torch.as_tensor(policy.vocabulary.code_ids.astype(np.int64))

    def head_gradient(model, loss):
        model.zero_grad()
        loss.backward()
        return model.lm_head.weight.grad[codes].abs().max().item()

    weights = {role: 0.0 for role in role_names(trajectories) if role != "sketch"}
    trainer = trainer_for(policy, trajectories, tmp_path, role_names(trajectories), role_weights=weights)
    ours = trainer.compute_loss(policy.model, all_of(trajectories))
    assert float(ours.detach()) < 20 and head_gradient(policy.core, ours) > 1e-4
    policy.core.zero_grad(set_to_none=True)

    batch = padded(policy, trajectories)
    only_codes = torch.where(torch.isin(batch["labels"], codes), batch["labels"], IGNORE)
    stock = ChameleonForConditionalGeneration(policy.core.config)
    stock.load_state_dict(policy.core.state_dict(), strict=False)
    loss = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=only_codes).loss
    assert not torch.isfinite(loss) or float(loss) > 1e30  # the codes' logits are the dtype's minimum
    assert head_gradient(stock, loss) == 0.0


# ---- losses by role ----


def test_means_by_role_by_hand():
    means = Means(["inspect", "plan", "sketch"])
    means.add_by_role(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]))
    means.add_by_role(torch.tensor([7.0]), torch.tensor([1]))
    means.add("loss", torch.tensor([3.0]))
    one = SimpleNamespace(num_processes=1)
    # plan: (1 + 4 + 7) / 3; of sketch nothing was learned, so there is no mean
    assert means.take(one) == {"loss": 3.0, "loss/inspect": 2.0, "loss/plan": 4.0}
    assert means.take(one) == {}
    means.load({"loss": [1.0, 2.0], "loss_text": [0, 0], "loss_image": [0, 0], "loss_visual": [0, 0]})  # of release 0.1
    assert means.take(one) == {"loss": 0.5}


def test_the_loss_by_role_is_the_mean_over_the_roles_learned_ids_and_leaves_the_total(policy, tmp_path):
    trajectories = written(policy, 6)
    weights = {"inspect": 4.0, "sketch": 0.5}  # what a role weighs in the total is not in its own mean
    roles = role_names(trajectories)
    assert roles == ["inspect", "plan", "prompt", "sketch"]
    with_roles = trainer_for(policy, trajectories, tmp_path, roles, image_weight=0.25, role_weights=weights)
    without = trainer_for(policy, trajectories, tmp_path, (), image_weight=0.25, role_weights=weights)
    losses = [trainer.compute_loss(policy.model, all_of(trajectories)).detach() for trainer in (with_roles, without)]
    assert torch.equal(losses[0], losses[1])
    found = with_roles.means.take(with_roles.accelerator)
    assert set(without.means.take(without.accelerator)) == {"loss", "loss_text", "loss_image"}

    # One row at a time, through the full logits: the segment of each learned id says its role.
    codes = set(policy.vocabulary.code_ids.tolist())
    nll: dict[str, list[float]] = {}
    for trajectory in trajectories:
        ids, labels = labelled(trajectory)
        with torch.no_grad():
            logprob_TV = policy.core(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        role_T = [segment.role for segment in trajectory.segments for _ in segment.ids]
        for at, label in enumerate(labels):
            if label != IGNORE:
                for name in (f"loss/{role_T[at]}", "loss_image" if label in codes else "loss_text"):
                    nll.setdefault(name, []).append(-float(logprob_TV[at - 1, label]))
    assert set(nll) == {"loss/inspect", "loss/plan", "loss/sketch", "loss_text", "loss_image"}
    # An image's first marker is the policy's choice and a word: 8 images of 16 codes.
    assert len(nll["loss/sketch"]) == 8 * 17 and len(nll["loss_image"]) == 8 * 16
    for name, values in nll.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-5)


# ---- runs ----


def test_a_run_learns_and_its_saved_folder_gives_the_same_logits(tmp_path):
    policy = small_policy()
    trajectories = written(policy)
    tracker = Tracker(tmp_path / "sft")
    last = warm_start(policy, FMT, trajectories, section(max_steps=25, learning_rate=1e-2), tmp_path, tracker=tracker)
    rows = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(2, 25, 2), 25]
    for name in (
        "sft/loss",
        "sft/loss/inspect",
        "sft/loss/plan",
        "sft/loss/sketch",
        "sft/loss_text",
        "sft/loss_image",
        "sft/grad_norm",
        "sft/learning_rate",
        "sft/tokens_per_s",
    ):
        assert all(row[name] is not None for row in rows), name
    assert rows[-1]["sft/loss"] < 0.6 * rows[0]["sft/loss"]
    assert rows[-1]["sft/loss"] == last["loss"]
    again = load_model(tmp_path / "sft" / "model")
    ids = torch.tensor([labelled(trajectories[0])[0]])
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(input_ids=ids).logits, policy.core(input_ids=ids).logits, atol=0, rtol=0
        )


def test_batches_that_accumulate_into_a_step_are_averaged(tmp_path):
    """Two batches of a step give the mean of their gradients, not the sum."""
    norms = []
    for name, changes in (
        ("whole", {"batch_size": 8}),
        ("halves", {"batch_size": 4, "gradient_accumulation_steps": 2}),
    ):
        policy = small_policy()
        trajectories = written(policy, 1) * 8  # alike, so that the whole's mean is the mean of the halves' means
        tracker = Tracker(tmp_path / name / "sft")
        warm_start(
            policy,
            FMT,
            trajectories,
            section(max_steps=1, logging_steps=1, **changes),
            tmp_path / name,
            tracker=tracker,
        )
        (row,) = read_metrics(tmp_path / name / "sft" / "metrics.jsonl")
        norms.append((row["sft/loss"], row["sft/grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def lines(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder / "sft" / "metrics.jsonl")]


class Signal:
    """Sends one while step `at` is shown."""

    def __init__(self, at, number):
        self.at, self.number = at, number

    def on_metrics(self, step, metrics):
        if step == self.at:
            self.at = None
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "lora, number, code",
    [(None, signal.SIGINT, 130), (LoraSection(r=4, alpha=8), signal.SIGTERM, 143), (None, signal.SIGUSR1, 138)],
    ids=["full", "lora", "warned"],
)
def test_stopped_by_a_signal_and_resumed_is_the_run_that_was_never_stopped(tmp_path, lora, number, code):
    def run(folder, resume=False, listener=None):
        torch.manual_seed(0)  # adapters are initialised at random
        policy = small_policy(lora)
        tracker = Tracker(folder / "sft")
        tracker.listeners += [listener] if listener else []
        try:
            warm_start(
                policy,
                FMT,
                written(policy, 14),
                section(max_steps=7, logging_steps=3, visual_loss=0.5),
                folder,
                tracker=tracker,
                resume=resume,
            )
        finally:
            tracker.close()
        return policy.merged_state() if lora else policy.core.state_dict()

    whole = run(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"stopped after step 5 of 7; saved in .*checkpoint-5.*--resume") as stopped:
        run(tmp_path / "parts", listener=Signal(5, number))
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
    assert not (tmp_path / "parts" / "sft" / "model").exists()
    resumed = run(tmp_path / "parts", resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize("lora", [None, LoraSection(r=4, alpha=8)], ids=["full", "lora"])
def test_killed_between_the_last_checkpoint_and_the_end_trains_no_further(tmp_path, lora):
    def run(resume=False):
        torch.manual_seed(0)
        policy = small_policy(lora)
        tracker = Tracker(tmp_path / "sft")
        last = warm_start(
            policy,
            FMT,
            written(policy),
            section(max_steps=3, logging_steps=3),
            tmp_path,
            tracker=tracker,
            resume=resume,
        )
        tracker.close()
        return last, {name: tensor.clone() for name, tensor in policy.core.state_dict().items()}

    last, weights = run()
    told = json.loads((tmp_path / "sft" / "done.json").read_text())
    before = lines(tmp_path)
    (tmp_path / "sft" / "done.json").unlink()
    shutil.rmtree(tmp_path / "sft" / "model")
    again, taken = run(resume=True)
    assert again == last and lines(tmp_path) == before
    assert json.loads((tmp_path / "sft" / "done.json").read_text()) == told
    assert (tmp_path / "sft" / "model" / "config.json").is_file()
    for name, tensor in weights.items():
        torch.testing.assert_close(taken[name], tensor, atol=0, rtol=0)


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tmp_path):
    """SIGKILL in the middle of writing leaves a folder without whole.json, and lines of metrics that come again."""

    def run(folder, resume=False, steps=6):
        policy = small_policy()
        tracker = Tracker(folder / "sft")
        warm_start(
            policy, FMT, written(policy), section(max_steps=steps, save_steps=2), folder, tracker=tracker, resume=resume
        )

    run(tmp_path / "whole")
    run(tmp_path / "killed", steps=6)
    output = tmp_path / "killed" / "sft"
    (output / "checkpoint-6" / "whole.json").unlink()
    (output / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    assert newest(output) == output / "checkpoint-4"
    run(tmp_path / "killed", resume=True)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert [path.name for path in finished_checkpoints(output)] == ["checkpoint-4", "checkpoint-6"]


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    policy = small_policy()
    (tmp_path / "sft" / "checkpoint-3").mkdir(parents=True)
    write_manifest(tmp_path / "sft" / "checkpoint-3")
    with pytest.raises(UserError, match="already holds a warm start .checkpoint-3.*--resume"):
        warm_start(policy, FMT, written(policy), section(), tmp_path)


PROCESSES = """
import json
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from sft.train import warm_start
from tests.chameleon_helpers import small_policy
from tests.test_sft import FMT, section, written
from training.tracking import Tracker

folder, accumulate, visual_loss = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
policy = small_policy()
tracker = Tracker(folder / "sft") if PartialState(cpu=True).is_main_process else None
config = section(max_steps=3, logging_steps=1, visual_loss=visual_loss, gradient_accumulation_steps=accumulate)
warm_start(policy, FMT, written(policy, 16), config, folder, tracker=tracker)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # imports everything twice
@pytest.mark.parametrize("visual_loss", [0.5, {"kind": "mvot"}], ids=["twgi", "mvot"])
def test_two_processes_give_the_losses_and_weights_of_one_that_accumulates(tmp_path, visual_loss):
    launch(1, PROCESSES, str(tmp_path / "one"), "2", json.dumps(visual_loss))
    launch(2, PROCESSES, str(tmp_path / "two"), "1", json.dumps(visual_loss))
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 3
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, abs=2e-6, rel=1e-4)
    first, second = (load_model(tmp_path / name / "sft" / "model").state_dict() for name in ("one", "two"))
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=2e-5, rtol=1e-4)


JOB = """
import sys
from pathlib import Path
from tests.test_cli import QUICKSTART, SMALL
from underdrawing import build
from underdrawing.jobs import run_sft
from underdrawing.recipe import load_recipe

def counted(function):
    return lambda *args, **kwargs: wrote.append(function.__name__) or function(*args, **kwargs)

wrote = []
build.write_recipe, build.build_tracker = counted(build.write_recipe), counted(build.build_tracker)
recipe = load_recipe(QUICKSTART, [*SMALL, f"run_dir={sys.argv[1]}", "sft.max_steps=2", "sft.logging_steps=1"])
run_sft(recipe)
from accelerate import PartialState
Path(sys.argv[1], f"wrote{PartialState().process_index}").write_text(" ".join(wrote))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # imports everything twice
def test_of_several_processes_the_first_one_writes(tmp_path):
    launch(2, JOB, str(tmp_path))
    assert [row["step"] for row in read_metrics(tmp_path / "sft" / "metrics.jsonl")] == [1, 2]
    assert [(tmp_path / f"wrote{rank}").read_text() for rank in (0, 1)] == ["write_recipe build_tracker", ""]
    assert (tmp_path / "sft" / "model" / "config.json").is_file()


# ---- bad input ----


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"cut"), "optimizer.pt: not what was written .3 bytes"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt: missing from the checkpoint"),
        (lambda folder: (folder / "whole.json").write_text("{"), "whole.json: not JSON"),
    ],
)
def test_a_corrupt_checkpoint_is_named(tmp_path, spoil, sentence):
    policy = small_policy()
    folder = tmp_path / "sft" / "checkpoint-2"
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(b"12345678")
    write_manifest(folder)
    spoil(folder)
    with pytest.raises(UserError, match=sentence):
        warm_start(policy, FMT, written(policy), section(), tmp_path, resume=True)


def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(tmp_path):
    """A limit on the size of a file makes the kernel refuse the write, as a full disk does."""
    policy = small_policy()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Fill:
        def on_metrics(self, step, metrics):
            if step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    tracker = Tracker(tmp_path / "sft")
    tracker.listeners.append(Fill())
    try:
        with pytest.raises(UserError, match="checkpoint-4: cannot be written.*free some space") as error:
            warm_start(policy, FMT, written(policy), section(save_steps=2), tmp_path, tracker=tracker)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert error.value.exit_code == 2
    assert [path.name for path in (tmp_path / "sft").glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest(tmp_path / "sft") == tmp_path / "sft" / "checkpoint-2"


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "sft").write_text("a file")
    policy = small_policy()
    with pytest.raises(UserError, match=f"{tmp_path / 'sft'}: cannot be written"):
        warm_start(policy, FMT, written(policy), section(), tmp_path)


def test_stored_demonstrations_that_are_missing_or_corrupt_are_named(tmp_path, policy):
    fmt = get_format("strokes", max_images=2)
    with pytest.raises(UserError, match="sft.data: there is no .*nowhere"):
        demonstrate(OneTask([]), fmt, policy, section(data=str(tmp_path / "nowhere")), 0)
    trajectories = render_all([strokes(policy)] * 3, fmt, policy)
    save_trajectories(trajectories, tmp_path / "stored")
    loaded = demonstrate(OneTask([]), fmt, policy, section(data=str(tmp_path / "stored")), 0)
    assert [labelled(trajectory) for trajectory in loaded] == [labelled(trajectory) for trajectory in trajectories]
    table = tmp_path / "stored" / "segments.parquet"
    table.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(UserError, match="segments.parquet"):
        demonstrate(OneTask([]), fmt, policy, section(data=str(tmp_path / "stored")), 0)


def test_a_demonstration_that_the_format_rejects_is_named(policy):
    fmt = get_format("strokes", max_images=2)
    good, bad = render_all([strokes(policy)] * 2, fmt, policy)
    check_demonstrations([good], fmt)
    del bad.segments[2]  # the sketch
    with pytest.raises(UserError, match=r"demonstration 1 .'a red circle'., segment \d+: "):
        check_demonstrations([good, bad], fmt)
    with pytest.raises(UserError, match="written in the format 'strokes', but the recipe's is 'subgoals'"):
        check_demonstrations([good], get_format("subgoals"))


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    policy = small_policy()
    trajectories = written(policy)
    trajectories[3].segments[1].ids[0] = policy.vocabulary.size + 5
    with pytest.raises(UserError, match="written by another tokenizer"):
        warm_start(policy, FMT, trajectories, section(), tmp_path)


def test_weights_of_16_bits_are_refused(tmp_path):
    config = small_config().model_copy(update={"dtype": "bfloat16"})
    policy = load(config, WORDS)
    with pytest.raises(UserError, match="is to be trained in bfloat16, .*policy.dtype: float32, or train adapters"):
        warm_start(policy, FMT, written(policy), section(), tmp_path)
    assert not (tmp_path / "sft").exists()
    adapted = load(config.model_copy(update={"lora": LoraSection(r=4, alpha=8)}), WORDS)
    tracker = Tracker(tmp_path / "sft")
    assert warm_start(adapted, FMT, written(adapted), section(max_steps=1), tmp_path, tracker=tracker)["loss"] > 0


def test_nothing_to_learn_from_is_a_sentence(policy):
    trajectory = Trajectory("a", {}, "strokes", [prompt_segment(policy, "a")])
    with pytest.raises(UserError, match="no demonstration has a trained segment"):
        examples([trajectory], FMT, policy, 256)


def test_done_says_how_far_it_came(tmp_path):
    policy = small_policy()
    last = warm_start(policy, FMT, written(policy), section(max_steps=2), tmp_path)
    done = json.loads((Path(tmp_path) / "sft" / "done.json").read_text())
    assert done["steps"] == 2 and done["loss"] == last["loss"]
