"""A bundle: a folder with a plan, the weights, and all that is needed to serve and to check them.

It holds no code and no pickle; to load it needs neither a search nor a tracking server.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from dsm_tune import demo
from dsm_tune.errors import BundleError, DsmTuneError, ModelError, first_line, shown
from dsm_tune.exporting.manifest import MANIFEST, Manifest, digest_of, read_files
from dsm_tune.exporting.preprocessing import FIELDS, read_preprocessing
from dsm_tune.merging.backbone import image_size, read_geometry
from dsm_tune.merging.loading import create_model
from dsm_tune.merging.merged import merged_view
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.versions import versions

__all__ = [
    "PLAN",
    "WEIGHTS",
    "Bundle",
    "architecture_of",
    "load_bundle",
    "open_bundle",
    "preprocessing_of",
    "weights_of",
    "write",
]

DTYPES = ("float32", "float16", "bfloat16")
# Arguments of timm.create_model that read a file or reach a network.
FORBIDDEN = (
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)
WEIGHTS, PLAN, PROBES = "model.safetensors", "plan.json", "probes.safetensors"
PREPROCESSING = "preprocess.json"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that was read and found whole.

    Attributes:
        manifest: of it.
        plan: merges tokens.
        dense: the model without the plan, in evaluation mode, on the CPU.
        preprocessing: numbers of the transform.
        pixels, outputs: probes [n, 3, H, W] and what the merged model made of them [n, K].
    """

    manifest: Manifest
    plan: MergePlan
    dense: nn.Module
    preprocessing: Mapping[str, Any]
    pixels: Tensor
    outputs: Tensor

    @property
    def merged(self) -> nn.Module:
        """The model under its plan."""
        return merged_view(self.dense, self.plan)


