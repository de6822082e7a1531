"""The options of the command line: what each accepts, and the file that may give them instead.

Nothing here knows a default: what is not given is left out, and ``TuneConfig`` decides.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from dsm_tune.config import DEMO_MODEL, TuneConfig
from dsm_tune.errors import ConfigError, DsmTuneError, nearest, shown
from dsm_tune.searching.budget import parse_limit

__all__ = [
    "BUDGETS",
    "DEVICE",
    "IMAGES",
    "LEVEL",
    "MODEL",
    "OUTPUT",
    "RAY",
    "RESUMED",
    "SEED",
    "STORAGE",
    "STORES",
    "SUBMIT",
    "TUNE",
    "Given",
    "Whole",
    "gather",
    "option",
    "with_options",
]

TIMEOUT = 600.0  # seconds, unless it is the demo
Command = TypeVar("Command", bound=Callable[..., Any])


class Whole(click.ParamType[int]):
    """An integer."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read one; a truth value is none."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
            return int(value) if number == int(number) else self.fail("")
        except (ValueError, TypeError, OverflowError, click.BadParameter):
            self.fail(f"must be an integer, but got {shown(value)}", param, ctx)


class Number(click.ParamType[float]):
    """A number."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read one; a truth value is none, nor is NaN."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (ValueError, TypeError, OverflowError):
            number = math.nan
        if math.isnan(number):
            self.fail(f"must be a number, but got {shown(value)}", param, ctx)
        return number


class Text(click.ParamType[str]):
    """Text as it is; of a file, a string."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse the numbers and tables of a file."""
        if not isinstance(value, str):
            self.fail(f"must be a string, but got {shown(value)}", param, ctx)
        return value


class Budget(click.ParamType[str]):
    """A number > 0, or a percentage of the dense model; checked at once, kept as it was given."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check it."""
        option = param.opts[0] if param is not None else "the budget"
        text = "a truth value" if isinstance(value, bool) else str(value).strip()
        parse_limit(text, option)
        return text


class Mapped(click.ParamType[dict[str, Any]]):
    """Keyword arguments: a JSON object, or ``key=value,key=value`` with JSON values."""

    name = "mapping"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Read them; a value that is no JSON is text."""
        if isinstance(value, dict):
            return value
        text = value.strip() if isinstance(value, str) else ""
        try:
            found = json.loads(text) if text.startswith("{") else None
        except (ValueError, RecursionError):
            found = None
        if found is None and text and not text.startswith("{"):
            pairs = [pair.partition("=") for pair in text.replace(",", " ").split()]
            if all(name.isidentifier() and mark for name, mark, _ in pairs):
                found = {name: _json_or_text(given) for name, _, given in pairs}
        if not isinstance(found, dict):
            self.fail(
                "must be a JSON object or key=value pairs such as qk_norm=true,"
                f"init_values=1e-5, but got {shown(value)}",
                param,
                ctx,
            )
        return found


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option of text, unless it says otherwise, that is left out where it is not given."""
    settings = (
        {"default": None} | settings if settings.get("is_flag") else {"type": Text()} | settings
    )
    return click.option(*names, **settings)


