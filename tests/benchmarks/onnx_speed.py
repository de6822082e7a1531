"""How fast merged models are in ONNX Runtime beside dense and beside a merge that costs nothing.

For each batch size the table gives, for each plan: its speed relative to dense and to its slice
floor (``speed.py`` defines it), exported in the same way; median over rounds, with quartiles; and
its efficiency, speed-up over the ratio of GMACs. Weights are random. All are timed in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speed import slice_floor, tuned

from dsm_tune import schedules
from dsm_tune.exporting.onnx import graph_of, session
from dsm_tune.exporting.steps import view_to_trace
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.plan import MergePlan

Forward = Callable[[Tensor], Tensor]


class Floor(nn.Module):
    """The slice floor of a plan as a module."""

    def __init__(self, model: nn.Module, plan: MergePlan) -> None:
        super().__init__()
        self.model = model
        self.floor = slice_floor(model, plan)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: [B, classes]."""
        return self.floor(x)


def opened(model: nn.Module, example: Tensor, threads: int) -> Forward:
    """An ONNX Runtime session of a module."""
    return session(graph_of(model.eval(), example, {}).SerializeToString(), threads)


def measure(forwards: dict[str, Forward], x: Tensor, seconds: float) -> dict[str, list[float]]:
    """Milliseconds by name, one per round; each is run once, untimed, before it is timed."""
    found: dict[str, list[float]] = {name: [] for name in forwards}
    start = time.monotonic()
    while time.monotonic() - start < seconds or len(found["dense"]) < 7:
        for name, forward in forwards.items():
            if len(x) == 1 or not found[name]:
                forward(x)
            begin = time.perf_counter()
            forward(x)
            found[name].append(1e3 * (time.perf_counter() - begin))
    return found


def ratio(above: list[float], below: list[float]) -> str:
    """Median and quartiles of the ratios of two lists."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:7.3f} [{low:.3f}, {high:.3f}]"


def main() -> int:
    """Print a table per batch size."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="deit_tiny_patch16_224")
    options.add_argument("--batch-sizes", default="1,8,32")
    options.add_argument("--plans", default="ToMe,DSM,tuned")
    options.add_argument("--r", type=int, default=16)
    options.add_argument("--delay", type=int, default=1)
    options.add_argument("--seconds", type=float, default=20.0, help="per batch size")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.manual_seed(0)
    model: Any = timm.create_model(chosen.model).eval()
    geometry = read_geometry(model)
    plans = {
        "ToMe": schedules.tome(geometry, chosen.r),
        "DSM": schedules.dsm(geometry, chosen.r, delay=chosen.delay),
        "tuned": tuned(model, chosen.r, chosen.delay),
    }
    plans = {name: plans[name] for name in chosen.plans.split(",")}
    example = torch.zeros(2, 3, *model.patch_embed.img_size)
    dense = next(iter(plans.values())).dense()
    forwards = {"dense": opened(view_to_trace(model, dense), example, chosen.threads)}
    for name, plan in plans.items():
        start = time.monotonic()
        forwards[name] = opened(view_to_trace(model, plan), example, chosen.threads)
        print(f"{name}: exported and opened in {time.monotonic() - start:.1f} s")
        forwards[f"{name} floor"] = opened(Floor(model, plan), example, chosen.threads)
    for batch in (int(size) for size in chosen.batch_sizes.split(",")):
        x = torch.randn(batch, *example.shape[1:])
        times = measure(forwards, x, chosen.seconds)
        middle = statistics.median(times["dense"])
        print(
            f"\n{chosen.model}, batch {batch}: dense {middle:.2f} ms, {len(times['dense'])} rounds"
        )
        for name, plan in plans.items():
            faster = ratio(times["dense"], times[name])
            efficiency = float(faster.split()[0]) / (dense.gmacs / plan.gmacs)
            share = ratio(times[f"{name} floor"], times[name])
            print(
                f"{name:8}{plan.gmacs:8.3f} GMACs  speed-up {faster}  "
                f"efficiency {efficiency:.3f}  of floor {share}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
