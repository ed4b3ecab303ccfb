"""README, CONTRIBUTING and docs: their Python is executed, their recipes are checked, their commands parse, their
references lead somewhere."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from runtime.yaml_core import load_yaml
from underdrawing.cli import _parser
from underdrawing.recipe import check_recipe, load_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs/README.md", *sorted(ROOT.glob("docs/*.md"))]
EXECUTED = [*DOCUMENTS[:2], ROOT / "docs/rewards.md", ROOT / "docs/tasks.md", ROOT / "docs/tools.md"]
# A hidden `<!-- check ... -->` holds the assertions on a block that would read worse with them.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$|^<!-- (check)\n(.*?)^-->$", re.M | re.S)


@dataclass(frozen=True)
class Section:
    """The blocks under one `##` heading: they run in order, in one folder and one namespace."""

    document: Path
    title: str
    text: str

    def blocks(self, *languages: str) -> list[str]:
        found = [(m[1] or m[3], m[2] if m[1] else m[4]) for m in BLOCK.finditer(self.text)]
        return [body for language, body in found if language in languages]

    def __str__(self) -> str:
        return f"{self.document.name}: {self.title}"


def sections(documents: list[Path]) -> list[Section]:
    found = []
    for document in documents:
        for part in re.split(r"^## ", document.read_text(encoding="utf-8"), flags=re.M):
            found.append(Section(document, part.split("\n")[0], part))
    return found


WITH_PYTHON = [s for s in sections(EXECUTED) if s.blocks("python")]
WITH_YAML = [s for s in sections(EXECUTED) if s.blocks("yaml")]


@pytest.mark.parametrize("section", WITH_PYTHON, ids=str)
def test_python_runs(section: Section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = section.blocks("python", "check")
    assert "\nassert " in blocks[-1], f"{section}: its last block asserts nothing"
    namespace = {"__name__": "__main__"}
    known = set(sys.modules)
    try:
        for number, block in enumerate(blocks):
            name = re.match(r"# (\w+\.py)\n", block)
            if name:  # a file of the reader's: written, and imported by what follows
                Path(name[1]).write_text(block)
                compile(block, name[1], "exec")
            else:
                exec(compile(block, f"{section}, block {number}", "exec"), namespace)
    finally:
        for module in set(sys.modules) - known:  # the reader's files, not what they import
            origin = getattr(sys.modules[module], "__file__", None)
            if origin and Path(origin).is_relative_to(tmp_path):
                del sys.modules[module]


def test_every_extension_point_has_an_example():
    titles = [s.title for s in WITH_PYTHON if s.document.name == "CONTRIBUTING.md"]
    assert titles == ["A reward", "A format", "A tool", "A policy family", "A writer"]


@pytest.mark.parametrize("section", WITH_YAML, ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(section: Section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in section.blocks("python"):
        name = re.match(r"# (\w+\.py)\n", block)
        if name:
            Path(name[1]).write_text(block)
    whole = load_recipe(ROOT / "configs/shapes/quickstart.yaml").model_dump(mode="json")
    for block in section.blocks("yaml"):
        data = load_yaml(block)
        if "rewards" in data:  # whose parts are others than those that the quickstart credits by segment
            whole["grpo"] |= {"segment_reward_weights": {}}
        recipe = check_recipe(data if "name" in data else {**whole, **data}, str(section))
        assert set(data) <= set(recipe.model_dump())


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        found += [(document.name, line.strip()) for line in re.findall(r"^(underdrawing \w.*)$", text, re.M)]
    return found


@pytest.mark.parametrize("document, line", commands())
def test_commands_parse(document: str, line: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line.split("  #")[0])[1:]
    options = _parser().parse_args(words)
    if hasattr(options, "recipe") and options.recipe.is_absolute() is False and options.recipe.exists():
        load_recipe(options.recipe, options.overrides)


def test_there_are_commands_to_try():
    shown = {line.split()[1] for _, line in commands()}
    assert shown >= {"sft", "grpo", "rollout", "evaluate", "compare", "view", "doctor"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_what_is_referred_to_exists(document: Path):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / link).exists(), f"{document.name} links to {link}"
    for path in re.findall(
        r"`((?:rollout|rewards|rl|sft|policy|tasks|evals|training|record|formats|runtime|underdrawing|tests|configs"
        r"|benchmarks|experiments)"
        r"/[\w/.-]*)(?:::\w+)?`",
        text,
    ):
        assert (ROOT / path).exists(), f"{document.name} names {path}"
    for file, test in re.findall(r"`?(test_\w+)(?:\.py)?::(test_\w+)", text):
        assert f"def {test}(" in (ROOT / f"tests/{file}.py").read_text(), f"{document.name} names {file}::{test}"


def test_the_recipe_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_recipe_reference", ROOT / "docs/make_recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/make_recipe_reference.py"


def test_the_published_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_published_reference", ROOT / "docs/make_published_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/make_published_reference.py"


def test_the_readmes_table_has_a_figure_in_every_column():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- quickstart-results -->")[1].split("<!-- /quickstart-results -->")[0]
    head, _, *rows = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    assert rows
    for row in rows:
        assert len(row) == len(head) and all(re.search(r"\d", cell) for cell in row), row


def test_the_readmes_figures_are_those_of_the_shipped_recipes():
    """They are measured by hand; a recipe that has changed since makes them another one's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = dict(re.findall(r"(\w+\.yaml) ([0-9a-f]{12})", re.search(r"<!-- measured with (.*?) -->", text)[1]))
    assert set(measured) == {"quickstart.yaml", "long.yaml"}
    for name, digest in measured.items():
        data = yaml.safe_load((ROOT / "configs/shapes" / name).read_text())
        now = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
        assert now == digest, f"{name} has changed: measure it again, then write {now}"