def with_options(*groups: tuple[Callable[..., Any], ...]) -> Callable[[Command], Command]:
    """Give a command the options of some groups, in their order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed([one for group in groups for one in group]):
            command = decorator(command)
        return command

    return decorate


MODEL = (
    option("--model", metavar="NAME", help="A timm name or hf-hub:… [the embedded demo]"),
    option("--model-kwargs", type=Mapped(), metavar="JSON|K=V,…", help="For timm.create_model."),
    option("--img-size", type=Whole(), metavar="PX", help="Side of the input in pixels."),
    option("--checkpoint", metavar="FILE", help=".safetensors, or .pth that holds tensors only."),
    option("--pretrained/--no-pretrained", is_flag=True, help="Download timm's own weights."),
)
IMAGES = (option("--images", metavar="DIR", help="Calibration images, searched recursively."),)
DTYPE = option("--dtype", metavar="float32|float16|bfloat16", help="[float32]")
DEVICE_NAME = option("--device", metavar="auto|cpu|cuda|cuda:N", help="[auto]")
THREADS = option(
    "--threads", type=Whole(), metavar="N", help="Of timed forwards on a CPU. [all cores]"
)
DEVICE = (
    option("--batch-size", type=Whole(), metavar="N", help="Images per timed forward. [1]"),
    DTYPE,
    DEVICE_NAME,
    THREADS,
    option("--runtime", metavar="eager|onnx|cudagraphs", help="That serves the model. [eager]"),
)
BUDGETS = (
    option("--budget-ms", type=Budget(), metavar="MS|P%", help="Latency, such as 5 or 60%."),
    option(
        "--budget-gflops",
        "--budget-gmacs",
        "budget_gflops",
        type=Budget(),
        metavar="G|P%",
        help="Giga multiply-adds per image (the papers' GFLOPs), such as 2.7 or 60%.",
    ),
)
SEED = (option("--seed", type=Whole(), metavar="N", help="Of every random choice. [0]"),)
STORAGE = option(
    "--storage", metavar="URL", help="Of the studies. [OPTUNA_STORAGE, or dsm_tune.db here]"
)
TRACKING = option(
    "--tracking-uri", metavar="URL", help="Of MLflow. [MLFLOW_TRACKING_URI, or mlflow.db here]"
)
RAY = option("--ray-address", metavar="ADDRESS", help="[RAY_ADDRESS, or a Ray of its own]")
DASHBOARD = option("--ray-address", metavar="URL", help="Of its dashboard. [RAY_ADDRESS]")
STORES = (STORAGE, TRACKING)
ENDS = (
    option("--trials", type=Whole(), metavar="N", help="Distinct plans to evaluate. [60]"),
    option(
        "--timeout",
        type=Number(),
        metavar="SECONDS",
        help="Ends the search early, keeps all. [600; none for the demo]",
    ),
    option("--workers", type=Whole(), metavar="N", help="Trials at a time. [one per core or GPU]"),
)
RESUMED = (*ENDS, RAY, *STORES)
LEVEL = (
    option("-v", "--verbose", is_flag=True, help="Every trial; tracebacks of defects."),
    option("-q", "--quiet", is_flag=True, help="Errors only on stderr."),
)
OUTPUT = (
    option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else."),
    *LEVEL,
)
ASKED = (
    *BUDGETS,
    option(
        "--max-drop",
        type=Number(),
        metavar="P",
        help="Points of top-1 (labels) or agreement (none) that may be lost.",
    ),
    *MODEL,
    *IMAGES,
    option("--latency-stat", metavar="p50|p90|p99", help="What --budget-ms bounds. [p50]"),
    *DEVICE,
    option("--device-profile", metavar="FILE", help="Of `dsm-tune profile`, for another device."),
    option("--search-space", metavar="NAME|FILE", help="default, paper, wide or TOML. [default]"),
    *ENDS,
    *STORES,
    option("--study", metavar="NAME", help="[made of model, budget and configuration]"),
    option("--experiment", metavar="NAME", help="[MLFLOW_EXPERIMENT_NAME, or dsm-tune]"),
    *SEED,
    option(
        "--config", metavar="FILE", help="TOML with any of these options; the command line wins."
    ),
)
TUNE = (
    *ASKED,
    RAY,
    option("--dry-run", is_flag=True, help="Say what is reachable and how long it takes; stop."),
    *OUTPUT,
)
SUBMIT = (
    *ASKED,
    DASHBOARD,
    option("--driver-resource", metavar="NAME", help="Ray resource of the job's node. [the head]"),
    *OUTPUT,
)


@dataclasses.dataclass(frozen=True)
class Given:
    """What a user gave, by name of the option.

    Attributes:
        values: of the command line, else of ``--config``, else of the environment.
        file: that ``--config`` names.
        in_file: names of the values that are the file's.
    """

    values: Mapping[str, Any]
    file: str = ""
    in_file: frozenset[str] = frozenset()

    def config(self) -> TuneConfig:
        """Return the configuration.

        Raises:
            DsmTuneError: for a value out of range, or none where one is needed.
        """
        fields = {field.name for field in dataclasses.fields(TuneConfig)}
        known = {key: value for key, value in self.values.items() if key in fields}
        if known.get("model", DEMO_MODEL) != DEMO_MODEL:
            known.setdefault("timeout", TIMEOUT)
        try:
            return TuneConfig(**known)
        except DsmTuneError as error:
            blamed = [key for key in self.in_file if f"--{key.replace('_', '-')} " in str(error)]
            raise type(error)(f"{self.file}: {error}" if blamed else str(error)) from None


def gather(
    command: click.Command, values: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> Given:
    """Join what the command line, the file of ``--config`` and the environment give.

    Raises:
        ConfigError: for a file that cannot be read, a key that is no option, a value of the
            wrong kind; it names file and key.
    """
    typed = {key: value for key, value in values.items() if value is not None}
    file = typed.pop("config", None)
    read = {} if file is None else _read(command, Path(file))
    merged = {**read, **typed}
    if not merged.get("experiment") and environ.get("MLFLOW_EXPERIMENT_NAME"):
        merged["experiment"] = environ["MLFLOW_EXPERIMENT_NAME"]
    return Given(merged, file or "", frozenset(read.keys() - typed.keys()))


def _read(command: click.Command, file: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--config must be a readable file, but {file}: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file}: --config must be TOML in UTF-8: {why}") from None
    params = {
        name.removeprefix("--").replace("-", "_"): param
        for param in command.params
        for name in param.opts
        if name.startswith("--") and param.name not in ("config", "help")
    }
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in params:
            raise ConfigError(f"{file}: {key[:60]!r} is not an option{nearest(name[:60], params)}")
        param = params[name]
        where = f"{file}: {key}"
        if param.name in found:
            raise ConfigError(f"{where} is given twice")
        found[str(param.name)] = _convert(param, value, where)
    return found


def _convert(param: click.Parameter, value: Any, where: str) -> Any:
    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, but got {shown(value)}")
        return value
    try:
        return param.type.convert(value, param, None)
    except click.BadParameter as error:
        raise ConfigError(f"{where} {error.message}") from None
    except DsmTuneError as error:
        raise type(error)(f"{where}: {error}") from None
