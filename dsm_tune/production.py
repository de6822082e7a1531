"""From a study's choice to production: written, proven, put in place."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsm_tune import demo, diagnosis
from dsm_tune.errors import BundleError, ModelError, StudyError
from dsm_tune.exporting import bundle, formats, mlflow_model, proof
from dsm_tune.exporting.card import card_of
from dsm_tune.exporting.folders import check_target, written_whole
from dsm_tune.exporting.manifest import Manifest, is_bundle, read_files
from dsm_tune.exporting.proof import Proof
from dsm_tune.inputs import load_model
from dsm_tune.measuring.images import load_folder
from dsm_tune.merging.backbone import image_size
from dsm_tune.merging.merged import merged_view
from dsm_tune.reviewing.stores import resolve_tracking_uri
from dsm_tune.sources import Source

__all__ = ["Exported", "export"]

PROBES = 4  # images that are stored
CHECKED = 32  # images that are compared


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
    store = tracking_uri or source.tracking_uri
    if register is not None:
        mlflow_model.check_name(register)
        _check_store(store)
    check_target(folder, mlflow_model.is_model if kind == "mlflow" else is_bundle)
    tolerance = proof.TOLERANCE[source.config.dtype]
    stored = _probe_images(source, probes)
    pixels = torch.cat([stored, _known_images(source)])
    _check_dtype(source, pixels)
    forward = merged_view(source.model, source.plan)
    expected = forward(pixels)
    checked = _Checked(pixels, expected, tolerance, {})
    checked.add("eager, other batch sizes", forward)
    with tempfile.TemporaryDirectory() as aside:
        onnx_file = Path(aside) / formats.FILES["onnx"]
        if kind == "mlflow" or register is not None:
            say("writing an MLflow model")
            formats.write_format("onnx", source.model, source.plan, onnx_file.parent)
            checked.add("onnx", formats.opened("onnx", onnx_file, 1))
        with written_whole(folder) as fresh:
            if kind == "mlflow":
                mlflow_model.save(onnx_file, source.plan, fresh, pixels[:2])
                checked.add("onnx", formats.opened("onnx", fresh / onnx_file.name, 1))
            else:
                extras = _extras(source, kind, folder)
                if "onnx" in extras and onnx_file.is_file():
                    extras["onnx"] = onnx_file
                _fill(source, fresh, extras, stored, checked, say)
        version = None
        if register is not None:
            say(f"registering {register}")
            version = mlflow_model.register(
                onnx_file,
                source.plan,
                pixels[:2],
                name=register,
                tracking_uri=resolve_tracking_uri(store, Path.cwd()),
                run_id=source.made.get("run_id"),
            )
    return Exported(str(folder), kind, source.plan.gmacs, checked.proofs, register, version)


def _check_store(uri: str | None) -> None:
    """Refuse a tracking store that does not answer; MLflow itself would try for minutes."""
    found = diagnosis.check_mlflow(uri)
    if found.status == "failed":
        raise StudyError(f"--tracking-uri must be a store that answers, but: {found.detail}")


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
    return proof.synthetic_images(PROBES, image_size(source.model)).to(dtype)


def _known_images(source: Source) -> Tensor:
    """Images of the tune, to compare on; none where they are not there any more."""
    dtype, config = next(source.model.parameters()).dtype, source.config
    if config.model == demo.MODEL_NAME:
        return demo.load_split("holdout")[0][:CHECKED].to(dtype)
    if config.images is None or not source.made.get("study") or not Path(config.images).is_dir():
        return torch.empty(0, 3, *image_size(source.model), dtype=dtype)
    return _from_folder(source, config.images, CHECKED).to(dtype)


def _from_folder(source: Source, folder: str, count: int) -> Tensor:
    return load_folder(folder, source.model, limit=count)[0].pixels
