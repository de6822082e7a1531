"""Real servers on loopback, in process groups of their own: PostgreSQL, MLflow, an object store."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120.0
BUCKET = "tuning"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def wait_until(done: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def end(process: subprocess.Popen[Any], number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    process.wait(timeout=60)


@dataclasses.dataclass(frozen=True)
class ObjectStore:
    """A bucket of an S3-compatible server, and who may use it.

    Attributes:
        endpoint: of the server.
        access_key, secret_key: made up for it.
    """

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environ(self) -> dict[str, str]:
        """What the MLflow server needs, and no one else."""
        return {
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )

    def objects(self) -> dict[str, int]:
        """Names and sizes of what the bucket holds."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", [])}


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """An S3-compatible server with an empty bucket, killed at the end."""
    for name in ("boto3", "moto"):
        pytest.importorskip(name, reason="needs an S3-compatible server: pip install 'moto[s3]'")
    port = free_port()
    with (folder / "objects.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", f"{port}"],
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    store = ObjectStore(
        f"http://127.0.0.1:{port}", secrets.token_hex(10).upper(), secrets.token_hex(20)
    )
    try:
        wait_until(
            lambda: answers(port) or process.poll() is not None, "the object store does not answer"
        )
        assert process.poll() is None, (folder / "objects.log").read_text()
        store.client().create_bucket(Bucket=BUCKET)
        yield store
    finally:
        end(process)


@contextlib.contextmanager
def mlflow_server(
    folder: Path, port: int, backend: str, objects: ObjectStore | None = None
) -> Iterator[str]:
    """An MLflow server on a backend, killed at the end; gives its address.

    It hands artifacts on to its own folder, or to an object store whose keys it alone has.
    """
    destination = str(folder / "artifacts") if objects is None else f"s3://{BUCKET}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", f"{port}", "--artifacts-destination", destination]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env={
                **os.environ,
                **({} if objects is None else objects.environ),
                "MLFLOW_BACKEND_STORE_URI": backend,  # not an argument: it may hold a password
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "server.log").read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            return True
        return False

    try:
        wait_until(is_ready, "the MLflow server does not answer")
        yield uri
    finally:
        end(process)


def _postgres_programs() -> Path:
    """The folder of Debian's PostgreSQL, or of the one on the path; skips where there is none."""
    found = shutil.which("initdb")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places += [Path(found).parent] if found else []
    for place in places:
        if (place / "initdb").is_file() and (place / "postgres").is_file():
            return place
    pytest.skip("needs PostgreSQL (initdb, postgres), which is not installed here")


class Postgres:
    """A PostgreSQL server on loopback, which may be stopped and started again.

    Attributes:
        address: of its one, empty database, password included.
    """

    def __init__(self, folder: Path) -> None:
        """Make the files of a server in a folder of its own; skips where there is none."""
        self._programs = _postgres_programs()
        if importlib.util.find_spec("psycopg") is None:
            pytest.skip("needs psycopg, the driver of PostgreSQL: pip install 'psycopg[binary]'")
        self._folder, self._port, password = folder, free_port(), secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"postgresql://tuner:{password}@127.0.0.1:{self._port}/postgres"
        self._who: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            self._who = {"user": "nobody", "extra_groups": []}
        (folder / "password").write_text(password)
        for path in (folder, folder / "password"):
            if self._who:
                shutil.chown(path, self._who["user"])
        make = ["-D", "data", "-U", "tuner", "-A", "scram-sha-256", "--no-sync", "-E", "UTF8"]
        subprocess.run(
            [self._programs / "initdb", *make, "--pwfile", "password"],
            cwd=folder,
            check=True,
            capture_output=True,
            **self._who,
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        run = ["-D", "data", "-h", "127.0.0.1", "-p", f"{self._port}", "-k", str(self._folder)]
        self._process = subprocess.Popen(
            [self._programs / "postgres", *run, "-F"],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **self._who,
        )
        wait_until(lambda: answers(self._port), "PostgreSQL does not answer")

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: at once with SIGINT, as after a crash with SIGQUIT."""
        if self._process is not None:
            end(self._process, number)
            self._process = None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server with an empty database; gives its address, password included."""
    with postgres_server() as server:
        yield server.address


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server with an empty database."""
    folder = Path(tempfile.mkdtemp())
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
