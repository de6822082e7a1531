"""Compiled loops give what the tensor functions give, which have the laws."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from small_vits import images_for, plan_for, small_vit
from torch import Tensor

from dsm_tune.merging import compiled
from dsm_tune.merging.joining import Tokens, merge
from dsm_tune.merging.matching import choose_edges, halves, unit
from dsm_tune.merging.merged import merged

pytest.importorskip("numba", reason="without numba, torch's operators take the steps")
seeds = st.integers(0, 9999)


def drawn(seed: int, *shape: int, levels: int = 0) -> Tensor:
    """Numbers of a normal distribution, or as many different ones as ``levels``, for ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


@torch.no_grad()
@given(
    seed=seeds, batch=st.integers(1, 3), prefix=st.integers(0, 4), patches=st.integers(2, 60),
    levels=st.sampled_from([0, 1, 3]), kinds=st.sampled_from([0, 1, 4]),
    flags=st.tuples(*[st.booleans()] * 6),
    norm=st.sampled_from(["free", "mean", "largest"]), data=st.data(),
)  # fmt: skip
def test_the_same_edges_merge_into_the_same_tokens(
    seed: int, batch: int, prefix: int, patches: int, levels: int, kinds: int,
    flags: tuple[bool, ...], norm: str, data: st.DataObject,
) -> None:  # fmt: skip
    has_bonus, equal, sized, weighed, centroid, placed = flags
    count = prefix + patches
    x = drawn(seed, batch, count, 5)
    tokens = Tokens(
        x,
        1 + drawn(seed + 1, batch, count, levels=4) if sized else None,
        drawn(seed + 2, batch, count, 2, levels=9) if placed else None,
        torch.arange(count).repeat(batch, 1),
    )
    evens, odds = (half.shape[1] for half in halves(x, prefix))
    r = data.draw(st.integers(1, evens))  # a step that removes nothing is none
    scores = drawn(seed + 3, batch, evens, odds, levels=levels)
    weight = drawn(seed + 4, batch, count).abs() + 0.1 if weighed else None
    tiles = None
    if kinds:
        tiles = (
            drawn(seed + 5, batch, evens, levels=kinds),
            drawn(seed + 6, batch, odds, levels=kinds),
        )
    bonus = drawn(seed + 7, batch, evens, levels=levels) if has_bonus else None
    chosen_by: dict[str, Any] = {"bonus": bonus, "tiles": tiles, "equal_quota": equal}
    joined_by: dict[str, Any] = {"weight": weight, "norm": norm, "centroid": centroid}

    plain = merge(tokens, choose_edges(scores, r, **chosen_by), prefix, **joined_by)
    assert compiled.suits(x)
    loops = compiled.merge_best(tokens, scores, r, prefix, **chosen_by, **joined_by)

    assert torch.equal(loops.origin, plain.origin)  # the same edges, in the same order
    assert torch.equal(loops.size, plain.size)
    torch.testing.assert_close(loops.x, plain.x, atol=1e-5, rtol=1e-5)
    if placed:
        torch.testing.assert_close(loops.place, plain.place, atol=1e-5, rtol=1e-5)
    before = {tuple(row.tolist()) for row in x.flatten(0, 1)}
    alone = before & {tuple(row.tolist()) for row in plain.x.flatten(0, 1)}
    # What nothing joins keeps its bits.
    assert alone <= {tuple(row.tolist()) for row in loops.x.flatten(0, 1)}


@given(seed=seeds, where=st.integers(0, 35), has_tiles=st.booleans())
@torch.no_grad()
def test_numbers_that_are_none_still_make_a_partition(
    seed: int, where: int, has_tiles: bool
) -> None:
    scores = drawn(seed, 1, 6, 6)
    scores.view(-1)[where:] = torch.nan
    tiles = (drawn(seed, 1, 6, levels=2), drawn(seed, 1, 6, levels=2)) if has_tiles else None
    tokens = Tokens(drawn(seed, 1, 12, 3), origin=torch.arange(12)[None])
    left = compiled.merge_best(tokens, scores, 4, 0, tiles=tiles)
    assert left.size is not None
    assert left.origin is not None
    assert left.size.sum() == 12
    assert left.origin[0].bincount(minlength=8).tolist() == left.size[0].tolist()


@given(
    seed=seeds, batch=st.integers(1, 3), heads=st.integers(1, 4), count=st.integers(1, 9),
    width=st.integers(1, 20), which=st.integers(0, 2),
    layout=st.sampled_from(["qkv", "own", "turned"]),
)  # fmt: skip
@torch.no_grad()
def test_unit_means_are_those_of_the_tensor_functions(
    seed: int, batch: int, heads: int, count: int, width: int, which: int, layout: str
) -> None:
    x = drawn(seed, batch, count, 3, heads, width).permute(2, 0, 3, 1, 4)[which]
    x[:, :, 0] = 0  # of no direction
    if layout == "own":
        x = x.contiguous()
    elif layout == "turned":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    found = compiled.unit_mean(x)
    torch.testing.assert_close(found, unit(x.mean(dim=1)), atol=1e-5, rtol=1e-5)
    assert not found[:, 0].any()


@torch.no_grad()
def test_without_numba_torch_s_operators_take_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit(grid=(14, 14))
    images = images_for(model)
    plan = plan_for(model, (0, "merge", 30, 4), (2, "merge", 40, None))
    with merged(model, plan) as fast:
        with_loops = fast(images)
        monkeypatch.delitem(sys.modules, "dsm_tune.merging.loops")
        monkeypatch.setitem(sys.modules, "numba", None)
        compiled._loops.cache_clear()
        try:
            assert not compiled.suits(images)
            without = fast(images)
        finally:
            monkeypatch.undo()
            compiled._loops.cache_clear()
    assert compiled.suits(images)
    torch.testing.assert_close(without, with_loops, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_same_forward_twice_gives_the_same_bits() -> None:
    model = small_vit(grid=(14, 14))
    images = images_for(model)
    with merged(model, plan_for(model, (0, "merge", 30, 4), (2, "merge", 40, None))) as fast:
        assert torch.equal(fast(images), fast(images))


def test_where_machine_code_cannot_be_kept_it_is_made_anew() -> None:
    code = "from dsm_tune.merging import loops; print(loops.step._cache.cache_path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"},  # fits no plain file
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"
