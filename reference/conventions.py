"""The rulebook. Every chapter, contract and kernel cites these rules as K1..K14.

The rules that decide a number are functions here, so that they are stated once and executed
everywhere; the others are prose in `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np

RULES = {
    "K1": "Layouts are q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d) and "
    "v (batch, kv_heads, k_tokens, dv). The reference accepts any leading axes.",
    "K2": "The scale of a dot product defaults to 1/sqrt(d).",
    "K3": "Causal is aligned at the bottom right: query i sees key j iff "
    "j <= i + (k_tokens - q_tokens).",
    "K4": "A row that sees nothing has output exactly 0, lse -inf and gradient 0. A sink logit or "
    "a prefix counts as something seen.",
    "K5": "lse, the log of the softmax denominator, is a natural logarithm.",
    "K6": "Ties go to the lower index. A selection is returned sorted ascending.",
    "K7": "Grouped heads are contiguous: query head h reads kv head h // (heads / kv_heads).",
    "K8": "A window of w keeps w keys, the query's own included; a paper that counts otherwise is "
    "converted, and its chapter says so.",
    "K9": "How a budget is rounded is written in the chapter. Asking for more than there is means "
    "all there is.",
    "K10": "The reference computes in the dtype it is given; truth is float64. A fast path "
    "accumulates in float32, and float32 means IEEE float32, never TF32.",
    "K11": "NaN or Inf stored where a mask forbids reading never reaches an output.",
    "K12": "Inputs are never changed. The reference returns state as a new value; a fast state "
    "object says what it updates in place.",
    "K13": "Positions are absolute unless the name says cache-relative. The number of rows kept is "
    "never used as a position.",
    "K14": "Bad input raises TypeError or ValueError naming the argument, what came and what was "
    "expected, before any kernel is launched. What is not declared raises; nothing falls back.",
}


def default_scale(d: int) -> float:
    """K2: the scale 1/sqrt(d) of a dot product of width `d`.

    >>> default_scale(64)
    0.125
    """
    return 1.0 / math.sqrt(d)


def causal_mask(q_tokens: int, k_tokens: int) -> np.ndarray:
    """K3: bool (q_tokens, k_tokens), True where a query may look.

    >>> causal_mask(2, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 1]])
    """
    query, key = np.arange(q_tokens)[:, None], np.arange(k_tokens)[None, :]
    return key <= query + (k_tokens - q_tokens)


def group_size(heads: int, kv_heads: int) -> int:
    """K7: how many query heads share a kv head; ValueError unless it is a whole number.

    >>> group_size(8, 2)
    4
    """
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"k: got {kv_heads} kv heads for {heads} query heads, expected a divisor of {heads}"
        )
    return heads // kv_heads


def repeat_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """K7: (..., kv_heads, tokens, d) to (..., heads, tokens, d), each kv head `group` times.

    >>> repeat_heads(np.array([[[1.0]], [[2.0]]]), 4).ravel()
    array([1., 1., 2., 2.])
    """
    return np.repeat(x, group_size(heads, x.shape[-3]), axis=-3)


def check_array(name: str, x: Any, axes: Sequence[str], dtype: str = "float") -> None:
    """K14: `x` is an array of at least ``len(axes)`` axes whose dtype is `dtype`.

    `dtype` is "float", "int" or "bool". The leading axes are free (K1).

    >>> check_array("q", np.zeros(3), ("queries", "d"))
    Traceback (most recent call last):
    ValueError: q: got shape (3,), expected (..., queries, d)
    """
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: got {type(x).__name__}, expected numpy.ndarray")
    if x.ndim < len(axes):
        raise ValueError(f"{name}: got shape {x.shape}, expected (..., {', '.join(axes)})")
    kinds = {"float": "f", "int": "iu", "bool": "b"}
    if x.dtype.kind not in kinds[dtype]:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a {dtype} dtype")


def check_shaped(name: str, x: Any, shape: tuple[int, ...]) -> None:
    """K14: argument `name` is a float array of exactly this shape.

    >>> check_shaped("dout", np.zeros(3), (2,))
    Traceback (most recent call last):
    ValueError: dout: got shape (3,), expected (2,)
    """
    check_array(name, x, ())
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: got shape {x.shape}, expected {tuple(shape)}")


def check_size(name: str, got: int, expected: int, what: str) -> None:
    """K14: one axis of argument `name` has the size another argument gives it.

    >>> check_size("k", 3, 4, "d, as in q")
    Traceback (most recent call last):
    ValueError: k: got 3, expected 4 (d, as in q)
    """
    if got != expected:
        raise ValueError(f"{name}: got {got}, expected {expected} ({what})")


def check_integer(name: str, value: Any, least: int) -> None:
    """K14: `value` is an integer, not a bool, and at least `least`.

    >>> check_integer("window", 0, least=1)
    Traceback (most recent call last):
    ValueError: window: got 0, expected an integer >= 1
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: got {value!r}, expected an integer >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected an integer >= {least}")


