"""The search space: a TOML file, the parameters a trial draws from it, the shape they build.

``Space.draw`` asks an Optuna-like trial for parameters, ``Space.build`` turns parameters into a
shape; the two are separate, so that a stored trial is replayed without a sampler.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from dsm_tune.errors import SpaceError, nearest, shown
from dsm_tune.plan import (
    ATTENTIONS,
    FEATURES,
    LAST_BLOCKS,
    NORMS,
    POSITIONS,
    PRUNE_SCORES,
    QUOTAS,
    Geometry,
    Matching,
)
from dsm_tune.searching.budget import Shape

__all__ = [
    "FORMAT",
    "SAMPLERS",
    "Choices",
    "Fidelity",
    "Range",
    "Space",
    "load_space",
    "space_names",
]

FORMAT = "dsm_tune.space/1"


class Draws(Protocol):
    """The part of ``optuna.Trial`` that a space needs."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; integers if ``whole``."""

    low: float
    high: float
    whole: bool = False

    def draw(self, trial: Draws, name: str) -> Any:
        """Draw one, or return it where there is only one."""
        if self.low == self.high:
            return int(self.low) if self.whole else self.low
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high))
        return trial.suggest_float(name, self.low, self.high)

    def admits(self, value: object) -> bool:
        """Whether a value is one of these numbers."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (not self.whole or value == int(value))

    def __str__(self) -> str:
        return f"{'an integer' if self.whole else 'a number'} from {self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Choices:
    """A few values."""

    values: tuple[Any, ...]

    def draw(self, trial: Draws, name: str) -> Any:
        """Draw one, or return it where there is only one."""
        return (
            self.values[0]
            if len(self.values) == 1
            else trial.suggest_categorical(name, self.values)
        )

    def admits(self, value: object) -> bool:
        """Whether a value is one of these."""
        return any(value == choice and type(value) is type(choice) for choice in self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key of a space file accepts, and what it is if absent."""

    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    choices: tuple[Any, ...] = ()
    default: Any = None

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}, or a list of them"
        kind = "an integer" if self.whole else "a number"
        return f"{kind} from {self.low:g} to {self.high:g}, or [low, high]"


# Every parameter of a trial: table, key, and what it may be. What is absent is the paper's.
RULES: dict[str, dict[str, Rule]] = {
    "delay": {"offset": Rule(-64, 64, whole=True, default=0)},
    "windows": {
        "local_blocks": Rule(0, 64, whole=True, default=3),
        "first_share": Rule(0.05, 1.0, default=0.5),
        "growth": Rule(0, 16, whole=True, default=1),
        "quota": Rule(choices=QUOTAS, default="equal"),
        "position": Rule(choices=POSITIONS, default="destination"),
    },
    "reduction": {
        "slope": Rule(-8, 8, default=0.0),
        "bump": Rule(-8, 8, default=0.0),
        "jitter": Rule(0, 4, default=0.0),
        "every": Rule(1, 64, whole=True, default=1),
        "prune_blocks": Rule(0, 64, whole=True, default=0),
        "prune_kind": Rule(choices=("prune", "fuse"), default="prune"),
        "prune_score": Rule(choices=PRUNE_SCORES, default="norm"),
        "last_block": Rule(choices=LAST_BLOCKS, default="all"),
        "cost_share": Rule(0.05, 1.0, default=1.0),
    },
    "matching": {
        "feature": Rule(choices=FEATURES, default="k"),
        "salience": Rule(0, 100, default=0.0),
        "attention": Rule(choices=ATTENTIONS, default="class"),
        "size_penalty": Rule(0, 100, default=0.0),
        "attention_weight": Rule(0, 100, default=0.0),
        "norm": Rule(choices=NORMS, default="free"),
        "proportional_attention": Rule(choices=(True, False), default=True),
    },
}
SAMPLERS = ("tpe_equal_cost", "tpe", "nsga2", "gp", "random")
SEARCH_RULES = {
    "sampler": Rule(choices=SAMPLERS, default=SAMPLERS[0]),
    "generation": Rule(1, 1024, whole=True, default=8),
}
FIDELITY_RULES = {
    "image_share": Rule(0.01, 1.0, default=1.0),
    "keep_share": Rule(0.01, 1.0, default=1.0),
}


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How a generation is thinned out before it spends all images.

    Attributes:
        image_share: of the search images that every trial is evaluated on first.
        keep_share: of the trials that go on to all images, best non-domination ranks first.
    """

    image_share: float = 1.0
    keep_share: float = 1.0

    @property
    def thins_out(self) -> bool:
        """Whether there is a stage on few images, and it ends any trial."""
        return self.image_share < 1 and self.keep_share < 1


@dataclasses.dataclass(frozen=True)
class Space:
    """A search space, not yet bound to a model.

    Attributes:
        name: of the file, without its suffix.
        parameters: what each parameter of a trial may be, by name.
        enqueued: parameters to try first; what a point leaves out is the paper's.
        sampler: one of ``SAMPLERS``.
        generation: trials asked at once, whatever the number of workers.
        fidelity: how a generation is thinned out.
    """

    name: str
    parameters: dict[str, Range | Choices]
    enqueued: tuple[dict[str, Any], ...] = ()
    sampler: str = SAMPLERS[0]
    generation: int = 8
    fidelity: Fidelity = Fidelity()

    def bind(self, geometry: Geometry, delay: int) -> Space:
        """Return the space without what cannot be built for a model.

        Args:
            geometry: of the model.
            delay: D as detected.
        """
        bound = dict(self.parameters)
        offset = bound["offset"]
        if isinstance(offset, Range):
            clamp = [
                min(max(delay + o, 0), geometry.depth - 1) - delay
                for o in (offset.low, offset.high)
            ]
            bound["offset"] = Range(clamp[0], clamp[1], whole=True)
        if not geometry.reads_prefix_only:
            bound["last_block"] = Choices(("all",))
        if not geometry.prefix:
            for name in ("attention", "prune_score"):
                kept = tuple(v for v in _values(bound[name]) if v not in ("class", "ats"))
                bound[name] = Choices(kept or ("received",))
        for index in range(geometry.depth if bound["jitter"] != Range(0.0, 0.0) else 0):
            largest = bound["jitter"].high if isinstance(bound["jitter"], Range) else 0.0
            bound[f"jitter_{index}"] = Range(-largest, largest)
        bound["jitter"] = Range(0.0, 0.0)
        fitting = []
        for point in self.enqueued:
            changed = {k: v for k, v in point.items() if bound[k].admits(v)}
            fitting.append(changed)
        return dataclasses.replace(self, parameters=bound, enqueued=tuple(fitting))

    def draw(self, trial: Draws) -> dict[str, Any]:
        """Draw the parameters of one trial; those with one value are not drawn."""
        return {name: kind.draw(trial, name) for name, kind in self.parameters.items()}

    def complete(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters of a point that names some: the rest is the paper's, if it may."""
        whole = {}
        for name, kind in self.parameters.items():
            value = point.get(name, DEFAULTS.get(name, 0.0))
            if not kind.admits(value):
                value = (
                    kind.values[0]
                    if isinstance(kind, Choices)
                    else min(max(value, kind.low), kind.high)
                )
            if isinstance(kind, Range):
                value = int(value) if kind.whole else float(value)
            whole[name] = value
        return whole

    @property
    def size(self) -> float:
        """Number of distinct points; infinite where a number may be any of a range."""
        product = 1.0
        for kind in self.parameters.values():
            if isinstance(kind, Choices):
                product *= len(kind.values)
            elif kind.whole:
                product *= kind.high - kind.low + 1
            elif kind.low < kind.high:
                return math.inf
        return product


