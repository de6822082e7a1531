"""The bridge: model + images → curve → delay D → space → trials → front → MLflow → a choice."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dsm_tune.answer import Answer, load_study, parse_budget, profile_of, show
from dsm_tune.config import TuneConfig, absolute_storage
from dsm_tune.diagnosis import check_cluster, check_database
from dsm_tune.errors import ConfigError, StudyError
from dsm_tune.inputs import (
    Inputs,
    Outputs,
    Payload,
    dense_batch,
    judge,
    load_inputs,
    make_evaluators,
    try_plan,
)
from dsm_tune.measuring.quality import PerImage, bootstrap_interval
from dsm_tune.merging.loading import weights_digest
from dsm_tune.plan import MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.results import REFERENCES, Result, TuneResult
from dsm_tune.reviewing.outcome import artifacts, open_queue
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.stores import resolve_tracking_uri
from dsm_tune.reviewing.summary import duration_words
from dsm_tune.searching.budget import Limits
from dsm_tune.searching.crew import Cluster, Crew, connected
from dsm_tune.searching.engine import run_search
from dsm_tune.searching.importance import parameter_importance
from dsm_tune.searching.patience import Patience
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.search import Progress, Search
from dsm_tune.searching.space import load_space
from dsm_tune.searching.store import study_names
from dsm_tune.searching.study import Study
from dsm_tune.stopwatch import Stopwatch
from dsm_tune.survey import MOST_CONFIRMED, Survey, make_planner, survey
from dsm_tune.target import TargetDevice, predict_latency
from dsm_tune.token_samples import token_samples
from dsm_tune.versions import versions

__all__ = ["Listener", "dry_run", "resume", "show", "tune"]

BUDGETS = ("budget_ms", "budget_gflops")  # what a study may go on with another value of
SEARCH, HELD_OUT = 0, 1  # the image sets, as the crew has them
MOST_CORRECTIONS = 2  # of the profile by what the confirmation measured
FURTHER_SHARE = 0.25  # of the trials, after a correction
LONGEST_STEP = 60.0  # seconds between two looks at the time limit; more is a jump of the clock
LONGEST_PHASE = 3600.0  # the same for the duration of a study, which is looked at less often


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
        changes: options of :class:`TuneConfig` that may change: ``trials``, ``timeout`` …;
            with ``budget_ms`` or ``budget_gflops`` the study goes on under that budget, for as
            many further trials as it was begun with if ``trials`` does not say otherwise.

    Raises:
        StudyError: if there is no such study, or it was made for a module rather than a name.
    """
    url = absolute_storage(storage, Path.cwd())
    found = load_study(url, study)
    facts, stored = found.facts, found.facts["config"]
    changes = {name: value for name, value in changes.items() if value is not None}
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
    budgets = {name: changes.get(name) for name in BUDGETS}
    if any(budgets.values()):
        is_another = any(stored[name] != value for name, value in budgets.items())
        trials = stored["trials"] + (len(found.records()) if is_another else 0)
        changes = {"trials": trials, **changes, **budgets}
    config = TuneConfig.from_dict({**options, **changes})
    return _Tune(config.absolute(Path.cwd()), listener or _Silent(), clock).run(rebudget=True)


