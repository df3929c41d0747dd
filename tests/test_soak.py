"""A minute of tests/soak.py; in a file of its own, so that it runs beside the others."""

from __future__ import annotations

import random
import sys

import pytest

from soak import soak


@pytest.mark.soak
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and descriptors of another process are read from /proc")
def test_a_minute_of_everything() -> None:
    seed = random.randrange(10 ** 6)
    report = soak(0.9, 40.0, seed)
    assert report.complaints() == [], "\n".join([f"seed {seed}", *report.lines(), *report.errors[:5]])