def load_bundle(folder: str | os.PathLike[str]) -> nn.Module:
    """Load an exported model, ready to serve.

    Args:
        folder: that ``dsm-tune export`` wrote.

    Returns:
        The model with its plan applied and its weights loaded, in evaluation mode, on the CPU:
        [B, 3, H, W], normalised as ``preprocess.json`` says, to [B, classes]. The first merge on a
        CPU compiles for ten seconds, unless this machine has done so: run one image before you
        serve.

    Raises:
        BundleError: if a file is absent or changed, or the format is another one.
    """
    return open_bundle(folder).merged


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read a bundle; nothing of it is used before all its hashes agree.

    Raises:
        BundleError: as :func:`load_bundle`.
    """
    path = Path(folder)
    if not os.path.isdir(path):
        raise BundleError(f"a bundle must be a folder, but got {str(folder)!r:.200}")
    manifest = Manifest.read(path)
    content = read_files(path, manifest, (PLAN, WEIGHTS, PROBES, PREPROCESSING))
    try:
        plan = MergePlan.from_json(content[PLAN].decode())
        weights = _tensors(content[WEIGHTS], path / WEIGHTS)
        probes = _tensors(content[PROBES], path / PROBES)
        _check_sizes(manifest.model["kwargs"], weights, plan.geometry)
        dense = _build(manifest, weights)
        if read_geometry(dense) != plan.geometry:
            raise BundleError(f"{path / PLAN}: the plan is for another model than {MANIFEST} names")
        preprocessing = read_preprocessing(content[PREPROCESSING])
        _remember(dense, preprocessing)
        pixels, outputs = probes["pixels"], probes["outputs"]
        _check_probes(dense, plan.geometry, pixels, outputs)
        return Bundle(manifest, plan, dense, preprocessing, pixels, outputs)
    except BundleError:
        raise
    except (DsmTuneError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path}: the bundle cannot be used: {first_line(error)}") from None


def _check_sizes(
    kwargs: Mapping[str, Any], weights: Mapping[str, Tensor], geometry: Geometry
) -> None:
    """Refuse a model of other sizes than its plan and weights before any of it is made."""
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    known = {
        "depth": geometry.depth,
        "embed_dim": geometry.width,
        "num_heads": geometry.heads,
        "num_classes": geometry.classes,
        "patch_size": geometry.patch,
    }
    wrong = [name for name, value in known.items() if kwargs.get(name, value) != value]
    if depth != geometry.depth or wrong:
        raise BundleError(
            f"{MANIFEST}, {WEIGHTS} and {PLAN} must be of one model, but differ in "
            f"{wrong[0] if wrong else 'depth'}"
        )


def _check_probes(model: nn.Module, geometry: Geometry, pixels: Tensor, outputs: Tensor) -> None:
    """Refuse probes that the model could not be run on, or compared with."""
    height, width = image_size(model)
    dtype, classes = next(model.parameters()).dtype, geometry.classes or geometry.width
    count = len(pixels) if pixels.ndim else 0
    shapes = tuple(pixels.shape), tuple(outputs.shape)
    fits = count > 0 and shapes == ((count, 3, height, width), (count, classes))
    if not fits or {pixels.dtype, outputs.dtype} != {dtype}:
        raise BundleError(
            f"{PROBES} must hold pixels [n, 3, {height}, {width}] and outputs [n, {classes}] in "
            f"{dtype}, but got {list(pixels.shape)} in {pixels.dtype} and "
            f"{list(outputs.shape)} in {outputs.dtype}"
        )


def _remember(model: Any, preprocessing: Mapping[str, Any]) -> None:
    """Give a model the transform of the exported one: by its weights, a name has several."""
    model.pretrained_cfg = {**(model.pretrained_cfg or {}), **preprocessing}


def _tensors(content: bytes, where: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        line = first_line(error)
        raise BundleError(f"{where}: it must be a safetensors file: {line}") from None


def _build(manifest: Manifest, weights: Mapping[str, Tensor]) -> nn.Module:
    """Make the architecture and put the weights in."""
    name, kwargs = manifest.model["name"], manifest.model["kwargs"]
    if manifest.dtype not in DTYPES:
        raise BundleError(
            f"dtype must be one of {', '.join(DTYPES)}, but got {manifest.dtype!r:.40}"
        )
    model = _architecture(name, kwargs).to(getattr(torch, manifest.dtype))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise BundleError(f"{WEIGHTS} does not fit the model {name}: {line}") from None
    return model.eval()


def _architecture(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    bad = sorted(set(kwargs) & set(FORBIDDEN))
    if bad or ":" in name:
        raise BundleError(f"a bundle must not name files or hosts, but got {shown(bad or name)}")
    if name == demo.MODEL_NAME:
        return demo.create_model()
    return create_model(name, model_kwargs=kwargs)


def architecture_of(model: nn.Module, name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the architecture of a model again: ``name`` and ``kwargs``.

    Args:
        model: to be exported.
        name: of timm, or of the demo.
        kwargs: that it was made with.

    Raises:
        ModelError: if the name and the arguments make another model.
    """
    if name == demo.MODEL_NAME:
        return {"name": name, "kwargs": {}}
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    base = str(known.get("architecture") or name)
    arguments = {**kwargs, "num_classes": read_geometry(model).classes}
    again = _architecture(base, arguments).state_dict()
    own = model.state_dict()
    if {k: v.shape for k, v in again.items()} != {k: v.shape for k, v in own.items()}:
        raise ModelError(
            f"a bundle must be able to make its model again, but {base} with "
            f"{arguments} is another one; --plan with --to onnx or pt2 needs no such name"
        )
    return {"name": base, "kwargs": arguments}


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """Numbers of the transform that a model wants (timm's, at the size of its ``patch_embed``)."""
    config = dict(resolve_model_data_config(model))
    config["input_size"] = (3, *image_size(model))
    return {name: config[name] for name in FIELDS}


def write(
    folder: Path,
    model: nn.Module,
    plan: MergePlan,
    *,
    architecture: Mapping[str, Any],
    made: Mapping[str, Any],
    card: str,
    probes: tuple[Tensor, Tensor],
    tolerance: float,
) -> Manifest:
    """Fill a folder with a bundle.

    Args:
        folder: empty, or with files of ``OPTIONAL`` names.
        model: dense.
        plan: made for its geometry.
        architecture: as from :func:`architecture_of`.
        made: where and how it was made: for the manifest.
        card: text of ``card.md``.
        probes: pixels [n, 3, H, W] and the merged model's outputs [n, K].
        tolerance: of these outputs, relative to the largest.
    """
    content = {
        "card.md": card.encode(),
        WEIGHTS: weights_of(model),
        PLAN: plan.to_json().encode(),
        PREPROCESSING: (json.dumps(preprocessing_of(model), indent=1) + "\n").encode(),
        PROBES: safetensors.torch.save(dict(zip(("pixels", "outputs"), probes, strict=True))),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    files = {path.name: digest_of(path.read_bytes()) for path in folder.iterdir()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    manifest = Manifest(architecture, dtype, tolerance, {**made, "versions": versions()}, files)
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


def weights_of(model: nn.Module) -> bytes:
    """The weights of a model as the content of a safetensors file."""
    state = model.state_dict()
    return safetensors.torch.save({k: v.detach().contiguous().clone() for k, v in state.items()})
