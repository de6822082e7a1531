"""What a person sees: the pages of ``dsm-tune ui`` and the files of a study, in real Chromium."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser
from pages import DRAWN, FIRST_OF_FRONT, command, file_of, front, serving

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
TUNE = ("--budget-gflops", "60%", "--trials", "16", "--study", "digits")


@pytest.fixture(scope="module")
def folder(page: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo has been tuned."""
    made = tmp_path_factory.mktemp("demo")
    tune = command(*TUNE, cwd=made)
    assert tune.wait(timeout=500) == 0, tune.communicate()
    tune.communicate()
    return made


@pytest.fixture(scope="module")
def ui(folder: Path) -> Iterator[str]:
    with serving("digits", folder) as address:
        yield address


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
        assert len(widths) >= 4
        assert widths.count(1200) == len(widths) - 1  # but for the merged tokens
        assert 0 not in widths
        assert page.complaints() == []
        wide = page.run("return document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, "the page is wider than its window"
        page.picture(pictures / "report.png")
