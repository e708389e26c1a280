"""TransNormerLLM's attention: clauses S6, S7, S9, S10 and S13 of `lightning_attention_1`.

The recurrence is that of Lightning Attention-2, whose functions do the work. What is added are the
slopes of a layer, with the paper's own rule beside that of its code, and the form without decay.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_choice,
    check_integer,
    check_size,
)
from attnspec.reference.linear import lightning_attention_2 as lightning
from attnspec.reference.linear.lightning_attention_2_chunks import check_slopes
from attnspec.reference.linear.lightning_attention_2_tokens import attend_recurrent

DECAY_RULES = ("geometric", "linear")


def slopes(H: int) -> np.ndarray:
    """S7: the base slopes (H,) of H heads, float64.

    >>> slopes(2), slopes(3)
    (array([0.0625    , 0.00390625]), array([0.0625    , 0.00390625, 0.25      ]))
    """
    check_integer("H", H, least=1)
    return lightning.slopes(H)


def layer_slopes(H: int, l: int, L: int, *, decay_rule: str = "geometric") -> np.ndarray:
    """S7: the slopes (H,) of layer `l` of `L`, float64; `decay_rule` "linear" is the paper's.

    >>> layer_slopes(2, 1, 2) == slopes(2) * 1e-5
    array([ True,  True])
    >>> layer_slopes(2, 0, 2, decay_rule="linear")
    array([4., 8.])
    """
    for name, value, least in (("H", H, 1), ("L", L, 1), ("l", l, 0)):
        check_integer(name, value, least=least)
    if l >= L:
        raise ValueError(f"l: got {l}, expected an integer below {L} (L)")
    check_choice("decay_rule", decay_rule, DECAY_RULES)
    if decay_rule == "linear":
        return 8.0 * np.arange(1, H + 1) / H * (1 - l / L)
    return lightning.layer_slopes(H, l, L)


def decay_attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, slopes: np.ndarray, S0: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """S6: o (..., H, T, e) and the last state S (..., H, d', e), token by token.

    q and k (..., H, T, d'), v (..., H, T, e), slopes (H,), S0 (..., H, d', e).

    >>> x = np.ones((1, 2, 1))
    >>> o, S = decay_attend(x, x, x, np.array([np.log(2.0)]))
    >>> o.ravel(), S.ravel()
    (array([1. , 1.5]), array([1.5]))
    """
    _check(q, k, v, slopes)
    return attend_recurrent(q, k, v, slopes, S0)


def decay_attend_recurrence_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    slopes: np.ndarray,
    S0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S10: dq, dk, dv, dslopes (H,), dS0 of `decay_attend`, all of them.

    >>> x = np.ones((1, 2, 1))
    >>> decay_attend_recurrence_backward(x, x, x, np.zeros(1), None, x)[3]
    array([-1.])
    """
    _check(q, k, v, slopes)
    return lightning.attend_backward(q, k, v, slopes, S0, do, dS)


def decay_attend_tiled(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    slopes: np.ndarray,
    block: int,
    S0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S9: what `decay_attend` returns, by blocks of `block` rows, of which the last may be short.

    >>> x = np.ones((1, 3, 1))
    >>> [y.ravel() for y in decay_attend_tiled(x, x, x, np.zeros(1), 2)]
    [array([1., 2., 3.]), array([3.])]
    """
    _check(q, k, v, slopes)
    return lightning.attend(q, k, v, slopes, S0, block=block)


def decay_attend_tiled_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    slopes: np.ndarray,
    block: int,
    S0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S10: dq, dk, dv, dslopes (H,), dS0 of `decay_attend_tiled`.

    >>> x = np.ones((1, 2, 1))
    >>> decay_attend_tiled_backward(x, x, x, np.zeros(1), 1, None, x)[0].ravel()
    array([1., 2.])
    """
    _check(q, k, v, slopes)
    return lightning.attend_backward(q, k, v, slopes, S0, do, dS, block=block)


def decay_attend_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, slopes: np.ndarray, do: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S10: dq, dk, dv from a zero state, the state behind the last token unused.

    >>> x = np.ones((1, 2, 1))
    >>> [g.ravel() for g in decay_attend_backward(x, x, x, np.zeros(1), x, 1)]
    [array([1., 2.]), array([2., 1.]), array([2., 1.])]
    """
    _check(q, k, v, slopes)
    return lightning.attend_backward(q, k, v, slopes, None, do, block=block)[:3]


def norm_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S9: o (..., H, T, e), the causal product without a decay and without the norm behind it.

    >>> x = np.ones((1, 3, 1))
    >>> norm_attention(x, x, x).ravel()
    array([1., 2., 3.])
    """
    none = _no_slopes(q, k, v)
    return lightning.attend(q, k, v, none)[0]


def norm_attention_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S10: dq, dk, dv of `norm_attention`.

    >>> x = np.ones((1, 2, 1))
    >>> norm_attention_backward(x, x, x, x)[1].ravel()
    array([2., 1.])
    """
    none = _no_slopes(q, k, v)
    return lightning.attend_backward(q, k, v, none, None, do)[:3]


def _no_slopes(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    _check_heads(q, k, v)
    return np.zeros_like(q, shape=q.shape[-3])


def _check(q: np.ndarray, k: np.ndarray, v: np.ndarray, slopes: np.ndarray) -> None:
    """K14: heads and tokens of q, k and v are the same, and each head has its slope."""
    _check_heads(q, k, v)
    check_slopes(slopes, q.shape[-3], "slopes")


def _check_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-3], q.shape[-3], "heads, as in q")
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