DEFAULTS = {key: rule.default for table in RULES.values() for key, rule in table.items()}


def _values(kind: Range | Choices) -> tuple[Any, ...]:
    return kind.values if isinstance(kind, Choices) else ()


def build(params: Mapping[str, Any], geometry: Geometry, delay: int) -> Shape:
    """Turn the parameters of a trial into the shape of its plan.

    The shares follow ``exp(slope · t + bump · (1 - t²) + jitter)`` with t from -1 at the first
    block that may reduce to 1 at the last: a positive bump removes most in the middle. Of these
    blocks, the first and every so many further ones reduce: fewer and larger steps take less time
    where a step costs as much as a block of few tokens does, as with one image at a time.

    Args:
        params: as :meth:`Space.draw` or :meth:`Space.complete` returns them.
        geometry: of the model.
        delay: D as detected.
    """
    depth = geometry.depth
    first = min(max(delay + params["offset"], 0), depth - 1)
    end = depth - 1 if params["last_block"] == "prefix" else depth
    span = max(end - 1 - first, 1)
    reducing = range(first, end, params.get("every", 1))  # older studies do not name it
    shares = []
    for block in range(depth):
        t = 2 * (block - first) / span - 1
        exponent = (
            params["slope"] * t + params["bump"] * (1 - t * t) + params.get(f"jitter_{block}", 0.0)
        )
        shares.append(math.exp(exponent) if block in reducing else 0.0)
    side = max(1, round(params["first_share"] * min(geometry.grid)))
    windows = [
        side + params["growth"] * (block - first)
        if first <= block < first + params["local_blocks"]
        else None
        for block in range(depth)
    ]
    drops = params.get("prune_kind", "prune")  # which a study of an older space does not name
    dropping = reducing[max(len(reducing) - params["prune_blocks"], 0) :]
    kinds = [drops if block in dropping else "merge" for block in range(depth)]
    matching = Matching(
        feature=params["feature"],
        quota=params["quota"],
        position=params["position"],
        salience=params["salience"],
        attention=params["attention"],
        size_penalty=params["size_penalty"],
        attention_weight=params["attention_weight"],
        norm=params["norm"],
        prune_score=params["prune_score"],
    )
    return Shape(
        tuple(shares),
        tuple(kinds),
        tuple(windows),
        matching,
        params["proportional_attention"],
        params["last_block"],
    )


