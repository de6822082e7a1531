"""The models that are given: their weights and images, D, and what each plan is worth."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsm_tune import schedules
from dsm_tune.bench import judged
from dsm_tune.config import DEMO_MODEL, TuneConfig
from dsm_tune.curve import facts_of
from dsm_tune.errors import ConfigError
from dsm_tune.inputs import CURVE_IMAGES, Inputs, load_inputs, load_model
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.measuring.quality import PerImage, bootstrap_interval
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.paper.plans import geometry_of
from dsm_tune.paper.printed import OTHERS
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.target import TargetDevice

__all__ = [
    "Asked",
    "Given",
    "Subject",
    "architecture",
    "is_other",
    "load_subject",
    "read_given",
]

FEW = 4  # random weights: their curve shows that the model runs, no more


@dataclasses.dataclass(frozen=True)
class Given:
    """A model that was named.

    Attributes:
        name: of timm, or of the demo.
        file: its weights; ``None`` without.
        has_weights: whether it has trained ones.
        label: tells it from the others that are given.
    """

    name: str
    file: str | None
    has_weights: bool
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be redone.

    Attributes:
        items: names of tables and figures.
        models: that were given.
        values: options of a :class:`TuneConfig` that all of them share.
        rates: r of sweeps.
        count: of images that plans are judged on, at most.
        has_speed: whether speed is measured.
        batch_size: images per timed forward.
        runs: timed forwards of each.
    """

    items: tuple[str, ...]
    models: tuple[Given, ...] = ()
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    rates: tuple[int, ...] = (4, 8, 12, 16)
    count: int = 256
    has_speed: bool = False
    batch_size: int = 32
    runs: int = 50

    @property
    def config(self) -> TuneConfig:
        """The shared options alone, of no model in particular."""
        return TuneConfig(**{"budget_gflops": "100%", "images": ".", **self.values})


class Subject:
    """A given model, ready to be judged.

    Args:
        given: its name and weights.
        config: of this model.
        inputs: model and images; ``None`` without images.
        model: dense.
        count: of images that plans are judged on, at most.
    """

    def __init__(
        self, given: Given, config: TuneConfig, inputs: Inputs | None, model: nn.Module, count: int
    ) -> None:
        self.given, self.config, self.inputs, self.model = given, config, inputs, model
        self.geometry: Geometry = read_geometry(model)
        self.curve: dict[str, Any] | None = None
        self._evaluator: Evaluator | None = None
        self._known: dict[str, PerImage] = {}
        if inputs is None:
            return
        device = TargetDevice(config)
        torch.set_num_threads(device.threads)
        pixels = inputs.search.pixels[: CURVE_IMAGES if given.has_weights else FEW]
        self.curve = facts_of(model, pixels, seed=config.seed)
        if given.has_weights:
            self.images = inputs.holdout.take(range(min(count, len(inputs.holdout))))
            model.to(device.device, getattr(torch, config.dtype))
            self._evaluator = Evaluator(model, self.images.pixels, self.images.labels)

    @property
    def delay(self) -> int:
        """D: of the curve of trained weights, else ``depth / 6``."""
        if self.curve is None or not self.given.has_weights:
            return schedules.default_delay(self.geometry)
        return int(self.curve["delay"])

    @property
    def is_papers(self) -> bool:
        """Whether it has the sizes that timm gives a model of its name, as the paper's have."""
        return self.geometry == geometry_of(architecture(self.given.name))

    @property
    def needs(self) -> str | None:
        """What is missing to judge a plan."""
        if not self.given.has_weights:
            return "weights"
        return "images" if self._evaluator is None else None

    def facts(self) -> dict[str, Any]:
        """The model in the document."""
        images = None if self._evaluator is None else len(self.images)
        return {
            "model": self.given.label,
            "checkpoint": self.given.file,
            "weights": "given" if self.given.has_weights else "random",
            "depth": self.geometry.depth,
            "delay": self.delay,
            "delay_from": "depth / 6" if self.curve is None or self.needs else "similarity curve",
            "stability": None if self.curve is None or self.needs else self.curve["stability"],
            "images": images,
            "labelled": None if images is None else self.images.labelled,
            "image": None if self.inputs is None else min(self.inputs.holdout.names),
        }

    def quality(self, plan: MergePlan) -> dict[str, Any] | None:
        """What a plan is worth beside the dense model; ``None`` where :attr:`needs` says why."""
        if self._evaluator is None:
            return None
        found, dense = self._judge(plan), self._judge(plan.dense())
        change = found.hit1.double() - dense.hit1.double()
        low, high = bootstrap_interval(change)
        has_labels = self.images.labelled
        return {
            **judged(found),
            "top1_change": 100 * float(change.mean()) if has_labels else None,
            "top1_change_low": 100 * low if has_labels else None,
            "top1_change_high": 100 * high if has_labels else None,
        }

    def _judge(self, plan: MergePlan) -> PerImage:
        if plan.digest not in self._known:
            assert self._evaluator is not None
            self._known[plan.digest] = self._evaluator.evaluate(plan)
        return self._known[plan.digest]


