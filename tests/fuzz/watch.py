"""What reading a hostile file must never do: write, start, connect, run what it holds, or hang."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["watched"]

HANG_SECONDS = 60  # for what takes milliseconds; no bar on speed
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEVER = {
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.kill"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"),
    *("pickle.find_class", "ctypes.dlopen", "os.putenv", "shutil.rmtree", "builtins.input"),
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "shutil.move", "shutil.copyfile", "shutil.copytree"),
}
_watch: list[list[str]] = []  # what was seen, while something is watched


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch and (event in NEVER or (event == "open" and _writes(arguments))):
        _watch[-1].append(f"{event} {arguments!r:.200}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return bool((flags or 0) & WRITING)


sys.addaudithook(_hook)  # for the life of the process; it looks only while something is watched


def _hang(signum: int, frame: FrameType | None) -> None:
    raise AssertionError(f"it hangs: {HANG_SECONDS} s and more")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fail if the block writes, starts or reaches anything, unpickles code, or hangs."""
    seen: list[str] = []
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(HANG_SECONDS)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _watch.append(seen)
    try:
        yield
    finally:
        _watch.pop()
        sys.dont_write_bytecode = bytecode
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not seen, seen
