"""A contract: what the suite must know of an operation beyond its name and its reference.

A contract says which arrays go in, along which axes, how their sizes and parameters are drawn, and
what kind of answer comes out. Everything else (laws, budgets, reports) is derived from it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.arrays import flatten
from attnspec.conformance.case import Case
from attnspec.conformance.values import make_values
from attnspec.reference import Operation, find_operation

if TYPE_CHECKING:
    from attnspec.conformance.packing import Packed

Make = Callable[[np.random.Generator, Case], Any]
Change = Callable[[dict[str, Any]], Any]
Parameters = Callable[[Mapping[str, int]], Mapping[str, st.SearchStrategy[Any]]]


class BadValue(NamedTuple):
    """One of `Contract.bad_inputs` that only reading an array shows: its shape would do."""

    what: str
    name: str
    change: Change


@dataclass(frozen=True)
class Array:
    """An array argument.

    `axes` names its axes ("batch heads queries d"); `role` tells the data generator what it is.
    `make` builds special data (masks, lengths, offsets, states) instead. An `optional` array may be
    absent: those listed in a case's options are present. Where the operation gives such an argument
    no default, absent means None.
    """

    name: str
    axes: str = ""
    role: str = "other"
    make: Make | None = None
    optional: bool = False

    def data(self, case: Case) -> Any:
        rng = case.generator(self.name)
        if self.make is not None:
            return self.make(rng, case)
        shape = case.shape(self.axes)
        if case.layout == "expanded" and len(shape) > 1 and shape[0] > 1:
            one = make_values(case.values, rng, (1, *shape[1:]), self.role)
            return np.repeat(one, shape[0], axis=0)
        return make_values(case.values, rng, shape, self.role)


@dataclass(frozen=True)
class Output:
    """One returned value, judged by its `kind`.

    "value": floats, against the budget of the rounded run, row by row (the last axis is a row
    unless `row_axes` is 0). "exact": equal, whatever the dtype. "copy": entries of the inputs, bit
    for bit, NaN included. "selection": indices (or a mask) judged by the scores of
    `Contract.ranking`. `dtype` is "input" or a fixed dtype.

    A `wide` output, an intermediate result such as scores, may come in the accumulator's dtype too.
    A `plain` output is a Python number, not an array. `nan` says that the truth may be NaN, and
    that the answer must be NaN there. A selection hidden in a larger output (the positions of a
    cache's slots) is found by ``chosen(output, arguments)``; the output itself must then equal
    `Contract.follow`. `by_query` is False if the rows are not those of queries (a state).
    `cancels` says that it is a small difference of large terms, whose zeros may be rounding noise.
    """

    name: str
    kind: str = "value"
    dtype: str = "input"
    wide: bool = False
    row_axes: int = 1
    plain: bool = False
    nan: bool = False
    chosen: Callable[[np.ndarray, Mapping[str, Any]], np.ndarray] | None = None
    by_query: bool = True
    cancels: bool = False


@dataclass(frozen=True)
class Ranking:
    """What a selection must achieve: the best `k` of `scores` (..., n).

    With a `threshold`, all scores above it instead, or with `softmax` as well, all whose softmax
    is, compared as logits. `allowed`, `forced` and `extra` are bool, shaped as the scores: entries
    that may, and that must, be chosen. `k` counts the forced ones; the extra ones come after the
    choice, so `k` counts those among the best. `exact` says when equal scores are real ties:
    "always" (they are an argument), "integers" (exact sums of products of inputs) or "never".
    """

    scores: np.ndarray
    k: int = 0
    exact: str = "never"
    allowed: np.ndarray | None = None
    forced: np.ndarray | None = None
    extra: np.ndarray | None = None
    threshold: float | None = None
    softmax: bool = False


@dataclass(frozen=True)
class Stream:
    """How an operation that takes new tokens and a state replays a whole sequence.

    `start(arguments)` gives the state before the first token from whole-sequence arguments,
    `feed(arguments, state, first, last)` the step's arguments for tokens [first, last),
    `whole(arguments)` the outputs that the concatenated step outputs must equal. `hidden` is that
    of `Contract`, for the whole sequence. `carried(results)` is the state among a step's results
    after the first: by default all of them.
    """

    arrays: tuple[Array, ...]
    start: Callable[[Mapping[str, Any]], Any]
    feed: Callable[[Mapping[str, Any], Any, int, int], Mapping[str, Any]]
    whole: Callable[[Mapping[str, Any]], np.ndarray]
    tokens: str = "tokens"
    chunked: bool = True
    hidden: Callable[[Mapping[str, Any]], Ranking] | None = None
    carried: Callable[[tuple[Any, ...]], Any] = lambda rest: rest[0] if len(rest) == 1 else rest


@dataclass(frozen=True)
class Contract:
    """See the module. Axes used by laws: `queries` and `keys` name the token axes.

    sizes: inclusive range of every axis in ordinary cases; `least` what a token axis can shrink to
        (0 unless given).
    fix: moves drawn sizes to ones the operation accepts (an even width), never upwards.
    linear_in: arguments in which the first output is linear; "v S0" is linear in both together.
    key_arrays: arguments whose `keys` axis may be permuted together without changing the outputs,
        when `permutable(case)` says so (no causal order, no positions).
    poison: given the arguments, overwrites entries that the operation must not read (K11).
    neutral: argument name -> value that must act as if the argument were absent, given a case.
    packed: what offsets cut, and which arguments hold a state of each sequence.
    splits: two or more argument sets whose results, merged by lse, must equal the whole.
    cells: a cell's name ("causal cross", "left", "GQA") -> how to move a case into that cell.
    bad_inputs: wrong calls beyond those every array allows: what is wrong, which argument the
        message must name, and the wrong value made from good arguments (or a `BadValue`).
    ranking: the reference scores that the "selection" output is judged by, with the count wanted.
    follow: the truth of all outputs, given the kernel's own selection.
    form: the operation as fast kernels compute it, if not as the chapter does: a recurrence in
        chunks, whose products round what it keeps in float32. Rounded runs execute both.
    cancelling: gradients ("ds") that are small differences of large terms, as `Output.cancels`.
    hidden: a selection that no output shows, its scores (..., n) having the rows (...) of the first
        output. Rows on which rounding may change the choice are not judged.
    """

    operation: str
    sizes: Mapping[str, tuple[int, int]]
    arrays: tuple[Array, ...]
    outputs: tuple[Output, ...]
    parameters: Parameters = lambda sizes: {}
    queries: str = "queries"
    keys: str = "keys"
    least: Mapping[str, int] = field(default_factory=dict)
    fix: Callable[[dict[str, int]], dict[str, int]] = lambda sizes: sizes
    values: tuple[str, ...] = ("normal", "peaky", "flat", "structured", "one-hot", "real")
    linear_in: tuple[str, ...] = ()
    key_arrays: tuple[str, ...] = ()
    permutable: Callable[[Case], bool] = lambda case: True
    causal: Callable[[Case], bool] | None = None
    poison: Callable[[dict[str, Any], Case], dict[str, Any]] | None = None
    neutral: Mapping[str, Callable[[Case], Any]] = field(default_factory=dict)
    packed: Packed | None = None
    split: Callable[[Mapping[str, Any], Case], list[dict[str, Any]] | None] | None = None
    stream: Stream | None = None
    cells: Mapping[str, Callable[[Case], Case]] = field(default_factory=dict)
    bad_inputs: tuple[tuple[str, str, Change], ...] = ()
    ranking: Callable[[Mapping[str, Any]], Ranking] | None = None
    follow: Callable[[Mapping[str, Any], np.ndarray], Any] | None = None
    form: Callable[..., Any] | None = None
    cancelling: tuple[str, ...] = ()
    hidden: Callable[[Mapping[str, Any]], Ranking] | None = None

    @property
    def spec(self) -> Operation:
        return find_operation(self.operation)

    @cached_property
    def optional(self) -> tuple[str, ...]:
        return tuple(array.name for array in self.arrays if array.optional)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return self.spec.differentiable

    def axes(self) -> set[str]:
        """Axes the ordinary draw chooses (query heads follow from kv_heads and group)."""
        return set(self.sizes)

    def has_cross(self) -> bool:
        """Whether queries and keys have separate lengths."""
        return self.queries != self.keys and {self.queries, self.keys} <= set(self.sizes)

    def arguments(self, case: Case) -> dict[str, Any]:
        """The operation's arguments for `case`: float64 arrays and plain parameters."""
        arrays: dict[str, Any] = {}
        for array in self.arrays:
            if not array.optional or array.name in case.options:
                arrays[array.name] = array.data(case)
            elif self.spec.signature.parameters[array.name].default is inspect.Parameter.empty:
                arrays[array.name] = None
        return {**arrays, **case.parameters}

    def call(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Call `function` as the operation: positional parameters by place, the others by name.

        A keyword whose value is the reference's default is left out, so that a kernel need not
        know options it is not asked for.
        """
        signature = self.spec.signature
        positional, keywords = [], {}
        by_name = False
        for name, parameter in signature.parameters.items():
            if name not in arguments:
                by_name = True
                continue
            value = arguments[name]
            if parameter.kind is parameter.KEYWORD_ONLY or by_name:
                if not _is_default(value, parameter.default):
                    keywords[name] = value
            else:
                positional.append(value)
        return function(*positional, **keywords)

    def outputs_of(self, result: Any) -> dict[str, Any]:
        """The operation's result as a dict by output name.

        An output called ``state.k`` is the attribute k of the returned item in the place of
        `state`, so that a kernel's own state object may hold more than the reference's.
        """
        if len(self.outputs) == 1:
            return {self.outputs[0].name: result}
        names = [output.name for output in self.outputs]
        if any("." in name for name in names):
            items = list(dict.fromkeys(name.partition(".")[0] for name in names))
            given = (result,) if len(items) == 1 else result
            if not isinstance(given, tuple) or len(given) != len(items):
                raise TypeError(f"returned {type(result).__name__}, expected ({', '.join(items)})")
            by_item = dict(zip(items, given, strict=True))
            return {name: _attribute(by_item, name) for name in names}
        flat = flatten(result)
        if len(flat) != len(names):
            raise TypeError(f"returned {len(flat)} values, expected {len(names)}")
        return dict(zip(names, flat, strict=True))


def _attribute(items: Mapping[str, Any], name: str) -> Any:
    item, _, path = name.partition(".")
    try:
        return attrgetter(path)(items[item]) if path else items[item]
    except AttributeError as error:
        raise TypeError(f"returned {type(items[item]).__name__}: {error}") from None


def _is_default(value: Any, default: Any) -> bool:
    return default is not inspect.Parameter.empty and (
        value is default or (type(value) is type(default) and bool(np.all(value == default)))
    )


@cache
def contracts() -> dict[str, Contract]:
    """Every contract by operation name, found by walking the contracts package."""
    found: dict[str, Contract] = {}
    package = importlib.import_module("attnspec.conformance.contracts")
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for contract in getattr(importlib.import_module(info.name), "CONTRACTS", ()):
            found[contract.operation] = contract
    return found


def find_contract(operation: str) -> Contract:
    """The contract of ``slug.function``; ValueError lists the known ones."""
    try:
        return contracts()[operation]
    except KeyError:
        known = ", ".join(sorted(contracts()))
        raise ValueError(f"operation: got {operation!r}, expected one of: {known}") from None
