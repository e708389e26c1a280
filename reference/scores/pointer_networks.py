r"""Pointer networks (Ptr-Net): additive attention used as an output distribution.

When the outputs of a model are positions of its input, the output vocabulary grows and shrinks
with the input. A pointer network scores every encoder state against the decoder state with an
additive attention and takes the softmax of the scores, not a weighted average, as its output.
The same parameters therefore work for any number of inputs, which three geometric tasks with
exact solvers (convex hull, Delaunay triangulation, travelling salesman) put to the test.

Definition
----------
S1. **Slots.** Inputs :math:`P_1..P_n` give encoder states :math:`e_1..e_n` of width D; a row
:math:`e_0` in front stands for "end". Slot 0 is the end and slot j + 1 is point j (counted from
0), so there are n + 1 slots. At step i the decoder state is :math:`d_i`, of width D.

S2. **Score.** :math:`u_{ij} = v \cdot \tanh(W_1 e_j + b_1 + W_2 d_i + b_2)` with :math:`W_1, W_2`
(A, D) and :math:`v, b_1, b_2` (A). There is no scale and one head; the paper has no biases.

S3. **Mask.** A mask is True where a slot may be pointed at; elsewhere :math:`u_{ij} = -\infty`.
Padding is always masked, visited points only under constrained decoding. A step that may point
nowhere is an error (this replaces K4).

S4. **Point.** :math:`p(C_i = j) = \exp(u_{ij}) / \sum_k \exp(u_{ik})` over the allowed slots.
Nothing is averaged or fed on: this is where pointing departs from attention.

S5. **Loss.** The mean of :math:`-\log p(C_i = t_i)` over all real steps of the whole batch, end
steps included: the sum divided by the number of real steps, not a mean of means.

The clauses go on beside this file, in `pointer_networks_<topic>`: S6 in `gradients`; S7, an
extension, in `glimpse`; S8-S9, encoder and decoder, in `model`; S10-S12, greedy and beam search, in
`decoding`; S13-S15, points, hulls and triangulations with their solvers, in `tasks`; S16, tours, in
`tours`; S17, the score of a hull, in `polygons`; S18-S19, the other scores, in `metrics`; S20,
matchings, in `matching`, their search in `blossoms`; S21, approximate tours, in `christofides`.

Complexity
----------
Time :math:`O(n T A)` for n slots and T steps, bound by tanh. This file holds all :math:`n T A`
values at once; a kernel needs only a tile and the running log of the sum.

Paper and code
--------------
The authors released data sets but no code; the paper's plain form is the default here. Independent
implementations add biases (`b1`, `b2`), some mix a glimpse into the state (S7), and some multiply
the probabilities by the mask without normalising again, which is harmless for greedy decoding but
wrong for a loss or a beam. That the end is a slot in front of the points is their custom; the paper
speaks of start and end symbols.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.primitives.softmax import log_softmax
from attnspec.reference.scores.pointer_networks_decoding import constraint_mask
from attnspec.reference.scores.pointer_networks_glimpse import glimpse, glimpse_backward
from attnspec.reference.scores.pointer_networks_gradients import (
    pointer_log_probs_backward,
    pointer_loss_backward,
    pointer_scores_backward,
)
from attnspec.reference.scores.pointer_networks_inputs import (
    allowed_slots,
    check_states,
    real_steps,
)
from attnspec.reference.scores.pointer_networks_metrics import (
    is_delaunay,
    is_permutation,
    tour_length,
    triangle_coverage,
)
from attnspec.reference.scores.pointer_networks_polygons import (
    convex_clip_area,
    hull_metrics,
    is_simple_polygon,
    polygon_area,
)
from attnspec.reference.scores.pointer_networks_tasks import delaunay_target, hull_target, incenter
from attnspec.reference.scores.pointer_networks_tours import tsp_target
from attnspec.reference.spec import Coverage, Mechanism, Operation, Paper


def pointer_scores(
    e: np.ndarray,
    d: np.ndarray,
    W1: np.ndarray,
    W2: np.ndarray,
    v: np.ndarray,
    *,
    b1: np.ndarray | None = None,
    b2: np.ndarray | None = None,
) -> np.ndarray:
    """S2: scores (..., steps, slots) of e (..., slots, D) for d (..., steps, D).

    W1, W2 (A, D); v and the optional biases b1, b2 (A). TypeError or ValueError if they do not
    fit one another (K14).

    >>> one = np.ones((1, 1))
    >>> pointer_scores(np.array([[0.0], [1.0]]), 0 * one, one, one, np.ones(1)).round(4)
    array([[0.    , 0.7616]])
    """
    check_states(e, d, W1, W2, v, b1, b2)
    keys = e @ W1.T if b1 is None else e @ W1.T + b1
    queries = d @ W2.T if b2 is None else d @ W2.T + b2
    return np.tanh(queries[..., :, None, :] + keys[..., None, :, :]) @ v


def pointer_log_probs(scores: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """S3-S4: log-probabilities (..., steps, slots) of scores (..., steps, slots).

    `mask` is bool, (..., slots) for all steps alike or (..., steps, slots), True where a slot may
    be pointed at; None allows all. A masked slot gets -inf, whatever its score (K11). ValueError
    if a step is allowed no slot.

    >>> np.exp(pointer_log_probs(np.zeros((1, 3)), np.array([True, False, True])))
    array([[0.5, 0. , 0.5]])
    """
    return log_softmax(scores, allowed_slots(scores, mask))


def pointer_loss(
    logp: np.ndarray, targets: np.ndarray, target_mask: np.ndarray | None
) -> np.ndarray:
    """S5: the mean over real steps of -logp at the target, a scalar in nats.

    `logp` (..., steps, slots); `targets` int (..., steps), slots; `target_mask` bool (..., steps),
    True at real steps, or None if all are. A padding step is not read. A target that was masked
    makes the loss inf. ValueError if a target is no slot or if no step is real.

    >>> logp = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    >>> pointer_loss(logp, np.array([1, -1]), np.array([True, False])).round(4)
    np.float64(0.6931)
    """
    real, target_mask = real_steps(logp, targets, target_mask)
    surprise = -np.take_along_axis(logp, real[..., None], axis=-1)[..., 0]
    return np.mean(surprise[target_mask])


def pointer_cross_entropy(
    e: np.ndarray,
    d: np.ndarray,
    W1: np.ndarray,
    W2: np.ndarray,
    v: np.ndarray,
    targets: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    target_mask: np.ndarray | None = None,
    b1: np.ndarray | None = None,
    b2: np.ndarray | None = None,
) -> np.ndarray:
    """S2-S5: the loss of decoder states `d` against `targets`, a scalar in nats.

    The whole mechanism in training: arguments as in `pointer_scores`, `pointer_log_probs` and
    `pointer_loss`.

    >>> zero = np.zeros((1, 1))
    >>> loss = pointer_cross_entropy(np.zeros((4, 1)), zero, zero, zero, np.ones(1), np.array([2]))
    >>> bool(np.isclose(loss, np.log(4)))
    True
    """
    scores = pointer_scores(e, d, W1, W2, v, b1=b1, b2=b2)
    return pointer_loss(pointer_log_probs(scores, mask), targets, target_mask)


def pointer_cross_entropy_backward(
    e: np.ndarray,
    d: np.ndarray,
    W1: np.ndarray,
    W2: np.ndarray,
    v: np.ndarray,
    targets: np.ndarray,
    dout: np.ndarray | float,
    *,
    mask: np.ndarray | None = None,
    target_mask: np.ndarray | None = None,
    b1: np.ndarray | None = None,
    b2: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """S6: gradients de, dd, dW1, dW2, dv, db1, db2 of the loss, times the scalar `dout`.

    >>> e, one = np.array([[0.0], [1.0]]), np.ones((1, 1))
    >>> grads = pointer_cross_entropy_backward(e, one, one, one, np.ones(1), np.array([1]), 1.0)
    >>> [grad.shape for grad in grads]
    [(2, 1), (1, 1), (1, 1), (1, 1), (1,), (1,), (1,)]
    """
    scores = pointer_scores(e, d, W1, W2, v, b1=b1, b2=b2)
    dlogp = pointer_loss_backward(pointer_log_probs(scores, mask), targets, target_mask, dout)
    dscores = pointer_log_probs_backward(scores, mask, dlogp)
    return pointer_scores_backward(e, d, W1, W2, v, dscores, b1=b1, b2=b2)


MECHANISM = Mechanism(
    title="Pointer networks",
    idea="The softmax of additive attention scores is itself the output: a position of the input.",
    paper=Paper(
        title="Pointer Networks",
        authors=("Oriol Vinyals", "Meire Fortunato", "Navdeep Jaitly"),
        year=2015,
        arxiv="1506.03134",
        venue="NIPS 2015",
    ),
    operations=(
        Operation(
            pointer_scores,
            clauses=("S2",),
            gradient=pointer_scores_backward,
            differentiable=("e", "d", "W1", "W2", "v", "b1", "b2"),
        ),
        Operation(
            pointer_log_probs,
            clauses=("S3", "S4"),
            gradient=pointer_log_probs_backward,
            differentiable=("scores",),
        ),
        Operation(
            pointer_loss, clauses=("S5",), gradient=pointer_loss_backward, differentiable=("logp",)
        ),
        Operation(
            pointer_cross_entropy,
            clauses=("S2", "S3", "S4", "S5"),
            gradient=pointer_cross_entropy_backward,
            differentiable=("e", "d", "W1", "W2", "v", "b1", "b2"),
        ),
        Operation(
            glimpse,
            clauses=("S7",),
            gradient=glimpse_backward,
            differentiable=("e", "logp", "W1", "b1"),
        ),
        Operation(constraint_mask, clauses=("S10",)),
        Operation(hull_target, clauses=("S14",)),
        Operation(delaunay_target, clauses=("S15",)),
        Operation(incenter, clauses=("S15",)),
        Operation(tsp_target, clauses=("S16",)),
        Operation(polygon_area, clauses=("S17",)),
        Operation(is_simple_polygon, clauses=("S17",)),
        Operation(convex_clip_area, clauses=("S17",)),
        Operation(hull_metrics, clauses=("S17",)),
        Operation(triangle_coverage, clauses=("S18",)),
        Operation(is_delaunay, clauses=("S18",)),
        Operation(is_permutation, clauses=("S19",)),
        Operation(tour_length, clauses=("S19",)),
    ),
    headline="pointer_cross_entropy",
    coverage=Coverage(
        patterns=("noncausal cross",),
        phases=("prefill", "step by step"),
        paddings=("none", "left", "right"),
        heads=("MHA",),
        gradient=True,
    ),
)
