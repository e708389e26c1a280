"""Contracts of H2O's cache: a call and what it leaves behind, and a stream of calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.cells import heads_cell
from attnspec.conformance.contract import Array, Contract, Output, Ranking, Stream
from attnspec.conformance.contracts.cache.streaming_llm_rows import wrong_integers
from attnspec.conformance.contracts.patterns.sinklora_h2o import Drawn, budgets, scores_given
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.values import feed_tokens, longer
from attnspec.conformance.violation import Violation
from attnspec.reference.patterns.sinklora_h2o import State, h2o_step, init_state


def step_parameters(sizes: Mapping[str, int]) -> Drawn:
    base = [None, 10000.0, 30.0] if sizes["d"] % 2 == 0 else [None]
    return {
        **budgets(sizes),
        "scale": st.sampled_from([None, 0.5]),
        "rope_base": st.sampled_from(base),
    }


def make_state(rng: np.random.Generator, case: Case) -> State:
    """Rows that a text of `past` tokens may have left behind."""
    hh, rec, past = case.parameters["hh"], case.parameters["rec"], case.sizes["past"]
    kv_heads = case.sizes["kv_heads"]
    old = range(max(0, past - rec))
    heavy = min(hh, len(old))
    chosen = [np.sort(rng.choice(len(old), heavy, replace=False)) for _ in range(kv_heads)]
    recent = np.broadcast_to(np.arange(len(old), past), (kv_heads, past - len(old)))
    pos = np.concatenate([np.reshape(chosen, (kv_heads, heavy)).astype(np.int64), recent], axis=1)
    k, v = (rng.standard_normal((1, *pos.shape, case.sizes[axis])) for axis in ("d", "dv"))
    return State(k, v, 3.0 * rng.random(pos.shape), pos, past)


def everything(arguments: Mapping[str, Any]) -> tuple[np.ndarray, State]:
    """A call that keeps all its rows."""
    rows = arguments["state"].pos.shape[1] + arguments["q"].shape[-2]
    return h2o_step(**{**arguments, "hh": 0, "rec": rows})


def received(arguments: Mapping[str, Any]) -> Ranking:
    """What each row of the call has received; recent ones stay whatever that is."""
    a = everything(arguments)[1].a
    ranking = scores_given({**arguments, "a": a, "n": a.shape[1]})
    return replace(ranking, exact="never")


def kept_rows(pos: np.ndarray, arguments: Mapping[str, Any]) -> np.ndarray:
    """bool (kv_heads, n): the call's rows whose tokens are in the state."""
    rows = everything(arguments)[1].pos
    if pos.ndim != 2 or len(pos) != len(rows):
        return np.zeros(rows.shape, bool)
    return np.any(rows[:, :, None] == pos[:, None, :], axis=2)


def keep(arguments: Mapping[str, Any], kept: np.ndarray) -> tuple[np.ndarray, State]:
    """The call's result, had the choice fallen on the rows `kept`."""
    out, whole = everything(arguments)
    rows = np.sort(np.argsort(~kept, axis=1, kind="stable")[:, : kept.sum(axis=1).max()], axis=1)
    k, v = (np.take_along_axis(x, rows[None, :, :, None], axis=2) for x in (whole.k, whole.v))
    a, pos = (np.take_along_axis(x, rows, axis=1) for x in (whole.a, whole.pos))
    return out, State(k, v, a, pos, whole.seen)


