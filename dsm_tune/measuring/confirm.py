"""Measures finished plans alone, beside the dense model, as they would be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsm_tune.measuring.latency import summarise
from dsm_tune.measuring.memory import keep_freed_memory
from dsm_tune.measuring.profiling import describe_device, measure_profile, time_plans
from dsm_tune.measuring.quality import bootstrap_interval
from dsm_tune.plan import Matching, MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.results import LatencyMs

__all__ = ["Confirmed", "Target", "confirm_latency", "device_of", "profile_target"]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is served, and on what: the model on the CPU, and where it goes.

    Attributes:
        model: dense, in evaluation mode.
        pixels: [B, 3, H, W] float32, the batch that is timed.
        device: ``cpu`` or ``cuda:N``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        threads: on a CPU.
        runtime: as of :func:`~dsm_tune.runtimes.forwards.forwards_of`.
    """

    model: nn.Module
    pixels: Tensor
    device: str
    dtype: str
    threads: int
    runtime: str

    def ready(self) -> tuple[nn.Module, Tensor]:
        """Put model and batch where they are timed, in the process that times them."""
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)  # where graphs are captured
        dtype = getattr(torch, self.dtype)
        model = self.model.to(self.device, dtype).eval()
        return model, self.pixels.to(self.device, dtype)


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """Latency of a plan, and the upper end of the 95 % interval of its ratio to dense."""

    latency_ms: LatencyMs
    ratio_high: float


def device_of(name: str) -> str:
    """Resolve ``auto`` to the first CUDA device, or to the CPU."""
    if name != "auto":
        return name
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def confirm_latency(
    target: Target, plans: Sequence[MergePlan], *, stat: str, seconds: float
) -> tuple[dict[str, object], list[Confirmed]]:
    """Time plans in turn with the dense model; to be run in a process of its own.

    Args:
        target: what is served.
        plans: the first is the dense one.
        stat: the statistic whose interval is wanted.
        seconds: time limit.

    Returns:
        The device's description, and one measurement per plan.
    """
    model, pixels = target.ready()
    timings = time_plans(model, plans, pixels, seconds=seconds, runtime=target.runtime)
    results = []
    for timing in timings:
        ratios = torch.tensor(timing.ms).double() / torch.tensor(timings[0].ms).double()
        high = bootstrap_interval(ratios, statistic=0.5)[1]
        results.append(Confirmed(summarise(timing, timings[0], stat=stat), high))
    return describe_device(pixels.device, target.runtime), results


def profile_target(
    target: Target, matchings: Sequence[Matching], *, seconds: float
) -> DeviceProfile:
    """Measure a device profile of what is served; to be run in a process of its own."""
    model, pixels = target.ready()
    return measure_profile(
        model, pixels, matchings=matchings, seconds=seconds, runtime=target.runtime
    )
