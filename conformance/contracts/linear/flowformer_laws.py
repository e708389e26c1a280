"""Laws of Flowformer alone: what copies, padded tokens, other sinks and an order do to flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.laws.controls import check_apart, several
from attnspec.conformance.trial import Trial
from attnspec.reference.linear.flowformer import conserved_flows, flow_attend, flows
from attnspec.reference.linear.flowformer_causal import flow_attend_causal

FAINT, STRONG = {"sigmoid": -8.0, "relu": 2.0**-9}, 8.0
"""Queries whose features are near 0, by kind, and those some thousand times as large."""


def _plain(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=(), cross=True)


def _several(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Of one token, or one query, there is nothing to tell apart."""
    axes = several(contract, kernel, contract.queries, 2)
    return draw_case(contract, kernel, dtype, axes, options=(), cross=True)


def _of(*functions: Callable[..., Any]) -> Any:
    return lambda contract, kernel: contract.spec.function in functions


def check_doubling(trial: Trial) -> None:
    """Every source twice: sinks receive twice as much, and each source gives half of it.

    Without eps this is exact. Flows leave sources as before, conserved ones by halves.
    """
    arguments = {**trial.arguments(), "eps": 0.0}
    sources = trial.case.sizes["keys"]
    doubled = {**arguments, "b": np.concatenate([arguments["b"]] * 2, axis=-2)}
    if "O" in arguments:
        doubled |= {"I": 2 * arguments["I"], "O": np.concatenate([arguments["O"]] * 2, axis=-1)}
    got = trial.run(doubled)
    (sinks, into), (givers, out_of) = got.items()
    out_of = out_of[..., :sources] * (2 if "O" in arguments else 1)
    trial.judge({sinks: into / 2, givers: out_of}, arguments)


def check_copies(trial: Trial) -> None:
    """One source, and several copies of it, give every sink the same, exactly so without eps."""
    arguments = {**trial.arguments(), "eps": 0.0}
    once, copies = dict(arguments), dict(arguments)
    for name in ("k", "v"):
        once[name] = arguments[name][..., :1, :]
        copies[name] = np.repeat(once[name], (2, 3, 7)[trial.case.seed % 3], axis=-2)
    trial.judge(trial.run(copies), once)


def check_padding(trial: Trial) -> None:
    """Padded tokens among the real ones, whatever they hold, change nothing."""
    arguments = trial.arguments()
    rng = trial.case.generator("padding")
    padded, rows = dict(arguments), {}
    for mask, names in (("query_mask", "q"), ("key_mask", "kv")):
        batch, real = trial.case.sizes["batch"], arguments[names[0]].shape[-2]
        tokens = real + int(rng.integers(1, 6))
        rows[mask] = np.sort(rng.permutation(tokens)[:real])
        padded[mask] = np.zeros((batch, tokens), bool)
        padded[mask][:, rows[mask]] = True
        for name in names:
            x = arguments[name]
            padded[name] = rng.standard_normal((*x.shape[:-2], tokens, x.shape[-1]))
            padded[name][..., rows[mask], :] = x
    out = trial.run(padded)["out"]
    trial.judge({"out": out[..., rows["query_mask"], :]}, arguments)


def _even(arguments: dict[str, Any], strong: np.ndarray) -> dict[str, Any]:
    """Sources all alike, values of 1 and no eps: every output is its sink's gate, and no more."""
    faint = FAINT[arguments["kind"]]
    q = np.where(strong[:, None], STRONG, np.full_like(arguments["q"], faint))
    k, v = (np.ones_like(arguments[name]) for name in ("k", "v"))
    return {**arguments, "q": q, "k": k, "v": v, "eps": 0.0}


def check_others(trial: Trial) -> None:
    """Beside a strong query the gates of faint ones are all but half open, without it sigmoid(1).

    A query alone has no other to lose.
    """
    queries = trial.case.sizes["queries"]
    if queries < 2:
        return
    strong = np.arange(queries) == trial.case.seed % queries
    beside = _even(trial.arguments(), strong)
    without = {**beside, "q": beside["q"][..., ~strong, :]}
    before, after = trial.run(beside), trial.run(without)
    check_apart(
        "out", before["out"][..., ~strong, :], after["out"], 0.05,
        "answers that do not feel another query dropped",
    )  # fmt: skip
    trial.judge(before, beside)
    trial.judge(after, without)


def check_order(trial: Trial) -> None:
    """Behind a faint first query the last one's gate is open, as without an order it is not.

    There it is sigmoid(T / (T - 1)). Of one token both forms make the same.
    """
    tokens = trial.case.sizes["tokens"]
    if tokens < 2:
        return
    arguments = _even(trial.arguments(), np.arange(tokens) > 0)
    got = trial.run(arguments)
    unordered = flow_attend(**arguments)
    check_apart(
        "out", got["out"][..., -1, :], unordered[..., -1, :], 0.05,
        "the last row of the form without an order",
    )  # fmt: skip
    trial.judge(got, arguments)


LAWS = (
    Law(
        "flow-doubling",
        "Twice the sources give sinks twice the flow, and each of them half as much.",
        ("K1",),
        _plain,
        check_doubling,
        applies=_of(flows, conserved_flows),
        examples=0.2,
    ),
    Law(
        "flow-copies",
        "Copies of the only source change nothing.",
        ("K1",),
        _plain,
        check_copies,
        applies=_of(flow_attend),
        examples=0.2,
    ),
    Law(
        "flow-padding",
        "Padded tokens count nowhere: not in a flow, not among the sources, not among the sinks.",
        ("K11",),
        _plain,
        check_padding,
        applies=lambda contract, kernel: (
            contract.spec.function is flow_attend
            and kernel.supports("key_mask", True)
            and kernel.supports("query_mask", True)
        ),
        examples=0.2,
    ),
    Law(
        "flow-others",
        "A query that is dropped changes the answers of the others.",
        ("K1",),
        _several,
        check_others,
        applies=_of(flow_attend),
        examples=0.2,
    ),
    Law(
        "flow-order",
        "The last causal output is not that of the form without an order.",
        ("K1",),
        _several,
        check_order,
        applies=_of(flow_attend_causal),
        examples=0.2,
    ),
)
