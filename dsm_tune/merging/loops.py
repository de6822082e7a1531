"""Matching and merging on a CPU as one compiled loop, which several threads may run at once.

It does exactly what the tensor functions do that it names, which are its oracle in the tests; sums
may differ by rounding. Threads are given one record; each does as many images, those that are next
to each other, like torch's own operators, so that it finds in its caches what it wrote before. What
becomes of an image does not depend on who does it. An array of no elements stands for ``None``.
numba keeps the machine code beside this file, or in the user's cache folder, so that it is made
once per machine; whether it is stale it sees by this file alone, which is why all is here.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from dsm_tune.merging.matching import PLACE_TOLERANCE
from dsm_tune.merging.scores import LEAST_SHARE

__all__ = ["FACTORS", "GIVEN", "NORMS", "step"]

NORMS = {"free": 0, "mean": 1, "largest": 2}
FOUR, REGISTER = 4, 16  # even tokens multiplied at once; float32 numbers in the widest register
TOLERANCE, LEAST = np.float32(PLACE_TOLERANCE), np.float32(LEAST_SHARE)
WIDE = {"contract", "reassoc", "nsz"}  # what lets sums use wide registers
part = njit(nogil=True, fastmath=WIDE)  # of the loop; compiled with it
machine_code: Callable[[Callable[..., Any]], Any] = intrinsic  # likewise; says how to make it

# What the loop is given, in order, each of 8 bytes: these in float64, all others in int64.
FACTORS = ("size_penalty", "salience", "attention_weight", "scale", "mlp_norm_epsilon")
GIVEN = (
    *("team_size", "thread_number"),  # addresses of what tells them; 0 for one thread
    *("images", "tokens", "channels"),
    *("heads", "width", "to_image", "to_head", "to_token"),  # of the feature, and how far it is to
    *("key_heads", "key_width", "key_to_image", "key_to_head", "key_to_token"),  # the next one
    *("evens", "odds", "r", "prefix", "first_even", "first_odd"),
    *("window", "equal_quota", "norm", "centroid", *FACTORS),
    # Addresses, 0 for none; of what the last seven name, it is filled in.
    *("feature", "query", "key", "log_size", "received", "x", "size", "place"),
    *("mlp_norm_weight", "mlp_norm_bias"),  # [C] each
    *("new_x", "new_size", "new_log_size", "new_place", "normed", "order", "destination"),
)
NUMBERS: Any = types.CPointer  # of a kind
RECORD = types.Record.make_c_struct(
    [(name, types.float64 if name in FACTORS else types.int64) for name in GIVEN]
)


def _compiled(function: Callable[[Any], None]) -> Any:
    """Compile what threads call; keep the code, if there is a place to."""
    compiled = functools.partial(cfunc, types.void(NUMBERS(RECORD)), fastmath=WIDE)
    try:
        return compiled(cache=True)(function)
    except (OSError, RuntimeError):  # a full disk; numba's, where no folder can be written
        return compiled()(function)


@machine_code
def _call(typing: Any, address: Any) -> Any:
    """The int that the function at an address returns; it is given nothing."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(given[0], kind.as_pointer()), [])

    return types.int32(types.int64), code


