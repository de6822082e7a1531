"""``dsm-tune ui``: MLflow's own web page on the store of a study, for this machine only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dsm_tune.errors import ConfigError, StudyError
from dsm_tune.reviewing.stores import redact

__all__ = ["serve"]

WORKERS = ("--workers", "1")  # one person looks
NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes that have no task here
PATIENCE = 120.0  # seconds for MLflow to open its store and its port


def serve(
    uri: str, host: str, port: int, *, verbose: bool, say: Callable[[str], None], run_id: str = ""
) -> None:
    """Run the page until it is interrupted.

    Args:
        uri: absolute address of the MLflow store.
        host: to listen on.
        port: to listen on.
        verbose: let MLflow print.
        say: is told the address of the page.
        run_id: of the run whose page is meant; by default the list of experiments.

    Raises:
        StudyError: if there is no such store.
        ConfigError: if the port is taken, or MLflow does not start.
    """
    page = f"/#/runs/{run_id}" if run_id else ""
    if uri.startswith(("http://", "https://")):
        say(f"the MLflow UI is at {redact(uri)}{page}")
        return
    if (
        uri.startswith("sqlite:///")
        and not (file := Path(uri.removeprefix("sqlite:///"))).is_file()
    ):
        raise StudyError(f"there is no MLflow store at {file}; `dsm-tune` makes one")
    _claim(host, port)
    with tempfile.TemporaryFile("w+", errors="replace") as log, _sigterm_as_interrupt():
        output = None if verbose else log
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", f"{port}", *WORKERS],
            # In the environment, for it may hold a password, and everyone sees arguments.
            env={**NO_JOBS, **os.environ, "MLFLOW_BACKEND_STORE_URI": uri},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            if _wait_for_port(process, host, port):
                say(f"the MLflow UI is at http://{host}:{port}{page} (Ctrl-C ends it)")
            process.wait()
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            raise ConfigError(
                f"the MLflow UI must keep running, but ended with {process.returncode}"
                + (f": {redact(lines[-1])[:200]}" if lines else "")
            )
        except KeyboardInterrupt:
            return
        finally:
            _end(process)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host and --port must be free to listen on, but {host}:{port}: {why}; "
            "accepted is another --port"
        ) from None


def _wait_for_port(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=1).close()
            return True
        time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End MLflow and the servers that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return
