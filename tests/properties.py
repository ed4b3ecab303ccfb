"""How many examples an expensive property tries: a share of the profile's (conftest.py), so that the nightly run tries
more of these too."""

from __future__ import annotations

from hypothesis import settings


def examples(share: float) -> settings:
    """Settings with `share` of the loaded profile's examples, for a property whose examples take long."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))
