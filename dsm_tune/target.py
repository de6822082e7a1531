"""The device that a budget is about: what it is, its profile, and plans timed on it alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dsm_tune.config import TuneConfig
from dsm_tune.errors import ConfigError
from dsm_tune.inputs import Inputs, load_model
from dsm_tune.measuring.confirm import (
    Confirmed,
    Target,
    confirm_latency,
    device_of,
    profile_target,
)
from dsm_tune.measuring.profiling import describe_device
from dsm_tune.merging.backbone import image_size, read_geometry
from dsm_tune.plan import FEATURES, Geometry, Matching, MergePlan
from dsm_tune.profile import DeviceProfile, fingerprint_of
from dsm_tune.results import LatencyMs
from dsm_tune.runtimes.onnx.files import need_packages
from dsm_tune.searching.crew import Cluster, run_alone, timing_node

__all__ = ["TargetDevice", "measure_device", "predict_latency", "present"]


class TargetDevice:
    """What a configuration names as its target.

    Args:
        config: names device, dtype, threads, batch size, runtime, and a profile if there is one.

    Raises:
        ConfigError: if the device is not there.
        ProfileError: if the given profile cannot be read.
    """

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self.device = present(device_of(config.device))
        self.threads = config.threads or os.cpu_count() or 1
        self._node = ""  # of a cluster, where plans are timed
        file = config.device_profile
        self.given = None if file is None else DeviceProfile.load(file)
        if self.given is None:
            _check_runtime(config, self.device)

    def check(self, geometry: Geometry) -> None:
        """Refuse a given profile that was made for something else."""
        if self.given is not None:
            asked = self.config
            self.given.check(geometry, asked.dtype, asked.batch_size, asked.runtime)

    @property
    def is_elsewhere(self) -> bool:
        """Whether a profile was given that was made on another device than this one has."""
        if self.given is None:
            return False
        here = describe_device(torch.device(self.device))
        return any(self.given.device.get(key) != here.get(key) for key in ("name", "machine"))

    def facts(self, profile: DeviceProfile | None) -> dict[str, str]:
        """Name and fingerprint of the target."""
        if profile is not None:
            return {"name": str(profile.device.get("name")), "fingerprint": profile.fingerprint}
        found = describe_device(torch.device(self.device), self.config.runtime)
        found["threads"] = self.threads
        return {"name": str(found["name"]), "fingerprint": fingerprint_of(found)}

    def profile(self, inputs: Inputs, features: Sequence[str], cluster: Cluster) -> DeviceProfile:
        """Measure a profile in a process of its own."""
        matchings = [Matching(feature=name) for name in features]
        seconds = _patience(inputs.geometry)
        found: DeviceProfile = self._alone(
            cluster, partial(profile_target, seconds=seconds), self._served(inputs), matchings
        )
        return found

    def confirm_seconds(self, geometry: Geometry) -> float:
        """Time limit of :meth:`confirm`."""
        return 4 * _patience(geometry)

    def confirm(
        self, inputs: Inputs, plans: Sequence[MergePlan], cluster: Cluster
    ) -> tuple[dict[str, object], list[Confirmed]]:
        """Time plans in a process of their own, in turn; the first is the dense one."""
        seconds = self.confirm_seconds(inputs.geometry)
        timed = partial(confirm_latency, stat=self.config.latency_stat, seconds=seconds)
        found: tuple[dict[str, object], list[Confirmed]] = self._alone(
            cluster, timed, self._served(inputs), plans
        )
        return found

    def _served(self, inputs: Inputs) -> Target:
        every = torch.cat([inputs.search.pixels, inputs.holdout.pixels])
        batch = every[torch.arange(self.config.batch_size) % len(every)]
        config = self.config
        return Target(inputs.model, batch, self.device, config.dtype, self.threads, config.runtime)

    def _alone(self, cluster: Cluster, call: Callable[..., Any], *arguments: Any) -> Any:
        # On this machine the crew holds the GPUs, and waits while something is timed.
        gpus = float(self.device.startswith("cuda") and cluster.address is not None)
        self._node, most = timing_node(gpus, self._node) or ("", cluster.workers)
        cpus = min(self.threads, most)  # more would never come
        return run_alone(
            call, *arguments, cpus=cpus, gpus=gpus, node=self._node, on_death=cluster.on_death
        )


def predict_latency(profile: DeviceProfile, plans: Sequence[MergePlan]) -> list[Confirmed]:
    """What stands for a measurement on a device that is not here.

    Args:
        profile: of that device.
        plans: the first is the dense one.

    Returns:
        Nothing but predictions; the upper end of the ratio to dense is the profile's error above.
    """
    dense, *_ = found = [profile.predict(plan) for plan in plans]
    return [Confirmed(LatencyMs(predicted=ms), ms / dense * (1 + profile.error)) for ms in found]


def measure_device(config: TuneConfig, say: Callable[[str], None]) -> DeviceProfile:
    """Measure the device profile of a configuration's model, device, dtype and batch size."""
    device = present(device_of(config.device))
    _check_runtime(config, device)
    model = load_model(config)
    geometry = read_geometry(model)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(config.batch_size, 3, *image_size(model), generator=generator)
    threads = config.threads or os.cpu_count() or 1
    target = Target(model, pixels, device, config.dtype, threads, config.runtime)
    say(f"timing the parts of {config.model_name} on {device} at batch size {config.batch_size}")
    matchings = [Matching(feature=name) for name in FEATURES]
    return profile_target(target, matchings, seconds=2 * _patience(geometry))


def present(device: str) -> str:
    """Refuse a device that is not there, and return its name.

    Raises:
        ConfigError: naming those that are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device.removeprefix("cuda").lstrip(":") or 0) >= count:
        raise ConfigError(
            f"--device must be present, but got {device}; accepted are "
            f"{', '.join(['auto', 'cpu', *(f'cuda:{i}' for i in range(count))])}"
        )
    return device


def _check_runtime(config: TuneConfig, device: str) -> None:
    """Refuse a runtime that a device, or this installation, does not have."""
    on_cuda = device.startswith("cuda")
    if config.runtime == "cudagraphs" and not on_cuda:
        raise ConfigError(
            f"--runtime must be one that {device} has, but got cudagraphs; accepted are eager, onnx"
        )
    if config.runtime != "onnx":
        return
    if on_cuda or config.dtype != "float32":
        raise ConfigError(
            f"--runtime onnx must run in float32 on the CPU, but got {config.dtype} on {device}"
        )
    need_packages("--runtime onnx")


def _patience(geometry: Geometry) -> float:
    """Seconds for one kind of timing: more for a model whose forwards are long."""
    gmacs = MergePlan("", geometry).gmacs
    return 3.0 if gmacs < 0.5 else 10.0
