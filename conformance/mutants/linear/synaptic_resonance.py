"""Wrong kernels of Synaptic Resonance: reads that come late, traces that remember too much."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import synaptic_resonance as chapter
from attnspec.reference.linear import synaptic_resonance_gradients as gradients
from attnspec.reference.linear import synaptic_resonance_memory as memory
from attnspec.reference.linear.synaptic_resonance_decode import recent_tokens

CHUNKED = right("synaptic_resonance.memory_chunked")
RECURRENT = right("synaptic_resonance.memory_recurrent")
RELEVANCE = right("synaptic_resonance.relevance")
STEP = right("synaptic_resonance.step")
WHOLE = right("synaptic_resonance.synaptic_resonance")
BLOCK = 8
# Names that mutants replace while they run are kept here as they are.
check_memory, power, unit = memory.check_memory, memory._power, memory.unit


def reads_after_writing(q: Any, k: Any, v: Any, rho: Any, eta: float = 0.1, *rest: Any,
                        **options: Any) -> Any:  # fmt: skip
    """A query sees its own token's value."""
    m, S = RECURRENT(q, k, v, rho, eta, *rest, **options)
    heads = q.shape[-3]
    gated = memory.repeat_heads(eta * rho[..., None] * unit(k), heads)
    own = np.sum(unit(q) * gated, axis=-1, keepdims=True) * memory.repeat_heads(v, heads)
    return m + np.nan_to_num(own), S


def decays_the_new_write(arguments: dict[str, Any]) -> None:
    arguments["eta"] *= arguments["lam"]


def decays_before_the_first_read(arguments: dict[str, Any]) -> None:
    if arguments["S0"] is not None:
        arguments["S0"] = arguments["lam"] * arguments["S0"]


def one_step_more(lam: float, ages: np.ndarray, like: np.ndarray) -> np.ndarray:
    return power(lam, ages + 1, like)


def zero_to_the_zero(lam: float, ages: np.ndarray, like: np.ndarray) -> np.ndarray:
    """exp(age * log(lam)), which is taken to be 0 for a lam of 0."""
    return power(lam, ages, like) * (lam > 0)


def half_precision_ages(lam: float, ages: np.ndarray, like: np.ndarray) -> np.ndarray:
    if lam == 0:
        return power(lam, ages, like)
    logs = round_to(np.maximum(ages, 0) * np.log(lam), "float16")
    return np.exp(logs).astype(like.dtype)


