"""Blocks in one series of loops: what they give one by one, for as long as they do not change."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from loop_runs import counted, drawn, on_threads
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dsm_tune.merging import compiled_blocks
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.blocks import MergedBlocks
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.merged import merged_view
from dsm_tune.plan import Matching, MergePlan, Step

pytest.importorskip("numba", reason="without numba, there are no loops")
from dsm_tune.merging.loops.lanes import PAYS, REGISTER

pytestmark = pytest.mark.skipif(not PAYS, reason="the loops are for AVX2 and AVX-512")
seeds = st.integers(0, 9999)
WIDTH, DEPTH, SIDE = 3 * REGISTER, 5, 7
Change = Callable[[Any], object]


def a_model(seed: int = 0, side: int = SIDE, **options: Any) -> VisionTransformer:
    """A model in eval mode whose numbers are drawn."""
    options = {"depth": DEPTH, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 4, **options}
    model = VisionTransformer(img_size=2 * side, patch_size=2, embed_dim=WIDTH, **options)
    for i, parameter in enumerate(model.eval().requires_grad_(False).parameters()):
        noise = drawn(seed + i, *parameter.shape)
        parameter.copy_(noise / noise[0].numel() ** 0.5 if noise.ndim > 1 else 1 + 0.3 * noise)
    return model


def under(model: VisionTransformer, *steps: Step, **options: Any) -> Any:
    """The model under a plan."""
    return merged_view(model, MergePlan("", read_geometry(model), steps, **options))


def planned(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What a call gives when its series is planned: not the first time."""
    call(x)
    return call(x)


