"""Whether an exported bundle does on this machine what it promises."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dsm_tune import demo
from dsm_tune.errors import BundleError, ConfigError
from dsm_tune.exporting import formats
from dsm_tune.exporting.bundle import Bundle, open_bundle
from dsm_tune.exporting.manifest import MANIFEST
from dsm_tune.exporting.proof import compared
from dsm_tune.measuring.confirm import Confirmed, Target, confirm_latency
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.measuring.images import ImageSet, load_folder
from dsm_tune.measuring.quality import bootstrap_interval
from dsm_tune.plan import MergePlan
from dsm_tune.results import LatencyMs

__all__ = ["Verdict", "verify"]

SECONDS = 10.0  # of timing
IMAGES = 256


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``ok``, ``warning`` or ``failed``."""

    name: str
    status: str
    detail: str


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
    threads: int | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Check a bundle: hashes, stored outputs in every format, latency, budget, quality.

    Args:
        folder: of the bundle.
        images: folder to measure its quality on; the demo brings its own.
        threads: of timed forwards; as it was exported with, or all cores.
        seconds: for timing.
        say: is told what happens.

    Raises:
        ConfigError: if the folder is no bundle at all.
        ImagesError: if the images cannot be used.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise ConfigError(f"a bundle must be a folder with {MANIFEST}, but got {folder!r:.200}")
    try:
        found = open_bundle(path)
    except BundleError as error:
        return Verdict((Finding("files", "failed", str(error)),))
    count = len(found.manifest.files)
    findings = [Finding("files", "ok", f"{count} files as they were written")]
    say("comparing outputs")
    findings += _outputs(found, path)
    say("timing the merged model beside the dense one")
    device, timed = _latency(found, threads, seconds)
    findings += _device(found, device)
    findings += _budget(found, timed)
    quality = _quality(found, images)
    if quality is not None:
        findings.append(_judge(found, quality))
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
    for name, run in runs.items():
        proof = compared(run, found.pixels, found.outputs, found.manifest.tolerance)
        yield Finding(name, "ok" if proof.holds else "failed", str(proof))


def _latency(
    found: Bundle, threads: int | None, seconds: float
) -> tuple[dict[str, object], Confirmed]:
    made = found.manifest.made
    serving = made.get("serving") or {}
    batch = int(serving.get("batch_size", 1))
    pixels = found.pixels.float()[torch.arange(batch) % len(found.pixels)]
    target = Target(
        found.dense,
        pixels,
        "cpu",
        found.manifest.dtype,
        threads or made.get("threads") or os.cpu_count() or 1,
        str(serving.get("runtime", "eager")),
    )
    plans = [MergePlan("", found.plan.geometry), found.plan]
    device, timed = confirm_latency(
        target, plans, stat=str(made.get("stat", "p50")), seconds=seconds
    )
    return device, timed[1]


def _device(found: Bundle, here: Mapping[str, object]) -> Iterator[Finding]:
    known = (found.manifest.made.get("device") or {}).get("described") or {}
    differs = [
        f"{key} {there!s} there, {here.get(key)!s} here"
        for key, there in known.items()
        if there != here.get(key)
    ]
    if differs:
        detail = f"another device than it was tuned on ({'; '.join(differs)}): measured anew"
        yield Finding("device", "warning", detail)
    else:
        yield Finding("device", "ok", f"{here.get('name')}")


def _budget(found: Bundle, timed: Confirmed) -> Iterator[Finding]:
    made = found.manifest.made
    limits, stat = made.get("limits") or {}, str(made.get("stat", "p50"))
    took, ratio = timed.latency_ms, timed.latency_ms.ratio_to_dense
    value = getattr(took, stat)
    told = f"{stat} {value:.3g} ms [{took.low:.3g}, {took.high:.3g}], {ratio:.2f} x dense"
    share, ms, gmacs = (limits.get(name) for name in ("ms_share", "ms", "gmacs"))
    within = "ok"
    if share is not None:
        within = "ok" if timed.ratio_high <= share else "failed"
        told += f"; the budget is {share:.0%} of dense"
    elif ms is not None:
        within = "ok" if took.high is not None and took.high <= ms else "failed"
        told += f"; the budget is {ms:.3g} ms"
    yield Finding("latency", within, told)
    if gmacs is not None:
        fits = found.plan.gmacs <= gmacs
        told = f"{found.plan.gmacs:.3g} per image; the budget is {gmacs:.3g}"
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


def _judge(found: Bundle, quality: Mapping[str, float]) -> Finding:
    """Fail where the divergence is surely above what the export promised."""
    promised = found.manifest.made.get("exported") or {}
    high = promised.get("divergence_high")
    told = (
        f"divergence {quality['divergence']:.4f} [{quality['divergence_low']:.4f}, "
        f"{quality['divergence_high']:.4f}] nats, agreement {quality['agreement']:.1%} "
        f"on {quality['images']:.0f} images"
    )
    if high is None:
        return Finding("quality", "ok", f"{told}; nothing was promised")
    worse = quality["divergence_low"] > high
    told += f"; promised were {promised['divergence']:.4f}"
    return Finding("quality", "failed" if worse else "ok", told)
