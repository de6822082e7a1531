"""What the verb bench does: methods, plans and other models side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune import schedules
from dsm_tune.candidates import Asked, Candidate, candidates_of, noise
from dsm_tune.config import DEMO_MODEL, TuneConfig
from dsm_tune.inputs import CURVE_IMAGES, Inputs, load_inputs, load_model, reread
from dsm_tune.measuring.confirm import Target
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.measuring.images import ImageSet
from dsm_tune.measuring.peak import peak_mib
from dsm_tune.measuring.quality import PerImage, bootstrap_interval
from dsm_tune.measuring.side_by_side import time_side_by_side
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.merged import merged_view
from dsm_tune.merging.similarity import detect_delay, similarity_curve
from dsm_tune.methods import Settings
from dsm_tune.plan import Geometry
from dsm_tune.reviewing.summary import duration_words
from dsm_tune.runtimes.forwards import Call, forward_of, forwards_of
from dsm_tune.runtimes.onnx.files import opened_as_it_is
from dsm_tune.target import TargetDevice

__all__ = ["bench", "judged", "speeds_of", "top1_of"]

Say = Callable[[str], None]


def bench(config: TuneConfig, asked: Asked, say: Say) -> dict[str, Any]:
    """Measure all candidates.

    Args:
        config: names model, images, device, dtype, threads and runtime.
        asked: what is compared with the dense model.
        say: is told what happens.

    Returns:
        What ``dsm-tune bench --json`` prints.

    Raises:
        DsmTuneError: if a model, a plan, an image folder or an option cannot be used.
    """
    device = TargetDevice(config)
    is_random = config.model != DEMO_MODEL and not (config.checkpoint or config.pretrained)
    inputs = _inputs(config, asked.has_images and not is_random, say)
    model = load_model(config) if inputs is None else inputs.model
    if is_random:
        say("weights are random: speed and GMACs only, no quality; D = depth / 6")
    delay, source = _delay(inputs, asked.settings, read_geometry(model))
    candidates = candidates_of(model, config, asked, delay)
    pixels = _batch(model, inputs, max(asked.batch_sizes))
    where = device.device, config.dtype, device.threads, config.runtime
    target = Target(model, pixels, *where)
    target.ready()  # moves the model to where it is measured
    quality = _qualities(candidates, model, inputs, config, say)
    speeds = [speeds_of(candidates, target, size, asked.runs, say) for size in asked.batch_sizes]
    return {
        "model": config.model_name,
        "weights": "random" if is_random else "given",
        "device": device.facts(None),
        "dtype": config.dtype,
        "runtime": config.runtime,
        "threads": device.threads,
        "runs": asked.runs,
        "images": None if inputs is None else _image_facts(inputs),
        "delay": delay,
        "delay_from": source,
        "candidates": [
            _row(one, judged, timed, candidates[0].gmacs)
            for one, judged, *timed in zip(candidates, quality, *speeds, strict=True)
        ],
    }


def _inputs(config: TuneConfig, has_images: bool, say: Say) -> Inputs | None:
    if not has_images:
        return None
    inputs = load_inputs(config)
    for line in inputs.skipped:
        say(f"skipped {line}")
    return inputs


def _image_facts(inputs: Inputs) -> dict[str, Any]:
    return {"count": len(inputs.holdout), "labelled": inputs.holdout.labelled}


def _delay(inputs: Inputs | None, settings: Settings, geometry: Geometry) -> tuple[int, str]:
    """D and where it comes from."""
    if settings.delay is not None:
        return settings.delay, "--delay"
    if inputs is None:
        return schedules.default_delay(geometry), "depth / 6"
    curve = similarity_curve(inputs.model, inputs.search.pixels[:CURVE_IMAGES])
    return detect_delay(curve), "similarity curve"


def _batch(model: nn.Module, inputs: Inputs | None, count: int) -> Tensor:
    """What is timed: the images, over and over, or noise: [count, 3, H, W]."""
    if inputs is None:
        return noise(model, count)
    every = inputs.holdout.pixels
    return every[torch.arange(count) % len(every)]


def _qualities(
    candidates: Sequence[Candidate],
    model: nn.Module,
    inputs: Inputs | None,
    config: TuneConfig,
    say: Say,
) -> list[dict[str, Any] | None]:
    """What each candidate is worth on the held-out images; ``None`` where that means nothing."""
    if inputs is None:
        return [None] * len(candidates)
    say(f"judging {len(candidates)} candidates on {len(inputs.holdout)} held-out images")
    evaluator = Evaluator(model, inputs.holdout.pixels, inputs.holdout.labels)
    found: list[dict[str, Any] | None] = []
    for one in candidates:
        if one.plan is not None:
            found.append(judged(evaluator.evaluate(one.plan)))
        else:
            found.append(top1_of(one, inputs.holdout, config))
    return found


def judged(images: PerImage) -> dict[str, Any]:
    """The quality of a plan in the document: means, and intervals of them."""
    quality = images.summary()
    low, high = bootstrap_interval(images.divergence)
    agrees = bootstrap_interval(images.agrees.double())
    return {
        "divergence": quality.divergence,
        "divergence_low": low,
        "divergence_high": high,
        "agreement": quality.agreement,
        "agreement_low": agrees[0],
        "agreement_high": agrees[1],
        "top1": quality.top1,
    }


@torch.inference_mode()
def top1_of(one: Candidate, images: ImageSet, config: TuneConfig) -> dict[str, Any] | None:
    """Top-1 of another model, on the same images through its own transform."""
    if one.other is None or not one.is_trained or not images.labelled or config.images is None:
        return None
    own = reread(config, images.names, one.other)
    guesses = torch.cat([one.other(batch).argmax(dim=1) for batch in torch.split(own.pixels, 16)])
    return {"top1": float((guesses == own.labels).double().mean())}


def speeds_of(
    candidates: Sequence[Candidate], target: Target, batch_size: int, runs: int, say: Say
) -> list[dict[str, Any]]:
    """Time all candidates at one batch size, in turn.

    Args:
        candidates: plans of the target's model, and other models; the first is the reference.
        target: model, images and where they are timed; made ready before.
        batch_size: images per forward.
        runs: forwards of each.
        say: is told about how long it takes.

    Returns:
        The timing of each in the document.
    """
    device, dtype = torch.device(target.device), getattr(torch, target.dtype)
    pixels = target.pixels[:batch_size].to(device, dtype)
    plans = [one.plan for one in candidates if one.plan is not None]
    own = iter(forwards_of(target.model, plans, pixels, target.runtime))
    calls, peaks = [], []
    for one in candidates:
        model, batch = one.other, pixels
        if model is not None:
            model, batch = model.to(device, dtype), noise(model, batch_size).to(device, dtype)
            calls.append(_call_of(model, batch, target.runtime))
        else:
            assert one.plan is not None
            model = merged_view(target.model, one.plan)
            calls.append(next(own))
        peaks.append(None if target.runtime == "onnx" else _peak(model, batch))

    def estimate(seconds: float) -> None:
        words = f"{runs} runs of {len(calls)} models at batch size {batch_size}, in turn"
        say(f"timing {words}: about {duration_words(seconds)}")

    speeds = time_side_by_side(calls, batch_size, device, runs=runs, say=estimate)
    return [
        {**dataclasses.asdict(speed), "peak_mib": peak}
        for speed, peak in zip(speeds, peaks, strict=True)
    ]


def _call_of(model: nn.Module, pixels: Tensor, runtime: str) -> Call:
    """The call of another model, as the runtime runs it."""
    if runtime != "onnx":
        return forward_of(model, pixels, runtime)
    return partial(opened_as_it_is(model, pixels, torch.get_num_threads()), pixels)


def _peak(model: nn.Module, pixels: Tensor) -> float:
    """Peak memory of an eager forward in MiB, weights and images included."""
    held = sum(part.nbytes for part in (*model.parameters(), *model.buffers(), pixels))
    return peak_mib(forward_of(model, pixels), held, pixels.device)


def _row(
    one: Candidate,
    quality: dict[str, Any] | None,
    timings: Sequence[dict[str, Any]],
    dense_gmacs: float,
) -> dict[str, Any]:
    """A candidate in the document; efficiency is the speed-up over the ratio of GMACs."""
    share = dense_gmacs / one.gmacs
    return {
        "name": one.name,
        "kind": one.kind,
        "r": one.r,
        "gmacs": one.gmacs,
        "gmacs_counted": one.counted,
        "quality": quality,
        "timings": [{**each, "efficiency": each["speedup"] / share} for each in timings],
        "plan": None if one.plan is None else json.loads(one.plan.to_json()),
    }
