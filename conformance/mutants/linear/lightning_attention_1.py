"""Wrong kernels of TransNormerLLM's layers: moved caches, heads normed alone, leaking batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import lightning_attention_1_batches as batches
from attnspec.reference.linear import lightning_attention_1_layers as layers
from attnspec.reference.linear.lightning_attention_1_rows import (
    _inverse_rms,
    lrpe,
    srms_norm,
    weight_gradient,
)

GLA = right("lightning_attention_1.tnl_gla")
PACKED = right("lightning_attention_1.tnl_gla_packed")
PADDED = right("lightning_attention_1.tnl_gla_padded")
BLOCK = right("lightning_attention_1.tnl_block")
ATTEND = right("lightning_attention_1.decay_attend")
MIX = layers.mix


def through_mix(**steps: Any) -> Any:
    """The token mixer with steps of its parts replaced."""
    return replacing(GLA, mix=replacing(MIX, **steps))


def _rotated(state: np.ndarray, theta: np.ndarray, offset: int) -> np.ndarray:
    """The state as if its keys stood `offset` further on."""
    d = state.shape[-2] // 2
    cos, sin = (f(offset * theta)[..., None].astype(state.dtype) for f in (np.cos, np.sin))
    even, odd = state[..., :d, :], state[..., d:, :]
    return np.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-2)


def moves_cached_keys(arguments: dict[str, Any]) -> None:
    """LRPE's offset is applied to what is cached too."""
    theta = arguments["params"].get("theta")
    if theta is not None and arguments["state"] is not None:
        arguments["state"] = _rotated(arguments["state"], theta, arguments["offset"])


def forgets_offset(arguments: dict[str, Any]) -> None:
    """New tokens are placed from 0 on."""
    arguments["offset"] = 0


def absolute_queries(x: Any, theta: Any, offset: int = 0) -> Any:
    """Frequencies that grow with the offset: a gap means something else further on."""
    return lrpe(x, theta * np.asarray(1 + 1e-2 * offset, theta.dtype), offset)


def by_head(o: Any, u: Any, *, gate: str = "linear", norm: str = "srms", eps: float = 1e-6) -> Any:
    """The norm of each head by itself."""
    normed = layers.merge_heads(srms_norm(o, eps))
    return layers.gate_of(u, gate) * normed


def before_merging(
    o: Any, u: Any, *, gate: str = "linear", norm: str = "srms", eps: float = 1e-6
) -> Any:
    """Heads are merged the wrong way round: channels outermost."""
    rows = np.moveaxis(o, -3, -1)
    merged = rows.reshape(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])
    return layers.gate_of(u, gate) * srms_norm(layers._centred(merged, norm), eps)


def gate_inside(
    o: Any, u: Any, *, gate: str = "linear", norm: str = "srms", eps: float = 1e-6
) -> Any:
    """The gate is applied before the norm."""
    gated = layers.gate_of(u, gate) * layers.merge_heads(o)
    return srms_norm(layers._centred(gated, norm), eps)


def small_keys(q: Any, k: Any, v: Any, s: Any, state: Any = None) -> Any:
    """A scale d^-0.5 slips in; the state tells."""
    scale = np.asarray(q.shape[-1] ** -0.5, q.dtype)
    return ATTEND(q, scale * k, v, s, state)


class HiddenOffset:
    """The offset is kept between calls: a new sequence starts where the last one stopped."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(
        self, x: Any, params: Any, state: Any = None, offset: int = 0, **options: Any
    ) -> Any:
        start, self.seen = offset + self.seen, self.seen + x.shape[-2]
        return GLA(x, params, state, start, **options)


def activated_gate(arguments: dict[str, Any]) -> None:
    arguments["gate"] = "sigmoid"


def activated_values(arguments: dict[str, Any]) -> None:
    arguments["v_activation"] = True


def kept_epsilon(arguments: dict[str, Any]) -> None:
    """The norm has an epsilon of its own."""
    arguments["eps"] = 1e-2


def state_of_pads(x: Any, params: Any, valid: Any, state: Any = None, *rest: Any, **o: Any) -> Any:
    """Padded tokens age the state."""
    y, last = PADDED(x, params, valid, state, *rest, **o)
    pads = np.sum(~valid, axis=-1)[..., None, None, None]
    return y, last * np.exp(-params["slopes"][:, None, None] * pads).astype(last.dtype)


def pads_are_read(x: Any, params: Any, valid: Any, *rest: Any, **options: Any) -> Any:
    """0 times what is stored at a padded token."""
    y, last = PADDED(x, params, valid, *rest, **options)
    stored = np.sum(np.where(valid[..., None], np.zeros_like(x), 0 * x), axis=(-1, -2))
    return y + stored[..., None, None], last


def one_sequence(arguments: dict[str, Any]) -> None:
    """Positions run on from sequence to sequence."""
    arguments["starts"] = np.asarray(arguments["offsets"][:-1])


def leaking(x: Any, params: Any, offsets: Any, *rest: Any, **options: Any) -> Any:
    """0 times the neighbours' rows reaches every sequence."""
    y, last = PACKED(x, params, offsets, *rest, **options)
    return y + np.sum(0 * x), last


def unplaced_gradient(arguments: dict[str, Any]) -> None:
    """The way back places every sequence from 0 on."""
    arguments["starts"] = None


def no_last_state(arguments: dict[str, Any]) -> None:
    """What the state behind the last token gets is not handed back."""
    arguments["dstate"] = None


