"""What a tune is asked to do, as data: checked, made absolute, and known again by its digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsm_tune.errors import BudgetError, ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DEMO_MODEL", "TuneConfig"]

DEMO_MODEL = "dsm_tune_demo"
STATS = ("p50", "p90", "p99")
DTYPES = ("float32", "float16", "bfloat16")
RUNTIMES = ("eager", "onnx", "cudagraphs")
MOST_THREADS = 1024
# What may differ between a study and its resumption: it changes no trial.
FREE = (
    "trials",
    "timeout",
    "workers",
    "ray_address",
    "study",
    "storage",
    "tracking_uri",
    "experiment",
)


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Everything that :func:`dsm_tune.tune` is asked.

    Attributes:
        model: a timm name, the name of the embedded demo, or a module (then ``images`` too).
        model_kwargs: passed to ``timm.create_model``.
        img_size: side of the input in pixels, if not the model's own.
        checkpoint: weights: ``.safetensors``, or ``.pth`` of tensors only.
        pretrained: whether to download timm's own weights.
        images: folder of calibration images; the demo alone brings its own.
        budget_ms: latency of one forward: milliseconds > 0 or a share such as ``"60%"`` of dense.
        budget_gflops: giga multiply-adds per image (the papers' GFLOPs), or a share likewise.
        max_drop: points of top-1 (labels) or agreement (no labels) that may be lost; >= 0.
        latency_stat: ``p50``, ``p90`` or ``p99``.
        batch_size: images per timed forward.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        runtime: that serves the model: ``eager``; ``onnx``, ONNX Runtime on a CPU; or
            ``cudagraphs`` on a CUDA device.
        threads: of the timed forward on a CPU; ``None`` for all cores.
        device_profile: file with a profile of the target device, if it is not this one.
        search_space: a name or a TOML file.
        trials: distinct plans to evaluate, known ones included.
        timeout: seconds after which no trial is started.
        workers: trials at a time; ``None`` for one per core or GPU.
        ray_address: of a Ray cluster; ``None`` for a local one.
        study: name; ``None`` for one made of model, budget and configuration.
        storage: database URL of the studies.
        tracking_uri: of MLflow.
        experiment: of MLflow.
        seed: of every random choice.
    """

    model: str | nn.Module = DEMO_MODEL
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    img_size: int | None = None
    checkpoint: str | None = None
    pretrained: bool = False
    images: str | None = None
    budget_ms: float | str | None = None
    budget_gflops: float | str | None = None
    max_drop: float | None = None
    latency_stat: str = "p50"
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "auto"
    runtime: str = "eager"
    threads: int | None = None
    device_profile: str | None = None
    search_space: str = "default"
    trials: int = 60
    timeout: float | None = None
    workers: int | None = None
    ray_address: str | None = None
    study: str | None = None
    storage: str | None = None
    tracking_uri: str | None = None
    experiment: str = "dsm-tune"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in [("batch_size", 1), ("trials", 1), ("seed", 0)]:
            _whole(name, getattr(self, name), low)
        for name in ("img_size", "threads", "workers"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        if (self.threads or 0) > MOST_THREADS:
            raise ConfigError(f"--threads must be at most {MOST_THREADS}, but got {self.threads}")
        _one_of("latency_stat", self.latency_stat, STATS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("runtime", self.runtime, RUNTIMES)
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(self.device)):
            raise ConfigError(
                f"--device must be auto, cpu, cuda or cuda:N, but got {self.device!r:.60}"
            )
        for name in ("max_drop", "timeout"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < float("inf")):
                raise ConfigError(f"{_option(name)} must be a number >= 0, but got {value!r:.60}")
        if self.budget_ms is None and self.budget_gflops is None:
            raise BudgetError(
                "a budget must be given: --budget-ms (such as 5 or 60%) or "
                "--budget-gflops (such as 2.7 or 60%)"
            )
        if self.images is None and self.model != DEMO_MODEL:
            raise ConfigError("--images must name a folder of calibration images for this --model")
        if self.study is not None and not re.fullmatch(r"[\w.%@+-][\w.%@+ -]{0,199}", self.study):
            raise ConfigError(
                "--study must be 1 to 200 letters, digits or . _ % @ + -, "
                f"but got {self.study!r:.60}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> TuneConfig:
        """Make a configuration from named values.

        Raises:
            ConfigError: for a name that is not an option.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{where}{key[:60]!r} is not an option{nearest(key[:60], known)}")
        return cls(**values)

    def absolute(self, cwd: Path, environ: Mapping[str, str] = os.environ) -> TuneConfig:
        """Return the configuration with paths and the storage made absolute, once and for all."""
        changes: dict[str, Any] = {}
        for name in ("checkpoint", "images", "device_profile"):
            if (value := getattr(self, name)) is not None:
                changes[name] = os.path.abspath(cwd / value)
        if self.search_space.endswith(".toml"):
            changes["search_space"] = os.path.abspath(cwd / self.search_space)
        changes["storage"] = absolute_storage(self.storage, cwd, environ)
        changes["ray_address"] = self.ray_address or environ.get("RAY_ADDRESS") or None
        return dataclasses.replace(self, **changes)

    @property
    def model_name(self) -> str:
        """The timm name, or the name of the module's class."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__

    def to_dict(self) -> dict[str, Any]:
        """Return all options; a module is named by its class."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**body, "model": self.model_name}

    def identity(self) -> dict[str, Any]:
        """What makes two configurations the same study: all that can change a trial."""
        return {key: value for key, value in self.to_dict().items() if key not in FREE}

    def words(self, also: Collection[str] = ()) -> list[str]:
        """Arguments of the command line that repeat this tune: what differs from the defaults.

        Args:
            also: of ``storage``, ``tracking_uri`` and ``ray_address``, which mean something else
                elsewhere, those to name too.
        """
        words = []
        for name, value in self._told(also):
            words.append(_option(name))
            if value is not True:
                words.append(value if isinstance(value, str) else json.dumps(value, default=str))
        return words

    @property
    def command(self) -> str:
        """The command line that repeats this tune."""
        return shlex.join(["dsm-tune", *self.words()])

    @property
    def toml(self) -> str:
        """The same as a file for ``--config``."""
        lines = ["# dsm-tune --config config.toml"]
        for name, value in self._told():
            plain = json.dumps(value) if isinstance(value, dict) else value
            lines.append(f"{name} = {json.dumps(plain)}")
        return "\n".join(lines) + "\n"

    def _told(self, also: Collection[str] = ()) -> list[tuple[str, Any]]:
        """What differs from the defaults and means the same elsewhere."""
        private = {"storage", "tracking_uri", "ray_address"} - set(also)
        told = []
        for field in dataclasses.fields(self):
            value = self.to_dict()[field.name]
            if field.name not in private and value not in (None, {}, field.default):
                told.append((field.name, value))
        return told

    @property
    def study_name(self) -> str:
        """The given name, or one of model, budget and configuration, the same for the same ones."""
        if self.study:
            return self.study
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True, default=str).encode())
        budgets = [
            f"{str(value).strip()}{unit}"
            for value, unit in [(self.budget_ms, "ms"), (self.budget_gflops, "gmacs")]
            if value is not None
        ]
        name = re.sub(r"[^\w.%@+-]+", "-", f"{self.model_name}-{'-'.join(budgets)}")
        return f"{name[:150]}-{digest.hexdigest()[:6]}"


def absolute_storage(url: str | None, cwd: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Return the study store's URL: given, of ``OPTUNA_STORAGE``, or ``dsm_tune.db`` in ``cwd``."""
    chosen = url or environ.get("OPTUNA_STORAGE") or "sqlite:///dsm_tune.db"
    prefix = "sqlite:///"
    if chosen.startswith(prefix) and not chosen.startswith(prefix + "/"):
        return prefix + os.path.abspath(cwd / chosen.removeprefix(prefix))
    return chosen


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 32:
        raise ConfigError(f"{_option(name)} must be an integer >= {low}, but got {value!r:.60}")


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ConfigError(
            f"{_option(name)} must be one of {', '.join(accepted)}, but got {value!r:.60}"
        )
