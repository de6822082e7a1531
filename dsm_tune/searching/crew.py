"""Processes on Ray: a session, a crew that keeps what it has made, a process for one call alone."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dsm_tune.errors import ConfigError, first_line
from dsm_tune.searching.worker import Member, wait_for

__all__ = [
    "RERUNS",
    "Cluster",
    "Crew",
    "connected",
    "roomiest",
    "run_alone",
    "timing_node",
]

RERUNS = 2  # of what was being done in a process that died


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the jobs run.

    Attributes:
        address: of a running Ray cluster; ``None`` starts one here, for this search alone.
        workers: jobs at a time.
        gpus_per_worker: may be a fraction.
        trial_seconds: limit of one evaluation; a worker that exceeds it is ended.
        on_death: is told, in a few words, what is done again because its process has died.
    """

    address: str | None = None
    workers: int = 2
    gpus_per_worker: float = 0.0
    trial_seconds: float = 600.0
    on_death: Callable[[str], None] = lambda what: None


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


def run_alone(
    function: Callable[..., Any],
    *arguments: Any,
    cpus: int,
    gpus: float = 0.0,
    node: str = "",
    on_death: Callable[[str], None] = lambda what: None,
) -> Any:
    """Call a function in a fresh process, with no trial running beside it; returns its result.

    Args:
        function: pickled by Ray.
        arguments: of it.
        cpus, gpus: that it has for itself; of CPUs no more than its node has.
        node: where it runs while that is there, see :func:`timing_node`.
        on_death: is told if it is called again because its process has died.
    """

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    for attempt in range(RERUNS + 1):
        here, target = None, timing_node(gpus, node)
        if target is not None:  # another one than before may have fewer CPUs
            cpus = min(cpus, target[1])
            here = NodeAffinitySchedulingStrategy(target[0], soft=True)
        alone = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0, scheduling_strategy=here
        )(call)
        try:
            return ray.get(alone.remote(*arguments))
        except (WorkerCrashedError, NodeDiedError):
            if attempt == RERUNS:
                raise
            on_death("what is timed alone")
    raise AssertionError("returned or raised by then")


def timing_node(gpus: float = 0.0, before: str = "") -> tuple[str, int] | None:
    """Id and CPUs of the node on which plans are timed; ``None`` where no node has CPUs.

    It is the driver's, if that has any. A cluster's head often offers none, and its driver no more
    than asks: then it is the one where they were timed before, so that a profile and what it is
    compared with are of one machine, and at first the one with most CPUs.

    Args:
        gpus: that the node must have.
        before: id of the node where they were timed before.
    """
    able = {node: cpus for node, (cpus, more) in _cpus_by_node().items() if more >= gpus}
    here = ray.get_runtime_context().get_node_id()
    best = min(able, key=lambda id: (id != here, id != before, -able[id], id), default=None)
    return None if best is None else (best, int(able[best]))


def _cpus_by_node() -> dict[str, tuple[float, float]]:
    """CPUs and GPUs of each node that has a CPU, by its id."""
    found = {}
    for node in ray.nodes():
        cpus, gpus = (node["Resources"].get(name, 0.0) for name in ("CPU", "GPU"))
        if node["Alive"] and cpus >= 1:
            found[str(node["NodeID"])] = cpus, gpus
    return found


def roomiest(
    nodes: Mapping[str, tuple[float, float]], others: Sequence[str], gpus: float, home: str
) -> str:
    """The node on which a member of a crew has most room; where it is, if that is one of them.

    Args:
        nodes: CPUs and GPUs of each node, by its id.
        others: the nodes of the other members.
        gpus: that each member holds; a node whose GPUs are held by others has no room.
        home: the node that it is on.

    Returns:
        The node with fewest members for its CPUs; ``home`` where none has room.
    """
    count = Counter(others)
    return min(
        (id for id, (_, more) in nodes.items() if (count[id] + 1) * gpus <= more + 1e-6),
        key=lambda id: ((count[id] + 1) / nodes[id][0], id != home, id),
        default=home,
    )


