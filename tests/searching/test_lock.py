"""One process at a time drives a study, and whoever has ended keeps nobody away."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from driving import driving

from dsm_tune.errors import StudyError
from dsm_tune.searching.study import Study


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/studies.db"
    for name in ("one", "../two"):
        Study.create(url, name, {})
    return url


def test_a_second_driver_is_refused_in_one_line_that_says_who_the_first_is(url: str) -> None:
    study = Study.load(url, "one")
    with driving(url, "one") as process, pytest.raises(StudyError) as caught, study.driven():
        pass
    assert str(caught.value) == (
        f"the study 'one' must be run by one process at a time, and process {process.pid} on "
        f"{socket.gethostname()} runs it now; accepted are its end, or another --study"
    )


def test_a_second_driver_in_the_same_process_is_refused_too(url: str) -> None:
    first, second = Study.load(url, "one"), Study.load(url, "one")
    here = f"process {os.getpid()} on"
    with first.driven(), pytest.raises(StudyError, match=here), second.driven():
        pass


def test_other_studies_of_the_store_are_driven_meanwhile_and_this_one_is_read(url: str) -> None:
    with driving(url, "one") as process, Study.load(url, "../two").driven():
        assert Study.load(url, "one").facts["driver"]["pid"] == process.pid


def test_a_driver_that_was_killed_keeps_nobody_away(url: str) -> None:
    with driving(url, "one") as process:
        process.kill()
        process.wait()
        with Study.load(url, "one").driven():
            assert Study.load(url, "one").facts["driver"]["pid"] == os.getpid()


def test_a_driver_that_has_ended_leaves_nothing_beside_the_store(url: str, tmp_path: Path) -> None:
    for _ in range(2):
        with Study.load(url, "one").driven():
            assert len(list(tmp_path.iterdir())) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["studies.db"]


def test_a_store_beside_which_nothing_can_be_written_is_refused_in_one_line(
    url: str, tmp_path: Path
) -> None:
    study = Study.load(url, "one")
    with study.driven():
        (lock,) = tmp_path.glob("*.lock")
    lock.mkdir()
    message = "the study store must be writable, but"
    with pytest.raises(StudyError, match=message) as caught, study.driven():
        pass
    assert "\n" not in str(caught.value)
