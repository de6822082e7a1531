"""The engine on a real, local Ray: the same trials as in one process, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_search as small
from evaluations import ask, make, make_nothing
from ray.exceptions import RayActorError, WorkerCrashedError

from dsm_tune.errors import ConfigError
from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation
from dsm_tune.searching import engine
from dsm_tune.searching.crew import Cluster, Crew, connected, run_alone
from dsm_tune.searching.engine import run_search
from dsm_tune.searching.search import Search
from dsm_tune.searching.study import Study
from dsm_tune.searching.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


def run(search: Search, made: Any, cluster: Cluster, **options: Any) -> None:
    run_search(search, Crew(made, cluster), ask, **options)


def in_process(tmp_path: Path, evaluate: small.Evaluate = small.evaluate) -> Search:
    return small.drive(small.open_search(f"sqlite:///{tmp_path}/in_process.db"), evaluate)


def counted(calls: Path) -> dict[tuple[str, int], int]:
    """How often each (digest, images) was evaluated."""
    found: dict[tuple[str, int], int] = {}
    for file in calls.iterdir():
        digest, images = file.name.split("-")[:2]
        found[digest, int(images)] = found.get((digest, int(images)), 0) + 1
    return found


def processes(calls: Path) -> set[str]:
    return {file.name.split("-")[2] for file in calls.iterdir()}


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_trials_are_those_of_one_process_on_workers_that_stay_warm(
    workers: int, cluster: Cluster, url: str, calls: Path, tmp_path: Path
) -> None:
    search = small.open_search(url)
    here = dataclasses.replace(cluster, workers=workers)
    run(search, partial(make, calls, {}, 0.02), here)
    expected = in_process(tmp_path)
    assert small.story(search) == small.story(expected)
    assert small.front(search) == small.front(expected)
    assert search.finished
    assert not search.stopped
    assert set(counted(calls).values()) == {1}
    assert len(processes(calls)) == workers  # the same ones in every generation
    for generation in range(3):
        plans = {r.plan.digest for r in search.records() if r.generation == generation}
        busy = {file.name.split("-")[2] for file in calls.iterdir() if file.name[:16] in plans}
        assert busy == processes(calls)
    assert str(os.getpid()) not in processes(calls)
    assert all(e.seconds > 0.01 for r in search.records() for e in r.evaluations.values())


CAUSES = {
    "error": "RuntimeError: it went wrong",
    "memory": "MemoryError: ",
    "hangs": "TimeoutError: it took longer than 6 s",
    "killed": "its worker died 3 times",
}


@pytest.mark.parametrize(
    "often",
    [
        # A time-out is the trial's own fault; a killed worker is not, at first.
        {"error": 1, "memory": 1, "hangs": 1, "killed once": 2},
        pytest.param({"killed": 3}, marks=pytest.mark.slow),
        pytest.param({"dies afterwards": 1}, marks=pytest.mark.slow),  # with the next job begun
    ],
    ids=lambda often: " and ".join(often),
)
def test_a_fault_costs_its_own_trial_at_most_and_is_kept_with_its_cause(
    often: dict[str, int], cluster: Cluster, url: str, calls: Path, tmp_path: Path
) -> None:
    search = small.open_search(url)
    digests = [r.plan.digest for r in search.records()][1:]  # dense itself is well
    faults = dict(zip(digests, often, strict=False))
    run(search, partial(make, calls, faults), dataclasses.replace(cluster, trial_seconds=6))

    def evaluate(plan: MergePlan, images: int) -> Evaluation:
        cause = CAUSES.get(faults.get(plan.digest, ""))
        return Evaluation(images, error=cause) if cause else small.evaluate(plan, images)

    expected = in_process(tmp_path, evaluate)
    assert small.story(search) == small.story(expected)
    assert small.front(search) == small.front(expected)
    assert len(search.records()) == 14
    times = counted(calls)
    tried = {digest: max(n for (d, _), n in times.items() if d == digest) for digest in faults}
    assert {faults[digest]: count for digest, count in tried.items()} == often
    noted = Study.load(url, "small").facts.get("faults", {}).get("worker", {"count": 0})
    assert noted["count"] >= sum(count - 1 for count in times.values())


def test_an_evaluator_that_cannot_be_made_fails_each_trial_with_its_cause(
    cluster: Cluster, url: str
) -> None:
    search = small.open_search(url, trials=5)
    run(search, make_nothing, cluster)
    assert {(r.state, r.why) for r in search.records()} == {
        ("failed", "OSError: no such model here")
    }


def test_a_deadline_ends_early_and_keeps_what_was_done(
    cluster: Cluster, url: str, calls: Path, tmp_path: Path
) -> None:
    search = small.open_search(url)
    ended = lambda: len(list(calls.iterdir())) >= 8  # noqa: E731
    run(search, partial(make, calls, {}, 0.05), cluster, deadline=ended)
    assert search.stopped == "time limit reached"
    assert search.finished
    done = sum(len(r.evaluations) for r in search.records())
    assert 8 <= done < 20
    assert done == len(counted(calls))
    resumed = small.drive(small.open_search(url))
    assert small.story(resumed) == small.story(in_process(tmp_path))


def test_a_finished_search_starts_nothing(cluster: Cluster, url: str, calls: Path) -> None:
    search = small.drive(small.open_search(url))
    run(search, partial(make, calls, {}), cluster)
    assert list(calls.iterdir()) == []


@pytest.mark.parametrize(
    "where",
    [
        "store",
        pytest.param("close", marks=pytest.mark.slow),
        pytest.param("add", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_the_search_itself_is_raised(
    where: str,
    cluster: Cluster,
    url: str,
    calls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = small.open_search(url)
    original, count = getattr(Study, where), [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise OSError("disk full")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Study, where, failing)
        with pytest.raises(OSError, match="disk full"):
            run(search, partial(make, calls, {}), cluster)
    resumed = small.drive(small.open_search(url))
    assert small.story(resumed) == small.story(in_process(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_ends_after_what_runs_and_twice_at_once(
    times: int, cluster: Cluster, url: str, calls: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def interrupt(progress: Any) -> None:
        seen.append(progress)
        for _ in range(times if len(seen) == 3 else 0):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    search = small.open_search(url, on_progress=interrupt)
    if times == 1:
        run(search, partial(make, calls, {}), cluster)
        assert search.stopped == "interrupted"
    else:
        with pytest.raises(KeyboardInterrupt) as caught:
            run(search, partial(make, calls, {}), cluster)
        del caught
        gc.collect()  # with the traceback go the last references to the workers
    assert signal.getsignal(signal.SIGINT) == before
    resumed = small.drive(small.open_search(url))
    assert small.story(resumed) == small.story(in_process(tmp_path))


@pytest.mark.slow
def test_a_search_runs_outside_the_main_thread_too(cluster: Cluster, url: str, calls: Path) -> None:
    search = small.open_search(url, trials=3)
    thread = threading.Thread(target=run, args=(search, partial(make, calls, {}), cluster))
    thread.start()
    thread.join(60)
    assert {r.state for r in search.records()} == {"complete"}


def process_and_sum(*numbers: int) -> tuple[int, int]:
    return os.getpid(), sum(numbers)


def test_what_runs_alone_runs_in_a_fresh_process(cluster: Cluster) -> None:
    alone = partial(run_alone, process_and_sum, cpus=2)
    (one, total), (other, _) = alone(1, 2), alone(3)
    assert total == 3
    assert len({one, other, os.getpid()}) == 3


def test_a_crew_keeps_what_it_has_made_gives_results_in_order_and_raises_errors(
    cluster: Cluster,
) -> None:
    crew = Crew(os.getpid, cluster)
    first = crew.map(lambda made, item: (made, os.getpid(), item), range(8))
    assert [item for _, _, item in first] == list(range(8))
    assert all(made == here for made, here, _ in first)
    again = crew.map(lambda made, item: made, range(8))
    assert set(again) <= {made for made, _, _ in first}
    assert len({made for made, _, _ in first}) <= 2
    with pytest.raises(ZeroDivisionError):
        crew.map(lambda made, item: 1 / item, [1, 0])
    crew.rest()
    anew = crew.map(lambda made, item: made, range(8))
    assert not set(anew) & {made for made, _, _ in first}


def die_at_first(made: Any, item: tuple[Path, int]) -> int:
    folder, deaths = item
    number = len(list(folder.glob("death-*")))
    if number < deaths:
        (folder / f"death-{number}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return deaths


def test_what_a_crew_was_doing_when_a_process_died_is_done_again_twice_and_told(
    cluster: Cluster, calls: Path
) -> None:
    told: list[str] = []
    crew = Crew(os.getpid, dataclasses.replace(cluster, on_death=told.append))
    assert crew.map(die_at_first, [(calls, 2), (calls, 0)]) == [2, 0]
    assert told == 2 * ["images under a model"]
    with pytest.raises(RayActorError):
        crew.map(die_at_first, [(calls, 5)])
    assert len(told) == 4


def test_what_runs_alone_is_done_again_if_its_process_dies_twice_and_told(
    cluster: Cluster, calls: Path
) -> None:
    told: list[str] = []
    alone = partial(run_alone, die_at_first, None, cpus=2, on_death=told.append)
    assert alone((calls, 1)) == 1
    assert told == ["what is timed alone"]
    with pytest.raises(WorkerCrashedError):
        alone((calls, 5))
    assert len(told) == 3


def test_a_session_that_is_open_already_is_used_and_left_open(cluster: Cluster) -> None:
    import ray

    with connected(Cluster(address="ray://nowhere:1")):
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_search_with_an_error(
    cluster: Cluster, url: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unable(Worker):
        def setup(self, *arguments: Any, **options: Any) -> None:
            raise ImportError("another Python")

    monkeypatch.setattr(engine, "Worker", Unable)
    with pytest.raises(ConfigError, match="5 workers in a row have died before their first trial"):
        run(small.open_search(url), partial(make, calls, {}), cluster)
    resumed = small.drive(small.open_search(url))
    assert small.story(resumed) == small.story(in_process(tmp_path))


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_refused_in_one_line() -> None:
    import subprocess
    import sys

    code = (
        "from dsm_tune.searching.crew import Cluster, connected\n"
        "from dsm_tune.errors import ConfigError\n"
        "try:\n"
        "    connected(Cluster(address='127.0.0.1:1')).__enter__()\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--ray-address must be a Ray cluster that answers: 127.0.0.1:1:")
    assert done.stdout.count("\n") == 1
