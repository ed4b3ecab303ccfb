"""A run's folder to report.html: before and after, learning curves, and a filmstrip for every sampled trajectory.

Reads only the record (stored trajectories), metrics.jsonl and the evaluations' summaries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from evals.calibration import Calibration
from evals.kept import COMPARED_UNDER, CRITIQUES, DURING, read_critiques
from evals.measures import FINAL_IMAGE, FIRST_SKETCH, REWARD
from record.store import load_trajectories
from record.trajectory import Author, Trajectory
from runtime.errors import UserError, writing
from runtime.files import write_whole
from tasks.images import data_url
from training.tracking import read_metrics
from training.wandb_mirror import filmstrip, pictures_of
from underdrawing.report.charts import PALETTE, Series, bars, line_chart
from underdrawing.report.reliability import critiques_of
from underdrawing.report.scaling import plot_of
from underdrawing.report.why import why_of
from underdrawing.why import Explanation, explain

# Curves in the order of what one looks at first: (title, patterns of metric names, y range).
CURVES: tuple[tuple[str, tuple[str, ...], tuple[float | None, float | None]], ...] = (
    ("Reward", (r"reward/mean",), (None, None)),
    ("Reward of candidates at a state", (r"forks/reward/mean",), (None, None)),
    ("What a picture was worth, in reward", (r"image_credit/worth/.+",), (None, None)),
    ("Groups begun from a picture: means of reward", (r"restart/(picture|result|reward)",), (None, None)),
    ("Groups begun from a picture: shares", (r"restart/(left|better|worse)",), (0.0, 1.0)),
    ("Held-out score", (r"heldout/(first_sketch|final_image)",), (0.0, None)),
    ("Held-out reward", (r"heldout/reward",), (None, None)),
    ("Reward parts", (r"reward/(?!mean$|std$)[^/]+",), (None, None)),
    ("Critiques", (r"reward/[^/]+/(rubber_stamp_rate|approves_wrong|right_fine|right_wrong)",), (0.0, 1.0)),
    ("Critiques: approved but wrong", (r"(heldout/)?calibration/approved_but_wrong_of_\w+",), (0.0, 1.0)),
    ("Critiques: called wrong but right", (r"(heldout/)?calibration/disturbed_but_right_of_\w+",), (0.0, 1.0)),
    (
        "Calibration of critiques",
        (r"(heldout/)?calibration/(brier|expected_calibration_error)",),
        (0.0, None),
    ),
    ("Entropy of decisions, nats", (r"entropy/[^/]+",), (0.0, None)),
    ("KL to the reference", (r"kl",), (0.0, None)),
    ("Share of clipped decisions", (r"clip/(low|high)",), (0.0, None)),
    ("On-policy gap, nats", (r"on_policy_gap",), (0.0, None)),
    ("An inexact writer's log-probs off the trainer's, nats", (r"sampling/sampling_logp_difference/.*",), (0.0, None)),
    ("Groups", (r"groups/trained", r"groups/dropped/.*"), (0.0, None)),
    ("Images drawn a step", (r"rollout/images",), (0.0, None)),
    ("Tool use, and how the images of a group differ", (r"rollout/(tool_rate|diversity|duplicates)",), (0.0, None)),
    ("Tool calls a step, and those answered with an error", (r"rollout/tools/(calls|errors)",), (0.0, None)),
    ("Gradient norm", (r"grad_norm",), (0.0, None)),
    ("Tokens a second", (r"rollout/tokens_per_s", r"perf/trained_tokens_per_s"), (0.0, None)),
    ("Warm-start loss, nats", (r"sft/loss_(text|image)",), (0.0, None)),
    ("Warm-start loss by role, nats", (r"sft/loss/[^/]+",), (0.0, None)),
    ("Warm-start loss by verdict, nats", (r"sft/loss/[^/]+/(right|wrong)",), (0.0, None)),
)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation's summary.json with its stored trajectories."""

    label: str
    score: float
    by_tag: Mapping[str, float]
    prompts: int
    measures: Mapping[str, float] = field(default_factory=dict)  # name to mean: first_sketch, final_image, reward ...
    score_of: str = FINAL_IMAGE  # the measure that is the score
    samples: int = 1  # answers to each prompt
    trajectories: Sequence[Trajectory] = ()
    step: int | None = None  # of the run; None: not known
    time: str = ""  # when, in UTC
    settings: Mapping[str, Any] = field(default_factory=dict)  # empty: not known
    scaling: str = ""  # the plot of its test-time scaling; empty: it was not measured
    calibration: Calibration | None = None  # of its critiques; None: they were not judged

    @property
    def score_means(self) -> str:
        """What the score is of, for the page's caption."""
        return {FINAL_IMAGE: "the share of right images", REWARD: "the recipe's reward"}.get(
            self.score_of, f"the measure {self.score_of}"
        )

    @property
    def during_training(self) -> bool:
        return self.label.startswith(DURING)

    def compares_with(self, other: Evaluation) -> bool:
        """Whether the two scores are of the same prompts, samples, sampling and detector, as far as is known."""
        if (self.prompts, self.samples) != (other.prompts, other.samples):
            return False
        values = [(self.settings.get(key), other.settings.get(key)) for key in COMPARED_UNDER]
        return self.score_of == other.score_of and all(None in (a, b) or a == b for a, b in values)


