"""What a study found, as data: one trial, one measured result, one study."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dsm_tune.plan import MergePlan

__all__ = [
    "FAULTS",
    "REFERENCES",
    "BudgetReport",
    "Evaluation",
    "Fault",
    "LatencyMs",
    "Result",
    "Trial",
    "TuneResult",
]

REFERENCES = ("dense", "tome", "dsm")  # known plans that all others are compared with
# Kinds of what may go wrong, in the order in which they are shown.
FAULTS = ("worker", "call", "start", "store", "driver", "clock", "tracking", "trial")


@dataclasses.dataclass(frozen=True)
class LatencyMs:
    """Latency of one forward in milliseconds; ``None`` for what was not measured.

    Attributes:
        p50, p90, p99: percentiles over forwards.
        low, high: 95 % bootstrap interval of the study's statistic (p50 unless told otherwise).
        predicted: what the device profile says.
        ratio_to_dense: median over forwards of plan / dense, measured in turn in one run.
        device_p50: median between two events on a CUDA device; all others are of the host's
            clock, from the launch to the device's end.
    """

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    low: float | None = None
    high: float | None = None
    predicted: float | None = None
    ratio_to_dense: float | None = None
    device_p50: float | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """One plan with its cost and its quality on the held-out images.

    Attributes:
        run_id: of its MLflow run, if it has one.
        trial: number of its trial in the study, if it is one.
        gmacs: giga multiply-adds per image.
        latency_ms: measured on the target device.
        throughput: images per second at the study's batch size.
        divergence: mean KL(dense ‖ merged) in nats, on held-out images; for a model without a
            head, mean 1 - cosine of the pooled features.
        divergence_low, divergence_high: 95 % bootstrap interval of it over images.
        divergence_search: the same on the images that the search used.
        agreement: share of held-out images with the dense model's class, from 0 to 1.
        top1, top5: accuracy from 0 to 1; ``None`` without labels.
        feasible: whether it meets the budget (upper end of the interval).
        plan: the merge plan.
    """

    plan: MergePlan
    gmacs: float
    divergence: float | None = None
    agreement: float | None = None
    top1: float | None = None
    top5: float | None = None
    divergence_low: float | None = None
    divergence_high: float | None = None
    divergence_search: float | None = None
    latency_ms: LatencyMs = LatencyMs()
    throughput: float | None = None
    feasible: bool = False
    trial: int | None = None
    run_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return RESULT of the ``--json`` document."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plan = json.loads(self.plan.to_json())
        return {**body, "latency_ms": dataclasses.asdict(self.latency_ms), "plan": plan}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Result:
        """Read what :meth:`to_dict` wrote."""
        latency = LatencyMs(**body["latency_ms"])
        return cls(**{**body, "latency_ms": latency, "plan": MergePlan.from_dict(body["plan"])})


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a plan gave: means over ``images`` search images, or an error."""

    images: int
    divergence: float | None = None
    agreement: float | None = None
    top1: float | None = None
    top5: float | None = None
    seconds: float = 0.0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial of a study.

    Attributes:
        number: in the study, from 0.
        generation: in which it was asked, from 0; -1 for what was known before the search.
        label: ``dense``, ``tome``, ``dsm`` … for a known plan; ``""`` for a sampled one.
        state: ``complete``, ``pruned`` (stopped at low fidelity), ``failed`` or ``duplicate``.
        why: the cause, for a state other than ``complete``.
        params: what the sampler drew.
        plan: what was built of it; ``None`` if that failed.
        images: how many images it was evaluated on.
        divergence, agreement, top1: on those images (search split).
        predicted_ms: latency by the device profile, or ``None``.
        seconds: of evaluation.
        pareto: whether it is on the reported front.
        feasible: whether it meets the budget.
    """

    number: int
    generation: int
    label: str
    state: str
    params: dict[str, Any]
    plan: MergePlan | None
    why: str = ""
    images: int = 0
    divergence: float | None = None
    agreement: float | None = None
    top1: float | None = None
    predicted_ms: float | None = None
    seconds: float = 0.0
    pareto: bool = False
    feasible: bool = False


@dataclasses.dataclass(frozen=True)
class BudgetReport:
    """The budget and what is known of it before the search."""

    ms: float | None
    gmacs: float | None
    stat: str
    batch_size: int
    satisfiable: bool
    dense_fits: bool
    fastest_ms: float | None
    fastest_gmacs: float | None = None


@dataclasses.dataclass(frozen=True)
class Fault:
    """What went wrong in a study, and was survived.

    Attributes:
        kind: ``worker``: evaluations started again because a worker or its node had died;
            ``call``: what else had to be started again for that; ``start``: workers that died
            before their first job; ``store``: times the study's store was away; ``driver``:
            runs that ended without a word and were resumed; ``clock``: its jumps during a
            search; ``tracking``: runs in which MLflow failed; ``trial``: trials that failed.
        count: of times.
        detail: of the last time.
    """

    kind: str
    count: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """A study and its answer: the ``--json`` document as attributes.

    Attributes:
        study: its name.
        status: ``running``, ``interrupted``, ``done`` or ``infeasible``.
        seconds: of wall clock so far.
        tracking_uri, parent_run_id: where MLflow has it.
        model: its timm name.
        device: ``name`` and ``fingerprint``.
        images: ``search`` and ``holdout`` counts, ``labelled``.
        similarity_curve: one number per block.
        delay: D.
        budget: what was asked and what is reachable.
        dense, tome, dsm: the references, the latter two fitted to the budget.
        trials: counts by state.
        front: feasible, mutually non-dominated results, ascending in cost.
        chosen: one of them, or ``None``.
        faults: what went wrong and was survived, in the order of :data:`FAULTS`.
    """

    study: str
    status: str
    seconds: float
    tracking_uri: str
    parent_run_id: str
    model: str
    device: dict[str, str]
    images: dict[str, Any]
    similarity_curve: list[float]
    delay: int
    budget: BudgetReport
    dense: Result
    tome: Result
    dsm: Result
    trials: dict[str, int]
    front: list[Result]
    chosen: Result | None
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the ``--json`` document."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["budget"] = dataclasses.asdict(self.budget)
        for name in REFERENCES:
            body[name] = body[name].to_dict()
        body["front"] = [result.to_dict() for result in self.front]
        body["chosen"] = None if self.chosen is None else self.chosen.to_dict()
        body["faults"] = [dataclasses.asdict(fault) for fault in self.faults]
        return body

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> TuneResult:
        """Read what :meth:`to_dict` wrote."""
        parts = dict(body)
        parts["budget"] = BudgetReport(**body["budget"])
        for name in REFERENCES:
            parts[name] = Result.from_dict(body[name])
        parts["front"] = [Result.from_dict(result) for result in body["front"]]
        parts["chosen"] = None if body["chosen"] is None else Result.from_dict(body["chosen"])
        parts["faults"] = [Fault(**fault) for fault in body.get("faults", [])]
        return cls(**parts)