def no_residual(result: Any) -> Any:
    y, state = result
    return y - y[..., :1] * np.asarray(1e-2, y.dtype), state


def active_mixer(x: Any, Wv: Any, Wu: Any, Wo: Any) -> Any:
    """The channel mixer's sum goes through an activation."""
    return (np.tanh(x @ Wv) * (x @ Wu)) @ Wo


def unnormed_gradient(
    x: Any, params: Any, state: Any, offset: int, dy: Any, dstate: Any = None, **options: Any
) -> Any:
    """The norm's mean of dy * y is left out of the gradient."""
    backward = replacing(
        layers.tnl_gla_backward,
        srms_norm_backward=lambda rows, eps, dh: dh * _inverse_rms(rows, eps),
    )
    return backward(x, params, state, offset, dy, dstate, **options)


def detached_gate(
    x: Any, params: Any, state: Any, offset: int, dy: Any, dstate: Any = None, **options: Any
) -> Any:
    dx, weights, dS = layers.tnl_gla_backward(x, params, state, offset, dy, dstate, **options)
    W = weights["Wqkvu"].copy()
    W[:, 3 * x.shape[-1] :] = 0
    return dx, {**weights, "Wqkvu": W}, dS


def residual_twice(
    x: Any, params: Any, state: Any, offset: int, dy: Any, dstate: Any = None, **options: Any
) -> Any:
    dx, weights, dS = layers.tnl_block_backward(x, params, state, offset, dy, dstate, **options)
    return dx + dy, weights, dS


def last_batch_only(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """A weight's gradient misses all but the last member of the batch."""
    return weight_gradient(x[-1:], dy[-1:])


def tampered(name: str, call: Any, law: str, bug: str, **settings: Any) -> Mutant:
    operation, _, short = name.partition(":")
    slug = "lightning_attention_1"
    return Mutant(f"{slug}.{short}", f"{slug}.{operation}", law, bug, call, **settings)


MUTANTS = (
    tampered("tnl_gla:moved-cache", altering(GLA, moves_cached_keys), "agreement",
             "LRPE's offset is applied to the cached keys again."),
    tampered("tnl_gla:no-offset", altering(GLA, forgets_offset), "stream",
             "Every call places its tokens from 0 on."),
    tampered("tnl_gla:hidden-offset", HiddenOffset(), "repeatable",
             "Positions run on from call to call."),
    tampered("tnl_gla:absolute", through_mix(lrpe=absolute_queries), "common-offset",
             "Products depend on where, not on how far apart."),
    tampered("tnl_gla:norm-by-head", through_mix(gated_norm=by_head), "agreement",
             "Each head is normed alone."),
    tampered("tnl_gla:channels-outermost", through_mix(gated_norm=before_merging), "agreement",
             "Heads are merged with channels outermost."),
    tampered("tnl_gla:gate-inside", through_mix(gated_norm=gate_inside), "agreement",
             "The gate precedes the norm."),
    tampered("tnl_gla:scaled", through_mix(decay_attend=small_keys), "agreement",
             "A scale d^-0.5 slips in."),
    tampered("tnl_gla:gate-activated", altering(GLA, activated_gate), "agreement",
             "The gate passes an activation."),
    tampered("tnl_gla:values-activated", altering(GLA, activated_values), "agreement",
             "v passes an activation."),
    tampered("tnl_gla:own-epsilon", altering(GLA, kept_epsilon), "joint-norm",
             "The norm's epsilon is a constant."),
    tampered("tnl_gla:unnormed-gradient", GLA, "gradient",
             "The norm counts as a factor in the gradient.", backward=unnormed_gradient),
    tampered("tnl_gla:detached-gate", GLA, "gradient",
             "The gate's weights get no gradient.", backward=detached_gate),
    tampered("tnl_gla:last-of-batch",  GLA, "gradient",
             "A weight's gradient is that of the last member of the batch.",
             backward=replacing(layers.tnl_gla_backward, weight_gradient=last_batch_only)),
    tampered("tnl_gla_packed:running-positions", altering(PACKED, one_sequence), "agreement",
             "Positions run on through packed sequences."),
    tampered("tnl_gla_packed:leak", leaking, "alone",
             "NaN in a neighbour reaches all sequences."),
    tampered("tnl_gla_packed:unplaced-gradient", PACKED, "gradient",
             "The way back places every sequence from 0 on.",
             backward=altering(batches.tnl_gla_packed_backward, unplaced_gradient)),
    tampered("tnl_gla_padded:no-dstate", PADDED, "gradient",
             "The gradient of the last state is dropped.",
             backward=altering(batches.tnl_gla_padded_backward, no_last_state)),
    tampered("tnl_gla_padded:ageing", state_of_pads, "agreement", "Padded tokens age the state."),
    tampered("tnl_gla_padded:pads-read", pads_are_read, "poison",
             "0 times what is stored at a padded token."),
    tampered("tnl_block:lost-residual", spoiling(BLOCK, no_residual), "agreement",
             "A part of the residual is lost."),
    tampered("tnl_block:mixer-activated", replacing(BLOCK, sglu=active_mixer), "agreement",
             "The channel mixer has an activation."),
    tampered("tnl_block:residual-twice", BLOCK, "gradient",
             "The residual is counted twice in the gradient.", backward=residual_twice),
)  # fmt: skip
