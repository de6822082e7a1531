"""The demo under a plan, to be exported."""

from __future__ import annotations

from dsm_tune.config import TuneConfig
from dsm_tune.demo import create_model
from dsm_tune.merging.published import dsm_plan
from dsm_tune.plan import MergePlan
from dsm_tune.sources import Source


def demo_plan(r: int = 20) -> MergePlan:
    """A plan with local and global steps."""
    return dsm_plan(create_model(), r=r, delay=1, window=7, local_blocks=2)


def demo_source(plan: MergePlan | None = None) -> Source:
    """The demo under a plan, as ``export --plan`` has it."""
    config = TuneConfig(budget_gflops="100%")
    return Source(config, create_model(), plan or demo_plan(), {})