def dry_run(
    config: TuneConfig,
    *,
    listener: Listener | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Survey:
    """Look at model, images and device as :func:`tune` does, and stop there; nothing is stored.

    Args:
        config: as for :func:`tune`.
        listener: is told what is found.
        clock: returns seconds.

    Raises:
        DsmTuneError: as :func:`tune` does.
    """
    return _Tune(config.absolute(Path.cwd()), listener or _Silent(), clock).look()


class _Tune:
    """One run of a study, phase by phase; each phase stores what it found."""

    def __init__(self, config: TuneConfig, listener: Listener, clock: Callable[[], float]) -> None:
        self.config, self.listener, self.clock = config, listener, clock
        self.asked = parse_budget(config.budget_ms, config.budget_gflops)
        self.space = load_space(config.search_space)
        self.tracking_uri = resolve_tracking_uri(config.tracking_uri, Path.cwd())
        self.target = TargetDevice(config)
        self.cluster = self._cluster()
        self.watch = Stopwatch(clock, longest=LONGEST_PHASE)
        self.study: Study | None = None  # once there is one
        self.tracking_error = ""  # that was noted

    def look(self) -> Survey:
        """Go through what comes before a search."""
        inputs = self._load()
        self._refuse_what_does_not_answer(is_new=True)
        with connected(self.cluster):
            self._send(inputs)
            return self._look(inputs, self._dense_outputs(SEARCH), None)

    def run(self, *, rebudget: bool = False) -> TuneResult:
        """Go through all phases, skipping what is stored already.

        Args:
            rebudget: whether a study that was begun with another budget may go on with this one.
        """
        inputs = self._load()
        identity = self._identity(inputs)
        found = self._find(identity, but=BUDGETS if rebudget else ())
        is_another = found is not None and found.facts["identity"] != identity
        if found is not None and self._is_complete(found) and not is_another:
            self.listener.say(f"the study {found.name} is finished already; --trials continues it")
            return Answer.of(found).result()
        self._refuse_what_does_not_answer(found is None)
        with contextlib.ExitStack() as ends:
            if found is not None:
                ends.enter_context(found.driven())
                self.listener.say(f"continuing the study {found.name}")
            ends.enter_context(connected(self.cluster))
            # A study is not made before all that can be refused has been.
            study = found or self._create(identity, weights_digest(inputs.model))
            if found is None:
                ends.enter_context(study.driven())
            study.patience = Patience(self.listener.say)
            self.study = study
            if found is not None and found.facts.get("status", "running") == "running":
                study.note("driver")
            try:
                self.earlier_seconds = study.facts.get("seconds", 0.0)
                self._send(inputs)
                dense = self._dense_outputs(SEARCH)
                if is_another:
                    self._change_budget(study, identity)
                if study.facts.get("limits") is None:
                    facts = self._look(inputs, dense, profile_of(study.facts)).facts
                    for key, value in {"tracking_uri": self.tracking_uri, **facts}.items():
                        study.put(key, value)  # the limits last: a study with limits is prepared
                study.put("status", "running")
                return self._run_phases(study, inputs, dense)
            except BaseException:
                study.patience = None  # nobody waits for a store that was waited for
                with contextlib.suppress(Exception):
                    study.put("status", "interrupted")
                raise

    def _run_phases(self, study: Study, inputs: Inputs, dense: Outputs) -> TuneResult:
        """Search and confirm, until what was found holds."""
        queue = open_queue(
            study.name, study.facts, self.tracking_uri, self.config, self.listener.say
        )
        try:
            while True:
                if self._search(study, inputs, dense, queue) == "interrupted":
                    return self._end(study, queue, "interrupted")
                queue.drain(timeout=60.0)  # nothing else shall run while plans are timed
                self._confirm(study, inputs)
                if not self._correct(study, inputs):
                    break
            self._keep_samples(study, inputs)
            front = Answer.of(study).front()
            return self._end(study, queue, "done" if front else "infeasible")
        except BaseException:
            queue.close(timeout=5.0)
            raise

    def _load(self) -> Inputs:
        inputs = load_inputs(self.config)
        for line in inputs.skipped:
            self.listener.say(f"skipped {line}")
        self.target.check(inputs.geometry)
        return inputs

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

    def _create(self, identity: dict[str, Any], weights: str) -> Study:
        config = self.config
        assert config.storage is not None  # `absolute` has set it
        facts = {
            "config": self._stored_config(),
            "identity": identity,
            "weights_digest": weights,
            "study_id": os.urandom(16).hex(),
            "environment": versions(),
        }
        self.listener.say(f"study {config.study_name}")
        return Study.create(config.storage, config.study_name, facts)

    def _stored_config(self) -> dict[str, Any]:
        by_name = isinstance(self.config.model, str)
        return {**self.config.to_dict(), "storage": None, "by_name": by_name}  # may hold a password

    def _find(self, identity: dict[str, Any], but: Collection[str]) -> Study | None:
        """Open the study of this name, if there is one; it may differ in what ``but`` names."""
        config = self.config
        assert config.storage is not None  # `absolute` has set it
        if config.study_name not in study_names(config.storage):
            return None
        found = load_study(config.storage, config.study_name)
        for key, value in identity.items():
            stored = found.facts["identity"].get(key)
            if stored != value and key not in but:
                raise StudyError(
                    f"the study {config.study_name!r} exists with another {key}: "
                    f"{stored!r:.80}, not {value!r:.80}; "
                    "accepted are the same configuration or another --study"
                )
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
        share = min(1.0, gpus / workers) if gpus else 0.0
        return Cluster(self.config.ray_address, workers, share, on_death=self._note_death)

    def _note_death(self, what: str) -> None:
        self.listener.say(f"a process has died; done again: {what}")
        if self.study is not None:
            self.study.note("call", f"last: {what}")

    def _send(self, inputs: Inputs) -> None:
        """Start the crew and give it the model and both image sets."""
        self.payloads = [
            Payload.of(inputs.model, images, self.target.device, self.config.dtype)
            for images in (inputs.search, inputs.holdout)
        ]
        self.crew = Crew(partial(make_evaluators, self.payloads), self.cluster)

    def _dense_outputs(self, which: int) -> Outputs:
        """Run the dense model over one image set, once for all plans."""
        payload = self.payloads[which]
        self.listener.say(f"dense outputs of {len(payload.labels)} images")
        outputs = self.crew.map(dense_batch, [(which, batch) for batch in range(payload.batches)])
        return np.concatenate(outputs)

    def _make_room(self) -> None:
        """Free the GPUs of a shared cluster: what is timed alone asks Ray for a whole one."""
        if self.cluster.address and self.cluster.gpus_per_worker:
            self.crew.rest()

    def _change_budget(self, study: Study, identity: dict[str, Any]) -> None:
        """Unprepare a study and let it go on under the budget of this configuration.

        What was measured stays: evaluations, confirmations, and the profile as it was corrected.
        """
        facts = study.facts
        begun = max((record.generation for record in study.records()), default=-1) + 1
        profile = profile_of(facts)
        study.put("limits", None)
        study.put("known_at", sorted({*facts.get("known_at", [0]), begun}))
        if profile is not None and facts.get("corrections"):
            study.put("profile", profile.to_json())
            study.put("corrections", [])
        study.put("config", self._stored_config())
        study.put("identity", identity)
        study.put("exhausted", False)

    def _look(self, inputs: Inputs, dense: Outputs, profile: DeviceProfile | None) -> Survey:
        """Find D, the profile where latency is bounded, and whether the budget can be met."""
        payload = self.payloads[SEARCH]
        some = range(min(payload.batches, self.cluster.workers))
        watch = Stopwatch(self.clock)  # once more, as the first time the processes had to start
        self.crew.map(dense_batch, [(SEARCH, batch) for batch in some])
        seconds, images = watch.seconds(), sum(payload.size_of(batch) for batch in some)
        self._make_room()
        return survey(
            self.config,
            inputs,
            self.space,
            self.asked,
            self.target,
            self.cluster,
            profile=profile,
            dense=dense,
            image_seconds=seconds / images,
            say=self.listener.say,
        )

    def _planner(
        self, inputs: Inputs, facts: Mapping[str, Any], profile: DeviceProfile | None
    ) -> Planner:
        limits = Limits(**facts["limits"])
        return make_planner(self.config, inputs, self.space, facts["delay"], limits, profile)

    def _search(self, study: Study, inputs: Inputs, dense: Outputs, queue: TrackingQueue) -> str:
        """Run the trials; returns why they ended early, or an empty text."""
        facts = study.facts
        planner = self._planner(inputs, facts, profile_of(facts))
        trials = self.config.trials if facts["satisfiable"] else 3  # dense, ToMe and DSM
        trials += len(facts.get("corrections", [])) * math.ceil(trials * FURTHER_SHARE)
        self.listener.say(
            f"searching {planner.space.name}: {trials} trials on {len(inputs.search)} images, "
            f"{self.cluster.workers} workers, about {duration_words(facts['estimated_seconds'])}"
        )

        answer = Answer.of(study)  # once: reading all trials at the end of each would be quadratic

        def on_progress(progress: Progress) -> None:
            self.listener.progress(progress)
            queue.log_trial(answer.trial(progress.record))
            queue.log_progress(
                progress.done, progress.hypervolume, progress.best_divergence, progress.done
            )
            study.put("seconds", self._seconds())
            self._note_tracking(study, queue)

        search = Search(
            study,
            planner,
            images=len(inputs.search),
            trials=trials,
            seed=self.config.seed,
            known_at=facts.get("known_at", [0]),
            on_progress=on_progress,
        )
        limit = math.inf if self.config.timeout is None else self.config.timeout
        watch = Stopwatch(self.clock, longest=LONGEST_STEP)
        run_search(
            search,
            self.crew,
            partial(try_plan, dense=dense),
            deadline=lambda: watch.seconds() > limit,
        )
        if watch.jumps:
            study.note("clock", count=watch.jumps)
        if search.stopped:
            self.listener.say(f"the search ended early: {search.stopped}")
            study.put("exhausted", search.stopped.startswith("no further"))
        return search.stopped

    def _confirm(self, study: Study, inputs: Inputs) -> None:
        """Measure the front and the references alone, and judge them on held-out images."""
        known = study.facts.get("confirmed", {})
        plans = self._to_confirm(study)
        new = [plan for plan in plans if plan.digest not in known]
        if not new:
            return
        self.listener.say(f"confirming {len(plans)} plans on {len(inputs.holdout)} held-out images")
        judged = self.crew.map(partial(judge, dense=self._dense_outputs(HELD_OUT)), new)
        results = {d: Result.from_dict(one["result"]) for d, one in known.items()}
        results |= {p.digest: _result(p, one) for p, one in zip(new, judged, strict=True)}
        profile = profile_of(study.facts)
        if profile is not None and self.target.is_elsewhere:
            self.listener.say("the profile is of another device: latencies stay as predicted")
            device, timed = profile.device, predict_latency(profile, plans)
        else:
            self.listener.say("timing them alone, in turn with the dense model")
            self._make_room()
            device, timed = self.target.confirm(inputs, plans, self.cluster)
        confirmed = {}  # only what was timed now: times of two runs do not compare
        for plan, found in zip(plans, timed, strict=True):
            p50 = found.latency_ms.p50
            result = dataclasses.replace(
                results[plan.digest],
                latency_ms=dataclasses.replace(
                    found.latency_ms, predicted=None if profile is None else profile.predict(plan)
                ),
                throughput=None if not p50 else 1e3 * self.config.batch_size / p50,
            )
            confirmed[plan.digest] = {"result": result.to_dict(), "ratio_high": found.ratio_high}
        study.put("confirmed_on", device)
        study.put("confirmed", confirmed)

    def _correct(self, study: Study, inputs: Inputs) -> bool:
        """Whether to search on, with a corrected profile, because no plan proved fast enough.

        The profile is scaled by what plans took over what it said of them, and some more trials
        are asked for, fitted to what it says now.
        """
        facts = study.facts
        corrections = facts.get("corrections", [])
        if len(corrections) >= MOST_CORRECTIONS or not facts["satisfiable"]:
            return False
        answer = Answer.of(study)
        factor = answer.misprediction()
        is_met = any(result.divergence is not None for result in answer.front())
        if is_met or factor is None or factor <= 1:
            return False
        corrections = [*corrections, factor]
        profile = profile_of({**facts, "corrections": corrections})
        planner = self._planner(inputs, facts, profile)
        if planner.limits.excess(planner.cost_of(planner.fastest())) > 0:
            return False
        self.listener.say(
            f"no plan met the budget when timed: plans took {factor:.2f}× what was predicted; "
            "searching on with that corrected"
        )
        study.put("references", {k: plan.to_json() for k, plan in planner.known().items()})
        study.put("corrections", corrections)
        return True

    def _keep_samples(self, study: Study, inputs: Inputs) -> None:
        """Keep what the choice makes of a few images, so that a later sync can draw it too."""
        answer = Answer.of(study)
        answer = dataclasses.replace(answer, facts={**answer.facts, "status": "done"})
        chosen = answer.choose(answer.front())  # as it will be
        if chosen is not None and any(chosen.plan.removed):
            study.put("token_samples", token_samples(inputs, chosen.plan))

    def _to_confirm(self, study: Study) -> list[MergePlan]:
        """Dense, ToMe, DSM, then the front, thinned to a number that can be measured well."""
        answer = Answer.of(study)
        plans = [answer.reference(label).plan for label in REFERENCES]
        front = answer.front()
        if len(front) > MOST_CONFIRMED:
            step = (len(front) - 1) / (MOST_CONFIRMED - 1)
            front = [front[round(i * step)] for i in range(MOST_CONFIRMED)]
        plans += [result.plan for result in front]
        return list({plan.digest: plan for plan in plans}.values())

    def _end(self, study: Study, queue: TrackingQueue, status: str) -> TuneResult:
        study.put("seconds", self._seconds())
        study.put("status", status)
        queue.drain(timeout=60.0)
        ids = {r.number: queue.run_id(r.number) for r in study.records()}
        study.put("run_ids", {str(number): run for number, run in ids.items() if run})
        study.put("parent_run_id", queue.parent_run_id or "")
        answer = Answer.of(study)
        result = answer.result()
        trials = answer.trials(result.front)
        files = {}  # after Ctrl-C nobody wants to wait for figures
        if status != "interrupted":
            importance, samples = parameter_importance(study), study.facts.get("token_samples")
            files = artifacts(result, trials, self.config, importance, samples)
        queue.log_outcome(result, trials, files)
        queue.close_runs(status)
        is_whole = queue.close(timeout=120.0)
        self._note_tracking(study, queue)
        if not is_whole:
            self.listener.say(
                f"MLflow lacks {queue.dropped} writes ({queue.error}); the study itself is whole, "
                f"`dsm-tune sync {study.name}` writes what is missing"
            )
        return dataclasses.replace(result, faults=Answer.of(study).faults())

    def _note_tracking(self, study: Study, queue: TrackingQueue) -> None:
        """Note once in a run that MLflow failed."""
        if queue.error and not self.tracking_error:
            self.tracking_error = queue.error
            study.note("tracking", queue.error)

    def _seconds(self) -> float:
        return float(self.earlier_seconds + self.watch.seconds())


def _result(plan: MergePlan, per_image: PerImage) -> Result:
    """A plan as it was judged, not timed yet."""
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
    )
