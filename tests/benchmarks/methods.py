"""What each method of a plan is worth at one cost, and the orderings that the DSM paper reports.

Prints tables: every feature, score, kind of step and option at the same GMACs, each in the same
schedule (r equal in all blocks from the delay on); local merging over T; delayed and spatial
merging against ToMe at three costs. Divergence is the mean of KL(dense ‖ merged) in nats, with a
95 % bootstrap interval over images; "× merge by K" is a ratio with a paired one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import torch
from subject import config, parser
from torch import Tensor

from dsm_tune.inputs import load_inputs
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.measuring.quality import bootstrap_interval
from dsm_tune.plan import Geometry, Matching, MergePlan
from dsm_tune.searching.budget import Shape, fit_gmacs

BEGIN, END = "<!-- methods -->", "<!-- end of methods -->"
PLAIN = Matching()


@dataclasses.dataclass(frozen=True)
class Method:
    """One row: what the plan says, its formula, where it is from, and when it helps."""

    says: str
    formula: str
    source: str
    helps: str
    matching: Matching = PLAIN
    kind: str = "merge"
    local: bool = False
    proportional: bool = True


TOME, DSM, EVIT, ATS, OWN = "ToMe", "DSM", "EViT", "ATS", "here"
METHODS = [
    Method(
        "merge, `feature = k`",
        "mean over heads of K",
        TOME,
        "the default: no feature is surely better",
    ),
    Method("merge, `q`", "… of Q", TOME, "not here", Matching("q")),
    Method("merge, `v`", "… of V", TOME, "not here", Matching("v")),
    Method("merge, `x`", "x after attention", TOME, "level with K here", Matching("x")),
    Method("merge, `kv`", "K and V, each of length 1", OWN, "not here", Matching("kv")),
    Method("merge, `k_all`", "K of all heads", OWN, "level with K here", Matching("k_all")),
    Method("merge, `kv_all`", "K and V of all heads", OWN, "not here", Matching("kv_all")),
    Method("merge, `random`", "seeded noise", DSM, "a floor to compare with", Matching("random")),
    Method(
        "merge, `salience = 0.3`",
        "score − λ·n·a, a: class attention",
        OWN,
        "here, also on its own",
        Matching(salience=0.3),
    ),
    Method(
        "merge, `size_penalty = 0.1`",
        "score − β·log(s_a s_b / (s_a + s_b))",
        "MCTF's idea",
        "with the others below",
        Matching(size_penalty=0.1),
    ),
    Method(
        "merge, `attention_weight = 1`",
        "mean weighed by s·a^γ",
        OWN,
        "with the others",
        Matching(attention_weight=1.0),
    ),
    Method(
        "merge, `norm = mean`",
        "mean scaled to the mean length",
        OWN,
        "here, also on its own",
        Matching(norm="mean"),
    ),
    Method(
        "merge, `norm = largest`",
        "mean scaled to the largest length",
        "MLERP (ToFu)",
        "here, also on its own",
        Matching(norm="largest"),
    ),
    Method(
        "merge, all four",
        "as above",
        OWN,
        "here most; the default search knows it",
        Matching("x", salience=0.3, size_penalty=0.1, attention_weight=1.0, norm="mean"),
    ),
    Method(
        "merge, no log s",
        "`proportional_attention = false`",
        TOME,
        "MAE off the shelf",
        proportional=False,
    ),
    Method(
        "merge in 3 local blocks, `equal`",
        "edges within w×w tiles, r / windows in each",
        DSM,
        "level with global here",
        local=True,
    ),
    Method(
        "merge in 3 local blocks, `free`",
        "… the r best within tiles",
        OWN,
        "level with global here",
        Matching(quota="free"),
        local=True,
    ),
    Method("prune, `norm` of K", "‖mean over heads of K‖", DSM, "never here", kind="prune"),
    Method("prune, `norm` of Q", "‖… of Q‖", DSM, "never here", Matching("q"), kind="prune"),
    Method("prune, `norm` of V", "‖… of V‖", DSM, "never here", Matching("v"), kind="prune"),
    Method("prune, `norm` of x", "‖x‖", DSM, "never here", Matching("x"), kind="prune"),
    Method("prune, `random`", "seeded noise", DSM, "a floor", Matching("random"), kind="prune"),
    Method(
        "prune, `class`",
        "a_j: class attention, mean over heads",
        EVIT,
        "in the last blocks of a plan",
        Matching(prune_score="class"),
        kind="prune",
    ),
    Method(
        "prune, `received`",
        "attention from all, mean",
        OWN,
        "never here",
        Matching(prune_score="received"),
        kind="prune",
    ),
    Method(
        "prune, `ats`",
        "a_j‖V_j‖ / Σ a_i‖V_i‖ per head",
        ATS,
        "in the last blocks of a plan",
        Matching(prune_score="ats"),
        kind="prune",
    ),
    Method(
        "fuse, `class`",
        "Σ a_j x_j / Σ a_j of the r + 1 least",
        EVIT,
        "instead of pruning",
        Matching(prune_score="class"),
        kind="fuse",
    ),
    Method(
        "fuse, `ats`",
        "… weighed by the ATS score",
        "EViT, ATS",
        "instead of pruning",
        Matching(prune_score="ats"),
        kind="fuse",
    ),
    Method(
        "fuse, `norm` of x",
        "… weighed by ‖x‖",
        OWN,
        "there is no class token",
        Matching("x"),
        kind="fuse",
    ),
]


def shape_of(
    geometry: Geometry,
    *,
    delay: int,
    local: int = 0,
    kind: str = "merge",
    matching: Matching = PLAIN,
    proportional: bool = True,
) -> Shape:
    """Equal r in all blocks from ``delay`` on, ``local`` of them within windows, as published."""
    depth, side = geometry.depth, -(-min(geometry.grid) // 2)
    windows = tuple(side + b - delay if delay <= b < delay + local else None for b in range(depth))
    shares = tuple(float(block >= delay) for block in range(depth))
    return Shape(shares, (kind,) * depth, windows, matching, proportional)


def shape_of_method(method: Method, geometry: Geometry, delay: int) -> Shape:
    """The schedule that all methods share, with what this one does."""
    return shape_of(
        geometry,
        delay=delay,
        local=3 if method.local else 0,
        kind=method.kind,
        matching=method.matching,
        proportional=method.proportional,
    )


class Bench:
    """Divergences of plans on one set of images."""

    def __init__(self, evaluator: Evaluator, gmacs: float) -> None:
        self.evaluator, self.gmacs = evaluator, gmacs
        self.geometry = evaluator.geometry

    def divergence(self, shape: Shape, gmacs: float) -> tuple[MergePlan, Tensor]:
        """The plan of a shape at a cost, and its divergence on each image [N]."""
        plan = fit_gmacs(shape, self.geometry, gmacs)
        if plan is None:
            sys.exit(f"no plan costs at most {gmacs} GMACs; name a larger --gmacs")
        print(f"{gmacs:.2f} GMACs: {plan.gmacs:.4f}, {plan.tokens[-1]} left", file=sys.stderr)
        return plan, self.evaluator.evaluate(plan).divergence


def interval(values: Tensor) -> str:
    """Mean and its interval."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} ({low:.3f}–{high:.3f})"


