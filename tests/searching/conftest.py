"""One local Ray session for all tests that need one: it takes five seconds to start."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[object]:
    """A Ray session of two workers on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray's own modules do when they are imported
        from dsm_tune.searching.engine import Cluster, connected

        here = Cluster(workers=2)
        with connected(here):
            yield here
