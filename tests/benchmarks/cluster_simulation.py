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
        dispatch: to give out a job and take its report, one after the other.
        latency: in which a worker is idle besides, whatever the others do.
        log: of MLflow's writer, per trial, beside the search.
    """

    by_told: tuple[tuple[float, float, float, float], ...]
    add: float
    store: float
    close: float
    dispatch: float
    latency: float
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
            record["dispatch"]["4 workers"],
            record["dispatch"]["1 worker"] - record["dispatch"]["4 workers"],
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
        driven: seconds in which the driver worked.
    """

    gpus: int
    costs: Costs
    now: float = 0.0
    evaluated: float = 0.0
    driven: float = 0.0

    def run(self, jobs: Sequence[tuple[float, float]]) -> None:
        """Run jobs: (their seconds, the driver's own to draw them); ends when all are reported."""
        free, given, drawn = self.gpus, 0, 0
        running: list[float] = []
        while given < len(jobs) or running:
            if free and given < drawn:
                seconds = jobs[given][0]
                self.decide(self.costs.dispatch)
                heapq.heappush(running, self.now + self.costs.latency + seconds)
                self.evaluated += seconds
                free, given = free - 1, given + 1
            elif drawn < len(jobs) and not (running and running[0] <= self.now):
                self.decide(jobs[drawn][1])
                drawn += 1
            else:
                self.now = max(self.now, heapq.heappop(running))
                self.decide(self.costs.store)
                free += 1

    def decide(self, seconds: float) -> None:
        """Let the driver work."""
        self.now += seconds
        self.driven += seconds


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
        evaluated: share of the GPUs' time that went into images.
        driven: share of the time in which the driver worked.
        logged: that of MLflow's writer, which works beside it.
    """

    seconds: float
    evaluated: float
    driven: float
    logged: float

    @property
    def limit(self) -> str:
        """What stands in the way of more GPUs."""
        if self.evaluated >= 0.9:
            return "GPUs"
        return "driver" if self.driven > 0.5 else "waiting for a stage's end"


def simulate(study: Study, costs: Costs, gpus: int) -> Outcome:
    """Play a study on some GPUs."""
    site = Site(gpus, costs)
    site.run(_at_once(_cut([study.images * study.dense_seconds], gpus)))
    done = 0
    rest: list[tuple[float, float]] = []  # of the generation before, where they overlap
    while done < study.trials:
        count = min(study.generation, study.trials - done)
        start, draw, decide = costs.at(done)
        few, full = study.stages(done, count)
        each = draw + costs.add
        if study.overlapped and rest:
            site.run([*rest, (few[0], start + each), *((seconds, each) for seconds in few[1:])])
        else:
            site.decide(start)
            parts = max(gpus // count, 1) if study.split else 1
            drawing = [each if part == 0 else 0.0 for _ in few for part in range(parts)]
            site.run(list(zip(_cut(few, parts), drawing, strict=True)))
        if study.overlapped:
            rest = _at_once(full)
        else:
            parts = max(gpus // len(full), 1) if study.split else 1
            site.run(_at_once(_cut(full, parts)))
        site.decide(count * (decide + costs.close))
        done += count
    if rest:
        site.run(rest)
    shares = site.evaluated / gpus, site.driven, study.trials * costs.log
    return Outcome(site.now, *(part / site.now for part in shares))


def _at_once(jobs: Sequence[float]) -> list[tuple[float, float]]:
    return [(seconds, 0.0) for seconds in jobs]


def _cut(jobs: Sequence[float], parts: int) -> list[float]:
    """Each job in equal parts."""
    return [seconds / parts for seconds in jobs for _ in range(parts)]


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
        site.decide(start)
        few, full = min(job["images"] for job in jobs), max(job["images"] for job in jobs)
        drawing = draw + costs.add
        site.run([(job["seconds"], drawing) for job in jobs if job["images"] == few])
        site.run(_at_once([job["seconds"] for job in jobs if job["images"] == full]))
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


def rows(study: Study, costs: Costs, *, per_gpu: int = 0) -> list[tuple[int, Outcome, float]]:
    """(GPUs, outcome, efficiency) for each number of GPUs.

    Args:
        study: what is searched.
        costs: of the driver.
        per_gpu: trials of a generation for each GPU, if that is more than the study has.
    """
    alone = simulate(study, costs, 1).seconds
    found = []
    for gpus in GPUS:
        size = max(study.generation, per_gpu * gpus)
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
    split = dataclasses.replace(study, split=True)
    overlapped = dataclasses.replace(study, overlapped=True)
    variants = {
        f"generations of {study.generation}": (study, 0),
        "generations of 4 trials per GPU": (study, 4),
        "not built: drawn while the best are still evaluated": (overlapped, 0),
        "not built: images of a trial split over idle GPUs": (split, 0),
        "not built: split, and generations of 1 trial per GPU": (split, 1),
    }
    for name, (variant, per_gpu) in variants.items():
        print(f"\n{name}\n GPUs      time  efficiency  driver  MLflow  limited by")
        for gpus, outcome, efficiency in rows(variant, costs, per_gpu=per_gpu):
            print(
                f"{gpus:5}  {duration(outcome.seconds):>8} {efficiency:11.2f} "
                f"{outcome.driven:7.0%} {outcome.logged:7.0%}  {outcome.limit}"
            )


if __name__ == "__main__":
    main()