@dataclass(frozen=True)
class ReportData:
    """All that the page shows."""

    title: str
    subtitle: str
    metrics: Sequence[Mapping[str, Any]] = ()
    before: Evaluation | None = None
    after: Evaluation | None = None
    interval: tuple[float, float] | None = None  # 95% paired bootstrap of after - before
    evaluations: Sequence[Evaluation] = ()  # all of them, the earliest steps first
    sampled: Sequence[tuple[int, Sequence[Trajectory]]] = ()  # step, trajectories
    recipe: str = ""
    why: Explanation | None = None  # why the reward went up; None: nothing to tell it by
    notes: Sequence[str] = field(default_factory=tuple)


def write_report(data: ReportData, path: Path) -> Path:
    """Render to one self-contained file, written whole or not at all."""
    return write_page(render(data), Path(path))


def render(data: ReportData) -> str:
    """The page as a string."""
    pairs = _pairs(data.before, data.after)
    return from_template(
        "page.html.j2",
        data=data,
        curves=_curves(data.metrics),
        tag_bars=bars(data.before.by_tag, data.after.by_tag) if data.before and data.after else "",
        pairs=[(film_of(b), film_of(a)) for b, a in pairs],
        why=None if data.why is None else why_of(data.why),
        critiques=critiques_of(
            [(e.label, e.calibration) for e in (data.before, data.after) if e is not None and e.calibration is not None]
        ),
        sampled=[(step, [film_of(t) for t in trajectories]) for step, trajectories in data.sampled],
    )


def from_template(name: str, **values: Any) -> str:
    """A page of this folder, with the style that all of them share."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (folder / "style.css").read_text(encoding="utf-8")
    return environment.get_template(name).render(style=style, **values)


def write_page(html: str, path: Path) -> Path:
    """Whole or not at all. Raises UserError where `path` is a folder or cannot be written."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; give the page's file, such as {path / 'report.html'}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html)
    return path


def report_data(run_dir: Path, title: str | None = None) -> ReportData:
    """Gather what a run's folder holds.

    Raises:
        UserError: the folder is no run: neither metrics (of GRPO or a warm start), evaluations nor trajectories in
            it; or a file of it is cut or altered, by name.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    warm_start = read_metrics(run_dir / "sft" / "metrics.jsonl")
    evaluations = {p.parent.name: p for p in sorted((run_dir / "evaluations").glob("*/summary.json"))}
    stored = sorted((run_dir / "trajectories").glob("*")) if (run_dir / "trajectories").is_dir() else []
    if not (metrics or warm_start or evaluations or stored):
        raise UserError(
            f"{run_dir}: no run here: metrics.jsonl, sft/metrics.jsonl, evaluations/ and trajectories/ are all missing"
        )
    loaded = sorted((_load_evaluation(path) for path in evaluations.values()), key=_order)
    before, after = before_and_after(loaded)
    comparison = run_dir / "evaluations" / "comparison.json"
    interval = _load_interval(comparison, before, after) if comparison.exists() else None
    recipe = run_dir / "recipe.yaml"
    sampled = [(int(folder.name), load_trajectories(folder)) for folder in stored if folder.name.isdigit()]
    return ReportData(
        title=title or run_dir.name,
        subtitle=(
            f"{len(metrics)} steps of GRPO"
            if metrics or not warm_start
            else f"a warm start of {warm_start[-1]['step']} steps, and no GRPO yet"
        ),
        metrics=[*metrics, *warm_start],
        before=before,
        after=after,
        interval=interval,
        evaluations=loaded,
        sampled=[sampled[i] for i in _spread(len(sampled), 5)],
        recipe=recipe.read_text() if recipe.exists() else "",
        why=_why(run_dir),
        notes=alarms_of(metrics),
    )


def _why(run_dir: Path) -> Explanation | None:
    """None where the run has not both ends of a gain, or not the reward's parts."""
    try:
        return explain(run_dir, resamples=2000)
    except UserError:
        return None


