"""A study in an Optuna storage: its facts, its trials, and what each trial has cost so far.

A trial is added whole (parameters, plan, place in its generation) in one transaction, and every
evaluation is stored before anything is done with it: after a crash nothing has to be guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from optuna.trial import Trial as OptunaTrial
from optuna.trial import TrialState, create_trial

from dsm_tune.errors import StudyError, first_line, nearest
from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation
from dsm_tune.searching.lock import Lock, lock_of
from dsm_tune.searching.patience import Patience
from dsm_tune.searching.samplers import quietly, sampled
from dsm_tune.searching.space import Space
from dsm_tune.searching.store import connect_args, open_store

__all__ = ["Record", "Study"]

STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Record:
    """One stored trial.

    Attributes:
        number: in the study.
        generation, slot: where it was asked; generation 0 is what is known before a search.
        label: of a known plan, or ``""``.
        params: all parameters; empty for a known plan.
        plan: its merge plan.
        evaluations: by number of images.
        state: ``running``, ``complete``, ``pruned`` or ``failed``.
        why: the cause of a state other than ``complete``.
        redrawn: draws given up before this one: ``duplicate`` and ``unfit`` counts.
        progress: where the search stood when it had ended: ``done``, ``hypervolume`` and
            ``best_divergence``.
    """

    number: int
    generation: int
    slot: int
    label: str
    params: dict[str, Any]
    plan: MergePlan
    evaluations: dict[int, Evaluation] = dataclasses.field(default_factory=dict)
    state: str = "running"
    why: str = ""
    redrawn: dict[str, int] = dataclasses.field(default_factory=dict)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def latest(self) -> Evaluation | None:
        """The evaluation on most images."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None


