"""Contracts of EE-MLLM's layers: the aligner, a layer, a stack of them, and their cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, Contract, Output
from attnspec.conformance.laws.base import Law, draw_anywhere
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.patterns.ee_mllm import layer_step
from attnspec.reference.patterns.ee_mllm_layers import Layer

SIZES = {
    "batch": (1, 2),
    "kv_heads": (1, 2),
    "group": (1, 3),
    "d": (1, 12),
    "dv": (1, 12),
    "D": (1, 16),
    "F": (1, 16),
    "images": (0, 12),
}


def make_layer(rng: np.random.Generator, case: Case) -> Layer:
    """Weights that keep the size of states; rotary positions where the head size is even."""
    D, F, d, dv = (case.sizes[name] for name in ("D", "F", "d", "dv"))
    heads, kv_heads = case.heads, case.sizes["kv_heads"]

    def weights(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / np.sqrt(rows)

    return Layer(
        norm1=1 + 0.1 * rng.standard_normal(D),
        Wq=weights(D, heads * d),
        Wk=weights(D, kv_heads * d),
        Wv=weights(D, kv_heads * dv),
        Wo=weights(heads * dv, D),
        norm2=1 + 0.1 * rng.standard_normal(D),
        ffn=(weights(D, F), weights(D, F), weights(F, D)),
        H=heads,
        Hk=kv_heads,
        rope=None if d % 2 or rng.integers(3) == 0 else 100.0,
    )


def make_stack(rng: np.random.Generator, case: Case) -> tuple[Layer, ...]:
    return tuple(make_layer(rng, case) for _ in range(2))


def make_positions(part: str) -> Any:
    """The positions of one kind of token; those of the other kind come from the same draw."""

    def make(rng: np.random.Generator, case: Case) -> np.ndarray:
        texts, images = case.sizes["queries"], case.sizes["images"]
        shared = case.generator("positions")
        every = shared.choice(2 * (texts + images) + 1, texts + images, replace=False)
        if shared.integers(2):
            every = np.sort(every)
            every = np.concatenate([every[images:], every[:images]])
        return every[:texts] if part == "text" else every[texts:]

    return make


def _spoiled(layer: Layer, **parts: Any) -> Layer:
    return layer._replace(**parts)


def _parameters(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "mode": st.sampled_from(["self", "self", "ffn", "frozen"]),
        "image_visible": st.sampled_from(["causal", "all"]),
    }


def check_images_alone(trial: Trial) -> None:
    """Neither text nor another image token changes the state of an image token."""
    arguments = trial.arguments()
    images = trial.case.sizes["images"]
    if not images:
        return
    kept = int(trial.case.generator("kept").integers(images))
    changed = {**arguments, "Xt": -2.0 * arguments["Xt"], "Xv": -2.0 * arguments["Xv"]}
    changed["Xv"][:, kept] = arguments["Xv"][:, kept]
    before, after = trial.run(arguments), trial.run(changed)
    if not np.array_equal(before["Xv"][:, kept], after["Xv"][:, kept]):
        raise Violation("Xv", f"image token {kept} depends on another token")


STATES = (
    Array("Xt", "batch queries D"),
    Array("Xv", "batch images D"),
    Array("pos_t", "queries", make=make_positions("text")),
    Array("pos_v", "images", make=make_positions("image")),
)
BAD_LAYER = (
    ("no layer", "layer", lambda a: None),
    ("an FFN of two parts", "layer", lambda a: _spoiled(a["layer"], ffn=a["layer"].ffn[:2])),
    ("a negative base", "layer", lambda a: _spoiled(a["layer"], rope=-1.0)),
    ("a base in words", "layer", lambda a: _spoiled(a["layer"], rope="ten thousand")),
    ("a negative eps", "layer", lambda a: _spoiled(a["layer"], eps=-1.0)),
    ("kv heads that do not divide", "layer", lambda a: _spoiled(a["layer"], Hk=29)),
    ("no heads", "layer", lambda a: _spoiled(a["layer"], H=0)),
    (
        "a Wo of other heads",
        "layer",
        lambda a: _spoiled(a["layer"], Wo=a["layer"].Wo.repeat(2, axis=0)),
    ),
    (
        "a norm of another width",
        "layer",
        lambda a: _spoiled(a["layer"], norm1=a["layer"].norm1.repeat(2)),
    ),
)
BAD_MODE = (("a fourth mode", "mode", lambda a: "none"),)
BAD_OPTIONS = (
    *BAD_MODE,
    ("a third way to see images", "image_visible", lambda a: "none"),
)
BAD_STATES = (
    ("images of another batch", "Xv", lambda a: a["Xv"].repeat(2, axis=0)),
    ("positions of other text", "pos_t", lambda a: np.arange(99)),
    ("positions of other images", "pos_v", lambda a: np.arange(99)),
    ("positions as floats", "pos_v", lambda a: a["pos_v"] * 1.0),
)
CONTRACTS = (
    Contract(
        operation="ee_mllm.aligner_update",
        sizes=SIZES,
        arrays=(Array("Xv", "batch images D"), Array("layer", make=make_layer)),
        outputs=(Output("Xv", cancels=True),),
        parameters=lambda sizes: {"mode": st.sampled_from(["self", "self", "ffn", "frozen"])},
        bad_inputs=(*BAD_LAYER, *BAD_MODE),
    ),
    Contract(
        operation="ee_mllm.layer_step",
        sizes={**SIZES, "queries": (1, 12)},
        keys="images",
        arrays=(*STATES, Array("layer", make=make_layer)),
        outputs=(Output("Xt", cancels=True), Output("Xv", cancels=True)),
        parameters=_parameters,
        bad_inputs=(*BAD_LAYER, *BAD_STATES, *BAD_OPTIONS),
    ),
    Contract(
        operation="ee_mllm.run_layers",
        sizes={**SIZES, "queries": (1, 12)},
        keys="images",
        arrays=(*STATES, Array("stack", make=make_stack)),
        outputs=(Output("Xt", cancels=True), Output("Xv", cancels=True)),
        parameters=lambda sizes: {
            **_parameters(sizes),
            "layers": st.sampled_from([None, (), (0,), (1,), (0, 1)]),
        },
        bad_inputs=(
            *BAD_STATES,
            *BAD_OPTIONS,
            ("a layer that is not there", "layers", lambda a: (2,)),
            ("a layer that is no number", "layers", lambda a: (0.5,)),
        ),
    ),
    Contract(
        operation="ee_mllm.flops",
        sizes={},
        arrays=(),
        outputs=(
            Output("dense", "exact", plain=True),
            Output("composite", "exact", plain=True),
        ),
        parameters=lambda sizes: {
            "Nt": st.integers(0, 4096),
            "Nv": st.integers(0, 4096),
            "D": st.integers(1, 8192),
            "F": st.integers(1, 32768),
            "layers": st.integers(1, 80),
        },
        bad_inputs=(
            ("Nt = -1", "Nt", lambda a: -1),
            ("Nv = 2.5", "Nv", lambda a: 2.5),
            ("D = 0", "D", lambda a: 0),
            ("F = True", "F", lambda a: True),
            ("no layers", "layers", lambda a: 0),
        ),
    ),
)  # fmt: skip
LAWS = (
    Law(
        "images-alone",
        "An image token's state depends on no other token.",
        (),
        draw_anywhere,
        check_images_alone,
        applies=lambda contract, kernel: contract.spec.function is layer_step,
        examples=0.3,
    ),
)
