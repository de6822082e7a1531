"""Where MLflow keeps its data: one absolute address, opened quietly, named without its secrets."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsm_tune.errors import StudyError

__all__ = ["connect", "find_experiment", "quietly", "redact", "resolve_tracking_uri", "unusable"]

SQLITE = "sqlite:///"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
KIND = {"mlflow.experimentKind": "custom_model_development"}  # which pages MLflow shows of it
LOGGERS = ("mlflow", "alembic")
# One attempt: a repeated request can create a run twice, and the queue repeats with care.
CALM = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def resolve_tracking_uri(
    uri: str | None, cwd: Path, *, environ: Mapping[str, str] = os.environ
) -> str:
    """Return the absolute address of the MLflow store, so that it means the same everywhere.

    Args:
        uri: as the user gave it; ``None`` for ``MLFLOW_TRACKING_URI`` or ``mlflow.db`` in ``cwd``.
        cwd: what a relative SQLite path is relative to.
        environ: the environment.

    Raises:
        StudyError: for a folder (MLflow dropped the file store), for an SQLite store in memory.
    """
    wanted = uri or environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    scheme = wanted.partition("://")[0].partition("+")[0].lower() if "://" in wanted else ""
    if scheme == "sqlite":
        dialect, _, rest = wanted.partition("://")
        path, mark, query = rest.removeprefix("/").partition("?")
        if not rest.startswith("/") or path in ("", ":memory:"):
            raise StudyError(
                f"the MLflow tracking URI must name a database file, but got {wanted!r}; "
                f"accepted is {SQLITE}PATH"
            )
        return f"{dialect}:///{Path(os.path.abspath(cwd / path))}{mark}{query}"
    if scheme in ("", "file") and wanted not in ("databricks", "databricks-uc", "uc"):
        path = wanted.removeprefix("file://").removeprefix("file:")
        database = Path(os.path.abspath(cwd / path)) / "mlflow.db"
        raise StudyError(
            f"the MLflow tracking URI must not be a folder, which MLflow no longer writes to, "
            f"but got {wanted!r}; accepted are {SQLITE}{database}, postgresql://… or http://…"
        )
    return wanted


def redact(text: str) -> str:
    """Return the text with ``***`` for the user names, passwords and tokens in its addresses."""
    text = re.sub(r"(?<=://)(?!/)\S*@", "***@", text)
    return re.sub(
        r"(?i)((?:password|passwd|token|secret|key|credentials?)=)[^&\s'\"]+", r"\1***", text
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep MLflow from printing and from waiting for minutes, and leave all as it was."""
    before = {name: os.environ.get(name) for name in CALM}
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name, value in CALM.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)


def connect(uri: str) -> Any:
    """Return an ``MlflowClient`` on the store, which is created if it is a database without tables.

    Args:
        uri: absolute, as :func:`resolve_tracking_uri` returns it.

    Raises:
        StudyError: if the store cannot be reached or read.
    """
    import mlflow.tracking

    try:
        with quietly(), _one_at_a_time(uri):
            if uri.partition("://")[0].partition("+")[0] in DATABASES:
                _touch_database(uri)
            return mlflow.tracking.MlflowClient(uri, uri)
    except Exception as error:  # MLflow lets the errors of SQLAlchemy, alembic and drivers through
        raise unusable(uri, error) from error


def unusable(uri: str, error: BaseException) -> StudyError:
    """Return the one-line error for a store that MLflow cannot use, without its secrets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = redact(f"{type(error).__name__}: {lines[0] if lines else ''}")[:200]  # in this order
    return StudyError(f"the MLflow store must be reachable, but {redact(uri)} gave {cause}")


def find_experiment(client: Any, name: str) -> str:
    """Return the id of the experiment of this name, which is created if there is none.

    The artifacts of an SQLite store go to a folder beside the database: MLflow's own default is
    the working directory of whoever runs.

    Raises:
        StudyError: if the experiment was deleted.
    """
    import mlflow.exceptions

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            folder = _artifacts(client.tracking_uri)
            return str(client.create_experiment(name, artifact_location=folder, tags=KIND))
        except mlflow.exceptions.MlflowException:
            found = client.get_experiment_by_name(name)  # another study was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise StudyError(
            f"the MLflow experiment must not be deleted, but {name!r} is; "
            f"accepted are another name or `mlflow experiments restore -x {found.experiment_id}`"
        )
    return str(found.experiment_id)


def _sqlite_path(uri: str) -> Path | None:
    dialect, _, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]) if dialect.startswith("sqlite") else None


def _artifacts(uri: str) -> str | None:
    database = _sqlite_path(uri)
    return None if database is None else (database.parent / "mlartifacts").as_uri()


def _touch_database(uri: str) -> None:
    """Fail at once where MLflow would try again for an hour."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Lock the folder of an SQLite store: two processes that create its tables would break it."""
    database = _sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    folder = os.open(database.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
