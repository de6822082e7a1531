"""How long a large study takes on 1 to 256 GPUs: a simulation, from times that were measured.

Run ``python tests/benchmarks/cluster_simulation.py``. It plays the search as it is, event by event:
generations, an eighth of the images first, the best quarter on all; one driver, which takes
reports, decides, draws and gives out jobs, one thing at a time; GPUs that wait for it and for each
other. What driver, storage and MLflow take was measured (``cluster_costs.py``), and how much
trials differ in time too (``scaling.py --record``); that benchmark's turns with one and two workers
are predicted first. A GPU's images per second are an assumption: 371 is ViT-H/14 (PyTorch 2.9.1,
AMP) on an RTX 4090 in timm's ``results/benchmark-infer-amp-nchw-pt291-cu128-4090.csv``.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dsm_tune.searching.space import load_space

RECORD = Path(__file__).with_name("recorded_cluster.json")
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


# -- what was measured --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the driver.

    Attributes:
        by_told: rows (trials told, a generation's start, a draw, a decision about a trial).
        add, store, close: one write of the study's storage.
        dispatch: from a report to the next job's start, all but the driver's own work.
        log: of MLflow's writer, per trial, beside the search.
    """

    by_told: tuple[tuple[float, float, float, float], ...]
    add: float
    store: float
    close: float
    dispatch: float
    log: float

    @classmethod
    def of(cls, record: dict[str, Any], storage: str) -> Costs:
        """Read them."""
        rows = sorted(
            (row["told"], row["start"], row["draw"], row["decide"]) for row in record["driver"]
        )
        return cls(
            tuple(rows),
            *(record["storage"][storage][name] for name in ("add", "store", "close")),
            record["dispatch"],
            record["mlflow"][storage],
        )

    def at(self, told: int) -> tuple[float, float, float]:
        """(start, draw, decide), between the rows measured nearest; beyond them in proportion."""
        rows = self.by_told
        above = next((i for i, row in enumerate(rows) if row[0] >= told), len(rows))
        above = min(max(above, 1), len(rows) - 1)
        low, high = rows[above - 1], rows[above]
        part = (told - low[0]) / (high[0] - low[0])
        between = [max(a + part * (b - a), 0.0) for a, b in zip(low, high, strict=True)]
        return between[1], between[2], between[3]


# -- the simulation -----------------------------------------------------------------------------


@dataclasses.dataclass
class Site:
    """GPUs and a driver; what each has done so far.

    Attributes:
        gpus: how many.
        costs: of the driver.
        now: when the driver is free.
        evaluated: GPU-seconds spent on images.
        waited: GPU-seconds idle while others worked: for the end of a stage.
    """

    gpus: int
    costs: Costs
    now: float = 0.0
    evaluated: float = 0.0
    waited: float = 0.0

    def run(self, jobs: Sequence[tuple[float, float]]) -> None:
        """Run jobs: (their seconds, the driver's own before it can give them out); report all."""
        waiting = list(reversed(jobs))
        free = self.gpus
        running: list[float] = []
        begun, spent = self.now, 0.0
        while waiting or running:
            if waiting and waiting[-1][1]:
                seconds, before = waiting.pop()
                self.now += before
                waiting.append((seconds, 0.0))
            elif waiting and free:
                seconds, _ = waiting.pop()
                self.now += self.costs.dispatch
                heapq.heappush(running, self.now + seconds)
                spent += seconds
                free -= 1
            else:
                self.now = max(self.now, heapq.heappop(running)) + self.costs.store
                free += 1
        self.evaluated += spent
        self.waited += self.gpus * (self.now - begun) - spent

    def decide(self, seconds: float) -> None:
        """Let the driver work, all GPUs idle."""
        self.now += seconds


