"""Wrong kernels of Lightning Attention-2: decays off by one step, states lost on the way."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import lightning_attention_2 as lightning
from attnspec.reference.linear import lightning_attention_2_chunks as chunks

ATTEND = right("lightning_attention_2.attend")
BACKWARD = lightning.attend_backward
# Names that mutants replace while they run are kept here as they are.
decays, chunk_states = chunks._decays, chunks.chunk_states


def in_blocks(**steps: Any) -> Any:
    """`attend` whose blocks are computed with wrong steps, states and outputs alike."""
    return replacing(
        ATTEND,
        chunk_states=replacing(chunks.chunk_states, **steps),
        chunk_output=replacing(chunks.chunk_output, **steps),
    )


def backward_blocks(**steps: Any) -> Any:
    return replacing(BACKWARD, backward_chunk=replacing(chunks.backward_chunk, **steps))


def one_step_less(g: np.ndarray, dtype: Any) -> Any:
    """The query of row r is decayed r - 1 times, the state is not decayed beforehand."""
    start = np.exp(np.cumsum(g, axis=-1) - g[..., :1])
    return decays(g, dtype)._replace(from_start=start[..., None].astype(dtype))


def own_token_decays(g: np.ndarray, dtype: Any) -> Any:
    """A token's key and value enter the state already decayed once."""
    right_ones = decays(g, dtype)
    once = np.exp(g)[..., None].astype(dtype)
    return right_ones._replace(to_end=right_ones.to_end * once)


def whole_block(block: int) -> Any:
    """The state always decays by as many rows as a full block has."""

    def wrong(g: np.ndarray, dtype: Any) -> Any:
        missing = max(block - g.shape[-1], 0)
        lost = np.exp(missing * g[..., :1])[..., None].astype(dtype)
        factors = decays(g, dtype)
        return factors._replace(through=factors.through * lost, to_end=factors.to_end * lost)

    return wrong


def two_exponentials(g: np.ndarray, dtype: Any) -> Any:
    """e^G_r times e^-G_j: the second overflows where the decay is strong."""
    G = np.cumsum(g, axis=-1).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.exp(G)[..., :, None] * np.exp(-G)[..., None, :]
    within = np.where(np.tri(G.shape[-1], dtype=bool), product, 0.0)
    return decays(g, dtype)._replace(within=within.astype(dtype))


def masked_too_late(g: np.ndarray, dtype: Any) -> Any:
    """The exponential above the diagonal is infinite, and then multiplied by the mask."""
    G = np.cumsum(g, axis=-1).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        within = np.exp(G[..., :, None] - G[..., None, :]) * np.tri(G.shape[-1])
    return decays(g, dtype)._replace(within=within.astype(dtype))


def next_token_too(g: np.ndarray, dtype: Any) -> Any:
    """The mask lets a query see the token behind it."""
    factors = decays(g, dtype)
    above = np.eye(g.shape[-1], k=1, dtype=dtype)
    return factors._replace(within=factors.within + above)


def state_kept(g: np.ndarray, dtype: Any) -> Any:
    factors = decays(g, dtype)
    return factors._replace(through=np.ones_like(factors.through))


def narrow_states(result: Any) -> Any:
    S_entering, S = result
    return round_to(S_entering, "bfloat16").astype(S_entering.dtype), S


def one_block_late(k: np.ndarray, v: np.ndarray, g: np.ndarray, block: int, S0: Any = None) -> Any:
    """The states read are those behind a block, its own tokens included."""
    S_entering, S = chunk_states(k, v, g, block, S0)
    return np.concatenate([S_entering, S[..., None, :, :]], axis=-3)[..., 1:, :, :], S


def width_in_slices(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, S0: Any = None,
                    **options: Any) -> Any:  # fmt: skip
    """Wide heads are computed in slices of the width, whose outputs are added in bfloat16."""
    o, S = ATTEND(q, k, v, s, S0, **options)
    if q.shape[-1] <= 32:
        return o, S
    total = np.zeros_like(o)
    for first in range(0, q.shape[-1], 32):
        part = slice(first, first + 32)
        state = None if S0 is None else S0[..., part, :]
        one, _ = ATTEND(q[..., part], k[..., part], v, s, state, **options)
        total = round_to(total + one, "bfloat16").astype(o.dtype)
    return total, S


def hidden_scale(arguments: dict[str, Any]) -> None:
    q = arguments["q"]
    if isinstance(q, np.ndarray) and q.ndim and q.dtype.kind == "f":
        arguments["q"] = q * q.dtype.type(q.shape[-1] ** -0.5)