def token_by_token(whole: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The output of a text, and for each token the closest choice before it: the lowest score that
    was kept and the highest that was not.
    """
    outs, close = [], np.array([1.0, 0.0])
    pairs, state = [], init_state(whole["k"], whole["v"])
    for t in range(whole["q"].shape[-2]):
        call = feed_tokens(whole, state, t, t + 1)
        ranking = received(call)
        out, state = h2o_step(**call)
        outs.append(out)
        pairs.append(close)
        kept = kept_rows(state.pos, call)
        assert ranking.forced is not None
        for scores, stays, forced in zip(ranking.scores, kept, ranking.forced, strict=True):
            chosen, dropped = scores[stays & ~forced], scores[~stays]
            if chosen.size and dropped.size:
                pair = np.stack([np.min(chosen), np.max(dropped)])
                close = pair if pair[0] - pair[1] < close[0] - close[1] else close
    return np.concatenate(outs, axis=-2), np.stack(pairs)


def closest_choices(whole: Mapping[str, Any]) -> Ranking:
    """One kept and one dropped score for each token, since one other choice changes all after."""
    pairs = token_by_token(whole)[1]
    return Ranking(np.broadcast_to(pairs, (*whole["q"].shape[:-1], 2)), 1)


Q = Array("q", "1 heads tokens d", role="query")
K = Array("k", "1 kv_heads tokens d", role="key")
V = Array("v", "1 kv_heads tokens dv", role="value")


CONTRACTS = (
    Contract(
        operation="sinklora.h2o_step",
        sizes={
            "kv_heads": (1, 3),
            "group": (1, 3),
            "d": (1, 24),
            "dv": (1, 24),
            "past": (0, 24),
            "tokens": (1, 4),
        },
        least={"tokens": 1},
        arrays=(Q, K, V, Array("state", make=make_state)),
        outputs=(
            Output("out"),
            Output("state.k", "copy"),
            Output("state.v", "copy"),
            Output("state.a", wide=True, by_query=False),
            Output("state.pos", "selection", chosen=kept_rows),
            Output("state.seen", "exact", plain=True),
        ),
        parameters=step_parameters,
        ranking=received,
        follow=keep,
        cells={
            "causal self": lambda case: case,
            "MHA": heads_cell(2, 1),
            "GQA": heads_cell(2, 3),
            "MQA": heads_cell(1, 4),
        },
        bad_inputs=(
            ("more queries than keys", "q", lambda a: longer(a["q"])),
            ("more keys than queries", "k", lambda a: longer(a["k"])),
            ("more values than keys", "v", lambda a: longer(a["v"])),
            ("k of another head size", "k", lambda a: a["k"].repeat(2, axis=-1)),
            ("kv heads that do not divide", "k", lambda a: a["k"].repeat(17, axis=-3)),
            ("two sequences in v", "v", lambda a: a["v"].repeat(2, axis=0)),
            ("values of another width than the state's", "v", lambda a: a["v"].repeat(2, axis=-1)),
            ("keys and values that are no state", "state", lambda a: (a["k"], a["v"])),
            (
                "scores of other rows",
                "state",
                lambda a: a["state"]._replace(a=np.pad(a["state"].a, [(0, 0), (0, 1)])),
            ),
            (
                "positions of one head",
                "state",
                lambda a: a["state"]._replace(pos=a["state"].pos.repeat(2, axis=0)),
            ),
            (
                "a state with more values than keys",
                "state",
                lambda a: a["state"]._replace(v=np.concatenate([a["state"].v, a["v"]], axis=-2)),
            ),
            ("a base of 0", "rope_base", lambda a: 0.0 if a["q"].shape[-1] % 2 == 0 else "a"),
            *wrong_integers("hh", "rec"),
        ),
        stream=Stream(
            arrays=(Q, K, V),
            start=lambda whole: init_state(whole["k"], whole["v"]),
            feed=feed_tokens,
            whole=lambda whole: token_by_token(whole)[0],
            chunked=False,
            hidden=closest_choices,
        ),
    ),
)


def check_choice(trial: Trial) -> None:
    """Other values change neither what rows receive nor which of them stay."""
    arguments = trial.arguments()
    state = arguments["state"]
    changed = {"v": 3.0 - arguments["v"], "state": state._replace(v=-2.0 * state.v)}
    first, second = (trial.run(x) for x in (arguments, {**arguments, **changed}))
    for name in ("state.a", "state.pos"):
        if not np.array_equal(first[name], second[name]):
            raise Violation(name, "depends on the values")


def calls(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes={"past": st.integers(4, 24)})


LAWS = (
    Law(
        "choice",
        "Queries and keys decide what is kept, values do not.",
        ("K6",),
        calls,
        check_choice,
        applies=lambda contract, kernel: contract.operation == "sinklora.h2o_step",
        examples=0.3,
    ),
)
