"""Laws that say the same thing, agreement with the reference, where kernels are known to differ."""

from __future__ import annotations

from hypothesis import strategies as st

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import (
    ALL_LAYOUTS,
    Law,
    Strategy,
    alone,
    around_tiles,
    draw_case,
    token_axes,
    usual_widths,
    wide_tiles,
)
from attnspec.conformance.trial import Trial


def check_agreement(trial: Trial) -> None:
    """The kernel answers as the reference does, stage by stage."""
    trial.check()


def comfortable(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype)


def ragged(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    axes = around_tiles(contract, kernel) | alone(contract)
    return draw_case(contract, kernel, dtype, axes=axes)


def tiny(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    axes = {
        axis: st.integers(contract.least.get(axis, 0), 2 + contract.least.get(axis, 0))
        for axis in token_axes(contract)
    }
    return draw_case(contract, kernel, dtype, axes=axes, cross=True)


def cross(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, cross=True)


def heads(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    axes = {
        "batch": st.integers(1, 2),
        "kv_heads": st.sampled_from([1, 2, 3]),
        "group": st.sampled_from([1, 2, 3, 5, 6, 7, 8]),
        "d": st.sampled_from([2, 6, 16, 24, 40, 64, 80, 96, 128]),
        "dv": st.sampled_from([1, 5, 16, 24, 48, 64, 80, 96]),
    }
    even = {"d": axes["d"], "dv": axes["dv"]}
    chosen = {axis: s for axis, s in {**axes, **even}.items() if axis in contract.sizes}
    return draw_case(contract, kernel, dtype, axes=chosen)


def layouts(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, layouts=ALL_LAYOUTS[1:])


def magnitude(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, values=("huge",))


def wide(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Heads as most models have them, with any lengths and with those that fill tiles."""
    values, widths = ("normal", "real"), usual_widths(contract)
    short = draw_case(contract, kernel, dtype, widths=widths, values=values)
    return short | wide_tiles(contract, kernel, dtype, values)


def _has_heads(contract: Contract, kernel: Kernel) -> bool:
    return bool({"group", "d", "dv", "kv_heads"} & contract.axes())


LAWS = (
    Law(
        "agreement",
        "The kernel agrees with the reference within the error an honest kernel makes.",
        ("K2", "K5", "K10"),
        comfortable,
        check_agreement,
    ),
    Law(
        "ragged",
        "Lengths around the kernel's own tile sizes change nothing.",
        ("K11",),
        ragged,
        check_agreement,
        applies=lambda contract, kernel: bool(token_axes(contract)),
        examples=0.5,
    ),
    Law(
        "tiny",
        "Zero, one and two tokens are ordinary lengths.",
        ("K4", "K9"),
        tiny,
        check_agreement,
        applies=lambda contract, kernel: bool(token_axes(contract)),
        examples=0.5,
    ),
    Law(
        "lengths",
        "Queries and keys may differ in number; causal order aligns at the end.",
        ("K3", "K4"),
        cross,
        check_agreement,
        applies=lambda contract, kernel: contract.has_cross(),
    ),
    Law(
        "heads",
        "Any grouping of heads and any head size give the reference's answer.",
        ("K1", "K7"),
        heads,
        check_agreement,
        applies=_has_heads,
        examples=0.5,
    ),
    Law(
        "layout",
        "Strides, offsets and shared storage change nothing.",
        ("K1", "K12"),
        layouts,
        check_agreement,
        applies=lambda contract, kernel: bool(contract.arrays),
        examples=0.5,
    ),
    Law(
        "magnitude",
        "Logits of 1e5 neither overflow nor lose the row.",
        ("K10",),
        magnitude,
        check_agreement,
        applies=lambda contract, kernel: any(a.role in ("query", "key") for a in contract.arrays),
        examples=0.5,
    ),
    Law(
        "precision",
        "Heads of 64 and 128 channels too, in full tiles: float32 is IEEE, all accumulates in it.",
        ("K10",),
        wide,
        check_agreement,
        applies=lambda contract, kernel: "d" in contract.sizes,
        examples=0.6,
    ),
)
