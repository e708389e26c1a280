r"""Gaussian attention: weigh every entry by how probable it is under a learned Gaussian.

Each entry of a tensor is weighed by its density under Gaussians centred near the mean of its own
slice. Mean and variance along one axis come from the data; learned offsets move the centre and
learned widths stretch it. No token is scored against another, so the cost is linear: this is a
gate, light enough for an adapter on a frozen encoder, and no attention of queries to keys.

Definition
----------
x is an array of at least two axes, A one of them, n its size. Everything is element-wise along the
other axes: each fibre along A is independent.

S1. **Chunks.** h heads share A: with :math:`c = \lfloor n / h \rfloor`, head m takes entries
:math:`m c` to :math:`m c + c - 1`, and the last head the remainder too. z is a head's chunk of a
fibre, of :math:`l \ge 2` entries.

S2. **Statistics.** :math:`z^0_j = z_j` where an entry is real and 0 where it is padding;
:math:`\mu = \frac 1 l \sum_j z^0_j` and
:math:`v = \frac{1}{l - 1} \sum_j (z^0_j - \mu)^2 + \varepsilon`. Padded entries count, as zeros.

S3. **Density.** Head m has K offsets :math:`\delta_k` and K widths :math:`c_k \ne 0`. With
:math:`y_{jk} = (z_j - \mu - \delta_k) / \sqrt v`, of the raw z and the offset divided as well,
:math:`G_{jk} = e^{-y_{jk}^2 / (2 c_k^2)} / \sqrt{2 \pi c_k^2}`, and the densities are combined as
:math:`r_j = \prod_k G_{jk}`, or as the mean :math:`\frac 1 K \sum_k G_{jk}`.

S4. **Weigh.** :math:`w_j = r_j / \max(\sum_i r_i, \varepsilon)`. Padded entries take part. Where
the raw sum is below :math:`\varepsilon`, as products of narrow or of many densities soon are, the
weights sum to less than 1, down to 0; the clamp "none" divides by the sum all the same. So a
constant fibre, where v is :math:`\varepsilon` alone and an offset lies far out, has weights 0.

S5. **Apply.** :math:`o_j = z_j w_j`; a padded entry stays :math:`z_j`. The chunks are put
together again along A.

S6. **Layers.** :math:`x \leftarrow x + o(x)`, each layer with its own A, h and K. An entry equal to
the padding value is padding, looked up anew in each layer's own input: as the residual doubles a
padded entry, padding other than 0 is recognised by the first layer only.

S7. **Collapse.** A product of K Gaussians is one: with :math:`\lambda = \sum_k 1 / c_k^2` and
:math:`\delta^* = \sum_k (\delta_k / c_k^2) / \lambda`, w is the softmax of
:math:`-\lambda (z_j - \mu - \delta^*)^2 / (2 v)` wherever the clamp does not act.

S8. **Exact padding.** An option: padded entries are left out of :math:`\mu`, v (divisor one less
than the real entries, at least 1) and the sum, and have weight 0, as if they were deleted from
their chunk.

S9. **Importance.** g is the mean of the weights over all axes but one; the importance factor is
:math:`(g - \min g) / (\max g - \min g)`, and 0 if g is constant.

S10. **Gradient.** With :math:`\bar w_j = do_j z_j` where an entry is real, plus the gradient that w
itself gets: :math:`\bar r_j = w_j (\bar w_j - \sum_i w_i \bar w_i)` is the gradient of
:math:`\ln r_j`, without the sum where the clamp acts. It flows on into :math:`\delta_k`,
:math:`c_k`, :math:`z_j`, and through :math:`\mu` and v into every entry that S2 read.

Complexity
----------
:math:`O(\text{size}(x) K)`; S7 makes a product cost what K = 1 does.

Paper and code
--------------
The paper speaks of a mixture that models any distribution; the authors' code multiplies the
densities, which is one Gaussian again. We follow the code and keep the sum for the paper's claim.
In the code the argument eps lands in the place of another parameter, so that 1e-8 is always used;
ours works, with that default. Zeros counted for padding are likely a bug, kept as the default. S8,
the clamp "none" and K14's checks are ours; S9 is our reading of the paper and unverified. Offsets
start at 0 and widths at the exponential of a normal variate; the code's example has 3 layers of 4
heads and 5 Gaussians along axis 1, which is time in (batch, time, features).

The paper also puts the layer before grouped-query attention: apply `block` to the sequence, or
`multi_head` to the keys, and attend as usual; the code has no such layer. Along time a new token
changes every statistic, so there is no streaming form; along features every token stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.scores.gaussian_attention_checks import (
    check_layer,
    check_layers,
    check_mask,
    check_options,
    check_padding,
)
from attnspec.reference.scores.gaussian_attention_gradient import multi_head_backward
from attnspec.reference.scores.gaussian_attention_steps import (
    apply,
    axis_stats,
    collapse,
    importance_factor,
    log_density,
    normalise,
    split_chunks,
)
from attnspec.reference.spec import Coverage, Mechanism, Operation, Paper

Params = tuple[np.ndarray, np.ndarray]


def multi_head(
    x: np.ndarray,
    axis: int,
    params: Params,
    mask: np.ndarray | None = None,
    eps: float = 1e-8,
    clamp: str = "source",
    *,
    combine: str = "product",
    exact_mask: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S5, S8: the weighed entries and their weights, both of x's shape.

    x any array of two axes or more, `params` the offsets and the widths, each (h, K); `mask` bool,
    broadcasts to x, True = real. `axis` must hold at least two entries for each head.

    >>> x = np.array([[1.0, 2.0, 3.0, 7.0, 7.0]])
    >>> out, w = multi_head(x, 1, (np.zeros((2, 1)), np.ones((2, 1))))
    >>> w.round(3)
    array([[0.5  , 0.5  , 0.233, 0.384, 0.384]])
    """
    axis = check_layer(x, axis, params)
    check_mask(mask, x)
    check_options(eps, clamp, combine, exact_mask)
    delta, c = params
    if mask is not None:
        mask = np.broadcast_to(mask, x.shape)
    outs, weights = [], []
    for head, chunk in enumerate(split_chunks(x.shape[axis], len(delta))):
        place = (slice(None),) * axis + (slice(*chunk),)
        z, real = x[place], None if mask is None else mask[place]
        mu, var = axis_stats(z, real, eps, axis, exact_mask=exact_mask)
        logw = log_density(z, mu, var, delta[head], c[head], combine=combine)
        w = normalise(logw, eps, axis, clamp, real if exact_mask else None)
        outs.append(apply(z, w, real))
        weights.append(w)
    return np.concatenate(outs, axis=axis), np.concatenate(weights, axis=axis)


