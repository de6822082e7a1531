"""``dsm-tune doctor``: whether what a tune needs is there; nothing is written."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dsm_tune.errors import DsmTuneError, first_line
from dsm_tune.versions import project, version

__all__ = ["Check", "check_cluster", "check_database", "check_mlflow", "diagnose"]

SECONDS = 5.0  # to wait for something on the network
LEAST_SHM = 256 << 20  # bytes of shared memory that Ray wants for its objects


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``warning`` (a tune works all the same) or ``failed``.
        detail: what was found; for a failure, what is accepted.
    """

    name: str
    status: str
    detail: str


def diagnose(
    storage: str | None, tracking_uri: str | None, ray_address: str | None
) -> Iterator[Check]:
    """Look at everything that a tune with these options needs."""
    yield Check("dsm-tune", "ok", version())
    is_new = sys.version_info >= (3, 11)
    python = f"{platform.python_version()} at {sys.executable}"
    yield Check("Python", "ok" if is_new else "failed", python + ("" if is_new else "; >= 3.11"))
    yield from _libraries()
    yield from _devices()
    yield _shared_memory()
    yield _study_store(storage)
    yield check_mlflow(tracking_uri)
    yield check_cluster(ray_address or os.environ.get("RAY_ADDRESS") or None)


# -- libraries ------------------------------------------------------------------------------------


def _requirements() -> list[str]:
    try:
        found = metadata.requires("dsm-tune") or []
    except metadata.PackageNotFoundError:
        listed = project().get("dependencies", [])
        found = [str(one) for one in listed] if isinstance(listed, list) else []
    return [line for line in found if "extra ==" not in line]


def _libraries() -> Iterator[Check]:
    for line in _requirements():
        name = re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0]
        bounds = re.findall(r"(>=|<)\s*([\d.]+)", line)
        accepted = ", ".join(f"{sign} {bound}" for sign, bound in sorted(bounds, reverse=True))
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(
                name, "failed", f"is not installed; accepted is {accepted or 'any version'}"
            )
            continue
        fits = all((_numbers(found) >= _numbers(bound)) == (sign == ">=") for sign, bound in bounds)
        yield Check(
            name, "ok" if fits else "failed", found if fits else f"{found}; accepted is {accepted}"
        )


def _numbers(text: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


# -- machine --------------------------------------------------------------------------------------


def _devices() -> Iterator[Check]:
    yield Check("CPU", "ok", f"{os.cpu_count()} cores, {platform.machine()}")
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        yield Check("devices", "failed", f"torch cannot be imported: {first_line(error)}")
        return
    if not torch.cuda.is_available():
        yield Check("CUDA", "ok", "none; a tune runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            room = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Check(f"cuda:{index}", "ok", room)
        except RuntimeError as error:
            yield Check(f"cuda:{index}", "failed", first_line(error))


def _shared_memory() -> Check:
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return Check("shared memory", "warning", "no /dev/shm; Ray will use slower files")
    free = room.f_bavail * room.f_frsize
    text = f"{free / 2**30:.1f} GiB free in /dev/shm"
    if free < LEAST_SHM:
        return Check("shared memory", "warning", f"{text}; Ray will use slower files")
    return Check("shared memory", "ok", text)


# -- stores ---------------------------------------------------------------------------------------


def _study_store(url: str | None) -> Check:
    from dsm_tune.config import absolute_storage

    return check_database("study store", absolute_storage(url, Path.cwd()))


def check_mlflow(uri: str | None) -> Check:
    """Look whether the tracking store answers."""
    from dsm_tune.reviewing.stores import redact, resolve_tracking_uri

    try:
        address = resolve_tracking_uri(uri, Path.cwd())
    except DsmTuneError as error:
        return Check("MLflow store", "failed", str(error))
    if not address.startswith(("http://", "https://")):
        return check_database("MLflow store", address)
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=SECONDS):
            return Check("MLflow store", "ok", redact(address))
    except (OSError, ValueError) as error:
        return Check(
            "MLflow store", "failed", f"{redact(address)} does not answer: {first_line(error)}"
        )


def check_database(name: str, url: str) -> Check:
    """Look whether a database can be reached, and an SQLite file read, written or made."""
    import sqlalchemy

    from dsm_tune.reviewing.stores import redact

    try:
        address = sqlalchemy.engine.make_url(url)
        if address.get_backend_name() == "sqlite":
            return _sqlite(name, Path(address.database or ""), redact(url))
        engine = sqlalchemy.create_engine(address)
        try:
            engine.connect().close()
        finally:
            engine.dispose()
    except Exception as error:  # each driver has its own
        return Check(
            name, "failed", f"{redact(url)} must be reachable, but: {redact(first_line(error))}"
        )
    return Check(name, "ok", redact(url))


def _sqlite(name: str, file: Path, url: str) -> Check:
    import sqlite3

    folder = file.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # has no name where the system can do that
            pass
    except OSError as error:
        return Check(name, "failed", f"{url}: its folder must be writable, but: {error.strerror}")
    if not file.exists():
        return Check(name, "ok", f"{url}, not there yet; it will be made")
    try:
        connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=SECONDS)
        try:
            connection.execute("select count(*) from sqlite_master").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Check(name, "failed", f"{url} must be an SQLite database, but: {first_line(error)}")
    if not os.access(file, os.W_OK):
        return Check(name, "failed", f"{url} must be writable")
    return Check(name, "ok", url)


def check_cluster(address: str | None) -> Check:
    """Look whether a cluster answers; Ray itself would try for minutes."""
    if address in (None, "local", "auto"):
        found = "a running one is looked for" if address == "auto" else "a local one is started"
        return Check("Ray", "ok", f"{found} for each tune")
    if str(address).startswith(("http://", "https://")):
        return Check("Ray", "failed", f"{address} is a dashboard; `dsm-tune submit` takes those")
    host, mark, port = str(address).removeprefix("ray://").rpartition(":")
    if not mark or not port.isdigit():
        return Check("Ray", "failed", f"--ray-address must be HOST:PORT, but got {address!r:.80}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except (OSError, OverflowError) as error:
        return Check("Ray", "failed", f"{address} does not answer: {first_line(error)}")
    return Check("Ray", "ok", f"{address} answers")