def interleaved_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Query head h reads kv head h modulo their number."""
    return np.concatenate([x] * (heads // x.shape[-3]), axis=-3)


def padding_ages(arguments: dict[str, Any]) -> None:
    """A padded token writes nothing, but the state decays."""
    valid, arguments["valid"] = arguments["valid"], None
    if valid is not None:
        hidden = ~valid[..., None, :]
        for name in ("q", "k", "v"):
            arguments[name] = np.where(hidden[..., None], 0, arguments[name])
        arguments["rho"] = np.where(hidden, 0, arguments["rho"])


def leaking(q: Any, k: Any, v: Any, rho: Any, eta: Any, lam: Any, S0: Any, valid: Any) -> Any:
    """Padded rows are multiplied by 0 instead of skipped."""
    qh, kh, _, _, real, S = check_memory(q, k, v, rho, eta, lam, S0, valid)
    return qh, kh, v * real[..., None], rho * real, real, S


def skip_tail(arguments: dict[str, Any]) -> None:
    """Tokens after the last whole block are never written."""
    whole = arguments["k"].shape[-2] // BLOCK * BLOCK
    if whole:
        arguments["rho"] = arguments["rho"].copy()
        arguments["rho"][..., whole:] = 0


def sixteen_bit_state(result: Any) -> Any:
    m, S = result
    return m, round_to(S, "float16").astype(S.dtype)


def padding_in_the_trace(arguments: dict[str, Any]) -> None:
    """A padded token is taken for one whose key is the sum of unit vectors."""
    if arguments["valid"] is not None:
        hidden = ~arguments["valid"][..., None, :, None]
        arguments["k"] = np.where(hidden, 1, arguments["k"])
        arguments["valid"] = None


def first_token_of_a_call(result: Any) -> Any:
    rho, c = result
    return np.concatenate([np.ones_like(rho[..., :1]), rho[..., 1:]], axis=-1), c


def first_token_by_place(k: Any, mu: float = 0.9, valid: Any = None, c0: Any = None) -> Any:
    """A trace of zeros counts as a first token at place 0 alone."""
    rho, c = RELEVANCE(k, mu, valid, c0)
    written = np.any(np.nan_to_num(k) != 0, axis=-1)
    if valid is not None:
        written = written & valid[..., None, :]
    begun = np.cumsum(written, axis=-1) - written > 0
    if c0 is not None:
        begun = begun | np.any(c0 != 0, axis=-1, keepdims=True)
    begun[..., :1] = True
    return np.where(begun, rho, np.zeros_like(rho)), c


def own_key_in_the_trace(k: Any, mu: float = 0.9, valid: Any = None, c0: Any = None) -> Any:
    """The trace takes in a key before the key is compared with it."""
    rho, c = RELEVANCE(k, mu, valid, c0)
    rows = []
    for t in range(k.shape[-2]):
        now = slice(t, t + 1)
        _, c0 = RELEVANCE(k[..., now, :], mu, None if valid is None else valid[..., now], c0)
        rows.append(RELEVANCE(k[..., now, :], mu, None, c0)[0])
    late = np.concatenate([rho[..., :0], *rows], axis=-1)
    return np.where(np.isnan(late) | (rho == 0), rho, late), c


def plain(x: np.ndarray) -> np.ndarray:
    return x


def rotated(k: np.ndarray, *args: Any, **options: Any) -> Any:
    """Keys meet the trace with their positions in them."""
    angle = np.arange(k.shape[-2], dtype=k.dtype)
    turned = k.copy()
    turned[..., 0] = np.cos(angle) * k[..., 0] - np.sin(angle) * k[..., -1]
    if k.shape[-1] > 1:
        turned[..., -1] = np.sin(angle) * k[..., 0] + np.cos(angle) * k[..., -1]
    return RELEVANCE(turned, *args, **options)


def window_of_places(k: np.ndarray, window: Any, valid: Any) -> np.ndarray:
    """The window counts padded tokens too."""
    return recent_tokens(k, window, None) & recent_tokens(k, None, valid)


def wider_window(k: np.ndarray, window: Any, valid: Any) -> np.ndarray:
    return recent_tokens(k, None if window is None else window + 1, valid)


def first_mask(arguments: dict[str, Any]) -> None:
    if arguments["valid"] is not None:
        arguments["valid"] = np.repeat(arguments["valid"][:1], len(arguments["valid"]), axis=0)


def memory_of_the_window(arguments: dict[str, Any]) -> None:
    """The share of the memory is left out while the window holds every token."""
    if arguments["window"] is not None and arguments["window"] >= arguments["q"].shape[-2]:
        arguments["beta"] = 0.0


def no_relevance_gradient(k: Any, mu: Any, valid: Any, c0: Any, drho: Any, dc: Any = None) -> Any:
    """rho is a constant to the gradient."""
    return gradients.relevance_backward(k, mu, valid, c0, np.zeros_like(drho), dc)


def constant_norm(x: np.ndarray, dunit: np.ndarray) -> np.ndarray:
    return dunit / np.maximum(memory.norm_of(x), memory.FLOOR)[..., None]


def first_of_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // kv_heads, :, :]


def forgets_the_trace(arguments: dict[str, Any]) -> None:
    state = arguments["state"]
    arguments["state"] = state._replace(c=np.zeros_like(state.c))


def forgets_the_oldest(result: Any) -> Any:
    y, state = result
    if state.k.shape[-2] > BLOCK:
        state = state._replace(k=state.k[..., 1:, :], v=state.v[..., 1:, :])
    return y, state


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    slug = "synaptic_resonance"
    return Mutant(f"{slug}.{name}", f"{slug}.{operation}", law, bug, call, **rest)


BACKWARD = chapter.synaptic_resonance_backward
OF_MEMORY = gradients.memory_backward
MUTANTS = (
    of("memory_recurrent", "reads-after-writing", "agreement", "a query reads its own token",
       reads_after_writing),
    of("memory_recurrent", "decayed-write", "agreement", "the new write is decayed at once",
       altering(RECURRENT, decays_the_new_write)),
    of("memory_recurrent", "interleaved-heads", "heads", "query head h reads state h % kv_heads",
       replacing(RECURRENT, repeat_heads=interleaved_heads)),
    of("memory_recurrent", "padding-ages", "agreement", "padded tokens decay the state",
       altering(RECURRENT, padding_ages)),
    of("memory_recurrent", "half-state", "resumption", "the state is handed over in 16 bits",
       spoiling(RECURRENT, sixteen_bit_state)),
    of("memory_recurrent", "first-of-group", "gradient", "only one head of a group moves S",
       RECURRENT, backward=replacing(OF_MEMORY, sum_groups=first_of_group)),
    of("memory_recurrent", "constant-norm", "gradient", "the norm is a constant to the gradient",
       RECURRENT, backward=replacing(OF_MEMORY, unit_backward=constant_norm)),
    of("memory_chunked", "decayed-entry", "agreement", "the first read sees a decayed S0",
       altering(CHUNKED, decays_before_the_first_read)),
    of("memory_chunked", "one-step-more", "agreement", "decays are off by one at every boundary",
       replacing(CHUNKED, _power=one_step_more)),
    of("memory_chunked", "zero-to-the-zero", "agreement", "a lam of 0 loses the newest write too",
       replacing(CHUNKED, _power=zero_to_the_zero)),
    of("memory_chunked", "half-ages", "agreement", "log decays are summed in half precision",
       replacing(CHUNKED, _power=half_precision_ages)),
    of("memory_chunked", "padding-times-0", "poison", "padded rows are multiplied by 0",
       replacing(CHUNKED, check_memory=leaking)),
    of("memory_chunked", "skip-tail", "ragged", "tokens after the last whole block are lost",
       altering(CHUNKED, skip_tail)),
    of("relevance", "padding-in-the-trace", "agreement", "padded tokens update the trace",
       altering(RELEVANCE, padding_in_the_trace)),
    of("relevance", "first-of-a-call", "resumption", "a resumed trace starts anew",
       spoiling(RELEVANCE, first_token_of_a_call)),
    of("relevance", "first-by-place", "silence", "only place 0 can be a first token",
       first_token_by_place),
    of("relevance", "own-key", "agreement", "a key is compared with a trace that has it",
       own_key_in_the_trace),
    of("relevance", "plain-keys", "agreement", "keys are not brought to length 1",
       replacing(RELEVANCE, unit=plain)),
    of("synaptic_resonance", "rotated-keys", "agreement", "relevance is taken from rotated keys",
       replacing(WHOLE, relevance=rotated)),
    of("synaptic_resonance", "window-of-places", "agreement", "a window counts padded tokens",
       replacing(WHOLE, recent_tokens=window_of_places)),
    of("synaptic_resonance", "wider-window", "agreement", "a window of w keeps w + 1 tokens",
       replacing(WHOLE, recent_tokens=wider_window)),
    of("synaptic_resonance", "window-without-memory", "agreement",
       "the memory is asked only for what the window lost",
       altering(WHOLE, memory_of_the_window)),
    of("synaptic_resonance", "first-mask", "batch", "every entry uses the first one's padding",
       altering(WHOLE, first_mask)),
    of("synaptic_resonance", "constant-relevance", "gradient", "relevance has no gradient",
       WHOLE, backward=replacing(BACKWARD, relevance_backward=no_relevance_gradient)),
    of("step", "lost-trace", "stream", "every step starts with a trace of zeros",
       altering(STEP, forgets_the_trace)),
    of("step", "short-state", "stream", "the oldest token falls out of the cache",
       spoiling(STEP, forgets_the_oldest)),
)  # fmt: skip