@dataclasses.dataclass(eq=False)
class _Hired:
    """A member of a crew, as Ray has it.

    Attributes:
        handle: asks it.
        name: in Ray.
        home: the node that it was started on, then the one that it has said it is on.
        said: reference to what it will say of that.
    """

    handle: Any
    name: str
    home: str
    said: Any

    def hear(self) -> None:
        """Note where it is, if it has said so by now, and ask again."""
        if ray.wait([self.said], timeout=0)[0]:
            with contextlib.suppress(RayActorError):  # it is being started anew
                self.home = ray.get(self.said)
            self.said = self.handle.home.remote()


class Crew:
    """Processes that keep what they have made between calls, in trials and beside them.

    Args:
        make: called once in each process; pickled by Ray.
        cluster: how many processes, and their share of a GPU.
    """

    def __init__(self, make: Callable[[], Any], cluster: Cluster) -> None:
        self.cluster = cluster
        self.make = [ray.put(make)]  # a list, which Ray does not unpack
        self._hired: list[_Hired] = []

    def members(self) -> list[Any]:
        """Handles of the processes; they are started at the first call, evenly over the nodes."""
        while len(self._hired) < self.cluster.workers:
            self._hired.append(self._hire(self._best_home(self._hired, "")))
        return [one.handle for one in self._hired]

    def settle(self, index: int) -> str:
        """Move an idle member to where there is more room for it; returns its name in Ray.

        A node may have joined, and its own may have left: Ray has started it anew on some other.
        Or Ray did not know the wanted node yet, and has started it elsewhere at once.
        """
        member = self._hired[index]
        member.hear()
        best = self._best_home([one for one in self._hired if one is not member], member.home)
        if best != member.home:
            ray.kill(member.handle)
            member = self._hired[index] = self._hire(best)
        return member.name

    def _hire(self, home: str) -> _Hired:
        where = NodeAffinitySchedulingStrategy(home, soft=True) if home else "SPREAD"
        name = f"dsm-tune-{uuid.uuid4().hex}"
        # No CPU is reserved: Ray Tune's workers reserve them, and wait meanwhile.
        member = ray.remote(
            name=name,
            num_cpus=0,
            num_gpus=self.cluster.gpus_per_worker,
            max_restarts=-1,
            scheduling_strategy=where,
        )(Member)
        handle = member.remote()
        return _Hired(handle, name, home, handle.home.remote())

    def _best_home(self, others: Sequence[_Hired], home: str) -> str:
        homes = [one.home for one in others]
        return roomiest(_cpus_by_node(), homes, self.cluster.gpus_per_worker, home)

    def map(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> list[Any]:
        """Call ``function(made, item)`` for each item; results in order.

        What a process was doing when it died is done again, twice at most.
        """
        idle, waiting = deque(self.members()), deque(enumerate(items))
        running: dict[Any, tuple[int, Any, Any]] = {}
        found: dict[int, Any] = {}
        deaths: dict[int, int] = {}
        while waiting or running:
            while waiting and idle:
                (index, item), member = waiting.popleft(), idle.popleft()
                asked = member.call.remote(self.make, function, item)
                running[asked] = index, item, member
            (done, *_), _ = ray.wait(list(running))
            index, item, member = running.pop(done)
            try:
                found[index] = ray.get(done)
            except RayActorError:
                deaths[index] = deaths.get(index, 0) + 1
                if deaths[index] > RERUNS:
                    raise
                wait_for(member)
                self.cluster.on_death("images under a model")
                waiting.appendleft((index, item))
            idle.append(member)
        return [found[index] for index in range(len(items))]

    def rest(self) -> None:
        """End the processes, and with them their hold on GPUs; the next call starts them anew."""
        for member in self._hired:
            ray.kill(member.handle)
        self._hired = []
