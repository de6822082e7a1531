"""Labels of an image folder: from ``labels.csv`` in it, else from the names of its sub-folders."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from dsm_tune.errors import ImagesError

__all__ = ["LABELS_FILE", "UNLABELLED", "read_labels", "shown"]

LABELS_FILE = "labels.csv"
UNLABELLED = -1
_INDEX = re.compile(r"[0-9]{1,9}")
_INTEGER = re.compile(r"-?[0-9]{1,9}")


def read_labels(
    folder: Path, names: Sequence[str], classes: int, class_names: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return one label per image.

    With a ``labels.csv``, rows for files that are not in the folder are ignored and images
    without a row are unlabelled. Without one, the innermost sub-folder that names a class
    counts. All sub-folders are read in one way: as class names if any of them is one, else as
    class indices, else as WordNet ids of the ImageNet subset with as many classes.

    Args:
        folder: holds ``labels.csv``, if there is one.
        names: paths of the images relative to ``folder``, posix.
        classes: number of classes of the model; 0 if it has no head, then any index is accepted.
        class_names: names of the classes in the order of their indices; case does not matter, nor
            does ``_`` for a space.

    Returns:
        For each name an index from 0 to ``classes - 1``, or -1 where unlabelled.

    Raises:
        ImagesError: for a malformed ``labels.csv``, one that names none of the images, a label
            out of range, or a sub-folder that two classes share the name of.
    """
    path = folder / LABELS_FILE
    if os.path.lexists(path):
        return _from_csv(path, names, classes)
    return _from_folders(folder, names, classes, class_names)


def shown(value: object) -> str:
    """Return a text that fits into a one-line message: printable, at most 200 characters."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else text[:197] + "..."


def _accepted(classes: int) -> str:
    return f"from 0 to {classes - 1}" if classes else "from 0"


def _in_range(label: int, classes: int) -> bool:
    return label >= 0 and (not classes or label < classes)


def _from_csv(path: Path, names: Sequence[str], classes: int) -> tuple[int, ...]:
    labels: dict[str, int] = {}
    lines: dict[str, int] = {}
    for line, file, value in _rows(path):
        key = _key(file)
        if key in labels:
            raise ImagesError(
                f"a file must be labelled once, but {shown(path)}, line {line} labels "
                f"{shown(file)} again after line {lines[key]}"
            )
        if not _INTEGER.fullmatch(value) or not _in_range(int(value), classes):
            raise ImagesError(
                f"a label must be an integer {_accepted(classes)}, but got {shown(repr(value))} in "
                f"{shown(path)}, line {line}; leave the row out where a file has no label"
            )
        labels[key], lines[key] = int(value), line
    if labels and not any(_key(name) in labels for name in names):
        raise ImagesError(
            f"{shown(path)} must name images by their path relative to its folder, but it names "
            f"none of them; its first row is for {shown(next(iter(labels)))}, the first image is "
            f"{shown(names[0])}"
        )
    return tuple(labels.get(_key(name), UNLABELLED) for name in names)


def _key(file: str) -> str:
    """Spell a path in one way, whichever system wrote it."""
    return unicodedata.normalize("NFC", posixpath.normpath(file.replace("\\", "/")))


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, file and label of each row that is not blank."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        columns = [header.index(name) for name in ("file", "label") if header.count(name) == 1]
        if len(columns) != 2:
            raise ImagesError(
                f"{shown(path)} must begin with a header that has the columns file and label once, "
                f"but got {shown(','.join(header))!r}"
            )
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) <= max(columns) or not cells[columns[0]]:
                raise ImagesError(
                    f"each row of {shown(path)} must have a file and a label, "
                    f"but line {reader.line_num} is {shown(','.join(row))!r}"
                )
            yield reader.line_num, cells[columns[0]], cells[columns[1]]
    except csv.Error as error:
        raise ImagesError(
            f"{shown(path)} must be comma-separated text, "
            f"but line {reader.line_num} is not: {shown(error)}"
        ) from None


def _text(path: Path) -> str:
    if not path.is_file():
        raise ImagesError(f"{shown(path)} must be a file, but it is a folder or a broken link")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ImagesError(f"{shown(path)} must be readable, but: {shown(error.strerror)}") from None
    try:
        text = raw.decode("utf-8-sig")
        bad = raw.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        raise ImagesError(
            f"{shown(path)} must be UTF-8 text, but got the byte 0x{raw[bad]:02x} "
            f"in line {raw.count(bytes([10]), 0, bad) + 1}"
        )
    return text


def _from_folders(
    folder: Path, names: Sequence[str], classes: int, class_names: Sequence[str]
) -> tuple[int, ...]:
    paths = [name.split("/")[-2::-1] for name in names]  # innermost folder first
    folders = {part for path in paths for part in path}
    for scheme in (_named(class_names), _indexed(folder, paths, classes), _wordnet(classes)):
        found = {part: scheme(part) for part in sorted(folders)}
        if any(label is not None for label in found.values()):
            break
    else:
        return (UNLABELLED,) * len(names)
    for part, label in found.items():
        if label is not None and not _in_range(label, classes):
            raise ImagesError(
                f"a label must be an integer {_accepted(classes)}, but the sub-folder "
                f"{shown(part)} of {shown(folder)} stands for class {label}"
            )
    inner = ([label for part in path if (label := found[part]) is not None] for path in paths)
    return tuple(labels[0] if labels else UNLABELLED for labels in inner)


def _named(class_names: Sequence[str]) -> Callable[[str], int | None]:
    spelt = [name.casefold().replace("_", " ") for name in class_names]
    indices = {name: index for index, name in enumerate(spelt)}
    shared = {name for name, count in Counter(spelt).items() if count > 1}

    def scheme(part: str) -> int | None:
        name = part.casefold().replace("_", " ")
        if name in shared:
            raise ImagesError(
                f"a sub-folder must name one class, but {shown(part)} is the name of "
                f"{spelt.count(name)} classes; a {LABELS_FILE} can tell them apart"
            )
        return indices.get(name)

    return scheme


def _indexed(
    folder: Path, paths: Sequence[Sequence[str]], classes: int
) -> Callable[[str], int | None]:
    inner = {path[0] for path in paths if path}

    def scheme(part: str) -> int | None:
        if part not in inner or not _INDEX.fullmatch(part):
            return None
        if _in_range(int(part), classes):
            return int(part)
        if all(_INDEX.fullmatch(other) for other in inner):
            raise ImagesError(
                f"sub-folders that are numbers must be class indices {_accepted(classes)}, but "
                f"{shown(folder)} has {part}; a {LABELS_FILE} of nothing but the header file,label "
                "leaves all images unlabelled"
            )
        return None

    return scheme


def _wordnet(classes: int) -> Callable[[str], int | None]:
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return lambda _: None
    ids = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
    return ids.get
