"""Wrong kernels of SeerAttention's gate: pools, positions, scores and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import first_of_group
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.primitives.top_k import top_k_mask
from attnspec.reference.selection import seer_attention_gate as gate
from attnspec.reference.selection import seer_attention_selection as selection

POOL = right("seer_attention.pool_blocks")
ROPE = right("seer_attention.gate_rope")
SCORES = right("seer_attention.gate_scores")
BACKWARD = gate.gate_scores_backward
THRESHOLD = right("seer_attention.select_threshold")
RATIO = right("seer_attention.select_ratio")
TO_K = right("seer_attention.ratio_to_k")
BLOCKS = right("seer_attention.select_blocks")
# Names that mutants replace while they run are kept here as they are.
rotate, finish, softmax_right = gate._rotate, selection._finish, softmax


def zeros_behind(x: np.ndarray, b: int, kinds: Sequence[str]) -> np.ndarray:
    """A short last block is filled up with zeros, which are pooled too."""
    POOL(x, b, kinds)
    missing = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % b), (0, 0)]
    return POOL(np.pad(x, missing), b, kinds)


def whole_blocks(x: np.ndarray, b: int, kinds: Sequence[str]) -> np.ndarray:
    """A short last block is left out, if there is another."""
    return POOL(x[..., : x.shape[-2] // b * b, :] if x.shape[-2] > b > 0 else x, b, kinds)


def in_order(x: np.ndarray, b: int, kinds: Sequence[str]) -> np.ndarray:
    """The poolings come in the order of the alphabet."""
    POOL(x, b, kinds)
    return POOL(x, b, sorted(kinds))


def block_index(nb: int, b: int, dg: int, base: float = 10000.0) -> Any:
    """Block n stands at position n."""
    ROPE(nb, b, dg, base)
    return ROPE(nb, 1, dg, base)


def block_end(nb: int, b: int, dg: int, base: float = 10000.0) -> Any:
    """Block n stands at its last token."""
    cos, sin = ROPE(nb, b, dg, base)
    shift_cos, shift_sin = (x[1:2] for x in ROPE(2, max(b - 1, 1), dg, base))
    if b == 1:
        return cos, sin
    return cos * shift_cos - sin * shift_sin, sin * shift_cos + cos * shift_sin


def neighbours(tables: Any) -> Any:
    """Channels 2i and 2i + 1 share an angle, as in the interleaved convention."""
    return tuple(np.repeat(x[:, : x.shape[1] // 2], 2, axis=1) for x in tables)


def scaled_by_d(pq: np.ndarray, pk: np.ndarray, Wq: Any, Wk: np.ndarray, cos: np.ndarray,
                sin: np.ndarray) -> np.ndarray:  # fmt: skip
    """The scale is that of the heads, not of the gate."""
    G = SCORES(pq, pk, Wq, Wk, cos, sin)
    scale = G.dtype.type(math.sqrt(Wk.shape[-1] / pq.shape[-1]))
    return np.where(np.tri(G.shape[-1], dtype=bool), G * scale, G)


def one_ahead(pq: np.ndarray, pk: np.ndarray, Wq: Any, Wk: np.ndarray, cos: np.ndarray,
              sin: np.ndarray) -> np.ndarray:  # fmt: skip
    """The mask leaves the block behind the diagonal visible."""
    G = SCORES(pq, pk, Wq, Wk, cos, sin)
    flipped = [x[..., ::-1, :] for x in (pq, pk)]
    future = SCORES(*flipped, Wq, Wk, cos[::-1], sin[::-1])[..., ::-1, ::-1]
    return np.where(np.eye(G.shape[-1], k=1, dtype=bool), future, G)


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    return x[..., np.arange(heads) % x.shape[-3], :, :]


def rotated_forwards(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The gradient is rotated as the features are, not back."""
    return rotate(x, cos, sin)


def mean_over_batch(pq: np.ndarray, pk: np.ndarray, Wq: Any, Wk: np.ndarray, cos: np.ndarray,
                    sin: np.ndarray, dG: np.ndarray) -> Any:  # fmt: skip
    """Gradients of the weights are averaged over the batch, not summed."""
    dWq, dWk = BACKWARD(pq, pk, Wq, Wk, cos, sin, dG)
    mean = dWk.dtype.type(1 / len(pq))
    return None if dWq is None else dWq * mean, dWk * mean


