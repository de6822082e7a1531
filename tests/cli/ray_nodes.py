"""A Ray cluster of node processes on this machine, on ports of its own, killed at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import environment
from servers import end, free_port, wait_until

NEEDED = ("aiohttp_cors", "grpc", "opencensus", "prometheus_client")  # of ray[default]
MEMORY = 100 << 20  # bytes, of each node's object store
ATTEMPTS = 4  # to start a node


@contextlib.contextmanager
def ray_nodes(*resources: str, **environ: str) -> Iterator[tuple[str, Path]]:
    """Start a head and a node for each of the named resources.

    Gives the dashboard's address, and the folder with Ray's logs.

    Each node has one CPU and one unit of its resource; the head has none, as in ``deploy/``.
    """
    for name in NEEDED:
        pytest.importorskip(name, reason="needs ray[default]: pip install '.[cluster]'")
    folder = Path(tempfile.mkdtemp(prefix="dsm", dir="/tmp"))  # sockets have short names only
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    variables = environment(
        PATH=programs, RAY_AUTH_MODE="disabled", RAY_worker_niceness="0", **environ
    )
    gcs, dashboard = free_port(), free_port()
    common = ["--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"]
    common += ["--object-store-memory", f"{MEMORY}"]
    head = ["--head", "--port", f"{gcs}", "--dashboard-port", f"{dashboard}", "--num-cpus", "0"]
    head += ["--include-dashboard", "true", "--temp-dir", str(folder)]
    head += ["--ray-client-server-port", f"{free_port()}"]
    nodes = [
        ["--address", f"127.0.0.1:{gcs}", "--num-cpus", "1", "--resources", f'{{"{name}": 1}}']
        for name in resources
    ]
    started: list[subprocess.Popen[bytes]] = []
    url = f"http://127.0.0.1:{dashboard}"

    def start(words: list[str]) -> None:
        """Start a node and wait for it; Ray gives it half a minute, a busy machine needs more."""
        for _ in range(ATTEMPTS):
            agent = ["--dashboard-agent-listen-port", f"{free_port()}"]
            with (folder / "nodes.log").open("ab") as log:
                node = subprocess.Popen(
                    [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *agent, *common],
                    env=variables,
                    cwd=folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            started.append(node)
            wait_until(lambda: is_up() or node.poll() is not None, "a node does not join")  # noqa: B023
            if node.poll() is None:
                return
            end(started.pop())
        raise AssertionError((folder / "nodes.log").read_text())

    def is_up() -> bool:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"{url}/nodes?view=summary", timeout=5) as answer:
                summary = json.load(answer)["data"]["summary"]
            states = [one["raylet"].get("state") for one in summary]
            return states.count("ALIVE") >= len(started)
        return False

    try:
        start(head)
        for words in nodes:
            start(words)
        yield url, folder
    finally:
        for one in reversed(started):
            end(one)
        shutil.rmtree(folder, ignore_errors=True)
