"""How well a device profile predicts plans that it has not seen.

Draws plans from the default space and times them in turn with the dense model, measures a profile,
and times them again: a machine that changes its pace in between shows in how far the two timings of
a plan differ. Bars: median error <= 5 %, worst <= 12 %, or 1.5 times that difference, where it is
more.
"""

from __future__ import annotations

import os
import random
import statistics
import sys

import optuna
import torch
from subject import config, parser

from dsm_tune.inputs import load_inputs
from dsm_tune.measuring.memory import keep_freed_memory
from dsm_tune.measuring.profiling import measure_profile, time_plans
from dsm_tune.plan import FEATURES, Geometry, Matching, MergePlan
from dsm_tune.searching.budget import Cost, Limits, fit
from dsm_tune.searching.space import build, load_space


def draw_plans(geometry: Geometry, count: int, seed: int) -> list[MergePlan]:
    """Dense, and plans of the default space at 50 to 95 % of its GMACs."""
    space = load_space("default").bind(geometry, round(geometry.depth / 6))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    choose = random.Random(seed)
    plans = [MergePlan("", geometry)]
    while len(plans) <= count:
        limits = Limits(gmacs=plans[0].gmacs * choose.uniform(0.5, 0.95))
        shape = build(space.draw(study.ask()), geometry, round(geometry.depth / 6))
        plan = fit(shape, geometry, limits, lambda p: Cost(p.gmacs))
        plans += [] if plan is None else [plan]
    return plans


def main() -> int:
    """Print a line per plan and the verdict; 1 above the bar."""
    options = parser(__doc__ or "")
    options.add_argument("--batch-size", type=int, default=1)
    options.add_argument("--plans", type=int, default=12)
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--runtime", default="eager", choices=["eager", "onnx"])
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    inputs = load_inputs(config(chosen, budget_gflops="60%"))
    pixels = inputs.search.pixels[torch.arange(chosen.batch_size) % len(inputs.search)]
    plans = draw_plans(inputs.geometry, chosen.plans, chosen.seed)
    before = time_plans(
        inputs.model, plans, pixels, seconds=4 * chosen.seconds, runtime=chosen.runtime
    )
    matchings = [Matching(feature=name) for name in FEATURES]
    profile = measure_profile(
        inputs.model, pixels, matchings=matchings, seconds=chosen.seconds, runtime=chosen.runtime
    )
    print(f"batch {chosen.batch_size}, {chosen.runtime}: stated error {profile.error:.1%}")
    after = time_plans(
        inputs.model, plans, pixels, seconds=4 * chosen.seconds, runtime=chosen.runtime
    )
    errors, repeats = [], []
    for plan, first, second in zip(plans, before, after, strict=True):
        one, other = statistics.median(first.ms), statistics.median(second.ms)
        measured, predicted = (one + other) / 2, profile.predict(plan)
        errors.append(abs(predicted / measured - 1))
        repeats.append(abs(one / other - 1))
        print(
            f"{plan.gmacs:.3f} GMACs  predicted {predicted:8.2f} ms  measured {measured:8.2f} ms  "
            f"error {predicted / measured - 1:+.1%}  twice {one / other - 1:+.1%}  "
            f"{plan.matching.feature}"
        )
    middle, worst = statistics.median(errors[1:]), max(errors[1:])
    bars = max(0.05, 1.5 * statistics.median(repeats)), max(0.12, 1.5 * max(repeats))
    print(f"median error {middle:.1%} (bar {bars[0]:.1%}), worst {worst:.1%} (bar {bars[1]:.1%})")
    print(f"measured twice: median {statistics.median(repeats):.1%}, worst {max(repeats):.1%}")
    return int(middle > bars[0] or worst > bars[1])


if __name__ == "__main__":
    sys.exit(main())