def not_strict(softmaxed: np.ndarray, tau: float = 2e-3, *flags: Any, **options: Any) -> Any:
    return THRESHOLD(softmaxed, tau, *flags, **options) | finish(softmaxed == tau, False, False)


def renormalised(arguments: dict[str, Any]) -> None:
    """Weights are divided by the sum of the row, the future's included, if that is not 1."""
    weights = arguments["softmaxed"]
    if isinstance(weights, np.ndarray) and weights.dtype.kind == "f" and weights.ndim > 2:
        total = weights.sum(axis=-1, keepdims=True)
        arguments["softmaxed"] = np.where(np.isnan(total), total, weights)


def last_row_only(chosen: np.ndarray, last_dense: bool, force_diagonal: bool) -> np.ndarray:
    """Only the last block row is dense, not the last two."""
    nb = chosen.shape[-1]
    row = np.arange(nb)[:, None]
    return finish(chosen | (last_dense & (row >= nb - 1)), False, force_diagonal)


def future_kept(chosen: np.ndarray, last_dense: bool, force_diagonal: bool) -> np.ndarray:
    """Rows of the last two blocks keep the future, too."""
    nb = chosen.shape[-1]
    dense = last_dense & (np.arange(nb)[:, None] >= nb - 2)
    return finish(chosen, last_dense, force_diagonal) | dense


def future_chosen(chosen: np.ndarray, last_dense: bool, force_diagonal: bool) -> np.ndarray:
    """What was chosen beyond the diagonal, where a row has fewer than k blocks, stays."""
    return finish(chosen, last_dense, force_diagonal) | chosen


def rounded(rho: float, nb: int) -> int:
    return max(1, round((1 - math.sqrt(1 - rho)) * nb)) if TO_K(rho, nb) else 1


def linear_share(rho: float, nb: int) -> int:
    """k is a share of the blocks, not of the triangle."""
    return max(1, int(rho * nb)) if TO_K(rho, nb) else 1


def none_at_all(rho: float, nb: int) -> int:
    TO_K(rho, nb)
    return int((1 - math.sqrt(1 - rho)) * nb)


def last_of_ties(G: np.ndarray, k: int) -> np.ndarray:
    return top_k_mask(G[..., ::-1], k)[..., ::-1]


def in_half(G: np.ndarray, k: int) -> np.ndarray:
    """Weights in 16 bits are ranked: many are tied."""
    with np.errstate(over="ignore"):
        return top_k_mask(round_to(softmax_right(G), "bfloat16"), k)