@dataclasses.dataclass(frozen=True)
class Study:
    """What is searched.

    Attributes:
        trials, images: how many.
        image_seconds: of a merged model on one GPU, per image.
        dense_seconds: of the dense model.
        spread: how long trials take relative to the middle one.
        generation: trials of one.
        image_share, keep_share: of the ladder.
        split: a trial's images are shared by GPUs that would have no trial.
        overlapped: a generation is drawn while the best of the one before are still evaluated.
    """

    trials: int
    images: int
    image_seconds: float
    dense_seconds: float
    spread: tuple[float, ...]
    generation: int
    image_share: float
    keep_share: float
    split: bool = False
    overlapped: bool = False

    def stages(self, first: int, count: int) -> tuple[list[float], list[float]]:
        """Seconds of a generation's jobs on few images, and of those on all."""
        factors = [self.spread[(first + i) % len(self.spread)] for i in range(count)]
        few = math.ceil(self.images * self.image_share)
        kept = math.ceil(count * self.keep_share)
        return (
            [few * self.image_seconds * factor for factor in factors],
            [self.images * self.image_seconds * factor for factor in factors[:kept]],
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a simulated study took.

    Attributes:
        seconds: until its last trial has ended.
        evaluated, waited, driven: shares of the GPUs' time: on images, idle in a stage that
            others still work on, idle while the driver alone works.
        logged: seconds of MLflow's writer in all.
    """

    seconds: float
    evaluated: float
    waited: float
    driven: float
    logged: float

    @property
    def limit(self) -> str:
        """What takes most of the GPUs' time, where it is not images."""
        if self.evaluated >= 0.9:
            return "GPUs"
        return "generation's end" if self.waited > self.driven else "driver"


def simulate(study: Study, costs: Costs, gpus: int) -> Outcome:
    """Play a study on some GPUs."""
    site = Site(gpus, costs)
    site.run(_shared([study.images * study.dense_seconds], gpus))
    done = 0
    rest: list[tuple[float, float]] = []  # of the generation before, where they overlap
    while done < study.trials:
        count = min(study.generation, study.trials - done)
        start, draw, decide = costs.at(done)
        few, full = study.stages(done, count)
        drawing = start + count * (draw + costs.add)
        if study.overlapped and rest:
            site.run([*rest, (few[0], drawing), *_at_once(few[1:])])
        else:
            site.decide(drawing)
            site.run(_cut(few, gpus) if study.split else _at_once(few))
        if study.overlapped:
            rest = _at_once(full)
        else:
            site.run(_cut(full, gpus) if study.split else _at_once(full))
        site.decide(count * (decide + costs.close))
        done += count
    if rest:
        site.run(rest)
    total = gpus * site.now
    driven = total - site.evaluated - site.waited
    shares = (part / total for part in (site.evaluated, site.waited, driven))
    return Outcome(site.now, *shares, logged=study.trials * costs.log)


def _at_once(jobs: Sequence[float]) -> list[tuple[float, float]]:
    return [(seconds, 0.0) for seconds in jobs]


def _shared(jobs: Sequence[float], gpus: int) -> list[tuple[float, float]]:
    return [(seconds / gpus, 0.0) for seconds in jobs for _ in range(gpus)]


def _cut(jobs: Sequence[float], gpus: int) -> list[tuple[float, float]]:
    """Each job in as many parts as there are GPUs for it."""
    return _shared(jobs, max(gpus // len(jobs), 1))


# -- held to what was measured ------------------------------------------------------------------


def validate(record: dict[str, Any], costs: Costs) -> list[tuple[int, float, float, float]]:
    """(workers, predicted, measured, predicted from one worker's evaluations) of the turns."""
    scaling = record["scaling"]
    alone = [turn for turn in scaling["turns"] if turn["workers"] == 1]
    found = []
    for workers in (1, 2):
        turns = [turn for turn in scaling["turns"] if turn["workers"] == workers]
        measured = sum(turn["seconds"] for turn in turns)
        predicted = [
            sum(_replayed(turn, workers, costs) for turn in source) for source in (turns, alone)
        ]
        found.append((workers, predicted[0], measured, predicted[1]))
    return found


def _replayed(turn: dict[str, Any], workers: int, costs: Costs) -> float:
    """Seconds that the simulation gives for the generations of a turn."""
    site = Site(workers, costs)
    for generation in sorted({job["generation"] for job in turn["jobs"]}):
        jobs = [job for job in turn["jobs"] if job["generation"] == generation]
        first = min(job["trial"] for job in jobs)
        count = len({job["trial"] for job in jobs})
        start, draw, decide = costs.at(first)
        site.decide(start + count * (draw + costs.add))
        for images in sorted({job["images"] for job in jobs}):
            site.run(_at_once([job["seconds"] for job in jobs if job["images"] == images]))
        site.decide(count * (decide + costs.close))
    return site.now


def relative_times(record: dict[str, Any]) -> tuple[float, ...]:
    """How long evaluations on few images took, relative to the middle one."""
    jobs = [job for turn in record["scaling"]["turns"] for job in turn["jobs"]]
    few = min(job["images"] for job in jobs)
    times = [job["seconds"] for job in jobs if job["images"] == few]
    return tuple(seconds / statistics.median(times) for seconds in times)


# -- what is printed ----------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time in the largest unit that gives a figure above 1."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def rows(study: Study, costs: Costs, *, by_gpus: bool = False) -> list[tuple[int, Outcome, float]]:
    """(GPUs, outcome, efficiency) for each number of GPUs.

    Args:
        study: what is searched.
        costs: of the driver.
        by_gpus: a generation of four trials per GPU, if that is more.
    """
    alone = simulate(study, costs, 1).seconds
    found = []
    for gpus in GPUS:
        size = max(study.generation, 4 * gpus) if by_gpus else study.generation
        outcome = simulate(dataclasses.replace(study, generation=size), costs, gpus)
        found.append((gpus, outcome, alone / (gpus * outcome.seconds)))
    return found


def main() -> None:
    """Print how the simulation compares with what was measured, and what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--images", type=int, default=50_000, help="that trials are judged on")
    parser.add_argument("--images-per-second", type=float, default=371.0, help="dense, of one GPU")
    parser.add_argument("--share", type=float, default=0.6, help="of its time that a plan takes")
    parser.add_argument("--storage", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    costs = Costs.of(record, options.storage)
    print("held to scaling.py: seconds of its turns, without Ray's start")
    for workers, predicted, measured, from_one in validate(record, Costs.of(record, "sqlite")):
        print(
            f"  {workers} workers: predicted {predicted:.1f}, measured {measured:.1f}: "
            f"{predicted / measured:.3f} (from one worker's evaluations: {from_one / measured:.3f})"
        )
    space = load_space("default")
    dense_seconds = 1 / options.images_per_second
    study = Study(
        trials=options.trials,
        images=options.images,
        image_seconds=options.share * dense_seconds,
        dense_seconds=dense_seconds,
        spread=relative_times(record),
        generation=space.generation,
        image_share=space.fidelity.image_share,
        keep_share=space.fidelity.keep_share,
    )
    print(
        f"\n{study.trials} trials on {study.images} images, {options.images_per_second:g} dense "
        f"images/s per GPU, plans at {options.share:.0%} of that time; {options.storage}"
    )
    variants = {
        f"generations of {study.generation}": (study, False),
        "generations of 4 per GPU": (study, True),
        "drawn while the best are evaluated": (dataclasses.replace(study, overlapped=True), False),
        "trials split over GPUs": (dataclasses.replace(study, split=True), False),
        "split, 4 per GPU": (dataclasses.replace(study, split=True), True),
    }
    for name, (variant, by_gpus) in variants.items():
        print(f"\n{name}\n GPUs      time efficiency  images  waiting   driver  limited by")
        for gpus, outcome, efficiency in rows(variant, costs, by_gpus=by_gpus):
            print(
                f"{gpus:5}  {duration(outcome.seconds):>8} {efficiency:10.2f} "
                f"{outcome.evaluated:7.0%} {outcome.waited:8.0%} {outcome.driven:8.0%}  "
                f"{outcome.limit}"
            )
        slowest = outcome.logged / outcome.seconds
        print(f"MLflow's writer is busy {slowest:.0%} of the time at {gpus} GPUs")


if __name__ == "__main__":
    main()
