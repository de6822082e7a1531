"""What a search buys at one budget: the chosen plan against ToMe and the paper's DSM.

Runs a whole tune, then compares chosen, DSM and ToMe again on the held-out images and prints
the ratios of their divergences with 95 % bootstrap intervals over images.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from subject import config, parser

from dsm_tune.inputs import load_inputs
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.tuning import tune


class Lines:
    """Prints phases, not trials."""

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr)

    def progress(self, progress: object) -> None:
        """Say nothing."""


def ratio(plan: torch.Tensor, reference: torch.Tensor, seed: int) -> str:
    """Ratio of mean divergences and its interval, images drawn in pairs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(plan), (2000, len(plan)), generator=generator)
    ratios = plan[drawn].mean(dim=1) / reference[drawn].mean(dim=1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return f"{plan.mean() / reference.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Print the divergences and ratios."""
    options = parser(__doc__ or "")
    options.add_argument("--budget-gflops", default="0.71")
    options.add_argument("--trials", type=int, default=60)
    options.add_argument("--timeout", type=float, default=600.0)
    options.add_argument("--search-space", default="default")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asked = config(
            chosen,
            budget_gflops=chosen.budget_gflops,
            trials=chosen.trials,
            timeout=chosen.timeout,
            search_space=chosen.search_space,
            storage=f"sqlite:///{Path(folder) / 'study.db'}",
            tracking_uri=f"sqlite:///{Path(folder) / 'mlflow.db'}",
        )
        start = time.monotonic()
        result = tune(asked, listener=Lines())
        seconds = time.monotonic() - start
    assert result.chosen is not None
    inputs = load_inputs(asked)
    evaluator = Evaluator(inputs.model, inputs.holdout.pixels, inputs.holdout.labels)
    found = {}
    for name, one in [("tome", result.tome), ("dsm", result.dsm), ("chosen", result.chosen)]:
        found[name] = evaluator.evaluate(one.plan).divergence
        print(
            f"{name:8} {one.plan.gmacs:.4f} GMACs  divergence {found[name].mean():.4f}  "
            f"{one.plan.removed}"
        )
    print(f"chosen / DSM  {ratio(found['chosen'], found['dsm'], chosen.seed)}")
    print(f"chosen / ToMe {ratio(found['chosen'], found['tome'], chosen.seed)}")
    print(f"{len(inputs.holdout)} held-out images; whole tune {seconds:.0f} s, {result.trials}")
    print(result.chosen.plan.to_json())


if __name__ == "__main__":
    main()
