"""Non-domination in two objectives, both to be minimised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["hypervolume", "non_dominated", "ranks"]

Point = tuple[float, float]


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other dominates, ascending in the first objective.

    Of equal points the one with the lowest index is kept.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def ranks(points: Sequence[Point]) -> list[int]:
    """Return the non-domination rank of each point: 0 for the front, 1 for the next one, …"""
    rank, left, result = 0, list(range(len(points))), [0] * len(points)
    while left:
        front = {left[i] for i in non_dominated([points[j] for j in left])}
        for i in front:
            result[i] = rank
        left = [i for i in left if i not in front]
        rank += 1
    return result


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """Return the area that the points dominate within the reference point; 0 without points."""
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    area, ceiling = 0.0, reference[1]
    for i in non_dominated(inside):
        area += (reference[0] - inside[i][0]) * (ceiling - inside[i][1])
        ceiling = inside[i][1]
    return area
