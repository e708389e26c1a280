r"""Giraffe, positions: how far each pair of channels turns from one position to the next.

Linear, power and truncated scaling change the frequencies, randomised training the positions; what
is left is one rotation by the angle position times frequency.

Definition
----------
S1. **Linear.** :math:`\theta_m = \text{base}^{-2m/d}` for m = 0..M-1, M = d/2, and :math:`f_m =
\theta_m / s`, which is to divide the positions by s. A scale s up to 1 is ignored.

S2. **Power.** :math:`f_m \leftarrow f_m (1 - m/M)^\kappa`: the fastest pair keeps its frequency,
the slowest loses most, none becomes 0. The power :math:`\kappa = 0` changes nothing.

S3. **Truncated** at a training length :math:`T_c`, which sees the f that S1 and S2 leave. With
:math:`c = 2\pi / T_c`, the slowest frequency that completes a turn in training: :math:`f_m` stays
from c on, becomes c/16 from c/8 on, and is 0 below: such a pair does not turn at all. Of the 64
pairs of d = 128, :math:`T_c = 2048` keeps 41, gives 14 the frequency 0.0001917 and stops 9; 4096
makes that 46, 14 and 4. Without a :math:`T_c` above 0 nothing changes.

S4. **Random positions**, in training alone. From :math:`u_1..u_T` uniform in [0, 1), drawn anew for
each sequence and forward pass and shared by all heads and layers, :math:`p_t = \sum_{r \le t} 2
u_r`, all multiplied by :math:`T / \max(p_T, T)`: real numbers whose mean step is 1, whose first is
not 0 and whose last is at most T. Frequencies may be scaled besides (S1). Elsewhere positions are
0..T-1.

S5. **Rotate.** A pair of channels is turned by the angle :math:`p f_m`. Half-split: m and m + M are
a pair. Interleaved: 2m and 2m + 1 are.

S6. **Relative kernel.** Logits depend on the distance alone: a pair turned by f adds
:math:`(q_m k_m + q_{m+M} k_{m+M}) \cos((i-j) f_m) + (q_m k_{m+M} - q_{m+M} k_m) \sin((i-j) f_m)`.
What stays where each pair adds a weight :math:`w_m`: :math:`\sum_m w_m \cos((i-j) f_m)`.

Paper and code
--------------
The paper gives the cuts of S3 as symbols and the authors' description sets all slow frequencies to
0; their code has the numbers above and the band in the middle. They train with scales of 4 and 16,
of 8 for 32k tokens on a model of 4k, with powers of 0.5 and 0.1 and training lengths :math:`T_c` of
2048 and 4096; the scale of an evaluation may be larger. Their training script uses S1 or S2,
never both, though the code combines them. That a scale up to 1 is ignored, and that random
positions, which the paper describes by their steps, are only ever shrunk, is in the code alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer
from attnspec.reference.primitives.rope import rotate


def check_number(name: str, value: Any, least: float, strict: bool = False) -> None:
    """S1-S3, K14: `value` is a finite number, at least `least` or above it (`strict`)."""
    expected = f"a number {'>' if strict else '>='} {least}"
    if least == -math.inf:
        expected = "a finite number"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    inside = float(value) > least if strict else float(value) >= least
    if not inside or math.isinf(value):
        raise ValueError(f"{name}: got {value}, expected {expected}")


def check_width(name: str, d: int) -> None:
    """S5, K14: the head size of argument `name` is even and above 0."""
    if d < 2 or d % 2:
        raise ValueError(f"{name}: got d {d}, expected an even head size")


def check_places(name: str, p: Any) -> None:
    """S4, K14: `p` (..., tokens) are positions, whole or real numbers."""
    if not isinstance(p, np.ndarray):
        raise TypeError(f"{name}: got {type(p).__name__}, expected numpy.ndarray")
    if p.dtype.kind not in "iuf":
        raise TypeError(f"{name}: got dtype {p.dtype}, expected integers or real numbers")
    if p.ndim < 1:
        raise ValueError(f"{name}: got shape (), expected (..., tokens)")


def check_positions(name: str, p: Any, x: np.ndarray) -> None:
    """S5, K14: `p` is (tokens) or (..., tokens) for `x` (..., heads, tokens, d)."""
    check_places(name, p)
    whole = (*x.shape[:-3], x.shape[-2])
    if p.shape not in (whole, whole[-1:]):
        raise ValueError(f"{name}: got shape {p.shape}, expected {whole} or {whole[-1:]}")


def check_frequencies(f: Any, d: int) -> None:
    """S5, K14: `f` (d/2) has a frequency for each pair of `d` channels."""
    check_array("f", f, ("d/2",))
    if f.shape != (d / 2,):
        raise ValueError(f"f: got shape {f.shape}, expected ({d} / 2,)")


def rope_basis(
    d: int, base: float = 10000.0, scale: float = 1.0, power: float = 0.0, truncate: float = 0.0
) -> np.ndarray:
    """S1-S3: frequencies f (d/2), float64: divided by `scale`, bent by `power`, then truncated.

    >>> rope_basis(4, scale=4.0)
    array([0.25  , 0.0025])
    >>> rope_basis(8, truncate=100.0).round(5)
    array([1.     , 0.1    , 0.00393, 0.     ])
    """
    check_integer("d", d, least=2)
    check_width("d", d)
    check_number("base", base, 1, strict=True)
    check_number("scale", scale, 0, strict=True)
    check_number("power", power, 0)
    check_number("truncate", truncate, -math.inf)
    m = np.arange(d // 2)
    f = float(base) ** (-2 * m / d) / max(float(scale), 1.0)
    f = f * (1 - m / (d // 2)) ** float(power)
    if truncate <= 0:
        return f
    cut = 2 * np.pi / float(truncate)
    return np.where(f >= cut, f, np.where(f >= cut / 8, cut / 16, 0.0))


def positions(T: int) -> np.ndarray:
    """S4: the positions int (T) of evaluation.

    >>> positions(3)
    array([0, 1, 2])
    """
    check_integer("T", T, least=0)
    return np.arange(T)


def random_positions(u: np.ndarray) -> np.ndarray:
    """S4: positions (..., T) in the dtype of `u` (..., T), uniform draws of each sequence.

    >>> random_positions(np.array([0.25, 0.5, 0.25]))
    array([0.5, 1.5, 2. ])
    >>> random_positions(np.array([0.75, 0.75]))
    array([1., 2.])
    """
    check_array("u", u, ("T",))
    if not np.all((u >= 0) & (u < 1)):
        raise ValueError("u: got draws outside of it, expected [0, 1)")
    T = u.shape[-1]
    p = np.cumsum(2 * u, axis=-1)
    return p * (T / np.maximum(p[..., -1:], T)) if T else p


def rotate_half_split(x: np.ndarray, p: np.ndarray, f: np.ndarray) -> np.ndarray:
    """S5: `x` (..., heads, T, d) turned to `p` (T) or (..., T), channels m and m + d/2 a pair.

    `f` (d/2). Angles are float64; only their sines and cosines are rounded to the dtype of `x`.

    >>> x = np.array([[[1.0, 2.0, 0.0, 0.0]]])
    >>> rotate_half_split(x, np.array([1]), np.array([np.pi / 2, np.pi])).round(4)
    array([[[ 0., -2.,  1.,  0.]]])
    """
    return rotate(x, _angles(x, p, f))


def rotate_half_split_backward(
    x: np.ndarray, p: np.ndarray, f: np.ndarray, dout: np.ndarray
) -> np.ndarray:
    """S5: the gradient of `x`, which is `dout` turned back.

    >>> quarter = np.array([np.pi / 2])
    >>> rotate_half_split_backward(np.ones((1, 1, 2)), np.array([1]), quarter, np.eye(2)[None, 1:])
    array([[[1.000000e+00, 6.123234e-17]]])
    """
    return rotate_half_split(dout, -p, f)


def rotate_interleaved(x: np.ndarray, p: np.ndarray, f: np.ndarray) -> np.ndarray:
    """S5: as `rotate_half_split`, but with neighbouring channels 2m and 2m + 1 as a pair.

    >>> x = np.array([[[1.0, 0.0, 2.0, 0.0]]])
    >>> rotate_interleaved(x, np.array([1]), np.array([np.pi / 2, np.pi])).round(4)
    array([[[ 0.,  1., -2.,  0.]]])
    """
    angles = _angles(x, p, f)
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    first, second = np.split(rotate(halves, angles), 2, axis=-1)
    return np.stack([first, second], axis=-1).reshape(x.shape)


def rotate_interleaved_backward(
    x: np.ndarray, p: np.ndarray, f: np.ndarray, dout: np.ndarray
) -> np.ndarray:
    """S5: the gradient of `x`, which is `dout` turned back.

    >>> half = np.array([np.pi])
    >>> rotate_interleaved_backward(np.ones((1, 1, 2)), np.array([1]), half, np.ones((1, 1, 2)))
    array([[[-1., -1.]]])
    """
    return rotate_interleaved(dout, -p, f)


def relative_kernel(f: np.ndarray, w: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """S6: the function of distances (...) that sums :math:`w_m \\cos(delta f_m)`, `w` (d/2).

    >>> relative_kernel(rope_basis(4), np.array([0.5, 0.5]))(np.array([0, 1])).round(4)
    array([1.    , 0.7701])
    """
    check_array("f", f, ("d/2",))
    check_array("w", w, ("d/2",))
    if w.shape != f.shape:
        raise ValueError(f"w: got shape {w.shape}, expected {f.shape}, as f")
    return lambda delta: np.sum(w * np.cos(np.asarray(delta)[..., None] * f), axis=-1)


def _angles(x: np.ndarray, p: np.ndarray, f: np.ndarray) -> np.ndarray:
    """S5: angles (..., 1, T, d/2), float64."""
    check_array("x", x, ("heads", "tokens", "d"))
    check_width("x", x.shape[-1])
    check_positions("p", p, x)
    check_frequencies(f, x.shape[-1])
    return p[..., None, :, None].astype(np.float64) * f.astype(np.float64)
