"""Laws about calling twice: repetition, hidden state, tuning, far offsets, compilation."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from attnspec.conformance.arrays import flatten, place_arguments
from attnspec.conformance.contract import Contract
from attnspec.conformance.dtypes import round_to
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import (
    Law,
    Strategy,
    around_tiles,
    draw_anywhere,
    draw_case,
    in_each_configuration,
    token_axes,
    wide_tiles,
)
from attnspec.conformance.trial import Refused, Trial
from attnspec.conformance.violation import Violation

REPEATS = 3
FAR = 2**31


def around_blocks(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes=around_tiles(contract, kernel))


def any_tiles(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Around blocks, and heads as most models have them in tiles that are full."""
    return around_blocks(contract, kernel, dtype) | wide_tiles(contract, kernel, dtype)


def nothing_empty(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Around blocks too, and no axis is empty, nor made so by what the contract fits sizes to."""
    from hypothesis import strategies as st

    axes = {a: st.integers(1, most) for a, (least, most) in contract.sizes.items() if not least}
    drawn = draw_case(contract, kernel, dtype, axes=axes | around_tiles(contract, kernel))
    return drawn.filter(lambda case: all(case.sizes[axis] for axis in token_axes(contract)))


def check_repeatable(trial: Trial) -> None:
    """The same call gives the same bits."""
    arguments = trial.arguments()
    first = trial.run(arguments)
    for _ in range(REPEATS - 1):
        _same(first, trial.run(arguments), "differs between two equal calls")


def check_launched(trial: Trial) -> None:
    """The kernel's own counter of launches rises: what answered is what is being tested.

    Where an argument is the answer, there is nothing to launch.
    """
    count = trial.kernel.launches
    assert count is not None
    before, arguments = count(), trial.arguments()
    outputs = list(trial.run(arguments).values())
    given = [x for value in arguments.values() for x in flatten(value)]
    handed_back = all(any(np.array_equal(x, y) for y in given) for x in outputs)
    if count() == before and not handed_back:
        raise Violation(trial.contract.operation, "returned without launching its kernel")


def check_stateless(trial: Trial) -> None:
    """A call with other data and parameters in between leaves no trace."""
    arguments = trial.arguments()
    first = trial.run(arguments)
    other = trial.arguments(trial.case.with_(seed=trial.case.seed + 1))
    for name, value in arguments.items():
        if isinstance(value, float) and name in other and not isinstance(value, bool):
            other[name] = 2.0 * value
    with suppress(Refused):
        trial.run(other)
    _same(first, trial.run(arguments), "depends on an earlier call")


def check_far(trial: Trial) -> None:
    """An array whose entries lie more than 2^31 elements apart is read where it is."""
    kind = trial.kernel.arrays
    arguments = trial.arguments()
    near = trial.run(arguments)
    for array in trial.contract.arrays:
        value = arguments.get(array.name)
        if not (isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim >= 2):
            continue
        axis = next((i for i, n in enumerate(value.shape) if n == 2), None)
        if axis is None:
            continue
        placed = place_arguments(kind, arguments, "contiguous", trial.case.dtype)
        placed[array.name] = _spread_out(trial, value, axis)
        with trial.guarded():
            outputs = trial.contract.outputs_of(trial.contract.call(trial.kernel.call, placed))
        got = {name: kind.get(x) for name, x in outputs.items()}
        _same(near, got, f"{array.name} with far strides is read elsewhere")


def _spread_out(trial: Trial, value: np.ndarray, axis: int) -> Any:
    """`value` with 2^31 elements between its two entries along `axis`; the gap is never touched."""
    kind, dtype = trial.kernel.arrays, trial.case.dtype
    inner = [n for i, n in enumerate(value.shape) if i != axis]
    strides = list(np.cumprod([1, *inner[:0:-1]])[::-1]) if inner else []
    strides.insert(axis, FAR)
    length = FAR + int(np.prod(inner)) if inner else FAR + 1
    if trial.kernel.array == "torch":
        import torch

        flat = torch.empty(length, dtype=getattr(torch, dtype), device=trial.kernel.device)
        view = flat.as_strided(value.shape, strides)
        view.copy_(torch.from_numpy(value).to(flat.dtype))
        return view
    buffer = np.empty(length, dtype)
    out = np.lib.stride_tricks.as_strided(
        buffer, value.shape, [s * buffer.itemsize for s in strides]
    )
    out[...] = round_to(value, dtype)
    return kind and out


def two_of_something(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    from hypothesis import strategies as st

    axes = {a: st.just(2) for a in ("batch", "kv_heads") if a in contract.sizes}
    axes |= {a: st.just(1) for a in ("group",) if a in contract.sizes}
    return draw_case(contract, kernel, dtype, axes=axes, values=("normal",))


def check_compiled(trial: Trial) -> None:
    """``torch.compile(fullgraph=True)`` gives the eager answer."""
    import torch

    arguments = trial.arguments()
    eager = trial.run(arguments)
    placed = place_arguments(trial.kernel.arrays, arguments, "contiguous", trial.case.dtype)
    torch._dynamo.reset()
    compiled = torch.compile(trial.kernel.call, fullgraph=True, dynamic=False, backend="aot_eager")
    with trial.guarded():
        outputs = trial.contract.outputs_of(trial.contract.call(compiled, placed))
    got = {name: trial.kernel.arrays.get(x) for name, x in outputs.items()}
    _same(eager, got, "differs when compiled")


def check_graph(trial: Trial) -> None:
    """A captured CUDA graph, replayed on new data, gives the answer for the new data."""
    import torch

    arguments = trial.arguments()
    other = trial.arguments(trial.case.with_(seed=trial.case.seed + 1))
    # A graph has fixed shapes: an argument whose form the seed changes stays what it is.
    for name, value in arguments.items():
        if _form(value) != _form(other[name]):
            other[name] = value
    kind, dtype = trial.kernel.arrays, trial.case.dtype
    placed = place_arguments(kind, arguments, "contiguous", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        trial.contract.call(trial.kernel.call, placed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = trial.contract.call(trial.kernel.call, placed)
    fresh = place_arguments(kind, other, "contiguous", dtype)
    for name, value in fresh.items():
        for old, new in zip(flatten(placed[name]), flatten(value), strict=True):
            if kind.is_array(new):
                old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    outputs = trial.contract.outputs_of(results)
    got = {name: kind.get(x) for name, x in outputs.items()}
    trial.judge(got, other)


def _form(value: Any) -> list[Any]:
    """Shape and dtype of every array of an argument, and what is no array as it is."""
    leaves = flatten(value)
    return [(x.shape, x.dtype) if isinstance(x, np.ndarray) else x for x in leaves]


def _same(first: dict[str, np.ndarray], second: dict[str, np.ndarray], message: str) -> None:
    for name, value in first.items():
        if not np.array_equal(value, second[name], equal_nan=value.dtype.kind == "f"):
            raise Violation(name, message)


LAWS = (
    Law(
        "launched",
        "The code under test really ran.",
        ("K14",),
        nothing_empty,
        check_launched,
        applies=lambda contract, kernel: kernel.launches is not None,
        examples=0.05,
    ),
    Law(
        "repeatable",
        "The same call gives the same bits every time.",
        ("K12",),
        around_blocks,
        check_repeatable,
        applies=lambda contract, kernel: kernel.deterministic,
        examples=0.2,
    ),
    Law(
        "stateless",
        "No call leaves anything behind for the next.",
        ("K12",),
        draw_anywhere,
        check_stateless,
        examples=0.2,
    ),
    Law(
        "configurations",
        "Every tuning configuration is right by itself.",
        ("K10",),
        any_tiles,
        in_each_configuration(Trial.check),
        applies=lambda contract, kernel: bool(kernel.configs),
        examples=0.2,
    ),
    Law(
        "far",
        "Offsets beyond 2^31 elements are addressed correctly.",
        ("K1",),
        two_of_something,
        check_far,
        applies=lambda contract, kernel: bool({"batch", "kv_heads"} & contract.axes()),
        examples=0.0,
    ),
    Law(
        "compiled",
        "torch.compile changes nothing.",
        ("K14",),
        draw_anywhere,
        check_compiled,
        applies=lambda contract, kernel: kernel.compiled,
        examples=0.03,
    ),
    Law(
        "graph",
        "A captured CUDA graph follows its inputs.",
        ("K12",),
        draw_anywhere,
        check_graph,
        applies=lambda contract, kernel: kernel.graph and kernel.device == "cuda",
        examples=0.03,
    ),
)
