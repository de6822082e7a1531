"""Attention as a compiled loop: what torch's own gives, which serves wherever the loop does not."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from loop_runs import counted, drawn, on_threads
from small_vits import small_vit
from torch import Tensor
from torch.autograd import forward_ad

import dsm_tune
from dsm_tune.merging import loops, on_cpu
from dsm_tune.merging.halves import attend

pytest.importorskip("numba", reason="without numba, torch's operator attends")
from dsm_tune.merging.loops.attention import LEAST_SIDE
from dsm_tune.merging.loops.lanes import PAYS

seeds = st.integers(0, 9999)
needs_lanes = pytest.mark.skipif(not PAYS, reason="the loop is for AVX2 and AVX-512")


def projections(seed: int, batch: int, count: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, H, N, d] as a block has them: views of one tensor."""
    return drawn(seed, batch, count, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return found.transpose(1, 2).flatten(2)


@needs_lanes
@torch.no_grad()
@given(
    seed=seeds, batch=st.integers(1, 3), heads=st.integers(1, 3), keys=st.integers(LEAST_SIDE, 90),
    queries=st.integers(on_cpu.LEAST_QUERIES, 90), width=st.integers(LEAST_SIDE, 70),
    layout=st.sampled_from(["one tensor", "own", "turned", "one for all heads"]),
    is_biased=st.booleans(), spread=st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_it_is_torch_s_but_for_rounding(
    seed: int, batch: int, heads: int, keys: int, queries: int, width: int, layout: str,
    is_biased: bool, spread: float,
) -> None:  # fmt: skip
    q = drawn(seed, batch, heads, queries, width) * spread
    k, v = projections(seed + 1, batch, keys, heads, width)[:2]
    if layout == "own":
        k, v = k.contiguous(), v.contiguous()
    elif layout == "turned":
        q, v = (one.transpose(2, 3).contiguous().transpose(2, 3) for one in (q, v))
    elif layout == "one for all heads":
        k = k[:, :1].expand(-1, heads, -1, -1)
    bias = drawn(seed + 2, batch, 1, 1, 2 * keys)[..., ::2] if is_biased else None
    scale = width**-0.5
    with counted() as asked:
        found = on_cpu.attention(q, k, v, scale, bias)
    assert asked == [1]
    exact = by_torch(
        q.double(), k.double(), v.double(), scale, None if bias is None else bias.double()
    )
    of_torch = (by_torch(q, k, v, scale, bias) - exact).abs().max()
    assert (found - exact).abs().max() <= 1e-6 * (1 + spread) + 2 * of_torch


@needs_lanes
@torch.no_grad()
def test_an_exponential_is_right_to_its_last_bits_down_to_the_least_normal_number() -> None:
    logits = -torch.linspace(0, 86, 5000)
    bias = torch.full((5000, 1, 1, LEAST_SIDE), -1e4)
    bias[:, 0, 0, 0], bias[:, 0, 0, 1] = 0.0, logits
    q = torch.zeros(5000, 1, on_cpu.LEAST_QUERIES, LEAST_SIDE)
    k, v = torch.zeros(2, 5000, 1, LEAST_SIDE, LEAST_SIDE).unbind()
    v[:, 0, 1] = 1.0
    found = on_cpu.attention(q, k, v, 1.0, bias)[:, 0, 0].double()
    expected = logits.double().sigmoid()  # exp(x) / (1 + exp(x))
    assert (found / expected - 1).abs().max() < 1e-6


@needs_lanes
@torch.no_grad()
def test_logits_as_large_as_they_like_give_no_infinity() -> None:
    q, k, v = (one * 1e4 for one in projections(0, 2, 40, 2, 16))
    found = on_cpu.attention(q, k, v, 1.0)
    torch.testing.assert_close(found, by_torch(q, k, v, 1.0))


@needs_lanes
@torch.no_grad()
def test_a_number_that_is_none_is_handed_on_where_torch_hands_it_on() -> None:
    q, k, v = (one.contiguous() for one in projections(0, 2, 40, 2, 16))
    q[0, 0, 3, 5] = k[1, 1, 39, 0] = v[0, 1, 20, 7] = torch.nan
    found = on_cpu.attention(q, k, v, 0.25)
    torch.testing.assert_close(found, by_torch(q, k, v, 0.25), equal_nan=True)
    assert 0 < found.isnan().float().mean() < 1


@needs_lanes
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@torch.no_grad()
def test_bits_depend_on_neither_threads_nor_other_images(threads: int) -> None:
    q, k, v = projections(0, 7, 43, 2, 24)  # no thread's part ends where a head's does
    bias = drawn(1, 7, 1, 1, 43)
    each = zip(*(one.split(1) for one in (q, k, v, bias)), strict=True)
    alone = [on_cpu.attention(*three, 0.2, more) for *three, more in each]
    with on_threads(threads):
        assert torch.equal(on_cpu.attention(q, k, v, 0.2, bias), torch.cat(alone))
    fewer = on_cpu.attention(q[:, :, :20], k, v, 0.2, bias)
    assert torch.equal(fewer, torch.cat(alone)[:, :20])


@needs_lanes
def test_python_s_threads_may_attend_at_once() -> None:
    q, k, v = projections(0, 4, 41, 3, 16)

    @torch.no_grad()
    def once(_: int) -> Tensor:
        return on_cpu.attention(q, k, v, 0.25)

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(once, range(40))
    assert all(torch.equal(one, first) for one in others)


@pytest.mark.parametrize(
    ("queries", "keys", "width", "dtype"),
    [
        (on_cpu.LEAST_QUERIES - 1, 40, 16, torch.float32),
        (40, LEAST_SIDE - 1, 16, torch.float32),
        (40, 40, LEAST_SIDE - 1, torch.float32),
        (40, 40, 16, torch.float64),
        (40, 40, 16, torch.bfloat16),
    ],
)
@torch.no_grad()
def test_what_the_loop_is_not_for_stays_torch_s(
    queries: int, keys: int, width: int, dtype: torch.dtype
) -> None:
    q = drawn(0, 2, 3, queries, width).to(dtype)
    k, v = drawn(1, 2, 2, 3, keys, width).to(dtype).unbind()
    with counted() as asked:
        assert torch.equal(on_cpu.attention(q, k, v, 0.2), by_torch(q, k, v, 0.2))
    assert asked == [0]


Changed = dict[str, Tensor]


@pytest.mark.parametrize(
    "changed",
    [
        {"k": drawn(1, 2, 1, 40, 16)},  # one for all heads
        {"v": drawn(1, 2, 3, 40, 24)},
        {"bias": drawn(1, 1, 1, 1, 40)},
        {"bias": drawn(1, 2, 3, 40, 40)},
        {"bias": drawn(1, 2, 1, 1, 40) > 0},
    ],
    ids=["one key for all heads", "wide values", "one bias for all", "full bias", "mask"],
)
@torch.no_grad()
def test_shapes_and_kinds_that_the_loop_does_not_know_stay_torch_s(changed: Changed) -> None:
    given = dict(zip("qkv", drawn(0, 3, 2, 3, 40, 16).unbind(), strict=True)) | changed
    with counted() as asked:
        found = on_cpu.attention(scale=0.2, **given)
    assert asked == [0]
    assert torch.equal(found, by_torch(scale=0.2, **given))


@torch.no_grad()
def test_numbers_of_two_kinds_are_refused_as_torch_refuses_them() -> None:
    q, k, v = drawn(0, 3, 2, 3, 40, 16).unbind()
    with pytest.raises(RuntimeError, match="same dtype"):
        on_cpu.attention(q, k.double(), v, 0.2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # and of its tangents
@torch.no_grad()
def test_transforms_see_torch_s_operator() -> None:
    q, k, v = drawn(0, 3, 4, 2, 3, 20, 16).unbind()
    each = torch.func.vmap(lambda q, k, v: on_cpu.attention(q, k, v, 0.2))(q, k, v)
    torch.testing.assert_close(each[1], on_cpu.attention(q[1], k[1], v[1], 0.2))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(drawn(1, 1, 9, 20), drawn(2, 1, 9, 20))
        tangent = forward_ad.unpack_dual(on_cpu.product(x, drawn(3, 8, 20), None)).tangent
    torch.testing.assert_close(tangent, drawn(2, 1, 9, 20) @ drawn(3, 8, 20).T)


@torch.no_grad()
def test_dropout_in_training_drops() -> None:
    block = copy.deepcopy(next(iter(small_vit().blocks))).train()
    block.attn.attn_drop.p = 0.5
    x = drawn(0, 1, 17, 16)
    torch.manual_seed(0)
    first = attend(block, x, None)[0]
    assert not torch.equal(attend(block, x, None)[0], first)
    torch.manual_seed(0)
    assert torch.equal(attend(block, x, None)[0], first)
    block.eval()
    assert torch.equal(attend(block, x, None)[0], attend(block, x, None)[0])


def test_registers_of_eight_numbers_give_the_same() -> None:
    code = """
import torch
from llvmlite import binding
features = binding.targets.FeatureMap({"avx": True, "avx2": True, "fma": True})
binding.get_host_cpu_features = lambda: features
from dsm_tune.merging import on_cpu
from dsm_tune.merging.loops.attention import LEAST_SIDE
from dsm_tune.merging.loops.lanes import LANES, PAYS
assert (LANES, LEAST_SIDE, PAYS) == (16, 6, True)
with torch.no_grad():
    for keys, queries, width in [(6, 8, 6), (7, 17, 11), (197, 33, 64), (50, 50, 16)]:
        q, k, v = (torch.randn(2, 3, n, width) for n in (queries, keys, keys))
        bias = torch.randn(2, 1, 1, keys)
        found = on_cpu.attention(q, k, v, 0.3, bias)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=0.3)
        torch.testing.assert_close(found, exact.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "same\n"


def test_gradients_flow() -> None:
    q, k, v = (one.requires_grad_() for one in drawn(0, 3, 1, 2, 20, 16).unbind())
    on_cpu.attention(q, k, v, 0.25).sum().backward()
    assert all(one.grad is not None for one in (q, k, v))


@torch.no_grad()
def test_without_numba_torch_s_operator_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = projections(0, 2, 40, 2, 16)
    monkeypatch.delitem(sys.modules, "dsm_tune.merging.loops.attention")
    monkeypatch.setitem(sys.modules, "numba", None)
    loops.module_of.cache_clear()
    try:
        assert torch.equal(on_cpu.attention(q, k, v, 0.25), by_torch(q, k, v, 0.25))
    finally:
        monkeypatch.undo()
        loops.module_of.cache_clear()


def test_machine_code_is_made_anew_once_another_file_that_it_is_made_of_has_changed(
    tmp_path: Path,
) -> None:
    package = tmp_path / "dsm_tune"
    found = Path(dsm_tune.__file__).parent
    shutil.copytree(found, package, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    merging = package / "merging"
    code = "from dsm_tune.merging.loops.attention import attend; print(attend._cache_hits)"

    def hits() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": ""},
        )  # fmt: skip
        return done.stdout.strip()

    assert hits() == "0"
    assert hits() == "1"
    for file in (merging / "loops" / "lanes.py", merging / "scores.py"):
        with file.open("a") as text:
            text.write("\n# changed\n")
        assert hits() == "0"
