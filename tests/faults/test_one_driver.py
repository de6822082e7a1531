"""One process at a time drives a study that is in PostgreSQL, whatever happens to the server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from driving import driving
from servers import Postgres, postgres_server

from dsm_tune.errors import StudyError
from dsm_tune.searching.patience import Patience
from dsm_tune.searching.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres_server() as server:
        for name in ("one", "two"):
            close(Study.create(server.address, name, {}))
        yield server


def close(study: Study) -> None:
    """Close the connections that Optuna keeps, of which psycopg would warn."""
    study._storage.remove_session()
    study._storage.engine.dispose()


@contextlib.contextmanager
def opened(server: Postgres, name: str = "one") -> Iterator[Study]:
    study = Study.load(server.address, name)
    try:
        yield study
    finally:
        close(study)


def is_driven(server: Postgres, name: str = "one") -> bool:
    """Whether a process is refused that wants to drive a study."""
    try:
        with opened(server, name) as study, study.driven():
            return False
    except StudyError as error:
        assert "must be run by one process at a time" in str(error)
        return True


def test_a_second_driver_is_refused_until_the_first_has_ended(server: Postgres) -> None:
    with driving(server.address, "one") as process:
        assert is_driven(server)
        assert not is_driven(server, "two")
        process.communicate()  # its standard input ends, and so does it
        assert not is_driven(server)


def test_a_driver_that_was_killed_keeps_nobody_away(server: Postgres) -> None:
    with driving(server.address, "one") as process:
        process.kill()
        process.wait()
        assert not is_driven(server)


def test_a_driver_is_the_only_one_also_after_the_server_was_away(server: Postgres) -> None:
    with opened(server) as study:
        study.patience = Patience()
        with study.driven():
            server.stop()
            server.start()
            study.put("any", "value")
            assert is_driven(server)
    assert not is_driven(server)
