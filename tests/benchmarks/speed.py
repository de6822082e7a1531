"""How fast merged models are beside dense, ToMe's plain loop, and a merge that costs nothing.

Needs torch and timm alone, and the packages of ``dsm-tune[onnx]`` for ``--runtime onnx`` (where
ToMe's plain loop stays eager, and dense and ToMe are shown eager too, as with ``--runtime
compile``, which takes minutes for torch.compile). All forwards are timed in turn, in one run, each
behind one of its own. For each batch size the table gives, for every candidate: GMACs, its speed
relative to dense (median over rounds of dense / candidate, with quartiles), its efficiency (speed
relative to a dense model of the same operators, over the ratio of GMACs), and its speed relative to
its slice floor: the same forward with matching and merging replaced by cutting the token axis to
the same lengths.
Eager on a CPU, a merged model's operators are quicker than the dense model's own: "dense, same ops"
is what dense takes with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dsm_tune import schedules
from dsm_tune.measuring.latency import timer_for
from dsm_tune.measuring.memory import keep_freed_memory
from dsm_tune.merging import backbone, compiled_blocks, halves, loops
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.blocks import MergedBlocks
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.merged import merged_view
from dsm_tune.merging.on_cpu import suits
from dsm_tune.plan import Matching, MergePlan, Step
from dsm_tune.runtimes.forwards import forward_of

Forward = Callable[[Tensor], Tensor]
Times = dict[str, list[float]]

QUICK = "dense, same ops"
# Also where the others run in ONNX Runtime.
STAY_EAGER = ("dense, eager", QUICK, "ToMe, eager", "ToMe, plain loop")
REST = 0.05  # seconds for a library's threads to stop waiting for work, beside another's


def slice_floor(model: Any, plan: MergePlan) -> Forward:
    """The forward of a plan whose merges are free: tokens are cut off instead.

    What a merged model does by loops in one series, it does so too.
    """
    blocks, tokens, removed = list(model.blocks), plan.tokens, plan.removed
    in_series = MergedBlocks(model.blocks, dataclasses.replace(plan, proportional_attention=False))

    def forward(images: Tensor) -> Tensor:
        x, first = backbone.stem(model, images), 0
        if suits(x) and loops.module_of("step") is not None:
            from cutting import cut  # needs numba

            quick = compiled_blocks.run(in_series, Tokens(x), 0, step_loop=cut)
            x, first = (x, 0) if quick is None else (quick[0].x, quick[1])
        for index, block in enumerate(blocks[first:], first):
            if plan.last_block == "prefix" and index == len(blocks) - 1:
                x = halves.attend_prefix(block, x, None, plan.geometry.prefix)
            elif removed[index]:
                x = halves.attend(block, x, None)[0][:, : tokens[index + 1]]
            else:
                x = halves.run(block, x)
                continue
            x = halves.feed_forward(block, x)
        return model.forward_head(model.norm(x))  # type: ignore[no-any-return]

    return forward


def plain_tome(model: Any, r: int) -> Forward:
    """ToMe as sections 3.1 and 3.2 of its paper describe it, step by step."""
    blocks = list(model.blocks)

    def forward(images: Tensor) -> Tensor:
        x = backbone.stem(model, images)
        size = torch.ones_like(x[..., :1])
        for block in blocks:
            x, size = plain_block(block, x, size, r)
        return model.forward_head(model.norm(x))  # type: ignore[no-any-return]

    return forward


def plain_block(block: Any, x: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One block with proportional attention and a bipartite soft matching of its keys."""
    attn, (batch, count, width) = block.attn, x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(batch, count, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = (q * attn.scale) @ k.transpose(-2, -1) + size.log()[:, None, None, :, 0]
    mixed = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, count, width)
    x = x + attn.proj(mixed)
    r = min(r, (count - 1) // 2)
    key = k.mean(dim=1)
    key = key / key.norm(dim=-1, keepdim=True)
    scores = key[:, ::2] @ key[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf  # the class token stays
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    source, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    target = partner.gather(1, source)

    def join(values: Tensor) -> Tensor:
        channels = values.shape[2]
        even, odd = values[:, ::2], values[:, 1::2]
        sources = even.gather(1, source[..., None].expand(-1, -1, channels))
        rest = even.gather(1, kept[..., None].expand(-1, -1, channels))
        odd = odd.scatter_add(1, target[..., None].expand(-1, -1, channels), sources)
        return torch.cat([rest, odd], dim=1)

    x, size = join(x * size), join(size)
    x = x / size
    return x + block.mlp(block.norm2(x)), size


def tuned(model: nn.Module, r: int, delay: int, every: int = 1) -> MergePlan:
    """A plan such as a search finds: salience, sizes, attention in the mean, prefix-only end.

    Args:
        model: of any size.
        r: tokens that leave per block.
        delay: blocks before the first that merges.
        every: blocks from one that merges to the next; each does the work of so many.
    """
    geometry = read_geometry(model)
    matching = Matching(
        feature="k", salience=0.3, size_penalty=0.1, attention_weight=1.0, norm="mean"
    )
    merging = range(delay, geometry.depth - 1, every)
    steps = tuple(Step(block, "merge", r * every) for block in merging)
    end = "prefix" if geometry.reads_prefix_only else "all"
    return MergePlan("", geometry, steps, matching, last_block=end)


def candidates(
    model: nn.Module, r: int, delay: int, files: list[str]
) -> dict[str, tuple[MergePlan, Forward]]:
    """What is compared, by name; the floor of ``X`` is called ``X floor``."""
    geometry = read_geometry(model)
    found: dict[str, tuple[MergePlan, Forward]] = {"dense": (MergePlan("", geometry), model)}
    plans = {
        "ToMe": schedules.tome(geometry, r),
        "DSM": schedules.dsm(geometry, r, delay=delay),
        "tuned": tuned(model, r, delay),
        "tuned, every 2nd": tuned(model, r, delay, every=2),
        "tuned, every 3rd": tuned(model, r, delay, every=3),
        "ToMe r=4": schedules.tome(geometry, 4),
        **{Path(file).stem: MergePlan.from_json(Path(file).read_text()) for file in files},
    }
    if suits(next(model.parameters()).detach()):
        found[QUICK] = (found["dense"][0], slice_floor(model, found["dense"][0]))
    found["ToMe, plain loop"] = (plans["ToMe"], plain_tome(model, r))
    for name, plan in plans.items():
        found[name] = (plan, merged_view(model, plan))
        found[f"{name} floor"] = (plan, slice_floor(model, plan))
    return found


def calls_of(
    model: nn.Module, compared: dict[str, tuple[MergePlan, Forward]], x: Tensor, runtime: str
) -> dict[str, Callable[[], object]]:
    """What is timed, by name, as the runtime runs it."""
    if runtime == "compile":
        compiled = {
            name: run if name in STAY_EAGER else torch.compile(run, fullgraph=True)
            for name, (_, run) in compared.items()
        }
        return {name: forward_of(run, x) for name, run in compiled.items()}
    if runtime != "onnx":
        return {name: forward_of(run, x, runtime) for name, (_, run) in compared.items()}
    from dsm_tune.runtimes.onnx.files import session

    calls: dict[str, Callable[[], object]] = {}
    graphs = Graphs(model)
    for name, (plan, run) in compared.items():
        if name in STAY_EAGER:
            calls[name] = forward_of(run, x)
        else:
            graph = graphs.floor(plan) if name.endswith(" floor") else graphs.merged(plan)
            calls[name] = partial(session(graph, torch.get_num_threads(), shared=True), x)
    return calls


class Graphs:
    """ONNX graphs of plans and of their floors, from the same traced pieces."""

    def __init__(self, model: nn.Module) -> None:
        from dsm_tune.runtimes.onnx.pieces import Pieces

        self.pieces = Pieces(model)

    def merged(self, plan: MergePlan) -> bytes:
        """The graph of a plan."""
        from dsm_tune.runtimes.onnx.graph import graph_of

        return graph_of(self.pieces, plan).SerializeToString()

    def floor(self, plan: MergePlan) -> bytes:
        """The graph of a plan whose merges are free: tokens are cut off instead."""
        from dsm_tune.runtimes.onnx.nodes import Builder

        g, geometry = Builder(), plan.geometry
        x = self.pieces.stem(g, g.input("pixels", "batch", 3, *self.pieces.image_size))
        for index in range(geometry.depth):
            if plan.last_block == "prefix" and index == geometry.depth - 1:
                x = self.pieces.prefix_block(g, index, x, None)
                continue
            x = self.pieces.attend(g, index, x, None)[0]
            if plan.removed[index]:
                x = g.cut(x, 0, plan.tokens[index + 1])
            x = self.pieces.feed_forward(g, index, x)
        return g.model({"logits": (self.pieces.head(g, x, None), None)}, {}).SerializeToString()


def measure(calls: dict[str, Callable[[], object]], x: Tensor, seconds: float) -> Times:
    """Milliseconds by name, one per round."""
    timed = timer_for(x.device)
    found: Times = {name: [] for name in calls}
    start = time.monotonic()
    while time.monotonic() - start < seconds or len(found["dense"]) < 7:
        for name, call in calls.items():
            if name in STAY_EAGER:
                time.sleep(REST)
            call()  # as in steady service: what was run before was another model
            found[name].append(timed(call).ms)
            if name in STAY_EAGER:
                time.sleep(REST)
    return found


def table(
    title: str, compared: dict[str, tuple[MergePlan, Forward]], times: Times, runtime: str
) -> None:
    """Print ratios of one setting."""
    print(f"\n{title}: dense {statistics.median(times['dense']):.2f} ms")
    print(f"{'':20}{'GMACs':>8}{'speed-up':>10}{'quartiles':>14}{'efficiency':>12}{'of floor':>10}")
    dense = compared["dense"][0].gmacs
    like = QUICK if runtime == "eager" and QUICK in times else "dense"
    for name, (plan, _) in compared.items():
        ratios = [a / b for a, b in zip(times["dense"], times[name], strict=True)]
        same = [a / b for a, b in zip(times[like], times[name], strict=True)]
        middle = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        floor = times.get(f"{name} floor")
        share = ""
        if floor:
            share = (
                f"{statistics.median(f / t for f, t in zip(floor, times[name], strict=True)):.3f}"
            )
        print(
            f"{name:20}{plan.gmacs:8.3f}{middle:9.3f}×{low:7.2f}–{high:.2f}×"
            f"{statistics.median(same) / (dense / plan.gmacs):12.3f}{share:>10}"
        )


def main() -> int:
    """Print a table per batch size."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="deit_tiny_patch16_224", help="weights are random")
    options.add_argument("--batch-sizes", default="1,8,32")
    options.add_argument("--r", type=int, default=16)
    options.add_argument("--delay", type=int, default=1)
    options.add_argument("--plan", action="append", default=[], help="a file; may be repeated")
    options.add_argument("--only", action="append", help="a candidate; may be repeated")
    options.add_argument("--seconds", type=float, default=20.0, help="per batch size")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32")
    options.add_argument(
        "--runtime", default="eager", choices=["eager", "onnx", "cudagraphs", "compile"]
    )
    options.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = timm.create_model(chosen.model).eval()
    model = model.to(chosen.device, getattr(torch, chosen.dtype))
    with torch.inference_mode():
        compared = candidates(model, chosen.r, chosen.delay, chosen.plan)
    if chosen.runtime in ("onnx", "compile"):
        for name in ("dense", "ToMe"):
            compared[f"{name}, eager"] = compared[name]
    if chosen.only:
        kept = {"dense", *chosen.only, *(f"{name} floor" for name in chosen.only)}
        if unknown := set(chosen.only) - set(compared):
            options.error(f"--only takes {', '.join(compared)}, but got {', '.join(unknown)}")
        compared = {name: one for name, one in compared.items() if name in kept}
    side = model.patch_embed.img_size
    for batch in (int(size) for size in chosen.batch_sizes.split(",")):
        x = torch.randn(batch, 3, *side).to(chosen.device, getattr(torch, chosen.dtype))
        with torch.inference_mode():
            calls = calls_of(model, compared, x, chosen.runtime)
            times = measure(calls, x, chosen.seconds)
        title = f"{chosen.model}, batch {batch}, {chosen.dtype}, {chosen.runtime}"
        table(title, compared, times, chosen.runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main())
