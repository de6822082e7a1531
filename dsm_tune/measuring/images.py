"""Calibration images: a folder becomes one tensor, read through the model's own transform."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from dsm_tune.errors import ImagesError, ModelError
from dsm_tune.measuring.labels import read_labels, shown

__all__ = ["ImageSet", "Skipped", "input_size", "load_folder", "load_image", "photograph", "split"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # never more: Pillow would run Ghostscript for EPS
FEWEST = 4
MOST_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
MOST_ASPECT = 32  # a resize of the short side would make a long strip enormous


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images that are decoded once and shared by all trials.

    Attributes:
        pixels: ``[N, 3, H, W]`` float32, normalised as the model wants it.
        labels: ``[N]`` int64, -1 where unlabelled.
        names: ``N`` paths relative to the folder, posix.

    Raises:
        ImagesError: if shapes or dtypes are others.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        pixels, labels, count = self.pixels, self.labels, len(self.names)
        if pixels.ndim != 4 or pixels.shape[:2] != (count, 3) or pixels.dtype != torch.float32:
            raise ImagesError(
                f"pixels must be float32 of shape [{count}, 3, H, W] for {count} names, "
                f"but got {pixels.dtype} of shape {list(pixels.shape)}"
            )
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ImagesError(
                f"labels must be int64 of shape [{count}] for {count} names, "
                f"but got {labels.dtype} of shape {list(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of names, labels and pixels."""
        head = json.dumps([self.names, self.labels.tolist(), list(self.pixels.shape)])
        digest = hashlib.sha256(head.encode())
        for image in self.pixels:
            digest.update(image.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return bool((self.labels >= 0).all())

    def take(self, index: Sequence[int] | Tensor) -> ImageSet:
        """Return the images at ``index`` (integers, or a ``[N]`` bool mask), in that order.

        Raises:
            IndexError: for an index that is not below ``N``.
        """
        picked = index if isinstance(index, Tensor) else torch.tensor(index, dtype=torch.int64)
        rows = torch.arange(len(self))[picked.cpu()]
        names = tuple(self.names[row] for row in rows.tolist())
        return ImageSet(self.pixels[rows], self.labels[rows], names)


@dataclass(frozen=True)
class Skipped:
    """An image, or a whole sub-folder, that could not be read.

    Attributes:
        name: its path relative to the folder, posix.
        reason: why, in one line.
    """

    name: str
    reason: str


def load_folder(
    folder: Path | str,
    model: nn.Module,
    *,
    limit: int | None = None,
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> tuple[ImageSet, list[Skipped]]:
    """Read the images below a folder as the model wants them.

    Links are followed, each folder is entered once, hidden files and folders are passed over.
    The transform is timm's for the model, at the size of its ``patch_embed`` where that has one.
    As in timm, an image becomes RGB without regard to its transparency or EXIF orientation; unlike
    in timm, 16-bit grey is scaled rather than clipped.

    Args:
        folder: searched recursively for jpeg, png, webp and bmp.
        model: what the images are for; it is not run.
        limit: at most so many images, drawn at random before any is decoded; 4 or more. An
            unreadable image is replaced by another.
        class_names: of the checkpoint, in the order of their indices; see :func:`read_labels`.
        seed: of that draw.

    Returns:
        The images in the order of their names, and what was skipped in the same order.

    Raises:
        ImagesError: if the folder cannot be used, fewer than 4 images can be read, or the labels
            break a rule.
        ModelError: if the model does not take three channels.
    """
    if limit is not None and limit < FEWEST:
        raise ImagesError(f"limit must be at least {FEWEST}, but got {limit}")
    root = Path(folder)
    names, skipped = _find(root, str(folder))
    size, transform = _transform(model)
    classes = getattr(model, "num_classes", 0)
    labels = read_labels(root, names, classes if isinstance(classes, int) else 0, class_names)
    order = list(names)
    if limit is not None and limit < len(names):
        random.Random(seed).shuffle(order)
    pixels, kept, unreadable = _decode_all(root, order, _room(limit, len(names), size), transform)
    if len(kept) < FEWEST:
        raise ImagesError(
            f"an image folder must hold at least {FEWEST} readable images, but {shown(root)} holds "
            f"{len(names)}, of which {len(unreadable)} were skipped{_example(unreadable)}; "
            f"accepted are {', '.join(SUFFIXES)}"
        )
    of = dict(zip(names, labels, strict=True))
    found = ImageSet(pixels, torch.tensor([of[name] for name in kept]), tuple(kept))
    return found, sorted(skipped + unreadable, key=lambda item: item.name)


def load_image(file: Path | str, model: nn.Module) -> Tensor:
    """Read one image as the model wants it, as :func:`load_folder` does: [1, 3, H, W] float32.

    Raises:
        ImagesError: if it cannot be read.
        ModelError: if the model does not take three channels.
    """
    _, transform = _transform(model)
    with _strict_pillow():
        found = _decode(Path(), transform, str(file))
    if isinstance(found, str):
        raise ImagesError(f"an image must be readable, but {shown(str(file))}: {shown(found)}")
    return found.unsqueeze(0)


def input_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the images that a model takes."""
    return _transform(model)[0]


def photograph(pixels: Tensor, model: nn.Module) -> Tensor:
    """Undo a model's normalisation: [3, H, W] float32 to [H, W, 3], 0 to 1."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0)


def split(images: ImageSet, holdout: int | float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Part a set into images for the search and images that it never sees.

    Args:
        images: two or more.
        holdout: how many to hold out, from 1 to ``N - 1``; or, as a float, which share, between
            0 and 1, rounded to such a number.
        seed: of the draw, which depends on the names but not on their order.

    Returns:
        The search set and the held-out set, disjoint, each in the order of names.

    Raises:
        ImagesError: if either would be empty, or ``holdout`` is out of range.
    """
    total, count = len(images), holdout
    if isinstance(holdout, float) and 0 < holdout < 1:
        count = min(max(round(holdout * total), 1), total - 1)
    if isinstance(count, (bool, float)) or not 1 <= count < total:
        raise ImagesError(
            f"holdout must be an integer from 1 to {total - 1} or a share between 0 and 1 "
            f"of {total} images, but got {holdout}"
        )
    ranked = sorted(range(total), key=lambda row: images.names[row])
    held = set(random.Random(seed).sample(range(total), count))
    search = [row for rank, row in enumerate(ranked) if rank not in held]
    return images.take(search), images.take([ranked[rank] for rank in sorted(held)])


def _find(root: Path, given: str) -> tuple[list[str], list[Skipped]]:
    """List the images below a folder, sorted, and the sub-folders that cannot be listed."""
    if not given or not os.path.isdir(root):
        what = "is a file" if given and os.path.exists(root) else "does not exist"
        raise ImagesError(f"an image folder must be a folder, but {shown(given)!r} {what}")
    names: list[str] = []
    barred: list[OSError] = []
    entered: set[str] = set()
    others = 0
    for here, folders, files in os.walk(root, onerror=barred.append, followlinks=True):
        if (real := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in files if _is_image(name)]
        others += len(files) - len(images)
        names += [(Path(here) / name).relative_to(root).as_posix() for name in images]
    skipped = [
        Skipped(Path(error.filename).relative_to(root).as_posix(), str(error.strerror))
        for error in barred
    ]
    if not names:
        what = f"none of its {others} files is one" if others else "it is empty"
        raise ImagesError(
            f"an image folder must contain images, but {shown(root)} has none: {what}"
            f"{_example(skipped)}; accepted are {', '.join(SUFFIXES)}"
        )
    return sorted(names), skipped


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _example(skipped: Sequence[Skipped]) -> str:
    return f" ({shown(skipped[0].name)}: {shown(skipped[0].reason)})" if skipped else ""


def _transform(model: nn.Module) -> tuple[tuple[int, int], Callable[[Image.Image], Tensor]]:
    """Return the height and width that the model takes, and what makes an image so."""
    embed = getattr(model, "patch_embed", None)
    channels = getattr(getattr(embed, "proj", None), "in_channels", 3)
    if channels != 3:
        raise ModelError(f"a model must take images of 3 channels, but this one takes {channels}")
    size = getattr(embed, "img_size", None)
    size = (size, size) if isinstance(size, int) else size
    config = resolve_model_data_config(model, {"input_size": (3, *size) if size else None})
    transform: Callable[[Image.Image], Tensor] = create_transform(**config, is_training=False)
    _, height, width = config["input_size"]
    return (height, width), transform


def _room(limit: int | None, found: int, size: tuple[int, int]) -> Tensor:
    count = found if limit is None else min(limit, found)
    try:
        return torch.empty(count, 3, *size)
    except RuntimeError:
        gib = count * 12 * size[0] * size[1] / 2**30
        raise ImagesError(
            f"images must fit in memory, but {count} of {size[0]} x {size[1]} pixels take "
            f"{gib:.0f} GiB; a lower limit is accepted"
        ) from None


def _decode_all(
    root: Path, order: Sequence[str], room: Tensor, transform: Callable[[Image.Image], Tensor]
) -> tuple[Tensor, list[str], list[Skipped]]:
    """Fill ``room`` with the first readable images of ``order``; return them sorted by name."""
    kept: list[str] = []
    skipped: list[Skipped] = []
    waiting = iter(order)
    decode = partial(_decode, root, transform)
    with _strict_pillow(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while batch := sorted(itertools.islice(waiting, len(room) - len(kept))):
            for name, image in zip(batch, pool.map(decode, batch), strict=True):
                if isinstance(image, str):
                    skipped.append(Skipped(name, image))
                else:
                    room[len(kept)] = image
                    kept.append(name)
    rows = sorted(range(len(kept)), key=kept.__getitem__)
    pixels = room if rows == list(range(len(room))) else room[rows]
    return pixels, sorted(kept), skipped


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Make Pillow refuse truncated files, and keep its warnings to itself, in all threads."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _decode(root: Path, transform: Callable[[Image.Image], Tensor], name: str) -> Tensor | str:
    """Return the transformed image, or the reason why there is none."""
    path = root / name
    if not path.is_file():
        return "not a file, or a broken link"
    try:
        if not path.stat().st_size:
            return "empty file"
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                return f"{width} x {height} pixels; at most {MOST_PIXELS} are accepted"
            if max(width, height) > MOST_ASPECT * min(width, height):
                return f"{width} x {height} pixels; sides up to {MOST_ASPECT}:1 are accepted"
            rgb = _rgb(image)
    except UnidentifiedImageError:
        return f"not an image of the formats {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        return f"too many pixels; at most {MOST_PIXELS} are accepted"
    except Exception as error:  # decoders raise anything on a damaged file
        return shown(error) or type(error).__name__
    return transform(rgb)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit PNG: "I;16", in older Pillow "I"
        image = image.point(lambda value: value / 257)
    return image.convert("RGB")
