"""Whether an exported bundle does on this machine what it promises."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dsm_tune import demo
from dsm_tune.config import TuneConfig
from dsm_tune.errors import BundleError, ConfigError, DsmTuneError, shown
from dsm_tune.exporting import formats
from dsm_tune.exporting.bundle import Bundle, open_bundle
from dsm_tune.exporting.manifest import MANIFEST
from dsm_tune.exporting.proof import compared
from dsm_tune.measuring.confirm import Confirmed, Target, confirm_latency, device_of
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.measuring.images import ImageSet, load_folder
from dsm_tune.measuring.quality import bootstrap_interval
from dsm_tune.plan import MergePlan
from dsm_tune.results import LatencyMs
from dsm_tune.target import present

__all__ = ["Verdict", "verify"]

SECONDS = 10.0  # of timing
IMAGES = 256
LARGEST = 1e9  # budget, in ms or GMACs
MOST_AT_ONCE = 4096  # images


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``ok``, ``warning`` or ``failed``."""

    name: str
    status: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a manifest says of how a bundle is served, and what it then does.

    Attributes:
        runtime, batch_size, device, threads, stat: as of a tune.
        ms, ms_share, gmacs: its budget.
        divergence_high: upper end of the interval of its divergence.
        described: the device that it was tuned on.
    """

    runtime: str = "eager"
    batch_size: int = 1
    device: str = "auto"
    threads: int | None = None
    stat: str = "p50"
    ms: float | None = None
    ms_share: float | None = None
    gmacs: float | None = None
    divergence_high: float | None = None
    described: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, made: Mapping[str, Any]) -> Promise:
        """Read it from a manifest.

        Raises:
            BundleError: for a value that no export writes.
        """
        parts = {name: made.get(name) or {} for name in ("serving", "limits", "exported", "device")}
        bad = next((name for name, part in parts.items() if not isinstance(part, dict)), None)
        if bad is not None:
            raise BundleError(f"{MANIFEST}: made.{bad} must be an object")
        limits, described = parts["limits"], parts["device"].get("described") or {}
        served = {**parts["serving"], "threads": made.get("threads"), "stat": made.get("stat")}
        known = {name: value for name, value in served.items() if value is not None}
        numbers = {name: limits.get(name) for name in ("ms", "ms_share", "gmacs")}
        numbers["divergence_high"] = parts["exported"].get("divergence_high")
        try:
            asked = TuneConfig(budget_gflops="100%", **_named(known))  # checks what it is given
        except (DsmTuneError, TypeError) as error:
            raise BundleError(f"{MANIFEST}: made: {error}") from None
        for name, value in numbers.items():
            if value is not None and not _is_figure(value):
                raise BundleError(
                    f"{MANIFEST}: {name} must be a number from 0 to {LARGEST:g}, "
                    f"but got {shown(value)}"
                )
        if asked.batch_size > MOST_AT_ONCE:
            raise BundleError(
                f"{MANIFEST}: batch_size must be at most {MOST_AT_ONCE}, but got {asked.batch_size}"
            )
        if not isinstance(described, dict):
            raise BundleError(f"{MANIFEST}: made.device.described must be an object")
        return cls(
            asked.runtime,
            asked.batch_size,
            asked.device,
            asked.threads,
            asked.latency_stat,
            **numbers,
            described=described,
        )


def _is_figure(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= LARGEST  # type: ignore[operator]


def _named(served: Mapping[str, Any]) -> dict[str, Any]:
    return {"latency_stat" if name == "stat" else name: value for name, value in served.items()}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        findings: in the order in which they were looked at; the first that failed may be the last.
        latency_ms: of the merged model on this machine; ``None`` if it was not timed.
        quality: divergence, its interval and agreement on images; ``None`` without images.
    """

    findings: tuple[Finding, ...]
    latency_ms: LatencyMs | None = None
    quality: Mapping[str, float] | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the ``--json`` document."""
        return {"ok": self.holds, **dataclasses.asdict(self)}


def verify(
    folder: str,
    *,
    images: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Check a bundle: hashes, stored outputs in every format, latency, budget, quality.

    Args:
        folder: of the bundle.
        images: folder to measure its quality on; the demo brings its own.
        device: to time on; where it was tuned for, if not given.
        threads: of timed forwards; as it was exported with, or all cores.
        seconds: for timing.
        say: is told what happens.

    Raises:
        ConfigError: if the folder is no bundle at all, or the device is not there.
        ImagesError: if the images cannot be used.
    """
    path = Path(folder)
    TuneConfig(budget_gflops="100%", device=device or "auto", threads=threads)  # checks them
    if device is not None:
        present(device_of(device))
    if not os.path.isfile(path / MANIFEST):
        raise ConfigError(f"a bundle must be a folder with {MANIFEST}, but got {folder!r:.200}")
    try:
        found = open_bundle(path)
        promise = Promise.of(found.manifest.made)
    except BundleError as error:
        return Verdict((Finding("files", "failed", str(error)),))
    count = len(found.manifest.files)
    findings = [Finding("files", "ok", f"{count} files as they were written")]
    say("comparing outputs")
    findings += _outputs(found, path)
    say("timing the merged model beside the dense one")
    absent = None
    try:
        where = present(device_of(device or promise.device))
    except ConfigError:
        where = "cpu"
        told = f"{promise.device}, which it was tuned for, is not here: timed on the CPU"
        absent = Finding("device", "warning", told)
    if promise.runtime == "cudagraphs" and not where.startswith("cuda"):
        findings.append(Finding("runtime", "warning", f"{where} has no CUDA graphs: eager"))
        promise = dataclasses.replace(promise, runtime="eager")
    quality = _quality(found, images)
    described, timed = _latency(found, promise, where, threads, seconds)
    findings.append(absent or _device(promise, described))
    findings += _budget(found, promise, timed)
    if quality is not None:
        findings.append(_judge(promise, quality))
    return Verdict(tuple(findings), timed.latency_ms, quality)


