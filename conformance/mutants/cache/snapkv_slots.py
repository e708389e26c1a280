"""Wrong kernels of SnapKV, the slots: gathered, numbered or read wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.reference.cache.snapkv import State

COMPRESS = right("snapkv.compress")
STEP = right("snapkv.step")


def reversed_positions(result: Any) -> Any:
    k_c, v_c, pos = result
    slots = np.argsort(pos, axis=-1)[..., ::-1]
    return k_c, v_c, np.take_along_axis(pos, slots, axis=-1)


def first_head_for_all(arguments: dict[str, Any]) -> None:
    idx = arguments["idx"]
    if idx.ndim > 1:
        arguments["idx"] = np.repeat(idx[..., :1, :], idx.shape[-2], axis=-2)


def interleaved_slots(
    k: np.ndarray, v: np.ndarray, idx: np.ndarray, w: int = 32
) -> tuple[np.ndarray, ...]:
    """Slot head h takes keys and values of kv head h % kv_heads."""
    result = COMPRESS(k, v, idx, w)
    order = np.arange(idx.shape[-2]) % k.shape[-3]
    return COMPRESS(k[..., order, :, :], v[..., order, :, :], idx, w) if len(order) else result


def sees_padding(state: Any, q: Any, k: Any, v: Any) -> Any:
    _, after = STEP(state, q, k, v)
    seen, _ = STEP(state._replace(pos=np.abs(state.pos)), q, k, v)
    return seen, after


def padding_times_zero(state: Any, q: Any, k: Any, v: Any) -> Any:
    out, after = STEP(state, q, k, v)
    return out + 0 * state.v.sum(axis=(-3, -2))[..., None, None, :], after


def numbered_by_slots(result: Any) -> Any:
    """The new token stands at the number of slots, not at `seen`."""
    out, state = result
    pos = state.pos.copy()
    pos[..., -1] = state.pos.shape[-1] - 1
    return out, state._replace(pos=pos)


def drops_the_oldest(result: Any) -> Any:
    out, state = result
    if state.pos.shape[-1] > 6:
        state = State(state.k[..., 1:, :], state.v[..., 1:, :], state.pos[..., 1:], state.seen)
    return out, state


def takes_two_tokens(state: Any, q: Any, k: Any, v: Any) -> Any:
    if isinstance(q, np.ndarray) and q.ndim > 2:
        q = q[..., -1:, :]
    return STEP(state, q, k, v)


def mutant(operation: str, name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"snapkv.{name}", f"snapkv.{operation}", law, bug, call)


MUTANTS = (
    mutant("compress", "reversed-slots", "agreement", "positions do not belong to their slots",
           spoiling(COMPRESS, reversed_positions)),
    mutant("compress", "first-head", "agreement", "every head keeps what the first one chose",
           altering(COMPRESS, first_head_for_all)),
    mutant("compress", "interleaved-slots", "heads", "keys are repeated h % kv_heads",
           interleaved_slots),
    mutant("step", "sees-padding", "agreement", "slots that hold padding are visible",
           sees_padding),
    mutant("step", "padding-times-zero", "poison", "padding slots are multiplied by 0",
           padding_times_zero),
    mutant("step", "numbered-by-slots", "agreement", "positions go on from the number of slots",
           spoiling(STEP, numbered_by_slots)),
    mutant("step", "evicts", "stream", "the oldest slot is dropped while decoding",
           spoiling(STEP, drops_the_oldest)),
    mutant("step", "last-of-two", "refusal", "of two tokens only the last is used",
           takes_two_tokens),
)  # fmt: skip
