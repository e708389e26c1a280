"""Wrong kernels of LightNet: a phantom key, a lost hand-over, a softmax along the wrong axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import lightnet

GATES = right("lightnet.additive_gates")
RULE = right("lightnet.additive_rule")
SCAN = right("lightnet.vector_decay_attend")
CAUSAL = right("lightnet.lightnet_causal")
WHOLE = right("lightnet.lightnet_noncausal")
STEP = right("lightnet.decode_step")
ANGLES = right("lightnet.md_angles")
LRPE = right("lightnet.md_lrpe")
TPE = right("lightnet.tpe")
MD_TPE = right("lightnet.md_tpe")
TIME_SOFTMAX = lightnet.time_softmax
CAUSAL_BACKWARD = lightnet.lightnet_causal_backward
SCAN_BACKWARD = lightnet.vector_decay_backward


def phantom_key(k: np.ndarray, z0: Any = None) -> Any:
    """z starts at 0: a key of logit 0 precedes the sequence."""
    if z0 is None:
        z0 = np.zeros_like(k, shape=(*k.shape[:-2], k.shape[-1]))
    return GATES(k, z0)


def forgets_handed_over_z(k: np.ndarray, z0: Any = None) -> Any:
    """The first log decay of a continued sequence is 0."""
    kbar, log_decay, z = GATES(k, z0)
    log_decay = log_decay.copy()
    log_decay[..., :1, :] = 0
    return kbar, log_decay, z


def starts_afresh(arguments: dict[str, Any]) -> None:
    """The state is taken, its z is not."""
    if arguments["state"] is not None:
        S, z = arguments["state"]
        arguments["state"] = S, np.full_like(z, -np.inf)


def gates_of_16_bits(k: np.ndarray, z0: Any = None) -> Any:
    kbar, log_decay, z = GATES(k, z0)
    return kbar, log_decay.astype(np.float16).astype(k.dtype), z


def masked_keys_decay(k: np.ndarray, z0: Any = None) -> Any:
    """A padded key ages the state."""
    kbar, log_decay, z = GATES(k, z0)
    return kbar, np.where(np.isneginf(k), np.full_like(k, -0.1), log_decay), z


def factored_apart(
    q: Any, kbar: Any, v: Any, log_decay: Any, S0: Any = None, **options: Any
) -> Any:
    """e^(sum) and e^(-sum) formed by themselves: the second overflows."""
    o, S = SCAN(q, kbar, v, log_decay, S0, **options)
    with np.errstate(all="ignore"):
        sums = np.cumsum(log_decay.astype(np.float32), axis=-2)
        unit = np.prod(np.exp(sums) * np.exp(-sums), axis=-1)
    return (o * unit[..., None]).astype(o.dtype), S


def decays_token_too(S: Any, kbar: Any, v: Any, log_decay: Any, t: int) -> Any:
    """The new token is decayed with the state."""
    new = S + kbar[..., t, :, None] * v[..., t, None, :]
    return np.exp(log_decay[..., t, :, None]) * new


def one_decay_a_head(arguments: dict[str, Any]) -> None:
    """The first channel's decay serves all."""
    g = arguments["log_decay"]
    arguments["log_decay"] = np.broadcast_to(g[..., :1], g.shape).copy()


