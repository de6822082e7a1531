"""Tunes training-free token merging of Vision Transformers to a latency or GFLOP budget.

The public names are loaded when they are first used: importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsm_tune.config import TuneConfig
    from dsm_tune.errors import DsmTuneError
    from dsm_tune.exporting.bundle import load_bundle
    from dsm_tune.merging.merged import merged
    from dsm_tune.merging.published import dsm_plan, tome_plan
    from dsm_tune.merging.similarity import detect_delay, similarity_curve
    from dsm_tune.plan import MergePlan
    from dsm_tune.profile import DeviceProfile
    from dsm_tune.results import TuneResult
    from dsm_tune.tuning import tune

__all__ = [
    "DeviceProfile",
    "DsmTuneError",
    "MergePlan",
    "TuneConfig",
    "TuneResult",
    "detect_delay",
    "dsm_plan",
    "load_bundle",
    "merged",
    "similarity_curve",
    "tome_plan",
    "tune",
]

_HOMES = {
    "DeviceProfile": "profile",
    "DsmTuneError": "errors",
    "MergePlan": "plan",
    "TuneConfig": "config",
    "TuneResult": "results",
    "detect_delay": "merging.similarity",
    "dsm_plan": "merging.published",
    "load_bundle": "exporting.bundle",
    "merged": "merging.merged",
    "similarity_curve": "merging.similarity",
    "tome_plan": "merging.published",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
