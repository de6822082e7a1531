"""Products of linear layers by oneDNN: what torch's own give, only where nobody would notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from small_vits import KINDS, images_for, plan_for, small_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsm_tune.measuring.macs import count_macs
from dsm_tune.merging import loops, on_cpu
from dsm_tune.merging.halves import run
from dsm_tune.merging.merged import merged

STEP = (1, "merge", 3, None)
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
needs_onednn = pytest.mark.skipif(on_cpu.PRODUCT is None, reason="this torch has no oneDNN")


@contextmanager
def counted(least: int = 0) -> Iterator[list[int]]:
    """How often oneDNN is asked, for products of so many multiply-adds."""
    asked, operator, usual = [0], on_cpu.PRODUCT, on_cpu.LEAST

    def counting(*args: Any) -> Tensor:
        asked[0] += 1
        result: Tensor = operator(*args)
        return result

    on_cpu.PRODUCT, on_cpu.LEAST = counting, least
    try:
        yield asked
    finally:
        on_cpu.PRODUCT, on_cpu.LEAST = operator, usual


@needs_onednn
@given(
    batch=st.integers(0, 3), count=st.integers(1, 40), wide=st.integers(1, 65),
    out=st.integers(1, 70), has_bias=st.booleans(), kind=st.sampled_from(["none", "tanh"]),
    stride=st.integers(1, 2), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_product_differs_from_torch_by_rounding_alone(
    batch: int, count: int, wide: int, out: int, has_bias: bool, kind: str, stride: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, activation = nn.Linear(wide, out, bias=has_bias), nn.GELU(kind)
    x = torch.randn(batch, count, wide)[:, ::stride]
    with torch.inference_mode(), counted() as asked:
        torch.testing.assert_close(on_cpu.linear(layer, x), layer(x), **ROUNDING)
        quick = on_cpu.linear_gelu(layer, activation, x)
        torch.testing.assert_close(quick, activation(layer(x)), **ROUNDING)
    assert asked == [2]


@needs_onednn
@torch.no_grad()
def test_small_products_stay_torch_s() -> None:
    layer = nn.Linear(20, 10)
    with counted(least=2000) as asked:
        on_cpu.linear(layer, torch.randn(1, 9, 20))
        assert asked == [0]
        on_cpu.linear(layer, torch.randn(1, 10, 20))
        assert asked == [1]


class Adapted(nn.Linear):
    """A layer that does more than its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@needs_onednn
@pytest.mark.parametrize("how", ["adapted", "forward hook", "forward pre-hook"])
@torch.no_grad()
def test_a_layer_that_is_more_than_its_weights_is_called(how: str) -> None:
    layer: nn.Linear = Adapted(4, 5) if how == "adapted" else nn.Linear(4, 5)
    if how == "forward hook":
        layer.register_forward_hook(lambda _, __, out: out + 1)
    elif how == "forward pre-hook":
        layer.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    x = torch.randn(1, 3, 4)
    with counted() as asked:
        assert torch.equal(on_cpu.linear(layer, x), layer(x))
        assert torch.equal(on_cpu.linear_gelu(layer, nn.GELU(), x), nn.GELU()(layer(x)))
    assert asked == [0]


@torch.no_grad()
def test_a_block_that_is_watched_is_called() -> None:
    block = copy.deepcopy(next(iter(small_vit().blocks)))
    block.register_forward_hook(lambda _, __, out: out + 1)
    x = torch.randn(1, 17, 16)
    assert torch.equal(run(block, x), block(x))


@needs_onednn
@torch.no_grad()
def test_an_activation_other_than_gelu_stays_what_it_is() -> None:
    layer, x = nn.Linear(4, 5), torch.randn(2, 3, 4)
    with counted() as asked:
        found = on_cpu.linear_gelu(layer, nn.ReLU(), x)
    assert asked == [1]  # the layer alone
    torch.testing.assert_close(found, layer(x).relu())


@pytest.mark.parametrize(
    ("x", "around"),
    [
        (torch.zeros(1, 2, 3, dtype=torch.float64), nullcontext()),
        (torch.zeros(1, 2, 3, dtype=torch.bfloat16), nullcontext()),
        (torch.zeros(1, 2, 3, device="meta"), nullcontext()),
        (nn.Parameter(torch.zeros(1, 2, 3)), nullcontext()),
        (torch.zeros(1, 2, 3), torch.enable_grad()),
        (torch.zeros(1, 2, 3), torch.autocast("cpu", torch.bfloat16)),
        (torch.zeros(1, 2, 3), TorchDispatchMode()),
    ],
)
@torch.no_grad()
def test_gradients_other_numbers_and_watchers_have_torch_s_operators(
    x: Tensor, around: AbstractContextManager[Any]
) -> None:
    assert on_cpu.suits(torch.zeros(1, 2, 3))
    with around:
        assert not on_cpu.suits(x)


def test_a_count_of_multiply_adds_sees_torch_s_operators() -> None:
    model, image = small_vit(), images_for(small_vit(), count=1)
    plan = plan_for(model, STEP)
    with counted() as asked, torch.no_grad(), merged(model, plan) as fast:
        assert count_macs(fast, image) == pytest.approx(plan.macs, rel=2e-3)
    assert asked == [0]


@pytest.fixture
def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where numba is not installed."""
    monkeypatch.setattr(loops, "module_of", lambda name: None)


@needs_onednn
@pytest.mark.usefixtures("without_loops")
def test_a_merged_model_multiplies_by_onednn_and_a_dense_one_as_it_is() -> None:
    model = small_vit()
    images = images_for(model)
    with counted() as asked, torch.no_grad():
        with merged(model, plan_for(model)) as same:
            same(images)
        assert asked == [0]
        with merged(model, plan_for(model, STEP)) as fast:
            fast(images)
        assert asked == [4 * 4]


@needs_onednn
@pytest.mark.usefixtures("without_loops")
@pytest.mark.parametrize("kind", sorted(KINDS))
@torch.no_grad()
def test_every_kind_of_model_gives_the_same_logits_by_onednn(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model)
    with merged(model, plan_for(model, STEP)) as fast:
        with counted(least=1 << 62) as asked:
            plain = fast(images)
        assert asked == [0]
        with counted() as asked:
            quick = fast(images)
        assert asked[0] >= 2 * 4
    torch.testing.assert_close(quick, plain, atol=2e-4, rtol=2e-4)


def test_a_merged_model_has_gradients() -> None:
    model = copy.deepcopy(small_vit())
    with merged(model, plan_for(model, STEP)) as fast:
        fast(images_for(model)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
