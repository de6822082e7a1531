"""The halves of a block on a CPU, each as one compiled loop that several threads run at once.

A thread takes some tokens from the norm to the end of an MLP, a panel at a time, so that what is
between stays in its caches; in the attention half it waits for the others twice, as every token
attends to all. What becomes of a token does not depend on who does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from dsm_tune.merging.loops import attention
from dsm_tune.merging.loops.lanes import ACROSS, DOWN, REGISTER, add_products, gelu
from dsm_tune.merging.loops.machine import (
    address_of,
    exact,
    floats,
    loop,
    part,
    share_of,
    wait_for_all,
)

__all__ = [
    "ATTENTION_HALF",
    "EVERY",
    "GELU",
    "LEAST_SIDE",
    "MLP_HALF",
    "RELU",
    "attention_half",
    "mlp_half",
    "prefix_half",
]

EVERY = REGISTER  # widths that a loop can do are multiples of it
LEAST_SIDE = attention.LEAST_SIDE  # tokens that there must be, and numbers of a head

PANEL = 128  # tokens at a time, at most: their hidden numbers are to stay in the second cache
DEEP = 384  # products that are summed before they are added to memory, at most
NEAR = 36_000  # bytes of weights that are to stay in the first cache
GELU, RELU = 0, 1  # activations; GELU is the one by erf
LINE = 64  # bytes; a register that crosses the line between two of a cache takes two reads

# What the loops are given, in order: the scale and epsilon in float64, all else in int64.
NORM = ("x", "rows", "channels", "norm_weight", "norm_bias", "epsilon")  # x, out: [rows, channels]
ATTENTION_HALF = (
    *NORM,
    *attention.GIVEN,
    *("qkv", "qkv_weight", "qkv_bias"),  # addresses of what is filled in; of [3C, C]; of [3C], or 0
    *("output_weight", "output_bias", "gain", "out"),  # of [C, C]; of [C], or 0 (two)
)
MLP_HALF = (
    *NORM,
    *("hidden", "activation", "hidden_weight", "hidden_bias"),
    *("output_weight", "output_bias", "gain", "out"),
)


@part
def _row(address: Any, row: Any, width: Any) -> Any:
    """A row of [rows, width]."""
    return carray(floats(address + 4 * row * width), (width,))


@exact
def _linear(x: Any, rows: Any, depth: Any, weight: Any, bias: Any, width: Any, out: Any) -> None:
    """Fill in [rows, width]: [rows, depth] times the transpose of [width, depth], and [width]."""
    for i in range(rows):
        row, more = _row(out, i, width), _row(bias, 0, width if bias else 0)
        for c in range(width):
            row[c] = more[c] if bias else np.float32(0.0)
    parts = -(depth // -DEEP)
    several = -(depth // -(parts * REGISTER)) * REGISTER
    for start in range(0, depth, several):
        deep = min(several, depth - start)
        block = max(NEAR // (4 * deep) // ACROSS, 1) * ACROSS
        for first in range(0, width, block):
            last = min(first + block, width)
            for i in range(0, rows, DOWN):
                for o in range(first, last, ACROSS):
                    add_products(
                        min(DOWN, rows - i), x + 4 * (i * depth + start), 4 * depth,
                        weight + 4 * (o * depth + start), 4 * depth, deep,
                        out + 4 * (i * width + o), 4 * width,
                    )  # fmt: skip


@exact
def _activate(kind: Any, numbers: Any, several: Any) -> None:
    """Apply an activation to so many numbers from an address on."""
    if kind == GELU:
        gelu(numbers, several)
        return
    row, zero = _row(numbers, 0, several), np.float32(0.0)
    for c in range(several):
        row[c] = zero if row[c] < zero else row[c]  # a number that is none stays


@part
def _buffer(several: Any) -> Any:
    """Room for so many numbers from the first line on."""
    return np.empty(several + LINE // 4, np.float32)


@part
def _first_line(buffer: Any) -> Any:
    """The address of the first number of a buffer that begins a line."""
    return -(address_of(buffer) // -LINE) * LINE


@part
def _normalise(given: Any, first: Any, rows: Any, out: Any) -> None:
    """As torch's ``layer_norm``, of some rows of x: fill in [rows, C]."""
    width = given.channels
    weight, bias = _row(given.norm_weight, 0, width), _row(given.norm_bias, 0, width)
    share, epsilon = np.float32(1.0) / np.float32(width), np.float32(given.epsilon)
    for i in range(rows):
        one, into = _row(given.x, first + i, width), _row(out, i, width)
        mean, spread = np.float32(0.0), np.float32(0.0)
        for c in range(width):
            mean += one[c]
        mean *= share
        for c in range(width):
            spread += (one[c] - mean) ** 2
        scale = np.float32(1.0) / np.sqrt(spread * share + epsilon)
        for c in range(width):
            into[c] = (one[c] - mean) * scale * weight[c] + bias[c]


