"""Wrong kernels of Titans over packed sequences: what passes from one sequence to the next."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, right, spoiling
from attnspec.conformance.mutants.linear.titans import no_rate, without
from attnspec.reference.linear.titans_batches import (
    titans_packed_linear_backward,
    titans_packed_mlp_backward,
)
from attnspec.reference.linear.titans_deep import titans_chunk_mlp

LINEAR = right("titans.titans_packed_linear")
MLP = right("titans.titans_packed_mlp")
States = tuple[np.ndarray, ...]


def _at(states: States, n: int) -> States:
    """A sequence's states, with a batch of one."""
    return tuple(x[n : n + 1] for x in states)


def walking(right_one: Any, sequence: Callable[..., Any]) -> Any:
    """The operation by `sequence`, which is given what a sequence's own memory is and how its
    tokens are cut from the row, and the states that the sequence before has left.
    """

    def wrong(W0: Any, S0: Any, k: Any, v: Any, q: Any, rates: Any, offsets: Any, b: int,
              **options: Any) -> Any:  # fmt: skip
        y, W, S = right_one(W0, S0, k, v, q, rates, offsets, b, **options)
        single = not isinstance(W, tuple)
        if any(isinstance(x, float) for x in rates):
            return y, W, S
        first = tuple(np.asarray(x) for x in ((W0,) if single else W0))
        momentum = tuple(0 * x for x in first) if S0 is None else (S0,) if single else S0

        def cut(W: States, S: States, rows: slice) -> Any:
            keys, values, queries = (x[None, ..., rows, :] for x in (k, v, q))
            step = tuple(x[None, ..., rows] for x in rates)
            return titans_chunk_mlp(W, S, keys, values, queries, step, b, **options)

        outputs, all_W, all_S, before = [], [], [], None
        for n, (start, end) in enumerate(pairwise(offsets)):
            given = _at(first, n), _at(momentum, n)
            rows, *before = sequence(cut, given, before, slice(start, end), b)
            outputs.append(rows[0])
            all_W.append(before[0])
            all_S.append(before[1])
        y = np.concatenate(outputs, axis=-2)
        W, S = (tuple(map(np.concatenate, zip(*x, strict=True))) for x in (all_W, all_S))
        return (y, W[0], S[0]) if single else (y, W, S)

    return wrong


def runs_on(cut: Any, given: Any, before: Any, rows: slice, b: int) -> Any:
    """Weights and momentum go on where the sequence before has ended."""
    return cut(*(given if before is None else before), rows)


def momentum_runs_on(cut: Any, given: Any, before: Any, rows: slice, b: int) -> Any:
    """The momentum alone goes on."""
    return cut(given[0], given[1] if before is None else before[1], rows)


def chunks_of_the_row(cut: Any, given: Any, before: Any, rows: slice, b: int) -> Any:
    """Gradient chunks end at multiples of b of the row, not of the sequence."""
    middle = min(-(-rows.start // b) * b, rows.stop)
    y, W, S = cut(*given, slice(rows.start, middle))
    z, W, S = cut(W, S, slice(middle, rows.stop))
    return np.concatenate([y, z], axis=-2), W, S


def chunk_too_far(cut: Any, given: Any, before: Any, rows: slice, b: int) -> Any:
    """The last chunk is stored to its full length: it holds tokens of the next sequence."""
    length = rows.stop - rows.start
    y, W, S = cut(*given, slice(rows.start, rows.start + -(-length // b) * b))
    return y[..., :length, :], W, S


def last_whole_chunk(cut: Any, given: Any, before: Any, rows: slice, b: int) -> Any:
    """The last states are those behind the last whole chunk."""
    y, *_ = cut(*given, rows)
    whole = (rows.stop - rows.start) // b * b
    _, W, S = cut(*given, slice(rows.start, rows.start + whole))
    return y, W, S


def empty_is_zero(cut: Any, given: Any, before: Any, rows: slice, b: int) -> Any:
    """A sequence without tokens leaves zeros behind, not what it was given."""
    y, W, S = cut(*given, rows)
    if rows.start == rows.stop:
        W, S = (tuple(0 * x for x in y) for y in (W, S))
    return y, W, S


def multiplied_by_zero(W0: Any, S0: Any, k: Any, v: Any, q: Any, rates: Any, offsets: Any, b: int,
                       **options: Any) -> Any:  # fmt: skip
    """Values of other sequences are multiplied by 0, which leaves NaN as it is."""
    y, W, S = LINEAR(W0, S0, k, v, q, rates, offsets, b, **options)
    return y, W + 0 * np.sum(v).astype(W.dtype), S


def summed_states(gradients: Any) -> Any:
    """The gradients of first weights are summed as if all sequences shared them."""
    dW0, *rest = gradients
    total = tuple(np.broadcast_to(np.sum(x, axis=0, keepdims=True), x.shape) for x in dW0)
    return total, *rest


def mutant(name: str, law: str, bug: str, call: Any, operation: str = "titans_packed_linear",
           **rest: Any) -> Mutant:  # fmt: skip
    return Mutant(f"titans.packed-{name}", f"titans.{operation}", law, bug, call, **rest)


MUTANTS = (
    mutant("runs-on", "agreement", "the memory runs on into the next sequence",
           walking(LINEAR, runs_on)),
    mutant("momentum-runs-on", "continued", "momentum runs on into the next sequence",
           walking(LINEAR, momentum_runs_on)),
    mutant("chunks-of-the-row", "agreement", "chunks are not begun anew in every sequence",
           walking(LINEAR, chunks_of_the_row)),
    mutant("leaks", "alone", "values of other sequences are multiplied by 0",
           multiplied_by_zero),
    mutant("empty", "agreement", "a sequence without tokens leaves zeros",
           walking(LINEAR, empty_is_zero)),
    mutant("no-dS0", "gradient", "first momenta get no gradient", LINEAR,
           backward=spoiling(titans_packed_linear_backward, without(1))),
    mutant("no-deta", "gradient", "the momentum's rate gets no gradient", LINEAR,
           backward=spoiling(titans_packed_linear_backward, no_rate(1))),
    mutant("deep-runs-on", "alone", "a deep memory runs on into the next sequence",
           walking(MLP, runs_on), "titans_packed_mlp"),
    mutant("deep-too-far", "agreement", "a last chunk stores tokens of the next sequence",
           walking(MLP, chunk_too_far), "titans_packed_mlp"),
    mutant("deep-whole-chunks", "continued",
           "last states are those behind the last whole chunk", walking(MLP, last_whole_chunk),
           "titans_packed_mlp"),
    mutant("deep-summed", "gradient", "gradients of first weights are summed over sequences", MLP,
           "titans_packed_mlp", backward=spoiling(titans_packed_mlp_backward, summed_states)),
)  # fmt: skip
