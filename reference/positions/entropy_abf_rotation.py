r"""Entropy-ABF, positions: the rotation, the scale of a row, and the variants of other methods.

Everything that depends on positions alone is here: how far a pair of channels turns from token to
token, and how much sharper a query far from the start must be. Other ways to stretch a context
differ in nothing but the frequencies and a constant scale, so they are frequencies here too.

Definition
----------
S9. **Interpolation and NTK.** Position interpolation by a factor s: :math:`\theta_m / s`.
NTK-aware: the base becomes :math:`\text{base}\, s^{d / (d - 2)}`.

S10. **YaRN.** With L the old length and
:math:`g_m = \operatorname{clip}((L \theta_m / 2 \pi - 1) / 31, 0, 1)` the frequencies are
:math:`(1 - g_m)\, \theta_m / s + g_m \theta_m`, and the logits of every layer are multiplied by
:math:`(0.1 \ln s + 1)^2`.

S11. **Constant scale.** With c infinite S3 is the floor at every position: YaRN is its frequencies
with ``c=math.inf``, its factor as ``floor`` and ``n_exempt=0``; ABF alone has a floor of 1.

Paper and code
--------------
S9 and S10 are what these methods are commonly taken to be, not checked against their authors' code;
a factor s of 1 is plain rotary attention in each.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer
from attnspec.reference.primitives.rope import rotate


def check_above(name: str, value: Any, least: float, infinite: bool = False) -> None:
    """S1, S3, K14: `value` is a number above `least`, finite unless `infinite`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number > {least}")
    if not float(value) > least or (math.isinf(value) and not infinite):
        raise ValueError(f"{name}: got {value}, expected a number > {least}")


def check_positions(name: str, positions: Any, x: np.ndarray) -> None:
    """S2, K14: `positions` are int (tokens) or (..., tokens) for `x` (..., heads, tokens, d)."""
    check_array(name, positions, ("tokens",), dtype="int")
    whole = (*x.shape[:-3], x.shape[-2])
    if positions.shape not in (whole, whole[-1:]):
        raise ValueError(f"{name}: got shape {positions.shape}, expected {whole} or {whole[-1:]}")


def rope_frequencies(d: int, base: float = 500000.0) -> np.ndarray:
    """S1: frequencies (d/2) of an even head size `d`.

    >>> rope_frequencies(4, 10000.0)
    array([1.  , 0.01])
    """
    check_integer("d", d, least=2)
    if d % 2:
        raise ValueError(f"d: got {d}, expected an even head size")
    check_above("base", base, 1)
    return np.power(float(base), -np.arange(0, d, 2) / d)


def interpolated_frequencies(d: int, s: float, base: float = 10000.0) -> np.ndarray:
    """S9: frequencies (d/2) of position interpolation by a factor `s`.

    >>> interpolated_frequencies(4, 2.0)
    array([0.5  , 0.005])
    """
    check_above("s", s, 0)
    return rope_frequencies(d, base) / float(s)


def ntk_frequencies(d: int, s: float, base: float = 10000.0) -> np.ndarray:
    """S9: frequencies (d/2) of the NTK-aware base; the slowest is that of interpolation. With d = 2
    there is one, which is 1 whatever the base.

    >>> ntk_frequencies(4, 2.0).round(6)
    array([1.   , 0.005])
    """
    check_above("s", s, 0)
    return rope_frequencies(d, base * float(s) ** (d / (d - 2)) if d > 2 else base)


def yarn_frequencies(d: int, s: float, L: int, base: float = 10000.0) -> np.ndarray:
    """S10: frequencies (d/2) of YaRN for an old length `L`.

    >>> yarn_frequencies(4, 2.0, 4096).round(6)
    array([1.     , 0.00589])
    """
    check_above("s", s, 0)
    check_integer("L", L, least=1)
    theta = rope_frequencies(d, base)
    g = np.clip((L * theta / (2 * np.pi) - 1) / 31, 0, 1)
    return theta * (1 - g) / float(s) + theta * g


def yarn_scale(s: float) -> float:
    """S10: what YaRN multiplies all logits by.

    >>> round(yarn_scale(4.0), 4)
    1.2965
    """
    check_above("s", s, 0)
    return (0.1 * math.log(s) + 1) ** 2


def rope_rotate(x: np.ndarray, positions: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """S2: `x` (..., heads, tokens, d) turned to `positions`, int (tokens) or (..., tokens).

    `freqs` (d/2). Angles are float64; only their sines and cosines are rounded to the dtype of `x`.

    >>> rope_rotate(np.array([[[1.0, 0.0]]]), np.array([1]), np.array([np.pi / 2])).round(4)
    array([[[0., 1.]]])
    """
    check_array("x", x, ("heads", "tokens", "d"))
    check_positions("positions", positions, x)
    check_array("freqs", freqs, ("d/2",))
    if freqs.shape != (x.shape[-1] / 2,):
        raise ValueError(f"freqs: got shape {freqs.shape}, expected ({x.shape[-1]} / 2,)")
    return rotate(x, positions[..., None, :, None] * freqs.astype(np.float64))


def rope_rotate_backward(
    x: np.ndarray, positions: np.ndarray, freqs: np.ndarray, dout: np.ndarray
) -> np.ndarray:
    """S7: the gradient of `x`, which is `dout` turned back.

    >>> up, quarter = np.array([[[0.0, 1.0]]]), np.array([np.pi / 2])
    >>> rope_rotate_backward(up, np.array([1]), quarter, up).round(4)
    array([[[1., 0.]]])
    """
    return rope_rotate(dout, -positions, freqs)


def row_scale(positions: np.ndarray, c: float = 4096, floor: float = 1.0) -> np.ndarray:
    """S3: the scale, float64 and shaped as `positions` (..., tokens), of queries standing there.

    >>> row_scale(np.array([0, 4095, 16383])).round(4)
    array([1.    , 1.    , 1.1667])
    """
    check_array("positions", positions, ("tokens",), dtype="int")
    check_above("c", c, 1, infinite=True)
    check_above("floor", floor, 0)
    return np.maximum(np.log(np.maximum(positions, 0) + 1.0) / math.log(c), float(floor))


def layer_is_exempt(layer: int, n_exempt: int = 2) -> bool:
    """S4: whether `layer`, counted from 0, leaves the logits unscaled.

    >>> [layer_is_exempt(layer) for layer in range(3)]
    [True, True, False]
    """
    check_integer("layer", layer, least=0)
    check_integer("n_exempt", n_exempt, least=0)
    return bool(layer < n_exempt)
