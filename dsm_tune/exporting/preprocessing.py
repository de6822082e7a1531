"""The transform of a bundle as numbers, read as strictly as anything that comes from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dsm_tune.errors import BundleError, shown

__all__ = ["FIELDS", "read_preprocessing"]

LARGEST_SIDE = 8192  # pixels


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) < 1e6  # which is false for what is not finite


def _is_size(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3 or value[0] != 3:
        return False
    return all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in value[1:])


def _is_mean(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_std(value: Any) -> bool:
    return _is_mean(value) and all(one > 1e-6 for one in value)


# Each number of the transform, whether a value is one, and what is accepted.
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (_is_size, f"[3, height, width] in pixels, {LARGEST_SIDE} at most"),
    "interpolation": (
        lambda value: value in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
        "nearest, bilinear, bicubic, lanczos, box or hamming",
    ),
    "mean": (_is_mean, "three numbers"),
    "std": (_is_std, "three numbers > 0"),
    "crop_pct": (lambda value: _is_number(value) and 0.05 <= value <= 8, "from 0.05 to 8"),
    "crop_mode": (
        lambda value: value in ("center", "squash", "border"),
        "center, squash or border",
    ),
}


def read_preprocessing(content: bytes) -> dict[str, Any]:
    """Read ``preprocess.json``.

    Args:
        content: of the file.

    Returns:
        Input size, interpolation, mean, std, share and mode of the crop, as timm names them.

    Raises:
        BundleError: for anything else.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict) or body.keys() != FIELDS.keys():
        raise BundleError(
            f"preprocess.json must be a JSON object of {', '.join(FIELDS)}, but got {shown(body)}"
        )
    for name, (accepts, accepted) in FIELDS.items():
        value = body[name]
        if not accepts(value):
            raise BundleError(f"preprocess.json: {name} must be {accepted}, but got {shown(value)}")
    return body
