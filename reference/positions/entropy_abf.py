r"""Entropy-ABF: rotate more slowly, and sharpen rows in step with how far they can look.

Beyond the length a model was trained on, attention spreads over ever more keys and its entropy
grows, except in the first two layers, which are nearly uniform by nature. Entropy-ABF raises the
base of the rotary position embedding (adjusted base frequency, ABF), and in all layers but the
first two multiplies the logits of a query by the logarithm of its position to the base of the
training length. Nothing is scaled inside the old window; beyond it the entropy stays level.

Definition
----------
S1. **Frequencies.** :math:`\theta_m = \text{base}^{-2m/d}` for m = 0..d/2-1, base 500000.

S2. **Rotate.** The pair :math:`(x_m, x_{m + d/2})` is turned by the angle position times
:math:`\theta_m`: q and k, in every layer.

S3. **Row scale.** :math:`\lambda_i = \max(\text{floor}, \ln(p_i + 1) / \ln c)` for a query at
position :math:`p_i`, counted from 0, with the training length c = 4096 and floor 1: exactly 1 up to
position c - 1, and 2 at :math:`c^2 - 1`. A position below 0 counts as 0.

S4. **Exempt layers.** In the layers before n_exempt = 2, counted from 0, :math:`\lambda = 1`.

S5. **Logits.** :math:`z_{ij} = \lambda_i\, rot(q_i) \cdot rot(k_j) / \sqrt d`. The scale is a
function of the query's absolute position (K13), not of how many keys it sees; it multiplies the
rotated query, so that cached keys are rotated but not scaled and decoding equals prefill.

S6. **Attend.** A key is visible if its position is at most the query's, wherever it lies, and if
the key mask allows it. Softmax over the visible keys, then the weighted sum of the values; a row
that sees nothing is 0 (K4). Without positions keys stand at 0..S-1 and queries at the last T of
them (K3). Documents packed with positions that start again need a mask besides.

S7. **Gradient.** That of dense attention in the rotated and scaled queries and the rotated keys,
turned back: :math:`dq_i = \lambda_i\, rot^{-1}(\cdot)`, :math:`dk_j = rot^{-1}(\cdot)`.

S1 to S4 are computed in `entropy_abf_rotation`, the order of S6 in `entropy_abf_masks`. S8, the
entropy probe, is in `entropy_abf_probe`; the variants that the paper compares with are S9 to S11,
beside the rotation.

Complexity
----------
One multiplication for each query beside rotary attention.

Paper and code
--------------
The paper exempts the first two layers. The authors' code means to, but both of its attention
functions call the scaled rotation whatever the layer, so that all layers are scaled as released:
``n_exempt=0`` reproduces it. Their base and training length are constants, the factor that their
configuration asks for is not used, and their scale is cast to the dtype of q. ``causal=False`` and
``freqs`` are ours.

The method goes with a short fine-tuning: six steps on 100 long conversations take a model of 4096
tokens to 16384 (sets of 1000 and 3500 are compared); without any it may be used as well.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_attention_inputs
from attnspec.reference.dense import attention as dense
from attnspec.reference.positions.entropy_abf_masks import default_positions, visible
from attnspec.reference.positions.entropy_abf_probe import attention_entropy, entropy_growth
from attnspec.reference.positions.entropy_abf_rotation import (
    layer_is_exempt,
    rope_frequencies,
    rope_rotate,
    rope_rotate_backward,
    row_scale,
)
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.spec import PATTERNS, PHASES, Coverage, Mechanism, Operation, Paper


def logits(
    q: np.ndarray,
    k: np.ndarray,
    pq: np.ndarray | None = None,
    pk: np.ndarray | None = None,
    *,
    layer: int,
    base: float = 500000.0,
    c: float = 4096,
    n_exempt: int = 2,
    floor: float = 1.0,
    freqs: np.ndarray | None = None,
) -> np.ndarray:
    """S1-S5: logits (..., heads, T, S), not masked.

    q (..., heads, T, d), k (..., kv_heads, S, d), d even; `pq` int (T) or (..., T), `pk` int (S) or
    (..., S); `freqs` (d/2) takes the place of those of `base`.

    >>> x = np.zeros((1, 2, 2)) + np.array([1.0, 0.0])
    >>> logits(x, x, np.array([0, 63]), np.array([0, 63]), layer=2, c=8)[0].diagonal().round(4)
    array([0.7071, 1.4142])
    """
    check_attention_inputs(q, k, k)
    pq, pk = default_positions(q, k, pq, pk)
    freqs = _frequencies(q, base, freqs)
    lam = _scale_of_rows(q, pq, layer, c, n_exempt, floor)
    return dense.score(lam * rope_rotate(q, pq, freqs), rope_rotate(k, pk, freqs))


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pq: np.ndarray | None = None,
    pk: np.ndarray | None = None,
    *,
    layer: int,
    base: float = 500000.0,
    c: float = 4096,
    n_exempt: int = 2,
    floor: float = 1.0,
    freqs: np.ndarray | None = None,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S6: output (..., heads, T, dv) and weights P (..., heads, T, S), which S8 probes.

    Arguments as in `logits` and `visible`; v (..., kv_heads, S, dv).

    >>> x = np.ones((1, 2, 2))
    >>> attend(x, x, x, layer=2)[1].round(4)
    array([[[1.   , 0.   ],
            [0.343, 0.657]]])
    """
    check_attention_inputs(q, k, v)
    z = logits(
        q, k, pq, pk, layer=layer, base=base, c=c, n_exempt=n_exempt, floor=floor, freqs=freqs
    )
    P = softmax(z, visible(*default_positions(q, k, pq, pk), causal, key_mask))
    return dense.combine(P, v), P


