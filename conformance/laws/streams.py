"""The law of streams: one token at a time, or in ragged chunks, is the whole sequence at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.arrays import place_arguments, round_arguments
from attnspec.conformance.case import Case
from attnspec.conformance.contract import Contract, Output
from attnspec.conformance.judge import expect
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, draw_case
from attnspec.conformance.trial import EXPECTATIONS, Trial


@st.composite
def sequences(draw: st.DrawFn, contract: Contract, kernel: Kernel, dtype: str) -> Case:
    assert contract.stream is not None
    axes = {contract.stream.tokens: st.integers(1, 24)}
    return draw(draw_case(contract, kernel, dtype, axes=axes))


def chunk_sizes(case: Case, tokens: int, chunked: bool) -> list[int]:
    """Ones for an even seed, else ragged chunks, adding up to `tokens`."""
    if case.seed % 2 == 0 or not chunked:
        return [1] * tokens
    rng = case.generator("chunks")
    sizes: list[int] = []
    while sum(sizes) < tokens:
        sizes.append(int(rng.integers(1, 8)))
    sizes[-1] -= sum(sizes) - tokens
    return sizes


def check(trial: Trial) -> None:
    """The outputs of the steps, laid end to end, are the outputs of the whole sequence."""
    stream, case, kind = trial.contract.stream, trial.case, trial.kernel.arrays
    assert stream is not None
    whole = {array.name: array.data(case) for array in stream.arrays} | dict(case.parameters)
    whole = round_arguments(whole, case.dtype)
    output = Output("out")
    expectation = EXPECTATIONS.get(
        ("stream", trial.contract.operation, case.key),
        lambda: expect(lambda **a: stream.whole(a), whole, (output,), case.dtype),
    )
    state: Any = stream.start(whole)
    outs, first = [], 0
    for size in chunk_sizes(case, case.sizes[stream.tokens], stream.chunked):
        arguments = dict(stream.feed(whole, state, first, first + size))
        placed = place_arguments(kind, arguments, "contiguous", case.dtype)
        with trial.guarded():
            out, *rest = trial.contract.call(trial.kernel.call, placed)
        state = stream.carried(tuple(rest))
        outs.append(kind.get(out))
        first += size
    got = {"out": np.concatenate(outs, axis=-2)}
    if stream.hidden is not None:
        got = trial.settle(got, expectation, stream.hidden, whole)
    trial.compare((output,), got, expectation)


LAWS = (
    Law(
        "stream",
        "Step by step, in ragged chunks, or all at once: the outputs are the same.",
        ("K13",),
        sequences,
        check,
        applies=lambda contract, kernel: contract.stream is not None,
        examples=0.5,
    ),
)
