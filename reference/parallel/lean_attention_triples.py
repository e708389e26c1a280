r"""Lean attention, the triples: the clauses S1 and S2 of `lean_attention`.

A triple is what a worker knows of a row after some of its keys: the largest score, the sum of the
weights relative to it, and the output not yet divided by that sum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size, default_scale


class Triple(NamedTuple):
    """S1: maximum m (..., rows), sum l (..., rows), output o (..., rows, dv) before division."""

    m: np.ndarray
    l: np.ndarray
    o: np.ndarray


def partial(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lo: int,
    hi: int,
    scale: float | None = None,
    mask: np.ndarray | None = None,
) -> Triple:
    """S1: the triple of keys lo .. hi - 1 for q (..., rows, d), k (..., Tk, d), v (..., Tk, dv).

    `mask` bool (..., rows, Tk), True = visible. A value no row sees is not read (K11).

    >>> partial(np.zeros((1, 2)), np.zeros((3, 2)), np.array([[1.0], [2.0], [9.0]]), 0, 2)
    Triple(m=array([0.]), l=array([2.]), o=array([[3.]]))
    """
    check_array("q", q, ("rows", "d"))
    check_array("k", k, ("Tk", "d"))
    check_array("v", v, ("Tk", "dv"))
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    check_size("v", v.shape[-2], k.shape[-2], "Tk, as in k")
    check_integer("lo", lo, least=0)
    check_integer("hi", hi, least=lo)
    if hi > k.shape[-2]:
        raise ValueError(f"hi: got {hi}, expected an integer <= {k.shape[-2]} (Tk)")
    scale = default_scale(q.shape[-1]) if scale is None else scale
    x = scale * (q @ np.swapaxes(k[..., lo:hi, :], -1, -2))
    values = v[..., lo:hi, :]
    if mask is not None:
        check_array("mask", mask, ("rows", "Tk"), dtype="bool")
        check_size("mask", mask.shape[-1], k.shape[-2], "Tk, as in k")
        if mask.shape[-2] != 1:
            check_size("mask", mask.shape[-2], q.shape[-2], "rows, as in q")
        seen = mask[..., lo:hi]
        x = np.where(seen, x, -np.inf)
        values = np.where(np.any(seen, axis=-2)[..., None], values, 0.0)
    m = np.max(x, axis=-1, initial=-np.inf)
    weights = np.exp(x - _finite(m)[..., None])
    return Triple(m, np.sum(weights, axis=-1), weights @ values)


def merge(a: Triple, b: Triple) -> Triple:
    """S2: the triple of the union of two disjoint sets of keys.

    >>> unit = Triple(np.array([-np.inf]), np.array([0.0]), np.array([[0.0]]))
    >>> merge(unit, Triple(np.array([1.0]), np.array([2.0]), np.array([[3.0]])))
    Triple(m=array([1.]), l=array([2.]), o=array([[3.]]))
    """
    for name, triple in (("a", a), ("b", b)):
        for field, x in zip(Triple._fields, triple, strict=True):
            check_array(f"{name}.{field}", x, ())
        _check_triple(*triple, f"{name}.")
    for field, x, y in zip(Triple._fields, a, b, strict=True):
        if y.shape != x.shape:
            raise ValueError(f"b.{field}: got shape {y.shape}, expected {x.shape}, as a.{field}")
    m = np.maximum(a.m, b.m)
    scale_a, scale_b = np.exp(a.m - _finite(m)), np.exp(b.m - _finite(m))
    total = scale_a * a.l + scale_b * b.l
    return Triple(m, total, scale_a[..., None] * a.o + scale_b[..., None] * b.o)


def finalize(
    m: np.ndarray,
    l: np.ndarray,
    o: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """S2: out (..., rows, dv) and lse (..., rows) of a triple.

    >>> finalize(np.array([-np.inf]), np.array([0.0]), np.array([[0.0]]))
    (array([[0.]]), array([-inf]))
    """
    check_array("m", m, ("rows",))
    check_array("l", l, ("rows",))
    check_array("o", o, ("rows", "dv"))
    _check_triple(m, l, o)
    empty = l == 0
    total = np.where(empty, 1.0, l)
    return np.where(empty[..., None], 0.0, o / total[..., None]), m + np.log(total)


def _check_triple(m: np.ndarray, l: np.ndarray, o: np.ndarray, prefix: str = "") -> None:
    """K14: the sums and outputs have the rows of the maxima."""
    for field, x, rows in (("l", l, l.shape), ("o", o, o.shape[:-1])):
        if rows != m.shape:
            raise ValueError(
                f"{prefix}{field}: got shape {x.shape}, expected rows {m.shape}, as in {prefix}m"
            )


def _finite(m: np.ndarray) -> np.ndarray:
    """m, with 0 for -inf: a reference that makes every factor e^(-inf - m) zero, never NaN."""
    return np.where(np.isneginf(m), 0.0, m)
