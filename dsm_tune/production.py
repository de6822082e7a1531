"""From a study's choice to production: which model and plan, written, proven, put in place."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune import demo
from dsm_tune.answer import Answer, load_study
from dsm_tune.config import TuneConfig, absolute_storage
from dsm_tune.errors import BundleError, ModelError, PlanError, StudyError
from dsm_tune.exporting import bundle, formats, mlflow_model, proof
from dsm_tune.exporting.card import card_of
from dsm_tune.exporting.folders import check_target, written_whole
from dsm_tune.exporting.manifest import MANIFEST, Manifest, read_files
from dsm_tune.exporting.proof import Proof
from dsm_tune.inputs import load_model
from dsm_tune.measuring.images import load_folder
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.loading import weights_digest
from dsm_tune.merging.merged import merged_view
from dsm_tune.plan import MergePlan
from dsm_tune.results import Result
from dsm_tune.reviewing.stores import resolve_tracking_uri
from dsm_tune.searching.study import study_names

__all__ = ["Exported", "Source", "export", "of_plan", "of_study"]

KINDS = ("bundle", "onnx", "pt2", "mlflow")
PROBES = 4  # images that are stored
CHECKED = 32  # images that are compared


@dataclasses.dataclass(frozen=True)
class Source:
    """What is to be exported.

    Attributes:
        config: makes the model; names the images.
        model: dense, in its dtype, on the CPU, in evaluation mode.
        plan: made for its geometry.
        made: where it is from and what was measured, for the manifest.
        tracking_uri: where its runs are, if it is of a study.
    """

    config: TuneConfig
    model: nn.Module
    plan: MergePlan
    made: Mapping[str, Any]
    tracking_uri: str | None = None


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        kind: of export.
        gmacs: of the plan.
        proofs: comparisons with the eager merged model by what was compared.
        registered, version: model of MLflow's registry, if one was asked for.
    """

    folder: str
    kind: str
    gmacs: float
    proofs: Mapping[str, Proof]
    registered: str | None = None
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the ``--json`` document."""
        return dataclasses.asdict(self)


# -- what -----------------------------------------------------------------------------------------


def of_study(study_or_run: str, storage: str | None) -> Source:
    """The choice of a study, or the plan of one of its MLflow runs.

    Args:
        study_or_run: name of a study, or id of a trial's run.
        storage: database URL; as for :func:`dsm_tune.tune`.

    Raises:
        StudyError: if there is neither, nothing was chosen, or the weights are others now.
    """
    url = absolute_storage(storage, Path.cwd())
    names = study_names(url)
    if study_or_run not in names and re.fullmatch(r"[0-9a-f]{32}", study_or_run):
        for name in names:
            found = load_study(url, name)
            if study_or_run in found.facts.get("run_ids", {}).values():
                answer = Answer.of(found)
                return _tuned(answer, _of_run(answer, study_or_run))
    answer = Answer.of(load_study(url, study_or_run))
    if answer.facts.get("limits") is None:
        raise StudyError(f"the study {study_or_run!r} has not begun its search yet")
    chosen = answer.choose(answer.front())
    if chosen is None:
        raise StudyError(
            f"the study {study_or_run!r} must have a plan within its budget to be exported, "
            f"but has none; `dsm-tune show {study_or_run}` says what is reachable"
        )
    return _tuned(answer, chosen)


def _of_run(answer: Answer, run_id: str) -> Result:
    for record in answer.records:
        if answer.run_ids.get(record.number) == run_id and record.state == "complete":
            return answer.result_of(record)
    raise StudyError(f"the run {run_id} must be of a complete trial, but it is not")


def _tuned(answer: Answer, chosen: Result) -> Source:
    facts, stored = answer.facts, dict(answer.facts["config"])
    if not stored.pop("by_name", True):
        raise StudyError(
            f"the study {answer.name!r} was made for a module in Python, which only its program "
            "can make; dsm_tune.merged(module, plan) runs its plan"
        )
    config = TuneConfig.from_dict(stored)
    model = load_model(config)
    known = facts.get("weights_digest")
    if known is not None and known != weights_digest(model):
        raise StudyError(
            f"the weights must be those that the study {answer.name!r} was made with, "
            f"but {config.checkpoint or config.model_name} has others now"
        )
    profile, result = answer.profile, answer.result()
    described = {} if profile is None else dict(profile.device)
    made = {
        "study": answer.name,
        "run_id": chosen.run_id,
        "command": config.command,
        "device": {**facts["device"], "described": described},
        **_serving(config),
        "limits": facts["limits"],
        "images": facts["images"],
        "dense": _figures(result.dense),
        "exported": _figures(chosen),
    }
    return Source(config, _typed(model, config.dtype), chosen.plan, made, facts.get("tracking_uri"))


def _serving(config: TuneConfig) -> dict[str, Any]:
    """How it is to be timed where it is verified."""
    served = {"runtime": config.runtime, "batch_size": config.batch_size, "device": config.device}
    return {"serving": served, "threads": config.threads, "stat": config.latency_stat}


def _figures(result: Result) -> dict[str, Any]:
    return {name: value for name, value in result.to_dict().items() if name != "plan"}


def of_plan(file: str, config: TuneConfig) -> Source:
    """A plan in a file, for the model of a configuration.

    Raises:
        PlanError: if the file is no plan, or made for another model.
        ModelError: if the model cannot be made.
    """
    try:
        plan = MergePlan.from_json(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise PlanError(f"--plan must be a readable file, but {file}: {reason}") from None
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None
    model = load_model(config)
    geometry = read_geometry(model)
    if geometry != plan.geometry:
        raise PlanError(f"{file}: the plan is for {plan.geometry}, but the model has {geometry}")
    return Source(config, _typed(model, config.dtype), plan, _serving(config))


def _typed(model: nn.Module, dtype: str) -> nn.Module:
    return model.to(getattr(torch, dtype))


# -- how ------------------------------------------------------------------------------------------


@torch.no_grad()
def export(
    source: Source,
    kind: str,
    output: str,
    *,
    probes: str | None = None,
    register: str | None = None,
    tracking_uri: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write what production needs, and compare it with the eager model before it is kept.

    Args:
        source: what.
        kind: ``bundle``; ``onnx`` or ``pt2``: a bundle with that file too; ``mlflow``: a model
            folder of MLflow's.
        output: folder; an earlier export in it is replaced at once, or not at all.
        probes: folder of images to store four of in the bundle, instead of synthetic ones.
        register: name of an MLflow registered model of which it becomes the champion.
        tracking_uri: of MLflow; where the study's runs are if not given.
        say: is told what happens.

    Raises:
        ConfigError: if the folder cannot be written, or the format needs what is not installed.
        ModelError: if what was written does not give the eager model's outputs.
    """
    folder = Path(output).absolute()
    if register is not None:
        mlflow_model.check_name(register)
    check_target(folder, "MLmodel" if kind == "mlflow" else MANIFEST)
    tolerance = proof.TOLERANCE[source.config.dtype]
    stored = _probe_images(source, probes)
    pixels = torch.cat([stored, _known_images(source)])
    _check_dtype(source, pixels)
    forward = merged_view(source.model, source.plan)
    expected = forward(pixels)
    checked = _Checked(pixels, expected, tolerance, {})
    checked.add("eager, other batch sizes", forward)
    with written_whole(folder) as fresh:
        if kind == "mlflow":
            say("writing an MLflow model")
            mlflow_model.save(source.model, source.plan, fresh, pixels[:2])
            checked.add("onnx", formats.opened("onnx", fresh / formats.FILES["onnx"], 1))
        else:
            _fill(source, fresh, _extras(source, kind, folder), stored, checked, say)
    version = None
    if register is not None:
        say(f"registering {register}")
        version = mlflow_model.register(
            source.model,
            source.plan,
            pixels[:2],
            name=register,
            tracking_uri=resolve_tracking_uri(tracking_uri or source.tracking_uri, Path.cwd()),
            run_id=source.made.get("run_id"),
        )
    return Exported(str(folder), kind, source.plan.gmacs, checked.proofs, register, version)


