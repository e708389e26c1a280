"""Wrong routers of Mixture-of-Head attention: lost factors, wrong choices, a balance of padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, replacing, right
from attnspec.conformance.mutants.heads.moh import of
from attnspec.reference.heads import moh_routing, moh_training

BALANCE = right("moh.load_balance_loss")
CHOOSE = right("moh.topk_mask")
COMBINE = right("moh.combine_gates")
NORMS = right("moh.norm_router")
ROUTE = right("moh.route")
ROUTED = right("moh.routed_gates")
SHARED = right("moh.shared_gates")
NORMS_OF, SPREAD = moh_training._norms, moh_training._spread


def routed_first(gs: Any, gr: Any, a: Any = None) -> np.ndarray:
    COMBINE(gs, gr, a)
    if gs is None or gr is None:
        return COMBINE(gs, gr, a)
    return np.concatenate([a[..., 1:] * gr, a[..., :1] * gs], axis=-1)


def swapped_groups(gs: Any, gr: Any, a: Any = None) -> np.ndarray:
    return COMBINE(gs, gr, None if a is None else a[..., ::-1])


def never_rescaled(arguments: dict[str, Any]) -> None:
    arguments["rescale"] = False


def not_renormalised(p: Any, mask: Any, k: int, *, rescale: bool = True) -> np.ndarray:
    """The factor k without the division."""
    gates = ROUTED(p, mask, k, rescale=False)
    return k * gates if rescale else gates


def gradient_of_constant_sum(p: Any, mask: Any, k: Any, dgr: Any, *, rescale: bool = True) -> Any:
    """The divisor is taken as a constant."""
    if not rescale:
        return moh_routing.routed_gates_backward(p, mask, k, dgr, rescale=False)
    total = np.sum(np.where(mask, p, 0), axis=-1, keepdims=True).astype(p.dtype)
    return np.where(mask, k * dgr / np.where(total == 0, 1, total), 0).astype(p.dtype)


def ties_to_the_last(p: np.ndarray, k: int) -> np.ndarray:
    return CHOOSE(p[..., ::-1], k)[..., ::-1]


def experts_choose(p: np.ndarray, k: int) -> np.ndarray:
    """Every head takes the best tokens instead of every token the best heads."""
    CHOOSE(p, k)
    tokens = p.shape[-2]
    best = CHOOSE(np.swapaxes(p, -1, -2), min(k * tokens // p.shape[-1], tokens))
    return np.swapaxes(best, -1, -2)


def one_more(p: np.ndarray, k: int) -> np.ndarray:
    CHOOSE(p, k)
    return CHOOSE(p, min(k + 1, p.shape[-1]))


def normalised_together(
    x: Any, Wr: Any, Ws: Any, W0: Any, k: int, *, rescale: bool = True
) -> np.ndarray:
    """The chosen heads and the shared ones are divided by one sum, that of all active gates."""
    gates = ROUTE(x, Wr, Ws, W0, k, rescale=rescale)
    if not rescale:
        return gates
    active = np.sum(gates != 0, axis=-1, keepdims=True)
    return (gates * active / np.sum(gates, axis=-1, keepdims=True)).astype(gates.dtype)


def norms_of_key_heads(q_unrot: np.ndarray, hs: int, k: int) -> np.ndarray:
    """Two query heads that share a kv head have one norm, that of the first."""
    NORMS(q_unrot, hs, k)
    first = np.arange(q_unrot.shape[-3]) // 2 * 2
    return NORMS(q_unrot[..., first, :, :], hs, k)


def tokens_before_heads(q_unrot: np.ndarray, hs: int, k: int) -> np.ndarray:
    """The projection is read as if it still had tokens before heads."""
    NORMS(q_unrot, hs, k)
    *leading, heads, tokens, dh = q_unrot.shape
    return NORMS(np.swapaxes(q_unrot.reshape(*leading, tokens, heads, dh), -2, -3), hs, k)


def norms_of_all(q_unrot: np.ndarray, hs: int, k: int) -> np.ndarray:
    """The shared heads compete with the routed ones."""
    NORMS(q_unrot, hs, k)
    return NORMS(q_unrot, 0, hs + k)


def norms_by_absolute_sum(q_unrot: np.ndarray, hs: int) -> np.ndarray:
    norms = NORMS_OF(q_unrot, hs)
    return np.swapaxes(np.sum(np.abs(q_unrot[..., hs:, :, :]), axis=-1), -1, -2).astype(norms.dtype)


def biased_spread(norms: np.ndarray) -> Any:
    spread, spreads = SPREAD(norms)
    n = norms.shape[-1]
    return spread * norms.dtype.type((max(n - 1, 1) / n) ** 0.5), spreads


def counts_padding(p: Any, mask: Any, *, valid: Any = None, rescale: bool = True) -> Any:
    """Padded tokens are summed as 0, and counted."""
    loss = BALANCE(p, mask, valid=valid, rescale=rescale)
    if valid is None or not valid.size:
        return loss
    share = valid.mean().astype(p.dtype)
    return loss * share * share


def reads_padding(p: Any, mask: Any, *, valid: Any = None, rescale: bool = True) -> Any:
    loss = BALANCE(p, mask, valid=valid, rescale=rescale)
    return loss if valid is None else loss + np.sum(p * p.dtype.type(0))


def by_example(p: Any, mask: Any, *, valid: Any = None, rescale: bool = True) -> Any:
    """The mean of each example's loss, instead of the loss of all tokens."""
    parts = [
        BALANCE(p[b], mask[b], valid=None if valid is None else valid[b], rescale=rescale)
        for b in range(len(p))
    ]
    return np.sum(np.stack(parts)) / p.dtype.type(len(p))


