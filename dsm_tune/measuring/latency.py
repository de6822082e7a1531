"""Times forwards: whole models side by side, on the clock that counts on their device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsm_tune.measuring.quality import bootstrap_interval
from dsm_tune.results import LatencyMs

__all__ = ["Timing", "interleave", "summarise", "timer_for", "when_warm"]

BRIEF_MS = 20.0  # what is briefer feels whose data the caches hold


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of each forward of one candidate, in the order they were run."""

    ms: tuple[float, ...]


def timer_for(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Return a function that runs a forward and returns its milliseconds.

    On CUDA the time is from the host's launch to the device's end, with the device idle before;
    elsewhere it is wall clock.
    """

    def timed(forward: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    return timed


def when_warm(
    call: Callable[[], object], timed: Callable[[Callable[[], object]], float]
) -> Callable[[], float]:
    """Return what times a call as in steady service, though other calls come in between.

    A brief call is run once more before each timing: the call before may have been another
    model's, which left its own weights and activations in the caches.

    Args:
        call: what to time; it is run once now.
        timed: as from :func:`timer_for`.
    """
    if timed(call) > BRIEF_MS:
        return lambda: timed(call)

    def again() -> float:
        call()
        return timed(call)

    return again


def interleave(
    forwards: Sequence[Callable[[], object]],
    timed: Callable[[Callable[[], object]], float],
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
    rounds: list[list[float]] = [[] for _ in forwards]
    start = clock()
    while True:
        for _ in range(least):
            for samples, call in zip(rounds, calls, strict=True):
                samples.append(call())
        if clock() - start > seconds:
            break
        if all(_relative_width(samples) < width for samples in rounds):
            break
    return [Timing(tuple(samples)) for samples in rounds]


def _relative_width(samples: Sequence[float]) -> float:
    values = torch.tensor(samples, dtype=torch.float64)
    low, high = bootstrap_interval(values, statistic=0.5, resamples=200)
    return (high - low) / float(values.median())


def summarise(
    timing: Timing, dense: Timing, *, stat: str, predicted: float | None = None
) -> LatencyMs:
    """Percentiles, the 95 % interval of the statistic, and the ratio to the dense model.

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
    return LatencyMs(p50, p90, p99, low, high, predicted, float((values / base).median()))


def forward_of(model: Callable[[Tensor], object], pixels: Tensor) -> Callable[[], object]:
    """Return the call of a model on an input that is already on its device."""

    def forward() -> object:
        with torch.inference_mode():
            return model(pixels)

    return forward
