"""Laws of a whole model under a plan."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_vits import GRIDS, KINDS, geometry, images_for, plan_for, small_vit
from torch import Tensor, nn

from dsm_tune.errors import ModelError, PlanError
from dsm_tune.merging.halves import attend, run
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.merged import apply, finish, merged, merged_view, trace
from dsm_tune.merging.published import dsm_plan, tome_plan
from dsm_tune.merging.similarity import similarity_curve
from dsm_tune.plan import FEATURES, Matching, MergePlan, Step

ROUNDING = {"atol": 2e-4, "rtol": 2e-4}


@torch.no_grad()
def logits_of(model: nn.Module, plan: MergePlan, images: Tensor) -> Tensor:
    with merged(model, plan) as fast:
        return fast(images)


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, MergePlan]:
    """A kind of small model and any plan for it."""
    kind, grid = draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(GRIDS[:3]))
    shape = geometry(kind, grid)
    patches = shape.patches
    steps = [
        Step(
            block,
            draw(st.sampled_from(["merge", "merge", "prune", "fuse"])),
            draw(st.integers(0, patches // 2)),
            draw(st.none() | st.integers(1, max(grid) + 1)),
        )
        for block in range(shape.depth)
        if draw(st.integers(0, 3))
    ]
    attentions = ["received", "class"] if shape.prefix else ["received"]
    matching = Matching(
        feature=draw(st.sampled_from(FEATURES)),
        quota=draw(st.sampled_from(["equal", "free"])),
        position=draw(st.sampled_from(["destination", "centroid"])),
        salience=draw(st.sampled_from([0.0, 0.5])),
        attention_weight=draw(st.sampled_from([0.0, 1.0])),
        norm=draw(st.sampled_from(["free", "mean", "largest"])),
        attention=draw(st.sampled_from(attentions)),
        size_penalty=draw(st.sampled_from([0.0, 0.1])),
        prune_score=draw(st.sampled_from(["norm", *attentions, *(["ats"] * bool(shape.prefix))])),
    )
    return kind, MergePlan("", shape, tuple(steps), matching, draw(st.booleans()))


# Invariant 1
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_removes_nothing_leaves_logits_bit_equal(kind: str) -> None:
    model = small_vit(kind, (13, 17))
    images = images_for(model)
    with torch.no_grad():
        dense = model(images)
    for plan in [
        tome_plan(model, 0),
        dsm_plan(model, 20, delay=4),
        dsm_plan(model, 20, delay=99),
        plan_for(model),
        plan_for(model, (1, "prune", 0, None)),
        dsm_plan(model, 20).dense(),
    ]:
        assert torch.equal(logits_of(model, plan, images), dense)


# Invariant 3
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quota", ["equal", "free"])
def test_a_window_as_large_as_the_grid_is_global_bit_for_bit(kind: str, quota: str) -> None:
    model = small_vit(kind, (13, 17))
    images = images_for(model)
    everywhere = plan_for(model, (0, "merge", 50, None), (2, "merge", 30, None))
    local = plan_for(
        model, (0, "merge", 50, 17), (2, "merge", 30, 99), matching=Matching(quota=quota)
    )
    smaller = plan_for(
        model, (0, "merge", 50, 4), (2, "merge", 30, 99), matching=Matching(quota=quota)
    )
    assert torch.equal(logits_of(model, local, images), logits_of(model, everywhere, images))
    assert not torch.equal(logits_of(model, smaller, images), logits_of(model, everywhere, images))


# Invariants 4, 5, 6 and 8, and 12
@given(plans())
@settings(max_examples=60)
def test_every_block_leaves_as_many_tokens_as_the_plan_says_and_a_partition(
    drawn: tuple[str, MergePlan],
) -> None:
    kind, plan = drawn
    model = small_vit(kind, plan.geometry.grid)
    images = images_for(model)
    start, prefix = plan.geometry.tokens, plan.geometry.prefix
    for before, after, r in zip(plan.tokens[:-1], plan.tokens[1:], plan.removed, strict=True):
        assert after == before - r
    assert logits_of(model, plan, images).isfinite().all()
    seen: list[Tensor] = []
    with torch.no_grad(), merged(model, plan) as fast:
        tokens = Tokens(fast.norm_pre(fast._pos_embed(fast.patch_embed(images))))
        pruned_before = False
        for block in range(plan.geometry.depth):
            tokens = fast.blocks.run_block(tokens, block)
            assert tokens.x.shape[1] == plan.tokens[block + 1]
            assert tokens.x.isfinite().all()
            step = fast.blocks.steps.get(block)
            pruned_before = pruned_before or (step is not None and step.kind == "prune")
            if tokens.size is not None:
                seen.append(tokens.size)
                assert (tokens.size[:, :prefix] == 1).all()
                if not pruned_before:
                    assert (tokens.size.sum(dim=1) == start).all()
            else:
                seen.append(torch.ones(tokens.x.shape[:2]))
    origins = trace(model, plan, images)
    assert len(origins) == plan.geometry.depth
    for origin, size in zip(origins, seen, strict=True):
        for image in range(len(images)):
            alive = origin[image][origin[image] >= 0]
            assert torch.bincount(alive, minlength=size.shape[1]).tolist() == size[image].tolist()
        assert torch.equal(origin[:, :prefix], torch.arange(prefix).expand(len(images), -1))


# Invariant 6
def test_merging_in_the_last_block_leaves_what_a_class_token_head_reads() -> None:
    model = small_vit("registers", (14, 14))
    images = images_for(model)
    with torch.no_grad():
        dense = model(images)
    plan = plan_for(model, (3, "merge", 90, None))
    torch.testing.assert_close(logits_of(model, plan, images), dense, **ROUNDING)


# Invariant 9
@given(plans())
@settings(max_examples=20)
def test_an_image_alone_gives_what_it_gives_in_a_batch(drawn: tuple[str, MergePlan]) -> None:
    kind, plan = drawn
    model = small_vit(kind, plan.geometry.grid)
    images = images_for(model, 10)
    together = logits_of(model, plan, images)
    alone = torch.cat([logits_of(model, plan, image[None]) for image in images])
    assert (
        (alone - together).abs().amax(dim=1) < 1e-3
    ).sum() >= 9  # a near tie may break differently


# Invariant 10
@given(st.integers(0, 999), st.integers(0, 3), st.sampled_from(["class", "qk_norm", "layerscale"]))
def test_attention_over_merged_identical_tokens_equals_attention_over_the_duplicates(
    seed: int, block: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (9,), generator=generator)
    x = torch.randn(1, 9, 16, generator=generator)
    owner = torch.arange(9).repeat_interleave(sizes)
    layer = small_vit(kind).blocks[block]
    with torch.no_grad():
        duplicated, _ = attend(layer, x[:, owner], None)
        shared, _ = attend(layer, x, sizes.float().log()[None])
    torch.testing.assert_close(shared[:, owner], duplicated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["class", "avg", "avg_class", "qk_norm", "layerscale"])
def test_merging_identical_patches_leaves_the_logits(kind: str) -> None:
    model = copy.deepcopy(small_vit(kind, (14, 14)))
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = 0
    pixels = torch.tensor([2 * (column // 2) + pixel for column in range(14) for pixel in range(2)])
    images = images_for(model)[:, :, :, pixels]  # patches 2i and 2i + 1 are twins
    with torch.no_grad():
        dense = model(images)
    plan = plan_for(model, (0, "merge", 98, None))
    assert plan.removed[0] == 98
    torch.testing.assert_close(logits_of(model, plan, images), dense, **ROUNDING)
    without = dataclasses.replace(plan, proportional_attention=False)
    assert logits_of(model, without, images).isfinite().all()


# Invariant 11
@pytest.mark.parametrize("feature", ["k", "q", "v", "kv", "k_all", "kv_all", "x"])
@pytest.mark.parametrize("kind", ["class", "avg", "registers"])
def test_zero_keys_give_no_nan(feature: str, kind: str) -> None:
    model = copy.deepcopy(small_vit(kind))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    attention = "class" if model.num_prefix_tokens else "received"
    matching = Matching(
        feature=feature,
        salience=0.5,
        attention=attention,
        size_penalty=0.1,
        norm="mean",
        attention_weight=1.0,
    )
    plan = plan_for(
        model, (0, "merge", 5, 3), (1, "merge", 3, None), (2, "prune", 2, None), matching=matching
    )
    assert logits_of(model, plan, images_for(model)).isfinite().all()


# Invariant 12
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (1, 1), (1, 7), (3, 3)])
def test_the_smallest_grids_and_r_beyond_half_work_and_are_clamped(
    kind: str, grid: tuple[int, int]
) -> None:
    model = small_vit(kind, grid)
    for plan in [
        tome_plan(model, 10_000),
        dsm_plan(model, 10_000, delay=0, window=1),
        plan_for(model, (0, "prune", 10_000, None), (1, "merge", 10_000, 1)),
        plan_for(model, (0, "fuse", 10_000, None), (1, "fuse", 10_000, None)),
    ]:
        assert plan.tokens[-1] == plan.geometry.prefix + 1
        assert logits_of(model, plan, images_for(model)).isfinite().all()


def test_nine_windows_merge_an_equal_number_each() -> None:
    model = small_vit("class", (24, 24), depth=2)
    plan = dsm_plan(model, 90, delay=0, window=8, local_blocks=1)
    origin = trace(model, plan, images_for(model, 1))[0][0, 1:].view(24, 24)
    for row in range(0, 24, 8):
        for column in range(0, 24, 8):
            window = origin[row : row + 8, column : column + 8]
            assert len(window.unique()) == 64 - 10


# Invariant 13
@contextmanager
def left_as_it_was(model: nn.Module, images: Tensor) -> Iterator[None]:
    def look() -> tuple[object, ...]:
        modules = dict(model.named_modules())
        return (
            {name: (id(module), type(module), module.training) for name, module in modules.items()},
            {name: sorted(vars(module)) for name, module in modules.items()},
            {name: len(module._forward_pre_hooks) for name, module in modules.items()},
            {name: len(module._forward_hooks) for name, module in modules.items()},
            list(model.state_dict()),
        )

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before, logits = look(), model(images)
        yield
        assert look() == before
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        assert torch.equal(model(images), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_on_leaving_the_model_is_as_it_was(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model)
    with left_as_it_was(model, images), merged(model, tome_plan(model, 3)) as fast:
        assert fast is model
        fast(images)


@pytest.mark.parametrize("kind", ["class", "avg", "distilled"])
def test_after_an_exception_the_model_is_as_it_was(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model)
    plan = tome_plan(model, 3)
    with left_as_it_was(model, images):
        with pytest.raises(ZeroDivisionError), merged(model, plan):
            raise ZeroDivisionError
        with pytest.raises(AssertionError, match="Input height"), merged(model, plan) as fast:
            fast(torch.randn(1, 3, 3, 3))


def test_modes_of_single_blocks_survive() -> None:
    model = copy.deepcopy(small_vit("class"))
    model.train()
    model.blocks[1].eval()
    with merged(model, tome_plan(model, 3)):
        assert [block.training for block in nn.Sequential.__iter__(model.blocks)] == [
            True,
            False,
            True,
            True,
        ]
    assert not model.blocks[1].training


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_of_a_merged_model_is_the_dense_one(kind: str) -> None:
    model = small_vit(kind)
    names = list(model.state_dict())
    with merged(
        model, dataclasses.replace(tome_plan(model, 3), matching=Matching("random"))
    ) as fast:
        assert list(fast.state_dict()) == names
        fast.load_state_dict(fast.state_dict(), strict=True)


@pytest.mark.parametrize("kind", ["class", "avg", "distilled"])
def test_a_deep_copy_of_a_merged_model_stands_on_its_own(kind: str) -> None:
    model = copy.deepcopy(small_vit(kind))
    images = images_for(model)
    with torch.no_grad(), merged(model, tome_plan(model, 3)) as fast:
        logits = fast(images)
        twin = copy.deepcopy(fast)
        for parameter in fast.parameters():
            parameter.zero_()
        assert torch.equal(twin(images), logits)
        assert twin.double()(images.double()).dtype == torch.float64


def test_apply_merges_for_good_until_its_result_is_called() -> None:
    model = copy.deepcopy(small_vit("avg"))
    images = images_for(model)
    plan = tome_plan(model, 3)
    expected = logits_of(model, plan, images)
    with left_as_it_was(model, images):
        restore = apply(model, plan)
        assert torch.equal(model(images), expected)
        restore()


@pytest.mark.parametrize("kind", ["class", "avg", "distilled"])
def test_a_view_shares_the_weights_and_leaves_the_model_as_it_is(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model)
    plans = [tome_plan(model, 3), tome_plan(model, 1)]
    expected = [logits_of(model, plan, images) for plan in plans]
    with left_as_it_was(model, images):
        views = [merged_view(model, plan) for plan in plans]
        assert [torch.equal(view(images), e) for view, e in zip(views, expected, strict=True)] == [
            True,
            True,
        ]
        for view in views:
            shared = zip(view.parameters(), model.parameters(), strict=True)
            assert all(ours is theirs for ours, theirs in shared)


def test_merging_twice_is_refused_and_the_first_plan_stays() -> None:
    model = small_vit("class")
    images = images_for(model)
    plan = tome_plan(model, 3)
    expected = logits_of(model, plan, images)
    with merged(model, plan) as fast:
        with pytest.raises(ModelError, match=r"^a model must not be merged twice.*already$"):
            apply(model, plan)
        with torch.no_grad():
            assert torch.equal(fast(images), expected)


def test_a_plan_for_another_geometry_is_refused() -> None:
    model = small_vit("class")
    for other in [
        small_vit("class", (13, 17)),
        small_vit("registers"),
        small_vit("class", depth=5),
    ]:
        with (
            pytest.raises(
                PlanError, match=r"^the plan is for Geometry.*but the model has Geometry.*$"
            ),
            merged(model, tome_plan(other, 3)),
        ):
            pass


def test_a_plan_fits_another_model_of_the_same_geometry() -> None:
    model = small_vit("layerscale")
    plan = dataclasses.replace(tome_plan(small_vit("class"), 3), model="of another name")
    assert logits_of(model, plan, images_for(model)).shape == (2, 5)


def test_an_input_of_another_size_is_refused() -> None:
    model = copy.deepcopy(small_vit("class"))
    model.patch_embed.strict_img_size = False
    model.pos_embed = nn.Parameter(torch.randn(1, 1, 16))
    with (
        merged(model, tome_plan(model, 3)) as fast,
        pytest.raises(
            PlanError, match=r"^the plan is for 17 tokens, but the model made 26 of this input$"
        ),
    ):
        fast(torch.randn(1, 3, 10, 10))


def test_what_runs_the_blocks_one_by_one_is_refused() -> None:
    model = small_vit("class")
    images = images_for(model)
    calls = [
        lambda fast: fast.forward_intermediates(images),
        lambda fast: fast.forward_intermediates(images, indices=[0], stop_early=True),
        lambda fast: fast(images, is_causal=True),
        lambda fast: similarity_curve(fast, images),
    ]
    with merged(model, tome_plan(model, 3)) as fast:
        for call in calls:
            with pytest.raises(ModelError, match=r"^[^\n]*$"):
                call(fast)


def test_training_with_patch_dropping_is_refused() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, patch_drop_rate=0.5
    )
    with pytest.raises(ModelError, match="patch_drop_rate"), merged(model, tome_plan(model, 3)):
        pass
    with merged(model.eval(), tome_plan(model, 3)) as fast:
        assert fast(torch.randn(1, 3, 8, 8)).shape == (1, 1000)


# Invariant 15
@given(plans())
@settings(max_examples=15)
def test_the_same_plan_twice_gives_the_same_bits(drawn: tuple[str, MergePlan]) -> None:
    kind, plan = drawn
    model = small_vit(kind, plan.geometry.grid)
    images = images_for(model)
    assert torch.equal(logits_of(model, plan, images), logits_of(model, plan, images))


# The free saving in the last block
@pytest.mark.parametrize(
    "kind", ["class", "distilled", "registers", "qk_norm", "layerscale", "pre_norm"]
)
def test_a_prefix_only_last_block_leaves_the_logits(kind: str) -> None:
    model = small_vit(kind, (13, 17))
    images = images_for(model)
    for steps in [(), ((0, "merge", 50, 7), (2, "merge", 40, None))]:
        full = plan_for(model, *steps)
        saving = dataclasses.replace(full, last_block="prefix")
        torch.testing.assert_close(
            logits_of(model, saving, images), logits_of(model, full, images), **ROUNDING
        )
        assert saving.macs < full.macs


@pytest.mark.parametrize("kind", ["avg", "avg_class", "avg_prefix"])
def test_a_prefix_only_last_block_is_refused_where_the_head_reads_patches(kind: str) -> None:
    with pytest.raises(
        PlanError, match="last_block must be 'all' where the head reads patch tokens"
    ):
        plan_for(small_vit(kind), last_block="prefix")


# The parts that trials use
@given(plans())
@settings(max_examples=20)
def test_finishing_from_the_tokens_before_the_first_step_gives_the_bits_of_a_forward(
    drawn: tuple[str, MergePlan],
) -> None:
    kind, plan = drawn
    model = small_vit(kind, plan.geometry.grid)
    images = images_for(model)
    first = min((step.block for step in plan.active_steps), default=plan.geometry.depth - 1)
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block in model.blocks[:first]:
            tokens = block(tokens) if plan.is_dense else run(block, tokens)
        assert torch.equal(finish(model, plan, tokens, first), logits_of(model, plan, images))


@pytest.mark.parametrize("kind", ["avg", "avg_class", "avg_prefix"])
def test_an_average_pooling_head_takes_the_mean_over_original_tokens(kind: str) -> None:
    model = small_vit(kind, (14, 14))
    images = images_for(model)
    plan = plan_for(model, (3, "merge", 98, None))
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    with torch.no_grad(), merged(model, plan) as fast:
        tokens = fast.blocks.run(Tokens(fast.norm_pre(fast._pos_embed(fast.patch_embed(images)))))
        logits = fast(images)
    assert tokens.size is not None
    with torch.no_grad():
        spread = model.norm(tokens.x)[0, first:].repeat_interleave(
            tokens.size[0, first:].long(), dim=0
        )
        expected = model.head(model.fc_norm(spread.mean(dim=0)))
    torch.testing.assert_close(logits[0], expected, **ROUNDING)


def test_random_features_follow_the_seed() -> None:
    model = small_vit("class", (14, 14))
    images = images_for(model)
    first, same, other = (
        logits_of(
            model,
            plan_for(model, (0, "merge", 60, None), matching=Matching("random", seed=seed)),
            images,
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_demo_of_delay_and_windows_works_on_photographs(
    deit_tiny: nn.Module, photos: Tensor
) -> None:
    with torch.no_grad():
        dense = deit_tiny(photos[:8])
    for plan in [
        tome_plan(deit_tiny, 13),
        tome_plan(deit_tiny, 13, inflection=-1.0),
        dsm_plan(deit_tiny, 16),
    ]:
        logits = logits_of(deit_tiny, plan, photos[:8])
        assert (logits.argmax(1) == dense.argmax(1)).float().mean() >= 0.75
    with left_as_it_was(deit_tiny, photos[:2]), merged(deit_tiny, dsm_plan(deit_tiny, 16)) as fast:
        fast(photos[:2])
