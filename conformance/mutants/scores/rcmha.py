"""Wrong kernels of RCMHA: distances off by one, terms left out, states that forget."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, replacing, right, spoiling
from attnspec.conformance.mutants.scores.rcmha_steps import first_columns, mutant
from attnspec.reference.conventions import default_scale
from attnspec.reference.scores import rcmha
from attnspec.reference.scores.rcmha_layer import State

CONV = right("rcmha.depthwise_causal_conv")
CONV_BACKWARD = rcmha.depthwise_causal_conv_backward
CONTENT = right("rcmha.content_scores")
RELATIVE = right("rcmha.relative_scores")
ATTEND = right("rcmha.attend")
ATTENTION = right("rcmha.relative_attention")
BACKWARD = rcmha.relative_attention_backward
SEGMENT = right("rcmha.attend_segment")
SEGMENT_BACKWARD = rcmha.attend_segment_backward
INIT = right("rcmha.init_state")
STEP = right("rcmha.step")


def memory_not_subtracted(q: Any, R: Any, b: Any, M: int) -> Any:
    """Distances count from the start of the memory: all are M too near."""
    RELATIVE(q, R, b, M)
    rows = np.clip(np.arange(len(R)) + M, 0, max(len(R) - 1, 0))
    return RELATIVE(q, R[rows], b[rows], M)


def vector_joins_the_distance(
    q: Any, k: Any, v: Any, R: Any, b: Any, u: Any, **options: Any
) -> Any:
    """u is added to the query that meets R, too."""
    ATTENTION(q, k, v, R, b, u, **options)
    return ATTENTION(q + u[:, None], k, v, R, b, np.zeros_like(u), **options)


def scalars_unscaled(q: Any, k: Any, v: Any, R: Any, b: Any, u: Any, **options: Any) -> Any:
    """b is added after the scale."""
    ATTENTION(q, k, v, R, b, u, **options)
    scale = options.get("scale")
    scale = default_scale(q.shape[-1]) if scale is None else scale
    return ATTENTION(q, k, v, R, (b / scale).astype(b.dtype), u, **options)


def distances_unscaled(q: Any, k: Any, v: Any, R: Any, b: Any, u: Any, **options: Any) -> Any:
    """Only the content is divided by the square root of dk."""
    ATTENTION(q, k, v, R, b, u, **options)
    scale = options.get("scale")
    scale = default_scale(q.shape[-1]) if scale is None else scale
    return ATTENTION(
        q, k, v, (R / scale).astype(R.dtype), (b / scale).astype(b.dtype), u, **options
    )


def no_scalars(arguments: dict[str, Any]) -> None:
    arguments["b"] = np.zeros_like(arguments["b"])


def no_vector(arguments: dict[str, Any]) -> None:
    arguments["u"] = np.zeros_like(arguments["u"])


def first_head(arguments: dict[str, Any]) -> None:
    """Every head uses the table of the first."""
    R = arguments["R"]
    if isinstance(R, np.ndarray) and R.ndim == 3 and R.shape[1]:
        arguments["R"] = np.repeat(R[:, :1], R.shape[1], axis=1)


def hides_memory(T: int, M: int, causal: bool = True) -> Any:
    """The memory is masked by its index, as if it were part of the segment."""
    seen = np.tri(T, M + T, dtype=bool)
    return seen if causal else np.ones((T, M + T), bool)


def sees_the_next(T: int, M: int, causal: bool = True) -> Any:
    return np.tri(T, M + T, M + 1, dtype=bool) if causal else np.ones((T, M + T), bool)


def whole_table(arguments: dict[str, Any]) -> None:
    """Rows that no pair needs are multiplied with zeros and added."""
    R = arguments["R"]
    if isinstance(R, np.ndarray) and R.dtype.kind == "f" and R.size:
        arguments["R"] = R + 0.0 * R.sum()


def vector_left_out_of_keys(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    dq, dk, dv, dR, db, du = gradients
    return dq, dk, dv, dR, db, np.zeros_like(du)


def no_scalar_gradient(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    dq, dk, dv, dR, db, du = gradients
    return dq, dk, dv, dR, np.zeros_like(db), du


def table_gradient_off(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    dq, dk, dv, dR, db, du = gradients
    return dq, dk, dv, np.roll(dR, 1, axis=0), db, du


def gradient_of_scores(
    q: Any, k: Any, v: Any, R: Any, b: Any, u: Any, dout: Any, *, scale: Any = None,
    causal: bool = True,
) -> Any:  # fmt: skip
    """dS of the unscaled scores."""
    T, S = q.shape[-2], k.shape[-2]
    factor = default_scale(q.shape[-1]) if scale is None else scale
    s = (CONTENT(q, u, k) + RELATIVE(q, R, b, S - T)) * factor
    P = ATTEND(s, rcmha.visible(T, S - T, causal), v)[1]
    dP = dout @ np.swapaxes(v, -1, -2)
    return factor * P * (dP - np.sum(P * dP, axis=-1, keepdims=True))


def keys_meet_the_query_alone(
    q: Any, k: Any, v: Any, R: Any, b: Any, u: Any, dout: Any, **options: Any
) -> Any:
    """dk is made of q, without u."""
    dq, dk, *rest = BACKWARD(q, k, v, R, b, u, dout, **options)
    by_key = np.sum(gradient_of_scores(q, k, v, R, b, u, dout, **options), axis=-2)
    return dq, (dk - by_key[..., None] * u[:, None]).astype(dk.dtype), *rest


def query_meets_keys_alone(
    q: Any, k: Any, v: Any, R: Any, b: Any, u: Any, dout: Any, **options: Any
) -> Any:
    """dq is made of k, without the rows of the table."""
    dq, *rest = BACKWARD(q, k, v, R, b, u, dout, **options)
    ds = gradient_of_scores(q, k, v, R, b, u, dout, **options)
    return (ds @ k).astype(dq.dtype), *rest


def query_always_carried(arguments: dict[str, Any]) -> None:
    """The filters of q see the memory although they are to start anew."""
    if arguments["q_conv_state"] == "reset":
        arguments["q_conv_state"] = "carry"


def query_never_carried(arguments: dict[str, Any]) -> None:
    if arguments["q_conv_state"] == "carry":
        arguments["q_conv_state"] = "reset"


def keys_restart(x: Any, memory: Any, *rest: Any, **options: Any) -> Any:
    """The filters of k and v start anew at the segment."""
    out = SEGMENT(x, memory, *rest, **options)
    if memory is None or not memory.shape[-2] or not x.shape[-2]:
        return out

    def restarting(p: Any, w: Any, b: Any, state: Any = None) -> Any:
        M = memory.shape[-2]
        if p.shape[-2] != M + x.shape[-2]:
            return CONV(p, w, b, state)
        parts = [CONV(p[..., :M, :], w, b)[0], CONV(p[..., M:, :], w, b)[0]]
        return np.concatenate(parts, axis=-2), None

    return replacing(SEGMENT, depthwise_causal_conv=restarting)(x, memory, *rest, **options)


def no_value_bias(arguments: dict[str, Any]) -> None:
    arguments["biases"] = np.concatenate(
        [np.zeros_like(arguments["biases"][:1]), arguments["biases"][1:]]
    )


def memory_is_constant(*args: Any, **options: Any) -> Any:
    """The memory has no gradient, and neither has what it gives to the filters' rows."""
    dx, dmemory, *rest = SEGMENT_BACKWARD(*args, **options)
    return dx, None if dmemory is None else np.zeros_like(dmemory), *rest