def usual() -> tuple[Step, ...]:
    return Step(1, "merge", 6, 2), Step(2, "merge", 9), Step(3, "merge", 4)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Let blocks run one by one."""
    kept, compiled_blocks.run = compiled_blocks.run, lambda *_, **__: None
    try:
        yield
    finally:
        compiled_blocks.run = kept


def alone(blocks: Any, x: Tensor) -> Tokens:
    with one_by_one():
        found: Tokens = blocks.run(Tokens(x))
    return found


def alike(found: Tokens, right: Tokens) -> bool:
    """Whether all of two is equal, bit by bit; what a series knows beyond that is not compared."""
    pairs = [(a, b) for a, b in zip(found, right, strict=True) if b is not None]
    return all(torch.equal(a, b) for a, b in pairs)


plans = st.builds(
    Matching,
    feature=st.sampled_from(["k", "q", "v", "x", "kv", "k_all", "kv_all"]),
    quota=st.sampled_from(["equal", "free"]),
    position=st.sampled_from(["destination", "centroid"]),
    salience=st.sampled_from([0.0, 0.3]),
    size_penalty=st.sampled_from([0.0, 0.2]),
    attention_weight=st.sampled_from([0.0, 0.5]),
    norm=st.sampled_from(["free", "largest"]),
)


@torch.no_grad()
@given(
    seed=seeds, batch=st.integers(1, 3), options=plans, counts_sizes=st.booleans(),
    last_block=st.sampled_from(["all", "prefix"]), threads=st.integers(1, 3),
    steps=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, 2, 3])),
                   min_size=DEPTH, max_size=DEPTH),
)  # fmt: skip
def test_a_series_gives_the_bits_of_its_blocks_one_by_one(
    seed: int, batch: int, options: Matching, counts_sizes: bool, last_block: Any, threads: int,
    steps: list[tuple[int, int | None]],
) -> None:  # fmt: skip
    local = max((i for i, (r, side) in enumerate(steps) if side and r), default=-1)
    taken = tuple(
        Step(i, "merge", r, (side or 2) if i <= local else None)
        for i, (r, side) in enumerate(steps)
        if r and (i < DEPTH - 1 or last_block == "all")
    )
    model = a_model(seed, init_values=0.5 if seed % 2 else None)
    plan = MergePlan(
        "", read_geometry(model), taken, options,
        proportional_attention=counts_sizes, last_block=last_block,
    )  # fmt: skip
    blocks = MergedBlocks(model.blocks, plan)
    x = drawn(seed, batch, SIDE * SIDE + 1, WIDTH)
    with on_threads(threads):  # the bits of torch's operators depend on them
        found = planned(lambda x: blocks.run(Tokens(x)), x)
        assert alike(found, alone(blocks, x))


@torch.no_grad()
def test_all_blocks_of_a_plan_are_one_call() -> None:
    blocks, x = under(a_model(), *usual()).blocks, drawn(0, 1, SIDE * SIDE + 1, WIDTH)
    with counted() as asked:
        blocks(x)
    assert asked == [2 * DEPTH + 3]  # to plan takes longer than it saves once
    for _ in range(2):
        with counted() as asked:
            blocks(x)
        assert asked == [1]


@pytest.mark.parametrize(
    ("other", "after"),
    [
        (Step(3, "prune", 5), Matching()),
        (Step(3, "fuse", 5), Matching(position="centroid")),
        (Step(3, "merge", 5, 3), Matching(feature="k", salience=0.1, attention="received")),
        (Step(3, "merge", 5, 3), Matching(feature="random", position="centroid")),
    ],
    ids=["prune", "fuse", "attention of all", "at random"],
)
@torch.no_grad()
def test_what_no_loop_does_goes_on_from_what_a_series_left(other: Step, after: Matching) -> None:
    first = Step(1, "merge", 6, 3)
    model = a_model(3)
    plan = MergePlan("", read_geometry(model), (first, other, Step(4, "merge", 3)), after)
    blocks, x = MergedBlocks(model.blocks, plan), drawn(0, 2, SIDE * SIDE + 1, WIDTH)
    found = planned(lambda x: blocks.run(Tokens(x)), x)
    assert alike(found, alone(blocks, x))


@torch.no_grad()
def test_a_mean_over_sizes_is_that_of_the_blocks_one_by_one() -> None:
    model = a_model(2, class_token=False, global_pool="avg", fc_norm=False)
    view, images = under(model, *usual()), drawn(1, 2, 3, 2 * SIDE, 2 * SIDE)
    found = planned(view, images)
    with one_by_one():
        assert torch.equal(found, view(images))


@torch.no_grad()
def test_what_was_given_out_stays_as_it_is() -> None:
    blocks = under(a_model(), *usual()).blocks
    x, other = drawn(0, 2, SIDE * SIDE + 1, WIDTH), drawn(1, 2, SIDE * SIDE + 1, WIDTH)
    found = planned(lambda x: blocks.run(Tokens(x)), x)
    kept = [None if one is None else one.clone() for one in found]
    blocks.run(Tokens(other))
    assert alike(found, Tokens(*kept))
    assert found.x.untyped_storage().nbytes() == 4 * found.x.numel()  # nothing else lives on


@torch.no_grad()
def test_tokens_that_do_not_lie_side_by_side_are_read_as_they_are() -> None:
    blocks = under(a_model(), *usual()).blocks
    x = drawn(0, SIDE * SIDE + 1, 2, WIDTH).transpose(0, 1)
    assert torch.equal(planned(blocks, x), blocks(x.contiguous()))


@torch.no_grad()
def test_each_batch_size_has_its_series_and_none_is_kept_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_blocks, "MOST", 4)
    blocks = under(a_model(), *usual()).blocks
    x = drawn(0, 7, SIDE * SIDE + 1, WIDTH)
    right = alone(blocks, x).x
    for batch in [*range(1, 8), 3, 1]:
        assert torch.equal(planned(blocks, x[:batch]), right[:batch])
        assert len(blocks.series) <= 4
    assert blocks(x[:0]).shape == (0, right.shape[1], WIDTH)


def test_python_s_threads_may_run_a_series_at_once() -> None:
    view, images = under(a_model(), *usual()), drawn(1, 6, 3, 2 * SIDE, 2 * SIDE)

    @torch.inference_mode()
    def once(which: int) -> Tensor:
        found: Tensor = view(images[which % 6 : which % 6 + 1])
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(once, range(60)))
    assert all(torch.equal(one, found[i % 6]) for i, one in enumerate(found))


@torch.no_grad()
def test_a_model_that_its_hooks_know_is_gone_with_its_last_name() -> None:
    view, images = under(a_model(), *usual()), drawn(1, 1, 3, 2 * SIDE, 2 * SIDE)
    planned(view, images)
    assert any(view.blocks.series.values())
    view.blocks[0].norm1.model = [view]
    gone = weakref.ref(view)
    del view
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_weights_that_were_replaced_are_gone() -> None:
    model = a_model()
    view, images = under(model, *usual()), drawn(1, 2, 3, 2 * SIDE, 2 * SIDE)
    for batch in (1, 2):
        planned(view, images[:batch])
    old = weakref.ref(model.blocks[0].mlp.fc1.weight)
    model.blocks[0].mlp.fc1.weight = nn.Parameter(drawn(0, 2 * WIDTH, WIDTH), requires_grad=False)
    view(images[:1])
    assert old() is None


@torch.no_grad()
def test_a_copy_is_planned_for_its_own_weights() -> None:
    view, images = under(a_model(), *usual()), drawn(1, 1, 3, 2 * SIDE, 2 * SIDE)
    before = planned(view, images)
    for other in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert not other.blocks.series
        for parameter in other.blocks.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(planned(other, images), before)
    assert torch.equal(view(images), before)


def other_memory(block: Any) -> None:
    block.attn.proj.weight.data = 2 * block.attn.proj.weight.data


def as_turned(block: Any) -> None:
    """The same memory, read the other way."""
    block.attn.proj.weight.data = block.attn.proj.weight.data.T


def fewer_hidden(block: Any) -> None:
    """As one prunes hidden numbers: weights that begin where they began."""
    mlp, half = block.mlp, block.mlp.fc1.out_features // 2
    mlp.fc1.weight.data, mlp.fc1.bias.data = mlp.fc1.weight.data[:half], mlp.fc1.bias.data[:half]
    mlp.fc2.weight.data = mlp.fc2.weight.data[:, :half].contiguous()
    mlp.fc1.out_features = mlp.fc2.in_features = half


def other_forward(block: Any) -> None:
    usual = block.norm2.forward
    block.norm2.forward = lambda x: 2 * usual(x)


def hooks_anew(block: Any) -> None:
    """As some take hooks away, and put others there."""
    block.mlp.fc1._forward_hooks = type(block.mlp.fc1._forward_hooks)()
    block.mlp.fc1.register_forward_hook(lambda _, __, out: out + 1)


def weight_as_buffer(block: Any) -> None:
    weight = block.attn.qkv.weight.detach()
    del block.attn.qkv.weight
    block.attn.qkv.register_buffer("weight", 2 * weight)


def all_of_another(block: Any) -> None:
    """As some turn one layer into another."""
    block.mlp.__dict__.update(a_model(77).blocks[0].mlp.__dict__)


def other_parameters(block: Any) -> None:
    layer = block.mlp.fc1
    layer._parameters = {name: 2 * one for name, one in layer._parameters.items()}


class Doubled(nn.Linear):
    """A layer of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Change] = {
    "numbers in place": lambda block: block.mlp.fc1.weight.mul_(2),
    "another parameter": lambda block: setattr(
        block.norm1, "weight", nn.Parameter(2 * block.norm1.weight, requires_grad=False)
    ),
    "no bias": lambda block: setattr(block.mlp.fc2, "bias", None),
    "other memory": other_memory,
    "memory that is read otherwise": as_turned,
    "fewer hidden numbers": fewer_hidden,
    "another epsilon": lambda block: setattr(block.norm1, "eps", 0.5),
    "another scale": lambda block: setattr(block.attn, "scale", 0.5),
    "another activation": lambda block: setattr(block.mlp, "act", nn.SiLU()),
    "GELU by tanh": lambda block: setattr(block.mlp.act, "approximate", "tanh"),
    "another class": lambda block: setattr(block.mlp.fc2, "__class__", Doubled),
    "all of another MLP": all_of_another,
    "other parameters": other_parameters,
    "a hook": lambda block: block.norm2.register_forward_hook(lambda _, __, out: out + 1),
    "a hook before": lambda block: block.mlp.register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
    "other hooks": hooks_anew,
    "a forward of its own": other_forward,
    "a buffer as weight": weight_as_buffer,
    "a parametrization": lambda block: parametrizations.weight_norm(block.attn.proj, dim=None),
    "a gain": lambda block: setattr(block, "ls2", a_model(init_values=0.1).blocks[0].ls2),
    "loaded weights": lambda block: block.load_state_dict(a_model(77).blocks[0].state_dict()),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_of_a_block_is_seen(name: str) -> None:
    model = a_model()
    view, images = under(model, *usual()), drawn(1, 2, 3, 2 * SIDE, 2 * SIDE)
    before = planned(view, images)
    CHANGES[name](model.blocks[2])
    first, found = view(images), view(images)
    with one_by_one():
        right = view(images)
    assert torch.equal(first, right)
    assert torch.equal(found, right)
    is_same_function = name == "a parametrization"
    assert torch.allclose(found, before, rtol=0, atol=1e-5) == is_same_function


def another_block(blocks: Any) -> None:
    blocks[2] = a_model(55).blocks[2]


def swapped(blocks: Any) -> None:
    blocks._modules["1"], blocks._modules["2"] = blocks._modules["2"], blocks._modules["1"]


def without_last(blocks: Any) -> None:
    del blocks[len(blocks) - 1]


def without_steps(blocks: Any) -> None:
    blocks.steps = {}


@pytest.mark.parametrize("change", [another_block, swapped, without_last, without_steps])
@torch.no_grad()
def test_other_blocks_and_another_plan_are_seen(change: Change) -> None:
    blocks, x = under(a_model(), *usual()).blocks, drawn(0, 2, SIDE * SIDE + 1, WIDTH)
    before = planned(blocks, x)
    change(blocks)
    found = planned(blocks, x)
    assert torch.equal(found, alone(blocks, x).x)
    assert found.shape != before.shape or not torch.equal(found, before)


@torch.no_grad()
def test_a_hook_that_is_gone_lets_the_series_run_again() -> None:
    model = a_model()
    view, images = under(model, *usual()), drawn(1, 2, 3, 2 * SIDE, 2 * SIDE)
    before = planned(view, images)
    handle = model.blocks[2].mlp.register_forward_hook(lambda _, __, out: out + 1)
    assert not torch.equal(planned(view, images), before)
    handle.remove()
    assert torch.equal(planned(view, images), before)
    with counted() as asked:
        view(images)
    assert asked == [1]


@torch.no_grad()
def test_a_hook_where_no_loop_looks_ends_the_series_before_its_block() -> None:
    model = a_model()
    blocks, x = under(model, *usual()).blocks, drawn(0, 1, SIDE * SIDE + 1, WIDTH)
    model.blocks[3].attn.attn_drop.register_forward_hook(lambda *_: None)
    assert torch.equal(planned(blocks, x), alone(blocks, x).x)
    with counted() as asked:
        blocks(x)
    assert asked == [1 + 3 + 2]


@pytest.mark.parametrize(
    "shape", [(2, 50, WIDTH // 3), (2, 50, WIDTH + REGISTER), (2, 50, WIDTH, 2)]
)
@torch.no_grad()
def test_tokens_of_another_width_are_refused_as_torch_refuses_them(shape: tuple[int, ...]) -> None:
    blocks = under(a_model(), *usual()).blocks
    planned(blocks, drawn(0, 2, SIDE * SIDE + 1, WIDTH))
    for _ in range(3):
        with pytest.raises((RuntimeError, ValueError)):
            blocks(drawn(1, *shape))


@torch.no_grad()
def test_another_default_device_does_not_matter() -> None:
    blocks, x = under(a_model(), *usual()).blocks, drawn(0, 2, SIDE * SIDE + 1, WIDTH)
    right = alone(blocks, x).x
    with torch.device("meta"):
        assert torch.equal(planned(blocks, x), right)
        assert torch.equal(alone(blocks, x).x, right)


def test_without_an_openmp_runtime_one_thread_does_all() -> None:
    code = """
import ctypes, sys
import torch
plain = ctypes.CDLL
def none(name, *rest, **more):
    if name == torch._C.__file__:
        raise OSError
    return plain(name, *rest, **more)
ctypes.CDLL = none
sys.path.insert(0, sys.argv[1])
from loop_runs import drawn
from test_series import SIDE, WIDTH, a_model, alone, planned, under, usual
with torch.no_grad():
    blocks, x = under(a_model(), *usual()).blocks, drawn(0, 2, SIDE * SIDE + 1, WIDTH)
    print(torch.equal(planned(blocks, x), alone(blocks, x).x))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"


@torch.no_grad()
def test_a_hook_on_every_module_is_called() -> None:
    view, images, called = under(a_model(), *usual()), drawn(1, 1, 3, 2 * SIDE, 2 * SIDE), []
    planned(view, images)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    try:
        view(images)
    finally:
        handle.remove()
    assert len(called) > 8 * DEPTH


@torch.no_grad()
def test_dropout_that_begins_drops() -> None:
    model = a_model(proj_drop_rate=0.5, attn_drop_rate=0.5)
    blocks, x = under(model, *usual()).blocks, drawn(0, 1, SIDE * SIDE + 1, WIDTH)
    assert torch.equal(planned(blocks, x), blocks(x))
    for block in model.blocks:
        block.train()
    assert not torch.equal(blocks(x), blocks(x))


def test_gradients_flow_through_a_model_that_ran_as_a_series() -> None:
    view, images = under(a_model(), *usual()), drawn(1, 1, 3, 2 * SIDE, 2 * SIDE)
    with torch.no_grad():
        quick = planned(view, images)
    images.requires_grad_(True)
    slow = view(images)
    slow.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(slow.detach(), quick, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_precision_is_seen() -> None:
    model = a_model()
    view, images = under(model, *usual()), drawn(1, 1, 3, 2 * SIDE, 2 * SIDE)
    before = planned(view, images)
    exact = view.double()(images.double())
    torch.testing.assert_close(exact.float(), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(planned(view.float(), images), before)
