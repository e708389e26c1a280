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
def is_simple(polygon: np.ndarray) -> bool:
    """At least 3 points, none twice, no edges that meet but in the vertex of neighbours."""
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
def is_convex(polygon: np.ndarray, rounding: float) -> bool:
    """No right turn beyond `rounding`, relative to the longest edge squared; area above 0."""
    h = len(polygon)
    longest, sharpest = polygon.dtype.type(0), polygon.dtype.type(0)
    for i in range(h):
        back, corner, ahead = polygon[i - 1], polygon[i], polygon[(i + 1) % h]
        longest = max(longest, max((ahead[0] - corner[0]) ** 2, (ahead[1] - corner[1]) ** 2))
        sharpest = min(sharpest, _turn(back, corner, ahead))
    return sharpest >= -rounding * longest and _area(polygon) > 0


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
def shared_area(polygon: np.ndarray, convex: np.ndarray) -> Any:
    """Of a simple `polygon` and a `convex` one that runs counter-clockwise."""
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
        valid[b] = is_simple(polygon)
        accuracy[b] = 0
        coverage[b] = np.nan
        if valid[b]:
            first = np.argmin(answer[b, :m])
            same = m == h
            for i in range(min(m, h)):
                same = same and answer[b, (first + i) % m] == hull[b, i]
            accuracy[b] = same
            coverage[b] = shared_area(polygon, true) / _area(true)


APEX_MISSING, APEX_TIED = -1, -2


@njit(cache=True, nogil=True)
def _apex(points: np.ndarray, a: int, b: int, rounding: float, circle: np.ndarray) -> int:
    """The point left of a -> b that sees it under the largest angle; two such fill `circle`."""
    best, second, at, after = np.inf, np.inf, -1, -1
    for i in range(len(points)):
        to_a_x, to_a_y = points[a, 0] - points[i, 0], points[a, 1] - points[i, 1]
        to_b_x, to_b_y = points[b, 0] - points[i, 0], points[b, 1] - points[i, 1]
        twice_area = to_a_x * to_b_y - to_a_y * to_b_x
        if twice_area > 0:
            cotangent = (to_a_x * to_b_x + to_a_y * to_b_y) / twice_area
            if cotangent < best:
                best, second, at, after = cotangent, best, i, at
            elif cotangent < second:
                second, after = cotangent, i
    if at < 0:
        return APEX_MISSING
    if after >= 0 and second - best <= rounding * (1 + abs(best)):
        circle[0], circle[1], circle[2], circle[3] = a, b, at, after
        return APEX_TIED
    return at


@njit(cache=True, nogil=True)
def _incenter(points: np.ndarray, triangle: np.ndarray) -> tuple[float, float]:
    total, x, y = 0.0, 0.0, 0.0
    for i in range(3):
        here, b, c = triangle[i], triangle[(i + 1) % 3], triangle[(i + 2) % 3]
        side = np.sqrt(np.sum((points[b] - points[c]) ** 2))
        total += side
        x += side * points[here, 0]
        y += side * points[here, 1]
    return x / total, y / total


@njit(cache=True, nogil=True)
def _triangulate(points: np.ndarray, rounding: float, found: np.ndarray, circle: np.ndarray) -> int:
    """Across each edge to its apex, from an edge of the hull; returns the hull's vertices."""
    n, room = len(points), len(found)
    hull = np.empty(n, np.int64)
    vertices = _hull(points, hull)
    if vertices < 3:
        return vertices
    triangles = np.empty((room, 3), np.int64)
    pending = [(hull[0], hull[1])]
    done = {hull[0] * n + hull[0]}  # never an edge: an empty set has no type
    count = 0
    while len(pending) and count < room:
        a, b = pending.pop()
        if a * n + b in done:
            continue
        c = _apex(points, a, b, rounding, circle)
        if c == APEX_TIED:
            return vertices
        if c == APEX_MISSING:
            continue
        for start, end in ((a, b), (b, c), (c, a)):
            done.add(start * n + end)
            pending.append((end, start))
        triangles[count] = np.sort(np.array([a, b, c]))
        count += 1
    key, x, y = np.empty(count, np.int64), np.empty(count), np.empty(count)
    for i in range(count):
        key[i] = (triangles[i, 0] * n + triangles[i, 1]) * n + triangles[i, 2]
        x[i], y[i] = _incenter(points, triangles[i])
    order = np.argsort(key)
    order = order[np.argsort(y[order], kind="mergesort")]
    order = order[np.argsort(x[order], kind="mergesort")]
    for i in range(count):
        found[i] = triangles[order[i]]
    return vertices


@njit(cache=True, nogil=True, parallel=True)
def triangulations(
    points: np.ndarray,
    rounding: float,
    found: np.ndarray,
    vertices: np.ndarray,
    circle: np.ndarray,
) -> None:
    """Delaunay triangles into `found` int64 (batch, 2 n - 5, 3), filled with -1.

    `vertices` (batch) takes the number of each hull's vertices, as `hulls`; `circle` int64
    (batch, 4), filled with -1, four points on an empty circle.
    """
    for b in prange(len(points)):
        vertices[b] = _triangulate(points[b], rounding, found[b], circle[b])


@njit(cache=True, nogil=True)
def _incircle(a: np.ndarray, b: np.ndarray, c: np.ndarray, point: np.ndarray) -> float:
    """> 0 if `point` is in the circle through a, b, c, which run counter-clockwise."""
    ax, ay, bx, by = a[0] - point[0], a[1] - point[1], b[0] - point[0], b[1] - point[1]
    cx, cy = c[0] - point[0], c[1] - point[1]
    return (
        (ax * ax + ay * ay) * (bx * cy - by * cx)
        + (bx * bx + by * by) * (cx * ay - cy * ax)
        + (cx * cx + cy * cy) * (ax * by - ay * bx)
    )


@njit(cache=True, nogil=True)
def _is_delaunay(points: np.ndarray, triangles: np.ndarray, hull: np.ndarray, tol: float) -> bool:
    n, extent = len(points), 0.0
    for axis in range(2):
        extent = max(extent, points[:, axis].max() - points[:, axis].min())
    scaled = (points - points[0]) / extent
    seen = {-1}
    uncovered = _area(scaled[hull])
    for t in range(len(triangles)):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        if a < 0:
            continue
        key = (a * n + b) * n + c
        if a == b or b == c or key in seen:
            return False
        seen.add(key)
        turn = _turn(scaled[a], scaled[b], scaled[c])
        uncovered -= abs(turn) / 2
        for i in range(n):
            inside = np.sign(turn) * _incircle(scaled[a], scaled[b], scaled[c], scaled[i])
            if inside > tol and i != a and i != b and i != c:
                return False
    return abs(uncovered) <= tol


@njit(cache=True, nogil=True, parallel=True)
def judge_triangulations(
    points: np.ndarray, triangles: np.ndarray, tol: float, right: np.ndarray, vertices: np.ndarray
) -> None:
    """Whether `triangles` int64 (batch, m, 3), each increasing or -1, are Delaunay's: `right`."""
    for b in prange(len(points)):
        hull = np.empty(points.shape[1], np.int64)
        vertices[b] = _hull(points[b], hull)
        right[b] = vertices[b] >= 3 and _is_delaunay(
            points[b], triangles[b], hull[: vertices[b]], tol
        )