def _at(kind: Any) -> Any:
    """Of an address, a pointer to numbers of a kind."""

    @machine_code
    def pointer(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

        return NUMBERS(kind)(types.int64), code

    return pointer


_floats, _integers = _at(types.float32), _at(types.int64)


@part
def _of(image: Any, address: Any, shape: Any) -> Any:
    """The float32 numbers of an image, of as many for each at an address; none at 0."""
    several = 4 * image
    for size in shape:
        several *= size
    return carray(_floats(address + several), shape if address else (0, *shape[1:]))


@part
def _heads_of(
    image: Any, address: Any, heads: Any, tokens: Any, width: Any,
    to_image: Any, to_head: Any, to_token: Any,
) -> Any:  # fmt: skip
    """The memory in which the rows of d of an image are, of [B, H, N, d] at an address."""
    last = (heads - 1) * to_head + (tokens - 1) * to_token + width
    return carray(_floats(address + 4 * image * to_image), (last,))


@part
def _product(one: Any, other: Any) -> Any:
    """Of two rows [c]."""
    total = np.float32(0.0)
    for c in range(one.shape[0]):
        total += one[c] * other[c]
    return total


@part
def _length(row: Any) -> Any:
    return np.sqrt(_product(row, row))


@part
def _unit_mean(memory: Any, at: Any, to_head: Any, heads: Any, unit: Any) -> None:
    """As ``matching.unit`` of the mean over heads, of one token: fill in [d]."""
    width = unit.shape[0]
    first = memory[at : at + width]
    for c in range(width):
        unit[c] = first[c]
    for h in range(1, heads):
        row = memory[at + h * to_head : at + h * to_head + width]
        for c in range(width):
            unit[c] += row[c]
    scale = np.float32(1.0) / max(_length(unit), np.float32(1e-6) * np.float32(heads))
    for c in range(width):
        unit[c] *= scale


@part
def _odd_columns(feature: Any, given: Any) -> Any:
    """Unit means of the odd tokens as columns, [d, b], with zeros behind them for whole steps."""
    width, odds = given.width, given.odds
    deep, wide = -(width // -FOUR) * FOUR, -(odds // -REGISTER) * REGISTER
    columns, one = np.zeros((deep, wide), np.float32), np.empty(width, np.float32)
    for b in range(odds):
        at = (given.first_odd + 2 * b) * given.to_token
        _unit_mean(feature, at, given.to_head, given.heads, one)
        for d in range(width):
            columns[d, b] = one[d]
    return columns


@part
def _products(rows: Any, columns: Any, found: Any) -> None:
    """Fill in the products [4, b] of four rows [4, d] with the columns of [d, b]; d by fours.

    Sixteen multiply-adds for four numbers that are read: one by one, reading is what takes long.
    """
    found[:] = 0.0
    w, x, y, z = found[0], found[1], found[2], found[3]
    for d in range(0, columns.shape[0], 4):
        first, second, third, fourth = columns[d], columns[d + 1], columns[d + 2], columns[d + 3]
        # Read here, since for all that the compiler knows the loop writes to them.
        w0, w1, w2, w3 = rows[0, d], rows[0, d + 1], rows[0, d + 2], rows[0, d + 3]
        x0, x1, x2, x3 = rows[1, d], rows[1, d + 1], rows[1, d + 2], rows[1, d + 3]
        y0, y1, y2, y3 = rows[2, d], rows[2, d + 1], rows[2, d + 2], rows[2, d + 3]
        z0, z1, z2, z3 = rows[3, d], rows[3, d + 1], rows[3, d + 2], rows[3, d + 3]
        for b in range(columns.shape[1]):
            i, j, k, m = first[b], second[b], third[b], fourth[b]
            w[b] += w0 * i + w1 * j + w2 * k + w3 * m
            x[b] += x0 * i + x1 * j + x2 * k + x3 * m
            y[b] += y0 * i + y1 * j + y2 * k + y3 * m
            z[b] += z0 * i + z1 * j + z2 * k + z3 * m


@njit(nogil=True, fastmath={*WIDE, "nnan"})
def _largest(row: Any) -> Any:
    """The largest of [b], and the first place where it stands."""
    best, odds = row[0], row.shape[0]
    for b in range(1, odds):
        best = max(best, row[b])
    at = odds
    for b in range(odds):
        at = min(at, b if row[b] == best else odds)
    return best, min(at, odds - 1)  # of numbers that are none, too


@njit(nogil=True, fastmath=False)  # where nothing is said, it would be the caller's
def _rounded(one: Any, other: Any) -> Any:
    """A product, rounded before it is added to anything: numbers tie as in the tensor functions."""
    return one * other


@part
def _largest_inside(row: Any, tile: Any, tiles: Any) -> Any:
    """The largest of [b] within a tile, and the first place where it stands, or -1."""
    best, at = np.float32(0.0), -1
    for b in range(row.shape[0]):
        if tiles[b] == tile and (at < 0 or row[b] > best):
            best, at = row[b], b
    return best, at


@part
def _in_rounds(ranked: Any, tiles: Any, crosses: Any, equal_quota: Any) -> Any:
    """Edges [a] in rounds of one per tile, or as they are; crossing ones last."""
    evens = ranked.shape[0]
    turn, turned, at = np.zeros(evens, np.int64), np.empty(evens, np.int64), 0
    for i in range(evens):
        a = ranked[i]
        if crosses[a]:
            turn[i] = evens
        elif equal_quota:
            for j in range(i):
                other = ranked[j]
                turn[i] += tiles[other] == tiles[a] and not crosses[other]
    this = 0
    while at < evens:
        for i in range(evens):
            if turn[i] == this:
                turned[at] = ranked[i]
                at += 1
        this += 1
    return turned


@part
def _attention(image: Any, given: Any) -> Any:
    """As ``scores.attention_to`` of an image, [N]; none if none is asked for."""
    count, width, received = given.tokens, given.key_width, np.empty(0, np.float32)
    if given.received:
        received = _of(image, given.received, (count,))
    if not given.query:
        return received
    received, logits = np.zeros(count, np.float32), np.empty(count, np.float32)
    log_size, scale = _of(image, given.log_size, (count,)), np.float32(given.scale)
    heads, to_head, to_token = given.key_heads, given.key_to_head, given.key_to_token
    sides = heads, count, width, given.key_to_image, to_head, to_token
    queries = _heads_of(image, given.query, *sides)
    keys = _heads_of(image, given.key, *sides)
    for h in range(heads):
        start = h * to_head
        query = queries[start : start + width]  # of the class token, which is the first
        for n in range(count):
            at = start + n * to_token
            logits[n] = _product(query, keys[at : at + width]) * scale
            logits[n] += log_size[n] if log_size.shape[0] else np.float32(0.0)
        largest, total = logits[0], np.float32(0.0)
        for n in range(count):
            largest = max(largest, logits[n])
        for n in range(count):
            logits[n] = np.exp(logits[n] - largest)
            total += logits[n]
        total *= np.float32(heads)
        for n in range(count):
            received[n] += logits[n] / total
    return received


@part
def _penalties(size: Any, beta: Any) -> Any:
    """As ``scores.size_penalty``, negated, for each pair of sizes that there are.

    Returns:
        Which of them each token has, [N], and the table, [m, m].
    """
    kind, known = np.empty(size.shape[0], np.int64), np.empty(size.shape[0], np.float32)
    several = 0
    for n in range(size.shape[0]):
        inverse, at = np.float32(1.0) / size[n], 0
        while at < several and known[at] != inverse:
            at += 1
        known[at], kind[n] = inverse, at
        several = max(several, at + 1)
    table = np.empty((several, several), np.float32)
    for i in range(several):
        for j in range(several):
            table[i, j] = beta * np.log(known[i] + known[j])
    return kind, table


@part
def _tiles(place: Any, window: Any, first: Any, several: Any) -> Any:
    """As ``matching.tile``, of every second token from one on; none without places."""
    tiles = np.empty(several if place.shape[0] and window else 0, np.float32)
    side = np.float32(window)
    for i in range(tiles.shape[0]):
        row, column = place[first + 2 * i, 0], place[first + 2 * i, 1]
        row, column = np.floor((row + TOLERANCE) / side), np.floor((column + TOLERANCE) / side)
        tiles[i] = row * np.float32(4096.0) + column
    return tiles


@part
def _match(image: Any, given: Any, received: Any, partner: Any) -> Any:
    """Rank the even tokens of an image, [a], by their best edges; fill in their partners, [a]."""
    count, evens, odds, width = given.tokens, given.evens, given.odds, given.width
    heads, to_head, to_token = given.heads, given.to_head, given.to_token
    feature = _heads_of(
        image, given.feature, heads, count, width, given.to_image, to_head, to_token
    )
    place, beta = _of(image, given.place, (count, 2)), np.float32(given.size_penalty)
    even_tiles = _tiles(place, given.window, given.first_even, evens)
    odd_tiles = _tiles(place, given.window, given.first_odd, odds)
    size = _of(image, given.size, (count,))
    kind, penalties = _penalties(size if beta else size[:0], beta)
    columns = _odd_columns(feature, given)
    rows = np.zeros((FOUR, columns.shape[0]), np.float32)
    found = np.empty((FOUR, columns.shape[1]), np.float32)
    worst = np.empty(evens, np.float32)  # the score, negated: a stable sort is ascending
    crosses, times = np.zeros(evens, np.bool_), np.float32(given.salience * count)
    for a in range(evens):
        if a % FOUR == 0:
            for i in range(min(FOUR, evens - a)):
                at = (given.first_even + 2 * (a + i)) * to_token
                _unit_mean(feature, at, to_head, heads, rows[i, :width])
            _products(rows, columns, found)
        scores, token = found[a % FOUR, :odds], given.first_even + 2 * a
        if kind.shape[0]:
            penalty = penalties[kind[token]]
            for b in range(odds):
                scores[b] += penalty[kind[given.first_odd + 2 * b]]
        best, at = np.float32(0.0), -1
        if even_tiles.shape[0]:
            best, at = _largest_inside(scores, even_tiles[a], odd_tiles)
            crosses[a] = at < 0
        if at < 0:
            best, at = _largest(scores)
        partner[a] = at
        worst[a] = -best
        if received.shape[0] and times:
            worst[a] += _rounded(times, received[token])
    ranked = np.argsort(worst, kind="mergesort")
    if not even_tiles.shape[0]:
        return ranked
    return _in_rounds(ranked, even_tiles, crosses, given.equal_quota)


@part
def _weights(given: Any, received: Any) -> Any:
    """What sizes are multiplied with for the weights of a mean, [N], or none."""
    power, count = np.float32(given.attention_weight), given.tokens
    weight = np.empty(count if power and received.shape[0] else 0, np.float32)
    for n in range(weight.shape[0]):
        share = max(received[n] * np.float32(count), LEAST)
        weight[n] = share if power == np.float32(1.0) else share**power
    return weight


@part
def _seat(ranked: Any, given: Any, rows: Any) -> Any:
    """Fill in the rows of those that stay, [N - r], in their new order; returns the first odd."""
    stays = np.ones(given.evens, np.bool_)
    for i in range(given.r):
        stays[ranked[i]] = False
    at = 0
    for token in range(given.prefix):
        rows[at] = token
        at += 1
    for a in range(given.evens):
        if stays[a]:
            rows[at] = given.first_even + 2 * a
            at += 1
    for b in range(given.odds):
        rows[at + b] = given.first_odd + 2 * b
    return at


@part
def _join(x: Any, rows: Any, source: Any, target: Any, share: Any, norm: Any, merged: Any) -> None:
    """Fill in what [N, C] becomes, [N - r, C]: those that stay, with shares of those that join.

    ``source`` and ``target`` are [r]: the row of x that leaves, the one of ``merged`` it joins.
    """
    r, channels = source.shape[0], x.shape[1]
    for i in range(rows.shape[0]):
        into, one = merged[i], x[rows[i]]
        for c in range(channels):
            into[c] = one[c]
    for i in range(r):
        into, one, own = merged[target[i]], x[source[i]], x[rows[target[i]]]
        for c in range(channels):
            into[c] += share[i] * (one[c] - own[c])
    for i in range(r if norm else 0):
        is_first = True
        for j in range(i):
            is_first = is_first and target[j] != target[i]
        if not is_first:
            continue
        length = _length(x[rows[target[i]]])
        wanted = length
        for j in range(i, r):
            if target[j] == target[i]:
                other = _length(x[source[j]])
                wanted = max(wanted, other) if norm == 2 else wanted + share[j] * (other - length)
        into = merged[target[i]]
        scale = wanted / max(_length(into), np.float32(1e-6))
        for c in range(channels):
            into[c] *= scale


@part
def _normalise(x: Any, given: Any, normed: Any) -> None:
    """As torch's ``layer_norm``, of [N, C]: fill in as many."""
    count, channels = x.shape
    weight = _of(0, given.mlp_norm_weight, (channels,))
    bias = _of(0, given.mlp_norm_bias, (channels,))
    share, epsilon = np.float32(1.0) / np.float32(channels), np.float32(given.mlp_norm_epsilon)
    for i in range(count):
        one, into = x[i], normed[i]
        mean, spread = np.float32(0.0), np.float32(0.0)
        for c in range(channels):
            mean += one[c]
        mean *= share
        for c in range(channels):
            spread += (one[c] - mean) ** 2
        scale = np.float32(1.0) / np.sqrt(spread * share + epsilon)
        for c in range(channels):
            into[c] = (one[c] - mean) * scale * weight[c] + bias[c]


@part
def _merge(image: Any, given: Any, ranked: Any, partner: Any, weight: Any) -> None:
    """As ``joining.merge``, for an image."""
    count, channels, r = given.tokens, given.channels, given.r
    left = count - r
    size = _of(image, given.size, (count,))
    new_size = _of(image, given.new_size, (left,))
    rows, source, target = np.empty(left, np.int64), np.empty(r, np.int64), np.empty(r, np.int64)
    share, total = np.empty(r, np.float32), np.empty(left, np.float32)
    one = np.float32(1.0)
    first = _seat(ranked, given, rows)
    log_size = _of(image, given.new_log_size, (left,))
    for i in range(left):
        new_size[i] = size[rows[i]] if size.shape[0] else one
        total[i] = new_size[i] * (weight[rows[i]] if weight.shape[0] else one)
    for i in range(r):
        source[i] = given.first_even + 2 * ranked[i]
        target[i] = first + partner[ranked[i]]
        own = size[source[i]] if size.shape[0] else one
        share[i] = own * (weight[source[i]] if weight.shape[0] else one)
        new_size[target[i]] += own
        total[target[i]] += share[i]
    for i in range(r):
        share[i] /= total[target[i]]
    for i in range(left):
        log_size[i] = np.log(new_size[i])
    x, merged = _of(image, given.x, (count, channels)), _of(image, given.new_x, (left, channels))
    _join(x, rows, source, target, share, given.norm, merged)
    if given.normed:
        _normalise(merged, given, _of(image, given.normed, (left, channels)))
    place, new_place = _of(image, given.place, (count, 2)), _of(image, given.new_place, (left, 2))
    if place.shape[0] and given.centroid:
        _join(place, rows, source, target, share, 0, new_place)
    elif place.shape[0]:
        for i in range(left):
            for c in range(2):
                new_place[i, c] = place[rows[i], c]


@_compiled
def step(given: Any) -> None:
    """A merge step, as ``compiled.by_operators`` has it.

    A feature is [B, H, N, d], of any strides but that those of d stand side by side; so are keys
    and queries, which have the same strides, and of which the class token's alone are read. All
    else is float32 and contiguous but ``order`` [B, a] and ``destination`` [B, r], which are int64,
    those of ``matching.Choice``.

    Args:
        given: all of :data:`GIVEN`.
    """
    one = carray(given, 1)[0]
    partner = np.empty(one.evens, np.int64)
    first, last = 0, one.images
    if one.team_size:
        share = -(one.images // -np.int64(_call(one.team_size)))
        first = np.int64(_call(one.thread_number)) * share
        last = min(first + share, one.images)
    for image in range(first, last):
        received = _attention(image, one)
        ranked = _match(image, one, received, partner)
        if one.order:
            order = carray(_integers(one.order + 8 * image * one.evens), (one.evens,))
            destination = carray(_integers(one.destination + 8 * image * one.r), (one.r,))
            for i in range(one.evens):
                order[i] = ranked[i]
            for i in range(one.r):
                destination[i] = partner[ranked[i]]
        _merge(image, one, ranked, partner, _weights(one, received))
