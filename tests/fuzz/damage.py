"""Hostile inputs: values of any kind, documents with something changed, bytes that were damaged."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

__all__ = ["damaged", "json_text", "mutated", "toml_text", "with_bytes"]

NASTY = (
    "", " ", "\0", "\n", "../../outside", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/",
    "$(touch outside)", "`touch outside`", "__class__", "a" * 5000, "é", "\u202e", "١٢", "nan",
    "%s%n", "hf-hub:x/y", "dsm_tune_demo", "-1", "1e999", "60%",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 7, 1 << 31, 1 << 63, -(1 << 63), 10**30, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324,
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-300, 300),
    st.floats(),
    st.sampled_from(NASTY),
    st.text(max_size=12),
)


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


INNER = st.recursive(
    SCALARS,
    lambda one: st.one_of(
        st.lists(one, max_size=4), st.dictionaries(st.text(max_size=8), one, max_size=4)
    ),
    max_leaves=6,
)
# Anything that JSON can say, and numbers that it cannot; now and then nested deep.
VALUES = st.one_of(SCALARS, SCALARS, SCALARS, INNER, st.integers(1, 600).map(nested))
KEYS = st.sampled_from(NASTY) | st.text(max_size=8)
KINDS = st.sampled_from(("replace", "replace", "remove", "add", "double", "swap"))
COUNTS = st.sampled_from((1, 3, 300))


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """A document with up to four values replaced, removed, doubled or added, at any depth."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 4))):
        there = places(found) or [([None], 0)]
        where, key = there[draw(st.integers(0, len(there) - 1))]
        what = draw(KINDS)
        if what == "remove":
            del where[key]
        elif what == "add" and isinstance(where, dict):
            where[draw(KEYS)] = draw(VALUES)
        elif what in ("add", "double") and isinstance(where, list):
            where[key:key] = [copy.deepcopy(where[key])] * draw(COUNTS)
        elif what == "swap":
            other, at = there[draw(st.integers(0, len(there) - 1))]
            where[key] = copy.deepcopy(other[at])
        else:
            where[key] = draw(VALUES)
    return found


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found = []
    waiting = [document]
    while waiting and len(found) < 3000:
        one = waiting.pop()
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys if isinstance(one[key], (dict, list))]
    return found


def json_text(document: Any) -> str:
    """As JSON; numbers that are none stay what Python writes for them."""
    return json.dumps(document, default=str)


def toml_text(document: Any) -> str:
    """As TOML, tables inline; what TOML has no word for is left out."""
    if not isinstance(document, dict):
        return f"value = {toml_value(document)}"
    return "".join(f"{toml_key(k)} = {toml_value(v)}\n" for k, v in document.items())


def toml_key(key: Any) -> str:
    return json.dumps(str(key)).replace("\\ud", "\\uD").replace("\x7f", "\\u007f")


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return '""' if value is None else toml_key(value)


LENGTHS = st.sampled_from((1, 2, 8, 64))
DAMAGES = st.sampled_from(("flip", "set", "cut", "drop", "put", "repeat", "swap"))
FILLS = st.sampled_from((b"\0", b"\xff", b"\x80"))
PIECES = st.binary(max_size=16) | st.sampled_from([one.encode() for one in NASTY])


@st.composite
def damaged(draw: st.DrawFn, contents: Sequence[bytes]) -> bytes:
    """One of some contents with up to four pieces flipped, cut, dropped, repeated or put in."""
    found = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(found)))
        length = draw(LENGTHS)
        what = draw(DAMAGES)
        if what == "flip" and at < len(found):
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "set":
            found[at : at + length] = draw(FILLS) * length
        elif what == "cut":
            del found[at:]
        elif what == "drop":
            del found[at : at + length]
        elif what == "put":
            found[at:at] = draw(PIECES)
        elif what == "repeat":
            found[at:at] = found[at : at + length] * draw(COUNTS)
        else:
            other = draw(st.sampled_from(contents))
            found[at : at + length] = other[at : at + length]
    return bytes(found)


def with_bytes(contents: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Damaged contents, and bytes that never were anything."""
    return st.one_of(damaged(contents), damaged(contents), st.binary(max_size=200))
