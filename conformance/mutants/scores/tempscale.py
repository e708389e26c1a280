"""Wrong kernels of TempScale: a temperature in the wrong place, forgotten, or of another head."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.dense.attention import visible
from attnspec.reference.primitives.softmax import softmax_lse
from attnspec.reference.scores import tempscale

ATTENTION = right("tempscale.tempered_attention")
BACKWARD = tempscale.tempered_attention_backward
SCORES = right("tempscale.scores")
TEMPER = right("tempscale.temper")
TEMPER_BACKWARD = tempscale.temper_backward
ROWS = right("tempscale.softmax_rows")
ATTEND = right("tempscale.attend")


def temperature(arguments: dict[str, Any]) -> Any:
    """The temperature of a call, as it broadcasts against outputs (batch, heads, rows, dv)."""
    tau = arguments["tau"]
    return tau[:, None, None] if isinstance(tau, np.ndarray) else np.float32(tau)


def after_softmax(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, lse = ATTENTION(q, k, v, **{**options, "tau": 1.0})
    return out / temperature({"tau": 1.0, **options}), lse


def raised_without_sum(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Weights of temperature 1 to the power 1 / tau: their sum is not 1."""
    _, plain = ATTENTION(q, k, v, **{**options, "tau": 1.0})
    out, lse = ATTENTION(q, k, v, **options)
    tau = temperature({"tau": 1.0, **options})
    power = plain / (tau[..., 0] if tau.ndim else tau)
    seen = np.isfinite(lse)
    share = np.exp(np.where(seen, lse, 0) - np.where(seen, power, 0))
    return out * share[..., None].astype(out.dtype), lse


def bias_as_it_is(arguments: dict[str, Any]) -> None:
    """The bias is added after the division."""
    if arguments["bias"] is not None:
        arguments["bias"] = arguments["bias"] * temperature(arguments)


def bias_alone(arguments: dict[str, Any]) -> None:
    """Only the bias is divided."""
    if arguments["bias"] is not None:
        arguments["bias"] = arguments["bias"] / temperature(arguments)
        arguments["tau"] = 1.0


def both_sides(scores: Any, tau: Any = 1.0) -> Any:
    """Queries and keys are both divided by the temperature."""
    return TEMPER(TEMPER(scores, tau), tau)


def of_the_first_head(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["tau"], np.ndarray):
        arguments["tau"] = np.repeat(arguments["tau"][:1], len(arguments["tau"]))


