"""Measures a device profile: parts of a model on a grid of token counts, and a few whole plans."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune import schedules
from dsm_tune.measuring.latency import Lap, Timing, interleave, timer_for, when_warm
from dsm_tune.merging import backbone
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.merged import MergedBlocks, merged_view
from dsm_tune.plan import ATTENTIONS, Geometry, Matching, MergePlan, Step
from dsm_tune.profile import DeviceProfile
from dsm_tune.runtimes.forwards import Call, forward_of, prepared

__all__ = ["describe_device", "measure_profile"]

WHOLE = "whole"  # key of the calls that run a whole plan
GRID = 12  # token counts at which parts are timed
MOST_FACTOR = 4.0  # between what a step takes within a forward and over and over
DEVICE_REPEATS = 10  # calls between two waits for a device, so that launches overlap as in a model


def describe_device(device: torch.device) -> dict[str, Any]:
    """What decides how fast a device is: its name, driver or processor, torch, and threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"name": name, "cuda": torch.version.cuda, "torch": torch.__version__}
    return {
        "name": _processor(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


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
        runtime: as of :func:`~dsm_tune.runtimes.forwards.prepared`.
        clock: returns seconds.
    """
    geometry = backbone.read_geometry(model)
    device = pixels.device
    counts = _grid(geometry)
    calls: dict[tuple[str, int], Call] = {
        (part, i): prepared(call, runtime)
        for i, count in enumerate(counts)
        for part, call in _part_calls(model, geometry, pixels, count, matchings)
    }
    # Whole plans are timed in the same rounds as the parts: a machine that slows down slows both.
    plans = _calibration_plans(geometry)
    whole: dict[tuple[str, int], Call] = {
        (WHOLE, i): forward_of(merged_view(model, plan), pixels, runtime)
        for i, plan in enumerate(plans)
    }
    repeats = 1 if device.type == "cpu" else DEVICE_REPEATS
    medians = _time_calls({**calls, **whole}, timer_for(device), repeats, seconds, clock)
    parts = {
        part: tuple(medians[part, i] for i in range(len(counts)))
        for part in dict.fromkeys(part for part, _ in calls)
    }
    profile = DeviceProfile(
        device=describe_device(device),
        geometry=geometry,
        dtype=str(pixels.dtype).removeprefix("torch."),
        batch_size=len(pixels),
        runtime=runtime,
        tokens=counts,
        parts=_subtract_baseline(parts),
    )
    return _calibrate(profile, plans, [medians[key] for key in whole])


def _grid(geometry: Geometry) -> tuple[int, ...]:
    least = geometry.prefix + 2
    step = max((geometry.tokens - least) / (GRID - 1), 1.0)
    counts = {round(geometry.tokens - i * step) for i in range(GRID)}
    return tuple(sorted(count for count in counts if count >= min(least, geometry.tokens)))


def _part_calls(
    model: nn.Module, geometry: Geometry, pixels: Tensor, count: int, matchings: Sequence[Matching]
) -> Iterable[tuple[str, Call]]:
    parts: Any = model
    block = parts.blocks[geometry.depth // 2]
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(len(pixels), count, geometry.width, generator=generator)
    x = x.to(pixels.device, pixels.dtype)
    size = torch.ones(len(pixels), count, device=pixels.device)
    log_size = size.log()
    yield "attention", partial(backbone.attend, block, x, None)
    yield "attention_sized", lambda: backbone.attend(block, x, size.log())
    yield "mlp", partial(backbone.feed_forward, block, x)
    if geometry.reads_prefix_only:
        yield (
            "prefix_block",
            lambda: backbone.feed_forward(
                block, backbone.attend_prefix(block, x, log_size, geometry.prefix)
            ),
        )
    yield "stem", partial(backbone.stem, model, pixels)
    yield "head", lambda: parts.forward_head(parts.norm(x))
    projections = backbone.attend(block, x, log_size)[1]
    tokens = Tokens(x, size)
    for name, matching, step in _steps(geometry, count, matchings):
        plan = MergePlan("", _small(geometry, count), (step,), matching)
        if not plan.active_steps:
            continue
        blocks = MergedBlocks(nn.Sequential(block), plan)
        yield name, partial(blocks._take_step, tokens, plan.active_steps[0], projections, log_size)


def _small(geometry: Geometry, count: int) -> Geometry:
    """The geometry of one block with this many tokens; in one column, which costs the same."""
    return dataclasses.replace(geometry, depth=1, grid=(max(count - geometry.prefix, 1), 1))


def _steps(
    geometry: Geometry, count: int, matchings: Sequence[Matching]
) -> Iterable[tuple[str, Matching, Step]]:
    """What to time: each feature plain, then each further term on top of the keys."""
    r = max((count - geometry.prefix) // 12, 1)
    merge, side = Step(0, "merge", r), max(int(count**0.5) // 2, 1)
    features = dict.fromkeys(["k", *(m.feature for m in matchings if m.feature != "random")])
    for feature in features:
        yield f"merge_{feature}", Matching(feature=feature), merge
    yield "local", Matching(), Step(0, "merge", r, side)
    yield "size_penalty", Matching(size_penalty=0.1), merge
    yield "norm", Matching(norm="mean"), merge
    attentions = [a for a in ATTENTIONS if a != "class" or geometry.prefix]
    for attention in attentions:
        yield (
            f"salience_{attention}",
            Matching(salience=0.1, attention_weight=1.0, attention=attention),
            merge,
        )
    for score in ("norm", *attentions):
        yield f"prune_{score}", Matching(prune_score=score), Step(0, "prune", r)


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
    """What local windows, salience and the size penalty add to a merge by keys."""
    result = {}
    for name, times in parts.items():
        if name == "local" or name.startswith(("salience_", "size_penalty", "norm")):
            times = tuple(max(t - k, 0.0) for t, k in zip(times, parts["merge_k"], strict=True))
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
    of_steps = ("merge_", "local", "salience_", "size_penalty", "norm", "prune_")
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
        runtime: as of :func:`~dsm_tune.runtimes.forwards.prepared`.
        clock: returns seconds.
    """
    forwards = [forward_of(merged_view(model, plan), pixels, runtime) for plan in plans]
    return interleave(forwards, timer_for(pixels.device), seconds=seconds, clock=clock)
