"""The search as a state machine: which plan is evaluated next, on how many images.

It knows nothing of processes: an engine takes jobs from it and reports what they gave. Trials
are asked in generations, evaluated on few images, the better part on all, and told in order. The
trials of a generation are drawn one after the other, while those before them are evaluated: each
sees the generations before alone, and the plans that were drawn before it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from dsm_tune.plan import MergePlan
from dsm_tune.results import REFERENCES, Evaluation
from dsm_tune.searching.budget import Cost
from dsm_tune.searching.pareto import hypervolume, non_dominated, ranks
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.samplers import Mirror, derive_seed
from dsm_tune.searching.study import Record, Study

__all__ = ["Job", "Progress", "Search"]

ATTEMPTS, RANDOM_AFTER = 48, 16  # draws per slot; from RANDOM_AFTER on, uniformly at random


@dataclasses.dataclass(frozen=True)
class Job:
    """One evaluation to do."""

    number: int
    plan: MergePlan
    images: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a search stands.

    Attributes:
        done: trials that ended.
        trials: as many as were asked for.
        best_divergence: the least of the feasible merged plans on all images, or ``None``.
        hypervolume: of the feasible front, within dense cost and twice the worse reference.
        record: the trial that ended last.
    """

    done: int
    trials: int
    best_divergence: float | None
    hypervolume: float
    record: Record


