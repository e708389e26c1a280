"""How the minimum matching of pointer networks (S20) is searched: trees and blossoms.

Labels and trees are of the outermost blossoms. What lies inside one is looked at only when it falls
apart or its base changes, so that an event takes O(m) time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

OUTER, FREE, INNER = 1, 0, -1  # a label is how fast y rises
Edge = tuple[int, int]


@dataclass(eq=False)
class Blossom:
    """S20: a point, which has no children, or an odd cycle of blossoms.

    Link i leads from child i to the next one, the last link to child 0, which holds the base; links
    1, 3, ... are in the matching. `closest` int (m) is the blossom's point with the least slack to
    each point outside, for good, since all y of a blossom change alike. `entry` is the edge by
    which the tree comes into an inner blossom.
    """

    points: np.ndarray
    base: int
    closest: np.ndarray
    children: list[Blossom]
    links: list[Edge]
    z: int = 0
    entry: Edge = (-1, -1)

    def child_with(self, point: int) -> int:
        """S20: the number of the child that holds `point`."""
        return next(i for i, child in enumerate(self.children) if point in child.points)


class Search:
    """S20: the matching so far, with y and the blossoms that prove it. `mate` is -1 for none."""

    def __init__(self, w: np.ndarray) -> None:
        m = len(w)
        self.w, self.every = w, np.arange(m)
        # Roots have risen alike since they began alike, so w even makes all outer y equal modulo 2
        # and the slacks between them even. Half the largest w bounds every y.
        self.y = np.full(m, np.min(w[~np.eye(m, dtype=bool)]) // 2)
        self.mate = [-1] * m
        self.top = [Blossom(np.array([i]), i, np.full(m, i), [], []) for i in range(m)]
        self.cycles: list[Blossom] = []

    def match_two_more(self) -> None:
        """S20: a round, from trees that are only roots to the augmentation."""
        roots = [self.top[i] for i, mate in enumerate(self.mate) if mate == -1]
        self.label = np.full(len(self.mate), FREE)
        self.nearest = np.copy(roots[0].closest)
        self.time = 0
        self.meetings: list[tuple[int, int, int]] = []
        for root in roots:
            self._make_outer(root)
        while self.mate.count(-1) == len(roots):
            self._next_event()

    def blossoms(self) -> list[tuple[np.ndarray, int]]:
        """S20: points and z of every cycle, those inside others too."""
        pending, found = list(self.cycles), []
        while pending:
            blossom = pending.pop()
            found.append((blossom.points, blossom.z))
            pending += [child for child in blossom.children if child.children]
        return found

    def _slack(self, i: np.ndarray | int, j: np.ndarray | int) -> np.ndarray:
        """Of edges between different outermost blossoms, where no z counts."""
        return self.w[i, j] - self.y[i] - self.y[j]

    def _make_outer(self, blossom: Blossom) -> None:
        """Label it and note its edges: `nearest`, and the first of its meetings with outer ones.

        A later blossom notes its own meeting with this one, so one for each is enough.
        """
        self.label[blossom.points] = OUTER
        slack = self._slack(blossom.closest, self.every)
        nearer = slack < self._slack(self.nearest, self.every)
        self.nearest = np.where(nearer, blossom.closest, self.nearest)
        others = self.label == OUTER
        others[blossom.points] = False
        if np.any(others):
            j = np.flatnonzero(others)[np.argmin(slack[others])]
            # Both y rise, hence the half.
            meeting = (self.time + int(slack[j]) // 2, int(blossom.closest[j]), int(j))
            heapq.heappush(self.meetings, meeting)

    def _next_event(self) -> None:
        while self.top[self.meetings[0][1]] is self.top[self.meetings[0][2]]:
            heapq.heappop(self.meetings)
        time, i, j = self.meetings[0]
        events: list[tuple[int, Callable[..., None], tuple[Any, ...]]]
        events = [(time - self.time, self._meet, (i, j))]
        free = np.flatnonzero(self.label == FREE)
        if len(free):
            slack = self._slack(self.nearest[free], free)
            j = free[np.argmin(slack)]
            events.append((int(np.min(slack)), self._grow, (int(self.nearest[j]), int(j))))
        inner = [cycle for cycle in self.cycles if self.label[cycle.base] == INNER]
        if inner:
            first = min(inner, key=lambda cycle: cycle.z)
            events.append((first.z // 2, self._expand, (first,)))
        wait, happen, where = min(events, key=lambda event: event[0])
        self._pass(wait)
        happen(*where)

    def _pass(self, time: int) -> None:
        self.time += time
        self.y += time * self.label
        for cycle in self.cycles:
            cycle.z += 2 * time * int(self.label[cycle.base])

    def _grow(self, i: int, j: int) -> None:
        inner = self.top[j]
        inner.entry = (i, j)
        self.label[inner.points] = INNER
        self._make_outer(self.top[self.mate[inner.base]])

    def _meet(self, i: int, j: int) -> None:
        """Shrink or augment along the way to i's root or to where the ways up part, and to j's."""
        up, down = self._way_up(i), self._way_up(j)
        while up and down and up[-1] == down[-1]:
            up.pop()
            down.pop()
        way = [(b, a) for a, b in reversed(up)] + [(i, j)] + down
        if self.top[way[0][0]] is self.top[way[-1][1]]:
            self._shrink(way)
        else:
            self._augment(way)

    def _way_up(self, point: int) -> list[Edge]:
        """The edges from the outer blossom of `point` to its root."""
        way: list[Edge] = []
        base = self.top[point].base
        while self.mate[base] != -1:
            inner = self.top[self.mate[base]]
            outside, inside = inner.entry
            way += [(base, self.mate[base]), (inside, outside)]
            base = self.top[outside].base
        return way

    def _shrink(self, links: list[Edge]) -> None:
        children = [self.top[i] for i, _ in links]
        points = np.concatenate([child.points for child in children])
        closest = np.stack([child.closest for child in children])
        best = np.argmin(self._slack(closest, self.every), axis=0)
        cycle = Blossom(points, children[0].base, closest[best, self.every], children, links)
        self.cycles = [other for other in self.cycles if other not in children] + [cycle]
        self._place(cycle)
        self._make_outer(cycle)

    def _place(self, blossom: Blossom) -> None:
        for point in blossom.points.tolist():
            self.top[point] = blossom

    def _augment(self, way: list[Edge]) -> None:
        for i, j in way[::2]:
            self.mate[i], self.mate[j] = j, i
            self._rebase(self.top[i], i)
            self._rebase(self.top[j], j)

    def _rebase(self, blossom: Blossom, base: int) -> None:
        """Match all points of `blossom` but `base` inside it."""
        pending = [(blossom, base)]
        while pending:
            blossom, base = pending.pop()
            if blossom.base == base:
                continue
            blossom.base = base
            turn = blossom.child_with(base)
            blossom.children = blossom.children[turn:] + blossom.children[:turn]
            blossom.links = blossom.links[turn:] + blossom.links[:turn]
            pending.append((blossom.children[0], base))
            for k in range(1, len(blossom.links), 2):
                i, j = blossom.links[k]
                self.mate[i], self.mate[j] = j, i
                pending += [(blossom.children[k], i), (blossom.children[k + 1], j)]

    def _expand(self, cycle: Blossom) -> None:
        """From the child with the entry, the tree goes on to the base along a matched link."""
        children, links, size = cycle.children, cycle.links, len(cycle.children)
        start = cycle.child_with(cycle.entry[1]) or size
        if start % 2 == 0:
            children = children[:1] + children[:0:-1]
            links = [(j, i) for i, j in reversed(links)]
            start = size - start
        self.cycles.remove(cycle)
        self.cycles += [child for child in children if child.children]
        for child in children:
            self._place(child)
            self.label[child.points] = FREE
        children[start % size].entry = cycle.entry
        for k in range(start, size + 1):
            if (k - start) % 2:
                self._make_outer(children[k])
                children[(k + 1) % size].entry = links[k]
            else:
                self.label[children[k % size].points] = INNER
