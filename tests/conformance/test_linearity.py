"""The law of linearity where numbers of float16 are too small to be normal."""

from __future__ import annotations

import numpy as np
import pytest

from attnspec.conformance import Kernel, find_contract
from attnspec.conformance.case import Case
from attnspec.conformance.laws import laws
from attnspec.conformance.laws.symmetries import _is_double
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation


def filter_in_half(x, qp, kp, lam, state=None):
    """As a kernel does it: q k times the decay is an operand, and so of the dtype of x."""
    wide = np.float32
    age = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-2])
    rates = lam[:, None, None].astype(np.float64)
    decay = np.where(age >= 0, rates ** np.maximum(age, 0), 0)
    gain = np.einsum("hm,hm->h", qp.astype(wide), kp.astype(wide))
    P = (gain[:, None, None] * decay).astype(x.dtype)
    left = (rates[..., 0] ** age[-1]).astype(wide)
    last = np.einsum("hm,ht,bhtd->bhmd", kp.astype(wide), left, x.astype(wide))
    return (P.astype(wide) @ x.astype(wide)).astype(x.dtype), last


def clipped(x, qp, kp, lam, state=None):
    y, last = filter_in_half(x, qp, kp, lam)
    return y.clip(-0.05, 0.05), last


def offset(x, qp, kp, lam, state=None):
    """Further from 0 by a constant, which no size makes linear."""
    y, last = filter_in_half(x, qp, kp, lam)
    return (y + np.copysign(0.02, y)).astype(y.dtype), last


def trial(call, seed):
    case = Case(
        operation="lightnet.tpe",
        sizes={"batch": 1, "kv_heads": 2, "m": 1, "tokens": 13, "dv": 16},
        parameters={},
        options=(),
        values="normal",
        layout="contiguous",
        dtype="float16",
        seed=seed,
    )
    kernel = Kernel("half", "lightnet.tpe", call, dtypes=("float16",))
    return Trial(kernel, find_contract("lightnet.tpe"), case)


@pytest.mark.parametrize("seed", [1, 3, 10])
def test_lost_bits_of_small_operands_are_no_fault(seed):
    run = trial(filter_in_half, seed)
    arguments = run.arguments()
    once, twice = run.run(arguments), run.run({**arguments, "qp": 2.0 * arguments["qp"]})
    assert not _is_double(twice["y"], once["y"], "float16"), "a case in which bits are lost"
    laws()["linearity"].check(run)


@pytest.mark.parametrize("call", [clipped, offset])
def test_what_is_not_linear_is_a_fault(call):
    with pytest.raises(Violation):
        laws()["linearity"].check(trial(call, 1))
