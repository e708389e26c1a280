"""Wrong kernels of LightNet over packed sequences: what one sequence leaves to the next."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, right, spoiling
from attnspec.conformance.mutants.linear.lightnet import tampered
from attnspec.conformance.mutants.packing import multiplied_by_zero, over_the_boundary
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.linear import lightnet_batches as batches

GATES = right("lightnet.additive_gates")
SCAN = right("lightnet.vector_decay_attend")
CAUSAL = right("lightnet.lightnet_causal")
PACKED = right("lightnet.lightnet_packed")
DECAYED = right("lightnet.vector_decay_packed")
LEAKS = "Values of other sequences are multiplied by 0."
BACKWARD = batches.lightnet_packed_backward
DECAYED_BACKWARD = batches.vector_decay_packed_backward


def not_reset(q: Any, k: Any, v: Any, offsets: Any, state: Any = None, **options: Any) -> Any:
    """S and z run on from one sequence to the next."""
    _, last = PACKED(q, k, v, offsets, state, **options)
    first = None if state is None else (state[0][0], state[1][0])
    return CAUSAL(q, k, v, first, **options)[0], last


def sums_run_on(
    q: Any, k: Any, v: Any, offsets: Any, state: Any = None, *, scale: float = 1.0
) -> Any:
    """S restarts in every sequence, z does not."""
    o, (S, z) = PACKED(q, k, v, offsets, state, scale=scale)
    if state is not None:
        return o, (S, z)
    keys, values = (repeat_heads(x, q.shape[0]) for x in (k, v))
    kbar, log_decay, _ = GATES(keys)
    o, S = DECAYED(q, kbar, values, log_decay, offsets, scale=scale)
    return o, (S, z)


def empty_forget(q: Any, k: Any, v: Any, offsets: Any, state: Any = None, **options: Any) -> Any:
    """A sequence without tokens does not keep the state it was given."""
    o, (S, z) = PACKED(q, k, v, offsets, state, **options)
    none = np.diff(offsets) == 0
    return o, (np.where(none[:, None, None, None], 0, S).astype(S.dtype), z)


def one_start(arguments: dict[str, Any]) -> None:
    """All sequences start from the first one's z."""
    if arguments["state"] is not None:
        S, z = arguments["state"]
        arguments["state"] = S, np.repeat(z[:1], len(z), axis=0)


def constant_first_sums(result: Any) -> Any:
    """The z handed over is a constant."""
    *tokens, (dS0, dz0) = result
    return *tokens, (dS0, np.zeros_like(dz0))


def one_last_state(
    q: Any, k: Any, v: Any, offsets: Any, state: Any, do: Any, dS: Any = None, dz: Any = None, *,
    scale: float = 1.0,
) -> Any:  # fmt: skip
    """Every sequence is handed the gradient of the last one's state."""
    last = None if dS is None else np.repeat(dS[-1:], len(dS), axis=0)
    return BACKWARD(q, k, v, offsets, state, do, last, dz, scale=scale)


def decays_not_reset(
    q: Any, kbar: Any, v: Any, g: Any, offsets: Any, S0: Any = None, **options: Any
) -> Any:
    """The state runs on from one sequence to the next."""
    _, S = DECAYED(q, kbar, v, g, offsets, S0, **options)
    return SCAN(q, kbar, v, g, None if S0 is None else S0[0], **options)[0], S


def first_rows_undecayed(arguments: dict[str, Any]) -> None:
    """A sequence's first token does not decay the state it was given."""
    offsets, own = arguments["offsets"], arguments["log_decay"].copy()
    own[:, offsets[:-1][np.diff(offsets) > 0]] = 0
    arguments["log_decay"] = own


def decay_gradient_runs_on(result: Any) -> Any:
    """The sum behind a decay's gradient does not end with its sequence."""
    dq, dkbar, dv, dg, dS0 = result
    return dq, dkbar, dv, dg + (np.sum(dg, axis=1, keepdims=True) - dg)[:, -1:], dS0


MUTANTS = (
    tampered("lightnet_packed:packed-not-reset", not_reset, "agreement",
             "The state runs on into the next sequence."),
    tampered("lightnet_packed:packed-sums-run-on", sums_run_on, "agreement",
             "The normaliser is not restarted."),
    tampered("lightnet_packed:packed-boundary", over_the_boundary(PACKED, CAUSAL), "agreement",
             "A block straddles two sequences."),
    tampered("lightnet_packed:packed-leaks", multiplied_by_zero(PACKED), "alone", LEAKS),
    tampered("lightnet_packed:packed-empty", empty_forget, "agreement",
             "An empty sequence loses its state."),
    tampered("lightnet_packed:packed-one-start", altering(PACKED, one_start), "agreement",
             "All sequences start from the first one's z."),
    tampered("lightnet_packed:packed-constant-first-z", PACKED, "gradient",
             "The z handed over is a constant.",
             backward=spoiling(BACKWARD, constant_first_sums)),
    tampered("lightnet_packed:packed-one-last-state", PACKED, "gradient",
             "All sequences get the gradient of the last one's state.", backward=one_last_state),
    tampered("vector_decay_packed:decay-not-reset", decays_not_reset, "agreement",
             "The state runs on into the next sequence."),
    tampered("vector_decay_packed:decay-leaks", multiplied_by_zero(DECAYED), "alone", LEAKS),
    tampered("vector_decay_packed:first-undecayed", altering(DECAYED, first_rows_undecayed),
             "agreement", "First tokens do not decay their state."),
    tampered("vector_decay_packed:decay-gradient-runs-on", DECAYED, "gradient",
             "A decay's gradient collects from the next sequence.",
             backward=spoiling(DECAYED_BACKWARD, decay_gradient_runs_on)),
)  # fmt: skip
