"""One process at a time runs a study: two would ask for the same trials and count them twice.

The lock belongs to the process: however that ends, nobody has to remove it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import filelock
import sqlalchemy
from sqlalchemy.pool import NullPool

__all__ = ["Lock", "lock_of"]


class Lock(Protocol):
    """What at most one process holds."""

    def take(self) -> bool:
        """Take it; returns whether that was possible."""

    def renew(self) -> None:
        """Take it again if it was lost with its connection, and if that is possible."""

    def drop(self) -> None:
        """Let others take it."""


def lock_of(address: sqlalchemy.URL, name: str, connect_args: Mapping[str, Any]) -> Lock | None:
    """The lock of a study.

    Args:
        address: of its store.
        name: of the study.
        connect_args: of the database's driver.

    Returns:
        A lock that is not taken; ``None`` for a kind of database that has none here.
    """
    digest = hashlib.sha256(f"dsm-tune study {name}".encode()).digest()
    if address.get_backend_name() == "sqlite":
        return FileLock(Path(f"{address.database}.{digest[:4].hex()}.lock"))
    if address.get_backend_name() == "postgresql":
        return AdvisoryLock(address, int.from_bytes(digest[:8], signed=True), connect_args)
    return None


class FileLock:
    """A file beside the database; the operating system frees it when the process has ended.

    Args:
        path: of the file, which is there while the lock is held.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(path, timeout=0)

    def take(self) -> bool:
        """Take it; returns whether that was possible.

        Raises:
            OSError: if the file cannot be made.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout:
            return False
        return True

    def renew(self) -> None:
        """Nothing: it is not lost."""

    def drop(self) -> None:
        """Let others take it; the file is removed."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)  # who waits for this file sees that, and makes another
        self._lock.release()


class AdvisoryLock:
    """PostgreSQL's advisory lock; the server frees it when the connection has ended.

    Args:
        address: of the database.
        key: of the lock, 64 bits with a sign.
        connect_args: of the database's driver.
    """

    def __init__(self, address: sqlalchemy.URL, key: int, connect_args: Mapping[str, Any]) -> None:
        self._engine = sqlalchemy.create_engine(
            address,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",  # no transaction stays open
            connect_args=dict(connect_args),
        )
        self._key = key
        self._connection: sqlalchemy.Connection | None = None

    def take(self) -> bool:
        """Take it; returns whether that was possible.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: if the server does not answer.
        """
        with contextlib.ExitStack() as closes:
            connection = closes.enter_context(self._engine.connect())
            if self._asks(connection, "pg_try_advisory_lock(:key)", key=self._key):
                closes.pop_all()  # it is held as long as the connection is open
                self._connection = connection
            return self._connection is not None

    def renew(self) -> None:
        """Take it again if the connection was lost.

        While the server has not noticed that, it holds the lock for the lost connection: then it is
        left so.
        """
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
            if self._connection is not None and self._asks(self._connection, "true"):
                return
        self.drop()
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
            self.take()

    def drop(self) -> None:
        """Let others take it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
                connection.close()

    @staticmethod
    def _asks(connection: sqlalchemy.Connection, question: str, **values: Any) -> bool:
        return bool(connection.scalar(sqlalchemy.text(f"select {question}"), values))