def read_given(models: Sequence[str], checkpoint: str | None, pretrained: bool) -> list[Given]:
    """Read ``NAME[=FILE]`` of each model that is named.

    Raises:
        ConfigError: if a checkpoint belongs to no model, or one is named twice.
    """
    found = []
    for text in models:
        name, mark, file = text.partition("=")
        if not name or (mark and not file):
            raise ConfigError(f"--model must be NAME or NAME=FILE, but got {text!r:.80}")
        if name == DEMO_MODEL and mark:
            raise ConfigError(f"--model {DEMO_MODEL} has its own weights and takes no file")
        found.append(Given(name, file or None, bool(file) or pretrained or name == DEMO_MODEL))
    if checkpoint is not None:
        if len(found) != 1 or found[0].file or found[0].name == DEMO_MODEL:
            raise ConfigError(
                "--checkpoint must belong to one --model without a file of its own; with several, "
                "--model NAME=FILE names each with its weights"
            )
        found = [Given(found[0].name, checkpoint, True)]
    if len({(one.name, one.file) for one in found}) < len(found):
        raise ConfigError("--model must not name the same model and weights twice")
    if found and all(is_other(one) for one in found):
        raise ConfigError(
            f"--model must also name a Vision Transformer, but got {found[0].name} alone, which "
            "table 6 compares with one"
        )
    names = [one.name for one in found]
    return [
        dataclasses.replace(
            one,
            label=one.name
            if names.count(one.name) == 1
            else f"{one.name} ({Path(one.file).stem if one.file else 'timm'})",
        )
        for one in found
    ]


def is_other(given: Given) -> bool:
    """Whether a given model is one of table 6 that has no tokens."""
    return architecture(given.name) in OTHERS.values()


def architecture(name: str) -> str:
    """The timm name without the tag of its weights."""
    return name.split(".")[0]


def load_subject(
    given: Given, values: dict[str, Any], count: int, say: Callable[[str], None]
) -> Subject:
    """Make a given model and read its images as it wants them.

    Args:
        given: its name and weights.
        values: options of a :class:`TuneConfig` that all models share.
        count: of images that plans are judged on, at most.
        say: is told what was skipped.

    Raises:
        DsmTuneError: if model, weights or images cannot be used.
    """
    has_images = values.get("images") is not None or given.name == DEMO_MODEL
    shared = {"budget_gflops": "100%", **values}
    if not has_images:
        shared["images"] = os.curdir  # a configuration has images; GMACs need none
    if given.name == DEMO_MODEL:
        shared["pretrained"] = False
    config = TuneConfig(**{**shared, "model": given.name, "checkpoint": given.file})
    if not has_images:
        return Subject(given, config, None, load_model(config), count)
    inputs = load_inputs(config)
    for line in inputs.skipped:
        say(f"skipped {line}")
    return Subject(given, config, inputs, inputs.model, count)
