"""The processes of this machine, by what the system knows of them."""

from __future__ import annotations

import contextlib
from pathlib import Path


def descendants(pid: int) -> set[int]:
    """The processes below one."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                fresh = {int(word) for word in task.read_text().split()} - found
                found |= fresh
                waiting += fresh
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of them that have not ended."""
    living = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            living |= {pid} if state not in "ZX" else set()
    return living


def title(pid: int) -> str:
    """What a process calls itself; empty once it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""
