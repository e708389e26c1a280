"""Wrong kernels of neighborhood attention: borders that cut, leaders that stray, lost groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns.neighborhood_windows import check_grid

ATTEND = right("neighborhood.na_attend")
AXIS = right("neighborhood.axis_window")
AXIS_MASK = right("neighborhood.axis_mask")
MASK = right("neighborhood.na_mask")
TILE = 4


def _parts(x: Any, X: int, dil: int) -> tuple[Any, Any, Any]:
    """Group, entry in it and length of the group."""
    return x % dil, x // dil, X // dil + (x % dil < X % dil)


def cut_at_borders(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    start, end, group = AXIS(x, X, k, s, dil, causal)
    if causal:
        return start, end, group
    group, inside, length = _parts(np.asarray(x), X, dil)
    leader = np.minimum(inside // s * s + s // 2, length - 1)
    first, last = leader - k // 2, leader + (k + 1) // 2
    return np.maximum(first, 0), np.minimum(last, length), group


def even_to_the_right(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    start, end, group = AXIS(x, X, k, s, dil, causal)
    if causal or k % 2:
        return start, end, group
    group, inside, length = _parts(np.asarray(x), X, dil)
    leader = np.minimum(inside // s * s + s // 2, length - 1)
    start = np.clip(leader - k // 2 + 1, 0, length - k)
    return start, start + k, group


def length_of_first_group(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    """All groups as long as the longest; what is read beyond one's end is dropped."""
    start, end, group = AXIS(x, X, k, s, dil, causal)
    longest = -(-X // dil)
    start, end, _ = AXIS(np.asarray(x) // dil, longest, k, s, 1, causal)
    return start, np.minimum(end, X // dil + (group < X % dil)), group


def leader_left_of_middle(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    start, end, group = AXIS(x, X, k, s, dil, causal)
    if causal:
        return start, end, group
    group, inside, length = _parts(np.asarray(x), X, dil)
    leader = np.minimum(inside // s * s + (s - 1) // 2, length - 1)
    start = np.clip(leader - k // 2, 0, length - k)
    return start, start + k, group


def leader_of_tile(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    """Stride groups counted from the start of a tile of 4."""
    start, end, group = AXIS(x, X, k, s, dil, causal)
    if causal:
        return start, end, group
    group, inside, length = _parts(np.asarray(x), X, dil)
    tile = inside // TILE * TILE
    leader = np.minimum(tile + (inside - tile) // s * s + s // 2, length - 1)
    start = np.clip(leader - k // 2, 0, length - k)
    return start, start + k, group


def causal_to_leader(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    """The window of a causal axis ends at the leader."""
    start, end, group = AXIS(x, X, k, s, dil, causal)
    if not causal:
        return start, end, group
    group, inside, length = _parts(np.asarray(x), X, dil)
    return start, np.minimum(inside // s * s + s - 1, length - 1) + 1, group


def causal_shifted(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    """A causal window is pushed inwards at the start instead of being cut."""
    start, end, group = AXIS(x, X, k, s, dil, causal)
    return start, np.maximum(end, k) if causal else end, group


def leader_beyond_the_end(
    x: Any, X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False
) -> tuple[Any, Any, Any]:
    """The leader of a causal group that is not whole lies behind the axis."""
    start, end, group = AXIS(x, X, k, s, dil, causal)
    if not causal:
        return start, end, group
    leader = np.asarray(x) // dil // s * s + s - 1
    return np.maximum(leader - k + 1, 0), end, group


def masks_with(window: Any) -> Any:
    """`axis_mask` with another `axis_window`."""
    return replacing(AXIS_MASK, axis_window=window)


def attention_with(window: Any) -> Any:
    """`na_attend` with another `axis_window`."""
    return replacing(ATTEND, na_mask=replacing(MASK, axis_mask=masks_with(window)))


def without_groups(X: int, k: int, s: int = 1, dil: int = 1, causal: bool = False) -> np.ndarray:
    """Windows of all dilation groups at once."""
    AXIS_MASK(X, k, s, dil, causal)
    start, end, _ = AXIS(np.arange(X), X, k, s, dil, causal)
    key = np.arange(X) // dil
    return (key >= start[:, None]) & (key < end[:, None])


def first_axis_fastest(shape: Any, kernel: Any, **options: Any) -> np.ndarray:
    """Tokens are flattened in the wrong order."""
    MASK(shape, kernel, **options)
    names = ("stride", "dilation", "causal")
    axes = check_grid(shape, kernel, *(options.get(n, d) for n, d in zip(names, (1, 1, False),
                                                                        strict=True)))  # fmt: skip
    mask = np.ones((1, 1), bool)
    for axis in reversed(axes):
        mask = np.kron(mask, AXIS_MASK(*axis))
    return mask


def order_of_first_axis(shape: Any, kernel: Any, **options: Any) -> np.ndarray:
    """All axes are causal if the first one is."""
    causal = options.get("causal", False)
    if isinstance(causal, (tuple, list)) and len(causal) == len(shape):
        options["causal"] = (causal[0],) * len(causal)
    return MASK(shape, kernel, **options)


def extra_in_front(arguments: dict[str, Any]) -> None:
    """The additional keys are taken to lie before those of the grid."""
    extra = arguments["extra"]
    if extra and getattr(arguments["k"], "ndim", 0) == getattr(arguments["v"], "ndim", 0) == 4:
        for name in ("k", "v"):
            arguments[name] = np.roll(arguments[name], -extra, axis=-2)


def with_extra_seen(seen: Any) -> Any:
    """`na_attend` whose queries see only those of the additional keys that ``seen(mask, extra)``,
    bool (tokens, extra), allows.
    """

    def call(q: Any, k: Any, v: Any, shape: Any, kernel: Any, **options: Any) -> Any:
        ATTEND(q, k, v, shape, kernel, **options)
        scale, extra = options.pop("scale", None), options.pop("extra", 0)
        mask = MASK(shape, kernel, **options)
        mask = np.concatenate([mask, seen(mask, extra)], axis=1)
        return dense.attend(q, k, v, mask=mask, scale=scale)

    return call


def by_first_half(mask: np.ndarray, extra: int) -> np.ndarray:
    behind = np.ones((len(mask), extra), bool)
    behind[len(mask) // 2 :] = False
    return behind


def as_of_the_grid(mask: np.ndarray, extra: int) -> np.ndarray:
    """Windows go round the grid, and have hold of what lies behind it."""
    return mask[:, np.arange(extra) % len(mask)]


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"neighborhood.{name}", f"neighborhood.{operation}", law, bug, call, **rest)


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return of("na_attend", name, law, bug, call, **rest)


MUTANTS = (
    mutant("cut-at-borders", "agreement", "windows are cut at borders, not pushed inwards",
           attention_with(cut_at_borders)),
    mutant("even-to-the-right", "agreement", "an even kernel reaches further right",
           attention_with(even_to_the_right)),
    mutant("one-length", "agreement", "all dilation groups have the first one's length",
           attention_with(length_of_first_group)),
    mutant("leader-left", "agreement", "the leader of an even stride is left of the middle",
           attention_with(leader_left_of_middle)),
    mutant("leader-of-tile", "agreement", "stride groups are counted from the tile",
           attention_with(leader_of_tile)),
    mutant("causal-to-leader", "prefix", "a causal window ends at its leader: the future leaks",
           attention_with(causal_to_leader)),
    mutant("causal-shifted", "prefix", "a causal window is pushed inwards at the start",
           attention_with(causal_shifted)),
    mutant("leader-unclipped", "agreement", "a causal leader may lie behind the end of its axis",
           attention_with(leader_beyond_the_end)),
    mutant("order-of-first-axis", "agreement", "all axes are causal if the first is",
           replacing(ATTEND, na_mask=order_of_first_axis)),
    mutant("no-groups", "agreement", "windows mix dilation groups",
           replacing(ATTEND, na_mask=replacing(MASK, axis_mask=without_groups))),
    mutant("first-axis-fastest", "agreement", "the axes are flattened in the wrong order",
           replacing(ATTEND, na_mask=first_axis_fastest)),
    mutant("extra-in-front", "lengths", "additional keys are taken from the front",
           altering(ATTEND, extra_in_front)),
    mutant("extra-by-window", "lengths", "the last queries do not see the additional keys",
           with_extra_seen(by_first_half)),
    mutant("extra-in-windows", "lengths", "additional keys are masked as those of the grid are",
           with_extra_seen(as_of_the_grid)),
    of("axis_window", "window-cut", "agreement", "windows are cut at borders", cut_at_borders),
    of("axis_mask", "mask-without-groups", "agreement", "windows mix dilation groups",
       without_groups),
    of("na_mask", "mask-flattened", "agreement", "the axes are flattened in the wrong order",
       first_axis_fastest),
)  # fmt: skip
