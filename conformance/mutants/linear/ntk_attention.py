"""Wrong kernels of NTK-Attention: a misplaced stabiliser, a mangled feature map, a lost prefix."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense.attention import State, attend, score
from attnspec.reference.linear import (
    ntk_attention,
    ntk_attention_gradients,
    ntk_attention_prefix,
)

ATTEND = right("ntk_attention.ntk_attend")
BACKWARD = ntk_attention_gradients.ntk_backward
MERGE = right("ntk_attention.merge_prefix")
PHI = right("ntk_attention.phi")
STATE = right("ntk_attention.prefix_state")
STEP = right("ntk_attention.step")
TERMS = right("ntk_attention.prefix_terms")
BLOCK = 8


def top_over_all(q: Any, K: Any, V: Any, Z: Any, k: Any, **options: Any) -> Any:
    """The authors' stabiliser: the maximum of all scores, hidden ones too."""

    def everything(scores: np.ndarray, held: np.ndarray) -> np.ndarray:
        return np.maximum(score(q, K, scale=options.get("scale")).max(axis=-1, initial=0), 0)

    with np.errstate(all="ignore"):
        shares = replacing(ntk_attention_prefix.shares, row_top=everything)
        return replacing(ATTEND, shares=shares)(q, K, V, Z, k, **options)


def no_maximum(scores: np.ndarray, num: np.ndarray, den: np.ndarray) -> Any:
    with np.errstate(all="ignore"):
        weights = np.exp(scores)
        total = np.sum(weights, axis=-1) + den
        safe = np.where(total == 0, np.ones_like(total), total)
        return (
            weights / safe[..., None],
            np.where(total == 0, np.zeros_like(den), np.ones_like(den)),
            safe,
        )


def prefix_not_rescaled(scores: np.ndarray, num: np.ndarray, den: np.ndarray) -> Any:
    """exp(-m) is left out of the prefix terms."""
    top = ntk_attention_prefix.row_top(scores, np.ones(scores.shape[:-1], bool))
    weights = np.exp(scores - top[..., None])
    total = np.sum(weights, axis=-1) + den
    safe = np.where(total == 0, np.ones_like(total), total)
    return (
        weights / safe[..., None],
        np.where(total == 0, np.zeros_like(den), np.ones_like(den)),
        safe,
    )


def prefix_in_maximum_always(scores: np.ndarray, held: np.ndarray) -> np.ndarray:
    return np.maximum(np.max(scores, axis=-1, initial=-np.inf), 0)


def no_prefix_for_empty_rows(q: Any, K: Any, *args: Any, **options: Any) -> Any:
    """A row without a visible key is 0, as in attention without a prefix."""
    out = ATTEND(q, K, *args, **options)
    mask = options.get("key_mask")
    visible = ntk_attention.visible_scores(q, K, options.get("causal", False), mask, None)
    seen = np.isfinite(visible).sum(axis=-1, keepdims=True)
    return np.where(seen == 0, np.zeros_like(out), out)


def unscaled_lse(
    q: Any, K: Any, V: Any, Z: Any, k: Any, *, positivity: str = "abs", **options: Any
) -> Any:
    """The softmax part is merged by the lse of scores without their scale."""
    mask = options.pop("key_mask", None)
    options["mask"] = None if mask is None else mask[:, None, None]
    soft, _ = attend(q, K, V, **options)
    _, lse = attend(q, K, V, **{**options, "scale": 1.0})
    return MERGE(soft, lse, *TERMS(q, Z, k, positivity=positivity))


def nothing_without_den(q: Any, Z: Any, k: Any, **options: Any) -> Any:
    """num / den weighted by the prefix's share, which is 0 where den is."""
    num, den = TERMS(q, Z, k, **options)
    return np.where(den[..., None] == 0, np.zeros_like(num), num), den


def scaled_terms(q: np.ndarray, Z: np.ndarray, k: np.ndarray, **options: Any) -> Any:
    return TERMS(q / q.shape[-1] ** 0.5, Z, k, **options)


def width_of_64(x: np.ndarray) -> np.ndarray:
    return PHI(x * (x.shape[-1] / 64) ** 0.25)


def plain_elu(x: np.ndarray) -> np.ndarray:
    return PHI(x) - 1


