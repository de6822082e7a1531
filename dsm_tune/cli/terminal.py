"""What the command line shows: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from dsm_tune.results import Result, TuneResult
from dsm_tune.reviewing import summary

if TYPE_CHECKING:
    from dsm_tune.searching.search import Progress

__all__ = [
    "Terminal",
    "emit",
    "render",
    "table_of",
    "to_json",
    "two_lines",
    "write_curve",
    "write_result",
    "write_survey",
]

QUIET_SECONDS = 5.0  # between two lines of progress where there is no bar


class _Stderr(Console):
    """Rich's own way with a reader that has gone is to end the process, stdout first."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Terminal:
    """Tells what a tune does: a bar on a terminal, plain lines elsewhere. Never raises.

    Args:
        stream: where to, stderr.
        quiet: tell nothing.
        verbose: tell each trial.
        clock: returns seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet, self.verbose, self.clock = quiet, verbose, clock
        self._console = _Stderr(file=stream, highlight=False, soft_wrap=True)
        self._bar: Bar | None = None
        self._task: Any = None
        self._begin = self._last = clock()
        self._before: int | None = None  # trials that had ended when this run began

    def __enter__(self) -> Terminal:
        if self._console.is_terminal and not self.quiet:
            self._bar = Bar(
                SpinnerColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, status="working")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line about a phase that begins or a fact that was found."""
        if self._before is None:
            self._begin = self.clock()
        elif self._bar is not None:
            self._bar.reset(self._task, total=None, status="working")
        self._write(text)

    def progress(self, progress: Progress) -> None:
        """A trial has ended."""
        if self.quiet:
            return
        if self._before is None:
            self._before = progress.done - 1
        now = self.clock()
        here = progress.done - self._before
        left = (now - self._begin) / here * (progress.trials - progress.done)
        if self.verbose:
            self._write(_trial_words(progress))
        status = _progress_words(progress, left)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=progress.done, total=progress.trials, status=status
            )
        elif progress.done >= progress.trials or now - self._last > QUIET_SECONDS:
            self._last = now
            self._write(status)

    def _write(self, text: str) -> None:
        if self.quiet:
            return
        try:
            self._console.print(printable(text), markup=False)
        except OSError:  # nobody reads any more; the search goes on
            self.quiet = True


def _progress_words(progress: Progress, left: float) -> str:
    best = progress.best_divergence
    parts = [f"{progress.done}/{progress.trials} trials"]
    parts += [] if best is None else [f"best divergence {best:.3g}"]
    # The first generation carries the start of all workers: too early to tell.
    if progress.trials / 4 <= progress.done < progress.trials:
        parts.append(f"{summary.duration_words(left)} left")
    return ", ".join(parts)


def _trial_words(progress: Progress) -> str:
    record = progress.record
    latest = record.latest
    divergence = None if latest is None else latest.divergence
    parts = [f"trial {record.number}", record.label, record.state]
    parts += [f"{record.plan.gmacs:.3g} GMACs"]
    parts += [] if divergence is None else [f"divergence {divergence:.3g}"]
    parts += [summary.plan_words(record.plan), record.why]
    return "  ".join(filter(None, parts))


def printable(text: str) -> str:
    """Return one line without control characters: file names may hold any."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def to_json(body: Mapping[str, Any]) -> str:
    """Return a document that any parser reads: numbers that are not finite become null."""
    return json.dumps(_finite(body), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def emit(text: str) -> None:
    """Print to stdout; quietly nothing where nobody reads any more, as in ``dsm-tune … | head``."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def render(parts: Iterable[Any]) -> None:
    """Print texts and tables to stdout, 80 to 100 columns wide."""
    console = Console(file=sys.stdout, highlight=False)
    console = Console(
        file=sys.stdout, highlight=False, width=min(max(console.width, 80), 100), markup=False
    )
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str) and part.startswith("  "))
    emit(capture.get())


def write_result(result: TuneResult, commands: Iterable[str], *, front: bool = False) -> None:
    """Print the answer: in words, as a table, with its front, then what to type next.

    Args:
        result: of a study.
        commands: to type next, with a word on each.
        front: whether to list the front.
    """
    parts: list[Any] = ["", Text(summary.answer(result)), "", _models(result)]
    if front and result.front:
        parts += ["", _front(result)]
    counts = result.trials
    trials = [f"{counts[state]} {state}" for state in ("complete", "pruned", "failed", "duplicate")]
    images, duration = result.images, summary.duration_words(result.seconds)
    parts += [
        "",
        Text(
            f"study {result.study}: {result.status}, {duration}; trials: "
            f"{', '.join(trials)}; front: {len(result.front)}; D = {result.delay}; images: "
            f"{images['search']} to search, {images['holdout']} held out"
        ),
        *(Text(f"fault: {printable(summary.fault_words(one))}") for one in result.faults),
        "",
    ]
    render([*parts, *(f"  {command}" for command in commands)])


