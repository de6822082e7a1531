"""A transform of a file is one that can be run, or refused by the number that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsm_tune.demo import create_model
from dsm_tune.errors import BundleError
from dsm_tune.exporting.bundle import preprocessing_of
from dsm_tune.exporting.preprocessing import read_preprocessing

WHOLE = json.loads(json.dumps(preprocessing_of(create_model())))


def test_what_an_export_writes_is_read_as_it_is() -> None:
    assert read_preprocessing(json.dumps(WHOLE).encode()) == WHOLE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_size", [3, 0, 28]),
        ("input_size", [3, 28, 10**9]),
        ("input_size", [1, 28, 28]),
        ("input_size", [3, 28.0, 28]),
        ("input_size", [3, True, 28]),
        ("input_size", []),
        ("input_size", 28),
        ("interpolation", "random"),
        ("interpolation", ["bicubic"]),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, "0.5"]),
        ("mean", [0.5, 0.5, float("nan")]),
        ("mean", [0.5, 0.5, 10**400]),
        ("std", [0.5, 0.5, 0]),
        ("std", [0.5, 0.5, float("inf")]),
        ("crop_pct", 0),
        ("crop_pct", None),
        ("crop_pct", True),
        ("crop_mode", "../../center"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(
        BundleError, match=rf"preprocess.json: {name} must be .*, but got "
    ) as caught:
        read_preprocessing(json.dumps({**WHOLE, name: value}).encode())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"[" * 9999, b'{"mean": 1}', json.dumps({**WHOLE, "x": 1}).encode()],
)
def test_what_is_no_transform_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"preprocess.json must be a JSON object of input_size"):
        read_preprocessing(content)