def _fill(
    source: Source,
    fresh: Path,
    extras: Mapping[str, Path | None],
    stored: Tensor,
    checked: _Checked,
    say: Callable[[str], None],
) -> None:
    """Write a bundle and the formats that go with it, and check all of them."""
    for extra, kept in extras.items():
        say(f"writing {formats.FILES[extra]}")
        if kept is None:
            formats.write_format(extra, source.model, source.plan, fresh)
        else:
            shutil.copyfile(kept, fresh / kept.name)
        checked.add(extra, formats.opened(extra, fresh / formats.FILES[extra], 1))
    bundle.write(
        fresh,
        source.model,
        source.plan,
        architecture=_architecture(source),
        made=source.made,
        card=card_of(source.config.model_name, source.plan, source.made, checked.proofs),
        probes=(stored, checked.expected[: len(stored)]),
        tolerance=checked.tolerance,
    )
    say("loading the bundle again")
    checked.add("bundle", bundle.load_bundle(fresh))


@dataclasses.dataclass(frozen=True)
class _Checked:
    """Images, the eager merged model's outputs for them, and what has been compared with these."""

    pixels: Tensor
    expected: Tensor
    tolerance: float
    proofs: dict[str, Proof]

    def add(self, name: str, run: Callable[[Tensor], Tensor]) -> None:
        """Compare, and refuse what differs."""
        found = proof.compared(run, self.pixels, self.expected, self.tolerance)
        if not found.holds:
            raise ModelError(
                f"{name} must give what the eager model gives within {self.tolerance:g} of the "
                f"largest output, but differs in {found.apart} of {found.images} outputs; "
                "nothing was exported"
            )
        self.proofs[name] = found