def gradient_of_usage(p: Any, mask: Any, dloss: Any, **options: Any) -> np.ndarray:
    """The share of tokens that chose a head is differentiated too, by way of the mask."""
    dp = moh_training.load_balance_loss_backward(p, mask, dloss, **options)
    return np.where(mask, 2 * dp, dp)


def stops_at_the_mask(p: np.ndarray, mask: np.ndarray, dgates: np.ndarray) -> np.ndarray:
    return np.where(mask, dgates, np.zeros_like(dgates))


MUTANTS = (
    of("combine_gates", "routed-first", "agreement", "routed heads come first", routed_first),
    of("combine_gates", "swapped-groups", "agreement", "the groups' weights change places",
       swapped_groups),
    of("routed_gates", "no-factor", "agreement", "neither divided nor times k",
       altering(ROUTED, never_rescaled)),
    of("routed_gates", "not-renormalised", "agreement", "times k, but not divided",
       not_renormalised),
    of("routed_gates", "constant-sum", "gradient", "the divisor has no gradient", ROUTED,
       backward=gradient_of_constant_sum),
    of("shared_gates", "no-factor-shared", "agreement", "shared gates sum to 1",
       altering(SHARED, never_rescaled)),
    of("group_weights", "no-factor-groups", "agreement", "the groups' weights sum to 1",
       altering(right("moh.group_weights"), never_rescaled)),
    of("topk_mask", "ties-to-the-last", "ties", "equal probabilities: the last wins",
       ties_to_the_last),
    of("topk_mask", "experts-choose", "agreement", "heads choose tokens", experts_choose),
    of("topk_mask", "one-more", "agreement", "one head too many", one_more),
    of("route", "route-factor", "agreement", "the factor of the groups is lost",
       replacing(ROUTE, group_weights=altering(moh_routing.group_weights, never_rescaled))),
    of("route", "normalised-together", "agreement", "one sum for shared and routed gates",
       normalised_together),
    of("norm_router", "norms-of-key-heads", "agreement", "one norm for the heads of a group",
       norms_of_key_heads),
    of("norm_router", "tokens-before-heads", "agreement", "the queries' layout is mistaken",
       tokens_before_heads),
    of("norm_router", "all-compete", "agreement", "shared heads compete", norms_of_all),
    of("norm_router", "absolute-sum", "agreement", "the sum of absolute values for the norm",
       replacing(NORMS, _norms=norms_by_absolute_sum)),
    of("norm_probs", "biased-spread", "agreement", "divided by hr, not hr - 1",
       replacing(right("moh.norm_probs"), _spread=biased_spread)),
    of("straight_through", "stops-at-the-mask", "gradient", "only chosen heads get a gradient",
       right("moh.straight_through"), backward=stops_at_the_mask),
    of("load_balance_loss", "counts-padding", "agreement", "means over padded tokens too",
       counts_padding),
    of("load_balance_loss", "by-example", "agreement", "a loss for each example", by_example),
    of("load_balance_loss", "reads-padding", "poison", "padding is multiplied by 0",
       reads_padding),
    of("load_balance_loss", "gradient-of-usage", "gradient", "ce carries a gradient", BALANCE,
       backward=gradient_of_usage),
)  # fmt: skip
