"""What runtimes make of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsm_tune import demo, tome_plan
from dsm_tune.merging.merged import merged_view
from dsm_tune.runtimes.forwards import WARMUP, forward_of, graphed, prepared


class MadeUpGraph:
    """Replays what was called while it was captured."""

    def __init__(self, cuda: MadeUpCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.log.append("replay")


class MadeUpCuda:
    """Offers what a capture needs of ``torch.cuda``, and keeps where things happen."""

    CUDAGraph = property(lambda self: lambda: MadeUpGraph(self))

    def __init__(self) -> None:
        self.log: list[str] = []
        self.where = "main"

    def Stream(self) -> MadeUpCuda:
        return self

    def current_stream(self) -> MadeUpCuda:
        return self

    def wait_stream(self, other: MadeUpCuda) -> None:
        self.log.append("wait")

    @contextlib.contextmanager
    def _at(self, where: str) -> Iterator[None]:
        before, self.where = self.where, where
        yield
        self.where = before

    def stream(self, stream: MadeUpCuda) -> contextlib.AbstractContextManager[None]:
        return self._at("aside")

    def graph(self, graph: MadeUpGraph) -> contextlib.AbstractContextManager[None]:
        return self._at("capture")


def test_a_call_is_warmed_up_aside_captured_once_and_then_only_replayed() -> None:
    cuda = MadeUpCuda()

    def call() -> None:
        assert torch.is_inference_mode_enabled()
        cuda.log.append(cuda.where)

    replay = graphed(call, cuda=cuda)
    assert cuda.log == ["wait", *["aside"] * WARMUP, "wait", "capture"]
    replay()
    replay()
    assert cuda.log[-2:] == ["replay", "replay"]
    assert cuda.log.count("capture") == 1


def test_eager_is_the_call_itself() -> None:
    def call() -> None: ...

    assert prepared(call, "eager") is call


def test_a_forward_gives_what_the_model_gives() -> None:
    model, pixels = demo.create_model(), demo.load_split("search")[0][:2]
    view = merged_view(model, tome_plan(model, r=2))
    with torch.inference_mode():
        expected = view(pixels)
    given = forward_of(view, pixels)()
    assert isinstance(given, Tensor)
    assert given.is_inference()
    assert torch.equal(given, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_captured_plan_gives_the_bits_of_the_eager_one() -> None:
    model, pixels = demo.create_model().cuda(), demo.load_split("search")[0][:2].cuda()
    view = merged_view(model, tome_plan(model, r=2))
    outputs: list[Tensor] = []
    replay = graphed(lambda: outputs.append(view(pixels)))
    replay()
    torch.cuda.synchronize()
    with torch.inference_mode():
        assert torch.equal(outputs[-1], view(pixels))
