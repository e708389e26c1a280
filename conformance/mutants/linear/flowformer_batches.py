"""Wrong kernels of Flowformer over packed sequences: what one sequence leaves to the next."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.conformance.mutants.packing import multiplied_by_zero, over_the_boundary
from attnspec.reference.linear.flowformer_batches import flow_packed_backward
from attnspec.reference.linear.flowformer_causal import FlowState

CAUSAL = right("flowformer.flow_attend_causal")
PACKED = right("flowformer.flow_attend_packed")


def not_reset(q: Any, k: Any, v: Any, offsets: Any, state: Any = None, **options: Any) -> Any:
    """All sums run on from one sequence to the next."""
    _, last = PACKED(q, k, v, offsets, state, **options)
    first = None if state is None else FlowState(*(x[0] for x in state))
    return CAUSAL(q, k, v, first, **options)[0], last


def counts_on(q: Any, k: Any, v: Any, offsets: Any, state: Any = None, **options: Any) -> Any:
    """A sequence's tokens are counted from the first token of all."""
    out, last = PACKED(q, k, v, offsets, state, **options)
    if state is not None:
        return out, last
    none = FlowState(*(np.zeros_like(x) for x in last))
    early = offsets[:-1].reshape(-1, 1).astype(q.dtype) + none.N
    return PACKED(q, k, v, offsets, none._replace(N=early), **options)


def empty_forget(q: Any, k: Any, v: Any, offsets: Any, state: Any = None, **options: Any) -> Any:
    """A sequence without tokens loses the sum of e^Oh that it was given."""
    out, last = PACKED(q, k, v, offsets, state, **options)
    tokens = np.diff(offsets)[:, None].astype(q.dtype)
    return out, last._replace(se=np.where(tokens == 0, np.zeros_like(last.se), last.se))


def one_start(result: Any) -> Any:
    """Every state gets the gradient of the first one."""
    *tokens, before = result
    return *tokens, FlowState(*(np.repeat(x[:1], len(x), axis=0) for x in before))


def one_end(arguments: dict[str, Any]) -> None:
    """What comes back from the last sequence's state is handed to all."""
    for name in FlowState._fields:
        dx = arguments[f"d{name}"]
        if dx is not None:
            arguments[f"d{name}"] = np.repeat(dx[-1:], len(dx), axis=0)


def wrong(name: str, law: str, bug: str, call: Any, backward: Any = None) -> Mutant:
    operation = "flowformer.flow_attend_packed"
    return Mutant(f"flowformer.packed-{name}", operation, law, bug, call, backward)


MUTANTS = (
    wrong("not-reset", "agreement", "Sums run on into the next sequence.", not_reset),
    wrong("counts-on", "agreement", "N does not restart.", counts_on),
    wrong(
        "boundary",
        "agreement",
        "A block straddles two sequences.",
        over_the_boundary(PACKED, CAUSAL),
    ),
    wrong("leaks", "alone", "Others are multiplied by 0.", multiplied_by_zero(PACKED)),
    wrong("empty", "agreement", "An empty sequence loses its state.", empty_forget),
    wrong(
        "one-start",
        "gradient",
        "All states get the first one's gradient.",
        PACKED,
        spoiling(flow_packed_backward, one_start),
    ),
    wrong(
        "one-end",
        "gradient",
        "All sequences get the last state's gradient.",
        PACKED,
        altering(flow_packed_backward, one_end),
    ),
)
