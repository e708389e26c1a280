"""Hulls, tours and polygons, one point set a thread. Arrays are (batch, n, 2); -1 pads indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange


@njit(cache=True, nogil=True)
def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """> 0 if a -> b -> c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


@njit(cache=True, nogil=True)
def _hull(points: np.ndarray, hull: np.ndarray) -> int:
    """Monotone chain: the vertices into `hull`, from the lowest index; returns how many.

    0 if two points are equal, fewer than 3 if all lie on one line.
    """
    n = len(points)
    order = np.argsort(points[:, 1], kind="mergesort")
    order = order[np.argsort(points[order, 0], kind="mergesort")]
    for i in range(1, n):
        here, before = points[order[i]], points[order[i - 1]]
        if here[0] == before[0] and here[1] == before[1]:
            return 0
    chain = np.empty(2 * n + 2, np.int64)
    size = 0
    for half in range(2):
        base = size
        for step in range(n):
            i = order[step] if half == 0 else order[n - 1 - step]
            while size - base >= 2:
                if _turn(points[chain[size - 2]], points[chain[size - 1]], points[i]) > 0:
                    break
                size -= 1
            chain[size] = i
            size += 1
        # The last vertex of a half is the first of the other.
        size -= 1
    first = 0
    for i in range(size):
        if chain[i] < chain[first]:
            first = i
    for i in range(size):
        hull[i] = chain[(first + i) % size]
    return size


@njit(cache=True, nogil=True, parallel=True)
def hulls(points: np.ndarray, hull: np.ndarray, count: np.ndarray) -> None:
    """`hull` int64 (batch, n) filled with -1 takes the vertices, `count` (batch) their number."""
    for b in prange(len(points)):
        count[b] = _hull(points[b], hull[b])


@njit(cache=True, nogil=True)
def _tour(points: np.ndarray, tour: np.ndarray) -> None:
    """Held-Karp: bit j of a set stands for point j + 1, point 0 is the start."""
    n = len(points)
    rest = n - 1
    length = np.zeros((n, n), points.dtype)
    for i in range(n):
        for j in range(n):
            x, y = points[i, 0] - points[j, 0], points[i, 1] - points[j, 1]
            length[i, j] = np.sqrt(x * x + y * y)
    cost = np.full((1 << rest, rest), np.inf, points.dtype)
    for last in range(rest):
        cost[1 << last, last] = length[0, last + 1]
    for members in range(1, 1 << rest):
        for last in range(rest):
            before = members ^ (1 << last)
            if before < members and before:
                best = cost[members, last]
                for previous in range(rest):
                    # A point outside the set has cost inf.
                    path = cost[before, previous] + length[previous + 1, last + 1]
                    best = min(best, path)
                cost[members, last] = best
    remaining, here = (1 << rest) - 1, 0
    tour[0] = 0
    for place in range(1, n):
        best = 0
        for last in range(1, rest):
            if (
                cost[remaining, last] + length[last + 1, here]
                < cost[remaining, best] + length[best + 1, here]
            ):
                best = last
        remaining ^= 1 << best
        here = best + 1
        tour[place] = here
    if tour[1] > tour[n - 1]:
        tour[1:] = tour[1:][::-1].copy()


@njit(cache=True, nogil=True, parallel=True)
def tours(points: np.ndarray, tour: np.ndarray) -> None:
    """Shortest closed tours, int64 (batch, n), of at least 4 points."""
    for b in prange(len(points)):
        _tour(points[b], tour[b])


@njit(cache=True, nogil=True)
def _meet(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> bool:
    """Whether the closed segments ab and cd have a point in common."""
    for axis in range(2):
        if min(a[axis], b[axis]) > max(c[axis], d[axis]):
            return False
        if min(c[axis], d[axis]) > max(a[axis], b[axis]):
            return False
    apart = np.sign(_turn(a, b, c)) * np.sign(_turn(a, b, d))
    return apart <= 0 and np.sign(_turn(c, d, a)) * np.sign(_turn(c, d, b)) <= 0


@njit(cache=True, nogil=True)
def _simple(polygon: np.ndarray) -> bool:
    m = len(polygon)
    if m < 3:
        return False
    for i in range(m):
        for j in range(i):
            if polygon[i, 0] == polygon[j, 0] and polygon[i, 1] == polygon[j, 1]:
                return False
    for i in range(m):
        corner, back, ahead = polygon[i], polygon[i - 1], polygon[(i + 1) % m]
        inner = (back[0] - corner[0]) * (ahead[0] - corner[0])
        inner += (back[1] - corner[1]) * (ahead[1] - corner[1])
        if _turn(corner, back, ahead) == 0 and inner > 0:
            return False
        for j in range(i + 2, m):
            if (j + 1) % m != i and _meet(corner, ahead, polygon[j], polygon[(j + 1) % m]):
                return False
    return True


@njit(cache=True, nogil=True)
def _area(polygon: np.ndarray) -> Any:
    total = polygon.dtype.type(0)
    for i in range(1, len(polygon) - 1):
        total += _turn(polygon[0], polygon[i], polygon[i + 1])
    return total / 2


@njit(cache=True, nogil=True)
def _clip(polygon: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The part of `polygon` left of the line from `start` to `end`."""
    kept = np.empty((2 * len(polygon), 2), polygon.dtype)
    count = 0
    for i in range(len(polygon)):
        before, here = _turn(start, end, polygon[i - 1]), _turn(start, end, polygon[i])
        if before < 0 < here or here < 0 < before:
            share = before / (before - here)
            kept[count] = polygon[i - 1] + share * (polygon[i] - polygon[i - 1])
            count += 1
        if here >= 0:
            kept[count] = polygon[i]
            count += 1
    return kept[:count]


@njit(cache=True, nogil=True)
def _shared_area(polygon: np.ndarray, convex: np.ndarray) -> Any:
    for i in range(len(convex)):
        polygon = _clip(polygon, convex[i], convex[(i + 1) % len(convex)])
    return abs(_area(polygon))


@njit(cache=True, nogil=True, parallel=True)
def score_hulls(
    points: np.ndarray,
    hull: np.ndarray,
    answer: np.ndarray,
    valid: np.ndarray,
    accuracy: np.ndarray,
    coverage: np.ndarray,
) -> None:
    """Validity, accuracy and coverage of each `answer` int64 (batch, m) against the true `hull`."""
    for b in prange(len(points)):
        m = np.sum(answer[b] >= 0)
        h = np.sum(hull[b] >= 0)
        polygon, true = points[b][answer[b, :m]], points[b][hull[b, :h]]
        valid[b] = _simple(polygon)
        accuracy[b] = 0
        coverage[b] = np.nan
        if valid[b]:
            first = np.argmin(answer[b, :m])
            same = m == h
            for i in range(min(m, h)):
                same = same and answer[b, (first + i) % m] == hull[b, i]
            accuracy[b] = same
            coverage[b] = _shared_area(polygon, true) / _area(true)
