"""Faults at drawn moments change no result: at least twenty of them, in studies that run for real.

The seed is printed, and taken from the environment: see :mod:`schedule`.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import answer, environment, run
from disturbed import Tune
from ray_nodes import HEAD, ray_cluster
from schedule import SEED, Fault, chosen_seed, draw, draw_jumps
from servers import free_port, postgres_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TRIALS = 28
SEARCH_SEED = "3"
WORDS = ("--budget-gflops", "60%", "--trials", f"{TRIALS}", "--seed", SEARCH_SEED, "--workers", "2")
CLUSTER = {  # studies on a cluster with a database server, and no MLflow at all
    "one": {"worker": 4, "database": 1},
    "two": {"node": 3, "database": 1},
    "three": {"driver": 3, "worker": 1, "node": 1, "database": 1},
}
HEADS = {"head": 1}
DISK = {"full disk": 2, "file limit": 2, "driver": 2}
JUMPS = 4  # of the clock
DEAD_MLFLOW = 1  # per study on the cluster


@pytest.fixture(scope="module")
def seed() -> int:
    found = chosen_seed()
    print(f"\nseed of the faults: {SEED}={found}")
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tune:
    """The same study, left alone on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tune = Tune(folder, f"sqlite:///{folder}/studies.db", WORDS)
    with tune.running():
        ended = tune.end()
    assert ended.code == 0, ended
    assert ended.json["faults"] == []
    return tune


def document(tune: Tune) -> Any:
    shown = run("show", "faulty", "--storage", tune.storage, "--json", cwd=tune.folder)
    assert shown.code == 0, shown
    return shown.json


def check_same(tune: Tune, undisturbed: Tune) -> dict[str, int]:
    """Nothing is lost, doubled or changed; returns how often ``show`` names each kind of fault."""
    ended = tune.end()
    assert ended.code == 0, ended
    return check_stored(tune, undisturbed)


def check_stored(tune: Tune, undisturbed: Tune) -> dict[str, int]:
    shown = document(tune)
    assert answer(shown) == answer(document(undisturbed))
    assert tune.numbers() == list(range(TRIALS))
    assert tune.evaluations().keys() == undisturbed.evaluations().keys()
    for fault in shown["faults"]:
        assert fault["count"] > 0
    assert tune.shown().out.count("\nfault: ") == len(shown["faults"])
    return {fault["kind"]: fault["count"] for fault in shown["faults"]}


@pytest.mark.parametrize("study", CLUSTER)
def test_workers_nodes_driver_database_and_mlflow_may_fail_at_any_moment(
    study: str, seed: int, undisturbed: Tune, tmp_path: Path
) -> None:
    faults = draw(seed, study, CLUSTER[study], len(undisturbed.evaluations()))
    print(f"\n{study}: {', '.join(map(str, faults))}")
    with postgres_server() as server, ray_cluster("left", "right", with_dashboard=False) as nodes:
        dead = f"http://127.0.0.1:{free_port()}"
        words = (*WORDS, "--ray-address", nodes.address, "--tracking-uri", dead)
        tune = Tune(tmp_path, server.address, words)
        with tune.running():
            tune.inject(
                faults,
                {
                    "worker": functools.partial(tune.kill_worker, nodes),
                    "node": functools.partial(tune.kill_node, nodes),
                    "driver": tune.kill_driver,
                    "database": functools.partial(tune.stop_database, server),
                },
            )
            seen = check_same(tune, undisturbed)
    asked = CLUSTER[study]
    deaths = seen.get("worker", 0) + seen.get("start", 0)
    assert deaths >= asked.get("worker", 0) + asked.get("node", 0)
    assert seen.get("driver", 0) == asked.get("driver", 0)
    assert seen["store"] >= asked["database"]
    assert seen["tracking"] >= DEAD_MLFLOW
    assert len(tune.injected) == len(faults)


def test_a_head_that_is_killed_ends_the_driver_and_another_cluster_goes_on(
    seed: int, undisturbed: Tune, tmp_path: Path
) -> None:
    (fault,) = draw(seed, "head", HEADS, len(undisturbed.evaluations()))
    print(f"\nhead: {fault}")
    tune = Tune(tmp_path, f"sqlite:///{tmp_path}/studies.db", WORDS)
    with (
        ray_cluster("left", "right", with_dashboard=False) as nodes,
        tune.running("--ray-address", nodes.address),
    ):
        tune.wait_for(fault.after)
        before = tune.evaluations()
        nodes.kill(HEAD)
        assert tune.end().code != 0
        assert "Failed to connect to GCS" in tune.said()
        assert "Traceback" not in tune.said()
        with ray_cluster("left", "right", with_dashboard=False) as others:
            tune.resume("--ray-address", others.address)
            assert check_same(tune, undisturbed) == {"driver": HEADS["head"]}
    assert before.items() <= tune.evaluations().items()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 8 MiB; skips where none may be mounted."""
    place = folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small file system, which is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_the_disk_of_the_store_may_be_full_for_a_while(
    seed: int, undisturbed: Tune, tmp_path: Path
) -> None:
    faults = draw(seed, "disk", DISK, len(undisturbed.evaluations()))
    print(f"\ndisk: {', '.join(map(str, faults))}")
    with small_disk(tmp_path) as disk:
        tune = Tune(tmp_path, f"sqlite:///{disk}/studies.db", WORDS)
        with tune.running():
            tune.inject(
                faults,
                {
                    "full disk": functools.partial(tune.fill, disk),
                    "file limit": functools.partial(tune.limit_files, disk),
                    "driver": tune.kill_driver,
                },
            )
            seen = check_same(tune, undisturbed)
    assert seen["store"] >= DISK["full disk"] + DISK["file limit"]
    assert seen["driver"] == DISK["driver"]
    assert len(tune.injected) == len(faults)


def test_a_clock_may_jump_by_a_month(seed: int, undisturbed: Tune, tmp_path: Path) -> None:
    jumps = draw_jumps(seed, JUMPS)
    print(f"\nclock: {', '.join(f'{s:+.0f} s at reading {n}' for n, s in jumps.items())}")
    tune = Tune(tmp_path, f"sqlite:///{tmp_path}/studies.db", ())
    program = Path(__file__).with_name("jumping.py")
    words = [tune.storage, str(TRIALS), SEARCH_SEED, *(f"{n}:{s}" for n, s in jumps.items())]
    done = subprocess.run(
        [sys.executable, program, *words],
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert int(done.stdout) == JUMPS
    assert check_stored(tune, undisturbed) == {"clock": JUMPS}
    assert 0 < document(tune)["seconds"] < 86_400


def test_at_least_twenty_faults_are_drawn_the_same_ones_from_the_same_seed(seed: int) -> None:
    drawn: list[Fault] = []
    for study, kinds in {**CLUSTER, "disk": DISK, "head": HEADS}.items():
        found = draw(seed, study, kinds, 40)
        assert found == draw(seed, study, kinds, 40)
        drawn += found
    assert len(drawn) + JUMPS + DEAD_MLFLOW * len(CLUSTER) >= 20