@torch.no_grad()
def _outputs(found: Bundle, folder: Path) -> Iterator[Finding]:
    """Every format gives the stored outputs."""
    runs: dict[str, Callable[..., Any]] = {"outputs": found.merged}
    for kind, file in formats.FILES.items():
        if file in found.manifest.files:
            try:
                runs[f"{kind} outputs"] = formats.opened(kind, folder / file, 1)
            except ConfigError as error:
                yield Finding(f"{kind} outputs", "warning", str(error))
            except BundleError as error:
                yield Finding(f"{kind} outputs", "failed", str(error))
    for name, run in runs.items():
        proof = compared(run, found.pixels, found.outputs, found.manifest.tolerance)
        yield Finding(name, "ok" if proof.holds else "failed", str(proof))


def _latency(
    found: Bundle, promise: Promise, device: str, threads: int | None, seconds: float
) -> tuple[dict[str, object], Confirmed]:
    pixels = found.pixels.float()[torch.arange(promise.batch_size) % len(found.pixels)]
    target = Target(
        found.dense,
        pixels,
        device,
        found.manifest.dtype,
        threads or promise.threads or os.cpu_count() or 1,
        promise.runtime,
    )
    plans = [MergePlan("", found.plan.geometry), found.plan]
    described, timed = confirm_latency(target, plans, stat=promise.stat, seconds=seconds)
    return described, timed[1]


def _device(promise: Promise, here: Mapping[str, object]) -> Finding:
    differs = [
        f"{key} {there!s} there, {here.get(key)!s} here"
        for key, there in promise.described.items()
        if there != here.get(key)
    ]
    if differs:
        detail = f"another device than it was tuned on ({'; '.join(differs)}): measured anew"
        return Finding("device", "warning", detail)
    return Finding("device", "ok", f"{here.get('name')}")


def _budget(found: Bundle, promise: Promise, timed: Confirmed) -> Iterator[Finding]:
    took, within = timed.latency_ms, True
    value = getattr(took, promise.stat)
    told = f"{promise.stat} {value:.3g} ms [{took.low:.3g}, {took.high:.3g}]"
    told += f", {took.ratio_to_dense:.2f} x dense"
    if promise.ms_share is not None:
        within = timed.ratio_high <= promise.ms_share
        told += f"; the budget is {promise.ms_share:.0%} of dense"
    elif promise.ms is not None:
        within = took.high is not None and took.high <= promise.ms
        told += f"; the budget is {promise.ms:.3g} ms"
    yield Finding("latency", "ok" if within else "failed", told)
    if promise.gmacs is not None:
        fits = found.plan.gmacs <= promise.gmacs
        told = f"{found.plan.gmacs:.3g} per image; the budget is {promise.gmacs:.3g}"
        yield Finding("GMACs", "ok" if fits else "failed", told)


@torch.no_grad()
def _quality(found: Bundle, images: str | None) -> dict[str, float] | None:
    if images is not None:
        known = load_folder(images, found.dense, limit=IMAGES)[0]
    elif found.manifest.model["name"] == demo.MODEL_NAME:
        pixels, labels = demo.load_split("holdout")
        known = ImageSet(pixels, labels, tuple(f"{i}" for i in range(len(labels))))
    else:
        return None
    per_image = Evaluator(found.dense, known.pixels, known.labels).evaluate(found.plan)
    low, high = bootstrap_interval(per_image.divergence)
    summary = per_image.summary()
    return {
        "images": float(summary.images),
        "divergence": summary.divergence,
        "divergence_low": low,
        "divergence_high": high,
        "agreement": summary.agreement,
    }


def _judge(promise: Promise, quality: Mapping[str, float]) -> Finding:
    """Fail where the divergence is surely above what the export promised."""
    told = (
        f"divergence {quality['divergence']:.4f} [{quality['divergence_low']:.4f}, "
        f"{quality['divergence_high']:.4f}] nats, agreement {quality['agreement']:.1%} "
        f"on {quality['images']:.0f} images"
    )
    if promise.divergence_high is None:
        return Finding("quality", "ok", f"{told}; nothing was promised")
    worse = quality["divergence_low"] > promise.divergence_high
    told += f"; up to {promise.divergence_high:.4f} was promised"
    return Finding("quality", "failed" if worse else "ok", told)
