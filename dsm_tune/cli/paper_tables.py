"""The paper's tables and figures on a terminal of eighty columns, print beside measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dsm_tune.cli.terminal import render, table_of, two_lines

__all__ = ["write_paper"]

Row = Mapping[str, Any]
Cell = Callable[[Row], "str | Text"]
Columns = list[tuple[str, Cell]]
NONE = "–"
NAME = 24  # characters of a label
BARS = "▁▂▃▄▅▆▇█"


def write_paper(document: Mapping[str, Any]) -> None:
    """Print the document of ``paper --json``."""
    parts: list[Any] = []
    for item in document["items"]:
        parts += _item(item, document)
    render([*parts, *_ending(document)])


def _item(item: Mapping[str, Any], document: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = [Text(item["title"], style="bold"), ""]
    for section in item["sections"]:
        parts += [*_section(section, document), ""]
    if item["curves"]:
        parts += [_curves(item["curves"]), ""]
    if item["needs"] is not None:
        parts.append(Text(f"needs {item['needs']}"))
    elif item["file"] is not None:
        parts.append(Text(f"drawn in {item['file']}"))
    elif item["picture"] is not None:
        parts.append(Text("-o DIR draws it"))
    return [*parts, *map(Text, item["notes"]), ""]


def _section(section: Mapping[str, Any], document: Mapping[str, Any]) -> list[Any]:
    rows, is_paper = section["rows"], section["of"] == "paper"
    parts: list[Any] = []
    if not is_paper:
        facts = next(one for one in document["models"] if one["model"] == section["model"])
        parts += [Text(f"{section['model']}: {_delay_words(facts)}{_images_words(facts)}"), ""]
    costs, qualities = _costs(rows, is_paper), _qualities(rows, is_paper)
    if not any(row["quality"] for row in rows):
        parts.append(_table(costs, rows))
    elif is_paper or any(row["printed"]["share"] for row in rows):  # too wide for one table
        judged = [row for row in rows if row["quality"] or not _of_several(rows)]
        parts += [_table(costs, rows), "", _table(qualities, judged)]
    else:
        parts.append(_table(costs + qualities, rows))
    if any(row["timing"] for row in rows):
        setting = document["speed"]
        words = f"batch {setting['batch_size']}, {setting['runs']} runs in turn"
        parts += [
            "",
            Text(f"{setting['device']}, {setting['runtime']}, {words}"),
            "",
            _speeds(rows),
        ]
    return parts


def _delay_words(facts: Mapping[str, Any]) -> str:
    if facts["stability"] is None:
        return f"D = {facts['delay']}, depth / 6"
    share = facts["stability"].get(str(facts["delay"]), 0.0)
    return f"D = {facts['delay']} in {share:.0%} of resamples"


def _images_words(facts: Mapping[str, Any]) -> str:
    if facts["images"] is None:
        return ""
    return f"; on {facts['images']} held-out images"


def _of_several(rows: Sequence[Row]) -> bool:
    return len({row["model"] for row in rows if row["kind"] != "other"}) > 1


def _costs(rows: Sequence[Row], is_paper: bool) -> Columns:
    """GMACs; of the paper's models beside print, of others as shares of their dense model."""
    columns: Columns = []
    if _of_several(rows):
        columns.append(("model", lambda row: _short(row["model"])))
    if is_paper:
        if any(row["printed"]["gmacs"] for row in rows):
            columns.append(("GMACs\nprinted", lambda row: row["printed"]["gmacs"] or NONE))
        columns.append(("GMACs\nhere", lambda row: f"{row['gmacs']:.2f}"))
        if any(row["deviation"] is not None for row in rows):
            columns.append(("off by", lambda row: _percent(row["deviation"])))
        if not any(row["quality"] for row in rows):
            if any(row["printed"]["top1"] for row in rows):
                columns.append(
                    ("top-1 (%)\nprinted", lambda row: _number(row["printed"]["top1"], 1))
                )
            columns.append(("top-1\nhere", _needs))
    else:
        columns.append(("GMACs", lambda row: f"{row['gmacs']:.3g}"))
        if any(row["printed"]["share"] for row in rows):
            columns.append(("of dense (%)\nprinted", lambda row: _share(row["printed"]["share"])))
            columns.append(("of dense (%)\nhere", lambda row: _share(row["share"])))
        else:
            columns.append(("of dense (%)", lambda row: _share(row["share"])))
        if not any(row["quality"] for row in rows):
            columns.append(("top-1\nhere", _needs))
    return columns


def _qualities(rows: Sequence[Row], is_paper: bool) -> Columns:
    """Top-1 and its change beside print; divergence and agreement, which print has not."""
    columns: Columns = []
    if _of_several(rows):
        columns.append(("model", lambda row: _short(row["model"])))
    if is_paper and any(row["printed"]["top1"] for row in rows):
        columns.append(("top-1 (%)\nprinted", lambda row: _number(row["printed"]["top1"], 1)))
    columns.append(("top-1 (%)\nhere", _top1))
    if any(row["printed"]["top1_change"] is not None for row in rows):
        columns.append(
            ("change\nprinted", lambda row: _number(row["printed"]["top1_change"], 1, sign="+"))
        )
    columns.append(("change\nhere", _change))
    columns.append(("divergence\n(nats)", _divergence))
    columns.append(("agreement\n(%)", lambda row: _share((row["quality"] or {}).get("agreement"))))
    return columns


