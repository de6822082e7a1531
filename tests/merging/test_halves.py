"""The halves of a block as compiled loops: what timm's own modules give, which serve elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from loop_runs import counted, drawn, on_threads
from timm.layers import LayerNorm, RmsNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dsm_tune.merging import loops
from dsm_tune.merging.compiled_halves import WIDEST
from dsm_tune.merging.halves import attend, attend_prefix, feed_forward
from dsm_tune.merging.loops import team

pytest.importorskip("numba", reason="without numba, operators do what a half does")
from dsm_tune.merging.loops.halves import DEEP, EVERY, LEAST_SIDE, PANEL
from dsm_tune.merging.loops.lanes import PAYS

seeds = st.integers(0, 9999)
needs_lanes = pytest.mark.skipif(not PAYS, reason="the loops are for AVX2 and AVX-512")
WIDE = 3 * EVERY


def a_block(width: int = WIDE, heads: int = 2, seed: int = 0, **options: Any) -> Block:
    """A block in eval mode whose numbers are drawn: norms, biases and gains too."""
    options = {"qkv_bias": True, "norm_layer": LayerNorm, **options}
    block = Block(width, heads, **options).eval().requires_grad_(False)
    for i, parameter in enumerate(block.parameters()):
        noise = drawn(seed + i, *parameter.shape)
        parameter.copy_(noise / noise[0].numel() ** 0.5 if noise.ndim == 2 else 1 + 0.3 * noise)
    return block


def by_modules(block: Block, x: Tensor, log_size: Tensor | None) -> tuple[Tensor, Tensor]:
    """What timm's own modules make of tokens in the halves; sizes count as more of a key."""
    mask = None if log_size is None else log_size[:, None, None, :]
    mixed = block.ls1(block.attn(block.norm1(x), attn_mask=mask))
    return x + mixed, x + block.ls2(block.mlp(block.norm2(x)))


def by_loops(block: Block, x: Tensor, log_size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with counted() as asked:
        found = attend(block, x, log_size)[0], feed_forward(block, x)
    assert asked == [2]
    return found


@needs_lanes
@torch.no_grad()
@given(
    seed=seeds, batch=st.integers(1, 3), count=st.integers(LEAST_SIDE, 90),
    width=st.sampled_from([2 * EVERY, WIDE, 5 * EVERY]), heads=st.sampled_from([1, 2]),
    hidden=st.sampled_from([EVERY, 4 * EVERY, DEEP, DEEP + EVERY, 3 * DEEP + 5 * EVERY]),
    biases=st.sampled_from(["all", "none of qkv", "of norms alone"]), has_gain=st.booleans(),
    is_sized=st.booleans(), spread=st.sampled_from([0.1, 1.0, 30.0]), stride=st.integers(1, 2),
    act=st.sampled_from([nn.GELU, nn.ReLU]),
)  # fmt: skip
def test_they_are_timm_s_modules_but_for_rounding(
    seed: int, batch: int, count: int, width: int, heads: int, hidden: int, biases: str,
    has_gain: bool, is_sized: bool, spread: float, stride: int, act: type[nn.Module],
) -> None:  # fmt: skip
    more: dict[str, Any] = {"init_values": 0.5} if has_gain else {}
    more = {**more, "qkv_bias": biases == "all", "act_layer": act}
    block = a_block(width, heads, seed, mlp_ratio=hidden / width, **more)
    for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        layer.bias = None if biases == "of norms alone" else layer.bias
    assert block.mlp.fc1.out_features == hidden
    x = spread * drawn(seed + 50, batch, count * stride, width)[:, ::stride]
    log_size = drawn(seed + 51, batch, 2 * count)[:, ::2] if is_sized else None
    found = by_loops(block, x, log_size)
    of_torch = by_modules(block, x, log_size)
    block.double()
    exact = by_modules(block, x.double(), None if log_size is None else log_size.double())
    for one, usual, right in zip(found, of_torch, exact, strict=True):
        error = (usual - right).abs().max()
        assert (one - right).abs().max() <= 2 * error + 1e-6 * right.abs().max()


@needs_lanes
@torch.no_grad()
@given(
    seed=seeds, batch=st.integers(1, 5), count=st.integers(LEAST_SIDE, 60),
    prefix=st.integers(1, LEAST_SIDE), width=st.sampled_from([2 * EVERY, WIDE]),
    has_bias=st.booleans(), has_gain=st.booleans(), is_sized=st.booleans(),
    threads=st.integers(1, 4),
)  # fmt: skip
def test_a_block_for_its_prefix_alone_is_timm_s_modules_but_for_rounding(
    seed: int, batch: int, count: int, prefix: int, width: int, has_bias: bool, has_gain: bool,
    is_sized: bool, threads: int,
) -> None:  # fmt: skip
    gain = {"init_values": 0.5} if has_gain else {}
    block = a_block(width, 2, seed, qkv_bias=has_bias, **gain)
    x = drawn(seed + 50, batch, count, width)
    log_size = drawn(seed + 51, batch, count) if is_sized else None
    with on_threads(threads), counted() as asked:
        found = attend_prefix(block, x, log_size, prefix)
    assert asked == [1]
    right = by_modules(block, x, log_size)[0][:, :prefix]
    torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-5)
    whole = attend(block, x, log_size)[0][:, :prefix]
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)  # the same sums


