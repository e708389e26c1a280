"""What a law is, and how it draws the cases it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.layouts import LAYOUTS
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation

Strategy = st.SearchStrategy[Case]
TOKEN_AXES = ("tokens", "queries", "keys", "q_tokens", "k_tokens")


@dataclass(frozen=True)
class Law:
    """One promise every kernel makes, or every kernel whose contract or claims allow it.

    applies(contract, kernel): whether the law speaks about this kernel at all.
    cases(contract, kernel, dtype): where it looks.
    check(trial): raises `Violation` if the promise is broken on the trial's case.
    examples: share of the profile's examples it deserves (1 is all).
    """

    name: str
    promise: str
    rules: tuple[str, ...]
    cases: Callable[[Contract, Kernel, str], Strategy]
    check: Callable[[Trial], None]
    applies: Callable[[Contract, Kernel], bool] = lambda contract, kernel: True
    examples: float = 1.0


def in_each_configuration(check: Callable[[Trial], None]) -> Callable[[Trial], None]:
    """`check` under each tuning configuration of a kernel alone."""

    def check_all(trial: Trial) -> None:
        for name, force in trial.kernel.configs.items():
            try:
                with force():
                    check(trial)
            except Violation as violation:
                violation.message += f" (configuration {name})"
                raise

    return check_all


def token_axes(contract: Contract) -> list[str]:
    """The axes of a contract that count tokens."""
    return [a for a in contract.sizes if a in (*TOKEN_AXES, contract.queries, contract.keys)]


def usual_widths(contract: Contract) -> dict[str, st.SearchStrategy[int]]:
    """Heads of 64 or 128 channels, in keys and values alike: what most models have."""
    width = st.shared(st.sampled_from([64, 128]), key="width of heads")
    return {axis: width for axis in ("d", "dv") if axis in contract.sizes}


@st.composite
def draw_case(
    draw: st.DrawFn,
    contract: Contract,
    kernel: Kernel,
    dtype: str,
    axes: Mapping[str, st.SearchStrategy[int]] | None = None,
    values: Sequence[str] | None = None,
    layouts: Sequence[str] = ("contiguous",),
    cross: bool = False,
    options: Sequence[str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    widths: Mapping[str, st.SearchStrategy[int]] | None = None,
) -> Case:
    """A case inside the kernel's limits.

    `axes` overrides how axes are drawn, and `widths` does so even where a new size costs the kernel
    a compilation; `parameters` fixes parameters, `options` chooses among optional arrays (all by
    default). Queries and keys have equal lengths unless `cross`.
    """
    sizes: dict[str, int] = {}
    for axis, (low, high) in contract.sizes.items():
        width = (widths or {}).get(axis)
        if width is not None:
            sizes[axis] = draw(_allowed(kernel, axis, width, low, high))
        else:
            sizes[axis] = draw(_within(kernel, axis, (axes or {}).get(axis), low, high))
    if contract.has_cross() and not cross:
        sizes[contract.keys] = sizes[contract.queries]
    sizes = contract.fix(sizes)
    chosen: dict[str, Any] = {}
    for name, strategy in contract.parameters(sizes).items():
        allowed = kernel.limits.get(name)
        fixed = (parameters or {}).get(name)
        if fixed is not None:
            chosen[name] = fixed
        else:
            chosen[name] = draw(strategy if allowed is None else _filtered(strategy, allowed))
    optional = [o for o in contract.optional if kernel.supports(o, True)]
    if options is not None:
        optional = [o for o in optional if o in options]
    present = tuple(o for o in optional if draw(st.booleans()))
    return Case(
        operation=contract.operation,
        sizes=sizes,
        parameters=chosen,
        options=present,
        values=draw(st.sampled_from(list(values or contract.values))),
        layout=draw(st.sampled_from([x for x in layouts if kernel.supports("layout", x)])),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )


def draw_anywhere(contract: Contract, kernel: Kernel, dtype: str) -> st.SearchStrategy[Case]:
    """A case inside the kernel's limits; queries and keys have unequal lengths where they may."""
    return draw_case(contract, kernel, dtype, cross=True)


def _within(
    kernel: Kernel, axis: str, strategy: st.SearchStrategy[int] | None, low: int, high: int
) -> st.SearchStrategy[int]:
    allowed = kernel.limits.get(axis)
    if axis in kernel.draws:
        return st.sampled_from([n for n in kernel.draws[axis] if allowed is None or n in allowed])
    return _allowed(kernel, axis, strategy, low, high)


def _allowed(
    kernel: Kernel, axis: str, strategy: st.SearchStrategy[int] | None, low: int, high: int
) -> st.SearchStrategy[int]:
    allowed = kernel.limits.get(axis)
    if allowed is None:
        return st.integers(low, high) if strategy is None else strategy
    if strategy is not None:
        return _filtered(strategy, allowed)
    inside = [n for n in range(low, high + 1) if n in allowed]
    if not inside:
        inside = [n for n in range(high, 4097) if n in allowed][:2]
    return st.sampled_from(inside)


def _filtered(strategy: st.SearchStrategy[Any], allowed: Any) -> st.SearchStrategy[Any]:
    return strategy.filter(lambda value: value in allowed)


def near_blocks(kernel: Kernel, least: int = 1) -> st.SearchStrategy[int]:
    """Lengths around multiples of the kernel's own tile sizes, none below `least`."""
    lengths = {max(1, least)}
    for block in kernel.blocks:
        lengths |= {block // 2, block - 1, block, block + 1, 2 * block - 1, 2 * block + 1}
    return st.sampled_from(sorted(n for n in lengths if max(1, least) <= n <= kernel.largest))


def around_tiles(contract: Contract, kernel: Kernel) -> dict[str, st.SearchStrategy[int]]:
    """Lengths around the kernel's tiles, for every axis of tokens."""
    return {a: near_blocks(kernel, contract.least.get(a, 1)) for a in token_axes(contract)}


def full_tiles(contract: Contract, kernel: Kernel) -> dict[str, st.SearchStrategy[int]]:
    """Lengths that fill the kernel's largest tile: it may have smaller ones for less."""
    tile = max(kernel.blocks)
    full = [n for n in (tile, tile + 1, 2 * tile - 1, 2 * tile + 1) if n <= kernel.largest]
    lengths = full or [kernel.largest]
    axes = {}
    for axis in token_axes(contract):
        least = contract.least.get(axis, 1)
        axes[axis] = st.sampled_from(sorted({max(n, least) for n in lengths}))
    return axes


def alone(contract: Contract) -> dict[str, st.SearchStrategy[int]]:
    """One batch entry, and one query head of a group: what else long cases would repeat."""
    return {axis: st.just(1) for axis in ("batch", "group") if axis in contract.sizes}


def wide_tiles(
    contract: Contract, kernel: Kernel, dtype: str, values: Sequence[str] | None = None
) -> Strategy:
    """Cases of what most models have, in tiles that are full."""
    axes = full_tiles(contract, kernel) | alone(contract)
    return draw_case(contract, kernel, dtype, axes, values, widths=usual_widths(contract))


ALL_LAYOUTS = LAYOUTS
