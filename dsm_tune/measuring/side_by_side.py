"""Times several models in turn, A B C A B C …, and says how each compares with the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from dsm_tune.measuring.latency import Timing, interleave, summarise, timer_for
from dsm_tune.results import LatencyMs
from dsm_tune.runtimes.forwards import Call

__all__ = ["Speed", "time_side_by_side"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast one model is at one batch size, and relative to the first one of the same rounds.

    Attributes:
        batch_size: images per forward.
        latency_ms: of a forward.
        throughput: images per second, at the median forward.
        speedup: median over rounds of the first model's time over this one's.
        speedup_q25, speedup_q75: quartiles of the same.
    """

    batch_size: int
    latency_ms: LatencyMs
    throughput: float
    speedup: float
    speedup_q25: float
    speedup_q75: float


def time_side_by_side(
    calls: Sequence[Call],
    batch_size: int,
    device: torch.device,
    *,
    runs: int,
    say: Callable[[float], None],
) -> list[Speed]:
    """Time forwards in turn, so that all feel the same pace of the machine.

    Args:
        calls: what to time; the first is what the others are compared with.
        batch_size: images per forward.
        device: where they compute.
        runs: rounds; each runs every call once.
        say: is told, when each call has run once, about how many seconds all will take.
    """
    timed = timer_for(device)
    for call in calls:  # what a first call sets up is not what a run takes
        timed(call)
    say(runs * sum(timed(call).ms for call in calls) / 1e3)
    timings = interleave(calls, timed, seconds=0.0, warmup=1, least=runs)
    return [_speed(timing, timings[0], batch_size) for timing in timings]


def _speed(timing: Timing, first: Timing, batch_size: int) -> Speed:
    latency = summarise(timing, first, stat="p50")
    ratios = torch.tensor(first.ms).double() / torch.tensor(timing.ms).double()
    low, middle, high = (float(ratios.quantile(q)) for q in (0.25, 0.5, 0.75))
    p50 = latency.p50 or float("nan")
    return Speed(batch_size, latency, batch_size / p50 * 1e3, middle, low, high)