def check_bool(name: str, value: Any) -> None:
    """K14: `value` is True or False.

    >>> check_bool("causal", 1)
    Traceback (most recent call last):
    TypeError: causal: got 1, expected True or False
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_scale(scale: Any) -> None:
    """K2, K14: `scale` is a finite number, or None for the default.

    >>> check_scale(np.inf)
    Traceback (most recent call last):
    ValueError: scale: got inf, expected a finite number or None
    """
    if scale is None:
        return
    if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, Real):
        raise TypeError(f"scale: got {scale!r}, expected a finite number or None")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number or None")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """K14: `value` is one of `choices`.

    >>> check_choice("pool", "median", ("avg", "max"))
    Traceback (most recent call last):
    ValueError: pool: got 'median', expected one of 'avg', 'max'
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_offsets(name: str, offsets: np.ndarray, total: int) -> list[slice]:
    """K14: `offsets` (sequences + 1) increase from 0 to `total`; the rows of each sequence.

    >>> check_offsets("q_offsets", np.array([0, 2, 2]), 2)
    [slice(0, 2, None), slice(2, 2, None)]
    >>> check_offsets("q_offsets", np.array([0, 3]), 4)
    Traceback (most recent call last):
    ValueError: q_offsets: got [0, 3], expected offsets that increase from 0 to 4
    """
    check_array(name, offsets, ("sequences + 1",), dtype="int")
    ends_right = len(offsets) >= 2 and offsets[0] == 0 and offsets[-1] == total
    if not ends_right or np.any(np.diff(offsets) < 0):
        raise ValueError(
            f"{name}: got {offsets.tolist()}, expected offsets that increase from 0 to {total}"
        )
    return [slice(first, last) for first, last in pairwise(offsets.tolist())]


def check_lengths(lengths: np.ndarray, leading: tuple[int, ...], tokens: int) -> None:
    """K14: `lengths`, the real tokens of sequences padded on the right to `tokens`, are integers of
    0 to `tokens` with the leading axes of the sequences.

    >>> check_lengths(np.array([2, 5]), (2,), 4)
    Traceback (most recent call last):
    ValueError: lengths: got [2, 5], expected 0 to 4 tokens
    """
    check_array("lengths", lengths, (), dtype="int")
    if lengths.shape != leading:
        raise ValueError(f"lengths: got shape {lengths.shape}, expected {leading}, as q")
    if np.any((lengths < 0) | (lengths > tokens)):
        raise ValueError(f"lengths: got {lengths.tolist()}, expected 0 to {tokens} tokens")


def check_attention_inputs(q: Any, k: Any, v: Any) -> None:
    """K1, K7, K14: q, k and v fit one another.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape.
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_array("k", k, ("kv_heads", "k_tokens", "d"))
    check_array("v", v, ("kv_heads", "k_tokens", "dv"))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {q.dtype}, as q")
        if x.shape[:-3] != q.shape[:-3]:
            raise ValueError(
                f"{name}: got leading axes {x.shape[:-3]}, expected {q.shape[:-3]}, as q"
            )
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    check_size("v", v.shape[-3], k.shape[-3], "kv_heads, as in k")
    check_size("v", v.shape[-2], k.shape[-2], "k_tokens, as in k")
    group_size(q.shape[-3], k.shape[-3])


def check_continues(state: Any, k: np.ndarray, v: np.ndarray) -> None:
    """K14: new keys and values have the shapes of those in `state` but for tokens."""
    for name, cached, new in (("k", state.k, k), ("v", state.v, v)):
        if cached.shape[:-2] != new.shape[:-2] or cached.shape[-1] != new.shape[-1]:
            raise ValueError(
                f"{name}: got shape {new.shape}, expected the state's {cached.shape} but for tokens"
            )