@part
def _add_to_x(given: Any, first: Any, rows: Any) -> None:
    """Of some rows of what is filled in: x and as much as it tells, times the gain if any."""
    for i in range(first, first + rows):
        _add_row(given, i, i)


@part
def _add_row(given: Any, row: Any, of_x: Any) -> None:
    width, one = given.channels, np.float32(1.0)
    gain = _row(given.gain, 0, width if given.gain else 0)
    into, before = _row(given.out, row, width), _row(given.x, of_x, width)
    for c in range(width):
        into[c] = before[c] + into[c] * (gain[c] if given.gain else one)


@part
def _own_rows(given: Any) -> Any:
    """The first row of a thread's own, the one behind the last, and how many make a panel."""
    first, last = share_of(given, -(given.rows // -DOWN))
    first, last = first * DOWN, min(last * DOWN, given.rows)
    several = max(last - first, 1)
    panels = -(several // -PANEL)
    return first, last, -(several // -(panels * DOWN)) * DOWN


@part
def _project(given: Any, buffer: Any, weight: Any, bias: Any, width: Any, out: Any) -> None:
    """A linear layer of a thread's own rows of x, normalised: fill in [rows, width]."""
    first, last, panel = _own_rows(given)
    for i in range(first, last, panel):
        rows, normed = min(panel, last - i), _first_line(buffer)
        _normalise(given, i, rows, normed)
        _linear(normed, rows, given.channels, weight, bias, width, out + 4 * i * width)


@part
def _mix(given: Any, first: Any, rows: Any) -> None:
    """The output layer of some rows of what attention gave: fill in [rows, C]."""
    width, at = given.channels, 4 * first * given.channels
    mixed, out = given.result + at, given.out + at
    _linear(mixed, rows, width, given.output_weight, given.output_bias, width, out)


@loop(ATTENTION_HALF, ("scale", "epsilon"))
def attention_half(given: Any) -> None:
    """The attention half of a block.

    Args:
        given: all of :data:`ATTENTION_HALF`.
    """
    one = carray(given, 1)[0]
    width, (first, last, panel) = one.channels, _own_rows(one)
    buffer = _buffer(panel * width)
    _project(one, buffer, one.qkv_weight, one.qkv_bias, 3 * width, one.qkv)
    wait_for_all(one)
    attention.attend_share(one)
    wait_for_all(one)
    for i in range(first, last, panel):
        rows = min(panel, last - i)
        _mix(one, i, rows)
        _add_to_x(one, i, rows)


@part
def _row_of_prefix(given: Any, i: Any) -> Any:
    """Where in x the i-th of the prefix tokens of all images is."""
    return i // given.queries * given.keys + i % given.queries


@loop(ATTENTION_HALF, ("scale", "epsilon"))
def prefix_half(given: Any) -> None:
    """The attention half of a block for its prefix tokens alone.

    Args:
        given: all of :data:`ATTENTION_HALF`; queries, [B, p, C], and behind each other the key and
            the value of each token, [B, N, 2, C], are filled in; so are results and ``out``,
            [B, p, C].
    """
    one = carray(given, 1)[0]
    width, panel = one.channels, _own_rows(one)[2]
    buffer = _buffer(panel * width)
    weight, bias = one.qkv_weight + 4 * width * width, one.qkv_bias + 4 * width
    _project(one, buffer, weight, bias if one.qkv_bias else 0, 2 * width, one.key)
    first, last = share_of(one, one.images * one.queries)
    for i in range(first, last, panel):
        rows, normed = min(panel, last - i), _first_line(buffer)
        for j in range(rows):
            _normalise(one, _row_of_prefix(one, i + j), 1, normed + 4 * j * width)
        query = one.query + 4 * i * width
        _linear(normed, rows, width, one.qkv_weight, one.qkv_bias, width, query)
    wait_for_all(one)
    attention.attend_share(one)
    wait_for_all(one)
    for i in range(first, last, panel):
        rows = min(panel, last - i)
        _mix(one, i, rows)
        for j in range(i, i + rows):
            _add_row(one, j, _row_of_prefix(one, j))


@loop(MLP_HALF, ("epsilon",))
def mlp_half(given: Any) -> None:
    """The MLP half of a block.

    Args:
        given: all of :data:`MLP_HALF`.
    """
    one = carray(given, 1)[0]
    width, hidden, (first, last, panel) = one.channels, one.hidden, _own_rows(one)
    buffers = _buffer(panel * width), _buffer(panel * hidden)
    for i in range(first, last, panel):
        rows, out = min(panel, last - i), one.out + 4 * i * width
        normed, inner = _first_line(buffers[0]), _first_line(buffers[1])
        _normalise(one, i, rows, normed)
        _linear(normed, rows, width, one.hidden_weight, one.hidden_bias, hidden, inner)
        _activate(one.activation, inner, rows * hidden)
        _linear(inner, rows, hidden, one.output_weight, one.output_bias, width, out)
        _add_to_x(one, i, rows)
