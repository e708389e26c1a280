"""Wrong kernels of TransNormerLLM's steps: frequencies, epsilons, short blocks, layer factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.conformance.mutants.linear.lightning_attention_1 import tampered
from attnspec.reference.linear.lightning_attention_1_rows import _inverse_rms, lrpe_backward

SLOPES = right("lightning_attention_1.slopes")
LAYER = right("lightning_attention_1.layer_slopes")
NORM = right("lightning_attention_1.srms_norm")
SGLU = right("lightning_attention_1.sglu")
FREQUENCIES = right("lightning_attention_1.lrpe_frequencies")
LRPE = right("lightning_attention_1.lrpe")
ATTEND = right("lightning_attention_1.decay_attend")
TILED = right("lightning_attention_1.decay_attend_tiled")
GRADIENT = right("lightning_attention_1.decay_attend_backward")
PLAIN = right("lightning_attention_1.norm_attention")


def geometric_always(H: int) -> np.ndarray:
    """No interleaving where H is no power of two."""
    return 2.0 ** (-8.0 * np.arange(1, H + 1) / H)


def layer_over_all(H: int, l: int, L: int, *, decay_rule: str = "geometric") -> np.ndarray:
    """The factor is 1 - l / L."""
    if decay_rule == "linear":
        return LAYER(H, l, L, decay_rule=decay_rule)
    return SLOPES(H) * (1 - l / L)


def sum_not_mean(x: Any, eps: float = 1e-6) -> Any:
    total = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps)
    return np.where(total == 0, np.zeros_like(x), x / np.where(total == 0, 1, total))


def eps_outside(x: Any, eps: float = 1e-6) -> Any:
    """The root, plus epsilon."""
    rms = np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + np.asarray(eps, x.dtype)
    return np.where(rms == 0, np.zeros_like(x), x / np.where(rms == 0, 1, rms))


def zero_over_zero(x: Any, eps: float = 1e-6) -> Any:
    with np.errstate(all="ignore"):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.asarray(eps, x.dtype))


def as_a_factor(x: Any, eps: float, dy: Any) -> Any:
    """The gradient without its second term."""
    return dy * _inverse_rms(x, eps)


def one_activation(x: Any, Wv: Any, Wu: Any, Wo: Any) -> Any:
    """A SiLU, as in every other gated mixer."""
    gate = x @ Wv
    return (gate / (1 + np.exp(-gate)) * (x @ Wu)) @ Wo


def same_for_heads(H: int, d: int, base: float = 10000.0) -> np.ndarray:
    """Every head has the frequencies of a RoPE."""
    return np.repeat(float(base) ** (-2.0 * np.arange(d) / (2 * d))[None], H, axis=0)


def interleaved(y: Any) -> Any:
    """cos and sin next to one another, not behind."""
    d = y.shape[-1] // 2
    return np.stack([y[..., :d], y[..., d:]], axis=-1).reshape(y.shape)


def from_one(arguments: dict[str, Any]) -> None:
    arguments["offset"] += 1


def not_trained(x: Any, theta: Any, offset: int, dy: Any) -> Any:
    dx, dtheta = lrpe_backward(x, theta, offset, dy)
    return dx, 0 * dtheta


def decays_new_token(result: Any) -> Any:
    o, S = result
    return o, S * np.asarray(0.99, S.dtype)


def drops_state(arguments: dict[str, Any]) -> None:
    arguments["S0"] = None


def whole_block(q: Any, k: Any, v: Any, slopes: Any, block: int, S0: Any = None) -> Any:
    """The last block is short, and its keys are decayed as if it were not."""
    o, S = TILED(q, k, v, slopes, block, S0)
    missing = -q.shape[-2] % block
    return o, S * np.exp(-slopes * missing)[:, None, None].astype(S.dtype)


def lost_tail(arguments: dict[str, Any]) -> None:
    """Keys behind the last whole block of eight are skipped."""
    whole = arguments["k"].shape[-2] // 8 * 8
    if whole:
        for name in ("k", "v"):
            x = arguments[name].copy()
            x[..., whole:, :] = 0
            arguments[name] = x


def larger_dv(gradients: Any) -> Any:
    dq, dk, dv = gradients
    return dq, dk, dv * np.asarray(1.01, dv.dtype)


def no_upstream_decay(arguments: dict[str, Any]) -> None:
    """The sweep from the end does not decay."""
    arguments["slopes"] = 0 * arguments["slopes"]


def looks_ahead(q: Any, k: Any, v: Any) -> Any:
    """The upper triangle's next diagonal is let through."""
    o = PLAIN(q, k, v)
    later = np.concatenate([v[..., 1:, :], 0 * v[..., :1, :]], axis=-2)
    keys = np.concatenate([k[..., 1:, :], 0 * k[..., :1, :]], axis=-2)
    return o + np.sum(q * keys, axis=-1, keepdims=True) * later


MUTANTS: tuple[Mutant, ...] = (
    tampered("slopes:not-interleaved", geometric_always, "agreement",
             "Slopes of H heads although H is no power of two."),
    tampered("layer_slopes:over-all-layers", layer_over_all, "agreement",
             "The layer's factor is 1 - l / L."),
    tampered("srms_norm:sum", sum_not_mean, "agreement", "The sum of squares, not their mean."),
    tampered("srms_norm:eps-outside", eps_outside, "agreement", "Epsilon is added to the root."),
    tampered("srms_norm:zero-row", zero_over_zero, "agreement", "A row of zeros becomes NaN."),
    tampered("srms_norm:factor-gradient", NORM, "gradient",
             "The gradient does not stand upright on x.", backward=as_a_factor),
    tampered("sglu:activated", one_activation, "second-degree", "The mixer has an activation."),
    tampered("lrpe_frequencies:same-heads", same_for_heads, "agreement",
             "All heads have the same frequencies."),
    tampered("lrpe:interleaved", spoiling(LRPE, interleaved), "agreement",
             "cos and sin lie next to one another."),
    tampered("lrpe:from-one", altering(LRPE, from_one), "agreement", "Positions start at 1."),
    tampered("lrpe:theta-fixed", LRPE, "gradient", "theta gets no gradient.",
             backward=not_trained),
    tampered("decay_attend:aged-state", spoiling(ATTEND, decays_new_token), "agreement",
             "The state returned is a little decayed."),
    tampered("decay_attend:no-hand-over", altering(ATTEND, drops_state), "stream",
             "The state given is not used."),
    tampered("decay_attend_tiled:whole-block", whole_block, "agreement",
             "A short last block is decayed as a whole one."),
    tampered("decay_attend_tiled:lost-tail", altering(TILED, lost_tail), "ragged",
             "Keys behind the last whole block are skipped."),
    tampered("decay_attend_backward:wrong-dv", spoiling(GRADIENT, larger_dv), "agreement",
             "dv is off by one percent."),
    tampered("decay_attend_backward:undecayed", altering(GRADIENT, no_upstream_decay), "agreement",
             "The sweeps do not decay."),
    tampered("norm_attention:looks-ahead", looks_ahead, "prefix", "The next token is seen."),
)  # fmt: skip
