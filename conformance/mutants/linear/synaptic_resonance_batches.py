"""Wrong kernels of Synaptic Resonance on packed sequences: something of one goes into the next."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.linear import synaptic_resonance_batches as batches
from attnspec.reference.linear.synaptic_resonance_decode import recent_tokens
from attnspec.reference.linear.synaptic_resonance_gradients import memory_backward
from attnspec.reference.linear.synaptic_resonance_memory import memory_chunked, relevance

PACKED = right("synaptic_resonance.synaptic_resonance_packed")
BLOCK = 8


def running_on(step: Any, kind: int) -> Any:
    """A step of every sequence but the first begins with what the one before it has left."""

    def call(*args: Any, **options: Any) -> Any:
        left: list[Any] = []
        place = 6 if kind else 3

        def going_on(*given: Any) -> Any:
            given = (*given[:place], left[-1] if left else given[place], *given[place + 1 :])
            out, state = step(*given)
            left.append(state)
            return out, state

        name = "memory_chunked" if kind else "relevance"
        return replacing(PACKED, **{name: going_on})(*args, **options)

    return call


def trace_of_zeros_once(*args: Any, **options: Any) -> Any:
    """Only the first token of all is relevant by rule; those of later sequences are not."""
    first: list[bool] = []

    def by_cosine(k: Any, mu: Any, valid: Any, c: Any) -> Any:
        rho, last = relevance(k, mu, valid, c)
        if first and k.shape[-2]:
            fresh = ~np.any(c != 0, axis=-1)
            rho[..., 0] = np.where(fresh, 0.0, rho[..., 0])
        first.append(True)
        return rho, last

    return replacing(PACKED, relevance=by_cosine)(*args, **options)


def straddling(arguments: dict[str, Any]) -> None:
    """A sequence begins at the last whole block of tokens."""
    ends = arguments["offsets"].copy()
    ends[1:-1] = ends[1:-1] // BLOCK * BLOCK
    arguments["offsets"] = ends


def last_row_of_block(*args: Any, **options: Any) -> Any:
    """The last state has aged over the empty rows of its last block as well."""
    y, (S, c) = PACKED(*args, **options)
    lengths = np.diff(args[3] if len(args) > 3 else options["offsets"])
    empty = (-lengths) % BLOCK
    aged = float(options.get("lam", 0.99)) ** empty
    return y, ((S * aged[:, None, None, None]).astype(S.dtype), c)


def wide_window(*args: Any, **options: Any) -> Any:
    """A window is counted from the beginning of everything, and so lets one token more in."""

    def wider(k: Any, window: Any, valid: Any) -> Any:
        return recent_tokens(k, None if window is None else window + 1, valid)

    return replacing(PACKED, recent_tokens=wider)(*args, **options)


def no_upstream_state(*args: Any) -> Any:
    """The gradients of the last memories are dropped."""
    args = (*args[:-1], np.zeros_like(args[-1]))
    return memory_backward(*args)


def of(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    slug = "synaptic_resonance"
    return Mutant(f"{slug}.{name}", f"{slug}.synaptic_resonance_packed", law, bug, call, **rest)


MUTANTS = (
    of("packed-memory-runs-on", "alone", "the memory runs on into the next sequence",
       running_on(memory_chunked, 1)),
    of("packed-trace-runs-on", "agreement", "the trace runs on into the next sequence",
       running_on(relevance, 0)),
    of("packed-first-token", "agreement", "only the first sequence has a first token",
       trace_of_zeros_once),
    of("packed-straddling", "agreement", "a block of tokens goes over the boundary",
       altering(PACKED, straddling)),
    of("packed-padded-end", "agreement", "last states age to the end of their block",
       last_row_of_block),
    of("packed-wide-window", "agreement", "a window keeps a token too many", wide_window),
    of("packed-no-dS", "gradient", "the gradients of the last memories are dropped", PACKED,
       backward=replacing(batches.synaptic_resonance_packed_backward,
                          memory_backward=no_upstream_state)),
)  # fmt: skip