class Search:
    """Turns a study, a planner and a number of trials into jobs, and their results into a front.

    Args:
        study: new, or to be continued.
        planner: builds the plans.
        images: number of search images.
        trials: distinct plans to evaluate, known ones included.
        seed: of all draws.
        known_at: generations that try what is known before a search: the first, and the one in
            which the budget was changed.
        on_progress: called whenever a trial has ended.
    """

    def __init__(
        self,
        study: Study,
        planner: Planner,
        *,
        images: int,
        trials: int,
        seed: int,
        known_at: Collection[int] = (0,),
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.study, self.planner = study, planner
        self.known_at = frozenset(known_at)
        self.images, self.trials, self.seed = images, trials, seed
        self.on_progress = on_progress
        self.stopped = ""  # why no more jobs are given out
        self._records = {record.number: record for record in study.records()}
        self._costs: dict[int, Cost] = {}
        self._queue: deque[Job] = deque()
        self._running: dict[tuple[int, int], Job] = {}
        self._undrawn: deque[int] = deque()  # slots of the generation that is being drawn
        self._drawing = self._drawn_out = -1  # that generation; the last that ran out of plans
        self._seen: Mirror  # what its draws see
        self._advance()

    # -- what an engine calls -------------------------------------------------------------------

    def next(self) -> Job | None:
        """The next job, or ``None`` while there is none (see :attr:`finished`)."""
        if not self._queue:
            self.prepare()
        if self.stopped or not self._queue:
            return None
        job = self._queue.popleft()
        self._running[job.number, job.images] = job
        return job

    def prepare(self) -> None:
        """Draw one trial ahead, if the generation has more: for an engine that has time."""
        if not self.stopped and self._undrawn:
            self._draw_next()
            self._go_on()

    @property
    def finished(self) -> bool:
        """Whether no job is left and none will come."""
        is_empty = not self._queue and not self._undrawn
        return not self._running and (bool(self.stopped) or is_empty)

    def report(self, job: Job, evaluation: Evaluation) -> None:
        """Take what a job gave; it is stored first."""
        if evaluation.divergence is not None and not math.isfinite(evaluation.divergence):
            cause = f"divergence must be a finite number, but got {evaluation.divergence}"
            evaluation = Evaluation(job.images, seconds=evaluation.seconds, error=cause)
        self.study.store(job.number, evaluation)
        record = self._records[job.number]
        evaluations = {**record.evaluations, evaluation.images: evaluation}
        self._records[job.number] = dataclasses.replace(record, evaluations=evaluations)
        self._running.pop((job.number, job.images), None)
        self._go_on()

    def give_back(self, job: Job) -> None:
        """Take a job back that could not be run; it is given out again, first."""
        self._running.pop((job.number, job.images), None)
        self._queue.appendleft(job)

    def stop(self, why: str) -> None:
        """Give out no more jobs; what runs may still be reported."""
        self.stopped = self.stopped or why

    # -- what is known --------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """All trials by number."""
        return [self._records[number] for number in sorted(self._records)]

    def front(self) -> list[Record]:
        """Feasible, fully evaluated, mutually non-dominated trials, ascending in cost."""
        able = [r for r in self.records() if self._is_feasible(r)]
        return [able[i] for i in non_dominated([self.objectives(r) for r in able])]

    def objectives(self, record: Record) -> tuple[float, float]:
        """(cost, divergence) of a trial that was evaluated."""
        latest = record.latest
        divergence = math.inf if latest is None or latest.divergence is None else latest.divergence
        return self._cost(record), divergence

    def cost_of(self, record: Record) -> Cost:
        """Predicted cost of a trial's plan."""
        if record.number not in self._costs:
            self._costs[record.number] = self.planner.cost_of(record.plan)
        return self._costs[record.number]

    def _cost(self, record: Record) -> float:
        return self.planner.limits.objective(self.cost_of(record))

    def _is_feasible(self, record: Record) -> bool:
        return record.state == "complete" and self.planner.limits.excess(self.cost_of(record)) <= 0

    # -- generations ----------------------------------------------------------------------------

    def _go_on(self) -> None:
        if not self._queue and not self._running and not self._undrawn:
            self._advance()

    def _advance(self) -> None:
        """Queue what the generation still needs; when it needs nothing, end it and ask the next."""
        while not self._queue and not self._undrawn:
            open_records = [r for r in self.records() if r.state == "running"]
            if open_records:
                generation = open_records[0].generation
                self._ask(generation)
                members = self._members(generation)
                if not self._queue_missing(members):
                    self._close(members)
            elif self.stopped or len(self._records) >= self.trials:
                return
            else:
                self._ask(max((r.generation for r in self._records.values()), default=-1) + 1)

    def _members(self, generation: int) -> list[Record]:
        return [r for r in self.records() if r.generation == generation]

    def _ask(self, generation: int) -> None:
        """Add what is known of a generation, or draw its first slot and note the others."""
        members = {r.slot for r in self._members(generation)}
        before = len(self._records) - len(members)
        known = self._known_records(generation) if generation in self.known_at else []
        if known:
            # Dense, ToMe and DSM are always there.
            most = self.trials - before if before else max(self.trials, 3)
            for record in known[:most]:
                if record.slot not in members:
                    self._add(record)
        elif generation != self._drawn_out:
            size = max(min(self.planner.space.generation, self.trials - before), len(members))
            self._undrawn.extend(slot for slot in range(size) if slot not in members)
            if self._undrawn:
                self._drawing, self._seen = generation, self._mirror(generation)
                self._draw_next()

    def _draw_next(self) -> None:
        """Draw the next slot, and queue its trial; a generation without plans ends the search."""
        drawn = self._draw(self._seen, self._drawing, self._undrawn.popleft())
        if drawn is not None:
            self._queue.extend(_lacking([self._add(drawn)], self._few()))
            return
        self._undrawn.clear()
        self._drawn_out = self._drawing
        if not self._members(self._drawing):
            self.stop("no further distinct plan meets the budget")

    def _add(self, record: Record) -> Record:
        stored = self.study.add(record, self.planner.space)
        self._records[stored.number] = stored
        return stored

    def _known_records(self, generation: int) -> list[Record]:
        """What is known, less what an earlier generation has tried."""
        found: list[Record] = []
        digests = {r.plan.digest for r in self._records.values() if r.generation < generation}
        points: list[tuple[str, dict[str, Any], MergePlan | None]] = [
            (label, {}, plan) for label, plan in self.planner.known().items()
        ]
        for index, point in enumerate(self.planner.space.enqueued):
            params = self.planner.space.complete(point)
            points.append((f"enqueued-{index}", params, self.planner.build(params)))
        for label, known_params, plan in points:
            if plan is not None and plan.digest not in digests:
                digests.add(plan.digest)
                found.append(Record(-1, generation, len(found), label, known_params, plan))
        return found

    def _draw(self, mirror: Mirror, generation: int, slot: int) -> Record | None:
        seen = {r.plan.digest for r in self._records.values()}
        redrawn = {"duplicate": 0, "unfit": 0}
        for attempt in range(ATTEMPTS):
            seed = derive_seed(self.seed, generation, slot, attempt)
            params = mirror.draw(seed, slot=slot, at_random=attempt >= RANDOM_AFTER)
            plan = self.planner.build(params)
            if plan is None or plan.digest in seen:
                redrawn["unfit" if plan is None else "duplicate"] += 1
                continue
            return Record(-1, generation, slot, "", params, plan, redrawn=redrawn)
        return None

    def _mirror(self, generation: int) -> Mirror:
        told = []
        offset = self._log_offset(generation)
        for record in self.records():
            earlier = record.generation < generation and record.params and record.state != "failed"
            latest = record.latest
            if earlier and latest is not None and latest.divergence is not None:
                value = _log(latest.divergence) + (offset if latest.images < self.images else 0.0)
                told.append((record.params, (value, self._cost(record))))
        return Mirror(self.planner.space, told)

    def _log_offset(self, generation: int) -> float:
        """How much harder all images are than the few: median over plans that have seen both."""
        few, offsets = self._few(), []
        for record in self.records():
            if record.generation < generation and {few, self.images} <= record.evaluations.keys():
                less, more = (record.evaluations[n].divergence for n in (few, self.images))
                if less is not None and more is not None:
                    offsets.append(_log(more) - _log(less))
        return statistics.median(offsets) if offsets else 0.0

    def _few(self) -> int:
        """Images of the first stage; as many as there are if it is not worth a stage of its own."""
        fidelity = self.planner.space.fidelity
        return math.ceil(self.images * fidelity.image_share) if fidelity.thins_out else self.images

    def _queue_missing(self, members: list[Record]) -> bool:
        """Queue the evaluations that a generation lacks at its present stage; whether any."""
        few = self._few()
        climbing = [r for r in members if r.label not in REFERENCES]
        references = [r for r in members if r.label in REFERENCES]
        queued = {job.number for job in self._queue}  # just drawn
        jobs = [*_lacking(references, self.images), *_lacking(climbing, few)]
        self._queue.extend(job for job in jobs if job.number not in queued)
        if not self._queue and not self._undrawn and few < self.images:
            self._queue.extend(_lacking(self._promoted(climbing, few), self.images))
        return bool(self._queue or self._undrawn)

    def _promoted(self, members: list[Record], few: int) -> list[Record]:
        """The trials that go on to all images: best non-domination ranks first.

        Of one rank, in turn, the one that adds most to the hypervolume of the front and of those
        that were chosen before it: so the front grows over its whole length.
        """
        able = [r for r in members if not r.evaluations[few].error]
        points = []
        for record in able:
            divergence = record.evaluations[few].divergence
            points.append((self._cost(record), math.inf if divergence is None else divergence))
        rank = ranks(points)
        reference = self._reference_point()
        gained = [self.objectives(record) for record in self.front()]
        keep = math.ceil(len(members) * self.planner.space.fidelity.keep_share)
        left = set(range(len(able)))
        while left and len(able) - len(left) < keep:
            volumes = {i: hypervolume([*gained, points[i]], reference) for i in left}
            best = min(left, key=lambda i: (rank[i], -volumes[i], points[i][1], i))
            left.remove(best)
            gained.append(points[best])
        return [record for i, record in enumerate(able) if i not in left]

    def _close(self, members: list[Record]) -> None:
        for record in sorted(members, key=lambda r: r.number):
            if record.state != "running":
                continue
            latest = record.latest
            excess = self.planner.limits.excess(self.cost_of(record))
            values, state, why = None, "complete", ""
            if latest is None or latest.error or latest.divergence is None:
                state, why = "failed", latest.error if latest else "it was never evaluated"
            elif latest.images < self.images:
                state, why = (
                    "pruned",
                    f"not among the best of its generation on {latest.images} images",
                )
            else:
                values = (latest.divergence, self._cost(record))
            self._records[record.number] = dataclasses.replace(record, state=state, why=why)
            progress = self._progress(self._records[record.number])
            self.study.close(
                record.number,
                state,
                values=values,
                excess=excess,
                why=why,
                progress=progress.record.progress,
            )
            self._records[record.number] = progress.record
            self.on_progress(progress)

    def _progress(self, record: Record) -> Progress:
        ended = [r for r in self._records.values() if r.state != "running"]
        merged = [r for r in self.front() if any(r.plan.removed)]
        least = min((self.objectives(r)[1] for r in merged), default=None)
        volume = self.hypervolume()
        stood = {"done": len(ended), "hypervolume": volume, "best_divergence": least}
        kept = dataclasses.replace(record, progress=stood)
        return Progress(len(ended), self.trials, least, volume, kept)

    def hypervolume(self) -> float:
        """Of the feasible front, up to dense cost and twice the worse of ToMe's and DSM's loss.

        Relative to that rectangle: 1 would be a free plan without any divergence.
        """
        reference = self._reference_point()
        area = reference[0] * reference[1]
        return hypervolume(map(self.objectives, self.front()), reference) / area if area else 0.0

    def _reference_point(self) -> tuple[float, float]:
        """Cost of dense and twice the worse loss of ToMe and DSM; (0, 0) while they are unknown."""
        known = {r.label: r for r in self.records() if self.images in r.evaluations}
        losses = [self.objectives(known[k])[1] for k in ("tome", "dsm") if k in known]
        worst = max((loss for loss in losses if math.isfinite(loss)), default=0.0)
        if "dense" not in known or not worst:
            return 0.0, 0.0
        return self._cost(known["dense"]), 2 * worst


def _lacking(records: list[Record], images: int) -> list[Job]:
    """The evaluations on so many images that running trials lack."""
    return [
        Job(record.number, record.plan, images)
        for record in records
        if record.state == "running" and images not in record.evaluations
    ]


def _log(divergence: float) -> float:
    """The scale of the sampler: one hopeless plan does not flatten the rest of the front."""
    return math.log(max(divergence, 1e-9))