def ratio(values: Tensor, base: Tensor) -> str:
    """Ratio of two means and its interval, images drawn in pairs."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (2000, len(values)), generator=generator)
    ratios = values[drawn].mean(dim=1) / base[drawn].mean(dim=1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return f"{values.mean() / base.mean():.2f} ({low:.2f}–{high:.2f})"


def methods_table(bench: Bench, delay: int) -> Iterator[str]:
    """Every method at one cost."""
    yield "| a plan says | formula | source | helps when | divergence | × merge by K |"
    yield "|---|---|---|---|---|---|"
    base = None
    for method in METHODS:
        shape = shape_of_method(method, bench.geometry, delay)
        _, values = bench.divergence(shape, bench.gmacs)
        base = values if base is None else base
        cells = method.says, method.formula, method.source, method.helps
        yield f"| {' | '.join(cells)} | {interval(values)} | {ratio(values, base)} |"


def local_table(bench: Bench, delay: int) -> Iterator[str]:
    """Local merging over T (the paper's figure 6)."""
    yield "| T, local blocks | divergence | × T = 0 |\n|---|---|---|"
    base = None
    for local in (0, 1, 2, 3, 4, 5, 7):
        shape = shape_of(bench.geometry, delay=delay, local=local)
        _, values = bench.divergence(shape, bench.gmacs)
        base = values if base is None else base
        yield f"| {local} | {interval(values)} | {ratio(values, base)} |"


def schedules_table(bench: Bench, delay: int, costs: list[float]) -> Iterator[str]:
    """ToMe, delayed only, spatial only and both (the paper's table 1)."""
    yield "| GMACs | ToMe | delayed only | spatial only | both (DSM) |\n|---|---|---|---|---|"
    for gmacs in costs:
        found = [
            bench.divergence(shape_of(bench.geometry, delay=first, local=local), gmacs)[1]
            for first, local in ((0, 0), (delay, 0), (0, 3), (delay, 3))
        ]
        against = [f"{interval(one)}, × {ratio(one, found[0])}" for one in found[1:]]
        yield f"| {gmacs:g} | {interval(found[0])} | {' | '.join(against)} |"


def main() -> None:
    """Print the tables."""
    options = parser(__doc__ or "")
    options.add_argument("--gmacs", type=float, default=0.71)
    options.add_argument("--costs", default="0.95,0.83,0.71", help="of the schedules")
    options.add_argument("--delay", type=int, default=2)
    options.add_argument("--count", type=int, default=128, help="of images")
    options.add_argument("--table", choices=["methods", "local", "schedules"])
    chosen = options.parse_args()
    torch.set_num_threads(1)
    inputs = load_inputs(config(chosen, budget_gflops=chosen.gmacs))
    images = inputs.search.take(range(min(chosen.count, len(inputs.search))))
    evaluator = Evaluator(inputs.model, images.pixels, images.labels)
    bench = Bench(evaluator, chosen.gmacs)
    costs = [float(cost) for cost in chosen.costs.split(",")]
    tables = {
        "methods": methods_table(bench, chosen.delay),
        "local": local_table(bench, chosen.delay),
        "schedules": schedules_table(bench, chosen.delay, costs),
    }
    for name, rows in tables.items():
        if chosen.table in (None, name):
            print(f"\n{name}: {len(images)} images, {chosen.gmacs:g} GMACs, D = {chosen.delay}\n")
            for row in rows:
                print(row, flush=True)


if __name__ == "__main__":
    main()
