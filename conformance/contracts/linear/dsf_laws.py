"""Laws of `dsf`: what equals what, what does not, and what the scan of a map must give."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.linear.dsf import (
    dsf_matrix,
    dsf_scan,
    from_attention,
    from_normalised_attention,
    from_qlstm,
    from_rg_lru,
    from_s6,
    from_ssd,
    gauge,
    is_ssd,
    linear_attention,
    normalised_attention,
    qlstm,
    rg_lru,
    s6_scan,
    ssd_as_attention,
    ssd_as_normalised,
    ssd_scan,
    taylor_features,
)

CLOSE = 1e-3
"""An identity is judged loosely: agreement judges digits, this law only which mixer it is."""


def _of(*functions: Any) -> Any:
    return lambda contract, kernel: contract.spec.function in functions


def _plain(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=(), values=("normal", "structured"))


def _same(name: str, got: np.ndarray, expected: np.ndarray, dtype: str, what: str) -> None:
    """Equal to a part of the largest number in it, by dtype."""
    loose = CLOSE if dtype in ("float32", "float64") else 0.1
    size = np.max(np.abs(expected), initial=1.0)
    if got.shape != expected.shape or not np.all(np.abs(got - expected) <= loose * size):
        raise Violation(name, what)


def _direct(trial: Trial, arguments: dict[str, Any], u: np.ndarray) -> np.ndarray:
    """The mixer itself, of the arguments of its map."""
    function, a = trial.contract.spec.function, arguments
    one = {name: x[:, None] for name, x in a.items() if isinstance(x, np.ndarray) and x.ndim > 1}
    if function is from_normalised_attention:
        return np.asarray(normalised_attention(one["q"], one["k"], u[:, None], one["n"])[0][:, 0])
    if function is from_attention:
        n = np.log(one["eta"])
        return np.asarray(normalised_attention(one["phi_q"], one["psi_k"], u[:, None], n)[0][:, 0])
    if function is from_s6:
        return np.asarray(s6_scan(a["Delta"], a["A"], a["b"], a["c"], u, a.get("D"))[0])
    if function is from_ssd:
        # Batch entries with a rate each are heads here.
        whole = ssd_scan(a["Delta"], a["a"], a["b"], a["c"], u)
        return np.asarray(whole[0])
    if function is from_qlstm:
        return np.asarray(qlstm(a["f"], a["i"], a["o"], u, a["alpha"], a["reversed"])[0])
    return np.asarray(rg_lru(u, a["r"], a["g"], a["lam"], c=a["c"])[0])


def check_map(trial: Trial) -> None:
    """The scan of the map is the mixer."""
    arguments = trial.arguments()
    made = trial.run(arguments)
    u = trial.case.generator("u").standard_normal((*made["Lam"].shape[:-1], made["B"].shape[-1]))
    y = dsf_scan(made["Lam"], made["B"], made["C"], made["D"], u)[0]
    expected = _direct(trial, arguments, u)
    _same("B", y, expected, trial.case.dtype, "its scan is not the mixer")


def check_matrix(trial: Trial) -> None:
    """Phi times the inputs is the scan, also over decays of 0."""
    arguments = trial.arguments()
    u = trial.case.generator("u").standard_normal(
        (*arguments["Lam"].shape[:-1], arguments["B"].shape[-1])
    )
    D = arguments.get("D")
    expected = dsf_scan(arguments["Lam"], arguments["B"], arguments["C"], D, u)[0]
    if trial.contract.spec.function is dsf_matrix:
        got = np.einsum("bijvw,bjw->biv", trial.run(arguments)["Phi"], u)
    else:
        made = trial.run(arguments)
        got = dsf_scan(made["Lam"], made["B"], made["C"], None, u)[0]
    _same("y", got, expected, trial.case.dtype, "it does not act as the scan")


def check_rows(trial: Trial) -> None:
    """Values that are all 1 come back from linear attention, and not from normalised attention."""
    arguments = trial.arguments()
    arguments["v"] = np.ones_like(arguments["v"])
    got = trial.run(arguments)["y"]
    if trial.contract.spec.function is linear_attention:
        known = np.abs(arguments["q"]).max(initial=0) < 6
        if known:
            _same("y", got, np.ones_like(got), trial.case.dtype, "weights do not sum to 1")
        return
    trial.judge({"y": got, "h": trial.run(arguments)["h"]}, arguments)
    if np.all(np.abs(got - 1) < CLOSE) and got.size > 1:
        raise Violation("y", "all weights sum to 1: is this softmax or linear attention?")


def check_shift(trial: Trial) -> None:
    """n + 1 divides the output by e; q -> -q turns its sign: no features need be positive."""
    arguments = trial.arguments()
    for changed, factor in (
        ({"n": arguments["n"] + 1}, np.exp(-1.0)),
        ({"q": -arguments["q"]}, -1.0),
    ):
        before, after = trial.run(arguments)["y"], trial.run({**arguments, **changed})["y"]
        _same("y", after, factor * before, trial.case.dtype, "it has no such part")


def check_equivalent(trial: Trial) -> None:
    """The attention that is made of an SSD gives what the SSD gives."""
    arguments = trial.arguments()
    made = trial.run(arguments)
    u = arguments.get("u")
    if u is None:
        u = trial.case.generator("u").standard_normal((*arguments["Delta"].shape, 2))
    Delta, a, b, c = (arguments[name] for name in ("Delta", "a", "b", "c"))
    expected = ssd_scan(Delta, a, b, c, u)[0]
    if "eta" in made:
        weights = made["phi"] @ np.swapaxes(made["psi"], -1, -2) / made["eta"][..., None]
        got = np.tril(weights) @ u
    else:
        total = np.cumsum(made["log_decay"], axis=-1)
        gap = np.tril(total[..., :, None] - total[..., None, :])
        weights = np.tril(np.exp(gap) * (made["q"] @ np.swapaxes(made["k"], -1, -2)))
        got = weights @ made["v"]
    _same("v", got, expected, trial.case.dtype, "it is not the SSD")


def check_rotated(trial: Trial) -> None:
    """A query that turns makes eta fall: no SSD; a fixed one with positive features makes one."""
    sums = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    fixed = np.broadcast_to(sums @ np.array([1.0, 1.0]), (1, 3)).copy()
    turned = np.array([[3.0, 1.5, 4.5]])
    for eta, expected in ((fixed, True), (turned, False)):
        if bool(np.all(trial.run({"eta": eta})["is_ssd"])) is not expected:
            raise Violation("is_ssd", f"{eta.tolist()} should be {expected}")


def check_holds(trial: Trial) -> None:
    """Delta = 0 holds the state and ignores the input; a large Delta forgets it."""
    arguments = trial.arguments()
    shape = (arguments["u"].shape[0], *arguments["A"].shape)
    h0 = trial.case.generator("h0").integers(-9, 10, shape) / 4  # exact in every dtype
    still = {**arguments, "Delta": np.zeros_like(arguments["Delta"]), "h0": h0}
    if not np.array_equal(trial.run(still)["h"], h0):
        raise Violation("h", "Delta = 0 changed the state")
    A = np.ones_like(arguments["A"])
    fast = {**arguments, "A": A, "Delta": np.full_like(arguments["Delta"], 1000.0)}
    before, after = trial.run({**fast, "h0": h0}), trial.run({**fast, "h0": 0 * h0})
    if not np.array_equal(before["h"], after["h"]):
        raise Violation("h", "a large Delta did not forget the state")


def check_limits(trial: Trial) -> None:
    """Open gates sum; a reversed gate with alpha = 1 at f is the plain one at -f; relu(alpha)."""
    arguments = trial.arguments()
    wide = np.full_like(arguments["f"], 1000.0)
    opened = {**arguments, "i": wide, "o": wide}
    z = arguments["z"]
    summed = trial.run({**opened, "f": wide, "reversed": False})["y"]
    _same("y", summed, np.cumsum(z, 1), trial.case.dtype, "open gates do not sum")
    alone = trial.run({**opened, "f": -wide, "reversed": False})["y"]
    _same("y", alone, z, trial.case.dtype, "a closed forget gate remembers")
    plain = trial.run({**arguments, "f": -arguments["f"], "reversed": False})["y"]
    turned = trial.run({**arguments, "reversed": True, "alpha": 1.0})["y"]
    _same("y", turned, plain, trial.case.dtype, "alpha = 1 is not the plain gate turned round")
    kept = trial.run({**opened, "reversed": True, "alpha": -3.0})["y"]
    _same("y", kept, np.cumsum(z, 1), trial.case.dtype, "alpha below 0 grows or loses the state")


def check_orders(trial: Trial) -> None:
    """Inner products are the cut exponential series, packed or not."""
    arguments = trial.arguments()
    x = arguments["x"]
    f = trial.run(arguments)["features"]
    s = (x @ np.swapaxes(x, -1, -2)) / np.sqrt(x.shape[-1])
    expected, term = np.ones_like(s), np.ones_like(s)
    for p in range(1, arguments["P"] + 1):
        term = term * s / p
        expected = expected + term
    got = f @ np.swapaxes(f, -1, -2)
    _same("features", got, expected, trial.case.dtype, "not the series of exp")


def _law(name: str, promise: str, check: Any, *functions: Any, examples: float = 0.3) -> Law:
    return Law(
        f"dsf-{name}", promise, ("K10",), _plain, check, applies=_of(*functions), examples=examples
    )


LAWS = (
    _law(
        "map", "A mixer written as a system is that mixer.", check_map, from_attention,
        from_normalised_attention, from_s6, from_ssd, from_qlstm, from_rg_lru,
    ),
    _law("matrix", "The matrix and every gauge act as the scan.", check_matrix, dsf_matrix, gauge),
    _law(
        "rows", "Weights of linear attention sum to 1, those of normalised attention do not.",
        check_rows, linear_attention, normalised_attention,
    ),
    _law("shift", "The normaliser of normalised attention is a scale.", check_shift,
         normalised_attention),
    _law("equal", "An SSD as attention is that SSD.", check_equivalent, ssd_as_attention,
         ssd_as_normalised),
    _law("turned", "A query that turns is told from an SSD.", check_rotated, is_ssd, examples=0.05),
    _law("hold", "Delta decides between holding and forgetting.", check_holds, s6_scan),
    _law("gates", "Gates have their limits.", check_limits, qlstm),
    _law("series", "Features are those of the exponential.", check_orders, taylor_features),
)  # fmt: skip
