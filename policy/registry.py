"""From the recipe's `policy` section to a policy: known families by name, anybody's by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from formats.base import Vocabulary
from policy.base import Policy
from policy.config import PolicyConfig
from runtime.errors import UserError, nearest
from runtime.loading import LoadError, load_object
from runtime.options import make

# Dotted, so that asking for one family imports no other.
FAMILIES = {"chameleon": "policy.chameleon.family.load"}
CHECKS = {"chameleon": "policy.chameleon.check.check"}  # of the families that have one

VOCABULARIES = {"chameleon": "policy.chameleon.check.vocabulary"}


class FamilyError(UserError):
    """No such family, or a dotted path that leads nowhere."""


def load_policy(config: PolicyConfig, words: Sequence[str] = ()) -> Policy:
    """The policy that the recipe asks for. `words`: of the task's language, for text tokenizers that are built offline.

    Raises FamilyError, or whatever UserError the family has for a wrong file, key or shape.
    """
    loader = _loader(config.family)
    if config.family in FAMILIES:
        return loader(config, words)
    return make(lambda: loader(config, words), {}, f"policy.family: '{config.family}'")


def check_policy(config: PolicyConfig, words: Sequence[str] = (), trains: bool = False) -> None:
    """What can be found wrong with the section before any weights are loaded.

    Raises UserError naming the key; FamilyError as `load_policy`.
    """
    _loader(config.family)
    if config.family in CHECKS:
        load_object(CHECKS[config.family], f"policy.family: '{config.family}'")(config, words, trains)


def load_vocabulary(config: PolicyConfig) -> tuple[Vocabulary, int] | None:
    """The vocabulary and the context's length of the model at config.path, without its weights; None: the family does
    not say how. Raises whatever UserError the family has for a wrong file."""
    if config.family not in VOCABULARIES:
        return None
    read = load_object(VOCABULARIES[config.family], f"policy.family: '{config.family}'")
    known: tuple[Vocabulary, int] = read(config)
    return known


def _loader(family: str) -> Callable[[PolicyConfig, Sequence[str]], Policy]:
    if family not in FAMILIES and "." not in family and ":" not in family:
        raise FamilyError(
            f"policy.family: no '{family}'; {nearest(family, FAMILIES)} (or the dotted path of a function)"
        )
    try:
        found = load_object(FAMILIES.get(family, family), f"policy.family: '{family}'")
    except LoadError as error:
        raise FamilyError(str(error)) from error.__cause__
    if not callable(found):
        raise FamilyError(f"policy.family: '{family}' is {type(found).__name__}, and no function that makes a policy")
    return found
