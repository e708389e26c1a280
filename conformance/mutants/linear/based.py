"""Wrong kernels of Based: scales, halves and ones lost on the way between two forms."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import based, based_batches, based_features, based_state

ATTEND = right("based.based_attend")
BACKWARD = based.based_backward
CHUNK = right("based.based_chunk")
CHUNK_BACKWARD = based_state.based_chunk_backward
FEATURES = right("based.taylor_features")
WEIGHTS = right("based.taylor_weights")
UPDATE = right("based.based_state_update")
READ = right("based.based_read")
STEP = right("based.based_decode_step")
PACKED = right("based.based_packed")
PACKED_BACKWARD = based_batches.based_packed_backward
WINDOW = right("based.sliding_window_attend")
WINDOW_BACKWARD = based.sliding_window_backward
CONVOLUTION = right("based.gated_convolution")
# Names that mutants replace while they run are kept here as they are.
masked_weights, read = based.masked_weights, based_state.read


def scaled_again(arguments: dict[str, Any]) -> None:
    q = arguments["q"]
    if isinstance(q, np.ndarray) and q.ndim > 2 and q.dtype.kind == "f":
        arguments["q"] = q * q.dtype.type(q.shape[-1] ** -0.5)


def value_width(arguments: dict[str, Any]) -> None:
    v = arguments["v"]
    if arguments["scale"] is None and isinstance(v, np.ndarray) and v.ndim > 2 and v.shape[-1]:
        arguments["scale"] = v.shape[-1] ** -0.5


def no_half(x: np.ndarray, **options: Any) -> np.ndarray:
    """The pairs of channels without their 1/sqrt(2)."""
    phi, d = FEATURES(x, **options), x.shape[-1]
    return np.concatenate([phi[..., : 1 + d], phi[..., 1 + d :] * np.sqrt(x.dtype.type(2))], -1)


def no_ones(x: np.ndarray, **options: Any) -> np.ndarray:
    """The order 0 is forgotten."""
    phi = FEATURES(x, **options)
    return np.concatenate([np.zeros_like(phi[..., :1]), phi[..., 1:]], -1)


def packed_as_square(x: np.ndarray, **options: Any) -> np.ndarray:
    """Packed pairs of two channels, which stand for two products, lack their sqrt(2)."""
    phi, d = FEATURES(x, **options), x.shape[-1]
    if not options.get("packed"):
        return phi
    twice = np.where(np.equal(*np.triu_indices(d)), 1, np.sqrt(2)).astype(x.dtype)
    return np.concatenate([phi[..., : 1 + d], phi[..., 1 + d :] / twice], -1)


def masked_scores(q: Any, k: Any, causal: Any, scale: Any, key_mask: Any) -> np.ndarray:
    """A masked score is set to 0 and weighs 1."""
    weights = masked_weights(q, k, causal, scale, key_mask)
    return np.where(weights == 0, np.ones_like(weights), weights)


def no_diagonal(q: np.ndarray, k: np.ndarray, **options: Any) -> np.ndarray:
    return np.tril(WEIGHTS(q, k, **options), -1)


def largest_of_eps(num: np.ndarray, den: np.ndarray, eps: float) -> np.ndarray:
    return based_state.divide(num, np.where(den == 0, den, np.maximum(den, eps)), 0.0)


def eps_in_empty_rows(num: np.ndarray, den: np.ndarray, eps: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        return num / (den + eps)[..., None]


def coarse_state(result: Any) -> Any:
    S, zk = result
    return round_to(S, "bfloat16").astype(S.dtype), zk


def coarse_sum(features: np.ndarray, S: np.ndarray, zk: np.ndarray) -> Any:
    num, den = read(features, S, zk)
    return num, round_to(den, "bfloat16").astype(den.dtype)


def two_roundings(features: np.ndarray, S: np.ndarray, zk: np.ndarray) -> Any:
    """The numerator reads features rounded to bfloat16, the denominator reads them as they are."""
    coarse = round_to(features, "bfloat16").astype(features.dtype)
    return read(coarse, S, zk)[0], read(features, S, zk)[1]


def rows_of_values(S: Any, zk: Any, k: Any, v: Any, **options: Any) -> Any:
    """The pair (a, b) is written where rows are dv long and not d."""
    new, new_zk = UPDATE(S, zk, k, v, **options)
    d, dv = k.shape[-1], v.shape[-1]
    a, b = np.divmod(np.arange(d * d), d)
    written = (new - S)[..., 1 + d :, :]
    new = new.copy()
    new[..., 1 + d :, :] = S[..., 1 + d :, :]
    new[..., 1 + d + (a * dv + b) % (d * d), :] += written
    return new, new_zk


def filled_chunks(S: Any, zk: Any, k: Any, v: Any, **options: Any) -> Any:
    """The last chunk is filled up by keys of 0, each of which is counted."""
    S, zk = UPDATE(S, zk, k, v, **options)
    zk = zk.copy()
    zk[..., 0] += -k.shape[-2] % 16
    return S, zk


def first_of_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // kv_heads, :, :]


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    return x[..., np.arange(heads) % x.shape[-3], :, :]


def slope_of_one(q: np.ndarray, k: np.ndarray, dw: np.ndarray, *, scale: Any = None) -> Any:
    """The factor 1 + s of the weight's slope is taken as 1."""
    return based_features.taylor_weights_backward(0 * q, k, dw, scale=scale)[0], (
        based_features.taylor_weights_backward(q, 0 * k, dw, scale=scale)[1]
    )