@needs_lanes
@torch.no_grad()
def test_queries_keys_and_values_are_those_that_a_step_compares() -> None:
    block, x = a_block(heads=3), drawn(1, 2, 21, WIDE)
    q, k, v, scale = attend(block, x, None)[1]
    qkv = block.attn.qkv(block.norm1(x)).reshape(2, 21, 3, 3, WIDE // 3)
    right = qkv.permute(2, 0, 3, 1, 4).unbind()
    torch.testing.assert_close((q, k, v), right, atol=1e-5, rtol=1e-5)
    assert scale == block.attn.scale


@needs_lanes
@torch.no_grad()
def test_gelu_is_the_one_by_erf_from_end_to_end() -> None:
    block = a_block(EVERY, 1, mlp_ratio=1.0)
    block.norm2.weight.zero_()
    block.norm2.bias.fill_(1.0)
    numbers = torch.linspace(-12, 12, 200 * EVERY).reshape(200, EVERY)
    block.mlp.fc2.weight.copy_(torch.eye(EVERY))
    block.mlp.fc2.bias.zero_()
    ends = torch.tensor([1e38, -1e38, 1e19, -1e19, 1e-38, -1e-38, 0.0, -0.0])
    for row in (*numbers, ends.repeat(EVERY // 8)):
        # Norms give 1, and a layer tells numbers by its biases.
        block.mlp.fc1.weight.zero_()
        block.mlp.fc1.bias.copy_(row)
        found = feed_forward(block, torch.zeros(1, 1, EVERY))[0, 0].double()
        right = nn.functional.gelu(row.double())
        torch.testing.assert_close(found, right, atol=4e-7, rtol=1e-7)


@needs_lanes
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@torch.no_grad()
def test_bits_depend_on_neither_threads_nor_other_images(threads: int) -> None:
    block, log_size = a_block(), drawn(2, 7, 43)  # no thread's part ends where an image's does
    x = drawn(1, 7, 43, WIDE)
    alone = [by_loops(block, x[i : i + 1], log_size[i : i + 1]) for i in range(7)]
    with on_threads(threads):
        found = by_loops(block, x, log_size)
    assert torch.equal(found[0], torch.cat([one for one, _ in alone]))
    assert torch.equal(found[1], torch.cat([one for _, one in alone]))


@needs_lanes
@torch.no_grad()
def test_more_tokens_than_a_panel_holds_and_fewer_than_threads_are_done() -> None:
    block = a_block()
    for shape in [(1, 2 * PANEL + 7, WIDE), (3, PANEL, WIDE), (1, LEAST_SIDE, WIDE)]:
        x = drawn(3, *shape)
        for threads in (1, 4):
            with on_threads(threads):
                found = by_loops(block, x)
            right = by_modules(block, x, None)
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    few = drawn(4, 2, 1, WIDE)
    torch.testing.assert_close(feed_forward(block, few), by_modules(block, few, None)[1])
    assert attend(block, drawn(4, 0, 20, WIDE), None)[0].shape == (0, 20, WIDE)
    assert attend_prefix(block, drawn(4, 0, 20, WIDE), None, 2).shape == (0, 2, WIDE)
    assert feed_forward(block, drawn(4, 0, 20, WIDE)).shape == (0, 20, WIDE)


@needs_lanes
def test_python_s_threads_may_run_a_block_at_once() -> None:
    block, x = a_block(), drawn(1, 4, 41, WIDE)

    @torch.no_grad()
    def once(_: int) -> tuple[Tensor, Tensor]:
        return attend(block, x, None)[0], feed_forward(block, x)

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(once, range(40))
    assert all(torch.equal(a, b) for one in others for a, b in zip(one, first, strict=True))


@needs_lanes
@torch.no_grad()
def test_a_number_that_is_none_stays_with_its_image() -> None:
    block, x = a_block(), drawn(1, 3, 20, WIDE)
    x[1, 4, 5] = torch.nan
    attended, fed = by_loops(block, x)
    assert attended.isnan().any(dim=2).any(dim=1).tolist() == [False, True, False]
    assert fed.isnan().any(dim=2).nonzero().tolist() == [[1, 4]]
    fed = feed_forward(a_block(act_layer=nn.ReLU), x)
    assert fed.isnan().any(dim=2).nonzero().tolist() == [[1, 4]]


class Adapted(nn.Linear):
    """A layer that does more than its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def scale_by_two(block: Block) -> None:
    """As some libraries wrap modules: without a hook."""
    usual = block.norm2.forward
    block.norm2.forward = lambda x: 2 * usual(x)


def as_buffer(name: str) -> Callable[[Block], None]:
    """Let a weight be no parameter."""

    def change(block: Block) -> None:
        layer = block.get_submodule(name)
        weight = layer.weight.detach()
        del layer.weight
        layer.register_buffer("weight", weight)

    return change


def gain_of(block: Block) -> nn.Module:
    """A LayerScale that is watched."""
    scale = a_block(init_values=0.5).ls1
    scale.register_forward_hook(lambda _, __, out: out + 1)
    return scale


def adapt(layer: nn.Linear) -> nn.Linear:
    changed = Adapted(layer.in_features, layer.out_features)
    changed.load_state_dict(layer.state_dict())
    return changed


def watch(name: str, *, before: bool = False) -> Callable[[Block], None]:
    """Change what a module gives, or is given, from outside."""

    def change(block: Block) -> None:
        module = block.get_submodule(name)
        if before:
            module.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
        else:
            module.register_forward_hook(lambda _, __, out: out + 1)

    return change


def put(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Block], None]:
    return lambda block: block.set_submodule(name, make(block.get_submodule(name)))


def turn(name: str) -> Callable[[Block], None]:
    """Let a weight lie in memory the other way."""

    def change(block: Block) -> None:
        layer = block.get_submodule(name)
        layer.weight.data = layer.weight.data.T.contiguous().T

    return change


Changes = dict[str, Callable[[Block], None]]
OTHER_ATTENTION: Changes = {
    **{
        f"{name} is watched": watch(name)
        for name in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj",
                     "attn.proj_drop", "ls1", "drop_path1")
    },
    "norm1 is given another input": watch("norm1", before=True),
    "an adapted qkv": put("attn.qkv", adapt),
    "a norm of keys": put("attn.k_norm", lambda _: nn.LayerNorm(WIDE // 2)),
    "a norm without numbers": put("norm1", lambda _: nn.LayerNorm(WIDE, elementwise_affine=False)),
    "a weight that lies the other way": turn("attn.proj"),
    "a gain that is watched": put("ls1", gain_of),
    "a weight that is a buffer": as_buffer("attn.qkv"),
}  # fmt: skip
OTHER_MLP: Changes = {
    **{
        f"{name} is watched": watch(name)
        for name in ("norm2", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2",
                     "mlp.drop2", "ls2", "drop_path2")
    },
    "mlp.fc2 is given another input": watch("mlp.fc2", before=True),
    "the MLP is watched": watch("mlp"),
    "a norm with another forward": scale_by_two,
    "a buffer as weight": as_buffer("mlp.fc1"),
    "an adapted fc2": put("mlp.fc2", adapt),
    "another norm": put("norm2", lambda _: RmsNorm(WIDE)),
    "a norm without bias": put("norm2", lambda _: nn.LayerNorm(WIDE, bias=False)),
    "GELU by tanh": put("mlp.act", lambda _: nn.GELU("tanh")),
    "another activation": put("mlp.act", lambda _: nn.SiLU()),
}  # fmt: skip


@needs_lanes
@pytest.mark.parametrize("name", [*OTHER_ATTENTION, *OTHER_MLP])
@torch.no_grad()
def test_a_half_that_is_more_than_its_numbers_is_composed_of_its_modules(name: str) -> None:
    block, x = a_block(), drawn(1, 2, 20, WIDE)
    assert by_loops(block, x)
    (OTHER_ATTENTION | OTHER_MLP)[name](block)
    with counted() as asked:
        found = attend(block, x, None)[0], feed_forward(block, x)
    # The other half is a loop; so is attention alone, where the rest of its half is not.
    assert asked == [2 if name in OTHER_ATTENTION else 1]
    block.requires_grad_(True)
    with torch.enable_grad():
        right = tuple(one.detach() for one in (attend(block, x, None)[0], feed_forward(block, x)))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


@needs_lanes
@pytest.mark.parametrize(
    ("block", "x", "loops_run"),
    [
        (a_block(WIDE + 2), drawn(1, 2, 20, WIDE + 2), 1),  # attention alone
        (a_block(EVERY, EVERY // 2), drawn(1, 2, 20, EVERY), 1),  # the MLP half
        (a_block(), drawn(1, 2, LEAST_SIDE - 1, WIDE), 1),
        (a_block(mlp_ratio=1 + 1 / WIDE), drawn(1, 2, 20, WIDE), 1),  # the attention half
        (a_block(WIDEST + EVERY), drawn(1, 1, 10, WIDEST + EVERY), 1),  # attention alone
    ],
    ids=["odd width", "narrow heads", "few tokens", "odd hidden width", "wide"],
)
@torch.no_grad()
def test_sizes_that_a_loop_cannot_do_are_torch_s(block: Block, x: Tensor, loops_run: int) -> None:
    with counted() as asked:
        found = attend(block, x, None)[0], feed_forward(block, x)
    assert asked == [loops_run]
    torch.testing.assert_close(found, by_modules(block, x, None), atol=1e-5, rtol=1e-5)


@needs_lanes
@torch.no_grad()
def test_another_number_of_heads_than_the_block_was_made_for_is_refused_as_torch_refuses_it() -> (
    None
):
    for heads in (4, 5):
        block = a_block(heads=2)
        block.attn.num_heads = heads
        with pytest.raises(RuntimeError, match="shape"):
            attend(block, drawn(1, 1, 20, WIDE), None)


@needs_lanes
@torch.no_grad()
def test_a_hook_on_every_module_is_called() -> None:
    block, x, called = a_block(), drawn(1, 1, 20, WIDE), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    try:
        feed_forward(block, x)
    finally:
        handle.remove()
    assert len(called) > 4


@needs_lanes
@torch.no_grad()
def test_weights_that_change_are_seen() -> None:
    block, x = a_block(), drawn(1, 1, 20, WIDE)
    before = by_loops(block, x)
    block.load_state_dict(a_block(seed=77).state_dict())
    for change in (lambda: None, lambda: block.double().float(), lambda: block.to(torch.float32)):
        change()
        after = by_loops(block, x)
        torch.testing.assert_close(after, by_modules(block, x, None), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[0], before[0])
    block.half()
    for half in (lambda: attend(block, x, None), lambda: feed_forward(block, x)):
        with pytest.raises(RuntimeError, match=r"dtype|mixed"):
            half()


@needs_lanes
@torch.no_grad()
def test_shapes_that_do_not_fit_are_refused_as_torch_refuses_them() -> None:
    block = a_block()
    for half in (lambda x: attend(block, x, None), lambda x: feed_forward(block, x)):
        with pytest.raises(RuntimeError, match="shape"):
            half(drawn(1, 1, 20, WIDE + EVERY))
    with pytest.raises(RuntimeError):
        attend(block, drawn(1, 2, 20, WIDE), drawn(2, 2, 19))


@torch.no_grad()
def test_dropout_in_training_drops() -> None:
    for name in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2", "drop_path1"):
        block, x = a_block(drop_path=0.5).train(), drawn(0, 9, 17, WIDE)
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.0
        if name == "drop_path1":
            block.drop_path1.drop_prob = 0.5
        else:
            block.get_submodule(name).p = 0.5

        def both(block: Block = block, x: Tensor = x) -> Tensor:
            return feed_forward(block, attend(block, x, None)[0])

        torch.manual_seed(0)
        first = both()
        assert not torch.equal(both(), first)
        torch.manual_seed(0)
        assert torch.equal(both(), first)
        block.eval()
        assert torch.equal(both(), both())


@needs_lanes
@torch.no_grad()
def test_without_a_team_one_thread_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = a_block(), drawn(1, 2, 20, WIDE)
    with_team = by_loops(block, x)
    monkeypatch.setattr(team, "START", None)
    assert all(map(torch.equal, by_loops(block, x), with_team))


def run_alone(code: str, **environment: str) -> str:
    """What a process of its own prints, in which this file can be imported."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent, env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout


@needs_lanes
def test_a_team_may_be_smaller_than_asked_for() -> None:
    code = """
import torch
from test_halves import a_block, by_loops, by_modules, drawn, WIDE
torch.set_num_threads(4)
block, x = a_block(), drawn(0, 3, 50, WIDE)
with torch.no_grad():
    right = by_modules(block, x, None)
    torch.testing.assert_close(by_loops(block, x), right, atol=1e-5, rtol=1e-5)
print("same")
"""
    assert run_alone(code, OMP_THREAD_LIMIT="2") == "same\n"


@torch.no_grad()
def test_without_numba_operators_do_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = a_block(), drawn(1, 2, 20, WIDE)
    monkeypatch.setattr(loops, "module_of", lambda name: None)
    with counted() as asked:
        found = attend(block, x, None)[0], feed_forward(block, x)
    assert asked == [0]
    torch.testing.assert_close(found, by_modules(block, x, None), atol=1e-5, rtol=1e-5)


def test_registers_of_eight_numbers_give_the_same() -> None:
    code = """
import torch
from llvmlite import binding
features = binding.targets.FeatureMap({"avx": True, "avx2": True, "fma": True})
binding.get_host_cpu_features = lambda: features
from test_halves import a_block, by_loops, by_modules, drawn
from dsm_tune.merging.loops.halves import EVERY
assert EVERY == 8
with torch.no_grad():
    for width, hidden, count in [(24, 24, 9), (48, 416, 50), (64, 8, 197)]:
        block, x = a_block(width, 2, mlp_ratio=hidden / width), drawn(0, 2, count, width)
        right = by_modules(block, x, None)
        torch.testing.assert_close(by_loops(block, x), right, atol=1e-5, rtol=1e-5)
print("same")
"""
    assert run_alone(code) == "same\n"
