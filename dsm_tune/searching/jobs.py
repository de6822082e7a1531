"""Jobs of a Ray cluster, through its job server: submitted, found again, followed.

A job is a process on the cluster. It outlives whoever asked for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from dsm_tune.errors import ConfigError, first_line

__all__ = ["Job", "JobServer"]

STUDY = "dsm_tune.study"  # metadata of a job: what it works on
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray lets these win over what it is given
A_LITTLE = 1e-3  # of a resource: says where a job runs, and reserves next to nothing
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # with a server that has stopped answering


@dataclasses.dataclass(frozen=True)
class Job:
    """A job as the cluster describes it.

    Attributes:
        id: by which Ray knows it.
        status: ``PENDING``, ``RUNNING``, ``STOPPED``, ``SUCCEEDED`` or ``FAILED``.
        exit_code: of its process, once that has ended by itself.
        message: of Ray, about its end.
    """

    id: str
    status: str
    exit_code: int | None = None
    message: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class JobServer:
    """The job server of a cluster.

    Args:
        address: of the dashboard: ``http://HOST:PORT``.

    Raises:
        ConfigError: if it does not answer, or is none.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient  # takes a second

        self.address = address
        with self._answering(), _unset(*ADDRESSES):
            self._client: Any = JobSubmissionClient(address)

    def find_running(self, study: str) -> Job | None:
        """The job that works on a study now, if there is one."""
        with self._answering():
            jobs = self._client.list_jobs()
        for found in jobs:
            job = _job(found)
            if (found.metadata or {}).get(STUDY) == study and job.id and not job.is_over:
                return job
        return None

    def submit(self, study: str, entrypoint: str, resource: str | None = None) -> str:
        """Have a command run on the cluster; returns the job's id.

        Args:
            study: that it works on.
            entrypoint: a line for the shell. Ray keeps and shows it in clear, as it does with the
                environment of a job: neither may hold a secret.
            resource: Ray resource of the node it shall run on; ``None`` for the head.
        """
        with self._answering():
            made: str = self._client.submit_job(
                entrypoint=entrypoint,
                metadata={STUDY: study},
                entrypoint_resources=None if resource is None else {resource: A_LITTLE},
            )
        return made

    def follow(self, job_id: str, say: Callable[[str], None]) -> Job:
        """Pass on a job's log, line by line, until it ends.

        A server that does not answer for a while is waited for.

        Args:
            job_id: of the job.
            say: takes a line.
        """
        seen, answered = 0, time.monotonic()
        while True:
            try:
                with self._answering():
                    job = _job(self._client.get_job_info(job_id))  # first: the log is whole then
                    log: str = self._client.get_job_logs(job_id)
                answered = time.monotonic()
            except ConfigError:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
                time.sleep(POLL_SECONDS)
                continue
            end = len(log) if job.is_over else log.rfind("\n") + 1
            for line in log[seen:end].splitlines():
                say(line)
            seen = max(seen, end)
            if job.is_over:
                return job
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn what Ray and its libraries raise into one line."""
        try:
            yield
        except Exception as error:  # ConnectionError, RuntimeError, of requests, of JSON …
            raise ConfigError(
                f"--ray-address must be the dashboard of a Ray cluster with a job server, such as "
                f"http://127.0.0.1:8265, but {self.address} gave: {first_line(error)}"
            ) from None


def _job(found: Any) -> Job:
    return Job(
        found.submission_id or "",
        str(getattr(found.status, "value", found.status)),
        found.driver_exit_code,
        found.message or "",
    )


@contextlib.contextmanager
def _unset(*names: str) -> Iterator[None]:
    """Hide variables of the environment."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