def of_the_kv_head(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The temperature is looked up by the kv head's number."""
    tau = options.get("tau", 1.0)
    if isinstance(tau, np.ndarray) and k.shape[-3]:
        options["tau"] = tau[np.arange(len(tau)) // (len(tau) // k.shape[-3])]
    return ATTENTION(q, k, v, **options)


def lse_in_base_2(result: Any) -> Any:
    return result[0], (result[1] * np.float32(np.log2(np.e))).astype(result[1].dtype)


def lse_of_plain_scores(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, _ = ATTENTION(q, k, v, **options)
    return out, ATTENTION(q, k, v, **{**options, "tau": 1.0})[1]


def finite_mask(scores: np.ndarray, mask: Any = None) -> Any:
    """Hidden scores are -1e4, so that a row that sees nothing sees everything."""
    return softmax_lse(np.where(mask, scores, scores.dtype.type(-1e4)))


def leaking_mask(scores: np.ndarray, mask: Any = None) -> Any:
    """-1e4 is added to hidden scores, which are read all the same; a blind row is right."""
    if mask is None:
        return softmax_lse(scores)
    weights, lse = softmax_lse(scores + np.where(mask, 0, -1e4).astype(scores.dtype))
    blind = np.broadcast_to(~np.any(mask, axis=-1, keepdims=True), (*lse.shape, 1))
    nothing = np.full_like(lse, -np.inf)
    return np.where(blind, 0, weights).astype(scores.dtype), np.where(blind[..., 0], nothing, lse)


def overflowing_mask(scores: np.ndarray, mask: Any = None) -> Any:
    """The least number of the dtype divided by tau < 1 is -inf, and -inf - -inf is NaN."""
    weights, lse = softmax_lse(scores, mask)
    return np.where(np.isneginf(lse)[..., None], scores.dtype.type(np.nan), weights), lse


def top_left(q_tokens: int, k_tokens: int, **options: Any) -> np.ndarray:
    causal = np.arange(k_tokens)[None, :] <= np.arange(q_tokens)[:, None]
    allowed = visible(q_tokens, k_tokens, mask=options.get("mask"))
    return allowed & causal if options.get("causal") else allowed


def reads_everything(P: np.ndarray, v: np.ndarray) -> np.ndarray:
    return P @ np.repeat(v, P.shape[-3] // v.shape[-3], axis=-3)


def interleaved(P: np.ndarray, v: np.ndarray) -> np.ndarray:
    return P @ v[..., np.arange(P.shape[-3]) % v.shape[-3], :, :]


def no_division(scores: Any, tau: Any, dout: Any) -> Any:
    return dout, TEMPER_BACKWARD(scores, tau, dout)[1]


def other_sign(result: Any) -> Any:
    return result[0], -result[1]


def one_power_short(scores: Any, tau: Any, dout: Any) -> Any:
    dscores, dtau = TEMPER_BACKWARD(scores, tau, dout)
    return dscores, dtau * tau


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def scaled_bias(arguments: dict[str, Any]) -> None:
    if arguments["bias"] is not None and arguments["scale"] is None:
        arguments["bias"] = arguments["bias"] * np.float32(arguments["q"].shape[-1] ** -0.5)


def bert_scale(arguments: dict[str, Any]) -> None:
    """T5's scale of 1 is taken for no scale given."""
    arguments["scale"] = None if arguments["scale"] == 1.0 else arguments["scale"]


def multiplied(scores: np.ndarray, tau: np.ndarray) -> np.ndarray:
    return scores * tau[:, None, None]


def along_keys(scores: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """The temperatures run along the keys, not the heads."""
    return scores / np.resize(tau, scores.shape[-1])


def nan_hidden(scores: np.ndarray, mask: Any = None) -> np.ndarray:
    """The mask multiplies the weights, after the maximum has been taken over everything."""
    weights = ROWS(scores)
    if mask is None:
        return weights
    weights = weights * mask
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total).astype(weights.dtype)


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"tempscale.{name}", "tempscale.tempered_attention", law, bug, call, **rest)


def step(name: str, law: str, bug: str, function: Any, call: Any, **rest: Any) -> Mutant:
    operation = f"tempscale.{function.__name__}"
    return Mutant(f"tempscale.{name}", operation, law, bug, call, **rest)


MUTANTS = (
    mutant("after-softmax", "agreement", "the output is divided by tau, not the logits",
           after_softmax),
    mutant("raised-without-sum", "agreement", "weights are raised to 1/tau and not normalised",
           raised_without_sum),
    mutant("bias-untempered", "agreement", "the bias is added after the division by tau",
           altering(ATTENTION, bias_as_it_is)),
    mutant("bias-alone", "agreement", "only the bias is divided by tau",
           altering(ATTENTION, bias_alone)),
    mutant("both-sides", "agreement", "q and k are both divided by tau",
           replacing(ATTENTION, temper=both_sides)),
    mutant("first-head", "heads", "every head has the temperature of the first",
           altering(ATTENTION, of_the_first_head)),
    mutant("kv-head", "heads", "the temperature is looked up by the kv head", of_the_kv_head),
    mutant("lse-base-2", "agreement", "lse is in base 2", spoiling(ATTENTION, lse_in_base_2)),
    mutant("lse-untempered", "split", "lse is that of the scores before tempering",
           lse_of_plain_scores),
    mutant("finite-mask", "agreement", "hidden scores are -1e4 and a blind row sees them",
           replacing(ATTENTION, softmax_lse=finite_mask)),
    mutant("leaking-mask", "poison", "-1e4 is added to hidden scores, so what they hold leaks",
           replacing(ATTENTION, softmax_lse=leaking_mask)),
    mutant("overflowing-mask", "lengths", "a finite mask overflows and a blind row is NaN",
           replacing(ATTENTION, softmax_lse=overflowing_mask)),
    mutant("top-left", "lengths", "causal order is aligned at the top left",
           replacing(ATTENTION, visible=top_left)),
    mutant("leak", "poison", "hidden values are multiplied by 0 instead of skipped",
           replacing(ATTENTION, attend=reads_everything)),
    mutant("dscores-undivided", "gradient", "the gradient of the scores is not divided by tau",
           ATTENTION, backward=replacing(BACKWARD, temper_backward=no_division)),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTENTION,
           backward=altering(BACKWARD, no_lse_gradient)),
    step("scaled-bias", "agreement", "the scale multiplies the bias too", SCORES,
         altering(SCORES, scaled_bias)),
    step("bert-scale", "agreement", "a scale of 1 is taken for the default", SCORES,
         altering(SCORES, bert_scale)),
    step("multiplied", "agreement", "the scores are multiplied by tau", TEMPER, multiplied),
    step("along-keys", "agreement", "the temperatures run along the keys", TEMPER, along_keys),
    step("dtau-sign", "gradient", "the gradient of tau has the other sign", TEMPER, TEMPER,
         backward=spoiling(TEMPER_BACKWARD, other_sign)),
    step("dtau-power", "gradient", "the gradient of tau has 1/tau for 1/tau^2", TEMPER, TEMPER,
         backward=one_power_short),
    step("mask-last", "poison", "hidden scores take part in the maximum", ROWS, nan_hidden),
    step("rows-overflow", "agreement", "a row that sees nothing is NaN", ROWS,
         replacing(ROWS, softmax=lambda scores, mask: overflowing_mask(scores, mask)[0])),
    step("interleaved-heads", "heads", "query head h reads kv head h % kv_heads", ATTEND,
         interleaved),
    step("reads-unweighed", "poison", "values without a weight are multiplied by 0", ATTEND,
         reads_everything),
)  # fmt: skip
