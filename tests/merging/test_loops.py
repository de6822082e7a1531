"""The compiled loop gives what the tensor functions give, which have the laws."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from loop_runs import drawn, on_threads
from small_vits import images_for, plan_for, small_vit
from torch import Tensor

from dsm_tune.merging import compiled_step, loops
from dsm_tune.merging.compiled_step import Merge
from dsm_tune.merging.halves import Projections
from dsm_tune.merging.joining import Tokens, merge
from dsm_tune.merging.loops import team
from dsm_tune.merging.matching import choose_edges, halves, similarity, unit
from dsm_tune.merging.merged import merged
from dsm_tune.merging.scores import LEAST_SHARE, attention_to
from dsm_tune.plan import Matching, Step

pytest.importorskip("numba", reason="without numba, torch's operators take the steps")
seeds = st.integers(0, 9999)


def exact_features(seed: int, *shape: int) -> Tensor:
    """Features [B, N, H, d] with exact similarities, and the more equal ones the smaller d is.

    H is 1, 2 or 4 and d a power of 4, so that all means, lengths and products are exact.
    """
    batch, count, heads, width = shape
    signs = drawn(seed, batch, count, 1, width, levels=2) * 2 - 1
    return signs * torch.tensor([1.0, 3.0, 1.0, 3.0][:heads]).unsqueeze(1)


def projections(seed: int, *shape: int) -> Projections:
    """Queries, keys and values as a block has them: views of one tensor."""
    qkv = torch.stack([exact_features(seed + i, *shape) for i in range(3)], dim=2)
    return Projections(*qkv.permute(2, 0, 3, 1, 4).unbind(0), 0.125)


def merge_plainly(tokens: Tokens, *features: Tensor, r: int, prefix: int = 1) -> Tokens:
    """A merge by features alone."""
    parts = Projections(features[0], features[0], features[0], 1.0)
    step = Step(0, "merge", r)
    given = Merge(tokens, features, parts, None, step, Matching(), prefix)
    return compiled_step.merged_tokens(given)


matchings = st.builds(
    Matching,
    quota=st.sampled_from(["equal", "free"]),
    position=st.sampled_from(["destination", "centroid"]),
    salience=st.sampled_from([0.0, 0.3]),
    attention=st.sampled_from(["class", "received"]),
    size_penalty=st.sampled_from([0.0, 0.2]),
    attention_weight=st.sampled_from([0.0, 0.5, 1.0]),
    norm=st.sampled_from(["free", "mean", "largest"]),
)


@torch.no_grad()
@settings(max_examples=200)
@given(
    seed=seeds, batch=st.integers(1, 3), prefix=st.integers(0, 4), patches=st.integers(2, 60),
    heads=st.sampled_from([1, 2, 4]), width=st.sampled_from([1, 4, 16, 64]), options=matchings,
    window=st.sampled_from([None, 1, 2, 5]), sized=st.booleans(), whose=st.sampled_from("qkv"),
    threads=st.integers(1, 5), data=st.data(),
)  # fmt: skip
def test_the_same_edges_merge_into_the_same_tokens(
    seed: int, batch: int, prefix: int, patches: int, heads: int, width: int, options: Matching,
    window: int | None, sized: bool, whose: str, threads: int, data: st.DataObject,
) -> None:  # fmt: skip
    count = prefix + patches
    x = drawn(seed, batch, count, 5)
    size = 1 + drawn(seed + 1, batch, count, levels=4) if sized else None
    place = None
    if window or seed % 2:  # means of places may lie just below what they are
        place = drawn(seed + 2, batch, count, 2, levels=9) - drawn(seed, 1, levels=2) * 1e-4
    tokens = Tokens(x, size, place, torch.arange(count).repeat(batch, 1))
    parts = projections(seed + 3, batch, count, heads, width)
    r = data.draw(st.integers(1, halves(x, prefix)[0].shape[1]))  # else it is no step
    step, log_size = Step(0, "merge", r, window), None if size is None else size.log()
    given = Merge(tokens, (getattr(parts, whose),), parts, log_size, step, options, prefix)

    plain = compiled_step.by_operators(given)
    assert compiled_step.suits(x)
    with on_threads(threads):
        loop = compiled_step.merged_tokens(given)

    assert torch.equal(loop.origin, plain.origin)  # the same edges, in the same order
    assert torch.equal(loop.size, plain.size)
    torch.testing.assert_close(loop.x, plain.x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loop.log_size, plain.size.log(), atol=1e-6, rtol=1e-6)
    if place is not None:
        torch.testing.assert_close(loop.place, plain.place, atol=1e-5, rtol=1e-5)
    before = {tuple(row.tolist()) for row in x.flatten(0, 1)}
    alone = before & {tuple(row.tolist()) for row in plain.x.flatten(0, 1)}
    # What nothing joins keeps its bits.
    assert alone <= {tuple(row.tolist()) for row in loop.x.flatten(0, 1)}


@torch.no_grad()
def test_scores_that_rounding_makes_equal_or_unequal_are_so_in_both() -> None:
    for seed in range(20):  # attentions that differ by a last bit, if at all
        parts = projections(seed, 2, 33, 1, 1)
        tokens = Tokens(drawn(seed, 2, 33, 5), origin=torch.arange(33).repeat(2, 1))
        options = Matching(salience=0.3, attention="received")
        given = Merge(tokens, (parts.q,), parts, None, Step(0, "merge", 9), options, 0)
        found, plain = compiled_step.merged_tokens(given), compiled_step.by_operators(given)
        assert torch.equal(found.origin, plain.origin)


@given(seed=seeds, where=st.integers(0, 599), window=st.sampled_from([None, 2]))
@torch.no_grad()
def test_numbers_that_are_none_still_make_a_partition(
    seed: int, where: int, window: int | None
) -> None:
    feature = drawn(seed, 1, 1, 200, 3)
    feature.view(-1)[where:] = torch.nan
    parts = Projections(feature, feature, feature, 1.0)
    place = drawn(seed, 1, 200, 2, levels=4)
    tokens = Tokens(drawn(seed, 1, 200, 3), None, place, torch.arange(200)[None])
    options, step = Matching(salience=0.2), Step(0, "merge", 40, window)
    left = compiled_step.merged_tokens(Merge(tokens, (feature,), parts, None, step, options, 0))
    assert left.size is not None
    assert left.origin is not None
    assert left.size.sum() == 200
    assert left.origin[0].bincount(minlength=160).tolist() == left.size[0].tolist()


@given(
    seed=seeds, batch=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]),
    count=st.integers(2, 40), width=st.sampled_from([1, 4, 16]),
    layout=st.sampled_from(["own", "turned", "one for all"]),
)  # fmt: skip
@torch.no_grad()
def test_features_and_keys_may_lie_in_memory_as_they_like(
    seed: int, batch: int, heads: int, count: int, width: int, layout: str
) -> None:
    parts = projections(seed, batch, count, heads, width)
    feature = parts.k.contiguous()
    feature[:, :, 0] = 0  # of no direction
    if layout == "turned":
        feature = feature.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "one for all":
        feature = feature[:1].expand(batch, -1, -1, -1)
    parts = parts._replace(k=feature)
    tokens = Tokens(drawn(seed, batch, count, 3), origin=torch.arange(count).repeat(batch, 1))
    given = Step(0, "merge", 1), Matching(salience=0.1), 0
    found = compiled_step.merged_tokens(Merge(tokens, (feature,), parts, None, *given))
    plain = compiled_step.by_operators(Merge(tokens, (feature.clone(),), parts, None, *given))
    assert torch.equal(found.origin, plain.origin)


@torch.no_grad()
def test_a_token_without_attention_keeps_some_weight() -> None:
    parts = projections(0, 1, 41, 1, 64)._replace(scale=1.0)
    received = attention_to("class", parts, None)
    assert (received * 41 < LEAST_SHARE).sum() > 10
    tokens, step = Tokens(drawn(1, 1, 41, 5)), Step(0, "merge", 20)
    given = Merge(tokens, (parts.k,), parts, None, step, Matching(attention_weight=1.0), 1)
    found, plain = compiled_step.merged_tokens(given), compiled_step.by_operators(given)
    torch.testing.assert_close(found.x, plain.x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("several", [1, 2])
@torch.no_grad()
def test_similarities_are_those_of_the_tensor_functions_but_for_rounding(several: int) -> None:
    features, x = [drawn(i, 1, 3, 101, 37) for i in range(several)], drawn(9, 1, 101, 4)
    features[-1] *= 9  # each counts alike
    means = [unit(feature.mean(dim=1)) for feature in features]
    scores = similarity(torch.cat(means, dim=2), 1)
    best, partner = scores.max(dim=2)
    assert scores.topk(2).values.diff(dim=2).abs().min() > 1e-5  # no rounding changes an edge
    assert best.sort().values.diff().min() > 1e-6
    tokens = Tokens(x, origin=torch.arange(101)[None])
    for r in (1, 7, 50):
        plain = merge(tokens, choose_edges(scores, r), 1)
        assert torch.equal(merge_plainly(tokens, *features, r=r).origin, plain.origin)
    assert partner.unique().numel() > 10


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@torch.no_grad()
def test_bits_depend_on_neither_threads_nor_other_images(threads: int) -> None:
    x, parts = drawn(0, 23, 41, 6), projections(1, 23, 41, 2, 16)
    place = torch.stack([torch.arange(41) // 7, torch.arange(41) % 7], dim=1).expand(23, -1, -1)
    size, step = 1 + drawn(2, 23, 41, levels=4), Step(0, "merge", 9, 3)
    options = Matching(
        salience=0.3, attention_weight=0.5, size_penalty=0.1, norm="mean", position="centroid"
    )

    def left(some: slice) -> Tokens:
        origin = torch.arange(41).expand(len(x[some]), -1)
        tokens = Tokens(x[some], size[some], place[some].float(), origin)
        q, k, v = (one[some] for one in parts[:3])
        of_some, log_size = Projections(q, k, v, parts.scale), size[some].log()
        given = Merge(tokens, (k,), of_some, log_size, step, options, 1)
        return compiled_step.merged_tokens(given)

    with on_threads(1):
        alone = [left(slice(i, i + 1)) for i in range(23)]
    with on_threads(threads):
        together = left(slice(0, 23))
        shared = left(slice(5, 6))
    for one, whole, own in zip(zip(*alone, strict=True), together, shared, strict=True):
        assert torch.equal(torch.cat(one), whole)
        assert torch.equal(one[5], own)


def test_python_s_threads_may_merge_at_once() -> None:
    x, feature = drawn(0, 4, 41, 6), drawn(1, 4, 3, 41, 8)

    @torch.no_grad()
    def merge_it(_: int) -> Tensor:
        return merge_plainly(Tokens(x), feature, r=9).x

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(merge_it, range(40))
    assert all(torch.equal(one, first) for one in others)


def test_a_team_may_be_smaller_than_asked_for() -> None:
    code = """
