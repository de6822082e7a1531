"""A model under a plan as a file that other programs run: ONNX, and torch.export's pt2."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dsm_tune.errors import BundleError, ModelError, first_line
from dsm_tune.exporting.bundle import preprocessing_of
from dsm_tune.merging.backbone import image_size
from dsm_tune.merging.merged import merged_view
from dsm_tune.plan import MergePlan
from dsm_tune.runtimes.onnx.files import export_onnx, session

__all__ = ["FILES", "opened", "write_format"]

FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}
PREPROCESSING_KEY = "dsm_tune.preprocessing"
# What torch notes of every node: paths of this machine, more bytes than small models have.
VERBOSE = ("stack_trace", "nn_module_stack", "source_fn_stack")

Forward = Callable[[Tensor], Tensor]


def write_format(kind: str, model: nn.Module, plan: MergePlan, folder: Path) -> None:
    """Put the file of a format into a folder.

    Args:
        kind: ``onnx``: float32, opset 20, ``pixels`` [batch, 3, H, W] to ``logits``
            [batch, classes], preprocessing and plan in its metadata; or ``pt2``: runs with torch
            alone, [batch, 3, H, W] to [batch, classes]. Both for any batch >= 1.
        model: dense, in evaluation mode, on the CPU.
        plan: made for its geometry.
        folder: where the file goes, under its name in ``FILES``.

    Raises:
        ConfigError: if a package is not installed.
        ModelError: if the model cannot be exported.
    """
    if kind == "onnx":
        metadata = {PREPROCESSING_KEY: json.dumps(preprocessing_of(model))}
        export_onnx(model, plan, folder / FILES[kind], metadata=metadata)
    else:
        _write_pt2(merged_view(model, plan), image_size(model), folder / FILES[kind])


def _write_pt2(model: nn.Module, size: tuple[int, int], file: Path) -> None:
    example = torch.zeros(2, 3, *size, dtype=next(model.parameters()).dtype)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own ways
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        except Exception as error:  # torch.export raises many kinds
            raise ModelError(f"the model cannot become pt2: {first_line(error)}") from None
        for module in program.graph_module.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                for name in VERBOSE:
                    node.meta.pop(name, None)
        torch.export.save(program, file)


def opened(kind: str, file: Path, threads: int) -> Forward:
    """Open a file of a format as a function from pixels [B, 3, H, W] to logits [B, classes].

    Args:
        kind: as of :func:`write_format`.
        file: whose content is known to be the one that was exported.
        threads: of ONNX Runtime.

    Raises:
        BundleError: if it cannot be opened.
    """
    if kind == "onnx":
        try:
            return session(file, threads)
        except ModelError as error:
            raise BundleError(f"{file}: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(file).module()
    except Exception as error:  # of torch, zipfile, json …
        raise BundleError(
            f"{file}: it must be a pt2 file that this torch reads: {first_line(error)}"
        ) from None

    def forward(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = module(pixels)
            return result

    return forward