def filters_by_their_own_tap(
    p: Any, w: Any, b: Any, state: Any, dy: Any, dnew_state: Any = None
) -> Any:
    """Rows get back what their own tap has made of them, not what those behind them have."""
    _, *rest = CONV_BACKWARD(p, w, b, state, dy, dnew_state)
    return w[:, -1] * dy, *rest


def caches_unfiltered(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """The cache takes keys before their filter."""
    out, state = STEP(q, k, v, *rest)
    keys = np.concatenate([rest[-1].k, k], axis=-2)
    return out, state._replace(k=keys)


def query_restarts(
    q: Any, k: Any, v: Any, w: Any, c: Any, R: Any, b: Any, u: Any, state: Any
) -> Any:
    """Each step filters q from zeros."""
    STEP(q, k, v, w, c, R, b, u, state)
    return STEP(q, k, v, w, c, R, b, u, state._replace(q_rows=np.zeros_like(state.q_rows)))


def one_row_too_few(state: State) -> State:
    return state._replace(q_rows=state.q_rows[..., :-1, :])


MUTANTS = (
    mutant("distance-from-memory", "relative_scores", "lengths", memory_not_subtracted),
    mutant("scores-shift-first-columns", "relative_scores", "agreement",
           replacing(RELATIVE, relative_shift=first_columns)),
    mutant("scores-without-numbers", "relative_scores", "agreement",
           altering(RELATIVE, no_scalars)),
    mutant("scores-first-head", "relative_scores", "heads", altering(RELATIVE, first_head)),
    mutant("content-without-vector", "content_scores", "agreement", altering(CONTENT, no_vector)),
    mutant("vector-meets-table", "relative_attention", "agreement", vector_joins_the_distance),
    mutant("numbers-unscaled", "relative_attention", "agreement", scalars_unscaled),
    mutant("distances-unscaled", "relative_attention", "agreement", distances_unscaled),
    mutant("memory-hidden", "relative_attention", "lengths",
           replacing(ATTENTION, visible=hides_memory)),
    mutant("sees-the-next", "relative_attention", "prefix",
           replacing(ATTENTION, visible=sees_the_next)),
    mutant("reads-far-rows", "relative_attention", "poison", altering(ATTENTION, whole_table)),
    mutant("memory-not-subtracted", "relative_attention", "lengths",
           replacing(ATTENTION, relative_scores=memory_not_subtracted)),
    mutant("vector-gradient-missing", "relative_attention", "gradient", ATTENTION,
           spoiling(BACKWARD, vector_left_out_of_keys)),
    mutant("number-gradient-missing", "relative_attention", "gradient", ATTENTION,
           spoiling(BACKWARD, no_scalar_gradient)),
    mutant("table-gradient-one-off", "relative_attention", "gradient", ATTENTION,
           spoiling(BACKWARD, table_gradient_off)),
    mutant("key-gradient-without-vector", "relative_attention", "gradient", ATTENTION,
           keys_meet_the_query_alone),
    mutant("query-gradient-without-table", "relative_attention", "gradient", ATTENTION,
           query_meets_keys_alone),
    mutant("segment-query-carried", "attend_segment", "agreement",
           altering(SEGMENT, query_always_carried)),
    mutant("segment-query-reset", "attend_segment", "rcmha-segments",
           altering(SEGMENT, query_never_carried)),
    mutant("segment-keys-restart", "attend_segment", "rcmha-segments", keys_restart),
    mutant("segment-value-bias", "attend_segment", "agreement", altering(SEGMENT, no_value_bias)),
    mutant("segment-memory-constant", "attend_segment", "gradient", SEGMENT,
           backward=memory_is_constant),
    mutant("segment-own-tap", "attend_segment", "gradient", SEGMENT,
           backward=replacing(SEGMENT_BACKWARD,
                              depthwise_causal_conv_backward=filters_by_their_own_tap)),
    mutant("step-caches-unfiltered", "step", "stream", caches_unfiltered),
    mutant("step-query-restarts", "step", "stream", query_restarts),
    mutant("state-short", "init_state", "agreement", spoiling(INIT, one_row_too_few)),
)  # fmt: skip
