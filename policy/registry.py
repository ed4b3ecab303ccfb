"""From the recipe's `policy` section to a policy: known families by name, anybody's by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from formats.base import Vocabulary
from policy.base import Policy
from policy.config import PolicyConfig
from runtime.errors import UserError, nearest
from runtime.loading import LoadError, load_object
from runtime.options import make
from runtime.paths import ObjectPath

_NEEDED = ("family", "model", "max_length", "vocabulary", "prefill", "step", "passes", "score")


@dataclass(frozen=True)
class Family:
    """What a family brings: objects, or the dotted paths of some, so that naming a family imports none of it.

    Attributes:
        config: the model of its `policy` section, a subclass of PolicyConfig.
        load: (section, words) -> Policy.
        check: (section, words, trains), which raises UserError for what can be found wrong before weights are loaded.
        vocabulary: section -> (Vocabulary, slots of a row) of the model at its path, read without its weights.
        denoises: whether it makes images by denoising latents; None: its vocabulary says so once it is loaded.
    """

    config: str | type[PolicyConfig]
    load: str | Callable[..., Policy]
    check: str | Callable[..., None] | None = None
    vocabulary: str | Callable[..., tuple[Vocabulary, int]] | None = None
    denoises: bool | None = None


FAMILIES = {
    "chameleon": Family(
        "policy.chameleon.config.ChameleonPolicyConfig",
        "policy.chameleon.family.load",
        "policy.chameleon.check.check",
        "policy.chameleon.check.vocabulary",
        denoises=False,
    )
}
DEFAULT = "chameleon"  # whose section a recipe has that names no family, or a function that says nothing of its keys


class FamilyError(UserError):
    """No such family, or a dotted path that leads nowhere."""


def section_of(family: str) -> type[PolicyConfig]:
    """The model of a family's `policy` section. Of a family that is not there it is the default's: who loads it says
    so.

    Raises FamilyError where the family's own is no PolicyConfig.
    """
    try:
        known = _family(family)
    except (FamilyError, LoadError):
        known = FAMILIES[DEFAULT]
    model = _object(known.config, family)
    if not (isinstance(model, type) and issubclass(model, PolicyConfig)):
        raise FamilyError(f"policy.family: the section of '{family}' is {model!r}, and no subclass of PolicyConfig")
    return model


def policy_section(value: Any, context: Any = None) -> PolicyConfig:
    """A recipe's `policy` section, held to its family's own model.

    Args:
        value: plain data, or a section that is one already.
        context: pydantic's, for paths.

    Raises pydantic's ValidationError, by key.
    """
    if isinstance(value, PolicyConfig):
        return value
    family = value.get("family", DEFAULT) if isinstance(value, Mapping) else DEFAULT
    try:  # its path may be written from the recipe's folder
        family = TypeAdapter(ObjectPath).validate_python(family, context=context)
    except ValidationError:
        family = DEFAULT  # whose section says what is wrong with the key
    return section_of(family).model_validate(value, context=context)


def load_policy(config: PolicyConfig, words: Sequence[str] = ()) -> Policy:
    """The policy that the recipe asks for. `words`: of the task's language, for text tokenizers that are built offline.

    Raises FamilyError, or whatever UserError the family has for a wrong file, key or shape.
    """
    loader = _object(_family(config.family).load, config.family)
    if config.family in FAMILIES:
        return loader(config, words)
    policy = make(lambda: loader(config, words), {}, f"policy.family: '{config.family}'")
    missing = [part for part in _NEEDED if not hasattr(policy, part)]
    if missing:
        raise FamilyError(
            f"policy.family: '{config.family}' gave a value of type {type(policy).__name__}, which is no Policy: it "
            f"has no '{missing[0]}' (policy/base.py says what a policy offers)"
        )
    return policy


def check_policy(config: PolicyConfig, words: Sequence[str] = (), trains: bool = False) -> None:
    """What can be found wrong with the section before any weights are loaded.

    Raises UserError naming the key; FamilyError as `load_policy`.
    """
    check = _family(config.family).check
    if check is not None:
        _object(check, config.family)(config, words, trains)


def load_vocabulary(config: PolicyConfig) -> tuple[Vocabulary, int] | None:
    """The vocabulary and the context's length of the model at config.path, without its weights; None: the family does
    not say how. Raises whatever UserError the family has for a wrong file."""
    read = _family(config.family).vocabulary
    if read is None:
        return None
    known: tuple[Vocabulary, int] = _object(read, config.family)(config)
    return known


def denoises(config: PolicyConfig) -> bool | None:
    """Whether the family makes images by denoising latents; None: that is not known before it is loaded.

    Raises FamilyError as `load_policy`.
    """
    return _family(config.family).denoises


def _family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    if "." not in name and ":" not in name:
        raise FamilyError(f"policy.family: no '{name}'; {nearest(name, FAMILIES)} (or the dotted path of your own)")
    try:
        found = load_object(name, f"policy.family: '{name}'")
    except LoadError as error:
        raise FamilyError(str(error)) from error.__cause__
    if isinstance(found, Family):
        return found
    if not callable(found):
        raise FamilyError(
            f"policy.family: '{name}' is {type(found).__name__}, and neither a Family nor a function that makes a "
            "policy"
        )
    return Family(FAMILIES[DEFAULT].config, found)


def _object(found: Any, family: str) -> Any:
    return load_object(found, f"policy.family: '{family}'") if isinstance(found, str) else found