def no_share(G: np.ndarray, o: np.ndarray, den: np.ndarray, eps: float) -> Any:
    dnum, dden = based_state.share_gradient(G, o, den, eps)
    return dnum, 0 * dden


def one_side(x: np.ndarray, dfeatures: np.ndarray, **options: Any) -> np.ndarray:
    """Half of the pairs' gradient: only the first factor is differentiated."""
    d = x.shape[-1]
    dx = based_features.taylor_features_backward(x, dfeatures, **options)
    single = dfeatures.copy()
    single[..., 1 + d :] = 0
    return (dx + based_features.taylor_features_backward(x, single, **options)) / 2


def forget_upstream(arguments: dict[str, Any]) -> None:
    arguments["dS"], arguments["dzk"] = None, None


def forget_state(arguments: dict[str, Any]) -> None:
    for name in ("S0", "zk0"):
        x = arguments[name]
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            arguments[name] = 0 * x


def read_then_update(S: Any, zk: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    _, new_S, new_zk = STEP(S, zk, q, k, v, **options)
    return READ(q, S, zk, **options), new_S, new_zk


def one_sequence(q: Any, k: Any, v: Any, offsets: Any, **options: Any) -> Any:
    """The state runs on from one sequence into the next."""
    _, S, zk = PACKED(q, k, v, offsets, **options)
    return CHUNK(q, k, v, 64, **options)[0], S, zk


def one_key_less(arguments: dict[str, Any]) -> None:
    if type(arguments["left"]) is int and arguments["left"] > 0:
        arguments["left"] -= 1


def centred(arguments: dict[str, Any]) -> None:
    """The mean key is taken away first, as softmax would allow."""
    k = arguments["k"]
    if isinstance(k, np.ndarray) and k.ndim > 2 and k.dtype.kind == "f" and k.shape[-2]:
        arguments["k"] = k - k.mean(axis=-2, keepdims=True)


def reversed_taps(arguments: dict[str, Any]) -> None:
    f = arguments["filters"]
    if isinstance(f, np.ndarray) and f.ndim == 2:
        arguments["filters"] = f[:, ::-1]


def swapped_halves(arguments: dict[str, Any]) -> None:
    W = arguments["W_in"]
    if isinstance(W, np.ndarray) and W.ndim == 2:
        arguments["W_in"] = np.roll(W, W.shape[1] // 2, axis=1)


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"based.{name}", f"based.{operation}", law, bug, call, **rest)


MUTANTS = (
    of("based_attend", "scaled-twice", "agreement", "the scale is applied to q beforehand as well",
       altering(ATTEND, scaled_again)),
    of("based_attend", "value-width", "agreement", "the scale is that of the value width",
       altering(ATTEND, value_width)),
    of("based_attend", "masked-scores", "agreement", "the mask sets scores to 0, which weigh 1",
       replacing(ATTEND, masked_weights=masked_scores)),
    of("based_attend", "max-eps", "agreement", "the larger of z and eps instead of their sum",
       replacing(ATTEND, divide=largest_of_eps)),
    of("based_attend", "empty-rows", "tiny", "a row that sees nothing is 0 / 0",
       replacing(ATTEND, divide=eps_in_empty_rows)),
    of("based_attend", "centred", "taylor-shift", "keys are centred, as if it were softmax",
       altering(ATTEND, centred)),
    of("based_attend", "slope-of-1", "gradient", "the weight's slope is 1 instead of 1 + s", ATTEND,
       backward=replacing(BACKWARD, taylor_weights_backward=slope_of_one)),
    of("based_attend", "no-dden", "gradient", "the denominator is not differentiated", ATTEND,
       backward=replacing(BACKWARD, share_gradient=no_share)),
    of("based_attend", "first-of-group", "gradient", "dk and dv are those of the group's first "
       "head", ATTEND, backward=replacing(BACKWARD, sum_groups=first_of_group)),
    of("taylor_features", "no-half", "agreement", "pairs lack the factor 1/sqrt(2)", no_half),
    of("taylor_features", "packed-as-square", "agreement", "packed pairs lack the factor sqrt(2)",
       packed_as_square),
    of("taylor_features", "one-side", "gradient", "one factor of a pair is differentiated",
       FEATURES, backward=one_side),
    of("taylor_weights", "first-order", "agreement", "the polynomial ends after s",
       replacing(WEIGHTS, weigh=lambda scores: 1 + scores)),
    of("based_chunk", "no-half-far", "taylor-chunks", "the 1/2 is missing on the way through the "
       "state only", replacing(CHUNK, taylor_features=no_half)),
    of("based_chunk", "no-ones", "taylor-mean", "the order 0 does not cross chunks",
       replacing(CHUNK, taylor_features=no_ones)),
    of("based_chunk", "filled-chunk", "taylor-count", "the last chunk counts as a whole one",
       replacing(CHUNK, based_state_update=filled_chunks)),
    of("based_chunk", "no-diagonal", "agreement", "a token does not see itself",
       replacing(CHUNK, taylor_weights=no_diagonal)),
    of("based_chunk", "coarse-state", "precision", "the state is kept in bfloat16",
       replacing(CHUNK, based_state_update=spoiling(UPDATE, coarse_state))),
    of("based_chunk", "coarse-den", "agreement", "the denominator is summed in bfloat16",
       replacing(CHUNK, read=coarse_sum)),
    of("based_chunk", "two-roundings", "agreement", "numerator and denominator read features of "
       "different rounding", replacing(CHUNK, read=two_roundings)),
    of("based_chunk", "interleaved", "heads", "query head h reads kv head h % kv_heads",
       replacing(CHUNK, repeat_heads=interleaved)),
    of("based_chunk", "no-S0", "taylor-handover", "the state given is forgotten",
       altering(CHUNK, forget_state)),
    of("based_chunk", "no-S0-stream", "stream", "the state given is forgotten",
       altering(CHUNK, forget_state)),
    of("based_chunk", "no-dS", "gradient", "the gradient of the last state is dropped", CHUNK,
       backward=altering(CHUNK_BACKWARD, forget_upstream)),
    of("based_chunk", "one-side-far", "gradient", "one factor of a pair is differentiated", CHUNK,
       backward=replacing(CHUNK_BACKWARD, taylor_features_backward=one_side)),
    of("based_state_update", "filled-update", "taylor-count", "tokens are counted in sixteens",
       filled_chunks),
    of("based_state_update", "rows-of-values", "agreement", "pairs are laid out with the width of "
       "the values", rows_of_values),
    of("based_read", "coarse-read", "agreement", "the denominator is summed in bfloat16",
       replacing(READ, read=coarse_sum)),
    of("based_decode_step", "read-first", "stream", "a step reads before it writes",
       read_then_update),
    of("based_packed", "running-on", "alone", "a sequence sees the one before it",
       one_sequence),
    of("based_packed", "packed-no-dS", "gradient", "the gradients of the last states are dropped",
       PACKED, backward=altering(PACKED_BACKWARD, forget_upstream)),
    of("sliding_window_attend", "one-key-less", "agreement", "the query's own key is not counted "
       "besides", altering(WINDOW, one_key_less)),
    of("sliding_window_attend", "one-key-less-back", "gradient", "the gradient does not count the "
       "query's own key besides", WINDOW, backward=altering(WINDOW_BACKWARD, one_key_less)),
    of("gated_convolution", "reversed", "agreement", "the taps are in the other order",
       altering(CONVOLUTION, reversed_taps)),
    of("gated_convolution", "swapped", "agreement", "the gate is the convolved half",
       altering(CONVOLUTION, swapped_halves)),
)  # fmt: skip
