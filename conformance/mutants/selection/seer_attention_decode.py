"""Wrong kernels of SeerAttention at decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import leaks_masked_values
from attnspec.reference.dense import attention as dense
from attnspec.reference.primitives.rope import rope
from attnspec.reference.primitives.top_k import top_k_mask
from attnspec.reference.selection import seer_attention_decode as decode
from attnspec.reference.selection.seer_attention_decode import GateCache, State

COMPRESS = right("seer_attention.compress_step")
GATE = right("seer_attention.decode_gate")
SELECT = right("seer_attention.decode_select")
ATTEND = right("seer_attention.decode_attend")
STEP = right("seer_attention.step")
# Names that mutants replace while they run are kept here as they are.
rms_norm, pool_blocks = decode._rms_norm, decode.pool_blocks


def one_token_late(cache: GateCache, k_t: np.ndarray, Wk: np.ndarray, b: int,
                   kinds: Sequence[str], *rest: Any) -> GateCache:  # fmt: skip
    """A block is complete when the next one begins."""
    if isinstance(b, int) and cache.rest.shape[-2] + 1 == b:
        return COMPRESS(cache, k_t, Wk, b + 1, kinds, *rest)
    return COMPRESS(cache, k_t, Wk, b, kinds, *rest)


def block_number(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """A block's position is that of the one behind it."""
    return rope(x, positions + 1, base)


def without_newest(x: np.ndarray, b: int, kinds: Sequence[str]) -> np.ndarray:
    """The token that completes a block is not pooled, unless it is alone."""
    return pool_blocks(x[..., :-1, :] if b > 1 else x, b, kinds)


def no_epsilon(x: np.ndarray, weight: Any) -> np.ndarray:
    """The mean is taken off before the norm."""
    return rms_norm(x if weight is None else x - x.mean(axis=-1, keepdims=True), weight)


class InPlace:
    """Raw keys are put into the caller's cache."""

    def __call__(self, cache: GateCache, k_t: np.ndarray, *rest: Any, **options: Any) -> Any:
        result = COMPRESS(cache, k_t, *rest, **options)
        if cache.rest.shape[-2]:
            cache.rest[..., -1, :] = k_t
        return result


def incomplete_is_last_key(q_t: np.ndarray, cache: GateCache, *rest: Any, **options: Any) -> Any:
    """The incomplete block scores as the block before it."""
    scores = GATE(q_t, cache, *rest, **options)
    if cache.rest.shape[-2] and scores.shape[-1] > 1:
        scores[..., -1] = scores[..., -2]
    return scores


