"""Laws of `dsf`: what equals what, what does not, and what the scan of a map must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnspec.conformance.arrays import round_arguments
from attnspec.conformance.contract import Contract, Output
from attnspec.conformance.dtypes import round_to
from attnspec.conformance.judge import expect, out_dtype
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.laws.controls import check_apart
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

Outputs = Mapping[str, np.ndarray]


def _of(*functions: Any) -> Any:
    return lambda contract, kernel: contract.spec.function in functions


def _plain(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=(), values=("normal", "structured"))


def _judge(
    trial: Trial,
    arguments: dict[str, Any],
    what: str,
    truth: np.ndarray,
    read: Callable[[Outputs], np.ndarray],
) -> None:
    """What is read from the outputs, in float64, is `truth`, and counts as one output more.

    Its budget is what is read from the outputs of rounded runs, once these are in their dtypes.
    """
    contract, dtype = trial.contract, trial.case.dtype
    output = Output(what, cancels=True)

    def from_rounded(**given: Any) -> np.ndarray:
        made = contract.outputs_of(contract.call(contract.spec.function, given))
        stored = {
            o.name: round_to(np.asarray(made[o.name]).view(np.ndarray), out_dtype(o, dtype))
            for o in contract.outputs
        }
        return read({name: x.astype(np.float64) for name, x in stored.items()})

    expectation = expect(lambda **_: truth, arguments, (output,), dtype, from_rounded)
    trial.compare((output,), {what: read(trial.run(arguments))}, expectation)


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


def _inputs(trial: Trial, *shape: int) -> np.ndarray:
    return trial.case.generator("u").standard_normal(shape)


def check_map(trial: Trial) -> None:
    """The scan of the map is the mixer."""
    arguments = trial.arguments()
    sizes = trial.case.sizes
    dv = arguments.get("dv", sizes.get("dv", sizes["n"]))
    u = _inputs(trial, sizes["batch"], sizes["tokens"], dv)
    _judge(
        trial, arguments, "scan of the map", _direct(trial, arguments, u),
        lambda made: dsf_scan(made["Lam"], made["B"], made["C"], made["D"], u)[0],
    )  # fmt: skip


def check_matrix(trial: Trial) -> None:
    """Phi times the inputs is the scan, also over decays of 0; so is the scan of every gauge."""
    arguments = trial.arguments()
    Lam, B, C = (arguments[name] for name in ("Lam", "B", "C"))
    u = _inputs(trial, *Lam.shape[:-1], B.shape[-1])
    scan = dsf_scan(Lam, B, C, arguments.get("D"), u)[0]

    def act(made: Outputs) -> np.ndarray:
        if "Phi" in made:
            return np.einsum("bijvw,bjw->biv", made["Phi"], u)
        return dsf_scan(made["Lam"], made["B"], made["C"], None, u)[0]

    _judge(trial, arguments, "outputs", scan, act)


def check_rows(trial: Trial) -> None:
    """Values that are all 1 come back from linear attention, and not from normalised attention.

    That is not so where a sum of scores happens to be e^n: scores of 2 under n = 0 sum to 2, 4...
    """
    arguments = trial.arguments()
    ones = arguments["v"] = np.ones_like(arguments["v"])
    if trial.contract.spec.function is linear_attention:
        _judge(trial, arguments, "sums of weights", ones, lambda made: made["y"])
        return
    q, k, n = (np.zeros_like(arguments[name]) for name in ("q", "k", "n"))
    q[..., 0], k[..., 0] = 2, 1
    even = {**arguments, "q": q, "k": k, "n": n}
    got = trial.run(even)
    check_apart("y", got["y"], ones, 0.5, "means of the values, by weights that sum to 1")
    trial.judge(got, even)
    trial.judge(trial.run(arguments), arguments)


def check_shift(trial: Trial) -> None:
    """n + 1 divides the output by e; q -> -q turns its sign: no features need be positive."""
    arguments = trial.arguments()
    n = arguments["n"]
    larger = round_arguments({"n": n + 1}, trial.case.dtype)["n"]
    for changed, factor in (
        ({"n": larger}, np.exp(n - larger)[..., None]),
        ({"q": -arguments["q"]}, -1.0),
    ):
        outputs = trial.run({**arguments, **changed})
        trial.judge({**outputs, "y": outputs["y"] / factor}, arguments)


def check_equivalent(trial: Trial) -> None:
    """The attention that is made of an SSD gives what the SSD gives."""
    arguments = trial.arguments()
    Delta, a, b, c = (arguments[name] for name in ("Delta", "a", "b", "c"))
    u = arguments["u"] if "u" in arguments else _inputs(trial, *Delta.shape, 2)

    def attend(made: Outputs) -> np.ndarray:
        if "eta" in made:
            weights = made["phi"] @ np.swapaxes(made["psi"], -1, -2) / made["eta"][..., None]
            return np.tril(weights) @ u
        total = np.cumsum(made["log_decay"], axis=-1)
        gap = np.tril(total[..., :, None] - total[..., None, :])
        weights = np.tril(np.exp(gap) * (made["q"] @ np.swapaxes(made["k"], -1, -2)))
        return weights @ made["v"]

    _judge(trial, arguments, "attention", ssd_scan(Delta, a, b, c, u)[0], attend)


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
    f, z = arguments["f"], arguments["z"]
    wide = np.full_like(f, 1000.0)
    opened = {**arguments, "i": wide, "o": wide, "reversed": False}
    for changed, what, truth in (
        ({"f": wide}, "sums of open gates", np.cumsum(z, 1)),
        ({"f": -wide}, "inputs alone", z),
        ({"reversed": True, "alpha": -3.0}, "sums under alpha < 0", np.cumsum(z, 1)),
    ):
        _judge(trial, {**opened, **changed}, what, truth, lambda made: made["y"])
    turned = trial.run({**arguments, "reversed": True, "alpha": 1.0})
    trial.judge(turned, {**arguments, "f": -f, "reversed": False})


def check_orders(trial: Trial) -> None:
    """Inner products are the cut exponential series, packed or not."""
    arguments = trial.arguments()
    x = arguments["x"]
    s = (x @ np.swapaxes(x, -1, -2)) / np.sqrt(x.shape[-1])
    expected, term = np.ones_like(s), np.ones_like(s)
    for p in range(1, arguments["P"] + 1):
        term = term * s / p
        expected = expected + term
    _judge(
        trial, arguments, "inner products", expected,
        lambda made: made["features"] @ np.swapaxes(made["features"], -1, -2),
    )  # fmt: skip


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
