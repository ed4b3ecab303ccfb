"""YAML by version 1.2's core schema: what is a number there is one here, and what is dumped reads back as it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rewards.detectors.registry import DetectorConfig, detector_spec
from runtime.errors import UserError
from runtime.yaml_core import dump_yaml, fault, load_yaml
from underdrawing.recipe import load_recipe
from underdrawing.rewards_cli import _pairs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "text, value",
    [
        # The examples of the specification, section 10.3.2, and those that version 1.1 takes for text.
        ("1e-1", 0.1),
        ("3e-1", 0.3),
        ("1.e-3", 0.001),
        ("12e03", 12000.0),
        ("-2E+05", -200000.0),
        ("0.", 0.0),
        ("-0.0", 0.0),
        (".5", 0.5),
        ("+12", 12),
        ("0o7", 7),
        ("0x3A", 58),
        ("-19", -19),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        # What version 1.1 takes for something else.
        ("010", 10),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-11-27", "2026-11-27"),
        ("0b11", "0b11"),
        ("=", "="),
        ("1e", "1e"),
        (".", "."),
        # A quoted scalar is text, whatever it looks like.
        ("'1e-1'", "1e-1"),
        ('"true"', "true"),
    ],
)
def test_plain_scalars_are_read_by_the_core_schema(text: str, value: object):
    for read in (load_yaml(text), load_yaml(f"[{text}]")[0] if text else None, load_yaml(f"key: {text}")["key"]):
        assert read == value and type(read) is type(value)


def test_nan_is_a_number():
    assert math.isnan(load_yaml(".nan"))


def test_merge_keys_stay():
    read = load_yaml("base: &base {steps: 3, beta: 1e-2}\ngrpo:\n  <<: *base\n  steps: 4\n")
    assert read["grpo"] == {"steps": 4, "beta": 0.01}


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: one\ngrpo: {steps: 1}\ngrpo: {beta: 1}\n", "line 3: not YAML: the key 'grpo' stands twice"),
        ("a: {b: 1, b: 2}", "line 1: not YAML: the key 'b' stands twice"),
        ("a: [1", "line 1: not YAML"),
        ("a: !!python/name:os.system x", "line 1: not YAML: could not determine a constructor"),
        ("a: !!int many", "line 1: not YAML: 'many' cannot be read as a whole number"),
        ("a: !!float many", "line 1: not YAML: 'many' cannot be read as a number"),
        ("a: " + "9" * 5000, "line 1: not YAML: '999"),
        ("a: &a [*a]", "not YAML: an alias stands for something that it is itself a part of"),
        ("[" * 5000, "not YAML: its values are nested too deeply"),
        ('"\\ud800"', "line 1: not YAML: half of a surrogate pair"),
        ("a: \x00", "not YAML: unacceptable character"),
    ],
)
def test_what_is_no_yaml_is_told_in_a_line(text: str, words: str):
    with pytest.raises(yaml.YAMLError) as caught:
        load_yaml(text)
    assert fault(caught.value).startswith(words) and "\n" not in fault(caught.value)


characters = st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\ufeff\x85")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(characters, max_size=12)
    | st.sampled_from(["1e-1", "on", "010", "1:30", "1_000", "0o7", "~", "null", "true", "=", "<<", "-", "2026-11-27"])
)


@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(characters), inner), max_leaves=8))
def test_what_is_dumped_reads_back_in_either_version(data: object):
    text = dump_yaml(data)
    assert load_yaml(text) == data == yaml.safe_load(text)


def test_numbers_of_recipes_and_overrides_are_numbers(tmp_path):
    """An exponent without a point makes a float, as a weight and as an option: not text, which no reward compares."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\npolicy: {}\ntask: {}\nformat: {}\n"
        "rewards: {parts: {detect: {function: geneval, weight: 1e-1, options: {threshold: 3e-1}}}}\n"
    )
    for given_ in ((), ("rewards.parts.detect.weight=1e-1", "rewards.parts.detect.options.threshold=3e-1")):
        part = load_recipe(path, given_).rewards.parts["detect"]
        assert part.weight == 0.1 and part.options == {"threshold": 0.3}
    assert load_recipe(path, ["grpo.steps=1_000"]).grpo.steps == 1000  # text, which the key's type makes a number of
    assert load_recipe(path, ["rewards.parts.detect.isolate=no"]).rewards.parts["detect"].isolate is False


def test_options_of_the_command_are_read_alike(tmp_path):
    assert _pairs(["threshold=3e-1", "mode=on"], "--option") == {"threshold": 0.3, "mode": "on"}
    with pytest.raises(UserError, match="--option 'a=.1': the value is not YAML: "):
        _pairs(["a=[1"], "--option")
    (tmp_path / "detector.yaml").write_text("backend: owlv2\nmin_score: 2e-1\n")
    for text in ("{backend: owlv2, min_score: 2e-1}", str(tmp_path / "detector.yaml")):
        assert detector_spec(text) == DetectorConfig(backend="owlv2", min_score=0.2)
