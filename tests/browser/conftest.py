"""A window, and where its pictures are kept: in ``DSM_TUNE_PICTURES``, else in pytest's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, browser


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    """A window; before the tune, which is in vain where there is no Chromium."""
    with browser(width=1500, height=1400) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = os.environ.get("DSM_TUNE_PICTURES")
    return Path(wanted) if wanted else tmp_path_factory.mktemp("pictures")
