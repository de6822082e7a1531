"""A model under a plan as one ONNX file, and as a function that ONNX Runtime computes."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.errors import ConfigError, ModelError
from dsm_tune.exporting.steps import view_to_trace
from dsm_tune.plan import MergePlan

__all__ = ["INPUT", "OUTPUT", "PLAN_KEY", "export_onnx", "graph_of", "session"]

INPUT, OUTPUT = "pixels", "logits"
PLAN_KEY = "dsm_tune.plan"
NOTHING: Mapping[str, str] = {}
LARGEST = (1 << 31) - 1  # bytes that a protobuf message can have


def export_onnx(
    model: nn.Module, plan: MergePlan, file: Path, *, metadata: Mapping[str, str] = NOTHING
) -> None:
    """Write a model under a plan as one ONNX file.

    Its input is ``pixels`` [batch, 3, H, W], its output ``logits`` [batch, classes], both float32,
    for any batch >= 1. The plan's JSON is in the file's metadata, under ``PLAN_KEY``.

    Args:
        model: float32, in eval mode, not merged; it is as it was afterwards.
        plan: made for its geometry.
        file: written whole or not at all; an old file is replaced.
        metadata: further names and texts to put into the file.

    Raises:
        ConfigError: if onnx or onnxscript is not installed.
        ModelError: if the model cannot be merged or exported.
        PlanError: if the plan is for another geometry.
        OSError: if the file cannot be written.
    """
    checker = _package("onnx", "exporting to ONNX").checker
    _package("onnxscript", "exporting to ONNX")
    _check(model)
    notes = {**metadata, PLAN_KEY: plan.to_json()}
    proto = graph_of(view_to_trace(model, plan), _example(model, plan), notes)
    if proto.ByteSize() > LARGEST:
        raise ModelError(
            f"a model must have at most {LARGEST} bytes for one ONNX file, "
            f"but this one has {proto.ByteSize()}; the format pt2 has no such bound"
        )
    checker.check_model(proto)
    _write(file, proto.SerializeToString())


def graph_of(model: nn.Module, example: Tensor, metadata: Mapping[str, str]) -> Any:
    """Trace a model into an ``onnx.ModelProto``.

    Args:
        model: in eval mode; the steps of a plan as :func:`view_to_trace` puts them.
        example: [2, 3, H, W]; of one image, tracing would conclude that there is always one.
        metadata: names and texts to put into it.
    """
    from dsm_tune.exporting import lowering, nodes

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own ways
        program: Any = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            optimize=False,  # takes longer than all the rest, for a graph no faster
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=nodes.OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            custom_translation_table=lowering.translations(),
        )
    return lowering.tidied(program.model, metadata)


def _check(model: nn.Module) -> None:
    kinds = {parameter.dtype for parameter in model.parameters()}
    if kinds != {torch.float32}:
        raise ModelError(
            "a model must be float32 to be exported to ONNX, "
            f"but got {', '.join(sorted(map(str, kinds)))}"
        )
    if model.training:
        raise ModelError("a model must be in eval mode to be exported to ONNX; call eval()")


def _example(model: nn.Module, plan: MergePlan) -> Tensor:
    rows, columns = (side * plan.geometry.patch for side in plan.geometry.grid)
    return torch.zeros(2, 3, rows, columns, device=next(model.parameters()).device)


def _write(file: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as written:
            written.write(content)
        os.chmod(name, 0o644)  # mkstemp's is for the owner alone
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def session(model: Path | bytes, threads: int) -> Callable[[Tensor], Tensor]:
    """Open an exported model in ONNX Runtime on the CPU.

    Args:
        model: an ONNX file, or its content.
        threads: of one operator, >= 1.

    Returns:
        A function from ``pixels`` [B, 3, H, W] float32 to ``logits`` [B, classes] float32.

    Raises:
        ConfigError: if onnxruntime is not installed or ``threads`` is less than 1.
        ModelError: if the file is no model that ONNX Runtime can open.
    """
    onnxruntime = _package("onnxruntime", "running an ONNX file")
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, but got {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    content = model if isinstance(model, bytes) else str(model)
    try:
        opened = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"an ONNX model must be readable, but got: {reason}") from None

    def forward(pixels: Tensor) -> Tensor:
        return torch.from_numpy(opened.run([OUTPUT], {INPUT: pixels.numpy()})[0])

    return forward


def _package(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"{purpose} needs the package {name}, which is not installed here; "
            "python -m pip install 'dsm-tune[onnx]' installs it"
        ) from None