def first_half_decays(arguments: dict[str, Any]) -> None:
    """The decays of lifted channels are not repeated for their second half."""
    g = arguments["log_decay"].copy()
    g[..., (g.shape[-1] + 1) // 2 :] = 0
    arguments["log_decay"] = g


def scale_in_state(q: Any, kbar: Any, v: Any, g: Any, S0: Any = None, *, scale: float = 1.0) -> Any:
    o, S = SCAN(q, kbar, v, g, S0, scale=scale)
    return o, scale * S


def over_channels(k: np.ndarray) -> np.ndarray:
    """softmax over channels, not over time."""
    return np.swapaxes(TIME_SOFTMAX(np.swapaxes(k, -1, -2)), -1, -2)


def masked_behind_softmax(k: np.ndarray) -> np.ndarray:
    """Padded keys take part in the softmax with logit 0, then their weights are dropped."""
    padded = np.isneginf(k)
    weights = TIME_SOFTMAX(np.where(padded, np.zeros_like(k), k))
    return np.where(padded, np.zeros_like(k), weights)


def without_maximum(k: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        weights = np.exp(k)
        total = np.sum(weights, axis=-2, keepdims=True)
        return weights / np.where(total == 0, 1, total).astype(k.dtype)


def skip_tail(arguments: dict[str, Any]) -> None:
    """Keys after the last whole block are skipped."""
    whole = arguments["k"].shape[-2] // 8 * 8
    if whole:
        for name in ("k", "v"):
            arguments[name] = arguments[name][..., :whole, :]


def detached_gates(
    q: Any, k: Any, v: Any, state: Any, do: Any, dS: Any = None, dz: Any = None, *,
    scale: float = 1.0,
) -> tuple[Any, ...]:  # fmt: skip
    """The mean is not taken off: the gradient through z is lost."""
    dq, _, dv, before = CAUSAL_BACKWARD(q, k, v, state, do, dS, dz, scale=scale)
    keys, values = (lightnet.repeat_heads(x, q.shape[-3]) for x in (k, v))
    S0, z0 = state if state is not None else (None, None)
    kbar, log_decay, _ = GATES(keys, z0)
    dkbar = lightnet.vector_decay_backward(q, kbar, values, log_decay, S0, do, dS, scale=scale)[1]
    return dq, lightnet.sum_groups(kbar * dkbar, k.shape[-3]), dv, before


def constant_state(arguments: dict[str, Any]) -> None:
    """Nothing comes back from the state behind the last token."""
    arguments["dS"] = None


def constant_sums(arguments: dict[str, Any]) -> None:
    """Nothing comes back from the last z."""
    arguments["dz"] = None


def constant_first_sums(result: Any) -> Any:
    """The z handed over is a constant."""
    *tokens, (dS0, dz0) = result
    return *tokens, (dS0, np.zeros_like(dz0))


def undecayed_state(arguments: dict[str, Any]) -> None:
    """The gradient of the last state meets no decay of the last token."""
    if arguments["dS"] is not None and arguments["log_decay"].shape[-2]:
        last = arguments["log_decay"][..., -1, :, None]
        arguments["dS"] = arguments["dS"] * np.exp(-np.maximum(last, -1))


def uncentred(q: Any, k: Any, v: Any, do: Any, *, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    dq, _, dv = lightnet.lightnet_noncausal_backward(q, k, v, do, scale=scale)
    keys, values = (lightnet.repeat_heads(x, q.shape[-3]) for x in (k, v))
    dKV = scale * (np.swapaxes(q, -1, -2) @ do)
    dP = values @ np.swapaxes(dKV, -1, -2)
    return dq, lightnet.sum_groups(lightnet.time_softmax(keys) * dP, k.shape[-3]), dv


def no_running_maximum(q: Any, k: Any, v: Any, g: Any, state: Any = None) -> Any:
    o, (s, Delta, m) = RULE(q, k, v, g, state)
    with np.errstate(all="ignore"):
        sums = np.cumsum(np.exp(g.astype(np.float32)), axis=-2)
        bad = np.where(np.isfinite(sums), 1, np.nan).prod(axis=-1)
    return (o * bad[..., None]).astype(o.dtype), (s, Delta, m)


def normalised_state(result: Any) -> Any:
    o, (s, Delta, m) = result
    return o, (s / np.where(Delta == 0, 1, Delta)[..., None], Delta, m)


def column_major(arguments: dict[str, Any]) -> None:
    """The grid is walked column by column."""
    arguments["shape"] = tuple(reversed(arguments["shape"]))


def position_for_all(arguments: dict[str, Any]) -> None:
    """Leading tokens are counted as the grid's first ones."""
    x, leading = arguments["x"], arguments["l"]
    if leading:
        arguments["x"] = x + 0.01 * np.abs(x)


def floor_split(shape: Any, theta: Any, d: int, l: int = 0) -> np.ndarray:
    """d / m is rounded down, and the last axis gets the rest."""
    right_angles = ANGLES(shape, theta, d, l)
    axes = len(shape)
    if d % axes == 0 or d < axes:
        return right_angles
    full = ANGLES(shape, theta, axes * theta.shape[1], l)
    low = d // axes
    parts = [full[..., i * theta.shape[1] :][..., :low] for i in range(axes)]
    tail = full[..., -1:].repeat(d - low * axes, axis=-1)
    return np.concatenate([*parts, tail], axis=-1)


def decays_before_reading(arguments: dict[str, Any]) -> None:
    arguments["lam"] = np.where(arguments["lam"] == 1, 1, arguments["lam"] ** 2)


def only_last_axis(arguments: dict[str, Any]) -> None:
    """The axes' filters are not summed: the last one is kept."""
    arguments["params"], arguments["axes"] = arguments["params"][-1:], arguments["axes"][-1:]


def in_sequence(x: Any, params: Any, axes: Any) -> np.ndarray:
    """One filter is applied to the other's result."""
    MD_TPE(x, params, axes)
    for one, axis in zip(params, axes, strict=True):
        x = MD_TPE(x, [one], [axis])
    return x


def tampered(name: str, call: Any, law: str, bug: str, **settings: Any) -> Mutant:
    operation, _, short = name.partition(":")
    return Mutant(f"lightnet.{short}", f"lightnet.{operation}", law, bug, call, **settings)


MUTANTS = (
    tampered("additive_gates:phantom-key", phantom_key, "agreement", "z starts at 0, not at -inf."),
    tampered("additive_gates:forgets-z", forgets_handed_over_z, "agreement",
             "The first log decay ignores the z handed over."),
    tampered("additive_gates:half-gates", gates_of_16_bits, "agreement",
             "Log decays pass through 16 bits."),
    tampered("additive_gates:ageing-padding", masked_keys_decay, "agreement",
             "A masked key ages the state."),
    tampered("additive_rule:rule-overflow", no_running_maximum, "magnitude",
             "No running maximum of g."),
    tampered("additive_rule:normalised-state", spoiling(RULE, normalised_state), "agreement",
             "The state returned is already divided by Delta."),
    tampered("vector_decay_attend:factored-apart", factored_apart, "agreement",
             "e^(sum) and e^(-sum) are formed by themselves."),
    tampered("vector_decay_attend:decays-token",
             replacing(SCAN, step_state=decays_token_too), "agreement",
             "The new token is decayed with the state."),
    tampered("vector_decay_attend:one-decay", altering(SCAN, one_decay_a_head), "agreement",
             "One channel's decay serves all."),
    tampered("vector_decay_attend:half-decay", altering(SCAN, first_half_decays), "agreement",
             "The second half of the channels does not decay."),
    tampered("vector_decay_attend:scaled-state", scale_in_state, "agreement",
             "The state contains scale."),
    tampered("vector_decay_attend:constant-state", SCAN, "gradient",
             "Nothing comes back from the last state.",
             backward=altering(SCAN_BACKWARD, constant_state)),
    tampered("vector_decay_attend:undecayed-back", SCAN, "gradient",
             "The last token's decay is skipped on the way back.",
             backward=altering(SCAN_BACKWARD, undecayed_state)),
    tampered("lightnet_causal:starts-afresh", altering(CAUSAL, starts_afresh), "agreement",
             "z is not carried into the first decay."),
    tampered("lightnet_causal:causal-phantom-key", replacing(CAUSAL, additive_gates=phantom_key),
             "agreement", "A phantom key shrinks early outputs."),
    tampered("lightnet_causal:broken-hand-over", altering(CAUSAL, starts_afresh), "stream",
             "Two halves do not make the whole."),
    tampered("lightnet_causal:detached", CAUSAL, "gradient",
             "The gradient through z is lost.", backward=detached_gates),
    tampered("lightnet_causal:constant-last-z", CAUSAL, "gradient",
             "Nothing comes back from the last z.",
             backward=altering(CAUSAL_BACKWARD, constant_sums)),
    tampered("lightnet_causal:constant-first-z", CAUSAL, "gradient",
             "The z handed over is a constant.",
             backward=spoiling(CAUSAL_BACKWARD, constant_first_sums)),
    tampered("lightnet_noncausal:over-channels", replacing(WHOLE, time_softmax=over_channels),
             "agreement", "softmax over channels."),
    tampered("lightnet_noncausal:late-mask",
             replacing(WHOLE, time_softmax=masked_behind_softmax), "agreement",
             "softmax before the padding is masked."),
    tampered("lightnet_noncausal:no-maximum", replacing(WHOLE, time_softmax=without_maximum),
             "magnitude", "exp(k) without a maximum."),
    tampered("lightnet_noncausal:lost-tail", altering(WHOLE, skip_tail), "ragged",
             "Keys behind the last whole block are skipped."),
    tampered("lightnet_noncausal:uncentred", WHOLE, "gradient",
             "dk lacks the mean of dP.", backward=uncentred),
    tampered("decode_step:step-starts-afresh", altering(STEP, starts_afresh), "agreement",
             "z is not carried into the decay."),
    tampered("md_angles:angles-column-major", altering(ANGLES, column_major), "agreement",
             "The grid is walked column by column."),
    tampered("md_angles:floor", floor_split, "agreement", "theta is split by floor, not by ceil."),
    tampered("md_lrpe:column-major", altering(LRPE, column_major), "agreement",
             "The grid is walked column by column."),
    tampered("md_lrpe:leading", altering(LRPE, position_for_all), "leading",
             "Leading tokens are changed."),
    tampered("tpe:squared", altering(TPE, decays_before_reading), "agreement",
             "The decay is applied twice a step."),
    tampered("md_tpe:one-axis", altering(MD_TPE, only_last_axis), "agreement",
             "Only the last axis is filtered."),
    tampered("md_tpe:in-sequence", in_sequence, "agreement",
             "Filters are chained, not summed."),
)  # fmt: skip
