"""The bridge: model + images → curve → delay D → space → trials → front → MLflow → a choice."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dsm_tune.answer import Answer, costing, load_study, parse_budget, resolve_budget, show
from dsm_tune.config import TuneConfig, absolute_storage
from dsm_tune.diagnosis import check_cluster, check_database
from dsm_tune.errors import ConfigError, StudyError
from dsm_tune.inputs import (
    CURVE_IMAGES,
    Inputs,
    Payload,
    dense_batch,
    judge,
    load_inputs,
    make_evaluate,
    make_evaluators,
)
from dsm_tune.measuring.quality import PerImage, bootstrap_interval
from dsm_tune.merging.similarity import (
    delay_stability,
    detect_delay,
    find_transition,
    similarity_curves,
)
from dsm_tune.plan import MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.results import LatencyMs, Result, TuneResult
from dsm_tune.reviewing.outcome import artifacts, open_queue
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.stores import resolve_tracking_uri
from dsm_tune.searching import engine
from dsm_tune.searching.budget import Limits
from dsm_tune.searching.engine import Cluster, Crew
from dsm_tune.searching.search import Planner, Progress, Search
from dsm_tune.searching.space import Choices, load_space
from dsm_tune.searching.study import Study, study_names
from dsm_tune.target import TargetDevice

__all__ = ["Listener", "resume", "show", "tune"]

SEARCH, HELD_OUT = 0, 1  # the image sets, as the crew has them
MOST_CONFIRMED = 10  # plans of the front that are measured at the end
DENSE_FITS_SHARE = 0.75  # of the dense GMACs, for the front that is shown where dense fits


class Listener(Protocol):
    """Is told what happens."""

    def say(self, text: str) -> None:
        """One line about a phase that begins or a fact that was found."""

    def progress(self, progress: Progress) -> None:
        """A trial has ended."""


class _Silent:
    def say(self, text: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...


def tune(
    config: TuneConfig,
    *,
    listener: Listener | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Find the plans of a model that meet a budget, closest to the dense model.

    Args:
        config: what is asked. A study of the same name and configuration is continued.
        listener: is told what happens.
        clock: returns seconds.

    Returns:
        The answer; ``chosen`` is ``None`` and ``status`` is ``infeasible`` where nothing fits.

    Raises:
        DsmTuneError: one of its kinds, for input that cannot be used; nothing is stored then.
    """
    return _Tune(config.absolute(Path.cwd()), listener or _Silent(), clock).run()


def resume(
    study: str,
    *,
    storage: str | None = None,
    listener: Listener | None = None,
    clock: Callable[[], float] = time.monotonic,
    **changes: Any,
) -> TuneResult:
    """Go on with a study after an interruption, or with more trials.

    Args:
        study: its name.
        storage: database URL; as for :func:`tune`.
        listener: is told what happens.
        clock: returns seconds.
        changes: options of :class:`TuneConfig` that may change: ``trials``, ``timeout`` …

    Raises:
        StudyError: if there is no such study, or it was made for a module rather than a name.
    """
    url = absolute_storage(storage, Path.cwd())
    facts = load_study(url, study).facts
    stored = facts["config"]
    if not stored.get("by_name", True):
        raise StudyError(
            f"the study {study!r} was made for a module in Python; "
            "call dsm_tune.tune with that module"
        )
    options = {
        **{k: v for k, v in stored.items() if k != "by_name"},
        "study": study,
        "storage": url,
        "tracking_uri": facts.get("tracking_uri"),  # where its runs are, wherever this one is
    }
    config = TuneConfig.from_dict(
        {**options, **{k: v for k, v in changes.items() if v is not None}}
    )
    return _Tune(config.absolute(Path.cwd()), listener or _Silent(), clock).run()


