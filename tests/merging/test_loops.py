"""Compiled loops give what the tensor functions give, which have the laws."""

from __future__ import annotations

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from small_vits import images_for, plan_for, small_vit
from torch import Tensor

from dsm_tune.merging import compiled
from dsm_tune.merging.joining import Tokens, merge
from dsm_tune.merging.matching import Choice, choose_edges, halves
from dsm_tune.merging.merged import merged

pytest.importorskip("numba", reason="without numba, torch's operators take the steps")
seeds = st.integers(0, 9999)


def drawn(seed: int, *shape: int, levels: int = 0) -> Tensor:
    """Numbers of a normal distribution, or as many different ones as ``levels``, for ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


@given(
    seed=seeds, batch=st.integers(1, 3), evens=st.integers(1, 40), odds=st.integers(1, 40),
    levels=st.sampled_from([0, 1, 3]), has_bonus=st.booleans(),
    kinds=st.sampled_from([0, 1, 4]), equal=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_same_edges_are_chosen(
    seed: int, batch: int, evens: int, odds: int, levels: int, has_bonus: bool,
    kinds: int, equal: bool, data: st.DataObject,
) -> None:  # fmt: skip
    r = data.draw(st.integers(0, evens))
    scores = drawn(seed, batch, evens, odds, levels=levels)
    bonus = drawn(seed + 1, batch, evens, levels=levels) if has_bonus else None
    tiles = None
    if kinds:
        tiles = (
            drawn(seed + 2, batch, evens, levels=kinds),
            drawn(seed + 3, batch, odds, levels=kinds),
        )
    found = []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert compiled.suits(scores) == (mode is torch.no_grad)
            found.append(choose_edges(scores, r, bonus=bonus, tiles=tiles, equal_quota=equal))
    plain, loops = found
    assert torch.equal(loops.order, plain.order)
    assert torch.equal(loops.destination, plain.destination)


@given(
    seed=seeds, batch=st.integers(1, 3), prefix=st.integers(0, 4), patches=st.integers(2, 60),
    sized=st.booleans(), weighed=st.booleans(), norm=st.sampled_from(["free", "mean", "largest"]),
    centroid=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_same_tokens_come_of_a_merge(
    seed: int, batch: int, prefix: int, patches: int, sized: bool, weighed: bool, norm: str,
    centroid: bool, data: st.DataObject,
) -> None:  # fmt: skip
    count = prefix + patches
    x = drawn(seed, batch, count, 5)
    size = 1 + drawn(seed + 1, batch, count, levels=4) if sized else None
    weight = drawn(seed + 2, batch, count).abs() + 0.1 if weighed else None
    place = drawn(seed + 3, batch, count, 2, levels=9)
    origin = torch.arange(count).repeat(batch, 1)
    even, odd = halves(x, prefix)
    r = data.draw(st.integers(1, even.shape[1]))  # a step that removes nothing is none
    order = drawn(seed + 4, batch, even.shape[1]).argsort(dim=1)
    destination = drawn(seed + 5, batch, r, levels=odd.shape[1]).long()
    found = []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            found.append(
                merge(
                    Tokens(x, size, place, origin),
                    Choice(order, destination),
                    prefix,
                    weight=weight,
                    norm=norm,
                    centroid=centroid,
                )
            )
    plain, loops = found
    torch.testing.assert_close(loops.x, plain.x, atol=1e-5, rtol=1e-5)
    assert torch.equal(loops.size, plain.size)
    torch.testing.assert_close(loops.place, plain.place, atol=1e-5, rtol=1e-5)
    assert torch.equal(loops.origin, plain.origin)
    kept = x.flatten(0, 1)
    alone = [row for row in plain.x.flatten(0, 1) if (kept == row).all(dim=1).any()]
    here = {tuple(row.tolist()) for row in loops.x.flatten(0, 1)}
    assert {tuple(row.tolist()) for row in alone} <= here  # what nothing joins keeps its bits


@given(seed=seeds, where=st.integers(0, 35), has_tiles=st.booleans())
def test_numbers_that_are_none_still_make_a_choice(seed: int, where: int, has_tiles: bool) -> None:
    scores = drawn(seed, 1, 6, 6)
    scores.view(-1)[where:] = torch.nan
    tiles = (drawn(seed, 1, 6, levels=2), drawn(seed, 1, 6, levels=2)) if has_tiles else None
    with torch.no_grad():
        choice = choose_edges(scores, 4, tiles=tiles)
        left = merge(Tokens(drawn(seed, 1, 12, 3)), choice, 0)
    assert sorted(choice.order[0].tolist()) == list(range(6))
    assert 0 <= int(choice.destination.min()) <= int(choice.destination.max()) < 6
    assert left.size is not None
    assert left.size.sum() == 12


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
    code = "from dsm_tune.merging import loops; print(loops.choose.stats.cache_path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"},  # fits no plain file
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"
