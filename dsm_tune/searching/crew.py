"""Processes on Ray: a session, a crew that keeps what it has made, a process for one call alone."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.util import ActorPool

from dsm_tune.errors import ConfigError, first_line
from dsm_tune.searching.worker import Member

__all__ = ["Cluster", "Crew", "connected", "most_cpus", "run_alone"]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the jobs run.

    Attributes:
        address: of a running Ray cluster; ``None`` starts one here, for this search alone.
        workers: jobs at a time.
        gpus_per_worker: may be a fraction.
        trial_seconds: limit of one evaluation; a worker that exceeds it is ended.
    """

    address: str | None = None
    workers: int = 2
    gpus_per_worker: float = 0.0
    trial_seconds: float = 600.0


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """A Ray session: the given cluster, or a local one that ends with the block.

    Raises:
        ConfigError: if the cluster cannot be reached.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is in the study
    if cluster.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token at home
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the search ends itself, see _interrupts
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # leave CUDA_VISIBLE_DEVICES alone
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 spoils every timing
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address is None:
        options.update(
            address="local",
            num_cpus=max(cluster.workers, 1),
            include_dashboard=False,
            object_store_memory=_store_bytes(),
        )
    else:
        options["address"] = cluster.address
    try:
        _answers(cluster.address)
        ray.init(**options)
    except Exception as error:  # Ray raises many kinds: refused, timed out, another version
        where = cluster.address or "this machine"
        raise ConfigError(
            f"--ray-address must be a Ray cluster that answers: {where}: {first_line(error)}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _answers(address: str | None) -> None:
    """Raise if nothing listens at ``host:port``: Ray itself would try for many minutes."""
    host, separator, port = (address or "").split("://")[-1].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()


def _store_bytes() -> int:
    """Shared memory for images and weights: what half of /dev/shm gives, 4 GiB at most."""
    with contextlib.suppress(OSError):
        room = os.statvfs("/dev/shm")
        return max(128 << 20, min(4 << 30, room.f_bavail * room.f_frsize // 2))
    return 1 << 30


def run_alone(function: Callable[..., Any], *arguments: Any, cpus: int, gpus: float = 0.0) -> Any:
    """Call a function in a fresh process, with no trial running beside it; returns its result."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    alone = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1)(call)
    return ray.get(alone.remote(*arguments))


def most_cpus() -> int:
    """CPUs of the node of the cluster that has most; at least 1."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max([1, *(int(resources.get("CPU", 0)) for resources in nodes)])


class Crew:
    """Processes that keep what they have made between calls, in trials and beside them.

    Args:
        make: called once in each process; pickled by Ray.
        cluster: how many processes, and their share of a GPU.
    """

    def __init__(self, make: Callable[[], Any], cluster: Cluster) -> None:
        self.cluster = cluster
        self.make = [ray.put(make)]  # a list, which Ray does not unpack
        self._members: list[Any] = []

    def members(self) -> list[Any]:
        """Handles of the processes; they are started at the first call."""
        if not self._members:
            # No CPU is reserved: Ray Tune's workers reserve them, and wait meanwhile.
            member = ray.remote(
                num_cpus=0,
                num_gpus=self.cluster.gpus_per_worker,
                max_restarts=-1,
                scheduling_strategy="SPREAD",
            )(Member)
            self._members = [member.remote() for _ in range(self.cluster.workers)]
        return self._members

    def map(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> list[Any]:
        """Call ``function(made, item)`` for each item; results in order."""
        pool = ActorPool(self.members())
        return list(
            pool.map(lambda actor, item: actor.call.remote(self.make, function, item), items)
        )

    def rest(self) -> None:
        """End the processes, and with them their hold on GPUs; the next call starts them anew."""
        for member in self._members:
            ray.kill(member)
        self._members = []
