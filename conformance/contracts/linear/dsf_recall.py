"""Contracts of the recall task of `dsf`, and of the predicate that tells an SSD."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Make, Output

WITHOUT_CONTRACT = {
    "mqar_batch": "Its draws are a generator's; what it makes of them is mqar_sequences."
}
VOCABULARY = 40


def distinct(first: int, last: int) -> Make:
    """Rows (n, P) of distinct tokens."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        n, P = case.shape("n P")
        rows = [rng.permutation(np.arange(first, last))[:P] for _ in range(n)]
        return np.array(rows, np.int64).reshape(n, P)

    return make


def make_slots(rng: np.random.Generator, case: Case) -> np.ndarray:
    n, P = case.shape("n P")
    rows = [rng.permutation(P + case.sizes["room"])[:P] for _ in range(n)]
    return np.array(rows, np.int64).reshape(n, P)


def length(sizes: Mapping[str, int]) -> int:
    """L of a case: room for all pairs and for the slots."""
    return 4 * sizes["P"] + 2 * sizes["room"]


def make_fill(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.integers(0, VOCABULARY, (case.sizes["n"], length(case.sizes)))


def make_labels(rng: np.random.Generator, case: Case) -> np.ndarray:
    shape = case.shape("batch tokens")
    labels = rng.integers(0, case.sizes["V"], shape)
    return np.where(rng.random(shape) < 0.5, -100, labels)


def make_eta(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Normalisers that grow, stay or, in half of the rows, fall once in a while."""
    shape = case.shape("batch tokens")
    steps = rng.integers(0, 3, shape) * 0.5
    falls = (rng.random(shape) < 0.2) & (rng.random((shape[0], 1)) < 0.5)
    return 40 + np.cumsum(np.where(falls, -0.5, steps), axis=-1)


def make_psi(rng: np.random.Generator, case: Case) -> np.ndarray:
    psi = rng.standard_normal(case.shape("batch tokens n"))
    return psi * (rng.random((*psi.shape[:-1], 1)) < 0.5)


CONTRACTS = (
    Contract(
        operation="dsf.mqar_sequences",
        sizes={"n": (1, 3), "P": (1, 5), "room": (0, 4)},
        queries="n",
        keys="n",
        values=("normal",),
        arrays=(
            Array("keys", make=distinct(1, VOCABULARY // 2)),
            Array("values", make=distinct(VOCABULARY // 2, VOCABULARY)),
            Array("slots", make=make_slots),
            Array("fill", make=make_fill, optional=True),
        ),
        outputs=(Output("inputs", "exact", "int64"), Output("labels", "exact", "int64")),
        parameters=lambda sizes: {"L": st.just(length(sizes))},
        bad_inputs=(
            ("too short a sequence", "L", lambda a: 4 * a["keys"].shape[1] - 1),
            ("a slot too far", "slots", lambda a: a["slots"] + a["L"]),
            ("more values than keys", "values", lambda a: a["values"].repeat(2, axis=0)),
        ),
    ),
    Contract(
        operation="dsf.mqar_accuracy",
        sizes={"batch": (1, 3), "tokens": (1, 12), "V": (1, 9)},
        queries="tokens",
        keys="tokens",
        arrays=(Array("logits", "batch tokens V"), Array("labels", make=make_labels)),
        outputs=(Output("share", nan=True, row_axes=0, by_query=False),),
        bad_inputs=(("labels of other tokens", "labels", lambda a: a["labels"].repeat(2, axis=1)),),
    ),
    Contract(
        operation="dsf.is_ssd",
        sizes={"batch": (1, 3), "tokens": (1, 6), "n": (1, 4)},
        queries="tokens",
        keys="tokens",
        values=("normal",),
        arrays=(Array("eta", make=make_eta), Array("psi", make=make_psi, optional=True)),
        outputs=(Output("is_ssd", "exact", "bool", by_query=False),),
        bad_inputs=(
            ("a normaliser of 0", "eta", lambda a: 0 * a["eta"]),
            ("features of other tokens", "psi", lambda a: np.ones((99, 98, 1))),
        ),
    ),
)
