"""Every error a user can cause, in one tree.

    DsmTuneError
    ├── PlanError      a merge plan that breaks a rule, or does not fit the model
    ├── ModelError     a model or checkpoint that cannot be used
    ├── ImagesError    an image folder or label file that cannot be used
    ├── BudgetError    a budget that is absent, malformed or out of range
    ├── SpaceError     a search-space file that breaks a rule
    ├── ProfileError   a device profile that is malformed or made for something else
    ├── BundleError    an exported bundle that is damaged, foreign or of a newer format
    ├── ConfigError    an option or configuration value
    └── StudyError     a study or its storage that cannot be used

A message is one line: the rule, then the value, then where, then what is accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "BundleError",
    "ConfigError",
    "DsmTuneError",
    "ImagesError",
    "ModelError",
    "PlanError",
    "ProfileError",
    "SpaceError",
    "StudyError",
    "first_line",
    "nearest",
    "shown",
]


class DsmTuneError(Exception):
    """Base of all errors that have their cause in the input; the command line exits with 2."""


class PlanError(DsmTuneError, ValueError):
    """A merge plan breaks a rule or does not fit the model."""


class ModelError(DsmTuneError, ValueError):
    """A model or checkpoint cannot be used."""


class ImagesError(DsmTuneError, ValueError):
    """An image folder or label file cannot be used."""


class BudgetError(DsmTuneError, ValueError):
    """A budget is absent, malformed or out of range."""


class SpaceError(DsmTuneError, ValueError):
    """A search-space file breaks a rule."""


class ProfileError(DsmTuneError, ValueError):
    """A device profile is malformed or was made for another device, model, dtype or batch size."""


class BundleError(DsmTuneError, ValueError):
    """An exported bundle is damaged, foreign or of a newer format."""


class ConfigError(DsmTuneError, ValueError):
    """An option or configuration value cannot be used."""


class StudyError(DsmTuneError, ValueError):
    """A study or its storage cannot be used."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Return what a foreign exception says, as part of a line of ours: its first line, cut."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def nearest(word: str, accepted: Iterable[str], count: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the closest accepted words, or ``""``."""
    close = difflib.get_close_matches(word, list(accepted), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def shown(value: object, most: int = 60) -> str:
    """Return a value as an error message shows it: its ``repr``, cut, or what stands for that."""
    try:
        return f"{value!r:.{most}}"
    except (RecursionError, ValueError):  # nested too deep, or an integer of too many digits
        return f"a {type(value).__name__} too large to print"