def space_names() -> list[str]:
    """Names of the spaces that come with dsm-tune."""
    return sorted(
        p.name.removesuffix(".toml") for p in _folder().iterdir() if p.name.endswith(".toml")
    )


def _folder() -> Any:
    packaged = resources.files("dsm_tune") / "search_spaces"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "search_spaces"


def load_space(name_or_file: str) -> Space:
    """Read a search space.

    Args:
        name_or_file: name of one that comes with dsm-tune, or a TOML file.

    Raises:
        SpaceError: naming file, key and what is accepted.
    """
    file = Path(name_or_file)
    if name_or_file in space_names():
        return parse_space(
            (_folder() / f"{name_or_file}.toml").read_bytes(), name_or_file, name_or_file
        )
    if not file.is_file():
        raise SpaceError(
            f"--search-space must be a TOML file or one of {', '.join(space_names())}, "
            f"but got {name_or_file!r}{nearest(name_or_file, space_names())}"
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SpaceError(f"{file}: cannot be read: {error.strerror}") from None
    return parse_space(content, file.stem, name_or_file)


def parse_space(content: bytes, name: str, where: str) -> Space:
    """Read a search space from the bytes of a TOML file; raises like :func:`load_space`."""
    try:
        document = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise SpaceError(
            f"{where}: a search space must be TOML in UTF-8: {' '.join(str(error).split())}"
        ) from None
    if document.get("format") != FORMAT:
        raise SpaceError(
            f"{where}: format must be {FORMAT!r}, but got {shown(document.get('format'))}"
        )
    tables = ["format", "description", "search", "fidelity", "enqueue", *RULES]
    _refuse_unknown(document, tables, f"{where}: ")
    parameters: dict[str, Range | Choices] = {}
    for table, rules in RULES.items():
        given = _table(document, table, where)
        _refuse_unknown(given, list(rules), f"{where}: {table}.")
        for key, rule in rules.items():
            parameters[key] = _values_of(
                given.get(key, rule.default), rule, f"{where}: {table}.{key}"
            )
    search = _single(document, "search", SEARCH_RULES, where)
    fidelity = _single(document, "fidelity", FIDELITY_RULES, where)
    enqueued = _enqueued(document.get("enqueue", []), parameters, where)
    return Space(
        name, parameters, enqueued, search["sampler"], search["generation"], Fidelity(**fidelity)
    )


def _table(document: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = document.get(name, {})
    if not isinstance(value, dict):
        raise SpaceError(f"{where}: {name} must be a table, but got {shown(value)}")
    return value


def _single(
    document: Mapping[str, Any], name: str, rules: Mapping[str, Rule], where: str
) -> dict[str, Any]:
    given = _table(document, name, where)
    _refuse_unknown(given, list(rules), f"{where}: {name}.")
    result = {}
    for key, rule in rules.items():
        value = given.get(key, rule.default)
        accepted = _values_of(value, rule, f"{where}: {name}.{key}")
        if isinstance(value, list):
            raise SpaceError(
                f"{where}: {name}.{key} must be a single value, but got {shown(value)}"
            )
        result[key] = accepted.values[0] if isinstance(accepted, Choices) else accepted.low
    return result


def _values_of(value: Any, rule: Rule, where: str) -> Range | Choices:
    problem = SpaceError(f"{where} must be {rule}, but got {shown(value)}")
    if rule.choices:
        values = value if isinstance(value, list) else [value]
        accepted = Choices(rule.choices)
        if not values or not all(accepted.admits(v) for v in values):
            raise problem
        return Choices(tuple(dict.fromkeys(values)))
    bounds = value if isinstance(value, list) else [value, value]
    allowed = Range(rule.low, rule.high, rule.whole)
    if len(bounds) != 2 or not all(allowed.admits(v) for v in bounds):
        raise problem
    if bounds[0] > bounds[1]:
        raise SpaceError(
            f"{where}: low <= high must hold, but got (low={bounds[0]}, high={bounds[1]})"
        )
    low, high = (int(b) if rule.whole else float(b) for b in bounds)
    return Range(low, high, rule.whole)


def _enqueued(
    points: Any, parameters: Mapping[str, Range | Choices], where: str
) -> tuple[dict[str, Any], ...]:
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise SpaceError(f"{where}: enqueue must be an array of tables, but got {shown(points)}")
    for index, point in enumerate(points):
        place = f"{where}: enqueue[{index}]."
        _refuse_unknown(point, list(parameters), place)
        for key, value in point.items():
            if not parameters[key].admits(value):
                raise SpaceError(f"{place}{key} must be {parameters[key]}, but got {shown(value)}")
    return tuple(dict(point) for point in points)


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise SpaceError(
                f"{where}{key[:60]!r} is not a key{nearest(key[:60], known)}; "
                f"accepted are {', '.join(known)}"
            )
