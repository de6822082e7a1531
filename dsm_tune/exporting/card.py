"""The card of a bundle: what it is, what it was measured to do, and how to use it, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsm_tune.plan import MergePlan

__all__ = ["card_of"]

USE = """\
## Use

```python
import dsm_tune
net = dsm_tune.load_bundle("this folder")  # logits = net(pixels), as preprocess.json says
```

`dsm-tune verify FOLDER` checks on the machine that serves it: every hash, the outputs stored in
`probes.safetensors`, the latency, and the budget.
"""


def card_of(
    name: str, plan: MergePlan, made: Mapping[str, Any], proofs: Mapping[str, object]
) -> str:
    """Write the card.

    Args:
        name: of the model.
        plan: of the bundle.
        made: as in the manifest.
        proofs: by name of what was compared with the eager merged model.
    """
    parts = [f"# {name} with merged tokens", *_origin(made), *_figures(made), *_plan(plan)]
    parts += ["## Checked against the eager merged model", ""]
    parts += [f"- {what}: {proof}" for what, proof in proofs.items()]
    return "\n".join([*parts, "", USE])


def _origin(made: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    if made.get("study"):
        yield f"Found by the study `{made['study']}`: `{made['command']}`"
    served = made.get("serving") or {}
    device = (made.get("device") or {}).get("name")
    if device:
        yield f"Tuned for {device}, " + ", ".join(f"{k} {v}" for k, v in served.items())
    yield ""


def _figures(made: Mapping[str, Any]) -> Iterator[str]:
    rows = [(label, made[label]) for label in ("dense", "exported") if made.get(label)]
    if not rows:
        return
    images = made.get("images") or {}
    yield f"## Measured, on {images.get('holdout', '?')} held-out images"
    yield ""
    yield "| | GMACs | latency p50, ms | of dense | divergence, nats | agreement | top-1 |"
    yield "|---|---|---|---|---|---|---|"
    for label, one in rows:
        took = one["latency_ms"]
        cells = [
            f"{one['gmacs']:.3g}",
            _ranged(took["p50"], took["low"], took["high"], "{:.3g}"),
            _number(took["ratio_to_dense"], "{:.2f}×"),
            _ranged(one["divergence"], one["divergence_low"], one["divergence_high"], "{:.4f}"),
            _number(one["agreement"], "{:.1%}"),
            _number(one["top1"], "{:.1%}"),
        ]
        yield f"| {label} | {' | '.join(cells)} |"
    yield ""
    yield "Intervals in brackets are 95 % bootstrap intervals."
    yield ""


def _plan(plan: MergePlan) -> Iterator[str]:
    yield f"## Plan: {plan.gmacs:.3g} GMACs per image"
    yield ""
    yield "| block | step | tokens removed | window | tokens left |"
    yield "|---|---|---|---|---|"
    for step in plan.active_steps:
        left, removed = plan.tokens[step.block + 1], plan.removed[step.block]
        yield f"| {step.block} | {step.kind} | {removed} | {step.window or 'global'} | {left} |"
    if plan.last_block == "prefix":
        yield ""
        yield "The last block computes its prefix tokens alone."
    yield ""


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _ranged(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None or low is None or high is None:
        return _number(value, form)
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"