def _extras(source: Source, kind: str, folder: Path) -> dict[str, Path | None]:
    """Formats beside the bundle: the one that is asked for, and the files of an earlier export."""
    wanted: dict[str, Path | None] = dict.fromkeys({kind} & set(formats.FILES))
    try:
        manifest = Manifest.read(folder)
        content = read_files(folder, manifest, (bundle.PLAN, bundle.WEIGHTS))
    except BundleError:
        return wanted
    same = content[bundle.PLAN] == source.plan.to_json().encode()
    if same and content[bundle.WEIGHTS] == bundle.weights_of(source.model):
        kept = {name: folder / file for name, file in formats.FILES.items()}
        known = {name: file for name, file in kept.items() if file.name in manifest.files}
        return {**known, **wanted}
    return wanted


def _architecture(source: Source) -> dict[str, Any]:
    config = source.config
    kwargs = dict(config.model_kwargs)
    if config.img_size is not None:
        kwargs["img_size"] = config.img_size
    return bundle.architecture_of(source.model, config.model_name, kwargs)


def _check_dtype(source: Source, pixels: Tensor) -> None:
    """Refuse a dtype in which the model gives other classes than in float32."""
    if source.config.dtype == "float32":
        return
    exact = load_model(source.config)
    dense = exact(pixels.float()).argmax(dim=1)
    agreeing = float((source.model(pixels).argmax(dim=1) == dense).double().mean())
    if agreeing < 1 - proof.MOST_APART:
        raise ModelError(
            f"{source.config.dtype} must hold the dense model's outputs, but gives another class "
            f"on {1 - agreeing:.0%} of the images; export in float32"
        )


def _probe_images(source: Source, folder: str | None) -> Tensor:
    dtype = next(source.model.parameters()).dtype
    if folder is not None:
        return _from_folder(source, folder, PROBES).to(dtype)
    geometry = source.plan.geometry
    rows, columns = (side * geometry.patch for side in geometry.grid)
    return proof.synthetic_images(PROBES, (rows, columns)).to(dtype)


def _known_images(source: Source) -> Tensor:
    """Images of the tune, to compare on; none where they are not there any more."""
    dtype, config = next(source.model.parameters()).dtype, source.config
    if config.model == demo.MODEL_NAME:
        return demo.load_split("holdout")[0][:CHECKED].to(dtype)
    if config.images is None or not source.made.get("study") or not Path(config.images).is_dir():
        return torch.empty(0, *_probe_images(source, None).shape[1:], dtype=dtype)
    return _from_folder(source, config.images, CHECKED).to(dtype)


def _from_folder(source: Source, folder: str, count: int) -> Tensor:
    return load_folder(folder, source.model, limit=count)[0].pixels