def no_absolute_value(k: np.ndarray, positivity: str) -> np.ndarray:
    return k if positivity == "abs" else ntk_attention_prefix.positive(k, positivity)


def state_by_kv_head(arguments: dict[str, Any]) -> None:
    """The states are read at h // group, as keys are."""
    heads, kv_heads = arguments["q"].shape[-3], arguments["K"].shape[-3]
    if kv_heads and heads % kv_heads == 0:
        for name in ("Z", "k"):
            arguments[name] = arguments[name][np.arange(heads) // (heads // kv_heads)]


def mask_of_first_entry(arguments: dict[str, Any]) -> None:
    if arguments["key_mask"] is not None:
        arguments["key_mask"] = np.repeat(
            arguments["key_mask"][:1], len(arguments["key_mask"]), axis=0
        )


def leaks_masked_values(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    return weights @ repeat_heads(v, weights.shape[-3])


def skip_tail(arguments: dict[str, Any]) -> None:
    """Keys after the last whole block are skipped."""
    whole = arguments["K"].shape[-2] // BLOCK * BLOCK
    if whole and not arguments["causal"] and arguments["key_mask"] is None:
        for name in ("K", "V"):
            arguments[name] = arguments[name][..., :whole, :]


def smoothed_keys(arguments: dict[str, Any]) -> None:
    """The mean key is taken away first, as softmax would allow."""
    K = arguments["K"]
    if K.shape[-2]:
        arguments["K"] = K - K.mean(axis=-2, keepdims=True)


def masked_prefix(arguments: dict[str, Any]) -> None:
    """The causal rule hides the prefix from the first query."""
    if arguments["causal"]:
        arguments["q"] = arguments["q"].copy()
        arguments["q"][..., :1, :] = -np.abs(arguments["q"][..., :1, :]) * 1e3


def base_two(arguments: dict[str, Any]) -> None:
    arguments["lse"] = (arguments["lse"] / np.log(2)).astype(arguments["lse"].dtype)


def naive_merge(softmax_out: Any, lse: Any, num: Any, den: Any) -> Any:
    """exp(-lse) overflows, as soon as lse is far below 0."""
    MERGE(softmax_out, lse, num, den)
    with np.errstate(all="ignore"):
        far = np.exp(-lse)
        keep = 1 / (1 + den * far)
        out = keep[..., None] * (softmax_out + far[..., None] * num)
    return np.where(np.isneginf(lse)[..., None], MERGE(softmax_out, lse, num, den), out)


def numerator_lost(softmax_out: Any, lse: Any, num: Any, den: Any) -> Any:
    """keep * softmax + (1 - keep) * num / den, which drops num where den is 0."""
    num = np.where(den[..., None] == 0, np.zeros_like(num), num)
    return MERGE(softmax_out, lse, num, den)


def mean_state(K_P: np.ndarray, V_P: np.ndarray) -> Any:
    Z, k = STATE(K_P, V_P)
    m = max(K_P.shape[-2], 1)
    return Z / m, k / m


def exp_features(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(x / x.shape[-1] ** 0.25)


def forgets_the_oldest(result: Any) -> Any:
    out, state = result
    if state.k.shape[-2] > BLOCK:
        state = State(state.k[..., 1:, :], state.v[..., 1:, :])
    return out, state


def first_of_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // kv_heads, :, :]


def no_prefix_slope(x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x)


def unsigned(k: np.ndarray, positivity: str) -> np.ndarray:
    return np.ones_like(k)


def hidden_keys_learn(q: Any, K: Any, V: Any, Z: Any, k: Any, dout: Any, **options: Any) -> Any:
    """The gradient does not know what the forward pass has masked."""
    return BACKWARD(q, K, V, Z, k, dout, **{**options, "causal": False, "key_mask": None})


def first_entry_only(q: Any, K: Any, V: Any, Z: Any, k: Any, dout: Any, **options: Any) -> Any:
    """dZ and dk are not summed over the batch."""
    dq, dK, dV, *_ = BACKWARD(q, K, V, Z, k, dout, **options)
    if options.get("key_mask") is not None:
        options["key_mask"] = options["key_mask"][:1]
    return dq, dK, dV, *BACKWARD(q[:1], K[:1], V[:1], Z, k, dout[:1], **options)[3:]


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"ntk_attention.{name}", "ntk_attention.ntk_attend", law, bug, call, **rest)


def of(operation: str, name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"ntk_attention.{name}", f"ntk_attention.{operation}", law, bug, call)


MUTANTS = (
    mutant("maximum-of-all", "prefix", "the row maximum is taken before masking", top_over_all),
    mutant("no-maximum", "magnitude", "exp without subtracting the maximum overflows",
           replacing(ATTEND, shares=no_maximum)),
    mutant("prefix-not-rescaled", "agreement", "the prefix terms are not multiplied by exp(-m)",
           replacing(ATTEND, shares=prefix_not_rescaled)),
    mutant("zero-in-maximum", "empty-prefix", "low scores underflow beside a prefix of zeros",
           replacing(ATTEND, shares=replacing(ntk_attention_prefix.shares,
                                              row_top=prefix_in_maximum_always))),
    mutant("zero-empty-row", "lengths", "a row that sees only the prefix is 0",
           no_prefix_for_empty_rows),
    mutant("numerator-by-share", "numerator-alone", "Z is dropped where k is 0",
           replacing(ATTEND, prefix_terms=nothing_without_den)),
    mutant("unscaled-lse", "agreement", "the lse is that of scores without their scale",
           unscaled_lse),
    mutant("scaled-features", "agreement", "1/sqrt(d) is applied to the prefix terms as well",
           replacing(ATTEND, prefix_terms=scaled_terms)),
    mutant("state-by-kv-head", "heads", "Z and k are read by kv head",
           altering(ATTEND, state_by_kv_head)),
    mutant("first-mask", "batch", "every entry of the batch uses the first entry's padding",
           altering(ATTEND, mask_of_first_entry)),
    mutant("leak", "poison", "masked values are multiplied by 0 instead of skipped",
           replacing(ATTEND, combine=leaks_masked_values)),
    mutant("skip-tail", "ragged", "keys after the last whole block are skipped",
           altering(ATTEND, skip_tail)),
    mutant("smoothed-keys", "prefix-shift", "the mean key is taken away, as if it were softmax",
           altering(ATTEND, smoothed_keys)),
    mutant("masked-prefix", "agreement", "the causal rule hides the prefix from the first query",
           altering(ATTEND, masked_prefix)),
    mutant("hidden-keys-learn", "gradient", "hidden keys take part in the gradient", ATTEND,
           backward=hidden_keys_learn),
    mutant("first-entry", "gradient", "dZ and dk come from the first entry of the batch",
           ATTEND, backward=first_entry_only),
    mutant("first-of-group", "gradient", "dK and dV are those of the first head of the group",
           ATTEND, backward=replacing(BACKWARD, sum_groups=first_of_group)),
    mutant("no-prefix-slope", "gradient", "dq lacks what the prefix contributes", ATTEND,
           backward=replacing(BACKWARD, phi_slope=no_prefix_slope)),
    mutant("unsigned-dk", "gradient", "dk lacks the sign of k", ATTEND,
           backward=replacing(BACKWARD, positive_slope=unsigned)),
    of("phi", "width-of-64", "agreement", "the features are scaled for d = 64", width_of_64),
    of("phi", "plain-elu", "agreement", "elu without the + 1", plain_elu),
    of("phi", "exp-features", "agreement", "exp on both sides of 0", exp_features),
    of("prefix_state", "mean-state", "prefix-addition", "the state is a mean over the prefix",
       mean_state),
    of("prefix_terms", "no-absolute-value", "agreement", "k is used with its sign",
       replacing(TERMS, positive=no_absolute_value)),
    of("merge_prefix", "lse-base-2", "agreement", "lse is taken to be in base 2",
       altering(MERGE, base_two)),
    of("merge_prefix", "naive-merge", "agreement", "exp(-lse) overflows", naive_merge),
    of("merge_prefix", "numerator-lost", "agreement", "num is dropped where den is 0",
       numerator_lost),
    of("step", "short-state", "stream", "the oldest token falls out of the state",
       spoiling(STEP, forgets_the_oldest)),
)  # fmt: skip
