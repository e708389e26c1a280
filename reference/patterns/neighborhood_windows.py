"""Who sees whom in neighborhood attention: windows of an axis, masks, dilation groups.

The clauses are those of `neighborhood`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import check_bool, check_integer

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool]
NAMES = ("X", "k", "s", "dil", "causal")


class Axis(NamedTuple):
    """S1: one axis of a grid: its length X, and the kernel, stride, dilation and order on it."""

    X: int
    k: int
    s: int
    dil: int
    causal: bool


def axis_window(
    x: int | np.ndarray, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S2-S4: where the window of the query at coordinate x starts and ends, and its group.

    `x` is an integer or an integer array in [0, X). `start` and `end`, exclusive, count inside the
    dilation group: entry i of group g is coordinate i * dil + g. All int64, shaped as x.

    >>> axis_window(np.arange(5), 5, 3)[0]  # shifted at both borders, not cut
    array([0, 0, 1, 2, 2])
    >>> axis_window(np.array([4, 8]), 9, 2, dil=3, causal=True)
    (array([0, 1]), array([2, 3]), array([1, 2]))
    """
    check_axis(X, k, s, dil, causal)
    if not isinstance(x, (int, np.integer, np.ndarray)) or isinstance(x, bool):
        raise TypeError(f"x: got {type(x).__name__}, expected an integer or an integer array")
    x = np.asarray(x)
    if x.dtype.kind not in "iu":
        raise TypeError(f"x: got dtype {x.dtype}, expected an integer dtype")
    if np.any(x < 0) or np.any(x >= X):
        raise ValueError(f"x: got {x.min()}..{x.max()}, expected coordinates in [0, {X})")
    x = x.astype(np.int64)
    group, inside = x % dil, x // dil
    length = X // dil + (group < X % dil)
    if causal:
        leader = np.minimum(inside // s * s + s - 1, length - 1)
        return np.maximum(leader - k + 1, 0), inside + 1, group
    left, right = k // 2, k // 2 + k % 2 - 1
    leader = np.minimum(inside // s * s + s // 2, length - 1)
    centre = np.clip(leader, left, length - 1 - right)
    return centre - left, centre + right + 1, group


def axis_mask(X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False) -> np.ndarray:
    """S2-S4: bool (X, X), True where the query of a row sees the key of a column.

    >>> axis_mask(4, 2).astype(int)  # an even kernel reaches further to the left
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]])
    """
    start, end, group = axis_window(np.arange(X) if _is_size(X) else 0, X, k, s, dil, causal)
    key = np.arange(X) // dil
    in_window = (key >= start[:, None]) & (key < end[:, None])
    return in_window & (np.arange(X) % dil == group[:, None])


def na_mask(
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
) -> np.ndarray:
    """S5: bool (tokens, tokens): the masks of the axes, all of which must allow a pair.

    `shape` is that of the grid, one to three axes; the others are one value for all axes or one
    for each.

    >>> na_mask((2, 3), 2).sum(axis=1)  # 2 x 2 keys for every query
    array([4, 4, 4, 4, 4, 4])
    """
    mask = np.ones((1, 1), bool)
    for axis in check_grid(shape, kernel, stride, dilation, causal):
        mask = np.kron(mask, axis_mask(*axis))
    return mask


def window_tokens(
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
) -> tuple[np.ndarray, np.ndarray]:
    """S8: the tokens of each window in window order, int64 (tokens, window), and bool (tokens,
    window), False for the entries behind a causal axis's end, whose token is then the query's own.

    >>> window_tokens((3,), 2, causal=True)
    (array([[0, 0],
           [0, 1],
           [1, 2]]), array([[ True, False],
           [ True,  True],
           [ True,  True]]))
    """
    grid = check_grid(shape, kernel, stride, dilation, causal)
    tokens, inside = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    for axis in grid:
        start, end, group = axis_window(np.arange(axis.X), *axis)
        entry = start[:, None] + np.arange(axis.k)
        coordinate = entry * axis.dil + group[:, None]
        # Row-major on both sides: queries go down, window offsets across.
        tokens = np.kron(tokens * axis.X, np.ones_like(coordinate)) + np.tile(
            coordinate, tokens.shape
        )
        inside = np.kron(inside, entry < end[:, None])
    own = np.arange(len(tokens))[:, None]
    return np.where(inside, tokens, own), inside


def token_order(shape: Sequence[int], dil: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """S9: the tokens of the dilation groups, one group after the other, int64 (tokens,), and the
    grid shape of each group, int64 (groups, axes).

    >>> token_order((5,), 2)
    (array([0, 2, 4, 1, 3]), array([[3],
           [2]]))
    """
    sizes = _check_shape(shape)
    dils = _per_axis("dil", dil, len(sizes))
    for X, step in zip(sizes, dils, strict=True):
        check_integer("dil", step, least=1)
        if step > X:
            raise ValueError(f"dil: got {step}, expected at most the {X} tokens of its axis")
    grid = np.arange(np.prod(sizes)).reshape(sizes)
    order, shapes = [], []
    for residues in product(*(range(step) for step in dils)):
        group = grid[tuple(slice(r, None, step) for r, step in zip(residues, dils, strict=True))]
        order.append(group.ravel())
        shapes.append(group.shape)
    return np.concatenate(order), np.array(shapes)


def check_axis(X: Any, k: Any, s: Any, dil: Any, causal: Any, names: Sequence[str] = NAMES) -> None:
    """S1, K14: one axis is well formed: 2 <= k, k * dil <= X, 1 <= s <= k.

    `names` are those of the caller's arguments.

    >>> check_axis(5, 3, 1, 2, False)
    Traceback (most recent call last):
    ValueError: k: got 3 with dilation 2, expected at most 5 tokens in all
    """
    for name, value, least in zip(names, (X, k, s, dil), (1, 2, 1, 1), strict=False):
        check_integer(name, value, least)
    check_bool(names[4], causal)
    if k * dil > X:
        raise ValueError(
            f"{names[1]}: got {k} with dilation {dil}, expected at most {X} tokens in all"
        )
    if s > k:
        raise ValueError(f"{names[2]}: got {s}, expected at most the kernel's {k}")


def check_grid(shape: Any, kernel: Any, stride: Any, dilation: Any, causal: Any) -> list[Axis]:
    """S1, K14: the axes of a grid; one value given for all axes is repeated.

    >>> check_grid((6, 8), 3, (1, 2), 2, False)[1]
    Axis(X=8, k=3, s=2, dil=2, causal=False)
    """
    sizes = _check_shape(shape)
    options = {"kernel": kernel, "stride": stride, "dilation": dilation, "causal": causal}
    columns = [_per_axis(name, value, len(sizes)) for name, value in options.items()]
    axes = [Axis(*values) for values in zip(sizes, *columns, strict=True)]
    for axis in axes:
        check_axis(*axis, names=("shape", *options))
    return axes


def _is_size(X: Any) -> bool:
    return isinstance(X, (int, np.integer)) and bool(X > 0)


def _check_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: got {type(shape).__name__}, expected a tuple of integers")
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"shape: got {len(shape)} axes, expected 1, 2 or 3")
    for X in shape:
        check_integer("shape", X, least=1)
    return tuple(shape)


def _per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{name}: got {len(value)} values, expected one for each of {axes} axes")
    return tuple(value)
