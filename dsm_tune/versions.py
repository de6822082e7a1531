"""Which versions are here: of dsm-tune, and of what decides its figures."""

from __future__ import annotations

import platform
import tomllib
from importlib import metadata
from pathlib import Path

__all__ = ["project", "version", "versions"]

LIBRARIES = ("torch", "timm", "optuna", "ray", "mlflow", "numpy", "onnxruntime")


def version() -> str:
    """The version of dsm-tune."""
    try:
        return metadata.version("dsm-tune")
    except metadata.PackageNotFoundError:
        return str(project().get("version", "unknown"))


def versions() -> dict[str, str]:
    """What decides figures beside the configuration: versions by name."""
    found = {"dsm-tune": version(), "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def project() -> dict[str, object]:
    """``[project]`` of a checkout that is used without being installed; empty if there is none."""
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