def share_of_each_row(G: np.ndarray, k: int) -> np.ndarray:
    """A row takes its share of the blocks it sees, not of all."""
    nb = G.shape[-1]
    chosen = np.zeros(G.shape, bool)
    for R in range(nb):
        chosen[..., R, :] = top_k_mask(G[..., R, :], max(1, k * (R + 1) // nb))
    return chosen


def on_the_budget(G: np.ndarray, rho: float, last_dense: bool = True,
                  force_diagonal: bool = False) -> np.ndarray:  # fmt: skip
    """A diagonal that is forced takes the place of the last of the best."""
    M = RATIO(G, rho, last_dense, force_diagonal)
    if not force_diagonal:
        return M
    return RATIO(np.where(np.eye(G.shape[-1], dtype=bool), np.inf, G), rho, last_dense)


def tokens_count(rho: float, nb: int) -> int:
    """k is computed from tokens, four a block."""
    return TO_K(rho, 4 * nb)


def over_all_blocks(G: np.ndarray) -> np.ndarray:
    """The future is hidden behind the softmax: it takes its share of the weight."""
    past = np.tri(G.shape[-1], dtype=bool)
    return softmax_right(np.where(past, G, 0)) * past


def token_rate(nb: int, b: int, dg: int, base: float) -> Any:
    """Frequencies are those of heads twice as wide."""
    cos, sin = ROPE(nb, b, 2 * dg, base)
    return tuple(np.tile(x[:, : dg // 2], 2) for x in (cos, sin))


def mutant(name: str, operation: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"seer_attention.{name}", f"seer_attention.{operation}", law, bug, call, **rest)


def rationed(**steps: Any) -> Any:
    return replacing(RATIO, **steps)


MUTANTS = (
    mutant("zeros-behind", "pool_blocks", "agreement", "zeros behind the last token are pooled",
           zeros_behind),
    mutant("whole-blocks", "pool_blocks", "ragged", "a short last block is left out",
           whole_blocks),
    mutant("alphabet", "pool_blocks", "agreement", "poolings are put in order", in_order),
    mutant("block-index", "gate_rope", "agreement", "a block's position is its number",
           block_index),
    mutant("block-end", "gate_rope", "agreement", "a block's position is its last token",
           block_end),
    mutant("neighbours", "gate_rope", "agreement", "neighbouring channels share an angle",
           spoiling(ROPE, neighbours)),
    mutant("scale-of-heads", "gate_scores", "agreement", "the scale is 1/sqrt(d), not of dg",
           scaled_by_d),
    mutant("one-ahead", "gate_scores", "prefix", "the next block can be seen", one_ahead),
    mutant("interleaved-gate", "gate_scores", "heads", "query head h reads kv head h % kv_heads",
           replacing(SCORES, repeat_heads=interleaved)),
    mutant("rotated-forwards", "gate_scores", "gradient", "the gradient is rotated forwards",
           SCORES, backward=replacing(BACKWARD, _rotate_back=rotated_forwards)),
    mutant("gate-group", "gate_scores", "gradient", "dWk is that of the first head of a group",
           SCORES, backward=replacing(BACKWARD, sum_groups=first_of_group)),
    mutant("batch-mean", "gate_scores", "gradient", "weights get the mean over the batch", SCORES,
           backward=mean_over_batch),
    mutant("not-strict", "select_threshold", "agreement", "a weight equal to tau is chosen",
           not_strict),
    mutant("renormalised", "select_threshold", "poison", "weights of the future are summed",
           altering(THRESHOLD, renormalised)),
    mutant("last-row", "select_threshold", "agreement", "only one block row is dense",
           replacing(THRESHOLD, _finish=last_row_only)),
    mutant("rounded-k", "ratio_to_k", "agreement", "k is rounded, not cut off", rounded),
    mutant("linear-share", "ratio_to_k", "agreement", "k is a share of the row", linear_share),
    mutant("no-block", "ratio_to_k", "agreement", "a small share keeps nothing", none_at_all),
    mutant("last-of-ties", "select_ratio", "ties", "among equal scores the last is chosen",
           rationed(top_k_mask=last_of_ties)),
    mutant("half-weights", "select_ratio", "agreement", "weights in 16 bits are ranked",
           rationed(top_k_mask=in_half)),
    mutant("share-of-row", "select_ratio", "agreement", "k depends on the row",
           rationed(top_k_mask=share_of_each_row)),
    mutant("future-kept", "select_ratio", "agreement", "dense rows keep the future",
           rationed(_finish=future_kept)),
    mutant("future-chosen", "select_ratio", "agreement", "blocks of the future fill up the k",
           rationed(_finish=future_chosen)),
    mutant("on-the-budget", "select_ratio", "agreement", "a forced diagonal counts among the k",
           on_the_budget),
    mutant("token-share", "select_blocks", "agreement", "k is computed from tokens",
           replacing(BLOCKS, select_ratio=replacing(RATIO, ratio_to_k=tokens_count))),
    mutant("late-mask", "select_blocks", "agreement", "the future takes part in the softmax",
           replacing(BLOCKS, softmax=over_all_blocks)),
    mutant("wide-frequencies", "select_blocks", "agreement", "frequencies are of another width",
           replacing(BLOCKS, gate_rope=token_rate)),
    mutant("padded-pools", "select_blocks", "agreement", "zeros behind the last token are pooled",
           replacing(BLOCKS, pool_blocks=zeros_behind)),
)  # fmt: skip
