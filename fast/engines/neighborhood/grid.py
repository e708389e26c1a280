"""The grid of neighborhood attention: its axes, their checks, and how boxes of tokens are chosen.

A tile is a box of the grid. The windows of a box of queries cover a box of keys, whose size along
an axis follows from that axis alone, so the visited pairs of a plan are a product over the axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from attnspec.fast.backend import check_integer

NAMES = ("X", "k", "s", "dil", "causal")
WORD = 30
"""Bits of a word that hold the fields of all axes."""
IN_USE = 1 << 30
"""The bit above them, which says that a slot is in use."""


class Axis(NamedTuple):
    """One axis: its length X, kernel k, stride s and dilation, and whether it is causal."""

    X: int
    k: int
    s: int
    dil: int
    causal: bool

    @property
    def length(self) -> int:
        """Entries of the longest dilation group."""
        return -(-self.X // self.dil)


ABSENT = Axis(1, 1, 1, 1, False)
Grid = tuple[Axis, Axis, Axis]


def window(x: int, length: int, k: int, s: int, causal: bool) -> tuple[int, int]:
    """Where the window of entry x of a dilation group starts and ends."""
    if causal:
        return max(min(x // s * s + s - 1, length - 1) - k + 1, 0), x + 1
    left, right = k // 2, k // 2 + k % 2 - 1
    centre = min(max(min(x // s * s + s // 2, length - 1), left), length - 1 - right)
    return centre - left, centre + right + 1


def watchers(u: int, length: int, k: int, s: int, causal: bool) -> tuple[int, int]:
    """Where the queries whose windows hold entry u of a dilation group start and end.

    Windows move right with their queries, so these are neighbours; the range is not that of u's
    own window near a border, nor for an even kernel.
    """
    if causal:
        last = length if u + k >= length else (u + k - s) // s * s + s
        return u, min(last, length)
    first = u - k + 1 + k // 2 - s // 2
    last = length if u >= length - k else (u + k // 2 - s // 2) // s * s + s
    return (0 if u < k else -(-first // s) * s), min(last, length)


def flatten(grid: Grid) -> list[int]:
    """The grid as the integers that a custom op takes."""
    return [int(value) for axis in grid for value in axis]


def unflatten(values: Sequence[int]) -> Grid:
    """The inverse of `flatten`."""
    z, y, x = (values[i : i + 5] for i in (0, 5, 10))
    return _axis(z), _axis(y), _axis(x)


def _axis(values: Sequence[int]) -> Axis:
    X, k, s, dil, causal = values
    return Axis(X, k, s, dil, bool(causal))


def token_count(grid: Grid) -> int:
    """Tokens of the grid."""
    z, y, x = grid
    return z.X * y.X * x.X


def window_size(grid: Grid) -> int:
    """Keys of a whole window."""
    z, y, x = grid
    return z.k * y.k * x.k


def check_axis(X: Any, k: Any, s: Any, dil: Any, causal: Any, names: Sequence[str] = NAMES) -> None:
    """One axis is well formed: 2 <= k, k * dil <= X, 1 <= s <= k."""
    for name, value, least in zip(names, (X, k, s, dil), (1, 2, 1, 1), strict=False):
        check_integer(name, value, least)
    if not isinstance(causal, bool):
        raise TypeError(f"{names[4]}: got {causal!r}, expected True or False")
    if k * dil > X:
        raise ValueError(
            f"{names[1]}: got {k} with dilation {dil}, expected at most {X} tokens in all"
        )
    if s > k:
        raise ValueError(f"{names[2]}: got {s}, expected at most the kernel's {k}")


def check_shape(shape: Any) -> tuple[int, ...]:
    """The lengths of one to three axes."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: got {type(shape).__name__}, expected a tuple of integers")
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"shape: got {len(shape)} axes, expected 1, 2 or 3")
    for X in shape:
        check_integer("shape", X, least=1)
    return tuple(shape)


def per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    """One value for each axis."""
    if not isinstance(value, (tuple, list)):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{name}: got {len(value)} values, expected one for each of {axes} axes")
    return tuple(value)


def check_grid(shape: Any, kernel: Any, stride: Any, dilation: Any, causal: Any) -> Grid:
    """The three axes of a grid; the first ones of a smaller grid have length 1."""
    sizes = check_shape(shape)
    options = {"kernel": kernel, "stride": stride, "dilation": dilation, "causal": causal}
    columns = [per_axis(name, value, len(sizes)) for name, value in options.items()]
    axes = [Axis(*values) for values in zip(sizes, *columns, strict=True)]
    for axis in axes:
        check_axis(*axis, names=("shape", *options))
    z, y, x = [*[ABSENT] * (3 - len(axes)), *axes]
    return z, y, x


