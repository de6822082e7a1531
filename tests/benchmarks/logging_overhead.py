"""What MLflow costs the driver per trial: the calls themselves, and the time that a search loses.

Run ``python tests/benchmarks/logging_overhead.py``; exits with 1 above the bar. Evaluations are
pauses, as they happen in other processes; the same search runs without and with the writing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reviewing"))

import stored_study as stored

from dsm_tune.answer import Answer
from dsm_tune.config import TuneConfig
from dsm_tune.reviewing.outcome import artifacts, open_queue
from dsm_tune.searching.importance import parameter_importance
from dsm_tune.searching.search import Progress, Search

BAR_MS = 10.0


def run(
    folder: Path, name: str, trials: int, pause: float, on_progress: Callable[[Progress], None]
) -> tuple[Search, float, float]:
    """Search; return the seconds that it took, less the pauses, and the processor's of all."""
    search = stored.search(
        f"sqlite:///{folder}/study.db", name, trials=trials, on_progress=on_progress
    )
    paused, start, busy = 0.0, time.perf_counter(), time.process_time()
    while (job := search.next()) is not None:
        before = time.perf_counter()
        time.sleep(pause)
        paused += time.perf_counter() - before
        search.report(job, stored.evaluate(job.plan, job.images))
    return search, time.perf_counter() - start - paused, time.process_time() - busy


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of an evaluation")
    options = parser.parse_args()
    calls: list[float] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        search, alone, busy_alone = run(
            folder, "alone", options.trials, options.pause, lambda _: None
        )
        config = TuneConfig(model=stored.MODEL, images="/photographs", budget_gflops="57%")
        queue = open_queue(
            "alone", search.study.facts, f"sqlite:///{folder}/mlflow.db", config, print
        )
        queue.put(lambda runs: None)
        start = time.perf_counter()
        queue.drain(timeout=120)
        opening = time.perf_counter() - start
        answer = Answer.of(search.study)

        def on_progress(progress: Progress) -> None:
            start = time.perf_counter()
            queue.log_trial(answer.trial(progress.record))
            queue.log_progress(
                progress.done, progress.hypervolume, progress.best_divergence, progress.done
            )
            calls.append(1e3 * (time.perf_counter() - start))

        search, logged, busy_logged = run(
            folder, "logged", options.trials, options.pause, on_progress
        )
        start = time.perf_counter()
        queue.drain(timeout=600)
        behind = time.perf_counter() - start
        stored.confirm(search.study)
        start = time.perf_counter()
        answer = Answer.of(search.study)
        result = answer.result()
        files = artifacts(
            result, answer.trials(result.front), config, parameter_importance(search.study)
        )
        drawing = time.perf_counter() - start
        queue.close(timeout=60)
    per_call = statistics.mean(calls)
    lost = 1e3 * (logged - alone) / len(calls)
    print(
        f"{len(calls)} trials; per trial on the driver's path: {per_call:.2f} ms in the calls "
        f"(p95 {sorted(calls)[int(0.95 * len(calls))]:.2f} ms), {lost:.1f} ms lost by the search "
        f"in all, bar {BAR_MS:g} ms; processor time of the background thread "
        f"{1e3 * (busy_logged - busy_alone) / len(calls):.1f} ms"
    )
    print(f"once: {opening:.1f} s to import MLflow and make its store, beside the search")
    print(f"MLflow was {behind:.1f} s behind at the end; figures and report took {drawing:.1f} s")
    print("; ".join(f"{name} {len(data) / 1e3:.0f} kB" for name, data in files.items()))
    return int(max(per_call, lost) > BAR_MS)


if __name__ == "__main__":
    sys.exit(main())
