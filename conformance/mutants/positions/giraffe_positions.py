"""Wrong kernels of Giraffe's positions: steps in another order, other pairs, other amplitudes."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, replacing, right, spoiling
from attnspec.reference.positions import giraffe_rotation, giraffe_xpos

BASIS = right("giraffe.rope_basis")
PLACES = right("giraffe.positions")
RANDOM = right("giraffe.random_positions")
HALF_SPLIT = right("giraffe.rotate_half_split")
INTERLEAVED = right("giraffe.rotate_interleaved")
SCALE = right("giraffe.xpos_scale")
XPOS = right("giraffe.xpos")
XPOS_BACKWARD = giraffe_xpos.xpos_backward


def bend(f: Any, power: float) -> Any:
    return f * (1 - np.arange(len(f)) / len(f)) ** power


def truncated_first(
    d: int, base: float = 10000.0, scale: float = 1.0, power: float = 0.0, truncate: float = 0.0
) -> Any:
    """The cuts are made before the frequencies are divided by the scale."""
    return bend(BASIS(d, base, truncate=truncate) / max(scale, 1.0), power)


def power_last(
    d: int, base: float = 10000.0, scale: float = 1.0, power: float = 0.0, truncate: float = 0.0
) -> Any:
    return bend(BASIS(d, base, scale, 0.0, truncate), power)


def stretched(
    d: int, base: float = 10000.0, scale: float = 1.0, power: float = 0.0, truncate: float = 0.0
) -> Any:
    """A scale below 1 is divided by too."""
    return BASIS(d, base, 1.0, power, truncate if scale >= 1 else truncate * scale) / scale


def without_band(
    d: int, base: float = 10000.0, scale: float = 1.0, power: float = 0.0, truncate: float = 0.0
) -> Any:
    """All frequencies below the cut are 0, as the authors describe them."""
    f = BASIS(d, base, scale, power)
    return np.where(f >= 2 * np.pi / truncate, f, 0.0) if truncate > 0 else f


def cut_exclusive(
    d: int, base: float = 10000.0, scale: float = 1.0, power: float = 0.0, truncate: float = 0.0
) -> Any:
    """A frequency exactly at the cut is not kept."""
    return BASIS(d, base, scale, power, truncate * (1 - 1e-15) if truncate > 0 else 0.0)


def always_rescaled(u: Any) -> Any:
    p = np.cumsum(2 * u, axis=-1)
    return p * (u.shape[-1] / p[..., -1:]) if u.shape[-1] else p


def never_rescaled(u: Any) -> Any:
    return np.cumsum(2 * u, axis=-1)


def rescaled_together(u: Any) -> Any:
    """One factor for the whole batch."""
    p = np.cumsum(2 * u, axis=-1)
    return p * (u.shape[-1] / max(p.max(), u.shape[-1])) if p.size else p


def from_zero(u: Any) -> Any:
    """The first position is 0."""
    p = RANDOM(u)
    return p - p[..., :1]


def end_of_table(x: Any, p: Any, f: Any) -> Any:
    """Tables made for 2048 positions: those beyond read the last row."""
    return HALF_SPLIT(x, np.minimum(p, 2047), f)


def coarse(x: Any, p: Any, f: Any) -> Any:
    """Angles are rounded to eight bits before the cosine."""
    fraction, exponent = np.frexp(p[..., None, :, None] * f)
    return giraffe_rotation.rotate(x, np.ldexp(np.round(fraction * 256) / 256, exponent))


def other_way(x: Any, p: Any, f: Any) -> Any:
    return HALF_SPLIT(x, -p, f)


def not_turned_back(x: Any, p: Any, f: Any, dout: Any) -> Any:
    return dout


def key_grown(d: int, p: Any, N: int, b: float = 512) -> Any:
    return 1 / SCALE(d, p, N, b)


def uncentred(d: int, p: Any, N: int, b: float = 512) -> Any:
    """The exponent is the position itself."""
    return SCALE(d, p, 1, b)


def centred_exactly(d: int, p: Any, N: int, b: float = 512) -> Any:
    """Half of an odd N is not rounded down."""
    return SCALE(d, p - (N % 2) / 2, N, b)


def half_amplitudes(d: int, p: Any, N: int, b: float = 512) -> Any:
    return SCALE(d, p, N, b).astype(np.float16).astype(np.float64)


def over_m(d: int, p: Any, N: int, b: float = 512) -> Any:
    """zeta counts pairs, not channels."""
    zeta = (np.arange(d // 2) + 0.4 * d) / (1.4 * d)
    return zeta ** ((p.astype(np.float64) - N // 2) / b)[..., None]


def whole_table_at_its_end(q: Any, k: Any, pq: Any, pk: Any, *, N: int, **options: Any) -> Any:
    """A slice that ends with the table is not taken: the last position reads the first row."""
    pq, pk = (np.where(p == N - 1, 0, p) for p in (pq, pk))
    return XPOS(q, k, pq, pk, N=N, **options)


def both_grown(q: Any, k: Any, pq: Any, pk: Any, *, N: int, b: float = 512,
               base: float = 10000.0) -> Any:  # fmt: skip
    """Keys grow as queries do: the product depends on where the two are, not how far apart."""
    keys_as_queries, _ = XPOS(k, k, pk, pk, N=N, b=b, base=base)
    return XPOS(q, k, pq, pk, N=N, b=b, base=base)[0], keys_as_queries


def halves_turned(q: Any, k: Any, pq: Any, pk: Any, **options: Any) -> Any:
    """xPos on half-split pairs."""
    return replacing(XPOS, rotate_interleaved=HALF_SPLIT)(q, k, pq, pk, **options)


def gradient_without_amplitudes(
    q: Any, k: Any, pq: Any, pk: Any, dq_out: Any, dk_out: Any, *, N: int, b: float = 512,
    base: float = 10000.0,
) -> Any:  # fmt: skip
    return XPOS_BACKWARD(q, k, pq, pk, dq_out, dk_out, N=N, b=1e12, base=base)


def step(name: str, operation: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"giraffe.{name}", f"giraffe.{operation}", law, bug, call, **rest)


def basis(name: str, bug: str, call: Any) -> Mutant:
    return step(name, "rope_basis", "agreement", bug, call)


MUTANTS = (
    basis("truncated-first", "frequencies are cut before they are divided", truncated_first),
    basis("power-last", "frequencies are cut before they are bent", power_last),
    basis("stretched", "a scale below 1 is not ignored", stretched),
    basis("no-band", "there is no band between kept and 0", without_band),
    basis("cut-exclusive", "a frequency at the cut is not kept", cut_exclusive),
    step("from-one", "positions", "agreement", "the first position is 1",
         spoiling(PLACES, lambda p: p + 1)),
    step("always-rescaled", "random_positions", "agreement", "positions are stretched as well",
         always_rescaled),
    step("never-rescaled", "random_positions", "agreement", "positions run beyond T",
         never_rescaled),
    step("rescaled-together", "random_positions", "batch", "one factor serves the batch",
         rescaled_together),
    step("from-zero", "random_positions", "agreement", "the first position is 0", from_zero),
    step("bfloat16-angles", "rotate_half_split", "agreement", "angles are rounded to eight bits",
         coarse),
    step("table-end", "rotate_half_split", "agreement", "a table is read beyond its end",
         end_of_table),
    step("other-way", "rotate_half_split", "agreement", "the rotation has the other sign",
         other_way),
    step("onwards", "rotate_half_split", "gradient", "the gradient is turned on, not back",
         HALF_SPLIT, backward=lambda x, p, f, dout: HALF_SPLIT(dout, p, f)),
    step("half-split", "rotate_interleaved", "agreement", "half-split pairs on interleaved weights",
         HALF_SPLIT),
    step("not-back", "rotate_interleaved", "gradient", "the gradient is not turned back",
         INTERLEAVED, backward=not_turned_back),
    step("uncentred", "xpos_scale", "agreement", "the exponent is not centred", uncentred),
    step("centred-exactly", "xpos_scale", "agreement", "an odd N is halved exactly",
         centred_exactly),
    step("pairs-for-channels", "xpos_scale", "agreement", "zeta counts pairs", over_m),
    step("half-amplitudes", "xpos", "agreement", "amplitudes are float16",
         replacing(XPOS, xpos_scale=half_amplitudes)),
    step("inverse", "xpos", "agreement", "queries shrink and keys grow",
         replacing(XPOS, xpos_scale=key_grown)),
    step("last-slice", "xpos", "agreement", "the last position reads the first row of the table",
         whole_table_at_its_end),
    step("keys-grow", "xpos", "agreement", "keys grow as queries do", both_grown),
    step("xpos-half-split", "xpos", "agreement", "xPos on half-split pairs", halves_turned),
    step("no-amplitudes", "xpos", "gradient", "gradients lack the amplitudes", XPOS,
         backward=gradient_without_amplitudes),
)  # fmt: skip
