"""Writes docs/recipes.md from the models that check a recipe: `python docs/make_recipe_reference.py`.

Every key, its type, default and description stand in one place, the model of its section; a test holds the page to it.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from policy.registry import FAMILIES, section_of
from runtime.paths import ReadPath
from underdrawing.recipe import Recipe

PAGE = Path(__file__).parent / "recipes.md"
HEAD = """# Every key of a recipe

<!-- Written by docs/make_recipe_reference.py from the models themselves; edit those, then run it again. -->

A recipe is one YAML file. Any key can be overridden on the command line as `section.key=value`, where the value is
YAML: `grpo.steps=200`, `rollout.temperature='{default: 1.0, sketch: 0.8}'`. An unknown key ends the command with the
nearest known one, and `--dry-run` prints the recipe with every default written out. `None` in a description is YAML's
`null`.

Numbers and words are read as in YAML 1.2: `1e-4` is a number, `on` and `yes` are words. In a path `~`, `$NAME` and
`${NAME}` are expanded (`$$` is a dollar), and a file that is to be read is sought from the working folder, then beside
the recipe. In `options` that goes for what begins with `~/` or `$NAME/`, and for options called `path`, `file`,
`folder`, `dir`, `weights`, `pretrained`, `processor` or `encoder`, or ending in one of these, as `prompts_file` does.
"""


def page() -> str:
    """The whole page as Markdown."""
    sections = [_table("the recipe itself", Recipe, "", skip_sections=True)]
    for name, field in Recipe.model_fields.items():
        if name == "policy":  # each family has a section of its own
            for family in FAMILIES:
                own, *inner = _section(name, section_of(family))
                sections += [own.replace("## `policy`", f"## `policy` of the family `{family}`", 1), *inner]
            continue
        for model in _models_in(field.annotation):
            sections += _section(_key(name, field), model)
    return HEAD + "\n" + "\n".join(sections)


def _section(path: str, model: type[BaseModel]) -> list[str]:
    """A section's table, then those of the sections in it."""
    tables = [_table(f"`{path}`", model, path)]
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            tables += _section(f"{path}.{_key(name, field)}", inner)
    return tables


def _key(name: str, field: FieldInfo) -> str:
    return name + (".<name>" if typing.get_origin(field.annotation) is dict else "")


def _table(title: str, model: type[BaseModel], path: str, skip_sections: bool = False) -> str:
    summary = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    summary = f"{summary}\n\n" if summary and path else ""
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
        if not (skip_sections and _models_in(field.annotation))
    ]
    return f"## {title}\n\n{summary}| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, list) and len(value) > 4:
        return f"`{', '.join(map(str, value))}`"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return str(value)


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is ReadPath:
        return "path"
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    known = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", Any: "anything"}
    return known.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    first = text.split(" ")[0]
    if first.isalpha() and first not in ("torch", "transformers"):  # "images: ..." explains a value, which is lower
        text = text[0].upper() + text[1:]
    return text if not text or text[-1] in ".)" else text + "."


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
