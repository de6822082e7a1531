"""Folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from dsm_tune.errors import ConfigError

__all__ = ["check_target", "holds_only", "written_whole"]

LONGEST_NAME = 240  # bytes, of what stands beside the folder until it is whole
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


def check_target(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a folder that must not be replaced.

    Args:
        folder: to be written.
        is_ours: whether a folder holds an export and nothing else.

    Raises:
        ConfigError: if it is a file, its parent is absent, or it holds other things.
    """
    if not os.path.isdir(folder.parent):
        raise ConfigError(f"--output must be in a folder that exists, but {folder.parent} does not")
    if len(os.fsencode(_prefix(folder))) > LONGEST_NAME:
        raise ConfigError(f"--output must have a shorter name, but got {folder.name!r:.60}")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"--output must be a folder, but {folder} is something else")
    if folder.is_dir() and (Path.cwd() == folder or folder in Path.cwd().parents):
        raise ConfigError(f"--output must not be the current folder or above it, but is {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise ConfigError(
            "--output must be new, empty or an earlier export of this kind and nothing else, "
            f"but {folder} holds other files"
        )


def holds_only(folder: Path, mark: str, names: Collection[str]) -> bool:
    """Whether a folder holds ``mark``, and regular files of some names alone beside it."""
    found = list(folder.iterdir())
    known = all(path.name in names and path.is_file() and not path.is_symlink() for path in found)
    return known and mark in {path.name for path in found}


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, which then stands in the place of ``folder``.

    Until then the old one stands there, whole, also if this process is killed.

    Raises:
        ConfigError: if it cannot be written.
    """
    fresh = folder.with_name(f"{_prefix(folder)}{os.getpid()}")
    try:
        _remove_abandoned(folder)
        fresh.mkdir()
        try:
            yield fresh
            _flush(fresh)
            _put_in_place(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"--output cannot be written: {folder}: {error.strerror}") from None


def _prefix(folder: Path) -> str:
    """How the name of an unfinished export begins; the number of its process follows."""
    host = re.sub(r"[^\w-]", "-", socket.gethostname())
    return f".{folder.name}.dsm_tune-export.{host}."


def _remove_abandoned(folder: Path) -> None:
    """Remove what an export of this machine that was killed has left beside ``folder``."""
    prefix = _prefix(folder)
    for left in folder.parent.iterdir():
        number = re.fullmatch(r"(\d+)(?:\.old)?", left.name.removeprefix(prefix))
        if left.name.startswith(prefix) and number and not _runs(int(number[1])):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True  # somebody else's
    except (OSError, OverflowError):
        return False
    return True


def _flush(folder: Path) -> None:
    """Have the disk hold every file before the folder takes its place."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(fresh, folder)
    elif not _exchange(fresh, folder):
        folder.rename(fresh.with_name(f"{fresh.name}.old"))  # no such call here: two steps
        os.rename(fresh, folder)
        shutil.rmtree(fresh.with_name(f"{fresh.name}.old"))


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the system can."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(call(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)
