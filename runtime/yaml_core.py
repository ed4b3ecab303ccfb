"""YAML as its version 1.2 reads plain scalars: `1e-4` and `3.e2` are numbers, `on`, `yes` and `1:30` are text.

PyYAML's own loader reads them as version 1.1 does: a number with an exponent needs a point and a sign there, `on` is
true and `010` is 8. Merge keys (`<<: *base`) are version 1.1's too, and are kept: recipes are shortened with them.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
# In the order in which they are tried, each with the characters that its scalars begin with.
CORE_SCHEMA: tuple[tuple[str, re.Pattern[str], list[str]], ...] = (
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
)


class CoreLoader(yaml.SafeLoader):
    """Plain values only, by the core schema; a key that stands twice in a mapping is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            self._refuse_twice(node)
        return super().construct_mapping(node, deep)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name = self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice in one mapping", key.start_mark
                )
            seen.add(name)


def _int(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    try:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError:  # `!!int` before something else, or more digits than Python reads
        raise yaml.constructor.ConstructorError(
            None, None, f"'{text[:40]}' cannot be read as a whole number", node.start_mark
        ) from None


def _float(loader: CoreLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    special = {"inf": math.inf, "nan": math.nan}.get(text.lstrip("+-").removeprefix("."))
    if special is not None:
        return -special if text.startswith("-") else special
    try:
        return float(text)
    except ValueError:
        raise yaml.constructor.ConstructorError(
            None, None, f"'{text[:40]}' cannot be read as a number", node.start_mark
        ) from None


def _text(loader: CoreLoader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise yaml.constructor.ConstructorError(
            None, None, "half of a surrogate pair, which is no character", node.start_mark
        )
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version would not read as text."""


for _tag, _pattern, _first in CORE_SCHEMA:
    CoreLoader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
CoreLoader.add_constructor("tag:yaml.org,2002:int", _int)
CoreLoader.add_constructor("tag:yaml.org,2002:float", _float)
CoreLoader.add_constructor("tag:yaml.org,2002:str", _text)
CoreLoader.add_constructor("tag:yaml.org,2002:merge", _text)  # where it is no key


def load_yaml(text: str) -> Any:
    """The plain data that a YAML document holds.

    Raises:
        yaml.YAMLError: it is no YAML, holds a tag other than the standard ones, or a key twice. `fault` makes a
            sentence of it.
    """
    try:
        data = yaml.load(text, CoreLoader)
        _refuse_circles(data, ())
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deeply") from None
    return data


def _refuse_circles(value: Any, inside: tuple[int, ...]) -> None:
    """An alias may stand for what it is inside of, which no recipe means and no file can be written of."""
    if not isinstance(value, dict | list):
        return
    if id(value) in inside:
        raise yaml.YAMLError("an alias stands for something that it is itself a part of")
    for item in value.values() if isinstance(value, dict) else value:
        _refuse_circles(item, (*inside, id(value)))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `load_yaml` reads back as it was; keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)


def fault(error: yaml.YAMLError) -> str:
    """What is wrong with it, in one line: "line 3: not YAML: ..."."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{f'line {mark.line + 1}: ' if mark else ''}not YAML: {what}"
