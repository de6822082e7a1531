"""The one writer of MLflow: a study is a run, its trials are the children; twice is once."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from dsm_tune.errors import StudyError
from dsm_tune.results import Result, Trial, TuneResult
from dsm_tune.reviewing import records, stores
from dsm_tune.reviewing.records import Record, StudyLabels

__all__ = ["StudyLabels", "StudyRuns"]

PAGE = 1000
BATCH = 100  # params and tags that one request may carry
NO_RUN = ("duplicate", "running")  # states of trials that have none: their plan has one, or will
STATUS = {"running": "RUNNING", "interrupted": "KILLED", "failed": "FAILED"}


@dataclasses.dataclass
class _Run:
    """What is known to stand in one MLflow run, so that only differences are written."""

    run_id: str
    status: str = "RUNNING"
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)


class StudyRuns:
    """The runs of one study in one MLflow store. Not for use by several threads at once.

    Attributes:
        written: ids of the runs of which something was not there yet.
    """

    def __init__(
        self,
        client: Any,
        experiment_id: str,
        parent: Any,
        labels: StudyLabels,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._labels = labels
        self._clock = clock
        self._last_stamp = 0
        self.written: set[str] = set()
        self._parent = _known(parent)
        self._children = self._read_children()
        history = client.get_metric_history(self.parent_run_id, "trials_done")
        self._steps = {metric.step for metric in history}

    @classmethod
    def open(
        cls,
        tracking_uri: str,
        experiment: str,
        labels: StudyLabels,
        *,
        runs_now: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> StudyRuns:
        """Find the study's run by its id, or create it, and read which trials it has.

        Args:
            tracking_uri: absolute, as ``stores.resolve_tracking_uri`` returns it.
            experiment: name of the MLflow experiment.
            labels: what the study is called and known by.
            runs_now: whether the study goes on, so that a run that had ended is running again.
            clock: gives seconds since 1970.

        Raises:
            StudyError: if the store cannot be reached, read or written.
        """
        client = stores.connect(tracking_uri)
        try:
            with stores.quietly():
                experiment_id = stores.find_experiment(client, experiment)
                parent = _find_or_create_parent(client, experiment_id, labels, clock)
                runs = cls(client, experiment_id, parent, labels, clock)
                record = records.of_study(labels)
                status = record.status if runs_now else ""
                runs._write(runs._parent, dataclasses.replace(record, status=status))
                runs._log_images(parent)
                return runs
        except StudyError:
            raise
        except Exception as error:  # as in `connect`
            raise stores.unusable(tracking_uri, error) from error

    @property
    def parent_run_id(self) -> str:
        """The study's run."""
        return self._parent.run_id

    @property
    def run_ids(self) -> dict[int, str]:
        """The runs of all trials that have one, by number."""
        return {number: child.run_id for number, child in self._children.items()}

    def run_id(self, trial_number: int) -> str | None:
        """Return the run of a trial, or ``None`` if it has none."""
        child = self._children.get(trial_number)
        return None if child is None else child.run_id

    def log_trial(self, trial: Trial, result: Result | None = None) -> None:
        """Write a trial that has ended; others get no run, nor do duplicates.

        Args:
            trial: it.
            result: its confirmed measurement, if there is one.
        """
        if trial.state in NO_RUN:
            return
        record = records.of_trial(trial, result, self._labels)
        child = self._children.get(trial.number)
        with stores.quietly():
            if child is None:
                child = self._create_child(trial, record)
            elif child.tags.get("state") == trial.state and "pareto" in child.metrics:
                record = _without_verdict(record)  # log_outcome knows better
            self._write(child, record)
            if trial.plan is not None and "plan" not in record.tags:
                self._client.log_text(child.run_id, trial.plan.to_json(), "plan.json")

    def log_progress(
        self, step: int, hypervolume: float | None, best_divergence: float | None, trials_done: int
    ) -> None:
        """Write the study's progress at a step; a step that is there already is left as it is."""
        if step in self._steps:
            return
        values = {"hypervolume": hypervolume, "best_divergence": best_divergence}
        values["trials_done"] = trials_done
        stamp = self._stamp()
        metrics = [Metric(name, v, stamp, step) for name, v in records.finite(values).items()]
        with stores.quietly():
            self._client.log_batch(self.parent_run_id, metrics=metrics)
        self.written.add(self.parent_run_id)
        self._steps.add(step)

    def log_outcome(
        self, result: TuneResult, trials: Sequence[Trial], artifacts: Mapping[str, bytes | str]
    ) -> None:
        """Write the answer: the note, the confirmed figures, the final front, the artifacts.

        Args:
            result: of the study; its front is the final truth for the tags of all trials.
            trials: all of them; those without a run get one.
            artifacts: by file name.
        """
        references = [result.dense, result.tome, result.dsm]
        confirmed = _by_digest([*references, *result.front, result.chosen])
        front = set(_by_digest(result.front))
        chosen = None if result.chosen is None else result.chosen.plan.digest
        for trial in trials:
            self.log_trial(trial)
            if child := self._children.get(trial.number):
                digest = trial.plan.digest if trial.plan and trial.state == "complete" else ""
                with stores.quietly():
                    self._write(child, _final(trial, confirmed.get(digest), digest in front))
                    self._mark_chosen(child, digest == chosen)
        with stores.quietly():
            tags = {"mlflow.note.content": records.note(result), "status": result.status}
            self._write(self._parent, Record("", "", {}, records.of_chosen(result), tags))
            self._log_artifacts(artifacts)

    def close(self, status: str) -> None:
        """End the study's run.

        Args:
            status: the study's: ``running``, ``interrupted``, ``failed``, ``done``, ``infeasible``.
        """
        with stores.quietly():
            self._write(self._parent, Record("", STATUS.get(status, "FINISHED"), {}, {}, {}))

    def _read_children(self) -> dict[int, _Run]:
        where = f"tags.`mlflow.parentRunId` = '{self.parent_run_id}'"
        children: dict[int, _Run] = {}
        for run in _search(self._client, self._experiment_id, where):
            number = int(run.data.tags.get("dsm_tune.trial", -1))
            if number in children:  # a request was repeated, or two writers met: keep the first
                self._client.delete_run(run.info.run_id)
            elif number >= 0:
                children[number] = _known(run)
        return children

    def _create_child(self, trial: Trial, record: Record) -> _Run:
        tags = record.tags | {"mlflow.parentRunId": self.parent_run_id}
        started = self._stamp() - int(1000 * trial.seconds)
        run = self._client.create_run(self._experiment_id, started, tags, record.name)
        self.written.add(run.info.run_id)
        self._children[trial.number] = _known(run)
        return self._children[trial.number]

    def _write(self, run: _Run, record: Record) -> None:
        """Write what differs from what is known to be there; the status comes last."""
        params = {k: v for k, v in record.params.items() if k not in run.params}
        metrics = {k: v for k, v in record.metrics.items() if run.metrics.get(k) != v}
        tags = {k: v for k, v in record.tags.items() if run.tags.get(k) != v}
        stamp = self._stamp()
        points = [Metric(k, v, stamp, 0) for k, v in metrics.items()]
        if params or metrics or tags or record.status not in ("", run.status):
            self.written.add(run.run_id)
        for start in range(0, max(len(params), len(tags), bool(points)), BATCH):
            self._client.log_batch(
                run.run_id,
                metrics=[] if start else points,
                params=[Param(k, v) for k, v in list(params.items())[start : start + BATCH]],
                tags=[RunTag(k, v) for k, v in list(tags.items())[start : start + BATCH]],
            )
        run.params |= params
        run.metrics |= metrics
        run.tags |= tags
        if record.status not in ("", run.status):
            if record.status == "RUNNING":
                self._client.update_run(run.run_id, "RUNNING")
            else:
                self._client.set_terminated(run.run_id, record.status, stamp)
            run.status = record.status

    def _mark_chosen(self, child: _Run, chosen: bool) -> None:
        if chosen or "chosen" in child.tags:
            self._write(child, Record("", "", {}, {}, {"chosen": "true" if chosen else "false"}))

    def _log_images(self, parent: Any) -> None:
        """Name the images as MLflow names data sets, those that are not there yet."""
        known = {one.dataset.digest for one in parent.inputs.dataset_inputs}
        inputs = []
        for one in self._labels.images:
            source, profile = json.dumps({"uri": one.source}), json.dumps({"images": one.count})
            data = Dataset(one.name, one.digest, "local", source, profile=profile)
            if one.digest not in known:
                inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", one.split)]))
        if inputs:
            self._log_inputs(inputs)
            self.written.add(self.parent_run_id)

    def _log_inputs(self, inputs: Sequence[Any]) -> None:
        """Name data sets; another study on the same images may be naming them at this moment."""
        for last in (False, False, True):
            try:
                self._client.log_inputs(self.parent_run_id, datasets=inputs)
            except MlflowException as error:
                if last or "datasets" not in str(error):
                    raise
            else:
                break

    def _log_artifacts(self, artifacts: Mapping[str, bytes | str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in artifacts.items():
                data = content.encode() if isinstance(content, str) else content
                (Path(folder) / name).write_bytes(data)
            if artifacts:
                self._client.log_artifacts(self.parent_run_id, folder)

    def _stamp(self) -> int:
        """Milliseconds, never the same twice: of two values of a metric the later stamp counts."""
        self._last_stamp = max(int(1000 * self._clock()), self._last_stamp + 1)
        return self._last_stamp


def _find_or_create_parent(
    client: Any, experiment_id: str, labels: StudyLabels, clock: Callable[[], float]
) -> Any:
    """Of several writers that create the run at the same time, all settle on the same one."""
    where = f"tags.`dsm_tune.study_id` = '{labels.study_id}'"
    found = list(_search(client, experiment_id, where))
    if not found:
        record = records.of_study(labels)
        own = client.create_run(experiment_id, int(1000 * clock()), record.tags, record.name)
        found = list(_search(client, experiment_id, where)) or [own]
    found.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    for extra in found[1:]:
        client.delete_run(extra.info.run_id)
    return found[0]


def _search(client: Any, experiment_id: str, where: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], where, max_results=PAGE, order_by=["start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _known(run: Any) -> _Run:
    info, data = run.info, run.data
    return _Run(info.run_id, info.status, dict(data.params), dict(data.metrics), dict(data.tags))


def _without_verdict(record: Record) -> Record:
    """Leave out what only the end of a study knows."""
    tags, metrics = records.verdict(pareto=False, feasible=False)
    return dataclasses.replace(
        record,
        tags={k: v for k, v in record.tags.items() if k not in tags},
        metrics={k: v for k, v in record.metrics.items() if k not in metrics},
    )


def _final(trial: Trial, result: Result | None, on_front: bool) -> Record:
    feasible = trial.feasible if result is None else result.feasible
    tags, metrics = records.verdict(pareto=on_front, feasible=feasible)
    return Record("", "", {}, metrics | (records.measured(result) if result else {}), tags)


def _by_digest(results: Sequence[Result | None]) -> dict[str, Result]:
    return {result.plan.digest: result for result in results if result is not None}
