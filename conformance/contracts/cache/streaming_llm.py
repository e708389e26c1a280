"""Contracts of StreamingLLM: attention over a cache of sinks and recent tokens.

The cache's rows and their positions are in `streaming_llm_rows`, the sinks of trained models in
`streaming_llm_sinks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, BadValue, Contract, Output, Stream
from attnspec.conformance.contracts.cache.streaming_llm_rows import wrong_integers
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.values import feed_tokens, longer
from attnspec.conformance.violation import Violation
from attnspec.reference.cache.streaming_llm import State, init_state, streaming_attend
from attnspec.reference.cache.streaming_llm_rows import call_sizes, evict_rows

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "d": (1, 24),
    "dv": (1, 24),
}
Drawn = dict[str, st.SearchStrategy[Any]]


def window(sizes: Mapping[str, int]) -> Drawn:
    """Few sinks and a short window, so that a short stream already evicts."""
    base = [None, 10000.0, 30.0] if sizes["d"] % 2 == 0 else [None]
    return {
        "S": st.integers(0, 4),
        "R": st.integers(0, 8),
        "rope_base": st.sampled_from(base),
    }


@st.composite
def calls(draw: st.DrawFn, tokens: int) -> int | list[int]:
    """So many tokens a call; a prompt, then one by one; or a ragged list."""
    kind = draw(st.sampled_from(("constant", "prompt", "ragged")))
    if kind == "constant":
        return draw(st.integers(1, 6))
    prompt = draw(st.integers(1, max(1, tokens)))
    if kind == "prompt" and tokens:
        return [prompt] + [1] * (tokens - prompt)
    return call_sizes(tokens, draw(st.integers(2, 7)))[::-1]


def slopes(rng: np.random.Generator, case: Case) -> np.ndarray | None:
    """A slope for each head, if the case asks for ALiBi and has no rotary positions."""
    if "alibi_slopes" not in case.options or case.parameters.get("rope_base") is not None:
        return None
    return 2.0 ** -rng.uniform(0, 4, case.heads)


def turned_channels(rng: np.random.Generator, case: Case) -> int | None:
    """Some or all of the channels, if the case asks for them and has rotary positions."""
    if "rotary_dims" not in case.options or case.parameters.get("rope_base") is None:
        return None
    return 2 * int(rng.integers(1, case.sizes["d"] // 2 + 1))


def all_channels(case: Case) -> int | None:
    return None if case.parameters.get("rope_base") is None else case.sizes["d"]


def make_state(rng: np.random.Generator, case: Case) -> State:
    """What a stream of `past` tokens leaves behind."""
    past = case.sizes["past"]
    pos = evict_rows(past, case.parameters["S"], case.parameters["R"])
    shape = (*case.shape("batch kv_heads"), len(pos))
    k, v = (rng.standard_normal((*shape, case.sizes[axis])) for axis in ("d", "dv"))
    return State(k, v, pos, past)


Q = Array("q", "batch heads tokens d", role="query")
K = Array("k", "batch kv_heads tokens d", role="key")
V = Array("v", "batch kv_heads tokens dv", role="value")
POSITIONS = (
    Array("alibi_slopes", "heads", make=slopes, optional=True),
    Array("rotary_dims", "1", make=turned_channels, optional=True),
)
CELLS = {
    "causal self": lambda case: case,
    "MHA": heads_cell(2, 1),
    "GQA": heads_cell(2, 3),
    "MQA": heads_cell(1, 4),
}
BAD_CALLS = (
    ("more queries than keys", "q", lambda a: longer(a["q"])),
    ("more keys than queries", "k", lambda a: longer(a["k"])),
    ("more values than keys", "v", lambda a: longer(a["v"])),
    ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
    ("kv heads that do not divide", "k", lambda a: a["k"].repeat(7, axis=-3)),
    ("another batch in v", "v", lambda a: a["v"].repeat(2, axis=0)),
    ("a base of 0", "rope_base", lambda a: 0.0 if a["q"].shape[-1] % 2 == 0 else "a"),
    ("slopes of another number", "alibi_slopes", lambda a: np.ones(a["q"].shape[-3] + 1)),
    BadValue("a slope of 0", "alibi_slopes", lambda a: np.zeros(a["q"].shape[-3])),
    ("an odd number of turned channels", "rotary_dims", lambda a: 3),
    ("more turned channels than there are", "rotary_dims", lambda a: 2 * a["q"].shape[-1] + 2),
    *wrong_integers("S", "R"),
)

CONTRACTS = (
    Contract(
        operation="streaming_llm.step",
        sizes={**SIZES, "past": (0, 24), "tokens": (1, 4)},
        least={"tokens": 1},
        arrays=(Array("state", make=make_state), Q, K, V, *POSITIONS),
        outputs=(
            Output("out"),
            Output("state.k", "copy"),
            Output("state.v", "copy"),
            Output("state.pos", "exact"),
            Output("state.seen", "exact", plain=True),
        ),
        parameters=window,
        neutral={"rotary_dims": all_channels},
        cells=CELLS,
        bad_inputs=(
            *BAD_CALLS,
            ("keys of another width than the state's", "v", lambda a: a["v"].repeat(2, axis=-1)),
        ),
        stream=Stream(
            arrays=(Q, K, V, *POSITIONS),
            start=lambda whole: init_state(whole["k"], whole["v"]),
            feed=feed_tokens,
            whole=lambda whole: streaming_attend(**whole, chunk=1)[0],
            chunked=False,
        ),
    ),
    Contract(
        operation="streaming_llm.streaming_attend",
        sizes={**SIZES, "tokens": (1, 24)},
        queries="tokens",
        keys="tokens",
        arrays=(Q, K, V, *POSITIONS),
        outputs=(Output("out"), Output("trace", "exact")),
        parameters=lambda sizes: {**window(sizes), "chunk": calls(sizes["tokens"])},
        linear_in=("v",),
        causal=lambda case: True,
        neutral={"rotary_dims": all_channels},
        cells=CELLS,
        bad_inputs=(
            *BAD_CALLS,
            ("calls that leave out tokens", "chunk", lambda a: [a["q"].shape[-2] + 1]),
            ("a call of no tokens", "chunk", lambda a: [0, a["q"].shape[-2]]),
            *wrong_integers("chunk"),
        ),
    ),
)


def streams(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes={"tokens": st.integers(2, 32)})


def check_evicted(trial: Trial) -> None:
    """Other numbers in an evicted token's place change no bit of a call after its eviction, and
    NaN there does not reach one.
    """
    arguments, tokens = trial.arguments(), trial.case.sizes["tokens"]
    before = trial.run(arguments)["out"]
    ends = np.cumsum(call_sizes(tokens, arguments["chunk"]))
    _, trace = streaming_attend(**arguments)
    for end, kept in zip(ends, trace, strict=True):
        gone = np.setdiff1d(np.arange(end), kept)
        if len(gone) == 0 or end == tokens:
            continue
        for factor in (-3.0, np.nan):
            changed = {name: arguments[name].copy() for name in ("k", "v")}
            for x in changed.values():
                x[..., gone, :] *= factor
            after = trial.run({**arguments, **changed})["out"][..., end:, :]
            exact = np.array_equal(before[..., end:, :], after)
            if not (exact or (np.isnan(factor) and np.isfinite(after).all())):
                raise Violation("out", f"a call after token {end} reads one of {gone.tolist()}")


LAWS = (
    Law(
        "evicted",
        "An evicted token is gone: nothing that comes later depends on it.",
        ("K11",),
        streams,
        check_evicted,
        applies=lambda contract, kernel: contract.operation == "streaming_llm.streaming_attend",
        examples=0.3,
    ),
)
