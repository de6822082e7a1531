"""Turns a model, or a part of one, into a call that runs it as a runtime does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.merging.merged import merged_view
from dsm_tune.plan import MergePlan

__all__ = ["Call", "forward_of", "forwards_of", "graphed", "prepared"]

Call = Callable[[], object]
WARMUP = 3  # runs before a capture, in which libraries choose and allocate


def forwards_of(
    model: nn.Module, plans: Sequence[MergePlan], pixels: Tensor, runtime: str
) -> list[Call]:
    """Return the call of a model under each plan, as a runtime runs it.

    Args:
        model: dense, in evaluation mode, on the device and in the dtype of ``pixels``.
        plans: made for it.
        pixels: [B, 3, H, W].
        runtime: ``eager``; ``onnx``, in ONNX Runtime with as many threads as torch has; or
            ``cudagraphs``.

    Raises:
        ConfigError: for ``onnx``, if a package is not installed.
    """
    if runtime != "onnx":
        return [forward_of(merged_view(model, plan), pixels, runtime) for plan in plans]
    from dsm_tune.runtimes.onnx.files import opened

    return [partial(run, pixels) for run in opened(model, plans, torch.get_num_threads())]


def forward_of(model: Callable[[Tensor], object], pixels: Tensor, runtime: str = "eager") -> Call:
    """Return the call of a model on an input that is already on its device.

    Args:
        model: in evaluation mode, on the device and in the dtype of ``pixels``.
        pixels: [B, 3, H, W].
        runtime: as of :func:`prepared`.
    """

    def forward() -> object:
        with torch.inference_mode():
            return model(pixels)

    return prepared(forward, runtime)


def prepared(call: Call, runtime: str) -> Call:
    """Return what runs a call as a runtime does.

    Args:
        call: computes on tensors that stay where they are.
        runtime: ``eager``, or ``cudagraphs``: captured once, replayed as one launch.
    """
    return graphed(call) if runtime == "cudagraphs" else call


def graphed(call: Call, *, cuda: Any = torch.cuda) -> Call:
    """Capture a call as a CUDA graph and return its replay.

    Args:
        call: computes on the current CUDA device, with no wait of the host for it.
        cuda: offers what ``torch.cuda`` does.
    """
    aside = cuda.Stream()
    aside.wait_stream(cuda.current_stream())
    with torch.inference_mode(), cuda.stream(aside):
        for _ in range(WARMUP):
            call()
    cuda.current_stream().wait_stream(aside)
    graph = cuda.CUDAGraph()
    with torch.inference_mode(), cuda.graph(graph):
        call()
    replay: Call = graph.replay
    return replay
