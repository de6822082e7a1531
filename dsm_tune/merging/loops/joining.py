"""What becomes of the tokens of an image that match, in a compiled loop.

As :mod:`~.matching`, it does what the tensor functions do that it names.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsm_tune.merging.loops.machine import length, of_image, part
from dsm_tune.merging.loops.matching import partners
from dsm_tune.merging.scores import LEAST_SHARE

__all__ = ["merge"]

LEAST = np.float32(LEAST_SHARE)


@part
def _weights(image: Any, given: Any) -> Any:
    """What sizes are multiplied with for the weights of a mean, [N], or none."""
    power, count = np.float32(given.attention_weight), given.tokens
    received = of_image(image, given.received if power else 0, (count,))
    weight = np.empty(received.shape[0], np.float32)
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
def _join(
    x: Any, rows: Any, source: Any, target: Any, share: Any, norm: Any,
    first: Any, last: Any, merged: Any,
) -> None:  # fmt: skip
    """Of what [N, C] becomes, [N - r, C], fill in some rows: those that stay, and what joins them.

    ``source`` and ``target`` are [r]: the row of x that leaves, the one of ``merged`` it joins.
    """
    r, channels = source.shape[0], x.shape[1]
    for i in range(first, last):
        into, one = merged[i], x[rows[i]]
        for c in range(channels):
            into[c] = one[c]
    for i in range(r):
        if not first <= target[i] < last:
            continue
        into, one, own = merged[target[i]], x[source[i]], x[rows[target[i]]]
        for c in range(channels):
            into[c] += share[i] * (one[c] - own[c])
    for i in range(r if norm else 0):
        is_first = first <= target[i] < last
        for j in range(i):
            is_first = is_first and target[j] != target[i]
        if not is_first:
            continue
        before = length(x[rows[target[i]]])
        wanted = before
        for j in range(i, r):
            if target[j] == target[i]:
                other = length(x[source[j]])
                wanted = max(wanted, other) if norm == 2 else wanted + share[j] * (other - before)
        into = merged[target[i]]
        scale = wanted / max(length(into), np.float32(1e-6))
        for c in range(channels):
            into[c] *= scale


@part
def merge(image: Any, given: Any, ranked: Any, first: Any, last: Any) -> None:
    """As ``joining.merge``: some rows of what the tokens of an image become."""
    count, channels, r = given.tokens, given.channels, given.r
    left, partner = count - r, partners(image, given)
    size, weight = of_image(image, given.size, (count,)), _weights(image, given)
    rows, source, target = np.empty(left, np.int64), np.empty(r, np.int64), np.empty(r, np.int64)
    share, mass, total = (
        np.empty(r, np.float32),
        np.empty(left, np.float32),
        np.empty(left, np.float32),
    )
    one = np.float32(1.0)
    first_odd = _seat(ranked, given, rows)
    for i in range(left):
        mass[i] = size[rows[i]] if size.shape[0] else one
        total[i] = mass[i] * (weight[rows[i]] if weight.shape[0] else one)
    for i in range(r):
        source[i] = given.first_even + 2 * ranked[i]
        target[i] = first_odd + partner[ranked[i]]
        own = size[source[i]] if size.shape[0] else one
        share[i] = own * (weight[source[i]] if weight.shape[0] else one)
        mass[target[i]] += own
        total[target[i]] += share[i]
    for i in range(r):
        share[i] /= total[target[i]]
    new_size = of_image(image, given.new_size, (left,))
    log_size = of_image(image, given.new_log_size, (left,))
    for i in range(first, last):
        new_size[i], log_size[i] = mass[i], np.log(mass[i])
    x, merged = (
        of_image(image, given.x, (count, channels)),
        of_image(image, given.new_x, (left, channels)),
    )
    _join(x, rows, source, target, share, given.norm, first, last, merged)
    place, new_place = (
        of_image(image, given.place, (count, 2)),
        of_image(image, given.new_place, (left, 2)),
    )
    if place.shape[0] and given.centroid:
        _join(place, rows, source, target, share, 0, first, last, new_place)
    elif place.shape[0]:
        for i in range(first, last):
            for c in range(2):
                new_place[i, c] = place[rows[i], c]
