"""How many examples hypothesis draws for tests whose examples are dear: few in `make test`, all in `make test-full`."""

from __future__ import annotations

import os

from hypothesis import settings

_SHARE = 1.0 if os.environ.get("SEDIMO_TEST_ALL_EXAMPLES") else 0.35  # few still reach all kinds of tiny problems


def examples(n, **more):
    return settings(max_examples=max(10, round(_SHARE * n)), **more)
