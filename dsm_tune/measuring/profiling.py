"""Measures a device profile: parts of a model on a grid of token counts, and a few whole plans."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune import schedules
from dsm_tune.measuring.latency import Lap, Timing, interleave, timer_for, when_warm
from dsm_tune.measuring.parts import Named, part_calls
from dsm_tune.merging import backbone
from dsm_tune.plan import Geometry, Matching, MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.runtimes.forwards import Call, forwards_of

__all__ = ["describe_device", "measure_profile"]

WHOLE = "whole"  # key of the calls that run a whole plan
GRID = 12  # token counts at which parts are timed
MOST_FACTOR = 4.0  # between what a step takes within a forward and over and over
DEVICE_REPEATS = 10  # calls between two waits for a device, so that launches overlap as in a model


def describe_device(device: torch.device, runtime: str = "eager") -> dict[str, Any]:
    """What decides how fast a device is: its name, driver or processor, libraries, and threads."""
    if runtime == "onnx":
        version: str = importlib.import_module("onnxruntime").__version__
        return {**describe_device(device), "onnxruntime": version}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"name": name, "cuda": torch.version.cuda, "torch": torch.__version__}
    found = {
        "name": _processor(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["numba"] = importlib.metadata.version("numba")
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        found = []
    return found[0] if found else platform.processor() or "CPU"


@torch.inference_mode()
def measure_profile(
    model: nn.Module,
    pixels: Tensor,
    *,
    matchings: Sequence[Matching],
    seconds: float,
    runtime: str = "eager",
    clock: Callable[[], float] = time.monotonic,
) -> DeviceProfile:
    """Time the parts of a model where it is.

    Args:
        model: in evaluation mode, on its device and in its dtype.
        pixels: [B, 3, H, W], on the same device and in the same dtype; B is the batch size.
        matchings: what steps will be predicted for; each of their features and terms is timed.
        seconds: time limit, after five rounds.
        runtime: as of :func:`~dsm_tune.runtimes.forwards.forwards_of`.
        clock: returns seconds.
    """
    geometry = backbone.read_geometry(model)
    device = pixels.device
    counts = _grid(geometry)
    parts_of = _parts_of(model, pixels, runtime)
    calls: dict[tuple[str, int], Call] = {
        (part, i): call
        for i, count in enumerate(counts)
        for part, call in parts_of(count, matchings)
    }
    # Whole plans are timed in the same rounds as the parts: a machine that slows down slows both.
    plans = _calibration_plans(geometry)
    whole: dict[tuple[str, int], Call] = {
        (WHOLE, i): call for i, call in enumerate(forwards_of(model, plans, pixels, runtime))
    }
    repeats = 1 if device.type == "cpu" else DEVICE_REPEATS
    medians = _time_calls({**calls, **whole}, timer_for(device), repeats, seconds, clock)
    times = {
        part: tuple(medians[part, i] for i in range(len(counts)))
        for part in dict.fromkeys(part for part, _ in calls)
    }
    profile = DeviceProfile(
        device=describe_device(device, runtime),
        geometry=geometry,
        dtype=str(pixels.dtype).removeprefix("torch."),
        batch_size=len(pixels),
        runtime=runtime,
        tokens=counts,
        parts=_subtract_baseline(times),
    )
    return _calibrate(profile, plans, [medians[key] for key in whole])


def _parts_of(
    model: nn.Module, pixels: Tensor, runtime: str
) -> Callable[[int, Sequence[Matching]], Named]:
    if runtime != "onnx":
        return partial(part_calls, model, pixels, runtime)
    from dsm_tune.measuring.onnx_parts import OnnxParts  # its packages may be absent

    return OnnxParts(model, pixels).calls


def _grid(geometry: Geometry) -> tuple[int, ...]:
    least = geometry.prefix + 2
    step = max((geometry.tokens - least) / (GRID - 1), 1.0)
    counts = {round(geometry.tokens - i * step) for i in range(GRID)}
    return tuple(sorted(count for count in counts if count >= min(least, geometry.tokens)))


def _time_calls(
    calls: dict[tuple[str, int], Call],
    timed: Callable[[Call], Lap],
    repeats: int,
    seconds: float,
    clock: Callable[[], float],
) -> dict[tuple[str, int], float]:
    """Median milliseconds of each call, all calls in turn, round after round.

    The first whole plan of a round finds memory as the parts have left it, and took up to 12 %
    more than alone: it is run once more before.
    """
    first_whole = next((key for key in calls if key[0] == WHOLE), None)

    def often(call: Call) -> None:
        for _ in range(repeats):
            call()

    timings = {key: when_warm(partial(often, call), timed) for key, call in calls.items()}
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    start = clock()
    while clock() - start < seconds or len(next(iter(samples.values()))) < 5:
        for key, timing in timings.items():
            if key == first_whole:
                calls[key]()
            samples[key].append(timing().ms / repeats)
    return {key: statistics.median(values) for key, values in samples.items()}


def _subtract_baseline(parts: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """What local windows, salience and the size penalty add to a merge, and fusing to a prune."""
    result = {}
    for name, times in parts.items():
        if name == "local" or name.startswith(("salience_", "size_penalty", "norm")):
            times = tuple(max(t - k, 0.0) for t, k in zip(times, parts["merge_k"], strict=True))
        elif name == "fuse":
            times = tuple(max(t - k, 0.0) for t, k in zip(times, parts["prune_norm"], strict=True))
        result[name] = times
    return result


def _calibration_plans(geometry: Geometry) -> list[MergePlan]:
    """Dense, and ToMe's from few tokens to many, every other one with all terms of a matching."""
    share = geometry.patches / geometry.depth
    plans = [MergePlan("", geometry)]
    attention = "class" if geometry.prefix else "received"
    rich = Matching(
        salience=0.3, attention=attention, size_penalty=0.1, attention_weight=1.0, norm="mean"
    )
    for part in (0.3, 0.5, 0.7, 0.9):
        plan = schedules.tome(geometry, max(round(share * part), 1))
        is_rich = len(plans) % 2 == 0
        plans.append(dataclasses.replace(plan, matching=rich) if is_rich else plan)
    return plans


