"""Model and images: what a tune starts from, and how both reach the workers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsm_tune import demo
from dsm_tune.config import TuneConfig
from dsm_tune.errors import ConfigError
from dsm_tune.measuring import images as folders
from dsm_tune.measuring.evaluate import BATCH_SIZE, Evaluator
from dsm_tune.measuring.images import ImageSet
from dsm_tune.measuring.memory import keep_freed_memory
from dsm_tune.measuring.quality import PerImage
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.loading import create_model
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.results import Evaluation

__all__ = [
    "CURVE_IMAGES",
    "Inputs",
    "Outputs",
    "Payload",
    "dense_batch",
    "judge",
    "load_inputs",
    "load_model",
    "make_evaluators",
    "reread",
    "try_plan",
]

Outputs = np.ndarray[Any, Any]  # [N, K] float32, of the dense model

CURVE_IMAGES = 64  # of the search images, for the similarity curve
MOST_IMAGES = 1024  # of a larger folder, a random sample of this many is used
DEMO_SEARCH = 150  # images of the demo's search split: it is to be quick
MOST_SEARCH = 256  # of these, for the search; the rest is held out


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Model and images of a tune.

    Attributes:
        model: on the CPU, in float32, in evaluation mode.
        geometry: of the model.
        search: images that trials see, in random order.
        holdout: images for the final figures, disjoint from these.
        skipped: images that could not be read, with the reason.
    """

    model: nn.Module
    geometry: Geometry
    search: ImageSet
    holdout: ImageSet
    skipped: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return self.search.labelled and self.holdout.labelled


@dataclasses.dataclass(frozen=True)
class Payload:
    """A model and one set of images, as they travel to a worker.

    Attributes:
        model: on the CPU.
        pixels: [N, 3, H, W] float32.
        labels: [N] int64.
        device, dtype: where and how it is evaluated.
    """

    model: nn.Module
    pixels: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    device: str
    dtype: str

    @classmethod
    def of(cls, model: nn.Module, images: ImageSet, device: str, dtype: str) -> Payload:
        """Pack a model and images."""
        return cls(model, images.pixels.numpy(), images.labels.numpy(), device, dtype)

    @property
    def batches(self) -> int:
        """How many batches the images make."""
        return -(-len(self.labels) // BATCH_SIZE)

    def size_of(self, batch: int) -> int:
        """How many images a batch holds."""
        return min(BATCH_SIZE, len(self.labels) - batch * BATCH_SIZE)

    def evaluator(self) -> Evaluator:
        """Unpack, in a worker: on one thread, so that its bits are the same anywhere."""
        if self.device == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
        model = self.model.to(self.device, getattr(torch, self.dtype))
        return Evaluator(model, torch.tensor(self.pixels), torch.tensor(self.labels))


def load_model(config: TuneConfig) -> nn.Module:
    """Make the model of a configuration, on the CPU, in evaluation mode.

    Raises:
        ModelError: if it cannot be made or its tokens cannot be merged.
    """
    if not isinstance(config.model, str):
        model = copy.deepcopy(config.model).cpu().float().eval()
    elif config.model == demo.MODEL_NAME:
        if config.checkpoint or config.pretrained or config.img_size or config.model_kwargs:
            raise ConfigError(
                "the embedded demo model takes no --checkpoint, --pretrained, --img-size or "
                "--model-kwargs; name a timm model with --model"
            )
        model = demo.create_model()
    else:
        model = create_model(
            config.model,
            checkpoint=config.checkpoint,
            pretrained=config.pretrained,
            img_size=config.img_size,
            model_kwargs=config.model_kwargs,
        )
    read_geometry(model)
    return model


def load_inputs(config: TuneConfig) -> Inputs:
    """Load model and images and part the images.

    Raises:
        ModelError: if the model cannot be used.
        ImagesError: if the images cannot.
    """
    model = load_model(config)
    skipped: tuple[str, ...] = ()
    if config.images is None:
        parts = (_demo_images("search"), _demo_images("holdout"))
    else:
        found, unread = folders.load_folder(
            config.images, model, limit=MOST_IMAGES, seed=config.seed
        )
        skipped = tuple(f"{item.name}: {item.reason}" for item in unread)
        parts = folders.split(found, max(len(found) - MOST_SEARCH, len(found) // 2), config.seed)
    search, holdout = (_shuffled(part, config.seed) for part in parts)
    if config.images is None:
        search = search.take(range(DEMO_SEARCH))
    return Inputs(model, read_geometry(model), search, holdout, skipped)


def reread(config: TuneConfig, names: Sequence[str], model: nn.Module) -> ImageSet:
    """Read images that :func:`load_inputs` found once more, as another model wants them.

    Raises:
        ImagesError: if the labels are not classes of that model.
    """
    found, _ = folders.load_folder(str(config.images), model, limit=MOST_IMAGES, seed=config.seed)
    rows = {name: row for row, name in enumerate(found.names)}
    return found.take([rows[name] for name in names])


def _demo_images(name: Any) -> ImageSet:
    pixels, labels = demo.load_split(name)
    return ImageSet(pixels, labels, tuple(f"digits/{name}/{i}" for i in range(len(labels))))


def _shuffled(images: ImageSet, seed: int) -> ImageSet:
    """In an order without meaning, so that the first few are a fair sample."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.take(order)


def make_evaluators(payloads: Sequence[Payload]) -> list[Evaluator]:
    """Unpack payloads: what a member of a crew keeps."""
    return [payload.evaluator() for payload in payloads]


def dense_batch(evaluators: list[Evaluator], where: tuple[int, int]) -> Outputs:
    """Outputs of the dense model for one (set, batch)."""
    outputs: Tensor = evaluators[where[0]].dense_batch(where[1])
    return outputs.float().numpy()


def judge(evaluators: list[Evaluator], plan: MergePlan, *, dense: Outputs) -> PerImage:
    """Compare a plan with dense on all images of the last set."""
    return _compare(evaluators[-1], plan, dense)


def try_plan(
    evaluators: list[Evaluator], plan: MergePlan, count: int, *, dense: Outputs
) -> Evaluation:
    """Evaluate a plan on the first images of the first set: a trial."""
    quality = _compare(evaluators[0], plan, dense, count).summary()
    return Evaluation(
        quality.images, quality.divergence, quality.agreement, quality.top1, quality.top5
    )


def _compare(
    evaluator: Evaluator, plan: MergePlan, dense: Outputs, count: int | None = None
) -> PerImage:
    evaluator.know_dense(torch.tensor(dense))
    return evaluator.evaluate(plan, count)