def table_of(*headings: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        broken = heading.replace(" ", "\n") if heading.startswith("within") else heading
        table.add_column(
            broken.replace(" (", "\n("),
            justify="left" if number == 0 else "right",
            vertical="top",
            no_wrap=True,
        )
    return table


def _models(result: TuneResult) -> Table:
    """Dense, ToMe, DSM and chosen; intervals stand below their values, so that 80 columns do."""
    table = table_of(*summary.headings(result))
    for row in summary.rows(result):
        name, *cells = row.cells
        table.add_row(name.replace(" ", "\n", 1), *map(two_lines, cells))
    return table


def two_lines(cell: str) -> Text:
    """``value [low, high]`` with the interval below the value."""
    value, _, edges = cell.partition(" [")
    text = Text(value)
    if edges:
        text.append("\n" + edges.rstrip("]").replace(", ", "–"), style="dim")
    return text


def _front(result: TuneResult) -> Table:
    held_out = all(one.divergence is not None for one in result.front)
    _, gmacs, latency, _, divergence, agreement, *_ = summary.headings(result)
    if not held_out:
        divergence += " (search images)"
    table = table_of("front", gmacs, latency, divergence, agreement)
    table.add_column("plan", vertical="top")
    for one in result.front:
        shown = summary.row("", one, result)
        distance = shown.divergence if held_out else _number(one.divergence_search)
        is_chosen = result.chosen is not None and one.plan.digest == result.chosen.plan.digest
        table.add_row(
            _trial_name(one) + (" *" if is_chosen else ""),
            *(value.partition(" ")[0] for value in (shown.gmacs, shown.latency, distance)),
            shown.agreement.partition(" ")[0],
            summary.plan_words(one.plan),
        )
    if result.chosen is not None:
        table.caption = "* chosen"
        table.caption_justify = "left"
    return table


def _trial_name(one: Result) -> str:
    return "–" if one.trial is None else f"trial {one.trial}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def write_survey(body: Mapping[str, Any]) -> None:
    """Print what is known before a search: the document of ``--dry-run --json``."""
    budget, dense, images = body["budget"], body["dense"], body["images"]
    top1 = dense["top1"]
    quality = "" if top1 is None else f", top-1 {100 * top1:.1f} % on the search images"
    answers = {True: "yes", False: "no: nothing that is known is fast enough"}
    answer = "the dense model meets it" if budget["dense_fits"] else answers[budget["satisfiable"]]
    wanted = summary.cost_words(budget["gmacs"], budget["ms"])
    setting = "" if budget["ms"] is None else f" ({budget['stat']}, batch {budget['batch_size']})"
    space, depth = body["search_space"], len(body["similarity_curve"])
    shapes = "∞" if space["shapes"] is None else f"{space['shapes']:.0f}"
    share = body["stability"].get(str(body["delay"]), 0.0)
    duration = summary.duration_words(body["estimated_seconds"])
    lines = {
        "device": body["device"]["name"],
        "dense": summary.cost_words(dense["gmacs"], dense["ms"]) + quality,
        "budget": wanted + setting,
        "reachable": summary.cost_words(budget["fastest_gmacs"], budget["fastest_ms"]),
        "satisfiable": answer,
        "delay": f"D = {body['delay']} of {depth} blocks, in {share:.0%} of resamples",
        "search": f"{body['trials']} trials of {shapes} shapes ({space['name']})",
        "images": f"{images['search']} to search, {images['holdout']} held out",
        "duration": f"about {duration}",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, text in lines.items():
        table.add_row(name, Text(text))
    render([table, "", Text("Nothing was stored; without --dry-run the search begins.")])


def write_curve(body: Mapping[str, Any]) -> None:
    """Print a similarity curve, D, and how stable it is: the document of ``curve --json``."""
    curve, delay = body["similarity_curve"], body["delay"]
    low, high = min(curve), max(curve)
    table = table_of("block", "similarity")
    table.add_column("")
    for block, value in enumerate(curve):
        bar = "█" * round(40 * (value - low) / ((high - low) or 1))
        table.add_row(str(block), f"{value:.4f}", bar + (" ← D" if block == delay else ""))
    how = "" if body["transition"] else " (no transition in the curve: depth / 6)"
    shares = ", ".join(f"D = {d} in {share:.0%}" for d, share in body["stability"].items())
    render(
        [
            table,
            "",
            Text(f"D = {delay} of {len(curve)} blocks{how}"),
            Text(f"images drawn again with replacement: {shares}"),
        ]
    )
