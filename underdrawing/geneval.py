"""The command `underdrawing evaluate geneval`: its options, what it prints, and what it leaves on disk.

evals/geneval.py reads, judges and sums up; this is the shell around it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from typing import Any

from runtime.errors import UserError
from runtime.files import write_whole
from runtime.interrupt import stopping, uninterrupted
from runtime.locks import beside, only_writer
from underdrawing.options import Number, Whole, expanded_path

NAME = "geneval"
OPTIONS = ("images", "detections", "prompts", "detector", "mode", "thresholds", "batch_size")
logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """GenEval's options of the command `evaluate`."""
    group = parser.add_argument_group(
        f"evaluate {NAME}", "GenEval on a folder of images: DIR/00000/metadata.jsonl and DIR/00000/samples/0000.png"
    )
    group.add_argument("--images", "--pictures", type=expanded_path, metavar="DIR", help="images in GenEval's layout")
    group.add_argument(
        "--out",
        type=expanded_path,
        metavar="FILE",
        help="result rows; a file that is there is gone on with (default DIR/results.jsonl)",
    )
    group.add_argument(
        "--prompts",
        type=expanded_path,
        metavar="FILE",
        help="GenEval's evaluation_metadata.jsonl: every prompt of it must be there",
    )
    group.add_argument(
        "--detector",
        metavar="WHAT",
        help="mask2former (default), grounding_dino, owlv2 or an embedded world's; "
        "mask2former:FOLDER; a mapping in YAML as under rewards.detector, or a file that holds one; or "
        "your own, package.module:Class",
    )
    group.add_argument(
        "--detections",
        type=expanded_path,
        metavar="FILE",
        help="judge detections made elsewhere, a JSON object "
        "a line: {filename, detections: {class: [{box, score, color}]}}; without --images also metadata",
    )
    group.add_argument("--mode", choices=("standard", "strict"), help="standard (default) or exact counts")
    group.add_argument(
        "--thresholds",
        type=Number(above=-math.inf),
        nargs=2,
        metavar=("SCORE", "COUNTING"),
        help="scores that an object, and one that is counted, must exceed (default 0.3 0.9)",
    )
    group.add_argument(
        "--batch-size", type=Whole(1), metavar="N", help="images looked at between two writes (default 32)"
    )


def refuse_options(options: argparse.Namespace) -> None:
    """Raises UserError for GenEval's options beside a recipe."""
    given = [name for name in (*OPTIONS, "out") if getattr(options, name) is not None]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} belongs to `underdrawing evaluate {NAME}`; with a recipe, the "
            f"recipe says what is evaluated"
        )


def run(options: argparse.Namespace) -> int:
    """Judge all images and print the score; the last line is one JSON object."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from evals import geneval
    from evals.geneval_folder import read_folder
    from evals.geneval_summary import summarise
    from rewards.functions.geneval import THRESHOLDS
    from underdrawing.progress import StepProgress

    if options.overrides or options.dry_run or options.weights is not None or options.label is not None:
        raise UserError(f"evaluate {NAME} takes no recipe, and so no overrides, --dry-run, --weights or --label")
    if options.images is None and options.detections is None:
        raise UserError(f"evaluate {NAME}: give --images DIR, or --detections FILE")
    if options.detections is not None and options.detector is not None:
        raise UserError("--detections are what a detector saw: leave out --detector")
    if options.images is None and (options.out is None or options.prompts is not None):
        raise UserError(
            f"evaluate {NAME}: without --images give --out, the file for the rows"
            if options.out is None
            else "--prompts says what --images must hold: give both"
        )
    thresholds = geneval.check_thresholds(options.thresholds or THRESHOLDS)
    mode: geneval.Mode = options.mode if options.mode is not None else "standard"
    samples = read_folder(options.images, options.prompts) if options.images is not None else None
    said: dict[str, Any] = {"mode": mode, "thresholds": list(thresholds)}
    if options.detections is not None:
        said["detections"] = str(options.detections)
        samples, sees = geneval.by_detections(options.detections, samples)
    else:
        assert samples is not None
        said["detector"], sees = _detector(options.detector, samples)
    there = len({json.dumps(sample.record) for sample in samples})
    expected = there if options.prompts is not None else geneval.prompts_of_benchmark(samples)
    if expected is not None and there < expected:
        logger.warning(
            "%d of GenEval's %d prompts are there, which makes no score of the benchmark; of another set of "
            "prompts --prompts says what belongs to it",
            there,
            expected,
        )
    out = options.out or options.images / "results.jsonl"
    with (
        stopping(lambda: f"stopped; the rows that are judged stay in {out}, and the same command goes on"),
        only_writer(beside(out), out, "choose another --out"),
        uninterrupted() as closing,
    ):
        results = geneval.Results(out, said)
        bar = StepProgress(f"GenEval, {len(samples)} images", len(samples))
        closing.callback(bar.close)
        rows = geneval.judge(
            samples,
            sees,
            results,
            mode,
            thresholds,
            options.batch_size or 32,
            options.images,
            lambda done: bar.on_metrics(done, {}),
        )
    summary = summarise(rows, expected)
    table = Table()
    for name in ("", "score", "correct"):
        table.add_column(name, justify="right" if name else "left")
    for tag, score in summary.tags.items():
        table.add_row(tag, f"{score:.4f}", "{} / {}".format(*summary.counts[tag]))
    table.add_section()
    table.add_row(
        "[bold]overall: mean of tags",
        f"[bold]{summary.overall:.4f}",
        f"[bold red]incomplete: {summary.num_prompts} of {expected} prompts" if summary.incomplete else "",
    )
    table.add_row("images correct", f"{summary.images:.4f}", f"{summary.num_images} images")
    table.add_row("prompts with a correct image", f"{summary.prompts:.4f}", f"{summary.num_prompts} prompts")
    console = Console()
    console.print(Text(f"GenEval, {mode}: {out}", style="italic"), soft_wrap=True)
    console.print(table)
    told = {**summary.as_json(), **said, "rows": str(out)}
    write_whole(out.with_name(out.name + ".summary.json"), json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))
    return 0


def _detector(text: str | None, samples: Any) -> tuple[Any, Any]:
    """What the detector is, for the settings kept beside the rows, and how it sees."""
    from evals.geneval import by_detector
    from rewards.contract import RewardContext
    from rewards.detectors.registry import DetectorConfig, detector_spec
    from rewards.runtime.serving import RewardContextSpec

    spec = detector_spec(text if text is not None else "mask2former")
    detector = RewardContextSpec(detector=spec).detector_or_none()
    said = (
        spec.model_dump(exclude_unset=True, exclude={"device", "batch_size", "download"})
        if isinstance(spec, DetectorConfig)
        else spec
    )
    return said, by_detector(RewardContext.of(None, None, detector), samples)