def _speeds(rows: Sequence[Row]) -> Table:
    def of(name: str) -> Cell:
        return lambda row: _digits(row["timing"][name]) if row["timing"] else NONE

    def speedup(row: Row) -> Text:
        timing = row["timing"]
        low, high = timing["speedup_q25"], timing["speedup_q75"]
        return two_lines(f"{timing['speedup']:.2f}× [{low:.2f}, {high:.2f}]")

    columns: Columns = [
        ("images\n(per s)", of("throughput")),
        ("speed-up", speedup),
        ("efficiency", of("efficiency")),
    ]
    return _table(columns, [row for row in rows if row["timing"]])


def _table(columns: Sequence[tuple[str, Cell]], rows: Sequence[Row]) -> Table:
    table = table_of("", *(heading for heading, _ in columns))
    for number, (heading, _) in enumerate(columns):
        if heading == "model":
            table.columns[number + 1].justify = "left"
    for row in rows:
        label = _label(row)
        if len(label) > NAME:
            label = label[: NAME - 1] + "…"
        table.add_row(Text(label), *(_plain(cell(row)) for _, cell in columns))
    return table


def _plain(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _label(row: Row) -> str:
    if row["kind"] in ("dense", "other"):
        return str(row["label"])
    r = f"r≈{row['r']}" if row["r_is_fitted"] else f"r={row['r']}"
    windows = f" T={row['local_blocks']}" if row["label"] == "DSM" else ""
    return f"{row['label']}{windows} {r}"


def _short(model: str) -> str:
    return model.replace("_patch", "/").replace("_224", " 224").replace("_384", " 384")


def _needs(row: Row) -> str:
    return f"needs {row['needs']}" if row["needs"] else NONE


def _top1(row: Row) -> str:
    quality = row["quality"]
    if quality is None:
        return _needs(row)
    return _needs(row) if quality["top1"] is None else f"{100 * quality['top1']:.1f}"


def _change(row: Row) -> Text:
    quality = row["quality"] or {}
    value = quality.get("top1_change")
    if value is None:
        return Text(NONE)
    if row["kind"] == "dense":
        return Text("0")
    found = Text(f"{value:+.1f}")
    low, high = quality["top1_change_low"], quality["top1_change_high"]
    return found.append(f"\n{low:+.1f} to {high:+.1f}", style="dim")


def _divergence(row: Row) -> Text:
    quality = row["quality"] or {}
    value = quality.get("divergence")
    if value is None or row["kind"] == "dense":
        return Text(NONE if value is None else "0")
    low, high = quality["divergence_low"], quality["divergence_high"]
    return two_lines(f"{value:.3g} [{low:.2g}, {high:.2g}]")


def _curves(curves: Sequence[Mapping[str, Any]]) -> Table:
    table = table_of("", "D")
    table.add_column("in resamples", justify="right")
    table.add_column("block 0 … last", no_wrap=True)
    for one in curves:
        is_random = one["weights"] == "random"
        share = one["stability"].get(str(one["delay"]), 0.0)
        found = f"{share:.0%}" if one["transition"] else "depth / 6"
        table.add_row(
            Text(_short(one["model"])[:38]),
            NONE if is_random else str(one["delay"]),
            "random weights" if is_random else found,
            _spark(one["similarity_curve"]),
        )
    return table


def _spark(values: Sequence[float]) -> Text:
    low, high = min(values), max(values)
    steps = [round((len(BARS) - 1) * (value - low) / ((high - low) or 1)) for value in values]
    return Text("".join(BARS[step] for step in steps)[:20])


def _ending(document: Mapping[str, Any]) -> list[Any]:
    """What is missing, and how to give it."""
    sections = [section for item in document["items"] for section in item["sections"]]
    rows = [row for section in sections for row in section["rows"]]
    needs = {row["needs"] for row in rows} | {item["needs"] for item in document["items"]}
    asks = " ".join(filter(None, needs))
    lines = []
    if any(row["printed"]["top1"] for row in rows):
        of = "Printed top-1 is of ImageNet-1k's 50,000 validation images"
        folder = document["images"]
        here = f"here it is of images in {folder}: compare changes"
        lines.append(f"{of}, which are not at hand." if folder is None else f"{of}; {here}.")
    if "weights" in asks:
        lines.append("Weights: --model NAME=FILE, as often as there are models; or --pretrained.")
    if "images" in asks:
        lines.append("Images: --images DIR; with a labels.csv (file,label) also top-1.")
    if "labels" in asks:
        lines.append("Labels: a labels.csv (file,label) in the folder of images.")
    return [*map(Text, lines), Text(f"Print: {document['paper']}.")]


def _percent(value: float | None) -> str:
    if value is None:
        return NONE
    return "0.0 %" if abs(value) < 5e-4 else f"{100 * value:+.1f} %"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _number(value: float | None, places: int, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.{places}f}"


def _digits(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
