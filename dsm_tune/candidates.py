"""Who takes part in a bench: methods, plans and other models, with their multiply-adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from dsm_tune import methods
from dsm_tune.config import TuneConfig, absolute_storage
from dsm_tune.errors import ModelError, nearest
from dsm_tune.measuring.images import input_size
from dsm_tune.measuring.macs import count_macs
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.loading import create_model
from dsm_tune.merging.merged import merged_view
from dsm_tune.methods import Settings
from dsm_tune.plan import MergePlan

__all__ = ["Asked", "Candidate", "candidates_of", "noise"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is compared, and how often.

    Attributes:
        rates: r of ToMe and of DSM, one candidate of each per number; empty for patches / depth.
        settings: of these.
        plans: files of plans.
        trials: MLflow runs of trials.
        others: timm names of other models, each with ``=FILE`` behind it where it has weights.
        batch_sizes: that are timed.
        runs: timed forwards of each.
        has_images: whether the configuration has images.
    """

    rates: tuple[int, ...] = ()
    settings: Settings = dataclasses.field(default_factory=Settings)
    plans: tuple[str, ...] = ()
    trials: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (32,)
    runs: int = 50
    has_images: bool = True


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row: a plan of the model, or another model.

    Attributes:
        name: that is printed.
        kind: ``dense``, ``tome``, ``dsm``, ``plan``, ``run`` or ``other``.
        plan: for the model; ``None`` for another model.
        r: of a published plan.
        other: another model, on the CPU, in evaluation mode.
        is_trained: whether another model has weights that mean something.
        gmacs: giga multiply-adds per image, of a plan in closed form.
        counted: the same, counted in one traced forward.
    """

    name: str
    kind: str
    plan: MergePlan | None = None
    r: int | None = None
    other: nn.Module | None = None
    is_trained: bool = True
    gmacs: float = 0.0
    counted: float = 0.0


def candidates_of(
    model: nn.Module, config: TuneConfig, asked: Asked, delay: int
) -> list[Candidate]:
    """Return all candidates with their multiply-adds, the dense model first.

    Args:
        model: in evaluation mode, on the CPU, in float32.
        config: names the study store, and whether weights are downloaded.
        asked: what is compared.
        delay: D of DSM.

    Raises:
        DsmTuneError: if a plan, a run or a model cannot be used.
    """
    return [_counted(one, model) for one in _named(model, config, asked, delay)]


def _named(model: nn.Module, config: TuneConfig, asked: Asked, delay: int) -> Iterator[Candidate]:
    geometry = read_geometry(model)
    yield Candidate("dense", "dense", MergePlan("", geometry))
    for r in asked.rates or (methods.default_r(geometry),):
        for kind, name in (("tome", f"ToMe r={r}"), ("dsm", f"DSM r={r} D={delay}")):
            plan = methods.published(kind, geometry, r, asked.settings, delay)
            yield Candidate(name, kind, plan, r)
    for file in asked.plans:
        yield Candidate(Path(file).stem, "plan", methods.read_plan(file, geometry))
    storage = absolute_storage(config.storage, Path.cwd())
    for run in asked.trials:
        yield Candidate(run[:12], "run", methods.plan_of_run(run, storage, geometry))
    for other in asked.others:
        name, _, file = other.partition("=")
        if not name.startswith("hf-hub:") and not timm.is_model(name.split(".")[0]):
            near = nearest(name[:80], timm.list_models())
            raise ModelError(f"--compare must be a timm model, but got {name!r:.80}{near}")
        try:
            made = create_model(name, checkpoint=file or None, pretrained=config.pretrained)
        except ModelError as error:
            raise ModelError(f"--compare {name:.60}: {error}") from None
        is_trained = bool(file) or config.pretrained
        yield Candidate(name, "other", other=made, is_trained=is_trained)


def _counted(one: Candidate, model: nn.Module) -> Candidate:
    """With its GMACs: in closed form where there is a plan, and as one traced forward has them."""
    if one.plan is not None:
        counted = count_macs(merged_view(model, one.plan), noise(model, 1)) / 1e9
        return dataclasses.replace(one, gmacs=one.plan.gmacs, counted=counted)
    assert one.other is not None
    try:
        counted = count_macs(one.other, noise(one.other, 1)) / 1e9
    except ModelError as error:
        raise ModelError(f"--compare {one.name}: {error}") from None
    return dataclasses.replace(one, gmacs=counted, counted=counted)


def noise(model: nn.Module, count: int) -> Tensor:
    """Images of the size that a model takes, the same ones each time: [count, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *input_size(model), generator=generator)
