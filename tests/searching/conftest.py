"""One local Ray session for all tests that need one: it takes five seconds to start."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[object]:
    """A Ray session of two workers on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray's own modules do when they are imported
        from dsm_tune.searching.crew import Cluster, connected

        here = Cluster(workers=2)
        with pytest.MonkeyPatch.context() as patch:
            beside = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
            path = [*beside, *filter(None, [os.environ.get("PYTHONPATH")])]
            patch.setenv("PYTHONPATH", os.pathsep.join(path))  # of the workers
            with connected(here):
                yield here
