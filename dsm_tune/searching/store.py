"""The database that studies are stored in: opened, looked into, and waited for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage

from dsm_tune.errors import StudyError, first_line
from dsm_tune.searching.samplers import quietly

__all__ = ["connect_args", "open_store", "study_names"]

# Of a database's driver: how long it waits for a lock, to connect, and for a network that is cut.
CONNECT = {
    "sqlite": {"timeout": 60},
    "postgresql": {
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,  # milliseconds
    },
}


def open_store(url: str, *, create: bool) -> RDBStorage:
    """Open a store of studies.

    Args:
        url: of the database.
        create: whether its tables are made where there are none.

    Raises:
        StudyError: if it cannot be read and written, or holds no studies and none may be made;
            nothing is made.
    """
    try:
        address = sqlalchemy.engine.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise StudyError(
            "--storage must be a database URL such as sqlite:////tmp/dsm_tune.db, "
            f"but got {url!r:.80}"
        ) from None
    file = Path(address.database or "")
    is_local = address.get_backend_name() == "sqlite"
    if is_local and not create and not os.path.isfile(file):  # False for a name that is too long
        raise StudyError(f"there is no study store at {file}; `dsm-tune` makes one")
    try:
        if not create and not _has_studies(address):  # opening it would make its tables
            raise StudyError("it holds no studies; `dsm-tune` makes them")
        with quietly():
            return RDBStorage(url, engine_kwargs={"connect_args": connect_args(address)})
    except Exception as error:  # drivers raise their own kinds: unreachable, unwritable, malformed
        raise StudyError(
            f"the study store {address.render_as_string(hide_password=True)} must be readable and "
            f"writable, but: {first_line(error)}"
        ) from None


def study_names(url: str) -> list[str]:
    """Names of the studies in a store; none where there is no store."""
    try:
        with quietly():
            return sorted(optuna.get_all_study_names(open_store(url, create=False)))
    except StudyError:
        return []


def connect_args(address: sqlalchemy.URL) -> dict[str, Any]:
    """What a database's driver is given: how long it waits, and for what."""
    return dict(CONNECT.get(address.get_backend_name(), {}))


def _has_studies(address: sqlalchemy.URL) -> bool:
    engine = sqlalchemy.create_engine(address, connect_args=connect_args(address))
    try:
        return sqlalchemy.inspect(engine).has_table("studies")
    finally:
        engine.dispose()
