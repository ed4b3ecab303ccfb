"""Two forms of what a paper's authors released: repaired, which is every default, and release, faults included."""

from __future__ import annotations

from runtime.errors import UserError, nearest

VARIANTS = ("repaired", "release")


def is_release(variant: str) -> bool:
    """Whether it is the release. Raises UserError for a name that is neither."""
    if variant not in VARIANTS:
        raise UserError(f"no variant '{variant}'; {nearest(str(variant), VARIANTS)}")
    return variant == "release"