def slope_of_kv_head(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, *rest: Any,
                     **options: Any) -> Any:  # fmt: skip
    if isinstance(s, np.ndarray) and s.ndim == 1 and s.dtype.kind == "f":
        s = np.where(np.isfinite(s) & (s >= 0), s[np.arange(len(s)) // 2], s)
    return ATTEND(q, k, v, s, *rest, **options)


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    return x[..., np.arange(heads) % x.shape[-3], :, :]


def aligned_in_front(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The zeros that make up for missing rows come behind."""
    T = max(x.shape[-2] for x in arrays)
    padding = [(0, 0)] * (arrays[0].ndim - 2)
    return tuple(np.pad(x, [*padding, (0, T - x.shape[-2]), (0, 0)]) for x in arrays)


def state_of_first_entry(arguments: dict[str, Any]) -> None:
    S0 = arguments["S0"]
    if isinstance(S0, np.ndarray) and S0.ndim == 4:
        arguments["S0"] = np.repeat(S0[:1], len(S0), axis=0)


def first_token_is_written(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray,
                           S0: Any = None, **options: Any) -> Any:  # fmt: skip
    """With a state given, the first token is believed to be in it."""
    if S0 is not None and isinstance(k, np.ndarray) and k.ndim == 4 and k.dtype.kind == "f":
        k = np.concatenate([0 * k[..., :1, :], k[..., 1:, :]], axis=-2)
    return ATTEND(q, k, v, s, S0, **options)


def since_the_start(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, S0: Any = None,
                    **options: Any) -> Any:  # fmt: skip
    """Decays are counted from position 0 with an exponent that is kept from overflowing at 60."""
    o, S = ATTEND(q, k, v, s, S0, **options)
    T = max(q.shape[-2], k.shape[-2])
    far = np.exp(-np.maximum(s * np.float32(T) - 60, 0) * (s < 1)).astype(o.dtype)
    return o * far[:, None, None], S


class Resuming:
    """Without a state it goes on from the last one of the same shape."""

    def __init__(self) -> None:
        self.states: dict[Any, np.ndarray] = {}

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray,
                 S0: Any = None, **options: Any) -> Any:  # fmt: skip
        key = (np.shape(q), np.shape(k), np.shape(v), S0 is None)
        first = self.states.get(key) if S0 is None else S0
        if isinstance(first, np.ndarray) and S0 is None and first.dtype != q.dtype:
            first = None
        o, S = ATTEND(q, k, v, s, first, **options)
        self.states[key] = S
        return o, S


def no_final_gradient(arguments: dict[str, Any]) -> None:
    arguments["dS"] = None


def no_initial_state(arguments: dict[str, Any]) -> None:
    S0 = arguments["S0"]
    arguments["S0"] = None if S0 is None else 0 * S0


def no_gradient_of_the_state(result: Any) -> Any:
    *others, dS0 = result
    return (*others, 0 * dS0)


def slopes_are_fixed(result: Any) -> Any:
    dq, dk, dv, ds, dS0 = result
    return dq, dk, dv, 0 * ds, dS0


def first_of_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // kv_heads, :, :]


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    name = f"lightning_attention_2.{name}"
    return Mutant(name, "lightning_attention_2.attend", law, bug, call, **rest)


MUTANTS = (
    mutant("one-step-less", "agreement", "the carried state is decayed once too little",
           in_blocks(_decays=one_step_less)),
    mutant("own-decay", "agreement", "a token is decayed before the read of the next block",
           in_blocks(_decays=own_token_decays)),
    mutant("full-last-block", "agreement", "the last state decays by a whole block's rows",
           in_blocks(_decays=whole_block(64))),
    mutant("full-last-block-16", "block-size", "only blocks of 16 rows may be short",
           in_blocks(_decays=whole_block(16))),
    mutant("two-exponentials", "agreement", "strong decay overflows in one of two factors",
           in_blocks(_decays=two_exponentials)),
    mutant("masked-late", "agreement", "infinity above the diagonal is multiplied by 0",
           in_blocks(_decays=masked_too_late)),
    mutant("next-token", "prefix", "the mask lets a query see one token ahead",
           in_blocks(_decays=next_token_too)),
    mutant("kept-state", "ragged", "the state is not decayed from block to block",
           in_blocks(_decays=state_kept)),
    mutant("narrow-states", "precision", "the states between blocks are stored in bfloat16",
           replacing(ATTEND, chunk_states=spoiling(chunks.chunk_states, narrow_states))),
    mutant("width-in-slices", "precision", "slices of wide heads are added in bfloat16",
           width_in_slices),
    mutant("late-states", "ragged", "a block reads the state that has its own tokens already",
           replacing(ATTEND, chunk_states=one_block_late)),
    mutant("hidden-scale", "agreement", "queries are scaled by 1/sqrt(d)",
           altering(ATTEND, hidden_scale)),
    mutant("slope-of-kv-head", "heads", "slopes are indexed by kv head", slope_of_kv_head),
    mutant("interleaved-heads", "heads", "query head h reads kv head h % kv_heads",
           in_blocks(repeat_heads=interleaved)),
    mutant("front", "lengths", "queries and keys are aligned at the first token",
           replacing(ATTEND, _align=aligned_in_front)),
    mutant("first-state", "batch", "every entry of the batch starts from the first one's state",
           altering(ATTEND, state_of_first_entry)),
    mutant("written-twice", "neutral", "with a state, the first token is taken as written",
           first_token_is_written),
    mutant("lost-state", "stream", "the state given is forgotten",
           altering(ATTEND, no_initial_state)),
    mutant("resuming", "stateless", "a call without a state goes on from the call before",
           Resuming()),
    mutant("absolute", "shift", "decays are exponentials of absolute positions",
           since_the_start),
    mutant("late-gradient", "gradient", "the backward pass reads states one block late", ATTEND,
           backward=backward_blocks(chunk_states=one_block_late)),
    mutant("kept-gradient", "gradient", "the gradient of the state is not decayed from block to "
           "block", ATTEND, backward=backward_blocks(_decays=state_kept)),
    mutant("no-dS", "gradient", "the gradient of the last state is dropped", ATTEND,
           backward=altering(BACKWARD, no_final_gradient)),
    mutant("no-S0", "gradient", "the backward pass forgets the first state", ATTEND,
           backward=altering(BACKWARD, no_initial_state)),
    mutant("no-dS0", "gradient", "the first state gets no gradient", ATTEND,
           backward=spoiling(BACKWARD, no_gradient_of_the_state)),
    mutant("no-ds", "gradient", "the slopes get no gradient", ATTEND,
           backward=spoiling(BACKWARD, slopes_are_fixed)),
    mutant("first-of-group", "gradient", "dk and dv are those of the first head of the group",
           ATTEND, backward=backward_blocks(sum_groups=first_of_group)),
)  # fmt: skip
