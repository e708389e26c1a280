"""Wrong kernels of neighborhood attention: borders that cut, leaders that stray, lost groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.conventions import check_size
from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns import neighborhood, neighborhood_unfused
from attnspec.reference.patterns.neighborhood_windows import check_grid, token_order

ATTEND = right("neighborhood.na_attend")
AXIS = right("neighborhood.axis_window")
AXIS_MASK = right("neighborhood.axis_mask")
MASK = right("neighborhood.na_mask")
QK = right("neighborhood.na_qk")
AV = right("neighborhood.na_av")
PERMUTE = right("neighborhood.token_permute")
UNPERMUTE = right("neighborhood.token_unpermute")
MERGE = right("neighborhood.merge_attentions")
BACKWARD = neighborhood.na_backward
SPREAD = neighborhood_unfused._over_tokens
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


def extra_in_front(arguments: dict[str, Any]) -> None:
    """The additional keys are taken to lie before those of the grid."""
    extra = arguments["extra"]
    if extra and getattr(arguments["k"], "ndim", 0) == getattr(arguments["v"], "ndim", 0) == 4:
        for name in ("k", "v"):
            arguments[name] = np.roll(arguments[name], -extra, axis=-2)


def extra_by_window(q: Any, k: Any, v: Any, shape: Any, kernel: Any, **options: Any) -> Any:
    """Additional keys are seen by the first half of the queries only."""
    ATTEND(q, k, v, shape, kernel, **options)
    scale = options.pop("scale", None)
    extra = options.pop("extra", 0)
    mask = MASK(shape, kernel, **options)
    behind = np.ones((len(mask), extra), bool)
    behind[len(mask) // 2 :] = False
    return dense.attend(q, k, v, mask=np.concatenate([mask, behind], axis=1), scale=scale)


def symmetric_inverse(
    q: Any, k: Any, v: Any, shape: Any, kernel: Any, dout: Any, dlse: Any = None, **options: Any
) -> Any:
    """dk and dv gather from the queries in the key's own window."""
    dq, dk, _ = BACKWARD(q, k, v, shape, kernel, dout, dlse, **options)
    extra, scale = options.pop("extra", 0), options.pop("scale", None)
    mask = np.concatenate([MASK(shape, kernel, **options), np.ones((q.shape[-2], extra), bool)], 1)
    own = mask.copy()
    own[:, : q.shape[-2]] &= mask[:, : q.shape[-2]].T
    weights, _ = dense.softmax_lse(dense.score(q, k, scale=scale), mask)
    P = np.where(own, weights, 0).astype(weights.dtype)
    return dq, dk, dense.sum_groups(np.swapaxes(P, -1, -2) @ dout, v.shape[-3])


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def first_of_group(x: np.ndarray, heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // heads, :, :]


def no_scale(arguments: dict[str, Any]) -> None:
    if arguments["scale"] is None:
        arguments["scale"] = 1.0


def reads_behind_the_end(x: np.ndarray, index: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return SPREAD(x, index, np.ones_like(inside))


def window_backwards(result: np.ndarray) -> np.ndarray:
    return result[..., ::-1]


def zero_behind_the_end(result: np.ndarray) -> np.ndarray:
    return np.where(np.isneginf(result), np.zeros_like(result), result)


def strided_runs(x: np.ndarray, shape: Any, dil: Any) -> Any:
    """The groups in the order of the last axis's residues first."""
    permuted, shapes = PERMUTE(x, shape, dil)
    cuts = np.cumsum(np.prod(shapes, axis=1))[:-1]
    groups = np.split(permuted, cuts, axis=-2)[::-1]
    return np.concatenate(groups, axis=-2), shapes[::-1].copy()


def permuted_again(x: np.ndarray, shape: Any, dil: Any) -> np.ndarray:
    UNPERMUTE(x, shape, dil)
    check_size("x", x.shape[-2], x.shape[-2], "tokens")
    return x[..., token_order(shape, dil)[0], :]


def plain_average(outs: Any, lses: Any) -> Any:
    _, lse = MERGE(outs, lses)
    return sum(outs[1:], outs[0]) / outs[0].dtype.type(len(outs)), lse


def lse_of_largest(outs: Any, lses: Any) -> Any:
    out, _ = MERGE(outs, lses)
    return out, np.max(np.stack(lses), axis=0)


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
    mutant("no-groups", "agreement", "windows mix dilation groups",
           replacing(ATTEND, na_mask=replacing(MASK, axis_mask=without_groups))),
    mutant("first-axis-fastest", "agreement", "the axes are flattened in the wrong order",
           replacing(ATTEND, na_mask=first_axis_fastest)),
    mutant("extra-in-front", "lengths", "additional keys are taken from the front",
           altering(ATTEND, extra_in_front)),
    mutant("extra-by-window", "lengths", "the last queries do not see the additional keys",
           extra_by_window),
    mutant("symmetric-inverse", "gradient", "dv gathers from the key's own window", ATTEND,
           backward=symmetric_inverse),
    mutant("first-of-group", "gradient", "dk and dv are those of the first head of the group",
           ATTEND, backward=replacing(BACKWARD, dense=type("Dense", (), {
               "attend_backward": staticmethod(
                   replacing(dense.attend_backward, sum_groups=first_of_group))}))),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
           backward=altering(BACKWARD, no_lse_gradient)),
    of("axis_window", "window-cut", "agreement", "windows are cut at borders", cut_at_borders),
    of("axis_mask", "mask-without-groups", "agreement", "windows mix dilation groups",
       without_groups),
    of("na_mask", "mask-flattened", "agreement", "the axes are flattened in the wrong order",
       first_axis_fastest),
    of("na_qk", "no-scale", "agreement", "scores are not scaled", altering(QK, no_scale)),
    of("na_qk", "window-backwards", "agreement", "window entries come last to first",
       spoiling(QK, window_backwards)),
    of("na_qk", "zero-behind-the-end", "agreement", "scores behind a causal end are 0",
       spoiling(QK, zero_behind_the_end)),
    of("na_av", "reads-behind-the-end", "agreement", "weights behind a causal end are read",
       replacing(AV, _over_tokens=reads_behind_the_end)),
    of("token_permute", "groups-backwards", "agreement", "the dilation groups come last to first",
       strided_runs),
    of("token_unpermute", "permuted-again", "agreement", "the inverse is the permutation itself",
       permuted_again),
    of("merge_attentions", "plain-average", "agreement", "parts count alike, whatever their lse",
       plain_average),
    of("merge_attentions", "lse-of-largest", "agreement", "the merged lse is the largest one",
       lse_of_largest),
)  # fmt: skip