def unrotated(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    return x


def summed_heads(q_t: np.ndarray, cache: GateCache, pos: int, Wq: Any, mode: str, *rest: Any,
                 **options: Any) -> Any:  # fmt: skip
    """The heads of a group are added, whatever the mode."""
    scores = GATE(q_t, cache, pos, Wq, mode, *rest, **options)
    return (
        scores
        if mode == "Qproj"
        else scores * scores.dtype.type(q_t.shape[-2] // cache.gk.shape[-3])
    )


def last_counts(scores: np.ndarray, b: int, *, tau: Any = None, budget: Any = None) -> Any:
    """The last block is one of the budget."""
    M = SELECT(scores, b, tau=tau, budget=budget)
    if tau is not None:
        return M
    last = np.arange(scores.shape[-1]) == scores.shape[-1] - 1
    return top_k_mask(np.where(last, np.inf, scores), (budget or 4096) // b)


def last_not_forced(scores: np.ndarray, b: int, *, tau: Any = None, budget: Any = None) -> Any:
    M = SELECT(scores, b, tau=tau, budget=budget)
    if tau is not None:
        return M
    return top_k_mask(scores, (budget or 4096) // b)


def last_of_ties(scores: np.ndarray, k: int) -> np.ndarray:
    return top_k_mask(scores[..., ::-1], k)[..., ::-1]


def logits_against_tau(scores: np.ndarray) -> np.ndarray:
    """The threshold is held against logits."""
    return scores


def first_head_only(x: np.ndarray, heads: int) -> np.ndarray:
    """The mask is that of the first head of a group; the others see all."""
    group = heads // x.shape[-3]
    mask = np.repeat(x, group, axis=-3)
    return mask | (np.arange(heads) % group > 0)[:, None, None]


def whole_blocks_only(q_t: np.ndarray, k: np.ndarray, v: np.ndarray, M: np.ndarray, b: int,
                      **options: Any) -> Any:  # fmt: skip
    """A short last block is not read."""
    right_one = ATTEND(q_t, k, v, M, b, **options)
    if k.shape[-2] <= b or k.shape[-2] % b == 0:
        return right_one
    return ATTEND(q_t, k, v, M & (np.arange(M.shape[-1]) < M.shape[-1] - 1), b, **options)


def whole_lse(result: Any) -> Any:
    return result[0], np.floor(result[1])


def clipped(q_t: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any, **options: Any) -> Any:
    if isinstance(v, np.ndarray) and v.dtype.kind == "f":
        v = np.clip(v, -2, 2)
    return ATTEND(q_t, k, v, *rest, **options)


def gate_before_key(state: State, q_t: np.ndarray, k_t: np.ndarray, v_t: np.ndarray, *rest: Any,
                    **options: Any) -> Any:  # fmt: skip
    """The gate does not know the new token's key: its block always counts as incomplete."""
    out, new = STEP(state, q_t, k_t, v_t, *rest, **options)

    def stale(cache: GateCache, *arguments: Any) -> GateCache:
        return GateCache(k_t[..., None, :], cache.gk)

    if new.cache.rest.shape[-2] or state.k.shape[-2] == 0:
        return out, new
    return replacing(STEP, compress_step=stale)(state, q_t, k_t, v_t, *rest, **options)[0], new


def position_of_next(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Keys stand one token further on than queries, which have the more heads or none."""
    return rope(x, positions + 1, base)


def forgets_the_oldest(result: Any) -> Any:
    out, state = result
    if state.k.shape[-2] > 4:
        state = state._replace(k=state.k.copy())
        state.k[..., 0, :] = 0
    return out, state


def sixteen_bit_gate(result: Any) -> Any:
    out, state = result
    gk = state.cache.gk.astype(np.float16).astype(state.cache.gk.dtype)
    return out, state._replace(cache=state.cache._replace(gk=gk))


def mutant(name: str, operation: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"seer_attention.{name}", f"seer_attention.{operation}", law, bug, call)


MUTANTS = (
    mutant("one-token-late", "compress_step", "agreement", "a block waits for the next one",
           one_token_late),
    mutant("block-behind", "compress_step", "agreement", "a block stands at its end",
           replacing(COMPRESS, rope=block_number)),
    mutant("without-newest", "compress_step", "agreement", "the last token is not pooled",
           replacing(COMPRESS, pool_blocks=without_newest)),
    mutant("layer-norm", "compress_step", "agreement", "the mean is taken off before the norm",
           replacing(COMPRESS, _rms_norm=no_epsilon)),
    mutant("cache-in-place", "compress_step", "agreement", "the caller's cache is written to",
           InPlace()),
    mutant("incomplete-block", "decode_gate", "agreement", "the incomplete block has a score",
           incomplete_is_last_key),
    mutant("unrotated-query", "decode_gate", "agreement", "the query is not rotated",
           replacing(GATE, rope=unrotated)),
    mutant("summed-heads", "decode_gate", "heads", "heads are added where they are averaged",
           summed_heads),
    mutant("last-counts", "decode_select", "agreement", "the last block is part of the budget",
           last_counts),
    mutant("last-not-forced", "decode_select", "agreement", "the last block is not forced",
           last_not_forced),
    mutant("later-tie", "decode_select", "ties", "among equal scores the last is chosen",
           replacing(SELECT, top_k_mask=last_of_ties)),
    mutant("logits", "decode_select", "agreement", "the threshold is held against logits",
           replacing(SELECT, softmax=logits_against_tau)),
    mutant("first-head-only", "decode_attend", "heads", "a group does not share its mask",
           replacing(ATTEND, repeat_heads=first_head_only)),
    mutant("decode-tail", "decode_attend", "agreement", "a short last block is not read",
           whole_blocks_only),
    mutant("decode-leak", "decode_attend", "poison", "values not selected are multiplied by 0",
           replacing(ATTEND, attend=replacing(dense.attend, combine=leaks_masked_values))),
    mutant("decode-lse", "decode_attend", "split", "lse is rounded down",
           spoiling(ATTEND, whole_lse)),
    mutant("decode-clipped", "decode_attend", "linearity", "values are clipped", clipped),
    mutant("gate-first", "step", "stream", "the gate runs before the new key is in its cache",
           gate_before_key),
    mutant("next-position", "step", "agreement", "keys stand one token further on",
           replacing(STEP, rope=position_of_next)),
    mutant("lost-key", "step", "stream", "the oldest key is lost on the way",
           spoiling(STEP, forgets_the_oldest)),
    mutant("16-bit-gate", "step", "agreement", "compressed keys are kept in 16 bits",
           spoiling(STEP, sixteen_bit_gate)),
)  # fmt: skip