class Study:
    """A study in an Optuna storage. One process writes; any may read.

    Attributes:
        optuna_study: as Optuna has it.
        patience: with a store that is away; ``None`` lets what it raises through.
    """

    def __init__(self, storage: RDBStorage, study: optuna.Study) -> None:
        self._storage = storage
        self.patience: Patience | None = None
        self._lock: Lock | None = None
        self._ids: dict[int, int] = {}  # in the storage, by number
        self.optuna_study = study

    @classmethod
    def create(cls, url: str, name: str, facts: Mapping[str, Any]) -> Study:
        """Make a study; its facts are stored with it.

        Raises:
            StudyError: if the name is taken or the store cannot be written.
        """
        storage = open_store(url, create=True)
        try:
            with quietly():
                study = optuna.create_study(
                    storage=storage,
                    study_name=name,
                    directions=["minimize", "minimize"],
                    sampler=RandomSampler(),  # draws nothing: that is the mirror's
                )
                study.set_metric_names(["divergence", "cost"])
        except optuna.exceptions.DuplicatedStudyError:
            raise StudyError(f"the study {name!r} exists already in this store") from None
        except Exception as error:
            raise StudyError(
                f"the study store must be writable, but: {first_line(error)}"
            ) from None
        made = cls(storage, study)
        for key, value in facts.items():
            made.put(key, value)
        return made

    @classmethod
    def load(cls, url: str, name: str) -> Study:
        """Open a study.

        Raises:
            StudyError: if there is none of this name; nothing is made.
        """
        storage = open_store(url, create=False)
        with quietly():
            try:
                found = optuna.load_study(storage=storage, study_name=name, sampler=RandomSampler())
                return cls(storage, found)
            except KeyError:
                names = sorted(optuna.get_all_study_names(storage))
        raise StudyError(
            f"there is no study {name!r} in this store{nearest(name, names)}; "
            f"there are: {', '.join(names[:8]) or 'none'}"
        )

    @property
    def name(self) -> str:
        """The study's name."""
        return self.optuna_study.study_name

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the study as a whole."""
        found: dict[str, Any] = self._do(lambda: self.optuna_study.user_attrs)
        return found

    @contextlib.contextmanager
    def driven(self) -> Iterator[None]:
        """Be the one process that writes this study, to the end of the block.

        Raises:
            StudyError: if another does, or the store cannot say.
        """
        address = self._storage.engine.url
        lock = lock_of(address, self.name, connect_args(address))
        if lock is not None:
            try:
                taken = lock.take()
            except (OSError, sqlalchemy.exc.SQLAlchemyError) as error:
                raise StudyError(
                    f"the study store must be writable, but: {first_line(error)}"
                ) from None
            if not taken:
                other = self.facts.get("driver") or {"pid": "another", "host": "a host"}
                raise StudyError(
                    f"the study {self.name!r} must be run by one process at a time, and process "
                    f"{other['pid']} on {other['host']} runs it now; accepted are its end, or "
                    "another --study"
                )
        self._lock = lock
        try:
            self.put("driver", {"pid": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            self._lock = None
            if lock is not None:
                lock.drop()

    def put(self, key: str, value: Any) -> None:
        """Store a fact: anything that JSON can say."""
        self._do(lambda: self.optuna_study.set_user_attr(key, value))

    def note(self, kind: str, detail: str = "", count: int = 1) -> None:
        """Store that something went wrong which was survived, for whoever asks later.

        Args:
            kind: of :data:`dsm_tune.results.FAULTS`.
            detail: of this time; the last one is kept.
            count: of times.
        """
        known = self.facts.get("faults", {})
        before = known.get(kind, {}).get("count", 0)
        self.put("faults", {**known, kind: {"count": before + count, "detail": detail}})

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials as Optuna has them."""
        return self._do(lambda: self.optuna_study.get_trials(deepcopy=False))

    def records(self) -> list[Record]:
        """All trials by number."""
        return [_record(trial) for trial in self.trials() if "plan" in trial.user_attrs]

    def add(self, record: Record, space: Space) -> Record:
        """Store a new trial as running; returns it with its number."""
        attrs = {
            "generation": record.generation,
            "slot": record.slot,
            "label": record.label,
            "params": record.params,
            "plan": record.plan.to_json(),
            "redrawn": record.redrawn,
        }
        params, distributions = sampled(space, record.params)
        trial = create_trial(
            state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attrs
        )
        tries = 0

        def create() -> tuple[int, int]:
            nonlocal tries
            tries += 1
            stored = self._find(attrs) if tries > 1 else None  # the first may have been heard
            if stored is not None:
                return stored
            # As `optuna.Study.add_trial` does, which does not tell the number.
            trial_id = self._storage.create_new_trial(
                self.optuna_study._study_id, template_trial=trial
            )
            return trial_id, self._storage.get_trial_number_from_id(trial_id)

        trial_id, number = self._do(create)
        self._ids[number] = trial_id
        return dataclasses.replace(record, number=number)

    def _find(self, attrs: Mapping[str, Any]) -> tuple[int, int] | None:
        """Id and number of the trial that is stored with these attributes."""
        for trial in self._storage.get_all_trials(self.optuna_study._study_id, deepcopy=False):
            if all(trial.user_attrs.get(key) == value for key, value in attrs.items()):
                return trial._trial_id, trial.number
        return None

    def store(self, number: int, evaluation: Evaluation) -> None:
        """Store what an evaluation gave."""
        self._attach(number, f"evaluation:{evaluation.images}", dataclasses.asdict(evaluation))

    def close(
        self,
        number: int,
        state: str,
        *,
        values: tuple[float, float] | None,
        excess: float,
        why: str,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """End a trial.

        Args:
            number: of a running trial.
            state: ``complete``, ``pruned`` or ``failed``.
            values: divergence and cost; only for a complete trial.
            excess: relative overrun of the budget, <= 0 if it is met.
            why: the cause of a state other than complete.
            progress: where the search stands now.
        """
        if progress:
            self._attach(number, "progress", dict(progress))
        if why:
            self._attach(number, "why", why)
        if state == "complete":
            self._do(lambda: self._bound(number, excess))
        self._do(lambda: self._end(number, STATES[state], values if state == "complete" else None))

    def _attach(self, number: int, key: str, value: Any) -> None:
        self._do(lambda: self._storage.set_trial_user_attr(self._id(number), key, value))

    def _bound(self, number: int, excess: float) -> None:
        with quietly():  # Optuna warns if it is set already, before a crash
            OptunaTrial(self.optuna_study, self._id(number)).set_constraint("budget", excess)

    def _end(self, number: int, state: TrialState, values: tuple[float, float] | None) -> None:
        """Not `optuna.Study.tell`: it asks the storage a dozen times what is known here."""
        try:
            self._storage.set_trial_state_values(self._id(number), state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            # A lost connection may have lost no more than the word that it was done.
            if self._storage.get_trial(self._id(number)).state is not state:
                raise

    def _id(self, number: int) -> int:
        if number not in self._ids:
            self._ids[number] = self._storage.get_trial_id_from_study_id_trial_number(
                self.optuna_study._study_id, number
            )
        return self._ids[number]

    def _do(self, action: Callable[[], Found]) -> Found:
        """Use the storage; where it is away, wait as patiently as was asked for, and note it."""
        if self.patience is None:
            return action()
        before = self.patience.waits
        found = self.patience.call(action)
        if self.patience.waits > before:
            if self._lock is not None:
                self._lock.renew()
            self.note("store", f"last: {self.patience.cause}")
        return found


def _record(trial: optuna.trial.FrozenTrial) -> Record:
    attrs = trial.user_attrs
    evaluations = [Evaluation(**v) for k, v in attrs.items() if k.startswith("evaluation:")]
    states = {state: word for word, state in STATES.items()}
    return Record(
        number=trial.number,
        generation=attrs["generation"],
        slot=attrs["slot"],
        label=attrs["label"],
        params=attrs["params"],
        plan=MergePlan.from_json(attrs["plan"]),
        evaluations={e.images: e for e in evaluations},
        state=states.get(trial.state, "running"),
        why=attrs.get("why", ""),
        redrawn=attrs["redrawn"],
        progress=attrs.get("progress", {}),
    )
