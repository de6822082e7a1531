"""A bundle of the demo, made once, in every format."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsm_tune import production
from dsm_tune.config import TuneConfig
from dsm_tune.demo import create_model
from dsm_tune.merging.published import dsm_plan
from dsm_tune.plan import MergePlan
from dsm_tune.production import Source


def demo_plan(r: int = 20) -> MergePlan:
    """A plan with local and global steps."""
    return dsm_plan(create_model(), r=r, delay=1, window=7, local_blocks=2)


def demo_source(plan: MergePlan | None = None) -> Source:
    """The demo under a plan, as ``export --plan`` has it."""
    config = TuneConfig(budget_gflops="100%")
    return Source(config, create_model(), plan or demo_plan(), {})


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with ONNX and pt2; no test may write to it."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    for kind in ("onnx", "pt2"):
        production.export(demo_source(), kind, str(folder))
    return folder
