"""What a forward would take if nothing were lost, and where its time goes.

For dense as it is, dense by the operators of merged models, a plan, and the plan with merges that
cost nothing, one table: multiply-adds at the rate of a large matrix product, bytes that torch's own
operators would read and write at the rate of a copy, calls at the time of the smallest one, each
measured here; their sum, what the forward takes, and the share of the time that goes to each kind
of call: halves of blocks that are one loop, and operators. Needs torch and timm alone.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import speed
import timm
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from dsm_tune.measuring.memory import keep_freed_memory
from dsm_tune.merging import loops, on_cpu
from dsm_tune.merging.loops import team

KINDS = {
    "halves": ("attention_half", "prefix_half", "mlp_half"),
    "products": ("mkldnn", "addmm", "bmm", "mm", "baddbmm", "convolution", "linear"),
    "steps": ("step",),
    "attention": ("attend", "scaled_dot", "flash", "efficient"),
    "norm, gelu": ("native_layer_norm", "gelu"),
    "choosing": ("sort", "max", "topk", "gather", "scatter", "linalg_vector_norm", "clamp"),
    "moving": ("cut", "index", "copy", "cat", "clone", "select", "contiguous"),
    "arithmetic": ("add", "sub", "mul", "div", "mean", "sum", "log", "softmax", "pow", "exp"),
}
ROUNDS = 10


class Counted(TorchDispatchMode):
    """Counts the bytes that operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            given = [*args, *(result if isinstance(result, tuple) else (result,))]
            self.bytes += sum(x.numel() * x.element_size() for x in given if isinstance(x, Tensor))
        return result


def seconds_of(
    call: Callable[[], object],
    middle: Callable[[list[float]], float] = statistics.median,
    rounds: int = 25,
) -> float:
    """Seconds of a call: the median, or another figure of some rounds."""
    call()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return middle(taken)


def rates() -> tuple[float, float, float]:
    """Multiply-adds and bytes per second, and seconds of the smallest operator."""
    a, b = torch.randn(1, 2048, 1024), torch.randn(1024, 1024)
    with torch.inference_mode():
        product = 2048 * 1024 * 1024 / seconds_of(lambda: on_cpu.product(a, b, None), min)
    large = torch.randn(1 << 24)
    into = torch.empty_like(large)
    copied = 2 * large.nbytes / seconds_of(lambda: into.copy_(large), min)
    small = torch.zeros(8)

    def many() -> None:
        for _ in range(1000):
            torch.neg(small)

    return product, copied, seconds_of(many, min) / 1000


@functools.cache
def names_of_loops() -> dict[int, str]:
    """By their addresses."""
    from cutting import cut  # needs numba

    of_halves, step = loops.module_of("halves"), loops.module_of("step").step
    known = *(getattr(of_halves, name) for name in KINDS["halves"]), step, cut
    return {loop.address: loop.__name__ for loop in known}


@contextmanager
def seen_loops() -> Iterator[None]:
    """Lets the profiler see compiled loops; those of a series too, one by one."""
    plain = team.run

    def seen(loop: Any, *numbers: int, shares: int) -> None:
        if not loop.__name__.startswith("series"):
            with record_function(loop.__name__):
                plain(loop, *numbers, shares=shares)
            return
        several, calls, records = numbers
        pairs = (ctypes.c_int64 * (2 * several)).from_address(calls)
        for address, behind in zip(pairs[::2], pairs[1::2], strict=True):
            with record_function(names_of_loops()[address]):
                team.start(address, records + behind, team.head_of(shares))

    team.run = seen
    try:
        yield
    finally:
        team.run = plain


def shares(call: Callable[[], object]) -> tuple[float, Counter[str]]:
    """Calls of a forward, and the part of its time that each kind takes by itself."""
    with seen_loops(), profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(ROUNDS):
            call()
    took: Counter[str] = Counter()
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::").lstrip("_")
        known = (kind for kind, starts in KINDS.items() if name.startswith(starts))
        took[next(known, "other")] += event.self_cpu_time_total
    whole = sum(took.values())
    calls = sum(event.cpu_parent is None for event in seen.events()) / ROUNDS
    return calls, Counter({kind: part / whole for kind, part in took.items()})


def main() -> int:
    """Print a table per batch size."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="deit_tiny_patch16_224", help="weights are random")
    options.add_argument("--batch-sizes", default="1,8,32")
    options.add_argument("--r", type=int, default=16)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = timm.create_model(chosen.model).eval()
    with torch.inference_mode():
        compared = speed.candidates(model, chosen.r, 1, [])
    product, copied, least = rates()
    print(
        f"{product / 1e9:.0f} G multiply-adds/s, {copied / 1e9:.1f} GB/s, "
        f"{least * 1e6:.2f} us for the smallest operator"
    )
    with torch.inference_mode():
        for batch in (int(size) for size in chosen.batch_sizes.split(",")):
            x = torch.randn(batch, 3, *model.patch_embed.img_size)
            print(
                f"\nbatch {batch}: ms{'':12}products   bytes      calls      sum  measured"
                f"   {'  '.join(KINDS)}  other"
            )
            for name in ("dense", speed.QUICK, "ToMe", "ToMe floor"):
                plan, run = compared[name]

                def call(run: Any = run, x: Tensor = x) -> object:
                    return run(x)

                with Counted() as counted:
                    call()
                calls, found = shares(call)
                parts = (
                    plan.gmacs * 1e9 * batch / product,
                    counted.bytes / copied,
                    calls * least,
                )
                print(
                    f"{name:20}{parts[0] * 1e3:12.2f}{parts[1] * 1e3:8.2f}{parts[2] * 1e3:11.2f}"
                    f"{sum(parts) * 1e3:9.2f}{seconds_of(call) * 1e3:10.2f}   "
                    + "  ".join(f"{found[kind]:{len(kind)}.0%}" for kind in (*KINDS, "other"))
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
