"""Laws of matching, merging and pruning, on tensors alone."""

from __future__ import annotations

import dataclasses
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

from dsm_tune.merging.dropping import fuse, prune
from dsm_tune.merging.joining import Tokens, merge
from dsm_tune.merging.matching import Choice, choose_edges, halves, similarity, tile


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens on a grid of which some have merged before, and how many are to merge now."""

    tokens: Tokens
    prefix: int
    grid: tuple[int, int]
    r: int

    @property
    def count(self) -> int:
        return self.tokens.x.shape[1]

    def sizes(self) -> Tensor:
        size = self.tokens.size
        return torch.ones(self.tokens.x.shape[:2]) if size is None else size


@st.composite
def cases(draw: st.DrawFn, most: int = 40) -> Case:
    prefix = draw(st.integers(0, 5))
    grid = draw(st.integers(1, 7)), draw(st.integers(2, 7))  # one patch has no partner
    seed, batch = draw(st.integers(0, 999)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)
    patches = min(grid[0] * grid[1], most)
    x = torch.randn(batch, prefix + patches, 6, generator=generator)
    at = torch.arange(patches)
    place = torch.cat(
        [torch.zeros(prefix, 2), torch.stack([at // grid[1], at % grid[1]], 1).float()]
    )
    origin = torch.arange(prefix + patches).repeat(batch, 1)
    tokens = Tokens(x, None, place.expand(batch, -1, -1), origin)
    if draw(st.booleans()):
        first = draw(st.integers(0, (patches - 1) // 2))
        tokens = merge(tokens, _choose(tokens, prefix, first), prefix)
    left = tokens.x.shape[1] - prefix
    return Case(tokens, prefix, grid, draw(st.integers(0, left // 2)))


def _choose(tokens: Tokens, prefix: int, r: int) -> Choice:
    return choose_edges(similarity(tokens.x, prefix), r)


def _tiles(case: Case, window: int) -> tuple[Tensor, Tensor]:
    assert case.tokens.place is not None
    even, odd = halves(case.tokens.place, case.prefix)
    return tile(even, window), tile(odd, window)


@given(cases())
def test_a_merge_removes_exactly_r_tokens(case: Case) -> None:
    result = merge(case.tokens, _choose(case.tokens, case.prefix, case.r), case.prefix)
    assert result.x.shape[1] == case.count - case.r


@given(cases())
def test_sizes_sum_to_the_starting_count_after_a_merge(case: Case) -> None:
    result = merge(case.tokens, _choose(case.tokens, case.prefix, case.r), case.prefix)
    assert result.size is not None
    assert torch.equal(result.size.sum(dim=1), case.sizes().sum(dim=1))
    assert result.size.dtype == torch.float32


@given(cases())
def test_a_merge_preserves_the_size_weighted_sum_of_tokens(case: Case) -> None:
    result = merge(case.tokens, _choose(case.tokens, case.prefix, case.r), case.prefix)
    assert result.size is not None
    before = (case.tokens.x * case.sizes().unsqueeze(2)).sum(dim=1)
    after = (result.x * result.size.unsqueeze(2)).sum(dim=1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@given(cases(), st.booleans())
def test_a_centroid_is_the_size_weighted_mean_of_the_places(case: Case, centroid: bool) -> None:
    choice = _choose(case.tokens, case.prefix, case.r)
    result = merge(case.tokens, choice, case.prefix, centroid=centroid)
    assert result.place is not None
    assert result.size is not None
    assert case.tokens.place is not None
    if centroid:
        before = (case.tokens.place * case.sizes().unsqueeze(2)).sum(dim=1)
        after = (result.place * result.size.unsqueeze(2)).sum(dim=1)
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-4)
    else:
        there = {tuple(place) for place in case.tokens.place.flatten(0, 1).tolist()}
        assert {tuple(place) for place in result.place.flatten(0, 1).tolist()} <= there


@given(cases())
def test_prefix_tokens_stay_untouched_in_order_and_of_size_1(case: Case) -> None:
    result = merge(case.tokens, _choose(case.tokens, case.prefix, case.r), case.prefix)
    assert torch.equal(result.x[:, : case.prefix], case.tokens.x[:, : case.prefix])
    assert result.size is not None
    assert (result.size[:, : case.prefix] == 1).all()
    assert result.origin is not None
    for p in range(case.prefix):
        assert (result.origin[:, p] == p).all()
        assert ((result.origin == p).sum(dim=1) == 1).all()


@given(cases())
def test_the_source_map_is_a_partition_whose_counts_are_the_sizes(case: Case) -> None:
    result = merge(case.tokens, _choose(case.tokens, case.prefix, case.r), case.prefix)
    assert result.origin is not None
    assert result.size is not None
    for origin, size in zip(result.origin, result.size, strict=True):
        counts = torch.bincount(origin, minlength=result.x.shape[1])
        assert counts.tolist() == size.tolist()


@given(cases())
def test_order_is_prefix_then_unmerged_even_then_odd(case: Case) -> None:
    choice = _choose(case.tokens, case.prefix, case.r)
    result = merge(case.tokens, choice, case.prefix)
    even, odd = halves(case.tokens.x, case.prefix)
    for image in range(len(even)):
        kept = choice.kept[image].tolist()
        assert kept == sorted(kept)
        front = result.x[image, case.prefix : case.prefix + len(kept)]
        assert torch.equal(front, even[image, kept])
        behind = result.x[image, case.prefix + len(kept) :]
        untouched = [o for o in range(len(behind)) if o not in choice.destination[image].tolist()]
        torch.testing.assert_close(behind[untouched], odd[image, untouched])


@given(cases())
def test_each_even_token_offers_the_edge_to_its_best_partner_and_the_best_edges_merge(
    case: Case,
) -> None:
    scores = similarity(case.tokens.x, case.prefix)
    assume(scores.shape[2] > 0)
    choice = choose_edges(scores, case.r)
    best = scores.max(dim=2)
    for image in range(len(scores)):
        merged, kept = choice.source[image], choice.kept[image]
        assert sorted([*merged.tolist(), *kept.tolist()]) == list(range(scores.shape[1]))
        assert torch.equal(choice.destination[image], best.indices[image, merged])
        if len(merged) and len(kept):
            assert best.values[image, merged].min() >= best.values[image, kept].max()


@given(cases())
def test_one_window_chooses_the_same_edges_as_global_matching(case: Case) -> None:
    scores = similarity(case.tokens.x, case.prefix)
    one = choose_edges(scores, case.r, tiles=_tiles(case, max(case.grid)))
    free = choose_edges(scores, case.r, tiles=_tiles(case, max(case.grid)), equal_quota=False)
    everywhere = choose_edges(scores, case.r)
    for name in ("kept", "source", "destination"):
        assert torch.equal(getattr(one, name), getattr(everywhere, name))
        assert torch.equal(getattr(free, name), getattr(everywhere, name))


@given(cases(), st.integers(1, 4), st.booleans())
def test_merged_pairs_share_a_window_whenever_capacity_allows(
    case: Case, window: int, equal: bool
) -> None:
    even, odd = _tiles(case, window)
    choice = choose_edges(
        similarity(case.tokens.x, case.prefix), case.r, tiles=(even, odd), equal_quota=equal
    )
    for image in range(len(even)):
        can = sum(bool((odd[image] == t).any()) for t in even[image])
        pairs = zip(choice.source[image], choice.destination[image], strict=True)
        share = [bool(even[image, a] == odd[image, b]) for a, b in pairs]
        assert sum(share) == min(case.r, can)
        assert share == sorted(share, reverse=True)


@given(cases(), st.integers(1, 4))
def test_equal_quotas_differ_by_at_most_one_unless_a_window_is_exhausted(
    case: Case, window: int
) -> None:
    even, odd = _tiles(case, window)
    choice = choose_edges(similarity(case.tokens.x, case.prefix), case.r, tiles=(even, odd))
    for image in range(len(even)):
        there = set(odd[image].tolist())
        capacity = Counter(t for t in even[image].tolist() if t in there)
        taken: Counter[float] = Counter(dict.fromkeys(capacity, 0))
        for a, b in zip(choice.source[image], choice.destination[image], strict=True):
            if even[image, a] == odd[image, b]:
                taken[float(even[image, a])] += 1
        open_windows = [count for t, count in taken.items() if count < capacity[t]]
        if open_windows:
            assert max(taken.values()) - min(open_windows) <= 1


@given(cases(), st.integers(1, 4))
def test_free_quota_takes_the_best_edges_inside_windows(case: Case, window: int) -> None:
    scores = similarity(case.tokens.x, case.prefix)
    even, odd = _tiles(case, window)
    choice = choose_edges(scores, case.r, tiles=(even, odd), equal_quota=False)
    inside = scores.masked_fill(even.unsqueeze(2) != odd.unsqueeze(1), -torch.inf)
    assume(scores.shape[2] > 0)
    best = inside.max(dim=2).values
    for image in range(len(scores)):
        merged, kept = best[image, choice.source[image]], best[image, choice.kept[image]]
        if len(merged) and len(kept) and merged.min() > -torch.inf:
            assert merged.min() >= kept.max()


def test_ties_go_to_the_lower_index() -> None:
    choice = choose_edges(torch.ones(1, 5, 4), 2)
    assert choice.source.tolist() == [[0, 1]]
    assert choice.destination.tolist() == [[0, 0]]
    assert choice.kept.tolist() == [[2, 3, 4]]


def test_ties_among_windows_go_to_the_lower_index() -> None:
    even, odd = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    choice = choose_edges(torch.ones(1, 4, 3), 3, tiles=(even, odd))
    assert choice.source.tolist() == [[0, 2, 1]]
    assert choice.destination.tolist() == [[0, 1, 0]]


def test_an_edge_across_a_border_ranks_after_all_edges_inside_windows() -> None:
    scores = torch.tensor([[[1.0, -1.0], [-0.9, 0.9], [0.8, 0.7]]])
    even, odd = torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    for equal in (True, False):
        choice = choose_edges(scores, 3, tiles=(even, odd), equal_quota=equal)
        assert choice.source.tolist() == [[1, 0, 2]]
        assert choice.destination.tolist() == [[1, 1, 0]]


def test_windows_of_24_by_24_with_side_8_are_nine() -> None:
    at = torch.arange(24 * 24)
    place = torch.stack([at // 24, at % 24], dim=1).float()[None]
    counts = Counter(tile(place, 8)[0].tolist())
    assert sorted(counts.values()) == [64] * 9


def test_windows_of_13_by_17_with_side_7_are_cut_at_the_border() -> None:
    at = torch.arange(13 * 17)
    place = torch.stack([at // 17, at % 17], dim=1).float()[None]
    counts = Counter(tile(place, 7)[0].tolist())
    assert sorted(counts.values()) == sorted([49, 49, 21, 42, 42, 18])


def test_zero_features_give_cosine_0_and_no_nan() -> None:
    feature = torch.zeros(2, 9, 4)
    assert torch.equal(similarity(feature, 1), torch.zeros(2, 4, 4))
    feature[:, 3] = 1
    assert similarity(feature, 1).isfinite().all()


@pytest.mark.parametrize("patches", [2, 3])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_the_smallest_sequences_match_and_merge(patches: int, prefix: int) -> None:
    tokens = Tokens(torch.randn(2, prefix + patches, 4), None, None, None)
    r = patches // 2
    result = merge(tokens, _choose(tokens, prefix, r), prefix)
    assert result.x.shape[1] == prefix + patches - r
    assert result.x.isfinite().all()


@given(cases())
def test_the_same_merge_twice_gives_the_same_bits(case: Case) -> None:
    once, again = (
        merge(case.tokens, _choose(case.tokens, case.prefix, case.r), case.prefix) for _ in range(2)
    )
    assert torch.equal(once.x, again.x)
    assert torch.equal(once.size, again.size)  # type: ignore[arg-type]


@given(cases())
def test_an_image_alone_merges_as_in_a_batch(case: Case) -> None:
    together = merge(case.tokens, _choose(case.tokens, case.prefix, case.r), case.prefix)
    size = case.tokens.size
    for image in range(len(case.tokens.x)):
        lone = Tokens(
            case.tokens.x[image : image + 1], None if size is None else size[image : image + 1]
        )
        alone = merge(lone, _choose(lone, case.prefix, case.r), case.prefix)
        torch.testing.assert_close(alone.x[0], together.x[image])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_keeps_the_dtype_of_tokens_and_sums_sizes_in_float32(dtype: torch.dtype) -> None:
    tokens = Tokens(torch.randn(1, 21, 8).to(dtype))
    result = merge(tokens, _choose(tokens, 1, 7), 1)
    assert result.x.dtype == dtype
    assert result.size is not None
    assert result.size.dtype == torch.float32


@given(cases(), st.data())
def test_pruning_keeps_the_largest_scores_in_order(case: Case, data: st.DataObject) -> None:
    patches = case.count - case.prefix
    r = data.draw(st.integers(0, patches - 1))
    scores = torch.randn(len(case.tokens.x), patches, generator=torch.Generator().manual_seed(r))
    result = prune(case.tokens, scores, r, case.prefix)
    for image in range(len(scores)):
        ranked = sorted(range(patches), key=lambda i: -float(scores[image, i]))
        kept = sorted(ranked[: patches - r])
        rows = [*range(case.prefix), *(case.prefix + i for i in kept)]
        assert torch.equal(result.x[image], case.tokens.x[image, rows])
        assert result.origin is not None
        assert case.tokens.origin is not None
        for before, after in zip(case.tokens.origin[image], result.origin[image], strict=True):
            assert int(after) == (rows.index(int(before)) if int(before) in rows else -1)


@given(cases(), st.data(), st.sampled_from(["free", "mean", "largest"]), st.booleans())
def test_fusing_makes_one_token_of_the_lowest_scores_and_keeps_the_partition(
    case: Case, data: st.DataObject, norm: str, centroid: bool
) -> None:
    tokens, prefix = case.tokens, case.prefix
    patches = tokens.x.shape[1] - prefix
    if patches < 2:
        return
    r = data.draw(st.integers(1, patches - 1))
    scores = tokens.x[:, prefix:, 0].abs()
    fused = fuse(tokens, scores, r, prefix, norm=norm, centroid=centroid)
    dropped = prune(tokens, scores, r, prefix) if r < patches - 1 else None
    assert fused.x.shape[1] == tokens.x.shape[1] - r
    assert fused.x.isfinite().all()
    assert torch.equal(fused.x[:, :prefix], tokens.x[:, :prefix])
    if dropped is not None:  # all but the best of those that go are gone either way
        assert {tuple(row) for row in fused.x[0, prefix:-1].tolist()} <= {
            tuple(row) for row in dropped.x[0, prefix:].tolist()
        }
    assert fused.size is not None
    assert (fused.size.sum(dim=1) == case.sizes().sum(dim=1)).all()
    assert fused.origin is not None
    for origin, size in zip(fused.origin, fused.size, strict=True):
        assert torch.bincount(origin).tolist() == size.tolist()
    if norm == "free":
        assert (fused.x[:, -1].abs().amax(dim=1) <= tokens.x.abs().amax(dim=(1, 2)) + 1e-5).all()


def test_the_fused_token_is_the_mean_weighed_by_the_scores() -> None:
    tokens = Tokens(torch.tensor([[[9.0, 9.0], [4.0, 0.0], [1.0, 1.0], [0.0, 2.0]]]))
    fused = fuse(tokens, torch.tensor([[0.6, 0.1, 0.3]]), 1, 1)
    expected = [[9.0, 9.0], [4.0, 0.0], [0.25 * 1 + 0.0, 0.25 * 1 + 0.75 * 2]]
    torch.testing.assert_close(fused.x[0], torch.tensor(expected))
    assert fused.size is not None
    assert fused.size.tolist() == [[1, 1, 2]]
    zero = fuse(tokens, torch.zeros(1, 3), 2, 1)
    torch.testing.assert_close(zero.x[0, 1], tokens.x[0, 1:].mean(dim=0))


def test_of_equal_scores_the_token_with_the_higher_index_is_pruned() -> None:
    tokens = Tokens(torch.arange(5.0).view(1, 5, 1))
    result = prune(tokens, torch.ones(1, 4), 2, 1)
    assert result.x.flatten().tolist() == [0.0, 1.0, 2.0]