class _Tune:
    """One run of a study, phase by phase; each phase stores what it found."""

    def __init__(self, config: TuneConfig, listener: Listener, clock: Callable[[], float]) -> None:
        self.config, self.listener, self.clock = config, listener, clock
        self.asked = parse_budget(config.budget_ms, config.budget_gflops)
        self.space = load_space(config.search_space)
        self.tracking_uri = resolve_tracking_uri(config.tracking_uri, Path.cwd())
        self.target = TargetDevice(config)
        self.start = clock()

    def run(self) -> TuneResult:
        """Go through all phases, skipping what is stored already."""
        inputs = load_inputs(self.config)
        for line in inputs.skipped:
            self.listener.say(f"skipped {line}")
        identity = self._identity(inputs)
        found = self._find(identity)
        if found is not None and self._is_complete(found):
            self.listener.say(f"the study {found.name} is finished already; --trials continues it")
            return Answer.of(found).result()
        self.cluster = self._cluster()
        self.target.check(inputs.geometry)
        self._refuse_what_does_not_answer(found is None)
        with engine.connected(self.cluster):
            study = found or self._create(identity)  # not before all that can be refused has been
            self.earlier_seconds = study.facts.get("seconds", 0.0)
            self._send(inputs)
            search_set = self._dense_outputs(SEARCH)
            if "limits" not in study.facts:
                self._prepare(study, inputs)
            study.put("status", "running")
            queue = open_queue(
                study.name, study.facts, self.tracking_uri, self.config, self.listener.say
            )
            try:
                stopped = self._search(study, inputs, search_set, queue)
                if stopped == "interrupted":
                    return self._end(study, queue, "interrupted")
                queue.drain(timeout=60.0)  # nothing else shall run while plans are timed
                self._confirm(study, inputs)
                front = Answer.of(study).front()
                return self._end(study, queue, "done" if front else "infeasible")
            except BaseException:
                study.put("status", "interrupted")
                queue.close(timeout=5.0)
                raise

    # -- phases ---------------------------------------------------------------------------------

    def _identity(self, inputs: Inputs) -> dict[str, Any]:
        """What a study of this name must have been made with."""
        digest = inputs.search.digest + inputs.holdout.digest
        return {**self.config.identity(), "images_digest": digest}

    def _refuse_what_does_not_answer(self, is_new: bool) -> None:
        """Look at the cluster and at a new study's store before anything is begun."""
        cluster = check_cluster(self.config.ray_address)
        if cluster.status == "failed":
            raise ConfigError(f"--ray-address must be a Ray cluster that answers: {cluster.detail}")
        assert self.config.storage is not None  # `absolute` has set it
        if not is_new:
            return
        check = check_database("study store", self.config.storage)
        if check.status == "failed":
            raise StudyError(f"--storage must be a usable database: {check.detail}")

    def _create(self, identity: dict[str, Any]) -> Study:
        config = self.config
        assert config.storage is not None  # `absolute` has set it
        facts = {
            "config": {**config.to_dict(), "by_name": isinstance(config.model, str)},
            "identity": identity,
            "study_id": os.urandom(16).hex(),
        }
        self.listener.say(f"study {config.study_name}")
        return Study.create(config.storage, config.study_name, facts)

    def _find(self, identity: dict[str, Any]) -> Study | None:
        """Open the study of this name, if there is one."""
        config = self.config
        assert config.storage is not None  # `absolute` has set it
        if config.study_name not in study_names(config.storage):
            return None
        found = load_study(config.storage, config.study_name)
        for key, value in identity.items():
            stored = found.facts["identity"].get(key)
            if stored != value:
                raise StudyError(
                    f"the study {config.study_name!r} exists with another {key}: "
                    f"{stored!r:.80}, not {value!r:.80}; "
                    "accepted are the same configuration or another --study"
                )
        self.listener.say(f"continuing the study {config.study_name}")
        return found

    def _is_complete(self, study: Study) -> bool:
        if study.facts.get("status") not in ("done", "infeasible"):
            return False
        if not study.facts["satisfiable"]:
            return True
        ended = [r for r in study.records() if r.state != "running"]
        return len(ended) >= self.config.trials or bool(study.facts.get("exhausted"))

    def _cluster(self) -> Cluster:
        gpus = torch.cuda.device_count() if self.target.device.startswith("cuda") else 0
        workers = self.config.workers or (gpus or os.cpu_count() or 1)
        return Cluster(self.config.ray_address, workers, min(1.0, gpus / workers) if gpus else 0.0)

    def _send(self, inputs: Inputs) -> None:
        """Start the crew and give it the model and both image sets."""
        self.payloads = [
            Payload.of(inputs.model, images, self.target.device, self.config.dtype)
            for images in (inputs.search, inputs.holdout)
        ]
        self.crew = Crew(partial(make_evaluators, self.payloads), self.cluster)

    def _dense_outputs(self, which: int) -> Payload:
        """Run the dense model over one image set, once for all plans."""
        payload = self.payloads[which]
        self.listener.say(f"dense outputs of {len(payload.labels)} images")
        outputs = self.crew.map(dense_batch, [(which, batch) for batch in range(payload.batches)])
        return dataclasses.replace(payload, dense=np.concatenate(outputs))

    def _prepare(self, study: Study, inputs: Inputs) -> None:
        """Find D, the profile where latency is bounded, and whether the budget can be met."""
        config, geometry = self.config, inputs.geometry
        curves = similarity_curves(inputs.model, inputs.search.pixels[:CURVE_IMAGES])
        curve = [float(value) for value in curves.mean(dim=0)]
        delay = detect_delay(curve)
        stability = delay_stability(curves, seed=config.seed)
        share = stability.get(delay, 0.0)
        how = (
            ""
            if find_transition(curve) is not None
            else " (the curve shows no transition: depth / 6)"
        )
        self.listener.say(
            f"delay D = {delay} of {geometry.depth} blocks{how}, in {share:.0%} of resamples"
        )
        dense = MergePlan(config.model_name, geometry)
        profile = self.target.given
        if profile is None and "ms" in self.asked:
            profile = self._measure_profile(inputs)
        dense_ms = None if profile is None else profile.predict(dense)
        limits = resolve_budget(self.asked, dense.gmacs, dense_ms, config.max_drop)
        planner = self._planner(inputs, delay, limits, profile)
        fastest = planner.fastest()
        satisfiable = limits.excess(planner.cost_of(fastest)) <= 0
        for key, value in {
            "images": {
                "search": len(inputs.search),
                "holdout": len(inputs.holdout),
                "labelled": inputs.labelled,
            },
            "device": self.target.facts(profile),
            "similarity_curve": curve,
            "stability": {str(d): s for d, s in stability.items()},
            "delay": delay,
            "profile": None if profile is None else profile.to_json(),
            "dense_gmacs": dense.gmacs,
            "dense_ms": dense_ms,
            "dense_digest": dense.digest,
            "fastest_ms": None if profile is None else planner.cost_of(fastest).ms,
            "fastest_gmacs": fastest.gmacs,
            "fastest": fastest.to_json(),
            "satisfiable": satisfiable,
            "references": {k: p.to_json() for k, p in planner.known().items()},
            "tracking_uri": self.tracking_uri,
            "limits": dataclasses.asdict(limits),  # last: a study with limits is prepared
        }.items():
            study.put(key, value)
        self._say_budget(limits, dense, dense_ms, satisfiable, planner.cost_of(fastest))

    def _say_budget(
        self,
        limits: Limits,
        dense: MergePlan,
        dense_ms: float | None,
        satisfiable: bool,
        fastest: Any,
    ) -> None:
        reach = f"{fastest.gmacs:.3g} GMACs" + (
            f", {fastest.ms:.3g} ms" if fastest.ms is not None else ""
        )
        have = f"{dense.gmacs:.3g} GMACs" + (f", {dense_ms:.3g} ms" if dense_ms is not None else "")
        wanted = [
            f"{limits.ms:.3g} ms" if limits.ms else "",
            f"{limits.gmacs:.3g} GMACs" if limits.gmacs else "",
        ]
        self.listener.say(
            f"budget {' and '.join(filter(None, wanted))}; dense {have}; "
            f"fastest reachable {reach}; satisfiable: {'yes' if satisfiable else 'no'}"
        )

    def _measure_profile(self, inputs: Inputs) -> DeviceProfile:
        """Measure a device profile here and now."""
        self.listener.say(f"device profile at batch size {self.config.batch_size}")
        features = self.space.parameters["feature"]
        names = features.values if isinstance(features, Choices) else ("k",)
        profile = self.target.profile(inputs, names, self.cluster)
        self.listener.say(
            f"its predictions are off by {profile.error:.0%} at most, on plans measured whole"
        )
        return profile

    def _planner(
        self, inputs: Inputs, delay: int, limits: Limits, profile: DeviceProfile | None
    ) -> Planner:
        cost_of = costing(profile)
        dense_cost = cost_of(MergePlan(self.config.model_name, inputs.geometry))
        fits = limits.excess(dense_cost) <= 0
        targets = limits
        if fits:
            targets = dataclasses.replace(limits, gmacs=dense_cost.gmacs * DENSE_FITS_SHARE)
        elif profile is not None and limits.ms is not None:
            targets = dataclasses.replace(limits, ms=limits.ms / (1 + min(profile.error, 0.1)))
        space = self.space.bind(inputs.geometry, delay)
        return Planner(
            space,
            inputs.geometry,
            delay,
            limits,
            targets,
            cost_of,
            self.config.model_name,
            by_gmacs=fits,
        )

    def _search(self, study: Study, inputs: Inputs, payload: Payload, queue: TrackingQueue) -> str:
        """Run the trials; returns why they ended early, or an empty text."""
        facts = study.facts
        limits = Limits(**facts["limits"])
        profile = None if facts["profile"] is None else DeviceProfile.from_json(facts["profile"])
        planner = self._planner(inputs, facts["delay"], limits, profile)
        size = planner.space.size
        trials = self.config.trials if facts["satisfiable"] else 3  # dense, ToMe and DSM
        self.listener.say(
            f"searching {'∞' if size == float('inf') else f'{size:.0f}'} shapes of "
            f"{planner.space.name}: {trials} trials on {len(inputs.search)} images, "
            f"{self.cluster.workers} workers"
        )

        answer = Answer.of(study)  # once: reading all trials at the end of each would be quadratic

        def on_progress(progress: Progress) -> None:
            self.listener.progress(progress)
            queue.log_trial(answer.trial(progress.record))
            queue.log_progress(
                progress.done, progress.hypervolume, progress.best_divergence, progress.done
            )
            study.put("seconds", self._seconds())

        search = Search(
            study,
            planner,
            images=len(inputs.search),
            trials=trials,
            seed=self.config.seed,
            on_progress=on_progress,
        )
        end = None if self.config.timeout is None else self.clock() + self.config.timeout
        engine.run_search(
            search,
            partial(make_evaluate, payload),
            self.cluster,
            deadline=lambda: end is not None and self.clock() > end,
        )
        if search.stopped:
            self.listener.say(f"the search ended early: {search.stopped}")
            study.put("exhausted", search.stopped.startswith("no further"))
        return search.stopped

    def _confirm(self, study: Study, inputs: Inputs) -> None:
        """Measure the front and the references alone, and judge them on held-out images."""
        stored = dict(study.facts.get("confirmed", {}))
        plans = self._to_confirm(study)
        known = [plan for plan in plans if plan.digest in stored]
        if len(known) == len(plans):
            return
        self.listener.say(f"confirming {len(plans)} plans on {len(inputs.holdout)} held-out images")
        payload = self._dense_outputs(HELD_OUT)
        assert payload.dense is not None  # `_dense_outputs` has set it
        judged = self.crew.map(partial(judge, dense=payload.dense), plans)
        self.listener.say("timing them alone, in turn with the dense model")
        device, timed = self.target.confirm(inputs, plans, self.cluster)
        profile = (
            None
            if study.facts["profile"] is None
            else DeviceProfile.from_json(study.facts["profile"])
        )
        for plan, per_image, found in zip(plans, judged, timed, strict=True):
            predicted = None if profile is None else profile.predict(plan)
            latency = dataclasses.replace(found.latency_ms, predicted=predicted)
            result = _result(plan, per_image, latency, self.config.batch_size)
            stored[plan.digest] = {"result": result.to_dict(), "ratio_high": found.ratio_high}
        study.put("confirmed_on", device)
        study.put("confirmed", stored)

    def _to_confirm(self, study: Study) -> list[MergePlan]:
        """Dense, ToMe, DSM, then the front, thinned to a number that can be measured well."""
        answer = Answer.of(study)
        plans = [answer.reference(label).plan for label in ("dense", "tome", "dsm")]
        front = answer.front()
        if len(front) > MOST_CONFIRMED:
            step = (len(front) - 1) / (MOST_CONFIRMED - 1)
            front = [front[round(i * step)] for i in range(MOST_CONFIRMED)]
        plans += [result.plan for result in front]
        return list({plan.digest: plan for plan in plans}.values())

    def _end(self, study: Study, queue: TrackingQueue, status: str) -> TuneResult:
        study.put("seconds", self._seconds())
        study.put("status", status)
        answer = Answer.of(study)
        result = answer.result()
        queue.drain(timeout=60.0)
        ids = {r.number: queue.run_id(r.number) for r in answer.records}
        study.put("run_ids", {str(number): run for number, run in ids.items() if run})
        study.put("parent_run_id", queue.parent_run_id or "")
        answer = Answer.of(study)
        result = answer.result()
        trials = answer.trials(result.front)
        queue.log_outcome(
            result,
            trials,
            artifacts(result, trials, self.config.command) if status != "interrupted" else {},
        )
        queue.close_runs(status)
        if not queue.close(timeout=120.0):
            self.listener.say(
                f"MLflow lacks {queue.dropped} writes ({queue.error}); the study itself is whole"
            )
        return result

    def _seconds(self) -> float:
        return float(self.earlier_seconds + self.clock() - self.start)


def _result(plan: MergePlan, per_image: PerImage, latency: LatencyMs, batch_size: int) -> Result:
    quality = per_image.summary()
    low, high = bootstrap_interval(per_image.divergence)
    return Result(
        plan=plan,
        gmacs=plan.gmacs,
        divergence=quality.divergence,
        divergence_low=low,
        divergence_high=high,
        agreement=quality.agreement,
        top1=quality.top1,
        top5=quality.top5,
        latency_ms=latency,
        throughput=None if not latency.p50 else 1e3 * batch_size / latency.p50,
    )