@dataclass(frozen=True)
class Plan:
    """Boxes (z, y, x) of the tokens that a program owns and of those that it walks over.

    `tiles` counts the owned boxes of a dilation group along each axis. Coordinates inside the
    walked region are packed into `words` words, in fields at `shifts` whose top bits are `guards`.
    """

    box: tuple[int, ...]
    walk: tuple[int, ...]
    tiles: tuple[int, ...]
    shifts: tuple[int, ...]
    bits: tuple[int, ...]
    words: int

    @property
    def guards(self) -> int:
        """The top bit of every field, and the bit of slots in use."""
        found = IN_USE
        for shift, bits in zip(self.shifts, self.bits, strict=True):
            found |= 1 << (shift + bits - 1)
            if self.words == 1:
                found |= 1 << (shift + 2 * bits - 1)
        return found


@lru_cache(maxsize=1024)
def make_plan(grid: Grid, owned: int, walked: int, reverse: bool) -> Plan:
    """The plan that visits fewest pairs with `owned` and `walked` slots a tile.

    Queries own and keys are walked, or with `reverse` the other way round. Equal plans are told
    apart by the longest runs of contiguous tokens.
    """
    best: tuple[float, ...] | None = None
    boxes: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 1, 1), (1, 1, 1))
    for box in _boxes(grid, owned, whole_powers=True):
        for walk in _boxes(grid, walked, whole_powers=False):
            visits = math.prod(
                _visits(axis, b, w, reverse)[0] for axis, b, w in zip(grid, box, walk, strict=True)
            )
            cost = (visits, -walk[2], -box[2], math.prod(box))
            if best is None or cost < best:
                best, boxes = cost, (box, walk)
    box, walk = boxes
    reach = [_visits(axis, b, w, reverse)[1] for axis, b, w in zip(grid, box, walk, strict=True)]
    bits = tuple((most - 1).bit_length() + 1 for most in reach)
    words = 1 if 2 * sum(bits) <= WORD else 2
    if sum(bits) > WORD:
        raise ValueError(
            f"kernel: got {[axis.k for axis in grid]}, expected windows of at most 2^{WORD - 3} "
            "keys together"
        )
    step = 2 if words == 1 else 1
    shifts = (0, step * bits[0], step * (bits[0] + bits[1]))
    tiles = tuple(-(-axis.length // b) for axis, b in zip(grid, box, strict=True))
    return Plan(box, walk, tiles, shifts, bits, words)


def _boxes(grid: Grid, slots: int, whole_powers: bool) -> Iterator[tuple[int, ...]]:
    """Boxes of at most `slots` tokens that cannot grow along the last axis."""
    lengths = [axis.length for axis in grid]
    sides = [[1 << n for n in range(slots.bit_length())] for _ in range(2)]
    if not whole_powers:
        sides = [list(range(1, 17))] * 2
    outer = (
        [n for n in side if n < 2 * length] for side, length in zip(sides, lengths, strict=False)
    )
    for z, y in product(*outer):
        z, y = min(z, lengths[0]), min(y, lengths[1])
        if z * y <= slots:
            most = slots // (z * y)
            yield z, y, min(most, lengths[2])
            # A side that divides what there is to walk leaves fewer slots empty.
            for x in (4, 8, 16, 20, 24, 28) if not whole_powers else ():
                if x < min(most, lengths[2]):
                    yield z, y, x


@lru_cache(maxsize=65536)
def _visits(axis: Axis, box: int, walk: int, reverse: bool) -> tuple[int, int]:
    """Walked boxes over all owned boxes of an axis, and the most tokens that they cover."""
    length, total, most = axis.length, 0, 1
    reach = watchers if reverse else window
    rules = (length, axis.k, axis.s, axis.causal)
    for first in range(0, length, box):
        start, _ = reach(first, *rules)
        _, stop = reach(min(first + box, length) - 1, *rules)
        steps = -(-(stop - start) // walk)
        total += steps
        most = max(most, steps * walk)
    # A shorter dilation group has other borders, whose windows reach one stride further at most.
    slack = -(-(most + 2 * axis.s) // walk) * walk if axis.X % axis.dil else most
    return total, max(slack, 1)