def _calibrate(
    profile: DeviceProfile, plans: Sequence[MergePlan], measured: Sequence[float]
) -> DeviceProfile:
    """Bring the sum of parts to whole forwards of a few plans; the largest misfit is the error.

    What a step takes within a forward differs from what it takes over and over by another factor
    than the blocks do: it is many brief operators, which find the caches full of weights. So there
    are two factors, by least squares of the relative misfit; that of the steps is put into their
    parts.
    """
    blocks = [_with_steps_times(profile, 0.0).predict(plan) for plan in plans]
    steps = [profile.predict(plan) - plain for plan, plain in zip(plans, blocks, strict=True)]
    rows = torch.tensor([blocks, steps], dtype=torch.float64).T
    rows = rows / torch.tensor(measured, dtype=torch.float64).unsqueeze(1)
    of_blocks, of_steps = torch.linalg.lstsq(rows, torch.ones(len(plans), 1).double()).solution
    factor = float(of_steps / of_blocks.clamp(min=1e-9))
    profile = _with_steps_times(profile, min(max(factor, 1 / MOST_FACTOR), MOST_FACTOR))
    ratios = [ms / profile.predict(plan) for plan, ms in zip(plans, measured, strict=True)]
    scale = statistics.median(ratios)
    error = max(abs(ratio / scale - 1) for ratio in ratios)
    return dataclasses.replace(profile, scale=scale, error=error)


def _with_steps_times(profile: DeviceProfile, factor: float) -> DeviceProfile:
    """The profile with the parts that make up a step multiplied by a factor."""
    of_steps = ("merge_", "local", "salience_", "size_penalty", "norm", "prune_", "fuse")
    parts = {
        name: tuple(factor * ms for ms in times) if name.startswith(of_steps) else times
        for name, times in profile.parts.items()
    }
    return dataclasses.replace(profile, parts=parts)


def time_plans(
    model: nn.Module,
    plans: Sequence[MergePlan],
    pixels: Tensor,
    *,
    seconds: float,
    runtime: str = "eager",
    clock: Callable[[], float] = time.monotonic,
) -> list[Timing]:
    """Time forwards under each plan, in turn; the n-th of each belong to one round.

    Args:
        model: in evaluation mode, not merged.
        plans: made for it.
        pixels: [B, 3, H, W] on its device.
        seconds: time limit.
        runtime: as of :func:`~dsm_tune.runtimes.forwards.forwards_of`.
        clock: returns seconds.
    """
    forwards = forwards_of(model, plans, pixels, runtime)
    return interleave(forwards, timer_for(pixels.device), seconds=seconds, clock=clock)
