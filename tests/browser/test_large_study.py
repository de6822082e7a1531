"""A study of 500 trials in real Chromium: its page opens, and its figures can be read."""

from __future__ import annotations

import re
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reviewing"))

import pytest
import stored_study as stored
from chromium import Browser
from pages import DRAWN, FIRST_OF_FRONT, command, file_of, front, serving

from dsm_tune.answer import Answer
from dsm_tune.searching.study import Study

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
TRIALS = 500


@pytest.fixture(scope="module")
def study(page: Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """Searched for real, evaluated by a formula, written by ``dsm-tune sync``."""
    folder = tmp_path_factory.mktemp("large")
    made = stored.make(f"sqlite:///{folder}/dsm_tune.db", "large", trials=TRIALS)
    sync = command("sync", "large", cwd=folder)
    assert sync.wait(timeout=500) == 0, sync.communicate()
    sync.communicate()
    return folder, made


@pytest.fixture(scope="module")
def ui(study: tuple[Path, Study]) -> Iterator[str]:
    with serving("large", study[0]) as address:
        yield address


def test_the_page_of_500_trials_opens_and_filters_its_front(
    page: Browser, ui: str, study: tuple[Path, Study], pictures: Path
) -> None:
    page.open(ui)
    text = page.wait_for("What next", "dsm-tune resume large", "chosen", "Finished")
    assert "A merged plan meets the budget" in text
    (experiment,) = re.findall(r"#/experiments/(\d+)/", page.run("return location.href"))
    query = urllib.parse.quote("tags.pareto = 'true'")
    page.open(f"{ui.partition('#')[0]}#/experiments/{experiment}/runs?searchFilter={query}")
    page.wait_for("matching runs")
    page.click(".ag-row button[data-component-id*=runname]")
    names = front(study[0])
    assert len(names) == len(Answer.of(study[1]).front())
    page.wait_for(*(name.split(" GMACs")[0] for name in names))
    page.picture(pictures / "large_front_runs.png")


def test_the_figure_of_500_trials_draws_each_plan_and_answers_the_mouse(
    page: Browser, study: tuple[Path, Study], pictures: Path
) -> None:
    folder, made = study
    with page.offline():
        page.open(file_of(folder, "pareto.html"))
        page.wait_for("chosen plan", "ToMe, fitted to the budget", "front (held-out images)")
        drawn = page.wait_until(DRAWN, "no mark is drawn")
        answer = Answer.of(made)
        digests = {r.plan.digest for r in made.records() if r.state in ("complete", "pruned")}
        named = len(answer.front()) + 4  # dense, ToMe, DSM and the choice are drawn by name
        assert len(digests) > 300
        assert abs(drawn - len(digests)) <= named
        page.point_at(*page.run(FIRST_OF_FRONT))
        page.wait_until("return document.querySelector('#figure .hovertext')", "no words appear")
        words = page.run("return document.querySelector('#figure .hoverlayer').textContent")
        assert "trial" in words
        page.picture(pictures / "large_pareto.png")


def test_the_report_of_500_trials_is_one_page_of_readable_size(
    page: Browser, study: tuple[Path, Study], pictures: Path
) -> None:
    file = file_of(study[0], "report.html")
    with page.offline():
        page.open(file)
        text = page.wait_for("What tuning bought", "The front:", "Repeat it")
        assert len(text) < 20_000
        assert page.run("return [...document.images].every((one) => one.naturalWidth > 0)")
        wide = page.run("return document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, "the page is wider than its window"
        page.picture(pictures / "large_report.png")
    assert Path(urllib.parse.urlparse(file).path).stat().st_size < 3_000_000
