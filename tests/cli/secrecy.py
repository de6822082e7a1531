"""Where a secret must not be: command lines of processes, texts, files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path


class CommandLines:
    """Notes the command lines of all processes of this machine while its block runs."""

    def __init__(self, seconds: float = 0.2) -> None:
        self.seen: set[str] = set()
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._seconds):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # the process has ended
                    self.seen.add(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))


def files_below(*folders: Path) -> dict[str, bytes]:
    """Contents of all regular files."""
    found = {}
    for folder in folders:
        for file in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                if file.is_file():
                    found[str(file)] = file.read_bytes()
    return found


def places_of(secret: str, texts: Iterable[tuple[str, str | bytes]]) -> list[str]:
    """Names of the texts that hold a secret."""
    assert secret
    wanted = secret.encode()
    return [
        name for name, text in texts if wanted in (text.encode() if isinstance(text, str) else text)
    ]