import torch
from dsm_tune.merging.compiled_step import Merge, merged_tokens
from dsm_tune.merging.halves import Projections
from dsm_tune.merging.joining import Tokens
from dsm_tune.plan import Matching, Step
torch.set_num_threads(4)
x, k = torch.randn(9, 31, 4), torch.randn(9, 2, 31, 8)
with torch.no_grad():
    parts, step = Projections(k, k, k, 1.0), Step(0, "merge", 5)
    left = merged_tokens(Merge(Tokens(x), (k,), parts, None, step, Matching(), 1))
print((left.size.sum(dim=1) == 31).all().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_THREAD_LIMIT": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"


@torch.no_grad()
def test_without_a_team_one_thread_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x, feature = drawn(0, 3, 21, 6), drawn(1, 3, 3, 21, 8)
    with_team = merge_plainly(Tokens(x), feature, r=5)
    monkeypatch.setattr(team, "START", None)
    assert torch.equal(merge_plainly(Tokens(x), feature, r=5).x, with_team.x)


@torch.no_grad()
def test_without_numba_torch_s_operators_take_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit(grid=(14, 14))
    images = images_for(model)
    plan = plan_for(model, (0, "merge", 30, 4), (2, "merge", 40, None))
    with merged(model, plan) as fast:
        with_loops = fast(images)
        monkeypatch.delitem(sys.modules, "dsm_tune.merging.loops.step")
        monkeypatch.setitem(sys.modules, "numba", None)
        loops.module_of.cache_clear()
        try:
            assert not compiled_step.suits(images)
            without = fast(images)
        finally:
            monkeypatch.undo()
            loops.module_of.cache_clear()
    assert compiled_step.suits(images)
    torch.testing.assert_close(without, with_loops, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_same_forward_twice_gives_the_same_bits() -> None:
    model = small_vit(grid=(14, 14))
    images = images_for(model)
    with merged(model, plan_for(model, (0, "merge", 30, 4), (2, "merge", 40, None))) as fast:
        assert torch.equal(fast(images), fast(images))


def test_where_machine_code_cannot_be_kept_it_is_made_anew() -> None:
    code = "from dsm_tune.merging.loops.step import step; print(step._cache.cache_path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"},  # fits no plain file
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"
