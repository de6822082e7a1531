"""The speed of rows, timed in turn on the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dsm_tune.bench import speeds_of
from dsm_tune.candidates import Candidate, noise
from dsm_tune.config import TuneConfig
from dsm_tune.measuring.confirm import Target
from dsm_tune.merging.loading import create_model
from dsm_tune.paper.plans import gmacs_of_other
from dsm_tune.paper.rows import Document, Line
from dsm_tune.paper.subjects import Asked
from dsm_tune.target import TargetDevice

__all__ = ["setting_of", "times_of"]


def setting_of(asked: Asked) -> Document:
    """What speed is measured with."""
    config = asked.config
    device = TargetDevice(config)
    return {
        "device": device.facts(None)["name"],
        "threads": device.threads,
        "runtime": config.runtime,
        "dtype": config.dtype,
        "batch_size": asked.batch_size,
        "runs": asked.runs,
    }


def times_of(
    lines: Sequence[Line],
    model: torch.nn.Module,
    config: TuneConfig,
    asked: Asked,
    say: Callable[[str], None],
) -> list[Document]:
    """Time the rows of a section in turn; efficiency is the speed-up over the ratio of GMACs."""
    candidates = []
    for one in lines:
        if one.plan is not None:
            candidates.append(Candidate(one.row.label, "plan", one.plan, gmacs=one.plan.gmacs))
        else:
            gmacs = gmacs_of_other(one.model)
            other = create_model(one.model)
            candidates.append(Candidate(one.row.label, "other", other=other, gmacs=gmacs))
    device = TargetDevice(config)
    pixels = noise(model, asked.batch_size)
    where = device.device, config.dtype, device.threads, config.runtime
    target = Target(model, pixels, *where)
    target.ready()  # moves the model to where it is measured
    speeds = speeds_of(candidates, target, asked.batch_size, asked.runs, say)
    dense = candidates[0].gmacs
    return [
        {**speed, "efficiency": speed["speedup"] / (dense / one.gmacs)}
        for one, speed in zip(candidates, speeds, strict=True)
    ]
