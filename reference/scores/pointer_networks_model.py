r"""Pointer networks, continued: the recurrent encoder and decoder around the pointer.

Definition
----------
S8. **Encode.** A point is embedded by a matrix :math:`E` (D, 2); an LSTM reads the embedded points
in order, from a state of zeros, and its outputs are :math:`e_1..e_n`. A padded point leaves the
state as it was, so the last state is that of the last real point. :math:`e_0`, the end, is a
learned vector. The LSTM depends on the order of the points: permuting them permutes the scores of
the pointer layer, not those of the whole network.

S9. **Decode.** The decoder LSTM starts from the encoder's last state. Its input at the first step
is a learned start symbol, later the embedded point that was last pointed at: the true one in
training, the predicted one otherwise. Its output is :math:`d_i`, from which S2-S4 point. With a
glimpse (S7), :math:`\tanh(G [g_i; d_i])` takes the place of :math:`d_i` in the state that the next
step starts from.

An LSTM step is :math:`[a, f, g, o] = W [x; h] + b`, :math:`c' = \sigma(f) c + \sigma(a) \tanh(g)`,
:math:`h' = \sigma(o) \tanh(c')`. One layer, as in the paper.

Paper and code
--------------
The paper trains one layer of 256 or 512 units by plain gradient descent (learning rate 1.0, batches
of 128, gradient norm clipped to 2.0, weights drawn uniformly from [-0.08, 0.08]) on a million pairs
a task; these figures are unverified. The order of the gates, the embedding without bias and the
vector of the end are ours; the glimpse's way into the state follows an independent implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.primitives.sigmoid import sigmoid
from attnspec.reference.scores.pointer_networks import pointer_log_probs, pointer_scores
from attnspec.reference.scores.pointer_networks_glimpse import glimpse


class Parameters(NamedTuple):
    """S2, S7-S9: the weights of a network of width D and attention width A.

    `embedding` (D, 2); `start` and `end` (D); the LSTMs' weights (4D, 2D) and biases (4D); W1, W2
    (A, D); v (A); `mix` (D, A + D), which is the G of S9, or None for a network without glimpse.
    """

    embedding: np.ndarray
    start: np.ndarray
    end: np.ndarray
    encoder_weight: np.ndarray
    encoder_bias: np.ndarray
    decoder_weight: np.ndarray
    decoder_bias: np.ndarray
    W1: np.ndarray
    W2: np.ndarray
    v: np.ndarray
    mix: np.ndarray | None = None


class LSTMState(NamedTuple):
    """S8-S9: output h and cell c, both (..., D)."""

    h: np.ndarray
    c: np.ndarray


def init_parameters(
    rng: np.random.Generator,
    *,
    hidden: int = 256,
    attention: int | None = None,
    glimpse: bool = False,
) -> Parameters:
    """S9: float64 weights drawn uniformly from [-0.08, 0.08]; `attention` defaults to `hidden`.

    >>> init_parameters(np.random.default_rng(0), hidden=4).encoder_weight.shape
    (16, 8)
    """
    check_integer("hidden", hidden, least=1)
    if attention is None:
        attention = hidden
    check_integer("attention", attention, least=1)

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-0.08, 0.08, shape)

    return Parameters(
        embedding=draw(hidden, 2),
        start=draw(hidden),
        end=draw(hidden),
        encoder_weight=draw(4 * hidden, 2 * hidden),
        encoder_bias=draw(4 * hidden),
        decoder_weight=draw(4 * hidden, 2 * hidden),
        decoder_bias=draw(4 * hidden),
        W1=draw(attention, hidden),
        W2=draw(attention, hidden),
        v=draw(attention),
        mix=draw(hidden, attention + hidden) if glimpse else None,
    )


def lstm_step(x: np.ndarray, state: LSTMState, weight: np.ndarray, bias: np.ndarray) -> LSTMState:
    """S8-S9: the next state of an LSTM that reads `x` (..., D).

    >>> zero = np.zeros(1)
    >>> lstm_step(zero, LSTMState(zero, np.ones(1)), np.zeros((4, 2)), np.zeros(4)).c
    array([0.5])
    """
    check_array("x", x, ("D",))
    check_array("weight", weight, ("4D", "2D"))
    check_size("weight", weight.shape[-1], x.shape[-1] + state.h.shape[-1], "D of x and of h")
    check_array("bias", bias, ("4D",))
    gates = np.concatenate([x, state.h], axis=-1) @ weight.T + bias
    enter, forget, candidate, leave = np.split(gates, 4, axis=-1)
    c = sigmoid(forget) * state.c + sigmoid(enter) * np.tanh(candidate)
    return LSTMState(sigmoid(leave) * np.tanh(c), c)


def encode(
    points: np.ndarray, parameters: Parameters, *, mask: np.ndarray | None = None
) -> tuple[np.ndarray, LSTMState]:
    """S1, S8: encoder states (..., n + 1, D), the end first, and the last state of the LSTM.

    `points` (..., n, 2); `mask` bool (..., n), True at real points.

    >>> parameters = init_parameters(np.random.default_rng(0), hidden=4)
    >>> encode(np.zeros((3, 2)), parameters)[0].shape
    (4, 4)
    """
    check_array("points", points, ("n", "2"))
    check_size("points", points.shape[-1], 2, "coordinates")
    if mask is not None:
        check_array("mask", mask, ("n",), dtype="bool")
        if mask.shape != points.shape[:-1]:
            raise ValueError(f"mask: got shape {mask.shape}, expected {points.shape[:-1]}")
        points = np.where(mask[..., None], points, 0)
    embedded = points @ parameters.embedding.T
    end = np.broadcast_to(parameters.end, (*embedded.shape[:-2], embedded.shape[-1]))
    state = LSTMState(np.zeros_like(end), np.zeros_like(end))
    rows = [end]
    for j in range(points.shape[-2]):
        after = lstm_step(
            embedded[..., j, :], state, parameters.encoder_weight, parameters.encoder_bias
        )
        if mask is not None:
            real = mask[..., j, None]
            after = LSTMState(np.where(real, after.h, state.h), np.where(real, after.c, state.c))
        state = after
        rows.append(state.h)
    return np.stack(rows, axis=-2), state


def decode_step(
    x: np.ndarray,
    state: LSTMState,
    e: np.ndarray,
    parameters: Parameters,
    *,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, LSTMState]:
    """S9: log-probabilities (..., n + 1) after the decoder reads `x` (..., D), and its state.

    `e` (..., n + 1, D) from `encode`; `mask` bool (..., n + 1), True where a slot is allowed.

    >>> parameters = init_parameters(np.random.default_rng(0), hidden=4)
    >>> e, state = encode(np.zeros((3, 2)), parameters)
    >>> logp, state = decode_step(parameters.start, state, e, parameters)
    >>> logp.shape
    (4,)
    """
    state = lstm_step(x, state, parameters.decoder_weight, parameters.decoder_bias)
    d = state.h[..., None, :]
    scores = pointer_scores(e, d, parameters.W1, parameters.W2, parameters.v)
    logp = pointer_log_probs(scores, mask)
    if parameters.mix is not None:
        seen = glimpse(e, logp, parameters.W1)[..., 0, :]
        h = np.tanh(np.concatenate([seen, state.h], axis=-1) @ parameters.mix.T)
        state = LSTMState(h, state.c)
    return logp[..., 0, :], state


def make_step_fn(
    points: np.ndarray, parameters: Parameters
) -> tuple[Callable[[LSTMState, int], tuple[np.ndarray, LSTMState]], LSTMState]:
    """S9: what the decoders of `pointer_networks_decoding` take, for one set of `points` (n, 2).

    Returns `step_fn` and its first state. ``step_fn(state, last)`` reads the slot `last` (0, the
    start symbol, at the first step) and returns log-probabilities (n + 1) and the next state.

    >>> step_fn, state = make_step_fn(
    ...     np.zeros((3, 2)), init_parameters(np.random.default_rng(0), hidden=4)
    ... )
    >>> step_fn(state, 0)[0].shape
    (4,)
    """
    check_array("points", points, ("n", "2"))
    check_size("points axes", points.ndim, 2, "n and 2")
    e, first = encode(points, parameters)
    inputs = np.concatenate([parameters.start[None], points @ parameters.embedding.T])

    def step_fn(state: LSTMState, last: int) -> tuple[np.ndarray, LSTMState]:
        return decode_step(inputs[last], state, e, parameters)

    return step_fn, first


def decode_forced(
    points: np.ndarray,
    targets: np.ndarray,
    parameters: Parameters,
    *,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """S9: log-probabilities (..., steps, n + 1) when every step reads the true previous slot.

    `points` (..., n, 2); `targets` int (..., steps), slots, 0 at padding; `mask` bool (..., n),
    True at real points. `pointer_loss` takes the result.

    >>> parameters = init_parameters(np.random.default_rng(0), hidden=4)
    >>> decode_forced(np.zeros((3, 2)), np.array([1, 2, 3, 0]), parameters).shape
    (4, 4)
    """
    check_array("targets", targets, ("steps",), dtype="int")
    if targets.shape[-1] == 0:
        raise ValueError(f"targets: got shape {targets.shape}, expected at least one step")
    e, state = encode(points, parameters, mask=mask)
    if targets.shape[:-1] != points.shape[:-2]:
        raise ValueError(
            f"targets: got leading axes {targets.shape[:-1]}, expected {points.shape[:-2]}"
        )
    if np.any((targets < 0) | (targets >= e.shape[-2])):
        raise ValueError(f"targets: got {targets.tolist()}, expected 0 to {e.shape[-2] - 1}")
    if mask is not None:
        points = np.where(mask[..., None], points, 0)
        mask = np.concatenate([np.ones_like(mask[..., :1]), mask], axis=-1)
    embedded = points @ parameters.embedding.T
    start = np.broadcast_to(parameters.start, embedded[..., :1, :].shape)
    inputs = np.concatenate([start, embedded], axis=-2)
    last_slots = np.concatenate([np.zeros_like(targets[..., :1]), targets[..., :-1]], axis=-1)
    logps = []
    for i in range(targets.shape[-1]):
        x = np.take_along_axis(inputs, last_slots[..., i, None, None], axis=-2)[..., 0, :]
        logp, state = decode_step(x, state, e, parameters, mask=mask)
        logps.append(logp)
    return np.stack(logps, axis=-2)
