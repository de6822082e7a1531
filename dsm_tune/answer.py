"""From a study's storage to its answer: the front, the choice, the references, the counts."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dsm_tune.config import absolute_storage
from dsm_tune.errors import ConfigError, StudyError
from dsm_tune.plan import MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.results import (
    FAULTS,
    BudgetReport,
    Fault,
    LatencyMs,
    Result,
    Trial,
    TuneResult,
)
from dsm_tune.searching.budget import Cost, Limit, Limits, parse_limit
from dsm_tune.searching.pareto import non_dominated
from dsm_tune.searching.study import Record, Study

__all__ = [
    "Answer",
    "costing",
    "load_study",
    "parse_budget",
    "profile_of",
    "resolve_budget",
    "show",
    "stat_of",
]


def costing(profile: DeviceProfile | None) -> Any:
    """Return what predicts the cost of a plan: GMACs, and latency where there is a profile."""

    def cost_of(plan: MergePlan) -> Cost:
        return Cost(plan.gmacs, None if profile is None else profile.predict(plan))

    return cost_of


def profile_of(facts: Mapping[str, Any]) -> DeviceProfile | None:
    """The device profile of a study, corrected by what its confirmations measured."""
    text = facts.get("profile")
    if text is None:
        return None
    profile = DeviceProfile.from_json(text)
    return dataclasses.replace(
        profile, scale=profile.scale * math.prod(facts.get("corrections", []))
    )


def stat_of(latency: LatencyMs, stat: str) -> float | None:
    """The named statistic of a measured latency."""
    value: float | None = getattr(latency, stat)
    return value


@dataclasses.dataclass(frozen=True)
class Answer:
    """A study as it is stored, read as an answer.

    Attributes:
        facts: of the study.
        records: its trials.
        name: of the study.
        limits: the budget: the study's own, or another one to pick by.
        run_ids: MLflow run of each trial.
    """

    name: str
    facts: Mapping[str, Any]
    records: Sequence[Record]
    limits: Limits
    run_ids: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, study: Study, limits: Limits | None = None) -> Answer:
        """Read a study; ``limits`` to pick by another budget than its own."""
        facts = study.facts
        own = Limits(**facts["limits"])
        ids = {int(number): run for number, run in facts.get("run_ids", {}).items()}
        return cls(study.name, facts, study.records(), limits or own, ids)

    # -- results --------------------------------------------------------------------------------

    @cached_property
    def profile(self) -> DeviceProfile | None:
        """The device profile that the search predicts with."""
        return profile_of(self.facts)

    def result_of(self, record: Record) -> Result:
        """A trial as a result: confirmed, or predicted where it is not confirmed."""
        confirmed = self._confirmed(record.plan.digest)
        latest = record.latest
        full = latest is not None and record.state == "complete"
        common: dict[str, Any] = {
            "trial": record.number,
            "run_id": self.run_ids.get(record.number),
            "divergence_search": latest.divergence if full and latest is not None else None,
        }
        if confirmed is not None:
            return dataclasses.replace(confirmed, **common)
        predicted = self._predict(record.plan)
        result = Result(
            plan=record.plan,
            gmacs=record.plan.gmacs,
            latency_ms=LatencyMs(predicted=predicted),
            **common,
        )
        feasible = self.limits.excess(Cost(result.gmacs, predicted)) <= 0
        return dataclasses.replace(result, feasible=feasible)

    def _confirmed(self, digest: str) -> Result | None:
        """What the confirmation found of a plan, if it was among those."""
        found = self.facts.get("confirmed", {}).get(digest)
        if found is None:
            return None
        result = Result.from_dict(found["result"])
        return dataclasses.replace(result, feasible=self._meets(result, found.get("ratio_high")))

    def _predict(self, plan: MergePlan) -> float | None:
        profile = self.profile
        return None if profile is None else profile.predict(plan)

    def _meets(self, result: Result, ratio_high: float | None) -> bool:
        """Whether a confirmed result is within every bound, at the upper end of its interval."""
        limits, latency = self.limits, result.latency_ms
        meets = limits.gmacs is None or result.gmacs <= limits.gmacs
        if limits.ms is not None:
            share = limits.ms_share
            if share is not None and ratio_high is not None:
                meets = meets and ratio_high <= share
            else:
                high = latency.high
                if latency.p50 is None and latency.predicted is not None and self.profile:
                    high = latency.predicted * (1 + self.profile.error)  # of a device elsewhere
                meets = meets and high is not None and high <= limits.ms
        return meets and self._drop(result) <= (math.inf if limits.drop is None else limits.drop)

    def _drop(self, result: Result) -> float:
        """Points of top-1, or of agreement without labels, below the dense model."""
        dense = self.facts.get("confirmed", {}).get(self.facts["dense_digest"])
        if dense is None or result.agreement is None:
            return 0.0
        top1 = dense["result"]["top1"]
        if top1 is not None and result.top1 is not None:
            return 100 * float(top1 - result.top1)
        return 100 * (1 - result.agreement)

    def cost(self, result: Result) -> float:
        """What the front is ascending in: the bounded latency statistic, or GMACs."""
        if self.limits.ms is None:
            return result.gmacs
        measured = stat_of(result.latency_ms, self.facts["config"]["latency_stat"])
        known = measured if measured is not None else result.latency_ms.predicted
        return math.inf if known is None else known

    def front(self) -> list[Result]:
        """Feasible, mutually non-dominated results, ascending in cost.

        After the confirmation these are confirmed results, compared by their held-out
        divergence; before it, and for another budget, predictions and the search's divergence.
        """
        results = [self.result_of(r) for r in self.records if r.state == "complete"]
        able = [r for r in results if r.feasible]
        final = self.facts.get("status") in ("done", "infeasible") and self._own_budget
        if final:
            able = [r for r in able if r.divergence is not None]
        points = [(self.cost(r), _divergence(r, final)) for r in able]
        return [able[i] for i in non_dominated(points)]

    def misprediction(self) -> float | None:
        """What plans took, at the upper end of its interval, over what was predicted: the median.

        Where latency is bounded by a share of dense, both are taken relative to dense. ``None``
        where no plan that removes tokens was timed and predicted.
        """
        confirmed = dict(self.facts.get("confirmed", {}))
        dense = confirmed.pop(self.facts["dense_digest"], None)
        if self.profile is None or dense is None:
            return None
        factors = []
        for one in confirmed.values():
            result = Result.from_dict(one["result"])
            took = result.latency_ms.high
            if self.limits.ms_share is not None:
                took = one["ratio_high"] * self.facts["dense_ms"]
            if took is not None and any(result.plan.removed):
                factors.append(took / self.profile.predict(result.plan))
        return statistics.median(factors) if factors else None

    @property
    def _own_budget(self) -> bool:
        return bool(dataclasses.asdict(self.limits) == self.facts["limits"])

    @property
    def _is_reachable(self) -> bool:
        """Whether the fastest plan that is known meets the budget, by prediction."""
        fastest = Cost(self.facts["fastest_gmacs"], self.facts.get("fastest_ms"))
        return self.limits.excess(fastest) <= 0

    def choose(self, front: Sequence[Result]) -> Result | None:
        """The feasible plan that the search found closest to dense."""
        return min(front, key=lambda r: (_divergence(r, False), self.cost(r)), default=None)

    # -- the whole ------------------------------------------------------------------------------

    def trials(self, front: Sequence[Result]) -> list[Trial]:
        """All trials, marked by whether they are on the front."""
        on_front = {result.trial for result in front}
        return [
            dataclasses.replace(self.trial(r), pareto=r.number in on_front) for r in self.records
        ]

    def trial(self, record: Record) -> Trial:
        """A trial for review."""
        latest = record.latest
        return Trial(
            number=record.number,
            generation=record.generation,
            label=record.label,
            state=record.state,
            params=record.params,
            plan=record.plan,
            why=record.why,
            images=latest.images if latest else 0,
            divergence=latest.divergence if latest else None,
            agreement=latest.agreement if latest else None,
            top1=latest.top1 if latest else None,
            predicted_ms=self._predict(record.plan),
            seconds=sum(e.seconds for e in record.evaluations.values()),
            feasible=record.state == "complete" and self.result_of(record).feasible,
        )

    def counts(self) -> dict[str, int]:
        """Trials by state; duplicates are draws that were given up before they cost anything."""
        counts = {
            state: sum(r.state == state for r in self.records)
            for state in ("complete", "pruned", "failed")
        }
        duplicates = sum(r.redrawn.get("duplicate", 0) for r in self.records)
        return {**counts, "duplicate": duplicates}

    def faults(self) -> list[Fault]:
        """What went wrong and was survived; trials that failed are told by the last one's cause."""
        noted = {kind: Fault(kind, **told) for kind, told in self.facts.get("faults", {}).items()}
        failed = [record for record in self.records if record.state == "failed"]
        if failed:
            last = failed[-1]
            noted["trial"] = Fault("trial", len(failed), f"trial {last.number}: {last.why}")
        return [noted[kind] for kind in FAULTS if kind in noted]

    def reference(self, label: str) -> Result:
        """The dense model's, ToMe's or DSM's result; a trial's, unless the budget moved since."""
        plan = MergePlan.from_json(self.facts["references"][label])
        for record in self.records:  # its plan may be that of another label
            if record.plan.digest == plan.digest:
                return self.result_of(record)
        return self._confirmed(plan.digest) or Result(plan, plan.gmacs)

    def result(self) -> TuneResult:
        """The ``--json`` document."""
        facts, config = self.facts, self.facts["config"]
        front = self.front()
        return TuneResult(
            study=self.name,
            status=facts.get("status", "running"),
            seconds=facts.get("seconds", 0.0),
            tracking_uri=facts.get("tracking_uri", ""),
            parent_run_id=facts.get("parent_run_id", ""),
            model=config["model"],
            device=facts["device"],
            images=facts["images"],
            similarity_curve=facts["similarity_curve"],
            delay=facts["delay"],
            budget=BudgetReport(
                ms=self.limits.ms,
                gmacs=self.limits.gmacs,
                stat=config["latency_stat"],
                batch_size=config["batch_size"],
                satisfiable=facts["satisfiable"] if self._own_budget else self._is_reachable,
                dense_fits=self.reference("dense").feasible,
                fastest_ms=facts.get("fastest_ms"),
                fastest_gmacs=facts["fastest_gmacs"],
            ),
            dense=self.reference("dense"),
            tome=self.reference("tome"),
            dsm=self.reference("dsm"),
            trials=self.counts(),
            front=front,
            chosen=self.choose(front),
            faults=self.faults(),
        )