def block(
    x: np.ndarray,
    layers: Sequence[tuple[int, Params]],
    padding_value: float | None = None,
    *,
    eps: float = 1e-8,
    clamp: str = "source",
    combine: str = "product",
    exact_mask: bool = False,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """S6: x after all `layers` with residuals, and each layer's weights; pairs (axis, params).

    >>> x, one = np.array([[1.0, 2.0]]), np.ones((1, 1))
    >>> block(x, ((1, (0 * one, one)),))[0]
    array([[1.5, 3. ]])
    """
    check_layers(x, layers)
    check_padding(padding_value)
    check_options(eps, clamp, combine, exact_mask)
    weights = []
    for axis, params in layers:
        mask = None if padding_value is None else x != padding_value
        out, w = multi_head(
            x, axis, params, mask, eps, clamp, combine=combine, exact_mask=exact_mask
        )
        x = x + out
        weights.append(w)
    return x, tuple(weights)


def block_backward(
    x: np.ndarray,
    layers: Sequence[tuple[int, Params]],
    dout: np.ndarray,
    padding_value: float | None = None,
    *,
    eps: float = 1e-8,
    clamp: str = "source",
    combine: str = "product",
    exact_mask: bool = False,
) -> np.ndarray:
    """S6, S10: dx through all `layers`, the last first; which entries are padding is constant.

    >>> x, one = np.array([[1.0, 2.0]]), np.ones((1, 1))
    >>> block_backward(x, ((1, (0 * one, one)),), np.ones((1, 2))).round(3)
    array([[1.5, 1.5]])
    """
    check_layers(x, layers)
    check_padding(padding_value)
    check_options(eps, clamp, combine, exact_mask)
    check_shaped("dout", dout, x.shape)
    steps = []
    for axis, params in layers:
        mask = None if padding_value is None else x != padding_value
        steps.append((x, axis, params, mask))
        out, _ = multi_head(
            x, axis, params, mask, eps, clamp, combine=combine, exact_mask=exact_mask
        )
        x = x + out
    for before, axis, params, mask in reversed(steps):
        dx, _ = multi_head_backward(
            before, axis, params, dout, None, mask, eps, clamp,
            combine=combine, exact_mask=exact_mask,
        )  # fmt: skip
        dout = dout + dx
    return dout


MECHANISM = Mechanism(
    title="Gaussian adaptive attention",
    idea="Weigh each entry by its density under Gaussians near the mean of its own slice.",
    paper=Paper(
        title="Gaussian Adaptive Attention is All You Need: Robust Contextual Representations "
        "Across Multiple Modalities",
        authors=("Georgios Ioannides", "Aman Chadha", "Aaron Elkins"),
        year=2024,
        arxiv="2401.11143",
        code="gioannides/Gaussian-Adaptive-Attention",
    ),
    operations=(
        Operation(split_chunks, clauses=("S1",)),
        Operation(axis_stats, clauses=("S2", "S8")),
        Operation(log_density, clauses=("S3",)),
        Operation(normalise, clauses=("S4", "S8")),
        Operation(apply, clauses=("S5",)),
        Operation(collapse, clauses=("S7",)),
        Operation(
            multi_head,
            clauses=("S1", "S2", "S3", "S4", "S5", "S8"),
            gradient=multi_head_backward,
            differentiable=("x", "params"),
        ),
        Operation(block, clauses=("S6",), gradient=block_backward, differentiable=("x",)),
        Operation(importance_factor, clauses=("S9",)),
    ),
    headline="multi_head",
    coverage=Coverage(
        patterns=("noncausal self",),
        paddings=("none", "left", "right"),
        heads=("MHA",),
        gradient=True,
    ),
    stepwise_equals_prefill=False,
)
