"""The command's options: every number has bounds, and one outside of them is a sentence."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import UserError
from underdrawing import quickstart
from underdrawing.cli import _parser, main
from underdrawing.options import Number, OptionError, Parser, Whole

QUICKSTART = str(Path(__file__).parent.parent / "configs/shapes/quickstart.yaml")


def options_of(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from options_of(inner, f"{command} {name}".strip())
        else:
            yield command, action


OPTIONS = list(options_of(_parser()))


def test_no_option_takes_any_number():
    assert not [(command, action.dest) for command, action in OPTIONS if action.type in (int, float)]
    bounded = {f"{command} {action.dest}" for command, action in OPTIONS if isinstance(action.type, Whole)}
    assert bounded >= {"rollout prompts", "evaluate batch_size", "rewards try most"}


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many", "", "1e3"])
@pytest.mark.parametrize(
    "command, option, least",
    [(c, a.option_strings[0], a.type.least) for c, a in OPTIONS if isinstance(a.type, Whole)],
)
def test_what_is_no_count_is_refused(capsys, command: str, option: str, least: int, value: str):
    recipe = [] if command == "rewards check" else ["geneval" if option == "--batch-size" else QUICKSTART]
    assert main([*command.split(), *recipe, f"{option}={value}"]) == 2
    printed = capsys.readouterr()
    words = (
        f"{value} is too small; at least {least}" if value.lstrip("-").isdigit() else f"'{value}' is no whole number"
    )
    assert printed.out == "" and printed.err == f"underdrawing: {option}: {words}\n"


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "soon"])
def test_a_time_limit_is_above_nothing(capsys, value: str):
    assert main(["rewards", "check", "steps", "--timeout", value]) == 2
    assert capsys.readouterr().err.startswith("underdrawing: --timeout: ")


@pytest.mark.parametrize("count", ["309", "100000"])
def test_more_prompts_than_there_are_are_refused(capsys, tmp_path, count: str):
    """308 held-out prompts are there: a slice would have given those and said nothing."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    arguments = ["rollout", QUICKSTART, f"run_dir={tmp_path}", "--weights", str(weights), "--prompts", count]
    assert main(arguments) == 2
    assert f"--prompts {count}: the split 'heldout' has 308 prompts; ask for 1 to 308" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "4294967296", "x"])
def test_the_quickstarts_seed_is_one_that_numpy_takes(capsys, seed: str):
    assert quickstart.main(["--seed", seed]) == 2
    assert capsys.readouterr().err.startswith("underdrawing: --seed: ")


def test_numbers_with_bounds():
    assert Whole(1)("3") == 3 and Whole(0, 5)("5") == 5
    assert Number()("0.5") == 0.5 and Number(zero=True)("0") == 0 and Number(most=2)("2") == 2
    for bounds, text in ((Whole(0, 5), "6"), (Number(), "0"), (Number(most=2), "2.1"), (Number(), "inf")):
        with pytest.raises(OptionError):
            bounds(text)


def test_a_wrong_value_names_its_option_and_a_wrong_use_shows_the_usage(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--count", "-c", type=Whole(1))
    with pytest.raises(UserError, match="^--count/-c: 0 is too small; at least 1$"):
        parser.parse_args(["-c", "0"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--cuont", "1"])
    assert "usage: x" in capsys.readouterr().err