def _divergence(result: Result, final: bool) -> float:
    value = result.divergence if final else result.divergence_search
    return math.inf if value is None else value


# -- from storage ---------------------------------------------------------------------------------


def load_study(storage: str, name: str) -> Study:
    """Open a study of ours.

    Raises:
        StudyError: if there is none of this name, or another program made it.
    """
    found = Study.load(storage, name)
    if "config" not in found.facts:
        raise StudyError(f"the study {name!r} must be one of dsm-tune, but another program made it")
    return found


def show(
    study: str,
    *,
    storage: str | None = None,
    budget_ms: float | str | None = None,
    budget_gflops: float | str | None = None,
) -> TuneResult:
    """Read a study's answer, also while it runs; nothing is written.

    Args:
        study: its name.
        storage: database URL; as for :func:`dsm_tune.tune`.
        budget_ms, budget_gflops: pick by another budget.

    Raises:
        StudyError: if there is no such study, or its search has not begun.
    """
    found = load_study(absolute_storage(storage, Path.cwd()), study)
    if found.facts.get("limits") is None:
        raise StudyError(f"the study {study!r} has not begun its search yet; try again in a moment")
    if budget_ms is None and budget_gflops is None:
        return Answer.of(found).result()
    facts = found.facts
    if budget_ms is not None and facts.get("profile") is None:
        raise ConfigError(
            "--budget-ms needs a study that was tuned for latency; this one has no profile"
        )
    asked = parse_budget(budget_ms, budget_gflops)
    limits = resolve_budget(asked, facts["dense_gmacs"], facts["dense_ms"])
    return Answer.of(found, limits).result()


def parse_budget(ms: float | str | None, gmacs: float | str | None) -> dict[str, Limit]:
    """Read the bounds that were given, by unit."""
    given = {"ms": (ms, "--budget-ms"), "gmacs": (gmacs, "--budget-gflops")}
    return {
        k: parse_limit(value, option) for k, (value, option) in given.items() if value is not None
    }


def resolve_budget(
    asked: Mapping[str, Limit],
    dense_gmacs: float,
    dense_ms: float | None,
    drop: float | None = None,
) -> Limits:
    """Turn shares of the dense model's cost into absolute bounds."""
    gmacs = asked["gmacs"].resolve(dense_gmacs) if "gmacs" in asked else None
    ms = share = None
    if "ms" in asked and dense_ms is not None:
        ms = asked["ms"].resolve(dense_ms)
        share = asked["ms"].value if asked["ms"].of_dense else None
    return Limits(gmacs, ms, drop, share)
