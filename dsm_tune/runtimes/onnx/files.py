"""A model under a plan as one ONNX file, and as a function that ONNX Runtime computes."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.errors import ConfigError, ModelError, PlanError, first_line
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.plan import MergePlan

__all__ = [
    "PLAN_KEY",
    "export_onnx",
    "need_packages",
    "opened",
    "opened_as_it_is",
    "session",
]

PLAN_KEY = "dsm_tune.plan"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
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
    need_packages("exporting to ONNX", "onnx", "onnxscript")
    from onnx import checker

    from dsm_tune.runtimes.onnx.graph import graph_of
    from dsm_tune.runtimes.onnx.pieces import Pieces

    _check(model, plan)
    proto = graph_of(Pieces(model), plan, {**metadata, PLAN_KEY: plan.to_json()})
    if proto.ByteSize() > LARGEST:
        raise ModelError(
            f"a model must have at most {LARGEST} bytes for one ONNX file, "
            f"but this one has {proto.ByteSize()}; the format pt2 has no such bound"
        )
    checker.check_model(proto)
    _write(file, proto.SerializeToString())


def opened(
    model: nn.Module, plans: Sequence[MergePlan], threads: int
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Open a model under each of some plans in ONNX Runtime; the model is traced once.

    Args:
        model: as for :func:`export_onnx`.
        plans: made for its geometry.
        threads: as for :func:`session`.

    Yields:
        Functions from ``pixels`` [B, 3, H, W] to ``logits`` [B, classes], float32.

    Raises:
        ConfigError: if a package is not installed.
    """
    need_packages("running a model in ONNX Runtime")
    from dsm_tune.runtimes.onnx.graph import graph_of
    from dsm_tune.runtimes.onnx.pieces import Pieces

    pieces = Pieces(model)
    for plan in plans:
        yield session(graph_of(pieces, plan).SerializeToString(), threads, shared=True)


def opened_as_it_is(model: nn.Module, pixels: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    """Open any model in ONNX Runtime, traced whole for inputs of one shape.

    Args:
        model: float32, in eval mode, on the CPU.
        pixels: [B, 3, H, W] float32, an example.
        threads: as for :func:`session`.

    Returns:
        A function from ``pixels`` to the model's output.

    Raises:
        ConfigError: if a package is not installed.
        ModelError: if the model cannot be exported.
    """
    need_packages("running a model in ONNX Runtime")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own ways
        try:
            program: Any = torch.onnx.export(model, (pixels,), dynamo=True, verbose=False)
        except Exception as error:  # its exceptions have no base of their own
            raise ModelError(
                f"a model must become ONNX to run in it, but got: {first_line(error)}"
            ) from None
    return session(program.model_proto.SerializeToString(), threads)


def _check(model: nn.Module, plan: MergePlan) -> None:
    geometry = read_geometry(model)
    if geometry != plan.geometry:
        raise PlanError(f"the plan is for {plan.geometry}, but the model has {geometry}")
    where = {(parameter.dtype, parameter.device.type) for parameter in model.parameters()}
    if where != {(torch.float32, "cpu")}:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in where))
        raise ModelError(f"a model must be float32 on the CPU to become ONNX, but got {found}")
    if model.training:
        raise ModelError("a model must be in eval mode to become ONNX; call eval()")


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


def session(model: Path | bytes, threads: int, *, shared: bool = False) -> Callable[..., Tensor]:
    """Open a graph in ONNX Runtime on the CPU.

    Args:
        model: an ONNX file, or its content.
        threads: of one operator, >= 1.
        shared: whether it shares its threads with all further sessions of this process, so that
            none of them waits beside another's: for sessions that are timed in turn. The first
            such session says how many there are.

    Returns:
        A function from the graph's inputs, float32 on the CPU, in their order (a merged model has
        one: ``pixels`` [B, 3, H, W]), to its first output.

    Raises:
        ConfigError: if onnxruntime is not installed or ``threads`` is less than 1.
        ModelError: if the file is no model that ONNX Runtime can open.
    """
    need_packages("running an ONNX file", "onnxruntime")
    import onnxruntime

    if threads < 1:
        raise ConfigError(f"threads must be at least 1, but got {threads}")
    options = onnxruntime.SessionOptions()
    if _shares(onnxruntime, threads, shared):
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    content = model if isinstance(model, bytes) else str(model)
    try:
        opened = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"an ONNX model must be readable, but got: {reason}") from None
    names = [value.name for value in opened.get_inputs()]

    def forward(*inputs: Tensor) -> Tensor:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(opened.run(None, given)[0])

    return forward


_shared: list[int] = []


def _shares(onnxruntime: Any, threads: int, wanted: bool) -> bool:
    """Whether a session is to use the threads that are shared; where there are any, it must."""
    if wanted and not _shared:
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        _shared.append(threads)
    return bool(_shared)


def need_packages(purpose: str, *names: str) -> None:
    """Refuse what needs packages, of the extra ``onnx``, that are not installed.

    Args:
        purpose: what the line begins with.
        names: of the packages; all if none is given.

    Raises:
        ConfigError: naming the first that is absent, and what installs it.
    """
    for name in names or PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{purpose} needs the package {name}, which is not installed here; "
                "python -m pip install 'dsm-tune[onnx]' installs it"
            )
