"""What a bench found, as tables of eighty columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from dsm_tune.cli.terminal import render, table_of, two_lines

__all__ = ["write_bench"]

NAME = 18  # characters of a name


def write_bench(document: Mapping[str, Any]) -> None:
    """Print the document of ``bench --json``: speed per batch size, then quality."""
    device, rows = document["device"]["name"], document["candidates"]
    threads = f", threads: {document['threads']}" if document["dtype"] == "float32" else ""
    parts: list[Any] = []
    for index, timing in enumerate(rows[0]["timings"]):
        heading = (
            f"{document['model']} on {device}{threads}, {document['runtime']}, "
            f"{document['dtype']}: batch {timing['batch_size']}, {document['runs']} runs in turn"
        )
        parts += [Text(heading), "", _speeds(rows, index), ""]
    if document["images"] is None:
        parts += [Text("No quality: " + _why_not(document))]
    else:
        images = document["images"]
        parts += [Text(f"on {images['count']} held-out images"), "", _qualities(rows)]
    render([*parts, "", Text(f"D = {document['delay']} ({document['delay_from']})")])


def _why_not(document: Mapping[str, Any]) -> str:
    if document["weights"] == "random":
        return "the weights are random (--checkpoint or --pretrained has trained ones)."
    return "there are no images (--images)."


def _speeds(rows: Any, index: int) -> Any:
    columns = ("p50 (ms)", "p90 (ms)", "p99 (ms)", "images (per s)", "speed-up", "efficiency")
    table = table_of("", "GMACs", *columns, "peak (MiB)")
    for one in rows:
        timing = one["timings"][index]
        latency = timing["latency_ms"]
        low, high = timing["speedup_q25"], timing["speedup_q75"]
        spread = f"{timing['speedup']:.2f}× [{low:.2f}, {high:.2f}]"
        peak = timing["peak_mib"]
        table.add_row(
            _name(one),
            f"{one['gmacs']:.3g}",
            *(_digits(latency[name]) for name in ("p50", "p90", "p99")),
            _digits(timing["throughput"]),
            two_lines(spread),
            f"{timing['efficiency']:.2f}",
            "–" if peak is None else _digits(peak),
        )
    return table


def _qualities(rows: Any) -> Any:
    table = table_of("", "GMACs", "divergence (nats)", "agreement (%)", "top-1 (%)")
    for one in rows:
        quality = one["quality"] or {}
        divergence = agreement = "–"
        if "divergence" in quality:
            edges = quality["divergence_low"], quality["divergence_high"]
            divergence = f"{quality['divergence']:.3g} [{edges[0]:.3g}, {edges[1]:.3g}]"
            low, high = (100 * quality[f"agreement_{end}"] for end in ("low", "high"))
            agreement = f"{100 * quality['agreement']:.1f} [{low:.1f}, {high:.1f}]"
        top1 = quality.get("top1")
        table.add_row(
            _name(one),
            f"{one['gmacs']:.3g}",
            two_lines(divergence),
            two_lines(agreement),
            "–" if top1 is None else f"{100 * top1:.1f}",
        )
    return table


def _name(one: Mapping[str, Any]) -> Text:
    name = one["name"]
    return Text(name if len(name) <= NAME else name[: NAME - 1] + "…")


def _digits(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
