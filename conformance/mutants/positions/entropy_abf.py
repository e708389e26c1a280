"""Wrong kernels of Entropy-ABF: the scale of another row, of a key, of the wrong layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.positions import entropy_abf

ATTENTION = right("entropy_abf.extended_attention")
BACKWARD = entropy_abf.extended_attention_backward
VISIBLE = entropy_abf.visible
LOGITS = right("entropy_abf.logits")
ATTEND = right("entropy_abf.attend")
ROTATE = right("entropy_abf.rope_rotate")
SCALE = right("entropy_abf.row_scale")
FREQUENCIES = right("entropy_abf.rope_frequencies")
EXEMPT = right("entropy_abf.layer_is_exempt")


def of_the_position(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    """ln(p) in place of ln(p + 1)."""
    return SCALE(positions - 1, c, floor)


def of_the_local_row(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    """The row's index within the call stands in for its position."""
    return SCALE(np.zeros_like(positions) + np.arange(positions.shape[-1]), c, floor)


def of_the_last_row(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    """Every row of a chunk has the scale of its last."""
    return SCALE(np.zeros_like(positions) + positions[..., -1:], c, floor)


def one_for_all(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    """The mean scale, folded into the softmax scale of the whole call."""
    lam = SCALE(positions, c, floor)
    return np.zeros_like(lam) + (lam.mean(axis=-1, keepdims=True) if lam.size else 0)


def never_below_one(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    return SCALE(positions, c, 1.0)


def not_floored(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    return SCALE(positions, c, 1e-6)


def in_base_2(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    return SCALE(positions, 2.0, floor)


def in_bfloat16(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    """Eight bits of mantissa."""
    lam = SCALE(positions, c, floor)
    exponent = 2.0 ** np.floor(np.log2(lam))
    return np.round(lam / exponent * 128) / 128 * exponent


def one_layer_more(layer: int, n_exempt: int = 2) -> bool:
    return layer <= n_exempt


def the_last_layers(layer: int, n_exempt: int = 2) -> bool:
    return layer >= n_exempt


def never_exempt(layer: int, n_exempt: int = 2) -> bool:
    """What the released code does."""
    return False


def exempt_from_the_base(q: Any, k: Any, *rest: Any, **options: Any) -> Any:
    """Exempt layers keep the base they were trained with."""
    if EXEMPT(options["layer"], options.get("n_exempt", 2)):
        options["base"] = 10000.0
    return ATTENTION(q, k, *rest, **options)


def scaled_keys(q: Any, k: Any, v: Any, pq: Any = None, pk: Any = None, **options: Any) -> Any:
    """Keys carry the scale of their own positions, queries none."""
    if not EXEMPT(options["layer"], options.get("n_exempt", 2)):
        places = np.arange(k.shape[-2]) if pk is None else pk
        lam = SCALE(places, options.get("c", 4096), options.get("floor", 1.0))
        k = k * lam[..., None, :, None].astype(k.dtype)
    return ATTENTION(q, k, v, pq, pk, **{**options, "n_exempt": 99})


def scaled_twice(q: Any, k: Any, v: Any, pq: Any = None, pk: Any = None, **options: Any) -> Any:
    """Queries and keys are both scaled: squared where a token meets itself."""
    if not EXEMPT(options["layer"], options.get("n_exempt", 2)):
        places = np.arange(k.shape[-2]) if pk is None else pk
        lam = SCALE(places, options.get("c", 4096), options.get("floor", 1.0))
        k = k * lam[..., None, :, None].astype(k.dtype)
    return ATTENTION(q, k, v, pq, pk, **options)


def maximum_before_scale(
    q: Any, k: Any, v: Any, pq: Any = None, pk: Any = None, *, causal: bool = True,
    key_mask: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """Rows are shifted by the largest of their logits without the scale."""
    plain, z = LOGITS(q, k, pq, pk, **{**options, "n_exempt": 99}), LOGITS(q, k, pq, pk, **options)
    mask = VISIBLE(*entropy_abf.default_positions(q, k, pq, pk), causal, key_mask)
    top = np.max(np.where(mask, plain, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top).astype(z.dtype)
    with np.errstate(all="ignore"):
        weights = np.where(mask, np.exp(z - top), 0).astype(z.dtype)
        total = np.sum(weights, axis=-1, keepdims=True)
        out = entropy_abf.dense.combine(weights / np.where(total == 0, 1, total), v)
        return out.astype(q.dtype), (top + np.log(total))[..., 0]


def own_frequencies(arguments: dict[str, Any]) -> None:
    """The table is that of the base, whatever frequencies are given."""
    arguments["freqs"] = None


def by_index(pq: Any, pk: Any, causal: bool = True, key_mask: Any = None) -> Any:
    """The causal order of the array, whatever the positions."""
    T, S = pq.shape[-1], pk.shape[-1]
    return VISIBLE(S - T + np.arange(T), np.arange(S), causal, key_mask)


def key_mask_of_the_first(pq: Any, pk: Any, causal: bool = True, key_mask: Any = None) -> Any:
    return VISIBLE(pq, pk, causal, None if key_mask is None else key_mask[:1])


def neighbours(x: Any, positions: Any, freqs: Any) -> Any:
    """Channels 2m and 2m + 1 are a pair, where m and m + d/2 should be."""
    order = np.concatenate([np.arange(0, x.shape[-1], 2), np.arange(1, x.shape[-1], 2)])
    return ROTATE(x[..., order], positions, freqs)[..., np.argsort(order)]


def unscaled_queries(
    q: Any, k: Any, v: Any, pq: Any, pk: Any, dout: Any, dlse: Any = None, **options: Any
) -> Any:
    """The gradient of q is not multiplied by what q was multiplied by."""
    dq, dk, dv = BACKWARD(q, k, v, pq, pk, dout, dlse, **options)
    if not EXEMPT(options["layer"], options.get("n_exempt", 2)):
        places = k.shape[-2] - q.shape[-2] + np.arange(q.shape[-2]) if pq is None else pq
        lam = SCALE(places, options.get("c", 4096), options.get("floor", 1.0))
        dq = dq / lam[..., None, :, None].astype(dq.dtype)
    return dq, dk, dv


def not_turned_back(x: Any, positions: Any, freqs: Any, dout: Any) -> Any:
    return dout


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def trained_base(d: int, base: float = 500000.0) -> Any:
    return FREQUENCIES(d, 10000.0)


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"entropy_abf.{name}", "entropy_abf.extended_attention", law, bug, call, **rest)


def scaling(name: str, law: str, bug: str, scale: Any) -> Mutant:
    return mutant(name, law, bug, replacing(ATTENTION, row_scale=scale))


def step(name: str, operation: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"entropy_abf.{name}", f"entropy_abf.{operation}", law, bug, call, **rest)


MUTANTS = (
    scaling("log-of-position", "agreement", "ln(p) in place of ln(p + 1)", of_the_position),
    scaling("local-row", "lengths", "the scale is that of the row's index in the call",
            of_the_local_row),
    scaling("last-row", "agreement", "all rows have the scale of the last", of_the_last_row),
    scaling("scalar", "agreement", "one scale is folded into the softmax scale", one_for_all),
    scaling("fixed-floor", "agreement", "the floor is always 1", never_below_one),
    scaling("no-floor", "agreement", "rows inside the old window are flattened", not_floored),
    scaling("base-2", "agreement", "the logarithm has base 2, not c", in_base_2),
    scaling("bfloat16-scale", "agreement", "the scale is rounded to bfloat16", in_bfloat16),
    mutant("one-layer-more", "agreement", "the first scaled layer is exempt too",
           replacing(ATTENTION, layer_is_exempt=one_layer_more)),
    mutant("last-layers", "agreement", "the last layers are exempt, not the first",
           replacing(ATTENTION, layer_is_exempt=the_last_layers)),
    mutant("never-exempt", "agreement", "every layer is scaled",
           replacing(ATTENTION, layer_is_exempt=never_exempt)),
    mutant("exempt-base", "agreement", "exempt layers keep the base 10000", exempt_from_the_base),
    mutant("scaled-keys", "agreement", "keys are scaled in place of queries", scaled_keys),
    mutant("scaled-twice", "agreement", "queries and keys are both scaled", scaled_twice),
    mutant("maximum-before-scale", "magnitude", "the maximum is taken before the scale",
           maximum_before_scale),
    mutant("own-frequencies", "agreement", "frequencies that are given are not used",
           altering(ATTENTION, own_frequencies)),
    mutant("order-by-index", "agreement", "causal order goes by index, not by position",
           replacing(ATTENTION, visible=by_index)),
    mutant("first-mask", "batch", "every entry of the batch uses the first entry's key mask",
           replacing(ATTENTION, visible=key_mask_of_the_first)),
    mutant("neighbours", "agreement", "neighbouring channels are paired",
           replacing(ATTENTION, rope_rotate=neighbours)),
    mutant("dq-unscaled", "gradient", "the gradient of q lacks the row scale", ATTENTION,
           backward=unscaled_queries),
    mutant("not-turned-back", "gradient", "gradients are those of the rotated q and k", ATTENTION,
           backward=replacing(BACKWARD, rope_rotate_backward=not_turned_back)),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTENTION,
           backward=altering(BACKWARD, no_lse_gradient)),
    step("trained-base", "logits", "agreement", "the base stays 10000",
         replacing(LOGITS, rope_frequencies=trained_base)),
    step("weights-by-index", "attend", "agreement", "causal order goes by index",
         replacing(ATTEND, visible=by_index)),
)  # fmt: skip
