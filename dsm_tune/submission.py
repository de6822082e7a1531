"""``dsm-tune submit``: the same tune as a job of a Ray cluster, which goes on without its client.

What is written on the command line goes to the cluster; what is in this machine's environment stays
here, and the job has the environment of the cluster's nodes. Ray keeps a job's command and its
``runtime_env`` in clear, so neither carries a password: those are in the nodes' environment.

The driver of the job alone reads images and weights; Ray's object store takes them to the workers.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from urllib.parse import urlsplit

from dsm_tune.config import TuneConfig
from dsm_tune.errors import ConfigError
from dsm_tune.reviewing.stores import redact

__all__ = ["check", "dashboard_address", "entrypoint", "readable_storage", "warnings"]

FILES = ("checkpoint", "images", "device_profile")
STORES = {"storage": "OPTUNA_STORAGE", "tracking_uri": "MLFLOW_TRACKING_URI"}
SQLITE = "sqlite:///"
SECRET = re.compile(r"(?i)[?&;][^=&;]*(password|passwd|token|secret|key|credential)[^=&;]*=")


def dashboard_address(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the address of the cluster's dashboard, which has the job server.

    Args:
        given: ``--ray-address``; else ``RAY_API_SERVER_ADDRESS``, else ``RAY_ADDRESS``.
        environ: the environment.

    Raises:
        ConfigError: if there is none, or it is that of something else.
    """
    found = given or environ.get("RAY_API_SERVER_ADDRESS") or environ.get("RAY_ADDRESS")
    if not found or not re.fullmatch(r"https?://[^\s/@?#]+/?", found):
        raise ConfigError(
            "--ray-address must be the address of a cluster's dashboard, such as "
            f"http://127.0.0.1:8265, but got {redact(str(found))!r:.80}"
        )
    return found.rstrip("/")


def check(config: TuneConfig) -> None:
    """Refuse what would mean something else on the cluster, and what must not be written there.

    Args:
        config: as it was given, not made absolute.

    Raises:
        ConfigError: for a relative path, for a store with a password in its address.
    """
    paths = {name: getattr(config, name) for name in FILES}
    if config.search_space.endswith(".toml"):
        paths["search_space"] = config.search_space
    for name, path in paths.items():
        if path is not None and not os.path.isabs(path):
            raise ConfigError(
                f"{_option(name)} must be an absolute path on the cluster, where the job runs, "
                f"but got {path!r:.120}"
            )
    for name, variable in STORES.items():
        url = getattr(config, name)
        if url is None:
            continue
        if url.startswith(SQLITE) and not url.startswith(SQLITE + "/"):
            raise ConfigError(
                f"{_option(name)} must be a server, or {SQLITE}/PATH in a folder that the cluster "
                f"shares, but got {url!r:.120}"
            )
        if _has_secret(url):
            raise ConfigError(
                f"{_option(name)} must hold no password where a job takes it along, which Ray "
                f"keeps in clear, but got {redact(url)!r:.120}; accepted are {variable} in the "
                "environment of the cluster's nodes, or PGPASSWORD there"
            )


def warnings(config: TuneConfig, address: str) -> list[str]:
    """What may be out of reach: of the cluster's nodes, or of this machine at the end."""
    said = []
    is_far = not _is_loopback(address)
    for name in STORES:
        url = getattr(config, name) or ""
        if url.startswith("sqlite") and is_far:
            said.append(
                f"{_option(name)} is a file: the node where the job runs and this machine must "
                f"share {url.partition('///')[2]}"
            )
        elif "://" in url and _is_loopback(url) and is_far:
            said.append(f"{_option(name)} names this machine: on the cluster it is another one")
    return said


def entrypoint(config: TuneConfig) -> str:
    """The line that the job's shell runs: this tune, in stores that the cluster reaches."""
    named = [name for name in STORES if getattr(config, name) is not None]
    words = ["python", "-m", "dsm_tune", "tune", *config.words(named)]
    if config.study is None:
        words += ["--study", config.study_name]
    needed = [
        f': "${{{variable}:?must be set where the job runs, or {_option(name)} be given}}"'
        for name, variable in STORES.items()
        if name not in named
    ]
    return " && ".join([*needed, f"exec {shlex.join(words)}"])


def readable_storage(config: TuneConfig, environ: Mapping[str, str] = os.environ) -> str | None:
    """The study's store as this machine reaches it, if it was told."""
    return config.storage or environ.get("OPTUNA_STORAGE") or None


def _has_secret(url: str) -> bool:
    try:
        return urlsplit(url).password is not None or SECRET.search(url) is not None
    except ValueError:  # no address at all: the job will say so
        return True


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return host in ("localhost", "::1") or host.startswith("127.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