def _order(evaluation: Evaluation) -> tuple[int, int, str, str]:
    """The warm start's first and GRPO's last; those between by step and time."""
    place = {"warm_start": 0, "grpo": 2}.get(evaluation.label, 1)
    return place, evaluation.step or 0, evaluation.time, evaluation.label


def before_and_after(ordered: Sequence[Evaluation]) -> tuple[Evaluation | None, Evaluation | None]:
    """The last evaluation and the first one that it compares with. Those during training stand back for others."""
    shown = [e for e in ordered if not e.during_training] or list(ordered)
    after = shown[-1] if shown else None
    before = next((e for e in shown[:-1] if after is not None and e.compares_with(after)), None)
    return before, after


def alarms_of(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each alarm that was ever raised: when first, in how many steps, and at what value."""
    names = sorted({name for row in metrics for name in row if re.fullmatch(r"alarm/\w+", name)})
    told = []
    for name in names:
        raised = [row for row in metrics if row.get(name)]
        if raised:
            value = raised[0].get(f"{name}/value")
            at = f" at {value:.3g}" if value is not None else ""
            told.append(
                f"The alarm '{name.removeprefix('alarm/')}' was first raised at step {raised[0]['step']}{at}, "
                f"and stood in {len(raised)} of {len(metrics)} steps."
            )
    return told


def _spread(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _load_evaluation(path: Path) -> Evaluation:
    label, folder = path.parent.name, path.parent / "trajectories"
    trajectories = load_trajectories(folder) if folder.is_dir() else []
    with _reading(path, f"evaluate those weights again with --label {label}, or remove {path.parent}"):
        summary = json.loads(path.read_text())
        of_release_0_1 = {name: summary[name] for name in (FIRST_SKETCH, FINAL_IMAGE) if name in summary}
        measures = summary.get("measures", of_release_0_1)
        prompts = int(summary["prompts"])
        critiques = read_critiques(path.parent / CRITIQUES, prompts)
        return Evaluation(
            label=label,
            score=float(summary["score"]),
            measures={name: float(mean) for name, mean in measures.items()},
            score_of=str(summary.get("score_of") or FINAL_IMAGE),
            by_tag={tag: float(score) for tag, score in summary["by_tag"].items()},
            prompts=prompts,
            samples=int(summary.get("samples", 1)),
            trajectories=trajectories,
            step=None if summary.get("step") is None else int(summary["step"]),
            time=str(summary.get("time") or ""),
            settings=dict(summary.get("settings") or {}),
            scaling=plot_of(path.parent),
            calibration=Calibration.of(critiques) if critiques else None,
        )


def _load_interval(path: Path, before: Evaluation | None, after: Evaluation | None) -> tuple[float, float] | None:
    """None where the interval is that of two other evaluations."""
    with _reading(path, "remove it, and the report does without the gain's interval"):
        content = json.loads(path.read_text())
        low, high = content["interval"]
        of = content.get("before"), content.get("after")
        shown = before and before.label, after and after.label
        return (float(low), float(high)) if None in of or of == shown else None


@contextmanager
def _reading(path: Path, advice: str) -> Iterator[None]:
    """Within it whatever a file holds that it should not is a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: cannot be read, it may be cut or altered ({reason}); {advice}") from None


def _pairs(before: Evaluation | None, after: Evaluation | None, most: int = 12) -> list[tuple[Trajectory, Trajectory]]:
    """The same held-out prompts before and after, the tags in turn."""
    if before is None or after is None:
        return []
    earlier = {t.key: t for t in before.trajectories}
    both = [(earlier[t.key], t) for t in after.trajectories if t.key in earlier]
    by_tag: dict[str, list[tuple[Trajectory, Trajectory]]] = {}
    for pair in both:
        by_tag.setdefault(str(pair[1].record.get("tag", "")), []).append(pair)
    chosen: list[tuple[Trajectory, Trajectory]] = []
    while len(chosen) < min(most, len(both)):
        for queue in by_tag.values():
            if queue:
                chosen.append(queue.pop(0))
    return chosen[:most]


@dataclass(frozen=True)
class SeenBox:
    """An object on an image; sides in percent of the image's."""

    label: str
    score: float
    color: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Seen:
    """What the detector sees in an image, and what that means for the prompt."""

    boxes: Sequence[SeenBox]
    correct: bool | None = None  # None: the record asks for nothing
    reason: str = ""


@dataclass(frozen=True)
class Frame:
    """One segment on a filmstrip."""

    role: str
    author: str
    words: list[tuple[str, str]]  # (tag or "", what stands in it)
    image: str  # data URI; empty where the segment has none
    advantage: float | None
    credit: str  # segment rewards by part
    tokens: int
    seen: Seen | None = None  # None: nobody looked
    parts: Sequence[tuple[str, float | None]] = ()  # rewards of this image alone
    inherited: bool = False  # it is the parent's
    pictures: int = 1  # side by side in `image`
    marked: bool = False  # it is what the page is about


@dataclass(frozen=True)
class Film:
    prompt: str
    tag: str
    stop: str
    reward: float | None
    judged: bool  # by a recipe's rewards; an evaluation's scores are no reward
    parts: list[tuple[str, float | None]]
    frames: list[Frame]
    continues: str = ""  # what a fork goes on from


def film_of(trajectory: Trajectory, seen: Mapping[int, Seen] | None = None, marked: int | None = None) -> Film:
    """A trajectory as a filmstrip; `seen` is by segment, and `marked` one that is outlined."""
    frames = []
    for index, segment in enumerate(trajectory.segments):
        pictures = pictures_of(segment)
        if segment.author is Author.USER and not pictures:  # the prompt's words stand above
            continue
        advantage = None
        if trajectory.advantage_S is not None and segment.trained:
            advantage = float(trajectory.advantage_S[index])
        credit = "  ".join(
            f"{part} {value:+.2f}"
            for part, credits in trajectory.segment_rewards.items()
            if (value := credits.get(index)) is not None
        )
        if (worth := trajectory.info.get("image_worth", {}).get(str(index))) is not None:
            credit = f"{credit}  worth {worth:+.2f}".strip()
        frames.append(
            Frame(
                segment.role,
                str(segment.author),
                _tagged(segment.text),
                data_url(filmstrip(pictures, height=0)) if pictures else "",
                advantage,
                credit,
                len(segment.ids),
                (seen or {}).get(index),
                inherited=trajectory.parent is not None and index < trajectory.parent[1],
                pictures=max(1, len(pictures)),
                marked=index == marked,
            )
        )
    return Film(
        trajectory.prompt,
        str(trajectory.record.get("tag", "")).replace("_", " "),
        str(trajectory.stop),
        trajectory.reward,
        trajectory.advantage_S is not None or trajectory.reward is not None,
        list(trajectory.rewards.items()),
        frames,
        trajectory.continues,
    )


def _tagged(text: str) -> list[tuple[str, str]]:
    """Text by its tags: `<ins>draw all</ins>` is ("ins", "draw all"). Unpaired tags stay in the text as they are."""
    out, at = [], 0
    for match in re.finditer(r"<(\w+)>(.*?)</\1>", text, re.DOTALL):
        out.append(("", text[at : match.start()].strip()))
        out.append((match[1], match[2].strip()))
        at = match.end()
    out.append(("", text[at:].strip()))
    return [(tag, body) for tag, body in out if tag or body]


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(title, SVG, [(line, color)]) of every curve that has a point."""
    names = sorted({name for row in metrics for name in row})
    out = []
    for title, wanted, (low, high) in CURVES:
        lines = [n for w in wanted for n in names if re.fullmatch(w, n)]
        series = []
        for name in lines[: len(PALETTE)]:
            rows = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
            if any(value for _, value in rows):  # a line that is 0 throughout says nothing
                series.append(Series(name, [r[0] for r in rows], [r[1] for r in rows]))
        svg = line_chart(series, y_from=low, y_to=high) if series else ""
        if svg:
            out.append((title, svg, [(s.name, c) for s, c in zip(series, PALETTE, strict=False)]))
    return out