def extended_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pq: np.ndarray | None = None,
    pk: np.ndarray | None = None,
    *,
    layer: int,
    base: float = 500000.0,
    c: float = 4096,
    n_exempt: int = 2,
    floor: float = 1.0,
    freqs: np.ndarray | None = None,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S6: output (..., heads, T, dv) and lse (..., heads, T) of the scaled logits (K5).

    Arguments as in `attend`, whose weights need not be stored here.

    >>> x = np.ones((1, 2, 2))
    >>> extended_attention(x, x, x, layer=2)[1].round(4)
    array([[1.4142, 1.8342]])
    """
    check_attention_inputs(q, k, v)
    pq, pk = default_positions(q, k, pq, pk)
    freqs = _frequencies(q, base, freqs)
    lam = _scale_of_rows(q, pq, layer, c, n_exempt, floor)
    turned = lam * rope_rotate(q, pq, freqs), rope_rotate(k, pk, freqs)
    return dense.attend(*turned, v, mask=visible(pq, pk, causal, key_mask))


def extended_attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pq: np.ndarray | None,
    pk: np.ndarray | None,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    layer: int,
    base: float = 500000.0,
    c: float = 4096,
    n_exempt: int = 2,
    floor: float = 1.0,
    freqs: np.ndarray | None = None,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S7: gradients dq, dk, dv, shaped as q, k, v; `dlse` None means lse is not used.

    >>> one = np.ones((1, 1, 2))
    >>> [x.ravel() for x in extended_attention_backward(one, one, one, None, None, one, layer=2)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    check_attention_inputs(q, k, v)
    pq, pk = default_positions(q, k, pq, pk)
    freqs = _frequencies(q, base, freqs)
    lam = _scale_of_rows(q, pq, layer, c, n_exempt, floor)
    turned = lam * rope_rotate(q, pq, freqs), rope_rotate(k, pk, freqs)
    mask = visible(pq, pk, causal, key_mask)
    dq, dk, dv = dense.attend_backward(*turned, v, dout, dlse, mask=mask)
    dq = rope_rotate_backward(q, pq, freqs, lam * dq)
    return dq, rope_rotate_backward(k, pk, freqs, dk), dv


def _frequencies(q: np.ndarray, base: float, freqs: np.ndarray | None) -> np.ndarray:
    """S1: the frequencies given, or those of `base`, which must be right in either case."""
    own = rope_frequencies(q.shape[-1], base)
    return own if freqs is None else freqs


def _scale_of_rows(
    q: np.ndarray, pq: np.ndarray, layer: int, c: float, n_exempt: int, floor: float
) -> np.ndarray:
    """S3-S4: the scale (..., 1, T, 1) in the dtype of q."""
    lam = row_scale(pq, c, floor).astype(q.dtype)[..., None, :, None]
    return np.ones_like(lam) if layer_is_exempt(layer, n_exempt) else lam


MECHANISM = Mechanism(
    title="Entropy-ABF",
    idea="Rotate with a larger base, and sharpen a row by the logarithm of its position.",
    paper=Paper(
        title="Extending LLMs' Context Window with 100 Samples",
        authors=("Yikai Zhang", "Junlong Li", "Pengfei Liu"),
        year=2024,
        arxiv="2401.07004",
        code="GAIR-NLP/Entropy-ABF",
    ),
    operations=(
        Operation(rope_frequencies, clauses=("S1",)),
        Operation(
            rope_rotate, clauses=("S2",), gradient=rope_rotate_backward, differentiable=("x",)
        ),
        Operation(row_scale, clauses=("S3",)),
        Operation(layer_is_exempt, clauses=("S4",)),
        Operation(logits, clauses=("S1", "S2", "S3", "S4", "S5")),
        Operation(attend, clauses=("S1", "S2", "S3", "S4", "S5", "S6")),
        Operation(
            extended_attention,
            clauses=("S1", "S2", "S3", "S4", "S5", "S6"),
            gradient=extended_attention_backward,
            differentiable=("q", "k", "v"),
        ),
        Operation(attention_entropy, clauses=("S8",)),
        Operation(entropy_growth, clauses=("S8",)),
    ),
    headline="extended_attention",
    coverage=Coverage(
        patterns=PATTERNS, phases=PHASES, paddings=("none", "left", "right"), gradient=True
    ),
)
