"""What a person sees: the pages of ``dsm-tune ui`` and the files of a study, in real Chromium.

The pictures are kept in the folder that ``DSM_TUNE_PICTURES`` names, else in pytest's.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, browser

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).resolve().parents[2]
STORES = ("OPTUNA_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS")
TUNE = ("--budget-gflops", "60%", "--trials", "16", "--study", "digits")
DRAWN = "return document.querySelectorAll('#figure .scatterlayer .points path').length"

FIRST_OF_FRONT = """
const figure = document.getElementById('figure');
const front = figure.data.find((one) => one.name.startsWith('front'));
const { xaxis, yaxis } = figure._fullLayout;
const box = figure.getBoundingClientRect();
return [
  box.x + xaxis._offset + xaxis.l2p(front.x[0]), box.y + yaxis._offset + yaxis.l2p(front.y[0])
];
"""


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key not in STORES}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-m", "dsm_tune", *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    """A window; before the tune, which is in vain where there is no Chromium."""
    with browser(width=1500, height=1400) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(page: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo has been tuned."""
    made = tmp_path_factory.mktemp("demo")
    tune = command(*TUNE, cwd=made)
    assert tune.wait(timeout=500) == 0, tune.communicate()
    tune.communicate()
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = os.environ.get("DSM_TUNE_PICTURES")
    return Path(wanted) if wanted else tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def ui(folder: Path) -> Iterator[str]:
    """The address that ``dsm-tune ui digits`` says: the page of the study's run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = command("ui", "digits", "--port", f"{port}", cwd=folder)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/#/runs/[0-9a-f]{32}", said)
        assert found, said
        yield found[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def file_of(folder: Path, name: str) -> str:
    (found,) = (folder / "mlartifacts").rglob(name)
    return found.as_uri()


def front(folder: Path) -> list[str]:
    """Names of the runs on the front, as they lie in MLflow's database."""
    database = sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)
    question = (
        "select name from runs join tags on tags.run_uuid = runs.run_uuid "
        "where tags.key = 'pareto' and tags.value = 'true'"
    )
    try:
        return [name for (name,) in database.execute(question)]
    finally:
        database.close()


def test_the_study_run_tells_the_answer_the_table_and_what_to_do_next(
    page: Browser, ui: str, pictures: Path
) -> None:
    page.open(ui)
    text = page.wait_for("What next", "dsm-tune resume digits", "chosen", "Finished")
    assert "A merged plan meets the budget of 0.0123 GMACs" in text
    assert re.search(r"ToMe\s+0\.0123\s", text), "the table is no table"
    assert "**" not in text
    assert "| ---" not in text
    page.run(
        "[...document.querySelectorAll('td')].find((cell) => cell.innerText == 'ToMe')"
        ".scrollIntoView({block: 'center'})"
    )
    assert len(page.picture(pictures / "study_run.png")) > 20_000


def test_its_children_are_filtered_by_the_front(
    page: Browser, ui: str, folder: Path, pictures: Path
) -> None:
    page.open(ui)
    page.wait_for("What next")
    (experiment,) = re.findall(r"#/experiments/(\d+)/", page.run("return location.href"))
    query = urllib.parse.quote("tags.pareto = 'true'")
    root = ui.partition("#")[0]
    page.open(f"{root}#/experiments/{experiment}/runs?searchFilter={query}")
    page.wait_for("matching runs")
    page.click(".ag-row button[data-component-id*=runname]")  # the study's children
    names = front(folder)
    assert names
    text = page.wait_for(*(name.split(" GMACs")[0] for name in names))
    assert f"{len(names) + 1} matching runs" in text  # the study's own stands above them
    page.picture(pictures / "front_runs.png")


def test_mlflow_shows_the_interactive_figure_in_its_frame(
    page: Browser, ui: str, pictures: Path
) -> None:
    page.open(ui)
    page.wait_for("What next")
    run = page.run("return location.href").rstrip("/")
    page.open(f"{run}/artifacts/pareto.html")
    page.wait_for("pareto.html", "trials.csv")
    page.wait_until("return !!document.querySelector('iframe')", "there is no frame")
    page.enter("iframe")
    try:
        page.wait_until(DRAWN, "no mark is drawn")
        page.wait_for("The chosen plan meets", "budget 0.0123 GMACs", "divergence (nats)")
    finally:
        page.leave()
    page.picture(pictures / "pareto_in_mlflow.png")


def test_the_interactive_figure_draws_with_the_network_off_and_tells_plan_and_run(
    page: Browser, folder: Path, pictures: Path
) -> None:
    page.complaints()
    with page.offline():
        page.open(file_of(folder, "pareto.html"))
        page.wait_for("chosen plan", "ToMe, fitted to the budget", "front (held-out images)")
        page.wait_until(DRAWN, "no mark is drawn")
        assert page.complaints() == []
        where = page.run(FIRST_OF_FRONT)
        page.point_at(*where)
        page.wait_until("return document.querySelector('#figure .hovertext')", "no words appear")
        words = page.run("return document.querySelector('#figure .hoverlayer').textContent")
        assert re.search(r"run [0-9a-f]{32}", words), words
        assert "trial" in words
        page.picture(pictures / "pareto.png")


def test_the_report_is_whole_with_the_network_off(
    page: Browser, folder: Path, pictures: Path
) -> None:
    page.complaints()
    with page.offline():
        page.open(file_of(folder, "report.html"))
        text = page.wait_for("What tuning bought", "The front:", "Repeat it")
        assert "A merged plan meets the budget of 0.0123 GMACs" in text
        widths = page.run("return [...document.images].map((one) => one.naturalWidth)")
        assert len(widths) >= 3
        assert set(widths) == {1200}
        assert page.complaints() == []
        wide = page.run("return document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, "the page is wider than its window"
        page.picture(pictures / "report.png")
