"""Times forwards: whole models side by side, on the clock that counts on their device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dsm_tune.measuring.quality import bootstrap_interval
from dsm_tune.results import LatencyMs
from dsm_tune.runtimes.forwards import Call

__all__ = ["Lap", "Timing", "interleave", "summarise", "timer_for", "when_warm"]

BRIEF_MS = 20.0  # what is briefer feels whose data the caches hold


class Lap(NamedTuple):
    """What one call took.

    Attributes:
        ms: milliseconds on the host's clock, until the device has finished.
        device_ms: milliseconds between two events on the device; ``None`` on a CPU.
    """

    ms: float
    device_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of each forward of one candidate, in the order they were run.

    Attributes:
        ms: on the host's clock.
        device_ms: between events on the device, as many; empty on a CPU.
    """

    ms: tuple[float, ...]
    device_ms: tuple[float, ...] = ()

    @classmethod
    def of(cls, laps: Sequence[Lap]) -> Timing:
        """Gather what calls took."""
        on_device = (lap.device_ms for lap in laps if lap.device_ms is not None)
        return cls(tuple(lap.ms for lap in laps), tuple(on_device))


def timer_for(device: torch.device, *, cuda: Any = torch.cuda) -> Callable[[Call], Lap]:
    """Return a function that runs a call and returns what it took.

    On CUDA the host's time is from the launch to the device's end, with the device idle before.

    Args:
        device: where the call computes.
        cuda: offers ``Event``, ``synchronize`` and ``device``, as ``torch.cuda`` does.
    """

    def on_host(call: Call) -> Lap:
        start = time.perf_counter()
        call()
        return Lap((time.perf_counter() - start) * 1e3)

    def on_cuda(call: Call) -> Lap:
        with cuda.device(device):
            first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            cuda.synchronize(device)
            start = time.perf_counter()
            first.record()
            call()
            last.record()
            cuda.synchronize(device)
            return Lap((time.perf_counter() - start) * 1e3, first.elapsed_time(last))

    return on_cuda if device.type == "cuda" else on_host


def when_warm(call: Call, timed: Callable[[Call], Lap]) -> Callable[[], Lap]:
    """Return what times a call as in steady service, though other calls come in between.

    A brief call is run once more before each timing: the call before may have been another
    model's, which left its own weights and activations in the caches.

    Args:
        call: what to time; it is run once now.
        timed: as from :func:`timer_for`.
    """
    if timed(call).ms > BRIEF_MS:
        return lambda: timed(call)

    def again() -> Lap:
        call()
        return timed(call)

    return again


def interleave(
    forwards: Sequence[Call],
    timed: Callable[[Call], Lap],
    *,
    seconds: float,
    warmup: int = 3,
    least: int = 10,
    width: float = 0.02,
    clock: Callable[[], float] = time.monotonic,
) -> list[Timing]:
    """Time several forwards in turn, A B C A B C …, until they are known well enough.

    Args:
        forwards: what to time; each is called without arguments.
        timed: as from :func:`timer_for`.
        seconds: time limit for all; at least ``least`` rounds are run.
        warmup: rounds that are not counted.
        least: rounds at least.
        width: relative width of each median's 95 % interval at which to stop before the limit.
        clock: returns seconds.
    """
    for _ in range(warmup):
        for forward in forwards:
            timed(forward)
    calls = [when_warm(forward, timed) for forward in forwards]
    rounds: list[list[Lap]] = [[] for _ in forwards]
    start = clock()
    while True:
        for _ in range(least):
            for samples, call in zip(rounds, calls, strict=True):
                samples.append(call())
        if clock() - start > seconds:
            break
        if all(_relative_width(samples) < width for samples in rounds):
            break
    return [Timing.of(samples) for samples in rounds]


def _relative_width(samples: Sequence[Lap]) -> float:
    values = torch.tensor([lap.ms for lap in samples], dtype=torch.float64)
    low, high = bootstrap_interval(values, statistic=0.5, resamples=200)
    return (high - low) / float(values.median())


def summarise(
    timing: Timing, dense: Timing, *, stat: str, predicted: float | None = None
) -> LatencyMs:
    """Percentiles, the 95 % interval of the statistic, and the ratio to the dense model.

    All are of the host's time, but for the median of the device's.

    Args:
        timing: of the candidate.
        dense: of the dense model in the same rounds.
        stat: ``p50``, ``p90`` or ``p99``: the statistic that the budget bounds.
        predicted: milliseconds by the device profile, to stand beside.
    """
    values = torch.tensor(timing.ms, dtype=torch.float64)
    base = torch.tensor(dense.ms, dtype=torch.float64)
    low, high = bootstrap_interval(values, statistic=int(stat[1:]) / 100)
    p50, p90, p99 = (float(values.quantile(q)) for q in (0.5, 0.9, 0.99))
    ratio = float((values / base).median())
    on_device = float(torch.tensor(timing.device_ms).median()) if timing.device_ms else None
    return LatencyMs(p50, p90, p99, low, high, predicted, ratio, on_device)
