"""From the recipe's `policy` section to a policy: known families by name, anybody's by dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from policy.base import Policy
from policy.config import PolicyConfig
from runtime.errors import UserError, nearest

# Dotted, so that asking for one family imports no other.
FAMILIES = {"chameleon": "policy.chameleon.family.load"}


class FamilyError(UserError):
    """No such family, or a dotted path that leads nowhere."""


def load_policy(config: PolicyConfig, words: Sequence[str] = ()) -> Policy:
    """The policy that the recipe asks for. `words`: of the task's language, for text tokenizers that are built offline.

    Raises FamilyError, or whatever UserError the family has for a wrong file, key or shape.
    """
    return _loader(config.family)(config, words)


def _loader(family: str) -> Callable[[PolicyConfig, Sequence[str]], Policy]:
    if family not in FAMILIES and "." not in family:
        raise FamilyError(
            f"policy.family: no '{family}'; {nearest(family, FAMILIES)} (or the dotted path of a function)"
        )
    module_name, _, name = FAMILIES.get(family, family).rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise FamilyError(f"policy.family: '{family}': there is no module '{error.name}'") from error
        raise  # the family's own module lacks something it imports
    except AttributeError as error:
        raise FamilyError(f"policy.family: '{family}': module '{module_name}' has no '{name}'") from error
