"""A bundle of the demo, made once, in every format."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_sources import demo_source

from dsm_tune import production


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with ONNX and pt2; no test may write to it."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    for kind in ("onnx", "pt2"):
        production.export(demo_source(), kind, str(folder))
    return folder
