"""A Ray cluster of node processes on this machine, on ports of its own, killed at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import environment
from processes import alive, descendants
from servers import end, free_port, wait_until

NEEDED = ("aiohttp_cors", "grpc", "opencensus", "prometheus_client")  # of ray[default]
MEMORY = 100 << 20  # bytes, of each node's object store
ATTEMPTS = 4  # to start a node
HEAD = "head"


class RayNodes:
    """A head, which has no CPU, as in ``deploy/``, and nodes that join and leave.

    Attributes:
        folder: with Ray's logs.
        address: where drivers find the cluster.
        url: of the dashboard, where there is one.
        nodes: the processes by name, the head's included.
    """

    def __init__(self, folder: Path, *, with_dashboard: bool, **environ: str) -> None:
        self.folder, self._with_dashboard = folder, with_dashboard
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._variables = environment(
            PATH=programs, RAY_AUTH_MODE="disabled", RAY_worker_niceness="0", **environ
        )
        self._gcs, self._dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{self._gcs}"
        self.url = f"http://127.0.0.1:{self._dashboard}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start_head(self) -> None:
        """Start the node that the others join."""
        head = ["--head", "--port", f"{self._gcs}", "--num-cpus", "0"]
        head += ["--dashboard-port", f"{self._dashboard}", "--temp-dir", str(self.folder)]
        head += ["--include-dashboard", str(self._with_dashboard).lower()]
        if self._with_dashboard:  # ray[default] has Ray's client too
            head += ["--ray-client-server-port", f"{free_port()}"]
        self._start(HEAD, head)

    def join(self, name: str) -> None:
        """Start a node with one CPU and one unit of a resource of its own name."""
        resource = ["--num-cpus", "1", "--resources", f'{{"{name}": 1}}']
        self._start(name, ["--address", self.address, *resource])

    def kill(self, name: str) -> None:
        """End a node and all its processes, as if its machine had lost power."""
        node = self.nodes.pop(name)
        below = descendants(node.pid)
        end(node)
        for pid in alive(below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self, name: str, words: list[str]) -> None:
        """Start a node and wait for it; Ray gives it half a minute, a busy machine needs more."""
        common = ["--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"]
        common += ["--object-store-memory", f"{MEMORY}"]
        log = self.folder / f"{name}.log"
        for _ in range(ATTEMPTS):
            agent = ["--dashboard-agent-listen-port", f"{free_port()}"]
            with log.open("wb") as output:
                node = subprocess.Popen(
                    [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *agent, *common],
                    env=self._variables,
                    cwd=self.folder,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            self.nodes[name] = node
            wait_until(
                lambda: self._is_up(log) or node.poll() is not None,  # noqa: B023
                "a node does not join",
            )
            if node.poll() is None:
                return
            end(self.nodes.pop(name))
        raise AssertionError(log.read_text())

    def _is_up(self, log: Path) -> bool:
        if not self._with_dashboard:
            return "Ray runtime started." in log.read_text()
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"{self.url}/nodes?view=summary", timeout=5) as answer:
                summary = json.load(answer)["data"]["summary"]
            states = [one["raylet"].get("state") for one in summary]
            return states.count("ALIVE") >= len(self.nodes)
        return False


@contextlib.contextmanager
def ray_cluster(*names: str, with_dashboard: bool, **environ: str) -> Iterator[RayNodes]:
    """A head and a node of each name; all that are there at the end are killed."""
    folder = Path(tempfile.mkdtemp(prefix="dsm", dir="/tmp"))  # sockets have short names only
    cluster = RayNodes(folder, with_dashboard=with_dashboard, **environ)
    try:
        cluster.start_head()
        for name in names:
            cluster.join(name)
        yield cluster
    finally:
        for name in reversed(list(cluster.nodes)):
            cluster.kill(name)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_nodes(*resources: str, **environ: str) -> Iterator[tuple[str, Path]]:
    """A cluster with a job server; gives the dashboard's address and the folder of Ray's logs."""
    for name in NEEDED:
        pytest.importorskip(name, reason="needs ray[default]: pip install '.[cluster]'")
    with ray_cluster(*resources, with_dashboard=True, **environ) as cluster:
        yield cluster.url, cluster.folder
